from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medtrain.data import cache as cache_module
from medtrain.data.cache import HashCache, NodeCache
from medtrain.errors import DataError, StorageError, is_verdict
from medtrain.storage.files import checksum_of
from medtrain.storage.local import LocalStore
from medtrain.storage.stores import open_store
from medtrain.storage.uri import ObjectInfo


class Bucket(LocalStore):
    """A folder that passes for a bucket and counts its downloads."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.uri = "s3://bucket/films"
        self.downloads: list[str] = []

    def download(self, key: str, path: Path, *, checksum: str | None = None) -> ObjectInfo:
        self.downloads.append(key)
        return super().download(key, path, checksum=checksum)


@pytest.fixture
def films(tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "001.bmp").write_bytes(b"one")
    (folder / "002.bmp").write_bytes(b"two")
    return folder


def entries(folder: Path) -> dict[str, str | None]:
    return {key: checksum_of(folder / key) for key in ("sub/001.bmp", "002.bmp")}


def age(path: Path, *, seconds: int = 60) -> None:
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns - seconds * 10**9))


def test_files_of_a_bucket_are_downloaded_once_a_node(films: Path, tmp_path: Path) -> None:
    bucket, cache = Bucket(films), NodeCache(tmp_path / "cache")

    folder = cache.fetch(bucket, entries(films), "set")
    again = NodeCache(tmp_path / "cache").fetch(bucket, entries(films), "set")

    assert folder == again
    assert (folder / "sub/001.bmp").read_bytes() == b"one"
    assert sorted(bucket.downloads) == ["002.bmp", "sub/001.bmp"]


def test_a_changed_object_is_fetched_anew(films: Path, tmp_path: Path) -> None:
    bucket, cache = Bucket(films), NodeCache(tmp_path / "cache")
    cache.fetch(bucket, entries(films), "set")
    (films / "002.bmp").write_bytes(b"new")
    bucket.downloads.clear()

    folder = cache.fetch(bucket, entries(films), "set")

    assert bucket.downloads == ["002.bmp"]
    assert (folder / "002.bmp").read_bytes() == b"new"


def test_a_copy_that_was_touched_is_fetched_anew(films: Path, tmp_path: Path) -> None:
    bucket, cache = Bucket(films), NodeCache(tmp_path / "cache")
    folder = cache.fetch(bucket, entries(films), "set")
    (folder / "002.bmp").write_bytes(b"damaged")
    (folder / "sub/001.bmp").unlink()

    cache.fetch(bucket, entries(films), "set")

    assert (folder / "002.bmp").read_bytes() == b"two"
    assert (folder / "sub/001.bmp").read_bytes() == b"one"


def test_content_other_than_the_manifests_is_refused(films: Path, tmp_path: Path) -> None:
    expected = entries(films)
    (films / "002.bmp").write_bytes(b"owt")

    with pytest.raises(StorageError, match=r"002\.bmp"):
        NodeCache(tmp_path / "cache").fetch(Bucket(films), expected, "set")


@pytest.mark.parametrize("key", ["../outside", "/etc/passwd"])
def test_keys_cannot_lead_out_of_the_cache(films: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(StorageError, match="key must be"):
        NodeCache(tmp_path / "cache").fetch(Bucket(films), {key: None}, "set")


def test_a_local_folder_is_used_in_place(films: Path, tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache")

    assert cache.fetch(open_store(str(films)), entries(films), "set") == films
    assert not (tmp_path / "cache" / "files").exists()


def test_a_local_file_that_changed_is_named(films: Path, tmp_path: Path) -> None:
    expected = entries(films)
    (films / "002.bmp").write_bytes(b"owt")
    (films / "sub/001.bmp").unlink()

    with pytest.raises(StorageError, match=r"sub/001\.bmp is gone, 002\.bmp has changed") as raised:
        NodeCache(tmp_path / "cache").fetch(open_store(str(films)), expected, "set")

    assert str(films) in str(raised.value) and "data.root" in str(raised.value)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"owt")])
def test_data_that_lie_elsewhere_are_no_verdict_on_a_run(
    films: Path, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    cache, expected = NodeCache(tmp_path / "cache"), entries(films)
    copy = Path(shutil.copytree(films, tmp_path / "copy"))
    damage(films / "002.bmp")

    with pytest.raises(StorageError) as raised:
        cache.fetch(open_store(str(films)), expected, "set")

    assert not is_verdict(raised.value)
    assert cache.fetch(open_store(str(copy)), expected, "set") == copy


def test_a_file_is_hashed_once(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []

    def counting(path: Path) -> str:
        hashed.append(path)
        return checksum_of(path).removeprefix("sha256:")

    monkeypatch.setattr(cache_module, "sha256_of", counting)
    hashes, file = HashCache(tmp_path / "hashes.sqlite"), films / "002.bmp"
    age(file)

    first = hashes.checksums([file])
    second = HashCache(tmp_path / "hashes.sqlite").checksums([file])

    assert first == second == {file: checksum_of(file)}
    assert hashed == [file]
    file.write_bytes(b"owt")
    age(file)
    assert hashes.checksums([file]) == {file: checksum_of(file)}


def test_a_hash_of_a_file_that_may_still_change_is_not_kept(films: Path, tmp_path: Path) -> None:
    hashes, file = HashCache(tmp_path / "hashes.sqlite"), films / "002.bmp"
    hashes.checksums([file])
    found = file.stat()
    # Same size, same time stamp, same inode: what a quick second write may look like.
    file.write_bytes(b"owt")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))

    assert hashes.checksums([file]) == {file: checksum_of(file)}


def test_an_array_is_built_once_and_mapped(tmp_path: Path) -> None:
    built = []

    def build() -> np.ndarray:
        built.append(1)
        return np.arange(12, dtype=np.uint8).reshape(3, 4).T

    first = NodeCache(tmp_path).array("film 001", build)
    second = NodeCache(tmp_path).array("film 001", build)

    assert built == [1]
    assert isinstance(second, np.memmap) and not second.flags.writeable
    assert first.shape == (4, 3) and (first == second).all()
    assert second[1, 2] == 9


def test_a_damaged_array_is_built_anew(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path)
    cache.array("film", lambda: np.zeros(3))
    (stored,) = tmp_path.rglob("*.npy")
    stored.write_bytes(b"\x93NUMPY")

    assert (cache.array("film", lambda: np.ones(3)) == 1).all()


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build() -> np.ndarray:
        raise DataError("no film")

    with pytest.raises(DataError):
        NodeCache(tmp_path).array("film", build)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

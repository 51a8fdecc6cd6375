"""Many files at once: verified, resumed, every failure told."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from medtrain.errors import ObjectMissing, StorageError
from medtrain.storage import transfer
from medtrain.storage.stores import open_store
from medtrain.storage.transfer import download_files, download_tree, upload_tree
from medtrain.storage.uri import Store

NAMES = ["a.txt", "b/c.txt", "b/d e+f%.txt", "ü/g.txt"]


def text_of(content: str) -> str:
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four files, each holding its own name."""
    for name in NAMES:
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "source"


def read_tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_tree_goes_up_and_comes_down(store: Store, folder: Path, tmp_path: Path) -> None:
    sent = upload_tree(folder, store, "some/where/")
    got = download_tree(store, "some/where", tmp_path / "target")

    assert sent == {f"some/where/{name}": text_of(name) for name in NAMES}
    assert got == {name: text_of(name) for name in NAMES}
    assert read_tree(tmp_path / "target") == {name: name for name in NAMES}
    assert download_files(store, sent, tmp_path / "root") == sent
    assert read_tree(tmp_path / "root" / "some" / "where") == {name: name for name in NAMES}


def test_a_neighbor_with_a_longer_name_is_not_part_of_a_tree(store: Store, tmp_path: Path) -> None:
    store.write("tree/a", b"a")
    store.write("tree2/b", b"b")

    assert list(download_tree(store, "tree", tmp_path / "target")) == ["a"]


def test_progress_counts_to_the_end(store: Store, folder: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    upload_tree(folder, store, progress=lambda done, total: told.append((done, total)))
    download_tree(
        store, "", tmp_path / "t", progress=lambda done, total: told.append((done, total))
    )

    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)] * 2


class Counting:
    """A store that counts what is fetched from it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.fetched: list[str] = []

    def __getattr__(self, name: str):
        return getattr(self._store, name)

    def download(self, key: str, path: Path, *, checksum: str | None = None):
        self.fetched.append(key)
        return self._store.download(key, path, checksum=checksum)


def test_only_what_is_absent_or_different_is_fetched_again(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    files = upload_tree(folder, store)
    target = tmp_path / "target"
    download_files(store, files, target)
    (target / "a.txt").write_text("damaged")
    (target / "b/c.txt").unlink()
    counting = Counting(store)

    got = download_files(counting, files, target)

    assert sorted(counting.fetched) == ["a.txt", "b/c.txt"]
    assert got == files
    assert read_tree(target) == {name: name for name in NAMES}


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_without_a_checksum_of_ones_own_the_stores_decides_what_is_fetched(
    kind: str, new_uri: Callable[[str], str], folder: Path, tmp_path: Path
) -> None:
    store = open_store(new_uri(kind))
    files = dict.fromkeys(upload_tree(folder, store))
    download_files(store, files, tmp_path / "target")
    (tmp_path / "target" / "a.txt").write_text("damaged")
    counting = Counting(store)

    download_files(counting, files, tmp_path / "target")

    assert counting.fetched == ["a.txt"]
    assert (tmp_path / "target" / "a.txt").read_text() == "a.txt"


def test_every_failure_is_told_and_the_rest_is_there(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    files: dict[str, str | None] = dict(upload_tree(folder, store))
    files["gone"] = None
    files["a.txt"] = text_of("something else")

    with pytest.raises(StorageError) as raised:
        download_files(store, files, tmp_path / "target")

    message = str(raised.value)
    assert "5 files must be brought from" in message and "but 2 failed" in message
    assert "\n  - a.txt: " in message and "must have the checksum sha256:" in message
    assert "\n  - gone: " in message and "must exist" in message
    assert sorted(read_tree(tmp_path / "target")) == NAMES[1:]


def test_a_file_that_cannot_be_sent_is_named(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(store).upload

    def upload(self, path: Path, key: str):
        if key == "b/c.txt":
            path.unlink()
        return real(self, path, key)

    monkeypatch.setattr(type(store), "upload", upload)

    with pytest.raises(StorageError, match=r"4 files must be uploaded .* 1 failed:\n  - b/c.txt: "):
        upload_tree(folder, store)
    assert [info.key for info in store.list()] == [name for name in NAMES if name != "b/c.txt"]


def test_a_store_that_is_away_is_not_asked_for_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_MAX_FAILURES", 3)
    store = open_store(str(tmp_path / "store"))

    with pytest.raises(StorageError, match=r"100 files .* but 3 failed:") as raised:
        download_files(
            store, {f"{n:03d}": None for n in range(100)}, tmp_path / "target", workers=1
        )
    assert "more that were not tried" in str(raised.value)


def test_keys_cannot_write_outside_of_the_folder(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"\.\./outside: key must be names"):
        download_files(store, {"../outside": None}, tmp_path / "target")
    with pytest.raises(StorageError, match=r"/etc/x: key must be names"):
        download_files(store, {"/etc/x": None}, tmp_path / "target")


def test_an_empty_tree_is_an_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ObjectMissing, match="must hold objects, but there are none"):
        download_tree(store, "nothing", tmp_path / "target")


def test_what_is_no_folder_cannot_be_uploaded(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none must be a folder, but is none"):
        upload_tree(tmp_path / "none", store)


def test_a_mistake_of_the_programmer_is_not_collected(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        upload_tree(folder, store, progress=fail)

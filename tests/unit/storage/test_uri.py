"""What every store promises, whatever it is made of."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from medtrain.errors import ConfigError, ObjectDamaged, ObjectMissing, StorageError
from medtrain.storage.stores import open_store
from medtrain.storage.uri import (
    ObjectInfo,
    Store,
    join_uri,
    sha256_of,
)

WEIRD_KEYS = [
    "with space/a b.txt",
    "plus+plus/a+b=c&d.txt",
    "per%20cent/100%.txt",
    "hash#/x#y?z.txt",
    "Röntgen/頭部/è.txt",
    "quotes'\"/(x)[y]{z}~!@$^;,.txt",
    ".hidden/.file",
]


def text_of(digest: bytes | str) -> str:
    data = digest.encode() if isinstance(digest, str) else digest
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_what_is_written_is_read_back(store: Store) -> None:
    written = store.write("a/b.txt", b"content")

    assert store.read("a/b.txt") == b"content"
    assert store.exists("a/b.txt")
    assert (written.key, written.size, written.checksum) == ("a/b.txt", 7, text_of("content"))
    assert store.info("a/b.txt").size == 7
    assert store.info("a/b.txt").version == written.version


def test_a_second_write_replaces_the_first(store: Store) -> None:
    first = store.write("a", b"first one")
    second = store.write("a", b"second")

    assert store.read("a") == b"second"
    assert second.version != first.version


def test_an_empty_object_is_an_object(store: Store, tmp_path: Path) -> None:
    store.write("empty", b"")

    assert store.exists("empty")
    assert store.read("empty") == b""
    assert store.download("empty", tmp_path / "empty").checksum == text_of("")
    assert (tmp_path / "empty").read_bytes() == b""


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, None, b"0123456789"),
        (3, None, b"3456789"),
        (3, 4, b"3456"),
        (8, 9, b"89"),
        (10, 5, b""),
        (99, None, b""),
        (2, 0, b""),
    ],
)
def test_a_stretch_is_read(store: Store, start: int, length: int | None, expected: bytes) -> None:
    store.write("digits", b"0123456789")

    assert store.read("digits", start=start, length=length) == expected


def test_what_is_absent_is_said_to_be(store: Store, tmp_path: Path) -> None:
    store.write("a/b", b"")

    assert not store.exists("a/c")
    assert not store.exists("a")
    for ask in (
        lambda: store.info("a/c"),
        lambda: store.info("a"),
        lambda: store.read("a/c"),
        lambda: store.read("a/c", start=1, length=0),
        lambda: store.download("a/c", tmp_path / "c"),
    ):
        with pytest.raises(ObjectMissing, match=r"must exist, but there is no such"):
            ask()
    assert not (tmp_path / "c").exists()


def test_deleting_is_final_and_may_be_repeated(store: Store) -> None:
    store.write("a", b"")

    store.delete("a")
    store.delete("a")
    store.delete("never/was")

    assert not store.exists("a")


def test_a_listing_is_deep_sorted_and_relative(store: Store) -> None:
    for key in ("b", "a/z", "a/b/c", "a-b", "ab"):
        store.write(key, key.encode())

    assert [info.key for info in store.list()] == ["a-b", "a/b/c", "a/z", "ab", "b"]
    assert [info.key for info in store.list("a/")] == ["a/b/c", "a/z"]
    assert [info.key for info in store.list("a")] == ["a-b", "a/b/c", "a/z", "ab"]
    assert [info.key for info in store.list("a/b")] == ["a/b/c"]
    assert [info.size for info in store.list("a/")] == [5, 3]
    assert {info.version for info in store.list("b")} == {store.info("b").version}
    assert store.list("nothing/") == []


def test_only_the_first_creates(store: Store) -> None:
    assert store.create("once", b"first")
    assert not store.create("once", b"second")
    assert store.read("once") == b"first"
    store.delete("once")
    assert store.create("once", b"third")


def test_a_race_to_create_has_exactly_one_winner(store: Store) -> None:
    writers = 8
    with ThreadPoolExecutor(writers) as pool:
        for race in range(10):
            won = list(
                pool.map(
                    lambda n, key=f"race/{race}": store.create(key, str(n).encode() * 9),
                    range(writers),
                )
            )
            assert sum(won) == 1
            assert store.read(f"race/{race}") == str(won.index(True)).encode() * 9


def test_readers_never_see_a_part_of_what_is_created(store: Store) -> None:
    contents = {bytes([65 + n]) * 20_000 for n in range(2)}
    seen: set[bytes] = set()

    def watch(key: str) -> None:
        while not seen:
            try:
                seen.add(store.read(key))
            except ObjectMissing:
                continue

    for race in range(3):
        seen.clear()
        with ThreadPoolExecutor(3) as pool:
            watching = pool.submit(watch, f"whole/{race}")
            list(pool.map(lambda data, key=f"whole/{race}": store.create(key, data), contents))
            watching.result()
        assert seen <= contents


@pytest.mark.parametrize("size", [0, 10, 100_000])
def test_a_file_goes_up_and_comes_down(store: Store, tmp_path: Path, size: int) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))

    sent = store.upload(source, "deep/er/object.bin")
    got = store.download("deep/er/object.bin", tmp_path / "new" / "target.bin")

    assert sent.checksum == got.checksum == f"sha256:{sha256_of(source)}"
    assert sent.size == got.size == size
    assert (tmp_path / "new" / "target.bin").read_bytes() == source.read_bytes()


def test_a_download_replaces_a_file_whole_and_leaves_nothing_beside_it(
    store: Store, tmp_path: Path
) -> None:
    store.write("a", b"new content")
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "a").write_bytes(b"old")

    store.download("a", folder / "a", checksum=text_of("new content"))

    assert (folder / "a").read_bytes() == b"new content"
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_other_content_than_promised_is_refused_and_never_visible(
    store: Store, tmp_path: Path
) -> None:
    store.write("a", b"other content")
    folder = tmp_path / "target"
    folder.mkdir()

    with pytest.raises(ObjectDamaged, match=r"must have the checksum sha256:"):
        store.download("a", folder / "a", checksum=text_of("promised content"))

    assert list(folder.iterdir()) == []


def test_a_file_that_was_there_survives_a_refused_download(store: Store, tmp_path: Path) -> None:
    store.write("a", b"other content")
    (tmp_path / "a").write_bytes(b"good")

    with pytest.raises(ObjectDamaged):
        store.download("a", tmp_path / "a", checksum=text_of("promised content"))

    assert (tmp_path / "a").read_bytes() == b"good"


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_an_upload_after_which_the_store_holds_something_else_is_an_error(
    kind: str, new_uri: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(new_uri(kind))
    (tmp_path / "large").write_bytes(b"content")
    monkeypatch.setattr(sys.modules[type(store).__module__], "_SMALL", 0)
    monkeypatch.setattr(
        type(store), "info", lambda self, key: ObjectInfo(key, 3, text_of("content"), None)
    )

    with pytest.raises(ObjectDamaged, match=r"must have 7 bytes .* but the store says 3"):
        store.upload(tmp_path / "large", "large")


def test_uploading_what_is_not_there_is_one_sentence(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nothing cannot be read or written"):
        store.upload(tmp_path / "nothing", "a")


def test_a_child_is_a_store_of_its_own(store: Store) -> None:
    child = store.child("runs/one/")
    child.write("a.txt", b"a")

    assert child.uri == f"{store.uri}/runs/one"
    assert store.read("runs/one/a.txt") == b"a"
    assert [info.key for info in child.list()] == ["a.txt"]
    assert [info.key for info in child.child("deep").list()] == []
    assert open_store(child.uri).read("a.txt") == b"a"
    assert store.child("").uri == store.uri


@pytest.mark.parametrize("key", WEIRD_KEYS)
def test_weird_keys_are_keys(store: Store, tmp_path: Path, key: str) -> None:
    content = key.encode()

    assert store.create(key, content)
    assert not store.create(key, b"")
    assert [info.key for info in store.list()] == [key]
    assert store.read(key) == content
    assert store.read(key, start=1, length=2) == content[1:3]
    assert store.download(key, tmp_path / "file").checksum == text_of(content)
    store.upload(tmp_path / "file", f"copy/{key}")
    assert store.child("copy").info(key).size == len(content)
    store.delete(key)
    assert not store.exists(key)


@pytest.mark.parametrize(
    "key",
    ["", "/", "/etc/passwd", "..", "../x", "a/../../x", "a//b", "a/", "./a", "a/.", "a\0b", "a\nb"],
)
def test_keys_that_could_lead_elsewhere_are_refused(store: Store, tmp_path: Path, key: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    calls = [
        lambda: store.exists(key),
        lambda: store.info(key),
        lambda: store.read(key),
        lambda: store.write(key, b""),
        lambda: store.create(key, b""),
        lambda: store.delete(key),
        lambda: store.upload(tmp_path / "file", key),
        lambda: store.download(key, tmp_path / "target"),
    ]
    for call in calls:
        with pytest.raises(StorageError, match=r"key must be names joined by '/'"):
            call()


@pytest.mark.parametrize("prefix", ["..", "../x/", "/etc", "a//b", "a/../"])
def test_prefixes_that_could_lead_elsewhere_are_refused(store: Store, prefix: str) -> None:
    with pytest.raises(StorageError, match=r"key must be names"):
        store.list(prefix)
    with pytest.raises(StorageError, match=r"key must be names"):
        store.child(prefix)


@pytest.mark.parametrize("uri", ["", "http://x/y", "s3://", "gs:///", "file:///tmp"])
def test_only_folders_and_two_kinds_of_buckets_are_stores(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"must be a folder, s3://bucket/prefix or gs://"):
        open_store(uri)


@pytest.mark.parametrize("uri", ["s3://bucket/a/../b", "gs://bucket/a//b"])
def test_a_uri_cannot_lead_out_of_its_bucket(uri: str) -> None:
    with pytest.raises(StorageError, match=r"key must be names"):
        open_store(uri)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("s3://bucket", "a", "b/c"), "s3://bucket/a/b/c"),
        (("s3://bucket/", "/a/"), "s3://bucket/a"),
        (("/data/", "x"), "/data/x"),
        (("/data", "", "x"), "/data/x"),
    ],
)
def test_uris_are_joined_by_single_slashes(parts: tuple[str, ...], expected: str) -> None:
    assert join_uri(*parts) == expected


@pytest.mark.parametrize(
    ("uri", "module", "package"),
    [("s3://bucket/x", "boto3", "boto3"), ("gs://bucket/x", "google.cloud", "google-cloud")],
)
def test_a_missing_client_names_the_command_that_installs_it(
    uri: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a machine where it is not installed: importing it fails.
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "medtrain.storage.s3", raising=False)
    monkeypatch.delitem(sys.modules, "medtrain.storage.gcs", raising=False)

    with pytest.raises(StorageError, match=rf"{package}.*pip install 'medtrain\[platform\]'"):
        open_store(uri)


def test_the_protocol_loads_no_client() -> None:
    code = (
        "import sys, medtrain.storage.runs, medtrain.storage.transfer, medtrain.storage.weights\n"
        "print([m for m in ('boto3', 'google.cloud.storage', 'huggingface_hub', 'torch')"
        " if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert answer.stdout == "[]\n", answer.stderr

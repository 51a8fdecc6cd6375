"""What only folders do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from medtrain.errors import StorageError
from medtrain.storage.local import LocalStore
from medtrain.storage.stores import open_store


def test_the_folder_need_not_exist_until_something_is_written(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "none"))

    assert store.list() == []
    assert not store.exists("a")
    store.delete("a")
    assert not (tmp_path / "none").exists()


def test_a_relative_folder_becomes_an_absolute_uri(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert open_store("a/b/").uri == str(tmp_path / "a" / "b")


def test_unfinished_files_are_not_objects(tmp_path: Path) -> None:
    unfinished = f".medtrain-{'0' * 16}.tmp"
    (tmp_path / unfinished).write_bytes(b"half")
    (tmp_path / ".medtrain-notes.tmp").write_bytes(b"whole")
    store = LocalStore(str(tmp_path))

    assert [info.key for info in store.list()] == [".medtrain-notes.tmp"]
    with pytest.raises(StorageError, match="must not look like an unfinished file"):
        store.read(unfinished)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_bytes(b"1")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "dangling").symlink_to(tmp_path / "gone")
    store = LocalStore(str(tmp_path / "root"))

    assert [info.key for info in store.list()] == ["linked/x"]
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "root")
    with pytest.raises(StorageError, match="must not be a link to a folder above it"):
        store.list()


def test_a_file_where_a_folder_should_be_is_one_sentence(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.write("a", b"")

    for call in (store.write, store.create):
        with pytest.raises(StorageError, match=r"a/b cannot be read or written: Not a directory"):
            call("a/b", b"")
    with pytest.raises(StorageError, match="cannot be read or written: Is a directory"):
        store.write("folder/x", b"")
        store.write("folder", b"")


def test_an_uploaded_file_can_be_read_by_others_though_its_source_could_not(
    tmp_path: Path,
) -> None:
    source = tmp_path / "private"
    source.write_bytes(b"")
    source.chmod(0o600)

    LocalStore(str(tmp_path / "store")).upload(source, "a")

    umask = os.umask(0o022)
    os.umask(umask)
    assert (tmp_path / "store" / "a").stat().st_mode & 0o777 == 0o644 & ~umask


def test_a_full_disk_leaves_the_former_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(str(tmp_path))
    store.write("a", b"former")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for call in (store.write, store.create):
        with pytest.raises(StorageError, match=r"the disk is full\. Free some space"):
            call("b" if call == store.create else "a", b"new")

    assert store.read("a") == b"former"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_link_whose_answer_was_lost_still_counts_as_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_link = os.link

    def link(source: Path, target: Path) -> None:
        real_link(source, target)
        raise FileExistsError

    monkeypatch.setattr(os, "link", link)

    assert LocalStore(str(tmp_path)).create("a", b"ours")
    assert (tmp_path / "a").read_bytes() == b"ours"


def test_a_file_system_without_hard_links_is_named_as_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)

    with pytest.raises(StorageError, match="it must allow hard links"):
        LocalStore(str(tmp_path)).create("a", b"")
    assert list(tmp_path.iterdir()) == []

"""Writing to a disk so that nobody sees half a file."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import zlib
from pathlib import Path

import pytest

from medtrain.errors import StorageError
from medtrain.storage.files import (
    checksum_of,
    explained,
    is_temporary,
    make_folder,
    sha256_of,
    writing,
)


def test_the_file_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"

    with writing(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        assert all(is_temporary(p.name) for p in path.parent.iterdir())
        file.write(b" and half")

    assert path.read_bytes() == b"half and half"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_block_that_raises_leaves_the_former_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"former")

    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "file") as file:
        file.write(b"half")
        raise KeyboardInterrupt

    assert (tmp_path / "file").read_bytes() == b"former"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_that_must_be_new_does_not_replace_one(tmp_path: Path) -> None:
    with writing(tmp_path / "file", must_be_new=True) as file:
        file.write(b"first")

    with pytest.raises(FileExistsError), writing(tmp_path / "file", must_be_new=True) as file:
        file.write(b"second")

    assert (tmp_path / "file").read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_mode_is_0644_less_the_umask(tmp_path: Path, umask: int) -> None:
    former = os.umask(umask)
    try:
        with writing(tmp_path / "file") as file:
            file.write(b"")
    finally:
        os.umask(former)

    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644 & ~umask


def test_content_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        calls.append(f"fsync {'folder' if os.path.isdir(f'/proc/self/fd/{handle}') else 'file'}")
        real_fsync(handle)

    def replace(source: Path, target: Path) -> None:
        calls.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with writing(tmp_path / "file") as file:
        file.write(b"content")

    assert calls == ["fsync file", "replace", "fsync folder"]


def test_a_folder_in_whose_place_a_file_lies_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(NotADirectoryError):
        make_folder(tmp_path / "file" / "below")
    with pytest.raises(NotADirectoryError):
        make_folder(tmp_path / "file")


def test_checksums_are_written_as_the_object_stores_write_them(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"123456789")

    assert checksum_of(path) == f"sha256:{hashlib.sha256(b'123456789').hexdigest()}"
    assert sha256_of(path) == hashlib.sha256(b"123456789").hexdigest()
    # The check values of the two polynomials, from the catalog of CRC algorithms.
    assert (
        checksum_of(path, "crc32c")
        == "crc32c:" + base64.b64encode(bytes.fromhex("e3069283")).decode()
    )
    assert (
        checksum_of(path, "crc32")
        == "crc32:" + base64.b64encode(bytes.fromhex("cbf43926")).decode()
    )
    assert zlib.crc32(b"123456789") == 0xCBF43926


def test_the_checksum_of_an_absent_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone cannot be read or written: No such file"):
        sha256_of(tmp_path / "gone")


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the quota of disk space is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "access is denied"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_the_disk_says_becomes_a_sentence(number: int, reason: str) -> None:
    with (
        pytest.raises(StorageError, match=rf"/x cannot be read or written: {reason}"),
        explained("/x"),
    ):
        raise OSError(number, os.strerror(number))

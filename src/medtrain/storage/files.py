"""Files on a disk: checksums, and writing so that nobody ever sees half a file."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import re
import secrets
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from medtrain.errors import StorageError

_CHUNK = 1 << 20
_TEMPORARY = re.compile(r"\.medtrain-[0-9a-f]{16}\.tmp")


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


COMPUTABLE = ("sha256", "crc32", "crc32c")
"""Kinds of checksums that can be computed here; others are only compared as text."""


def _new_digest(kind: str) -> _Digest:
    if kind == "sha256":
        return hashlib.sha256()
    if kind == "crc32":
        return _Crc32()
    assert kind == "crc32c", kind
    try:
        import google_crc32c
    except ModuleNotFoundError as error:
        raise StorageError(
            "a checksum of the kind crc32c needs the package google-crc32c, which is not "
            "installed. Run: pip install 'medtrain[platform]'."
        ) from error
    new_checksum: Any = google_crc32c.Checksum
    digest: _Digest = new_checksum()
    return digest


def kind_of(checksum: str) -> str:
    """The kind of a checksum: `sha256` of `sha256:<hex>`."""
    return checksum.partition(":")[0]


def checksums_of(file: BinaryIO, kinds: Sequence[str]) -> dict[str, str]:
    """Checksums of an open file's whole content, by kind, read once.

    SHA-256 as `sha256:<hex>`, the others as the object stores write them, `crc32c:<base64>`.
    """
    digests = {kind: _new_digest(kind) for kind in kinds}
    file.seek(0)
    while chunk := file.read(_CHUNK):
        for digest in digests.values():
            digest.update(chunk)
    return {kind: _as_text(kind, digest.digest()) for kind, digest in digests.items()}


def checksum_of(path: Path, kind: str = "sha256") -> str:
    """Checksum of a file, such as `sha256:<hex>`."""
    with explained(path), path.open("rb") as file:
        return checksums_of(file, [kind])[kind]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with explained(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_text(kind: str, digest: bytes) -> str:
    return f"{kind}:{digest.hex() if kind == 'sha256' else base64.b64encode(digest).decode()}"


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that `writing` has not finished."""
    return _TEMPORARY.fullmatch(name) is not None


@contextmanager
def writing(path: Path, *, must_be_new: bool = False) -> Iterator[BinaryIO]:
    """A file, open for writing and reading, that appears at `path` whole when the block ends well.

    It is written beside `path`, flushed to the disk and then named, so `path` never holds a part of
    it; a block that raises leaves nothing. Its mode is 0644, less what the umask takes.

    Args:
        path: The final name; missing folders are made.
        must_be_new: Raise FileExistsError, and change nothing, where `path` exists already.
    """
    make_folder(path.parent)
    temporary = path.parent / f".medtrain-{secrets.token_hex(8)}.tmp"
    # Not a file of `tempfile`: those can be read by their owner alone, in whatever pod.
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with open(handle, "r+b") as file:
            yield file
            file.flush()
            os.fsync(handle)
        if must_be_new:
            _link(temporary, path)
        else:
            os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # Over NFS the answer to a link that was made can be lost, and its repetition refused.
        if not path.samefile(temporary):
            raise


def make_folder(path: Path) -> None:
    """Make a folder and its parents, so that they outlive a power cut."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    try:
        path.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems have nothing to flush for a folder, and say so.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


_ADVICE = {
    errno.ENOSPC: "the disk is full. Free some space.",
    errno.EDQUOT: "the quota of disk space is used up. Free some space.",
    errno.EROFS: "the file system is read-only. Name another folder.",
    errno.EACCES: "access is denied. Check the owner and mode of the folder.",
    errno.EPERM: "the file system does not permit it (it must allow hard links and renames).",
    errno.ENOTSUP: "the file system does not permit it (it must allow hard links and renames).",
}


@contextmanager
def explained(path: Path | str, *, but: tuple[type[OSError], ...] = ()) -> Iterator[None]:
    """Turn what the disk says, `but` these, into a StorageError of one sentence about `path`."""
    try:
        yield
    except but:
        raise
    except OSError as error:
        reason = _ADVICE.get(error.errno or 0) or f"{error.strerror or error}."
        raise StorageError(f"{path} cannot be read or written: {reason}") from error

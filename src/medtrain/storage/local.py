"""A store in a folder of a disk."""

from __future__ import annotations

import builtins
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medtrain.errors import ObjectMissing, StorageError
from medtrain.storage.download import verified
from medtrain.storage.files import explained, is_temporary, sync_folder, writing
from medtrain.storage.uri import ObjectInfo, check_key, check_prefix

_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class LocalStore:
    """Objects as files; needs a file system with atomic renames and hard links."""

    def __init__(self, folder: str) -> None:
        self._root = Path(folder).expanduser().absolute()
        self.uri = str(self._root)

    def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        with explained(self._path(key)):
            return self._path(key).is_file()

    def info(self, key: str) -> ObjectInfo:
        """Size and time of change; a disk keeps no checksums."""
        path = self._path(key)
        with self._present(key):
            found = path.stat()
        if not path.is_file():
            raise self._missing(key)
        return ObjectInfo(key, found.st_size, None, str(found.st_mtime_ns))

    def list(self, prefix: str = "") -> builtins.list[ObjectInfo]:
        """All files whose key begins with `prefix`; links are followed."""
        folder = check_prefix(prefix).rpartition("/")[0]
        with explained(self._root / folder):
            return sorted(
                (info for info in self._walk(folder, ()) if info.key.startswith(prefix)),
                key=lambda info: info.key,
            )

    def _walk(self, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[ObjectInfo]:
        try:
            itself = os.stat(self._root / folder)
            entries = list(os.scandir(self._root / folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        here = (itself.st_dev, itself.st_ino)
        if here in above:
            raise StorageError(f"{self._root / folder} must not be a link to a folder above it")
        for entry in entries:
            key = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                yield from self._walk(key, (*above, here))
            elif entry.is_file() and not is_temporary(entry.name):
                try:
                    found = entry.stat()
                except FileNotFoundError:
                    continue
                yield ObjectInfo(key, found.st_size, None, str(found.st_mtime_ns))

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """A file's bytes."""
        with self._present(key), self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(-1 if length is None else length)

    def write(self, key: str, data: bytes) -> ObjectInfo:
        """Write beside, flush, rename."""
        path = self._path(key)
        with explained(path), writing(path) as file:
            file.write(data)
        return self._written(key, f"sha256:{hashlib.sha256(data).hexdigest()}")

    def create(self, key: str, data: bytes) -> bool:
        """Write beside, flush, and link to the final name, which fails where it is taken."""
        path = self._path(key)
        with explained(path):
            if path.exists():
                return False
            try:
                with writing(path, must_be_new=True) as file:
                    file.write(data)
            except FileExistsError:
                return False
        return True

    def delete(self, key: str) -> None:
        """Remove a file; its folder stays, since others may be about to write there."""
        path = self._path(key)
        with explained(path):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return
            sync_folder(path.parent)

    def upload(self, path: Path, key: str) -> ObjectInfo:
        """Copy a file into the store."""
        target = self._path(key)
        with (
            explained(path),
            path.open("rb") as source,
            explained(target),
            writing(target) as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)
            checksum = verified(file, str(path), os.fstat(source.fileno()).st_size)
        return self._written(key, checksum)

    def download(self, key: str, path: Path, *, checksum: str | None = None) -> ObjectInfo:
        """Copy a file out of the store."""
        with (
            self._present(key),
            self._path(key).open("rb") as source,
            explained(path),
            writing(path) as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)
            size = os.fstat(source.fileno()).st_size
            found = verified(file, f"{self.uri}/{key}", size, given=checksum)
        return self._written(key, found)

    def child(self, prefix: str) -> LocalStore:
        """The store in a folder of this one."""
        return LocalStore(str(self._path(prefix.rstrip("/")))) if prefix else self

    def _path(self, key: str) -> Path:
        if is_temporary(check_key(key).rpartition("/")[2]):
            raise StorageError(f"key must not look like an unfinished file, but is {key!r}")
        return self._root / key

    @contextmanager
    def _present(self, key: str) -> Iterator[None]:
        try:
            with explained(self._path(key), but=_ABSENT):
                yield
        except _ABSENT as error:
            raise self._missing(key) from error

    def _missing(self, key: str) -> ObjectMissing:
        return ObjectMissing(f"{self.uri}/{key} must exist, but there is no such file")

    def _written(self, key: str, checksum: str) -> ObjectInfo:
        info = self.info(key)
        return ObjectInfo(key, info.size, checksum, info.version)

"""The node's own copies: hashes of local files, downloaded files, decoded arrays.

Everything here can be made again. Several processes of a node share it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.errors import StorageError
from medtrain.storage.files import writing
from medtrain.storage.uri import Store, check_key, sha256_of

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[int, int], None]
"""Called with how many of how many are done."""

_SETTLED_S = 2.0
"""A file younger than this may change again within its time stamp: its hash is not kept."""


@dataclass(frozen=True)
class HashCache:
    """SHA-256 of local files, computed once for each (path, size, time of change, inode)."""

    path: Path
    """The SQLite file."""

    def checksums(self, files: Iterable[Path]) -> dict[Path, str]:
        """`sha256:<hex>` of each file."""
        files = list(files)
        with closing(self._open()) as database:
            known = {file: self._known(database, file) for file in files}
            new = [file for file, checksum in known.items() if checksum is None]
            before = [file.stat() for file in new]
            with ThreadPoolExecutor() as pool:
                hashed = [f"sha256:{text}" for text in pool.map(sha256_of, new)]
            settled = time.time() - _SETTLED_S
            with database:
                database.executemany(
                    "INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?, ?)",
                    [
                        (str(file.absolute()), *_identity(found), checksum)
                        for file, found, checksum in zip(new, before, hashed, strict=True)
                        if found.st_mtime < settled
                    ],
                )
        known |= dict(zip(new, hashed, strict=True))
        return {file: checksum for file, checksum in known.items() if checksum is not None}

    def _known(self, database: sqlite3.Connection, file: Path) -> str | None:
        row = database.execute(
            "SELECT size, mtime_ns, inode, checksum FROM hashes WHERE path = ?",
            (str(file.absolute()),),
        ).fetchone()
        return str(row[3]) if row and row[:3] == _identity(file.stat()) else None

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.path, timeout=60)
        database.execute(
            "CREATE TABLE IF NOT EXISTS hashes "
            "(path TEXT PRIMARY KEY, size INT, mtime_ns INT, inode INT, checksum TEXT)"
        )
        return database


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ino


def local_path(store: Store) -> Path | None:
    """The folder that a store is, or None where it is a bucket."""
    return None if "://" in store.uri else Path(store.uri)


@dataclass(frozen=True)
class NodeCache:
    """Files and arrays that the processes of a node share."""

    path: Path
    """The node's cache folder."""

    def fetch(
        self,
        store: Store,
        entries: Mapping[str, str | None],
        name: str,
        *,
        progress: Progress | None = None,
    ) -> Path:
        """A local folder under which all `entries` lie, verified.

        A local store is used in place. Of several processes one downloads, the others wait.

        Args:
            store: Where the files are.
            entries: Key → expected checksum.
            name: Of the copy; one for each data set.
            progress: Told about downloads.

        Raises:
            StorageError: A local file is absent or has another content than expected. Where data
                lie is no input of a run, so that another place may still do.
        """
        folder = local_path(store)
        if folder is not None:
            self._verify_in_place(folder, entries)
            return folder
        return self._download(store, entries, name, progress=progress)

    def array(self, key: str, build: Callable[[], np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """The array that `build` makes for `key`, made once, then mapped from disk, read-only.

        Args:
            key: Everything that the array depends on, such as checksum and size, as text.
            build: Makes the array.
        """
        import numpy as np

        digest = hashlib.sha256(key.encode()).hexdigest()
        file = self.path / "arrays" / digest[:2] / f"{digest}.npy"
        try:
            return _mapped(file)
        except FileNotFoundError:
            pass
        except (ValueError, OSError):
            file.unlink(missing_ok=True)
        with writing(file) as out:
            np.save(out, np.ascontiguousarray(build()), allow_pickle=False)
        return _mapped(file)

    def _verify_in_place(self, folder: Path, entries: Mapping[str, str | None]) -> None:
        gone = {key for key in entries if not (folder / key).is_file()}
        hashed = {
            folder / key: key
            for key, expected in entries.items()
            if expected and expected.startswith("sha256:") and key not in gone
        }
        found = HashCache(self.path / "hashes.sqlite").checksums(hashed)
        problems = [f"{key} is gone" for key in sorted(gone)]
        problems += [
            f"{key} has changed" for file, key in hashed.items() if found[file] != entries[key]
        ]
        if problems:
            raise StorageError(
                f"{folder} must hold the {len(entries)} files of the recorded data set, but "
                f"{_listed(problems)}. Give as data.root the place where the data set lies as it "
                "was recorded; where the data were meant to change, record them with "
                "`medtrain data split` and prepare a new run."
            )

    def _download(
        self,
        store: Store,
        entries: Mapping[str, str | None],
        name: str,
        *,
        progress: Progress | None,
    ) -> Path:
        from filelock import FileLock

        from medtrain.storage.transfer import download_files

        folder = self.path / "files" / name
        for key in entries:
            check_key(key)
        folder.mkdir(parents=True, exist_ok=True)
        index_path = folder.with_name(f"{name}.index.json")
        with FileLock(folder.with_name(f"{name}.lock")):
            index = _read_index(index_path)
            missing = {
                key: expected
                for key, expected in entries.items()
                if index.get(key) != _state(folder / key, expected)
            }
            if missing:
                download_files(store, missing, folder, progress=progress)
                index |= {key: _state(folder / key, missing[key]) for key in missing}
                with writing(index_path) as out:
                    out.write(json.dumps(index).encode())
        return folder


def _mapped(file: Path) -> np.ndarray[Any, Any]:
    import numpy as np

    array: np.ndarray[Any, Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    return array


def _read_index(path: Path) -> dict[str, list[Any]]:
    try:
        index = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _state(file: Path, checksum: str | None) -> list[Any]:
    """What was true of a file when it had been verified; a file that is gone equals nothing."""
    if not file.is_file():
        return []
    found = file.stat()
    return [checksum, found.st_size, found.st_mtime_ns]


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more

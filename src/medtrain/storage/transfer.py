"""Many files at once, between a folder and a store: parallel, verified, and every error told.

Each file appears whole or not at all, so what a transfer that was cut off has left is right as far
as it goes, and the next one fetches only the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from medtrain.errors import ObjectMissing, StorageError
from medtrain.storage.files import COMPUTABLE, checksum_of, kind_of
from medtrain.storage.stores import open_store
from medtrain.storage.uri import Store, check_key

Progress = Callable[[int, int], None]
"""Told (files done, files in all), by the thread that called."""

_MAX_FAILURES = 50
"""Failures after which the rest is not tried: a store that is away fails each file slowly."""


def upload_tree(
    folder: Path,
    store: Store,
    prefix: str = "",
    *,
    workers: int = 16,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write every file below `folder` under `prefix`; the answer is key → `sha256:…`.

    Raises:
        StorageError: Some files could not be read or written: names them all, with the reasons.
    """
    if not folder.is_dir():
        raise StorageError(f"{folder} must be a folder, but is none")
    names = [info.key for info in open_store(str(folder.absolute())).list()]
    target = store.child(prefix)
    base = f"{prefix.removesuffix('/')}/" if prefix else ""

    def send(name: str) -> str:
        checksum = target.upload(folder / name, name).checksum
        assert checksum is not None
        return checksum

    sent = _each(send, names, workers=workers, progress=progress, what=f"uploaded to {target.uri}")
    return {base + name: checksum for name, checksum in sent.items()}


def download_files(
    store: Store,
    files: Mapping[str, str | None],
    folder: Path,
    *,
    workers: int = 16,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Bring objects to `folder`, each at its key; the answer is key → `sha256:…`.

    A file that is there already with the right checksum is not fetched again.

    Args:
        store: Where the objects are.
        files: Key → expected checksum; None: whatever the store promises.
        folder: Where the files go.
        workers: Files at a time.
        progress: Told how far it is.

    Raises:
        StorageError: Some objects could not be brought: names them, with the reasons.
    """

    def fetch(key: str) -> str:
        path = folder / check_key(key)
        if path.is_file():
            expected = files[key] or store.info(key).checksum
            if expected and kind_of(expected) in COMPUTABLE:
                found = checksum_of(path, kind_of(expected))
                if found == expected:
                    return found if kind_of(found) == "sha256" else checksum_of(path)
        checksum = store.download(key, path, checksum=files[key]).checksum
        assert checksum is not None
        return checksum

    return _each(fetch, files, workers=workers, progress=progress, what=f"brought from {store.uri}")


def download_tree(
    store: Store,
    prefix: str,
    folder: Path,
    *,
    workers: int = 16,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Bring everything under `prefix/` to `folder`; the answer is name below it → `sha256:…`.

    Raises:
        StorageError: Nothing lies there (ObjectMissing), or some objects could not be brought.
    """
    source = store.child(prefix)
    files = {info.key: info.checksum for info in source.list()}
    if not files:
        raise ObjectMissing(f"{source.uri} must hold objects, but there are none")
    return download_files(source, files, folder, workers=workers, progress=progress)


def _each(
    transfer: Callable[[str], str],
    keys: Iterable[str],
    *,
    workers: int,
    progress: Progress | None,
    what: str,
) -> dict[str, str]:
    """Transfer every key; one StorageError tells of all that failed."""
    done: dict[str, str] = {}
    failures: dict[str, str] = {}
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(transfer, key): key for key in keys}
        try:
            for future in as_completed(futures):
                key = futures[future]
                try:
                    done[key] = future.result()
                except StorageError as error:
                    failures[key] = str(error)
                    if len(failures) == _MAX_FAILURES:
                        break
                if progress is not None:
                    progress(len(done), len(futures))
        finally:
            pool.shutdown(cancel_futures=True)
    if failures:
        listed = "".join(f"\n  - {key}: {reason}" for key, reason in sorted(failures.items()))
        rest = len(futures) - len(done) - len(failures)
        untried = f"\n  and up to {rest} more that were not tried" if rest else ""
        raise StorageError(
            f"{len(futures)} files must be {what}, but {len(failures)} failed:{listed}{untried}"
        )
    return {key: done[key] for key in sorted(done)}

"""Bringing an object from a bucket to a file: in parts, resumed where it broke off, verified."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from medtrain.errors import ObjectDamaged, StorageError
from medtrain.storage.files import COMPUTABLE, checksums_of, explained, kind_of, writing
from medtrain.storage.uri import ObjectInfo

PART_SIZE = 16 * 1024 * 1024
"""Bytes of one request; a larger object is fetched in parallel parts."""
_PARALLEL_PARTS = 8
_TRIES = 6

T = TypeVar("T")
Sink = Callable[[bytes], None]


class Interrupted(Exception):
    """An answer broke off: what is missing can be asked for again."""


def patiently(call: Callable[[], T], *, what: str) -> T:
    """Try what may be Interrupted a bounded number of times, with growing pauses.

    Args:
        call: What to try.
        what: The object's URI, for the StorageError of the last try.
    """
    retrying = Retrying(
        retry=retry_if_exception_type(Interrupted),
        stop=stop_after_attempt(_TRIES),
        wait=wait_random_exponential(multiplier=0.1, max=5),
        reraise=True,
    )
    try:
        return retrying(call)
    except Interrupted as error:
        raise StorageError(
            f"{what} cannot be read or written in full: {_TRIES} tries in a row broke off "
            f"({error}). Try again when the store is well."
        ) from error


@dataclass(frozen=True)
class Opened:
    """An object about to be read."""

    info: ObjectInfo
    pour: Callable[[Sink], None]
    """Gives the first part's bytes to a sink; may raise Interrupted."""


def download(
    path: Path,
    what: str,
    *,
    open_object: Callable[[], Opened],
    pour_range: Callable[[ObjectInfo, int, int, Sink], None],
    checksum: str | None = None,
) -> ObjectInfo:
    """Bring an object to `path`, which shows it only when it is complete and verified.

    Args:
        path: The file.
        what: The object's URI, for messages.
        open_object: Asks for the object's first `PART_SIZE` bytes.
        pour_range: Gives the bytes from a start up to a stop of the very version that
            `open_object` has met to a sink; may raise Interrupted.
        checksum: What the content must have, besides what the store promises.
    """
    opened = open_object()
    info = opened.info
    with explained(path), writing(path) as file:
        handle = file.fileno()

        def fetch(start: int, first: Callable[[Sink], None] | None = None) -> None:
            part = _Part(handle, start, min(start + PART_SIZE, info.size), what)
            if first is not None and part.is_open:
                part.fill_from(first)

            def ask_for_the_rest() -> None:
                part.fill_from(
                    lambda sink: pour_range(info, part.position, part.stop, sink), insist=True
                )

            while part.is_open:
                patiently(ask_for_the_rest, what=what)

        fetch(0, opened.pour)
        starts = range(PART_SIZE, info.size, PART_SIZE)
        if starts:
            with ThreadPoolExecutor(min(_PARALLEL_PARTS, len(starts))) as pool:
                try:
                    for _ in pool.map(fetch, starts):
                        pass
                finally:
                    pool.shutdown(cancel_futures=True)
        found = verified(file, what, info.size, given=checksum, stored=info.checksum)
    return ObjectInfo(info.key, info.size, found, info.version)


class _Part:
    """A stretch of a file that is being filled, from front to back."""

    def __init__(self, handle: int, start: int, stop: int, what: str) -> None:
        self._handle = handle
        self._what = what
        self.position = start
        self.stop = stop

    @property
    def is_open(self) -> bool:
        return self.position < self.stop

    def fill_from(self, pour: Callable[[Sink], None], *, insist: bool = False) -> None:
        """Take what `pour` gives; with `insist`, Interrupted where it gives nothing."""
        before = self.position
        try:
            pour(self._write)
        except Interrupted:
            if insist and self.position == before:
                raise
        if insist and self.position == before:
            raise Interrupted("the answer was empty")

    def _write(self, data: bytes) -> None:
        if self.position + len(data) > self.stop:
            raise StorageError(f"{self._what} must be {self.stop} bytes here, but more came")
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._handle, rest, self.position)
            self.position += written
            rest = rest[written:]


def verified(
    file: BinaryIO, what: str, size: int, *, given: str | None = None, stored: str | None = None
) -> str:
    """The SHA-256 of an open file's content, as `sha256:<hex>`, after it has been verified.

    Args:
        file: An open file.
        what: Where its content comes from, for messages.
        size: Bytes that it must have.
        given: Checksum that it must have; one that cannot be computed here must equal `stored`.
        stored: Checksum that the store promises; ignored where it cannot be computed here.

    Raises:
        ObjectDamaged: Size or checksum differ.
    """
    expected = [checksum for checksum in (given, stored) if checksum]
    computable = [checksum for checksum in expected if kind_of(checksum) in COMPUTABLE]
    found = checksums_of(file, sorted({"sha256", *map(kind_of, computable)}))
    actual_size = os.fstat(file.fileno()).st_size
    if actual_size != size:
        raise ObjectDamaged(f"{what} must have {size} bytes, but {actual_size} came")
    if given and given not in computable and given != stored:
        raise ObjectDamaged(f"{what} must have the checksum {given}, but the store says {stored}")
    for checksum in computable:
        if found[kind_of(checksum)] != checksum:
            raise ObjectDamaged(
                f"{what} must have the checksum {checksum}, but has {found[kind_of(checksum)]}. "
                "Write it again from its source."
            )
    return found["sha256"]

"""One small protocol over local folders, `s3://` and `gs://`.

Objects are whole: a reader sees the former content or the new one, never a part. Keys are names
joined by `/`, relative to the store's URI.
"""

from __future__ import annotations

import builtins
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from medtrain.errors import StorageError
from medtrain.storage.files import sha256_of as sha256_of


@dataclass(frozen=True)
class ObjectInfo:
    """What a store says of an object."""

    key: str
    size: int
    """Bytes."""
    checksum: str | None
    """`sha256:<hex>`, or the store's own, such as `crc32c:<base64>`; None where it has none."""
    version: str | None
    """ETag, generation or time of change: only to notice a change."""


class Store(Protocol):
    """Objects by key. Every method raises a StorageError of one sentence; threads may share it."""

    @property
    def uri(self) -> str:
        """The root without a slash at the end: an absolute path, `s3://…` or `gs://…`."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        ...

    def info(self, key: str) -> ObjectInfo:
        """What the store knows of an object; ObjectMissing where it is absent."""
        ...

    def list(self, prefix: str = "") -> builtins.list[ObjectInfo]:
        """All objects whose key begins with `prefix`, however deep, sorted by key.

        S3 lists no checksums: ask `info` for them.
        """
        ...

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """An object's bytes, or `length` of them from `start` (fewer at its end)."""
        ...

    def write(self, key: str, data: bytes) -> ObjectInfo:
        """Write an object whole; the answer has its SHA-256."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write an object whole if there is none of that key: of all who try, one gets True."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; an absent one is fine."""
        ...

    def upload(self, path: Path, key: str) -> ObjectInfo:
        """Write a file as an object, verified; the answer has its SHA-256."""
        ...

    def download(self, key: str, path: Path, *, checksum: str | None = None) -> ObjectInfo:
        """Bring an object to `path`, verified and whole; the answer has its SHA-256.

        Args:
            key: The object.
            path: The file, which keeps its former content until the new one is complete.
            checksum: What it must be (ObjectDamaged where it differs), besides the store's own.
        """
        ...

    def child(self, prefix: str) -> Store:
        """The store whose root is `prefix` of this one."""
        ...


def join_uri(uri: str, *parts: str) -> str:
    """Append parts to a folder or URI."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts if part.strip("/"))])


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_key(key: str) -> str:
    """The key itself; a StorageError where it could lead out of the store or names no object."""
    if any(part in ("", ".", "..") for part in key.split("/")) or _CONTROL.search(key):
        raise StorageError(
            f"key must be names joined by '/', without empty ones, '.' and '..', but is {key!r}"
        )
    return key


def check_prefix(prefix: str) -> str:
    """The prefix itself; a StorageError where it could lead out of the store."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


@dataclass(frozen=True)
class BucketUri:
    """`s3://bucket/prefix` or `gs://bucket/prefix`, taken apart."""

    scheme: str
    bucket: str
    prefix: str
    """Empty, or with a slash at the end."""

    @classmethod
    def parse(cls, uri: str) -> BucketUri:
        """Take a URI apart."""
        scheme, _, rest = uri.partition("://")
        bucket, _, prefix = rest.rstrip("/").partition("/")
        return cls(scheme, bucket, f"{check_key(prefix)}/" if prefix else "")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}".rstrip("/")

"""A store in a bucket of Google Cloud Storage, or of the emulator that `STORAGE_EMULATOR_HOST`
names."""

from __future__ import annotations

import builtins
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from google.api_core.exceptions import (
    Forbidden,
    GoogleAPICallError,
    NotFound,
    PreconditionFailed,
    RequestRangeNotSatisfiable,
    RetryError,
    Unauthorized,
)
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import GoogleAuthError, TransportError
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from google.cloud.storage.retry import DEFAULT_RETRY
from requests.adapters import HTTPAdapter
from requests.exceptions import RequestException
from urllib3.exceptions import HTTPError

from medtrain.errors import ObjectDamaged, ObjectMissing, StorageError
from medtrain.storage.download import PART_SIZE, Opened, Sink, download
from medtrain.storage.files import checksum_of, explained
from medtrain.storage.uri import (
    BucketUri,
    ObjectInfo,
    check_key,
    check_prefix,
    join_uri,
)

_RETRY = DEFAULT_RETRY.with_timeout(90.0)
"""Also of writes: each names its whole content, so doing it twice does nothing new."""
_TIMEOUT = (10, 60)
"""Seconds to connect, and between two pieces of an answer."""
_SMALL = 8 * 1024 * 1024
"""Bytes of a file up to which the client sends it in one request."""
_LISTED = "items(name,size,crc32c,generation,metadata),nextPageToken"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@cache
def _client(process: int, environment: frozenset[tuple[str, str]]) -> Any:
    """One client for each environment, for it is slow to make; a forked process gets its own."""
    new_client: Any = storage.Client
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        anonymous: Any = AnonymousCredentials
        client = new_client(project="emulator", credentials=anonymous())
    else:
        client = new_client()
    # Otherwise the client asks for the bucket itself, in the background, for the sake of traces:
    # who may use objects need not have that right.
    client._bucket_metadata_cache = None
    # The default of ten connections would hold up the threads of a transfer.
    new_adapter: Any = HTTPAdapter
    adapter = new_adapter(pool_connections=4, pool_maxsize=64)
    client._http.mount("https://", adapter)
    client._http.mount("http://", adapter)
    return client


class GCSStore:
    """Objects in a bucket. Content that is written here carries its SHA-256 as metadata."""

    def __init__(self, uri: str) -> None:
        self._place = BucketUri.parse(uri)
        self.uri = str(self._place)
        environment = frozenset(
            item for item in os.environ.items() if item[0].startswith(("GOOGLE_", "STORAGE_"))
        )
        try:
            self._client = _client(os.getpid(), environment)
        except GoogleAuthError as error:
            raise StorageError(
                f"{self.uri} needs credentials, but there are none that can be used ({error}). "
                "Set GOOGLE_APPLICATION_CREDENTIALS or a workload identity."
            ) from error
        self._bucket = self._client.bucket(self._place.bucket)

    def exists(self, key: str) -> bool:
        """Whether there is such an object; an absent bucket is an error."""
        try:
            self.info(key)
        except ObjectMissing:
            return False
        return True

    def info(self, key: str) -> ObjectInfo:
        """Ask for an object's description."""
        return _info(key, self._described(key))

    def list(self, prefix: str = "") -> builtins.list[ObjectInfo]:
        """All objects whose key begins with `prefix`, with their checksums."""
        root = self._place.prefix
        with self._explained(prefix):
            blobs = self._client.list_blobs(
                self._bucket,
                prefix=root + check_prefix(prefix),
                fields=_LISTED,
                retry=_RETRY,
                timeout=_TIMEOUT,
            )
            infos = [
                _info(blob.name[len(root) :], blob)
                for blob in blobs
                # Consoles show a folder by an empty object that is called like it.
                if not blob.name.endswith("/")
            ]
        return sorted(infos, key=lambda info: info.key)

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """An object's bytes; a whole one is verified by its CRC32C."""
        if length == 0:
            self.info(key)
            return b""
        is_whole = start == 0 and length is None
        with self._explained(key):
            try:
                data: bytes = self._blob(key).download_as_bytes(
                    start=None if is_whole else start,
                    end=None if length is None else start + length - 1,
                    raw_download=True,
                    checksum="crc32c" if is_whole else None,
                    retry=_RETRY,
                    timeout=_TIMEOUT,
                )
            except RequestRangeNotSatisfiable as error:
                _release(error)
                return b""
        return data

    def write(self, key: str, data: bytes) -> ObjectInfo:
        """Write in one request, if it is not larger than 8 MiB."""
        return self._put(key, data)

    def create(self, key: str, data: bytes) -> bool:
        """Write in one request that fails where there is an object of that key."""
        writer = uuid.uuid4().hex
        try:
            self._put(key, data, writer=writer)
        except _Exists:
            # The client repeats a request whose answer was lost, and then meets its own object.
            return self._writer_of(key) == writer
        return True

    def delete(self, key: str) -> None:
        """Remove an object."""
        try:
            with self._explained(key):
                self._blob(key).delete(retry=_RETRY, timeout=_TIMEOUT)
        except ObjectMissing:
            return

    def upload(self, path: Path, key: str) -> ObjectInfo:
        """Write a file, verified by its CRC32C."""
        with explained(path):
            size = path.stat().st_size
            if size <= _SMALL:
                return self._put(key, path.read_bytes())
        checksum = checksum_of(path)
        blob = self._blob(key)
        blob.metadata = _metadata(checksum)
        with self._explained(key):
            blob.upload_from_filename(
                str(path),
                content_type="application/octet-stream",
                checksum="crc32c",
                retry=_RETRY,
                timeout=_TIMEOUT,
            )
        info = self.info(key)
        if (info.size, info.checksum) != (size, checksum):
            raise ObjectDamaged(
                f"{self.uri}/{key} must have {size} bytes and the checksum {checksum}, but the "
                f"store says {info.size} and {info.checksum}. Upload {path} again."
            )
        return info

    def download(self, key: str, path: Path, *, checksum: str | None = None) -> ObjectInfo:
        """Bring an object to a file; a large one in parallel parts."""

        def open_object() -> Opened:
            info = self.info(key)
            stop = min(info.size, PART_SIZE)
            return Opened(info, lambda sink: self._pour_range(info, 0, stop, sink))

        return download(
            path,
            f"{self.uri}/{key}",
            open_object=open_object,
            pour_range=self._pour_range,
            checksum=checksum,
        )

    def child(self, prefix: str) -> GCSStore:
        """The store under a longer prefix."""
        if not prefix:
            return self
        return GCSStore(f"{self.uri}/{check_key(prefix.removesuffix('/'))}")

    def _blob(self, key: str, *, version: str | None = None) -> Any:
        return self._bucket.blob(
            self._place.prefix + check_key(key), generation=int(version) if version else None
        )

    def _described(self, key: str) -> Any:
        blob = self._blob(key)
        with self._explained(key):
            blob.reload(retry=_RETRY, timeout=_TIMEOUT)
        return blob

    def _writer_of(self, key: str) -> str | None:
        try:
            writer: str | None = (self._described(key).metadata or {}).get("writer")
        except ObjectMissing:
            return None
        return writer

    def _put(self, key: str, data: bytes, *, writer: str | None = None) -> ObjectInfo:
        checksum = f"sha256:{hashlib.sha256(data).hexdigest()}"
        blob = self._blob(key)
        blob.metadata = _metadata(checksum, writer=writer)
        with self._explained(key):
            try:
                blob.upload_from_string(
                    data,
                    content_type="application/octet-stream",
                    checksum="crc32c",
                    if_generation_match=None if writer is None else 0,
                    retry=_RETRY,
                    timeout=_TIMEOUT,
                )
            except PreconditionFailed as error:
                _release(error)
                raise _Exists from error
        return ObjectInfo(key, len(data), checksum, str(blob.generation))

    def _pour_range(self, info: ObjectInfo, start: int, stop: int, sink: Sink) -> None:
        # The client itself goes on where an answer broke off.
        if start == stop:
            return
        with self._explained(info.key):
            self._blob(info.key, version=info.version).download_to_file(
                _SinkFile(sink),
                start=start,
                end=stop - 1,
                raw_download=True,
                checksum=None,
                retry=_RETRY,
                timeout=_TIMEOUT,
            )

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        what = join_uri(self.uri, key)
        try:
            try:
                yield
            except GoogleAPICallError as error:
                _release(error)
                raise
        except NotFound as error:
            raise self._absent(what) from error
        except Forbidden as error:
            raise StorageError(
                f"{what} must be open to these credentials, but access is denied. "
                "Ask its owner for this right."
            ) from error
        except (TransportError, RetryError, RequestException, HTTPError, ConnectionError) as error:
            raise StorageError(f"{self.uri} cannot be reached ({error}). Try again.") from error
        except (Unauthorized, GoogleAuthError) as error:
            raise StorageError(
                f"the credentials for {self.uri} have expired or are not accepted ({error}). "
                "Renew them."
            ) from error
        except DataCorruption as error:
            raise ObjectDamaged(f"{what} is damaged: {error}") from error
        except (GoogleAPICallError, InvalidResponse) as error:
            raise StorageError(f"{what} cannot be used: {error}") from error

    def _absent(self, what: str) -> StorageError:
        """What is not there: the object, or even the bucket."""
        try:
            next(iter(self._client.list_blobs(self._bucket, max_results=1, retry=_RETRY)), None)
        except NotFound:
            return StorageError(
                f"bucket '{self._place.bucket}' of {self.uri} must exist, but there is none. "
                "Create it or correct the URI."
            )
        except GoogleAPICallError:
            # Not allowed to list: the object's own answer stands.
            pass
        return ObjectMissing(f"{what} must exist, but there is no such object")


class _Exists(Exception):
    """A conditional write met an object."""


def _release(error: GoogleAPICallError) -> None:
    """Give the connection back of an answer that the client has left unread."""
    if error.response is not None:
        error.response.close()


class _SinkFile:
    """The little of a file that a download needs."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, data: bytes) -> int:
        self._sink(data)
        return len(data)


def _metadata(checksum: str, *, writer: str | None = None) -> dict[str, str]:
    metadata = {"sha256": checksum.removeprefix("sha256:")}
    return metadata if writer is None else {**metadata, "writer": writer}


def _info(key: str, blob: Any) -> ObjectInfo:
    ours = (blob.metadata or {}).get("sha256", "")
    if _SHA256.fullmatch(ours):
        checksum: str | None = f"sha256:{ours}"
    else:
        checksum = f"crc32c:{blob.crc32c}" if blob.crc32c else None
    return ObjectInfo(key, int(blob.size or 0), checksum, str(blob.generation))

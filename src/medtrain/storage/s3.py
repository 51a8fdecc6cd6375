"""A store in a bucket that speaks S3. The endpoint is `AWS_ENDPOINT_URL(_S3)`, where it is set."""

from __future__ import annotations

import base64
import builtins
import hashlib
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ResponseStreamingError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from urllib3.exceptions import HTTPError

from medtrain.errors import ObjectDamaged, ObjectMissing, StorageError
from medtrain.storage.download import (
    PART_SIZE,
    Interrupted,
    Opened,
    Sink,
    download,
    patiently,
)
from medtrain.storage.files import checksum_of, explained
from medtrain.storage.uri import (
    BucketUri,
    ObjectInfo,
    check_key,
    check_prefix,
    join_uri,
)

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

_CONFIG = Config(
    # Eight tries: of 50,000 requests, one in ten failing, none is lost.
    retries={"mode": "standard", "total_max_attempts": 8},
    connect_timeout=10,
    read_timeout=60,
    max_pool_connections=64,
    # Parts of objects carry no checksum that fits them; whole ones are asked for theirs.
    response_checksum_validation="when_required",
)
_SMALL = 8 * 1024 * 1024
"""Bytes of a file up to which it is sent in one request, which the store verifies itself."""
_TRANSFER = TransferConfig(
    multipart_threshold=4 * PART_SIZE, multipart_chunksize=PART_SIZE, max_concurrency=8
)
_BROKEN = (
    IncompleteReadError,
    ResponseStreamingError,
    HTTPClientError,
    HTTPError,
    ConnectionError,
    TimeoutError,
)
"""What a body that ends early raises, by client version and place."""

_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "UnrecognizedClient"}
_FORBIDDEN = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "Forbidden"}
_ABSENT = {"NoSuchKey", "404", "NotFound"}
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _Connection:
    """The client that the stores of a process share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.client = self._connect()
        self.met_buckets: set[str] = set()
        """Buckets that served a request: what is absent in them is an object."""

    def renew(self, stale: S3Client) -> S3Client:
        """A client with credentials that are read anew; many threads may ask, one gets it."""
        with self._lock:
            if self.client is stale:
                self.client = self._connect()
            return self.client

    def _connect(self) -> S3Client:
        # A session of its own: the default one keeps the credentials that it has once read.
        try:
            return boto3.session.Session().client("s3", config=_CONFIG)
        except ValueError as error:
            raise StorageError(f"S3 cannot be used: {error}. Correct AWS_ENDPOINT_URL.") from error


@cache
def _connection(process: int, environment: frozenset[tuple[str, str]]) -> _Connection:
    """One client for each environment, for it is slow to make; a forked process gets its own."""
    return _Connection()


class S3Store:
    """Objects in a bucket. Content that is written here carries its SHA-256 as metadata."""

    def __init__(self, uri: str) -> None:
        self._place = BucketUri.parse(uri)
        self.uri = str(self._place)
        environment = frozenset(item for item in os.environ.items() if item[0].startswith("AWS_"))
        with self._explained(""):
            self._connection = _connection(os.getpid(), environment)

    def exists(self, key: str) -> bool:
        """Whether there is such an object; an absent bucket is an error."""
        try:
            self.info(key)
        except ObjectMissing:
            return False
        return True

    def info(self, key: str) -> ObjectInfo:
        """Ask for an object's head."""
        return _info(key, self._head(key))

    def list(self, prefix: str = "") -> builtins.list[ObjectInfo]:
        """All objects whose key begins with `prefix`, without their checksums."""
        root = self._place.prefix

        def list_all(client: S3Client) -> list[ObjectInfo]:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self._place.bucket, Prefix=root + check_prefix(prefix)
            )
            return [
                ObjectInfo(found["Key"][len(root) :], found["Size"], None, _version(found))
                for page in pages
                for found in page.get("Contents", [])
                # Consoles show a folder by an empty object that is called like it.
                if not found["Key"].endswith("/")
            ]

        return sorted(self._do(prefix, list_all), key=lambda info: info.key)

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """An object's bytes; a whole one is verified by its own checksum, where it has one."""
        if length == 0:
            self.info(key)
            return b""
        asked: dict[str, Any] = {"ChecksumMode": "ENABLED"}
        if start or length is not None:
            stop = "" if length is None else start + length - 1
            asked = {"Range": f"bytes={start}-{stop}"}

        def get(client: S3Client) -> bytes:
            try:
                response = client.get_object(**self._address(key), **asked)
            except ClientError as error:
                if _code(error) == "InvalidRange":
                    return b""
                raise
            with _interruptions(), closing(response["Body"]) as body:
                return body.read()

        return patiently(lambda: self._do(key, get), what=f"{self.uri}/{key}")

    def write(self, key: str, data: bytes) -> ObjectInfo:
        """Write in one request."""
        return self._put(key, data)

    def create(self, key: str, data: bytes) -> bool:
        """Write in one request that fails where there is an object of that key."""
        writer = uuid.uuid4().hex
        try:
            patiently(
                lambda: self._put(key, data, writer=writer, IfNoneMatch="*"),
                what=f"{self.uri}/{key}",
            )
        except _Exists:
            # The client repeats a request whose answer was lost, and then meets its own object.
            return self._writer_of(key) == writer
        return True

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._do(key, lambda client: client.delete_object(**self._address(key)))

    def upload(self, path: Path, key: str) -> ObjectInfo:
        """Write a file; a large one in parallel parts, each verified by the store."""
        with explained(path):
            size = path.stat().st_size
            if size <= _SMALL:
                return self._put(key, path.read_bytes())
        checksum = checksum_of(path)
        address = self._address(key)

        def send(client: S3Client) -> None:
            with explained(path), path.open("rb") as file:
                client.upload_fileobj(
                    file,
                    address["Bucket"],
                    address["Key"],
                    ExtraArgs={
                        "ChecksumAlgorithm": "SHA256",
                        "Metadata": _metadata(checksum),
                    },
                    Config=_TRANSFER,
                )

        self._do(key, send)
        info = self.info(key)
        if (info.size, info.checksum) != (size, checksum):
            raise ObjectDamaged(
                f"{self.uri}/{key} must have {size} bytes and the checksum {checksum}, but the "
                f"store says {info.size} and {info.checksum}. Upload {path} again."
            )
        return info

    def download(self, key: str, path: Path, *, checksum: str | None = None) -> ObjectInfo:
        """Bring an object to a file; a large one in parallel parts."""
        return download(
            path,
            f"{self.uri}/{key}",
            open_object=lambda: self._open(key),
            pour_range=self._pour_range,
            checksum=checksum,
        )

    def child(self, prefix: str) -> S3Store:
        """The store under a longer prefix."""
        if not prefix:
            return self
        return S3Store(f"{self.uri}/{check_key(prefix.removesuffix('/'))}")

    def _address(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._place.bucket, "Key": self._place.prefix + check_key(key)}

    def _head(self, key: str) -> Mapping[str, Any]:
        return self._do(
            key,
            lambda client: client.head_object(**self._address(key), ChecksumMode="ENABLED"),
        )

    def _writer_of(self, key: str) -> str | None:
        try:
            writer: str | None = self._head(key)["Metadata"].get("writer")
        except ObjectMissing:
            return None
        return writer

    def _put(
        self, key: str, data: bytes, *, writer: str | None = None, **conditions: Any
    ) -> ObjectInfo:
        checksum = f"sha256:{hashlib.sha256(data).hexdigest()}"

        def put(client: S3Client) -> ObjectInfo:
            try:
                response = client.put_object(
                    **self._address(key),
                    Body=data,
                    ChecksumAlgorithm="SHA256",
                    Metadata=_metadata(checksum, writer=writer),
                    **conditions,
                )
            except ClientError as error:
                if _code(error) == "PreconditionFailed" and conditions:
                    raise _Exists from error
                if _code(error) == "ConditionalRequestConflict":
                    # Somebody else's request is under way: its end decides, so ask again.
                    raise Interrupted(_code(error)) from error
                raise
            return ObjectInfo(key, len(data), checksum, _version(response))

        return self._do(key, put)

    def _open(self, key: str) -> Opened:
        def get(client: S3Client) -> Mapping[str, Any]:
            address = self._address(key)
            try:
                return client.get_object(**address, Range=f"bytes=0-{PART_SIZE - 1}")
            except ClientError as error:
                if _code(error) != "InvalidRange":
                    raise
                # An empty object has no byte 0.
                return client.get_object(**address)

        response = self._do(key, get)
        info = _info(key, response)
        if info.checksum is None:
            # A part of an object comes without the checksum of the whole.
            stored = self.info(key)
            if stored.version == info.version:
                info = stored
        return Opened(info, lambda sink: _pour(response["Body"], sink))

    def _pour_range(self, info: ObjectInfo, start: int, stop: int, sink: Sink) -> None:
        asked = {
            **self._address(info.key),
            "Range": f"bytes={start}-{stop - 1}",
            "IfMatch": info.version,
        }
        response = self._do(info.key, lambda client: client.get_object(**asked))
        _pour(response["Body"], sink)

    def _do(self, key: str, call: Callable[[S3Client], T]) -> T:
        """Call with the shared client; once more with new credentials where they have expired."""
        connection = self._connection
        with self._explained(key):
            client = connection.client
            try:
                result = call(client)
            except ClientError as error:
                reason = self._reason(error, key)
                if reason not in _EXPIRED:
                    raise self._sentence(reason, error, key) from error
                client = connection.renew(client)
                try:
                    result = call(client)
                except ClientError as again:
                    raise self._sentence(self._reason(again, key), again, key) from again
        connection.met_buckets.add(self._place.bucket)
        return result

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        try:
            yield
        except FlexibleChecksumError as error:
            raise ObjectDamaged(f"{self.uri}/{key} is damaged: {error}") from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise StorageError(
                f"{self.uri} needs credentials, but there are none. Set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, a profile or a role."
            ) from error
        except (BotoConnectionError, HTTPClientError, HTTPError, ConnectionError) as error:
            raise StorageError(
                f"{self.uri} cannot be reached ({error}). Check the network and AWS_ENDPOINT_URL."
            ) from error
        except BotoCoreError as error:
            raise StorageError(f"{join_uri(self.uri, key)} cannot be used: {error}") from error

    def _sentence(self, reason: str, error: ClientError, key: str) -> StorageError:
        what = join_uri(self.uri, key)
        if reason in _ABSENT:
            return ObjectMissing(f"{what} must exist, but there is no such object")
        if reason == "NoSuchBucket":
            return StorageError(
                f"bucket '{self._place.bucket}' of {self.uri} must exist, but there is none. "
                "Create it or correct the URI."
            )
        if reason in _EXPIRED:
            return StorageError(
                f"the credentials for {self.uri} have expired ({reason}). Renew them."
            )
        if reason in _REFUSED:
            return StorageError(
                f"the credentials for {self.uri} are not accepted ({reason}). Correct them."
            )
        if reason in _FORBIDDEN:
            return StorageError(
                f"{what} must be open to these credentials, but access is denied "
                f"({error.operation_name}). Ask its owner for this right."
            )
        if reason == "PreconditionFailed":
            return StorageError(f"{what} has changed while it was being read. Try again.")
        message = error.response.get("Error", {}).get("Message", "")
        return StorageError(f"{what} cannot be used: {reason} ({error.operation_name}) {message}")

    def _reason(self, error: ClientError, key: str) -> str:
        """The store's word for what is wrong."""
        code = _code(error)
        if not code.isdecimal():
            return code
        if code == "404" and self._place.bucket in self._connection.met_buckets:
            return code
        # An answer to HEAD has no body to say why, nor which of bucket and object is absent.
        try:
            self._connection.client.list_objects_v2(
                Bucket=self._place.bucket, Prefix=self._place.prefix + key, MaxKeys=1
            )
        except ClientError as other:
            return code if code == "404" and _code(other) in _FORBIDDEN else _code(other)
        return code


class _Exists(Exception):
    """A conditional write met an object."""


def _code(error: ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "unknown")


@contextmanager
def _interruptions() -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise Interrupted(str(error)) from error


def _pour(body: StreamingBody, sink: Sink) -> None:
    with closing(body):
        chunks = body.iter_chunks(1 << 20)
        while True:
            with _interruptions():
                chunk = next(chunks, None)
            if chunk is None:
                return
            sink(chunk)


def _metadata(checksum: str, *, writer: str | None = None) -> dict[str, str]:
    metadata = {"sha256": checksum.removeprefix("sha256:")}
    return metadata if writer is None else {**metadata, "writer": writer}


def _version(found: Mapping[str, Any]) -> str:
    return str(found["ETag"]).strip('"')


def _info(key: str, found: Mapping[str, Any]) -> ObjectInfo:
    whole = found.get("ContentRange")
    size = int(whole.rpartition("/")[2]) if whole else found["ContentLength"]
    return ObjectInfo(key, size, _checksum(found), _version(found))


def _checksum(found: Mapping[str, Any]) -> str | None:
    """The strongest checksum of the whole object that an answer has."""
    # Of a part that is read, the store knows the part's checksum; of an object that was sent in
    # parts, mostly the checksum of their checksums.
    is_whole = "ContentRange" not in found
    in_parts = "-" in _version(found) and found.get("ChecksumType") != "FULL_OBJECT"
    stored = {
        kind: found[f"Checksum{kind}"]
        for kind in ("SHA256", "CRC32C", "CRC32", "CRC64NVME")
        if is_whole and not in_parts and f"Checksum{kind}" in found
    }
    if "SHA256" in stored:
        return f"sha256:{base64.b64decode(stored['SHA256']).hex()}"
    ours = found["Metadata"].get("sha256", "")
    if _SHA256.fullmatch(ours):
        return f"sha256:{ours}"
    return next((f"{kind.lower()}:{value}" for kind, value in stored.items()), None)

"""Which store a URI means."""

from __future__ import annotations

from medtrain.errors import ConfigError, StorageError
from medtrain.storage.local import LocalStore
from medtrain.storage.uri import Store


def open_store(uri: str) -> Store:
    """The store at `uri`: a folder (which need not exist yet), `s3://…` or `gs://…`."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        if not uri:
            raise ConfigError(
                "storage URI must be a folder, s3://bucket/prefix or gs://bucket/prefix, "
                "but is empty"
            )
        return LocalStore(uri)
    if scheme not in ("s3", "gs") or not rest.strip("/"):
        raise ConfigError(
            f"storage URI must be a folder, s3://bucket/prefix or gs://bucket/prefix, "
            f"but is '{uri}'"
        )
    try:
        if scheme == "s3":
            from medtrain.storage.s3 import S3Store

            return S3Store(uri)
        from medtrain.storage.gcs import GCSStore

        return GCSStore(uri)
    except ModuleNotFoundError as error:
        package = {"s3": "boto3", "gs": "google-cloud-storage"}[scheme]
        raise StorageError(
            f"{uri} needs the package {package}, which is not installed. "
            "Run: pip install 'medtrain[platform]'."
        ) from error

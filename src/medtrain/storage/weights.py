"""Finding pretrained weights, in one order everywhere, and saying where they came from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from medtrain.config import Weights
from medtrain.errors import ConfigError, ObjectMissing, StorageError
from medtrain.storage.files import sha256_of
from medtrain.storage.stores import open_store
from medtrain.storage.transfer import download_files
from medtrain.storage.uri import ObjectInfo, Store, check_key, join_uri

MODEL_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
"""A folder without a file that ends so holds no weights."""
_DESCRIPTIONS = ("*.json", "*.txt", "*.model")
_SAFE, _PICKLED = ("*.safetensors",), ("*.bin", "*.pth", "*.pt")


@dataclass(frozen=True)
class FoundWeights:
    """Pretrained weights on this machine, or the permission to do without them."""

    path: Path | None
    """A file, or the folder of one (`model.safetensors`, `pytorch_model.bin`,
    `open_clip_pytorch_model.bin`, …): the loader chooses in it. None: random initialisation."""
    digest: str
    """`sha256:<hex>` of the file or folder, or `random`."""
    source: str
    """Where they came from, in words that a report can print."""


def find_weights(
    weights: Weights, *, weights_root: str | None, cache: Path, allow_network: bool
) -> FoundWeights:
    """Find weights: file named → weights root → model hub → random, each only where it may be used.

    A named file that is absent is an error, whatever else may be tried: nobody who names a file
    wants others in its place.

    Args:
        weights: What is wanted.
        weights_root: Folder, `s3://…` or `gs://…` that holds weights as `<hub id>/…`.
        cache: Node-local folder; what comes from a bucket or the hub is kept there.
        allow_network: Whether the model hub may be asked; buckets always may.

    Raises:
        ConfigError: None are found, and random initialisation is not allowed.
        StorageError: A bucket or the hub could not be asked, so that nobody knows.
    """
    if weights.file is not None:
        path = _bring(weights.file, cache)
        if path is None:
            raise ConfigError(
                f"weights.file must be a file or a folder with a file of weights "
                f"({', '.join(MODEL_SUFFIXES)}), but {weights.file} is none. Correct it, or leave "
                "it out to search by weights.hub_id."
            )
        return _found(path, f"file {weights.file}")
    tried = []
    if weights.hub_id is not None:
        check_key(weights.hub_id)
        if weights_root:
            place = join_uri(weights_root, weights.hub_id)
            path = _bring(place, cache)
            if path is not None:
                return _found(path, f"weights root {place}")
            tried.append(f"{place} (no file of weights there)")
        else:
            tried.append("no weights root is set")
        if allow_network:
            found = _ask_hub(weights.hub_id, cache / "hub")
            if isinstance(found, Path):
                return _found(found, f"model hub {weights.hub_id}")
            tried.append(f"the model hub ({found})")
        else:
            tried.append("the model hub may not be asked (job.allow_network=false)")
    if weights.allow_random_init:
        return FoundWeights(None, "random", "random initialisation")
    wanted = weights.hub_id or "no weights.hub_id and no weights.file"
    raise ConfigError(
        f"pretrained weights must be found, but there are none for {wanted}"
        + (f"; tried: {'; '.join(tried)}" if tried else "")
        + ". Name a copy by the `file` of these weights (such as model.encoder.weights.file=…), "
        "put one into MEDTRAIN_WEIGHTS_ROOT/<hub id>, set job.allow_network=true, or allow a "
        "random start by their `allow_random_init` (…weights.allow_random_init=true)."
    )


def _found(path: Path, source: str) -> FoundWeights:
    digest = _digest_of_folder(path) if path.is_dir() else sha256_of(path)
    return FoundWeights(path, f"sha256:{digest}", source)


def _digest_of_folder(folder: Path) -> str:
    """SHA-256 over (relative name, SHA-256) of the files, sorted; the same wherever a copy lies."""
    lines = [f"{key}\0{sha256_of(folder / key)}\n" for key in _keys(open_store(str(folder)))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _keys(store: Store) -> list[str]:
    """The files that belong to weights, sorted: not what tools and people leave beside them."""
    return [
        info.key
        for info in store.list()
        if not info.key.endswith(".md") and not info.key.startswith(".") and "/." not in info.key
    ]


def _holds_weights(store: Store) -> bool:
    return any(key.endswith(MODEL_SUFFIXES) for key in _keys(store))


def _bring(place: str, cache: Path) -> Path | None:
    """The file or folder of weights at a path or URI, on this machine; None where there is none."""
    if "://" not in place:
        path = Path(place).expanduser().absolute()
        return path if path.is_file() or _holds_weights(open_store(str(path))) else None
    parent, _, name = place.rstrip("/").rpartition("/")
    if not parent.endswith("/"):
        store = open_store(parent)
        try:
            return _keep(store, [store.info(name)], cache) / name
        except ObjectMissing:
            pass
    store = open_store(place)
    return _keep(store, store.list(), cache) if _holds_weights(store) else None


def _keep(store: Store, infos: list[ObjectInfo], cache: Path) -> Path:
    """The folder of the cache that holds exactly these versions of these objects."""
    described = [store.uri, *([info.key, info.size, info.version] for info in infos)]
    name = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]
    folder = cache / "weights" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock")):
        if not folder.is_dir():
            # Under another name until it is complete; what a cut has left is used.
            partial = folder.with_name(f"{name}.partial")
            download_files(store, {info.key: info.checksum for info in infos}, partial)
            partial.rename(folder)
    return folder


def _ask_hub(hub_id: str, cache: Path) -> Path | str:
    """A snapshot of a repository of the model hub, or why there is none."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
        )
    except ModuleNotFoundError:
        return "the package huggingface-hub is not installed: pip install 'medtrain[train]'"
    for patterns in (_SAFE, _PICKLED):
        try:
            folder = Path(
                snapshot_download(
                    hub_id, cache_dir=cache, allow_patterns=[*patterns, *_DESCRIPTIONS]
                )
            )
        except GatedRepoError:
            return f"access to {hub_id} must be granted there first"
        except (RepositoryNotFoundError, HFValidationError):
            return f"there is no {hub_id}"
        # The client raises errors of its own, of its HTTP library and of the system.
        except Exception as error:
            if isinstance(error, LocalEntryNotFoundError) and isinstance(
                error.__cause__, OfflineModeIsEnabled
            ):
                return "HF_HUB_OFFLINE is set, and there is no copy of an earlier time"
            raise StorageError(
                f"the model hub cannot be asked for {hub_id} ({error.__cause__ or error}). "
                "Try again, or set job.allow_network=false to go on without it."
            ) from error
        if _holds_weights(open_store(str(folder))):
            return folder
    return f"{hub_id} has no file of weights"


__all__ = ["MODEL_SUFFIXES", "FoundWeights", "find_weights"]

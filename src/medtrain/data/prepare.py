"""From a raw data set to a manifest and recorded membership: what stands before any training."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from medtrain.config import Data
from medtrain.data.cache import HashCache, local_path
from medtrain.data.manifest import Case, Manifest, Scan, problem_table
from medtrain.data.splits import Membership, SplitRow, count_roles, is_trainable
from medtrain.data.splits import fingerprint as splits_fingerprint
from medtrain.errors import ConfigError, DataError, ObjectMissing
from medtrain.storage.stores import open_store
from medtrain.storage.uri import Store, join_uri

SPLIT_SEED = 42
"""Of every first drawing: membership depends on the data set, not on who trains first."""

Progress = Callable[[int, int], None]
"""Called with how many of how many cases are read."""


class DataModule(Protocol):
    """What `recipes/<system>/data.py` offers; the module itself is the object."""

    def scan(self, root: Store, data: Any, *, progress: Progress | None = None) -> Scan:
        """Read the raw data set; problems are in the answer."""
        ...

    def assign(
        self, cases: Sequence[Case], data: Any, existing: Sequence[SplitRow], *, seed: int
    ) -> list[SplitRow]:
        """The place of every case under `data.protocol`, with `existing` kept."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A data set that is ready: its manifest, and how far its membership went at that time."""

    fingerprint: str
    """Of the manifest, which lies in the data set's home as `manifests/<fingerprint>.json`."""
    protocol: str
    part: int
    """The latest part of the membership."""
    counts: Mapping[str, int]
    """Role → cases of the manifest."""
    is_synthetic: bool
    rows_fingerprint: str
    """Of the membership up to `part`."""

    @property
    def manifest_key(self) -> str:
        """Where the manifest lies in the data set's home."""
        return manifest_key(self.fingerprint)


@dataclass(frozen=True)
class PreparedCases:
    """What runs are made of: the manifest, and the place of each of its cases."""

    manifest: Manifest
    rows: tuple[SplitRow, ...]
    """One a case; roles are the recorded ones, see `splits.select`."""


def manifest_key(fingerprint: str) -> str:
    """Where a manifest lies in its data set's home."""
    return f"manifests/{fingerprint}.json"


def dataset_name(data: Data) -> str:
    """What a data set is called: `data.name`, else the last part of its root and six digits of the
    root's hash. A data set that moves keeps its membership only under a `data.name`.
    """
    if data.name is not None:
        return data.name
    uri = root_uri(data)
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", uri.rpartition("/")[2]).strip("-._") or "root"
    return f"{last}-{hashlib.sha256(uri.encode()).hexdigest()[:6]}"


def root_uri(data: Data) -> str:
    """`data.root` as an absolute path or a bucket's URI; a ConfigError where it is not set."""
    if not data.root:
        raise ConfigError(
            "data.root must be a folder, s3://bucket/prefix or gs://bucket/prefix, but is not "
            "set. Add data.root=…, or make a set with `medtrain data synth`."
        )
    if "://" in data.root:
        return data.root.rstrip("/")
    return os.path.abspath(Path(data.root).expanduser())


def listing_fingerprint(root: Store, *, cache: Path) -> str:
    """SHA-256 of what lies under `root`: keys, sizes, checksums. Equal content, equal fingerprint.

    Buckets answer with their own checksums (the ETag or generation, where an object has none);
    files of local folders are hashed once, see `HashCache`.

    Args:
        root: The raw data set.
        cache: The node's cache folder.
    """
    folder, infos = local_path(root), root.list()
    checksums = {info.key: info.checksum for info in infos}
    if folder is not None:
        unknown = {folder / key: key for key, checksum in checksums.items() if checksum is None}
        found = HashCache(cache / "hashes.sqlite").checksums(unknown)
        checksums |= {key: found[file] for file, key in unknown.items()}
    content = [
        (info.key, info.size, checksums[info.key] or f"version:{info.version}") for info in infos
    ]
    return hashlib.sha256(json.dumps(sorted(content)).encode()).hexdigest()


def dataset_home(storage_root: str, system: str, data: Data) -> Store:
    """Where a data set's manifests, splits and looks are kept."""
    return open_store(join_uri(storage_root, "datasets", system, dataset_name(data)))


def prepare(
    module: DataModule,
    *,
    root: Store,
    data: Data,
    home: Store,
    seed: int = SPLIT_SEED,
    progress: Progress | None = None,
) -> Prepared:
    """Read the raw data set, refuse it if anything is wrong, write its manifest, record its splits.

    Doing it twice changes nothing.

    Raises:
        DataError: The data set has errors (all of them are in the message), or its protocol cannot
            be used with it.
    """
    scan = checked_scan(module, root=root, data=data, progress=progress)
    manifest = scan.manifest
    if not manifest.cases:
        raise DataError(f"{root.uri} must hold a data set, but is empty or does not exist")
    membership = Membership.open(home, data.protocol)
    # Before anything is written: what the protocol refuses leaves no trace.
    membership.changes(_assigned(module, manifest, data, membership.rows, home=home, seed=seed))
    home.create(manifest_key(manifest.fingerprint), manifest.to_json().encode())
    membership = membership.extend(
        lambda existing: _assigned(module, manifest, data, existing, home=home, seed=seed)
    )
    return Prepared(
        fingerprint=manifest.fingerprint,
        protocol=data.protocol,
        part=membership.part,
        counts=count_roles(row for row in membership.rows if row.case_id in manifest.by_id),
        is_synthetic=manifest.is_synthetic,
        rows_fingerprint=splits_fingerprint(membership.rows),
    )


def preview(
    module: DataModule,
    *,
    root: Store,
    data: Data,
    home: Store,
    seed: int = SPLIT_SEED,
    progress: Progress | None = None,
) -> Prepared:
    """What `prepare` would answer, with nothing written."""
    manifest = checked_scan(module, root=root, data=data, progress=progress).manifest
    membership = Membership.open(home, data.protocol)
    rows = _assigned(module, manifest, data, membership.rows, home=home, seed=seed)
    is_new = bool(membership.changes(rows))
    return Prepared(
        fingerprint=manifest.fingerprint,
        protocol=data.protocol,
        part=membership.part + is_new,
        counts=count_roles(rows),
        is_synthetic=manifest.is_synthetic,
        rows_fingerprint=splits_fingerprint(rows),
    )


def checked_scan(
    module: DataModule, *, root: Store, data: Data, progress: Progress | None = None
) -> Scan:
    """Read the raw data set; a DataError lists every error."""
    scan = module.scan(root, data, progress=progress)
    if scan.errors:
        raise DataError(
            f"{root.uri} must be without errors, but has {len(scan.errors)}. "
            f"Mend them; `medtrain data check` shows them and the warnings.\n"
            f"{problem_table(scan.errors)}"
        )
    return scan


def load(
    home: Store, *, fingerprint: str, protocol: str, part: int, rows_fingerprint: str
) -> PreparedCases:
    """The cases and their places, as they were when `prepare` answered.

    Raises:
        DataError: A case of the manifest has no place in the membership.
    """
    try:
        manifest = Manifest.from_json(home.read(manifest_key(fingerprint)).decode())
        rows = Membership.open(home, protocol, part=part).rows
    except ObjectMissing as error:
        raise DataError(
            f"{home.uri} must hold what was prepared, but it is gone ({error}). Record it anew: "
            "medtrain data split NAME data.root=…"
        ) from error
    if manifest.fingerprint != fingerprint:
        raise DataError(
            f"manifest {fingerprint[:12]} of {home.uri} must be as it was written, but "
            "was changed. Put the copy back that was recorded."
        )
    if splits_fingerprint(rows) != rows_fingerprint:
        raise DataError(
            f"{home.uri}/splits/{protocol} must be as it was recorded up to part {part}, but was "
            "changed: sealed cases may have moved. Put the recorded parts back."
        )
    places = {row.case_id: row for row in rows}
    lost = sorted(set(manifest.by_id) - set(places))
    if lost:
        raise DataError(
            f"part {part} of {home.uri}/splits/{protocol} must place every case of manifest "
            f"{fingerprint[:12]}, but lacks {', '.join(lost[:5])}. Run `medtrain data split`."
        )
    return PreparedCases(manifest, tuple(places[case_id] for case_id in sorted(manifest.by_id)))


def _assigned(
    module: DataModule,
    manifest: Manifest,
    data: Data,
    existing: Sequence[SplitRow],
    *,
    home: Store,
    seed: int,
) -> list[SplitRow]:
    rows = module.assign(manifest.cases, data, existing, seed=seed)
    if rows and not any(is_trainable(row.role) for row in rows):
        _refuse_own_training_cases(manifest, data.protocol, home)
    return rows


def _refuse_own_training_cases(manifest: Manifest, protocol: str, home: Store) -> None:
    """A set that is all test must not be one that the same home trains on by another protocol."""
    others = {
        info.key.split("/")[1] for info in home.list("splits/") if info.key.endswith(".csv")
    } - {protocol}
    for other in sorted(others):
        rows = Membership.open(home, other).rows
        trained = [row for row in rows if is_trainable(row.role) and row.case_id in manifest.by_id]
        if trained:
            raise DataError(
                f"protocol '{protocol}' must be used with a data set that no model was trained "
                f"on, but protocol '{other}' trains on {len(trained)} of these cases. "
                "Set data.root to a second data set."
            )

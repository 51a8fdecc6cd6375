"""Registered models: found by anyone, annotated and promoted by a person, pulled and verified."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.errors import RegistryError
from medtrain.registry.gate import GateVerdict
from medtrain.registry.package import Package, verify_package
from medtrain.settings import settings
from medtrain.storage.runs import now
from medtrain.storage.tracking import mlflow_errors, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE, CHAMPION = "candidate", "champion"
"""Aliases: the newest version that the gate let in, and the one that a person chose."""

_REFERENCE = re.compile(
    r"(models:/)?(?P<name>[a-z0-9_-]+)([:/](?P<version>[1-9]\d*)|@(?P<alias>[A-Za-z0-9_-]+))"
)


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model."""

    name: str
    version: int
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    run_id: str
    """MLflow run that holds the package."""
    source: str
    """URI of the package."""
    time: str
    """When it was registered, in UTC."""

    @property
    def reference(self) -> str:
        """`name:version`."""
        return f"{self.name}:{self.version}"

    @property
    def verdict(self) -> GateVerdict | None:
        """What the gate decided; None: it was not registered by medtrain."""
        return GateVerdict.from_json(self.tags["gate"]) if "gate" in self.tags else None

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics on the sealed test split."""
        return dict(json.loads(self.tags.get("metrics", "{}")))

    @property
    def notes(self) -> list[dict[str, str]]:
        """Judgements of people, oldest first: `time`, `author`, `text`."""
        return list(json.loads(self.tags.get("notes", "[]")))

    @property
    def is_synthetic(self) -> bool:
        """Whether it was trained or tested on synthetic data."""
        return self.tags.get("synthetic") == "true"


def model_name(system: str, variant: str) -> str:
    """The registered model of a variant: `cephalometric`, `cephalometric-smoke`.

    Every variant is a model of its own, so that a demonstration never competes with the champion
    that is in use.
    """
    return system if variant == "default" else f"{system}-{variant}"


def promote(reference: str) -> RegisteredVersion:
    """Make a version the champion: a person's act.

    The version that was the champion before is kept in the tag `former_champion`.

    Raises:
        RegistryError: The gate did not accept it, or its package is not whole.
    """
    version = find_version(reference)
    if version.verdict is None or version.tags.get("gate_accepted") != "true":
        reason = version.tags.get("gate_reason", "it has never judged this version")
        raise RegistryError(
            f"{version.reference} must be accepted by the gate to become champion, but is not: "
            f"{reason}"
        )
    with tempfile.TemporaryDirectory(prefix="medtrain-") as scratch:
        _download(version, Path(scratch))
    client = open_registry()
    former = aliases_of(client, version.name).get(CHAMPION)
    if former == version.version:
        return version
    with mlflow_errors():
        number = str(version.version)
        if former is not None:
            client.set_model_version_tag(version.name, number, "former_champion", str(former))
        client.set_model_version_tag(version.name, number, "promoted", now())
        client.set_registered_model_alias(version.name, CHAMPION, number)
    return find_version(version.reference)


def pull(reference: str, folder: Path) -> Package:
    """Download a version's package into `folder`, verified; an equal one there already is fine.

    Raises:
        RegistryError: There is no such version, its package is not whole, or `folder` holds
            something else.
    """
    version = find_version(reference)
    folder = folder.absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        return _same_package(version, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        package = _download(version, scratch)
        try:
            package.folder.replace(folder)
        except OSError:
            if not folder.exists():
                raise
            # Somebody else has filled the folder in the meantime.
            return _same_package(version, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return replace(package, folder=folder)


def note(reference: str, text: str, *, author: str) -> RegisteredVersion:
    """Append a person's judgement of a version, with name and time."""
    if not text.strip() or not author.strip():
        raise RegistryError("a note must have a text and an author, but one of them is empty")
    version = find_version(reference)
    notes = [*version.notes, {"time": now(), "author": author, "text": text}]
    with mlflow_errors():
        open_registry().set_model_version_tag(
            version.name, str(version.version), "notes", json.dumps(notes, ensure_ascii=False)
        )
    return find_version(version.reference)


def list_models() -> list[RegisteredVersion]:
    """Every version that medtrain registered, by name, newest first."""
    found = [version for version in search_versions(open_registry()) if version.verdict]
    return sorted(found, key=lambda version: (version.name, -version.version))


def find_version(reference: str) -> RegisteredVersion:
    """The version that `name@alias`, `name:version` or `models:/name@alias` means."""
    match = _REFERENCE.fullmatch(reference)
    if not match:
        raise RegistryError(
            f"'{reference}' must have the form NAME@ALIAS or NAME:VERSION, such as "
            "cephalometric@champion or cephalometric:3"
        )
    name, alias = match["name"], match["alias"]
    versions = search_versions(open_registry(), f"name = '{name}'")
    for version in versions:
        if alias in version.aliases or str(version.version) == match["version"]:
            return version
    if versions:
        has = ", ".join(
            "".join([str(version.version), *(f" (@{alias})" for alias in version.aliases)])
            for version in sorted(versions, key=lambda version: version.version)
        )
        raise RegistryError(f"'{reference}' does not exist. {name} has the versions {has}.")
    names = sorted({version.name for version in list_models()})
    raise RegistryError(
        f"'{reference}' does not exist. Registered models: {', '.join(names) or 'none yet'}."
    )


def open_registry() -> MlflowClient:
    """A client of the site's registry."""
    return open_client(settings().tracking)


def search_versions(client: MlflowClient, condition: str | None = None) -> list[RegisteredVersion]:
    """All versions for which MLflow's filter `condition` holds."""
    items: list[Any] = []
    token = None
    with mlflow_errors():
        while True:
            page = client.search_model_versions(condition, max_results=1000, page_token=token)
            items.extend(page)
            token = page.token
            if not token:
                break
    aliases = {name: aliases_of(client, name) for name in {item.name for item in items}}
    return [_from_mlflow(item, aliases[item.name]) for item in items]


def aliases_of(client: MlflowClient, name: str) -> Mapping[str, int]:
    """Aliases of a model with their versions; none where there is no such model."""
    try:
        with mlflow_errors():
            aliases = client.get_registered_model(name).aliases
    except RegistryError:
        return {}
    return {alias: int(version) for alias, version in aliases.items()}


def _from_mlflow(item: Any, aliases: Mapping[str, int]) -> RegisteredVersion:
    number = int(item.version)
    return RegisteredVersion(
        name=item.name,
        version=number,
        aliases=tuple(sorted(alias for alias, of in aliases.items() if of == number)),
        tags=dict(item.tags),
        run_id=item.run_id or "",
        source=item.source or "",
        time=datetime.fromtimestamp(item.creation_timestamp / 1000, UTC).isoformat(
            timespec="seconds"
        ),
    )


def _download(version: RegisteredVersion, scratch: Path) -> Package:
    """The version's package below `scratch`, verified against the registry's digest."""
    from mlflow.artifacts import download_artifacts

    with mlflow_errors():
        folder = Path(
            download_artifacts(
                artifact_uri=version.source,
                dst_path=str(scratch),
                tracking_uri=settings().tracking,
            )
        )
    package = verify_package(folder)
    expected = version.tags.get("package_digest")
    if package.digest != expected:
        raise RegistryError(
            f"the package of {version.reference} must have the digest {str(expected)[:12]}…, but "
            f"has {package.digest[:12]}…: the artifacts were exchanged. Do not use it."
        )
    return package


def _same_package(version: RegisteredVersion, folder: Path) -> Package:
    try:
        package = verify_package(folder)
    except RegistryError as error:
        raise RegistryError(
            f"{folder} must be free to take {version.reference}, but holds something else: {error} "
            "Name another folder, or remove this one."
        ) from error
    if package.digest != version.tags.get("package_digest"):
        raise RegistryError(
            f"{folder} must be free to take {version.reference}, but holds another model (run "
            f"{package.details['run_key']}). Name another folder, or remove this one."
        )
    return package

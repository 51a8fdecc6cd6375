"""Registered models: register by the gate, promote by a person, pull by anyone.

A version is registered after its package was uploaded and read back. Its source is plain artifacts
of an MLflow run, so `mlflow artifacts download` gets it without this project.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.errors import RegistryError
from medtrain.recipes import find, part
from medtrain.recipes.recipe import RecipeName
from medtrain.registry.evaluation import Evaluation
from medtrain.registry.gate import Contender, GateVerdict, decide
from medtrain.registry.package import SUMS, Package, verify_package
from medtrain.settings import settings
from medtrain.storage.runs import now
from medtrain.storage.tracking import (
    artifact_root,
    ensure_experiment,
    ensure_run,
    mlflow_errors,
    open_client,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

CANDIDATE, CHAMPION = "candidate", "champion"
"""Aliases: the newest version that the gate let in, and the one that a person chose."""

_ARTIFACT_PATH = "package"
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


@dataclass(frozen=True)
class Registration:
    """What came of the wish to register a model."""

    name: str
    verdict: GateVerdict
    version: RegisteredVersion | None
    """None: the gate refused."""
    is_new: bool
    """False: the same run was registered before, and this is its version."""


def model_name(system: str, variant: str) -> str:
    """The registered model of a variant: `cephalometric`, `cephalometric-smoke`.

    Every variant is a model of its own, so that a demonstration never competes with the champion
    that is in use.
    """
    return system if variant == "default" else f"{system}-{variant}"


def register(evaluation_uri: str) -> Registration:
    """Apply the gate to an evaluated model; where it passes, register it as `candidate`.

    The MLflow run of the evaluation is tagged with the verdict either way. The same trained run is
    registered once: later calls answer with its version.

    Args:
        evaluation_uri: A finished evaluation's run directory; see `registry.evaluation`.

    Raises:
        RegistryError: The evaluation or its package is not what it must be.
        StorageError: The tracking server or the storage failed.
    """
    evaluation = Evaluation.open(evaluation_uri)
    name = model_name(evaluation.details["system"], evaluation.details["variant"])
    client = _client()
    existing = _versions_of_run(client, name, evaluation.details["run_key"])
    if existing:
        return _registered_before(client, existing[0])
    with tempfile.TemporaryDirectory(prefix="medtrain-") as scratch:
        package = evaluation.download_package(Path(scratch) / "package")
        verdict = _judge(client, evaluation, name)
        run_id = _tag_run(client, evaluation, verdict)
        if not verdict.accepted:
            log.warning("%s: refused: %s", name, verdict.reason)
            return Registration(name, verdict, None, is_new=False)
        source = _upload(client, run_id, package, Path(scratch) / "read-back")
    tags = _version_tags(evaluation, package, verdict)
    _ensure_model(client, name)
    with mlflow_errors():
        created = client.create_model_version(
            name, source=source, run_id=run_id, tags=tags, description=_description(verdict, tags)
        )
    first = _versions_of_run(client, name, tags["run_key"])[0]
    if first.version != int(created.version):
        # Somebody registered the same run at the same moment, and the first one counts.
        with mlflow_errors():
            client.delete_model_version(name, str(created.version))
        return _registered_before(client, first)
    _point_candidate(client, first)
    log.info("%s: registered: %s", first.reference, verdict.reason)
    return Registration(name, verdict, find_version(first.reference), is_new=True)


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
    client = _client()
    former = _aliases(client, version.name).get(CHAMPION)
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
        _client().set_model_version_tag(
            version.name, str(version.version), "notes", json.dumps(notes, ensure_ascii=False)
        )
    return find_version(version.reference)


def list_models() -> list[RegisteredVersion]:
    """Every version that medtrain registered, by name, newest first."""
    client = _client()
    aliases: dict[str, Mapping[str, int]] = {}
    found = []
    for item in _search(client, None):
        if "gate" not in item.tags:
            continue
        if item.name not in aliases:
            aliases[item.name] = _aliases(client, item.name)
        found.append(_from_mlflow(item, aliases[item.name]))
    return sorted(found, key=lambda version: (version.name, -version.version))


def find_version(reference: str) -> RegisteredVersion:
    """The version that `name@alias`, `name:version` or `models:/name@alias` means."""
    match = _REFERENCE.fullmatch(reference)
    if not match:
        raise RegistryError(
            f"'{reference}' must have the form NAME@ALIAS or NAME:VERSION, such as "
            "cephalometric@champion or cephalometric:3"
        )
    client = _client()
    name, alias = match["name"], match["alias"]
    aliases = _aliases(client, name)
    number = aliases.get(alias) if alias else int(match["version"])
    for item in _search(client, f"name = '{name}'"):
        if int(item.version) == number:
            return _from_mlflow(item, aliases)
    known = [version for version in list_models() if version.name == name]
    if known:
        has = ", ".join(
            "".join([str(version.version), *(f" (@{alias})" for alias in version.aliases)])
            for version in known
        )
        raise RegistryError(f"'{reference}' does not exist. {name} has the versions {has}.")
    names = sorted({version.name for version in list_models()})
    raise RegistryError(
        f"'{reference}' does not exist. Registered models: {', '.join(names) or 'none yet'}."
    )


def _client() -> MlflowClient:
    return open_client(settings().tracking)


def _search(client: MlflowClient, condition: str | None) -> list[Any]:
    found: list[Any] = []
    token = None
    with mlflow_errors():
        while True:
            page = client.search_model_versions(condition, max_results=1000, page_token=token)
            found.extend(page)
            token = page.token
            if not token:
                return found


def _aliases(client: MlflowClient, name: str) -> Mapping[str, int]:
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


def _versions_of_run(client: MlflowClient, name: str, run_key: str) -> list[RegisteredVersion]:
    """Versions made of one trained run, the first one first."""
    condition = f"name = '{name}' and tags.run_key = '{run_key}'"
    aliases = _aliases(client, name)
    found = [_from_mlflow(item, aliases) for item in _search(client, condition)]
    return sorted(found, key=lambda version: version.version)


def _registered_before(client: MlflowClient, version: RegisteredVersion) -> Registration:
    _point_candidate(client, version)
    verdict = version.verdict
    if verdict is None:
        raise RegistryError(f"{version.reference} must carry the tag 'gate', but does not")
    return Registration(version.name, verdict, find_version(version.reference), is_new=False)


def _point_candidate(client: MlflowClient, version: RegisteredVersion) -> None:
    """Let `candidate` name this version, unless it names a newer one."""
    if _aliases(client, version.name).get(CANDIDATE, 0) < version.version:
        with mlflow_errors():
            client.set_registered_model_alias(version.name, CANDIDATE, str(version.version))


def _judge(client: MlflowClient, evaluation: Evaluation, name: str) -> GateVerdict:
    details = evaluation.details
    _, recipe = find(RecipeName(details["system"], details["variant"]))
    if details["variant"] not in recipe.gates:
        raise RegistryError(
            f"variant '{details['variant']}' of {recipe.system} must have a gate to be registered, "
            "but has none. Add one to the recipe's `gates`."
        )
    return decide(
        recipe.gates[details["variant"]],
        challenger=evaluation.contender(),
        champion=_champion(client, name),
        summarize=part(recipe, "metrics").summarize,
        today=evaluation.today(),
    )


def _champion(client: MlflowClient, name: str) -> Contender | None:
    number = _aliases(client, name).get(CHAMPION)
    if number is None:
        return None
    version = find_version(f"{name}:{number}")
    try:
        return Evaluation.open(version.tags["evaluation_uri"]).contender(version=number)
    except (KeyError, RegistryError) as error:
        raise RegistryError(
            f"the champion {version.reference} must have a stored evaluation to be compared with, "
            f"but has none ({error}). Promote a version that has one, or take the alias 'champion' "
            "away in MLflow."
        ) from error


def _tag_run(client: MlflowClient, evaluation: Evaluation, verdict: GateVerdict) -> str:
    """The MLflow run of the evaluation, with the gate's verdict on it."""
    tracking, details = settings().tracking, evaluation.details
    experiment_id = ensure_experiment(
        client,
        f"{settings().experiment}/{details['system']}",
        artifact_root=artifact_root(tracking, home=settings().home),
    )
    run_id = ensure_run(
        client, experiment_id, run_uri=evaluation.uri, name=f"{details['variant']}:evaluate"
    )
    with mlflow_errors():
        client.set_tag(run_id, "gate_accepted", str(verdict.accepted).lower())
        client.set_tag(run_id, "gate_reason", verdict.reason)
    return run_id


def _upload(client: MlflowClient, run_id: str, package: Package, scratch: Path) -> str:
    """Store the package as artifacts of the run, read it back and verify it; its URI."""
    with mlflow_errors():
        client.log_artifacts(run_id, str(package.folder), _ARTIFACT_PATH)
        scratch.mkdir()
        folder = Path(client.download_artifacts(run_id, _ARTIFACT_PATH, str(scratch)))
        uri: str = client.get_run(run_id).info.artifact_uri
    if verify_package(folder).digest != package.digest:
        raise RegistryError(f"artifacts of MLflow run {run_id} are not the package uploaded")
    return f"{uri}/{_ARTIFACT_PATH}"


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    with mlflow_errors():
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def _version_tags(evaluation: Evaluation, package: Package, verdict: GateVerdict) -> dict[str, str]:
    details = evaluation.details
    config = package.read_text("config.yaml").encode()
    return {
        "run_key": details["run_key"],
        "evaluation_uri": evaluation.uri,
        "config_digest": hashlib.sha256(config).hexdigest(),
        "data_fingerprint": details["data_fingerprint"],
        "code_fingerprint": details["code_fingerprint"],
        "commit": details["commit"],
        "package_digest": package.digest,
        "metrics": json.dumps(dict(evaluation.outcome.metrics)),
        "synthetic": str(bool(details["is_synthetic"])).lower(),
        "looks": str(evaluation.looks()),
        "gate": verdict.to_json(),
        "gate_accepted": str(verdict.accepted).lower(),
        "gate_reason": verdict.reason,
    }


def _description(verdict: GateVerdict, tags: Mapping[str, str]) -> str:
    synthetic = "SYNTHETIC data, not for patients. " if tags["synthetic"] == "true" else ""
    return f"{synthetic}Gate: {verdict.reason}."


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
            f"{folder} must be free to take {version.reference}, but holds something else ({error}) "
            "Name another folder, or remove this one."
        ) from error
    if package.digest != version.tags.get("package_digest"):
        raise RegistryError(
            f"{folder} must be free to take {version.reference}, but holds another model (run "
            f"{package.details['run_key']}). Name another folder, or remove this one."
        )
    return package

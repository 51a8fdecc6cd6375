"""Registration: the gate decides, then a verified package becomes a version.

A version is created after its package was uploaded and read back. Its source is plain artifacts of
an MLflow run, so `mlflow artifacts download` gets it without this project.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medtrain.errors import RegistryError, StorageError
from medtrain.recipes import find, part
from medtrain.recipes.recipe import RecipeName
from medtrain.registry.evaluation import Evaluation
from medtrain.registry.gate import Contender, GateVerdict, decide
from medtrain.registry.models import (
    CANDIDATE,
    CHAMPION,
    RegisteredVersion,
    aliases_of,
    find_version,
    model_name,
    open_registry,
    pull,
    search_versions,
)
from medtrain.registry.package import Package, verify_package
from medtrain.settings import settings
from medtrain.storage.tracking import artifact_root, ensure_experiment, ensure_run, mlflow_errors
from medtrain.storage.uri import sha256_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_ARTIFACT_PATH = "package"


@dataclass(frozen=True)
class Registration:
    """What came of the wish to register a model."""

    name: str
    verdict: GateVerdict
    version: RegisteredVersion | None
    """None: the gate refused."""
    is_new: bool
    """False: the same trained run was registered before, or the gate refused."""


def register(evaluation_uri: str) -> Registration:
    """Apply the gate to an evaluated model; where it passes, register it as `candidate`.

    The MLflow run of the evaluation is tagged with the verdict either way. One trained run is one
    version: the evaluation that it was registered by is answered with it, while another one, on
    test cases that have grown since, is judged. Accepted, it gives the version its numbers and
    verdict; refused, it leaves the version as it is, and the answer has none.

    Args:
        evaluation_uri: A finished evaluation's run directory; see `registry.evaluation`.

    Raises:
        RegistryError: The evaluation or its package is not what it must be, or the trained run is
            registered with other weights.
        StorageError: The tracking server or the storage failed.
    """
    evaluation = Evaluation.open(evaluation_uri)
    name = model_name(evaluation.details["system"], evaluation.details["variant"])
    client = open_registry()
    existing = _versions_of_run(client, name, evaluation.details["run_key"])
    if existing and existing[0].tags.get("evaluation_uri") == evaluation.uri:
        return _registered_before(client, existing[0])
    with tempfile.TemporaryDirectory(prefix="medtrain-") as scratch:
        package = evaluation.download_package(Path(scratch) / "package")
        verdict = _judge(client, evaluation, name)
        run_id = _tag_run(client, evaluation, verdict)
        if not verdict.accepted:
            log.warning("%s: refused: %s", name, verdict.reason)
            return Registration(name, verdict, None, is_new=False)
        if existing:
            _check_weights(existing[0], package, Path(scratch) / "registered")
            return _judged_anew(client, existing[0], evaluation, verdict)
        source = _upload(client, run_id, package, Path(scratch) / "read-back")
    judgement = _judgement_tags(evaluation, verdict)
    tags = {**_package_tags(evaluation, package), **judgement}
    _ensure_model(client, name)
    with mlflow_errors():
        created = client.create_model_version(
            name,
            source=source,
            run_id=run_id,
            tags=tags,
            description=_description(verdict, judgement),
        )
    first = _versions_of_run(client, name, tags["run_key"])[0]
    if first.version != int(created.version):
        # Somebody registered the same run at the same moment, and the first one counts.
        with mlflow_errors():
            client.delete_model_version(name, str(created.version))
        return register(evaluation_uri)
    _point_candidate(client, first)
    log.info("%s: registered: %s", first.reference, verdict.reason)
    return Registration(name, verdict, find_version(first.reference), is_new=True)


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
        champion=_champion(client, name, challenger=details["run_key"]),
        summarize=part(recipe, "metrics").summarize,
        today=evaluation.today(),
    )


def _champion(client: MlflowClient, name: str, *, challenger: str) -> Contender | None:
    """The champion to beat; None where there is none, or the challenger's run is it already."""
    number = aliases_of(client, name).get(CHAMPION)
    if number is None:
        return None
    version = find_version(f"{name}:{number}")
    if version.tags.get("run_key") == challenger:
        # Nothing is better than itself.
        return None
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
    try:
        is_same = verify_package(folder).digest == package.digest
    except RegistryError as error:
        raise StorageError(f"the package came back damaged from MLflow's store: {error}") from error
    if not is_same:
        raise StorageError(f"artifacts of MLflow run {run_id} are not the package uploaded")
    return f"{uri}/{_ARTIFACT_PATH}"


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    with mlflow_errors():
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def _package_tags(evaluation: Evaluation, package: Package) -> dict[str, str]:
    """What a version's package is, for good."""
    details = evaluation.details
    return {
        "run_key": details["run_key"],
        "config_digest": evaluation.outcome.sha256["package/config.yaml"],
        "data_fingerprint": details["data_fingerprint"],
        "code_fingerprint": details["code_fingerprint"],
        "commit": details["commit"],
        "package_digest": package.digest,
    }


def _judgement_tags(evaluation: Evaluation, verdict: GateVerdict) -> dict[str, str]:
    """What one evaluation says of a version; `evaluation_uri` is the last."""
    return {
        "metrics": json.dumps(dict(evaluation.outcome.metrics)),
        "synthetic": str(bool(evaluation.details["is_synthetic"])).lower(),
        "looks": str(evaluation.looks()),
        "gate": verdict.to_json(),
        "gate_accepted": str(verdict.accepted).lower(),
        "gate_reason": verdict.reason,
        "evaluation_uri": evaluation.uri,
    }


def _description(verdict: GateVerdict, tags: Mapping[str, str]) -> str:
    synthetic = "SYNTHETIC data, not for patients. " if tags["synthetic"] == "true" else ""
    return f"{synthetic}Gate: {verdict.reason}."


def _check_weights(version: RegisteredVersion, package: Package, scratch: Path) -> None:
    """Refuse an evaluation of other weights than the version's: the run was trained once more."""
    if sha256_of(pull(version.reference, scratch).weights) != sha256_of(package.weights):
        raise RegistryError(
            f"the evaluation must be of the weights that {version.reference} has, but is of others "
            f"of the same run ({version.tags['run_key']}), which was trained once more. Train with "
            "another seed to register them beside it."
        )


def _judged_anew(
    client: MlflowClient, version: RegisteredVersion, evaluation: Evaluation, verdict: GateVerdict
) -> Registration:
    """Give a version the numbers and the verdict of a later evaluation."""
    number, tags = str(version.version), _judgement_tags(evaluation, verdict)
    with mlflow_errors():
        client.update_model_version(version.name, number, _description(verdict, tags))
        # `evaluation_uri` comes last: where this is interrupted, the next call does it again.
        for tag, value in tags.items():
            client.set_model_version_tag(version.name, number, tag, value)
    _point_candidate(client, version)
    log.info("%s: judged anew: %s", version.reference, verdict.reason)
    return Registration(version.name, verdict, find_version(version.reference), is_new=False)


def _registered_before(client: MlflowClient, version: RegisteredVersion) -> Registration:
    _point_candidate(client, version)
    verdict = version.verdict
    if verdict is None:
        raise RegistryError(f"{version.reference} must carry the tag 'gate', but does not")
    return Registration(version.name, verdict, find_version(version.reference), is_new=False)


def _versions_of_run(client: MlflowClient, name: str, run_key: str) -> list[RegisteredVersion]:
    """Versions made of one trained run, the first one first."""
    condition = f"name = '{name}' and tags.run_key = '{run_key}'"
    return sorted(search_versions(client, condition), key=lambda version: version.version)


def _point_candidate(client: MlflowClient, version: RegisteredVersion) -> None:
    """Let `candidate` name this version, unless it names a newer one."""
    if aliases_of(client, version.name).get(CANDIDATE, 0) < version.version:
        with mlflow_errors():
            client.set_registered_model_alias(version.name, CANDIDATE, str(version.version))

"""The MLflow site: one way to reach the server, and to find an experiment or the run of a run
directory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from medtrain.errors import ConfigError, RegistryError, StorageError

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_URI_TAG = "run_uri"
"""Tag of an MLflow run: the URI of the run directory that it shows."""

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    # MLflow's own seven retries of 120 seconds would hold up whoever waits for the answer; a server
    # that stores a large file answers only when it has it.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
}
"""What MLflow reads from the environment; a variable that is set already stays as it is."""


def open_client(tracking_uri: str) -> MlflowClient:
    """A client of the tracking server or SQLite file at `tracking_uri`.

    Raises:
        ConfigError: A package is missing, or the URI is none that MLflow takes.
        StorageError: The server does not answer.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient

        if is_local(tracking_uri):
            import sqlalchemy  # noqa: F401

            Path(tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tracking at {shown(tracking_uri)} needs the package '{error.name}', which is not "
            "installed. Install medtrain[dev] for a local SQLite store, medtrain[platform] for a "
            "server."
        ) from error
    with mlflow_errors():
        return MlflowClient(tracking_uri=tracking_uri)


def is_local(tracking_uri: str) -> bool:
    """Whether this process itself is the tracking server: a SQLite file."""
    return tracking_uri.startswith("sqlite:///")


def artifact_root(tracking_uri: str, *, home: Path) -> str | None:
    """Where new experiments keep artifacts: a folder in `home` beside a SQLite file, else the
    server's choice."""
    return str(home.absolute() / "mlartifacts") if is_local(tracking_uri) else None


def ensure_experiment(client: MlflowClient, name: str, *, artifact_root: str | None) -> str:
    """The id of the experiment `name`, which is created where there is none.

    Args:
        client: From `open_client`.
        name: Such as `medtrain/cephalometric`.
        artifact_root: From the function of that name; MLflow's own default for a SQLite store is
            the current folder.
    """
    from mlflow.exceptions import MlflowException

    location = None
    if artifact_root is not None:
        location = (Path(artifact_root) / name.replace("/", "-")).as_uri()
    with mlflow_errors():
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise ConfigError(
            f"MLflow experiment '{name}' must be active, but is deleted. Restore it in MLflow, or "
            "set MEDTRAIN_EXPERIMENT to another name."
        )
    return str(experiment.experiment_id)


def ensure_run(
    client: MlflowClient,
    experiment_id: str,
    *,
    run_uri: str,
    name: str,
    tags: Mapping[str, str] | None = None,
) -> str:
    """The id of the MLflow run that shows the run directory at `run_uri`; created where there is
    none."""
    with mlflow_errors():
        found = client.search_runs(
            [experiment_id], f'tags.{RUN_URI_TAG} = "{run_uri}"', order_by=["attributes.start_time"]
        )
        if found:
            return str(found[0].info.run_id)
        run = client.create_run(
            experiment_id, tags={**(tags or {}), RUN_URI_TAG: run_uri}, run_name=name
        )
        return str(run.info.run_id)


@contextmanager
def mlflow_errors() -> Iterator[None]:
    """Turn MLflow's errors into ours: what it refuses is a RegistryError, what fails a
    StorageError."""
    from mlflow.exceptions import MlflowException

    refusals = (
        "RESOURCE_DOES_NOT_EXIST",
        "RESOURCE_ALREADY_EXISTS",
        "INVALID_PARAMETER_VALUE",
    )
    try:
        yield
    except MlflowException as error:
        kind = RegistryError if error.error_code in refusals else StorageError
        raise kind(f"MLflow says: {error.message}") from error
    except OSError as error:
        raise StorageError(f"MLflow's store failed: {error}") from error


def shown(tracking_uri: str) -> str:
    """`tracking_uri` without a password, for people to read."""
    parts = urlsplit(tracking_uri)
    if parts.password is None:
        return tracking_uri
    return tracking_uri.replace(f":{parts.password}@", ":***@")

import os
import shutil
import socket
from pathlib import Path

import pytest
from mlflow import MlflowClient

from medtrain.errors import ConfigError, RegistryError, StorageError
from medtrain.storage.tracking import (
    artifact_root,
    ensure_experiment,
    ensure_run,
    mlflow_errors,
    open_client,
    shown,
)

# MLflow builds its tables in a way that SQLAlchemy 2.1 wants to give up.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database in a folder that did not exist: one takes seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "not yet/empty.db"
    open_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def home(tmp_path: Path, migrated_store: Path) -> Path:
    home = tmp_path / "a home"
    home.mkdir()
    shutil.copy(migrated_store, home / "mlflow.db")
    return home


@pytest.fixture
def client(home: Path) -> MlflowClient:
    return open_client(f"sqlite:///{home}/mlflow.db")


def test_artifacts_of_a_local_store_lie_below_the_home(home, client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "card.txt").write_text("hello")
    root = artifact_root(f"sqlite:///{home}/mlflow.db", home=home)
    experiment = ensure_experiment(client, "medtrain/tiny", artifact_root=root)
    run_id = ensure_run(client, experiment, run_uri="/runs/1", name="train")
    client.log_artifact(run_id, str(tmp_path / "card.txt"))
    (stored,) = home.rglob("card.txt")
    assert stored.relative_to(home).parts[:2] == ("mlartifacts", "medtrain-tiny")
    assert not (tmp_path / "mlruns").exists()


def test_a_server_decides_itself_where_artifacts_lie(home):
    assert artifact_root("https://mlflow.example", home=home) is None


def test_experiment_is_created_once(client):
    first = ensure_experiment(client, "medtrain/tiny", artifact_root=None)
    assert ensure_experiment(client, "medtrain/tiny", artifact_root=None) == first


def test_experiment_that_another_process_created_meanwhile_is_used(client, monkeypatch):
    existing = client.create_experiment("medtrain/tiny")
    find = MlflowClient.get_experiment_by_name
    calls: list[str] = []

    def blind_at_first(self: MlflowClient, name: str) -> object:
        calls.append(name)
        return find(self, name) if len(calls) > 1 else None

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", blind_at_first)
    assert ensure_experiment(client, "medtrain/tiny", artifact_root=None) == existing


def test_deleted_experiment_is_an_error_that_says_what_to_do(client):
    client.delete_experiment(ensure_experiment(client, "medtrain/tiny", artifact_root=None))
    with pytest.raises(ConfigError, match="Restore it"):
        ensure_experiment(client, "medtrain/tiny", artifact_root=None)


def test_run_of_a_run_directory_is_created_once_and_carries_its_tags(client):
    experiment = ensure_experiment(client, "medtrain/tiny", artifact_root=None)
    uri = "/data/o'brien/runs/1"
    first = ensure_run(client, experiment, run_uri=uri, name="train", tags={"stage": "only"})
    assert ensure_run(client, experiment, run_uri=uri, name="other") == first
    assert ensure_run(client, experiment, run_uri="/runs/2", name="train") != first
    run = client.get_run(first)
    assert run.info.run_name == "train"
    assert (run.data.tags["stage"], run.data.tags["run_uri"]) == ("only", uri)


def test_what_mlflow_refuses_is_told_from_what_fails(client, monkeypatch):
    with pytest.raises(RegistryError, match="MLflow says"), mlflow_errors():
        client.get_registered_model("none")
    with pytest.raises(StorageError), mlflow_errors():
        raise ConnectionResetError("gone")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        away = open_client(f"http://127.0.0.1:{port}")
        with pytest.raises(StorageError):
            ensure_experiment(away, "medtrain/tiny", artifact_root=None)


def test_variables_that_are_set_stay_as_they_are(home, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    open_client(f"sqlite:///{home}/mlflow.db")
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("https://ann:secret@mlflow.example/x", "https://ann:***@mlflow.example/x"),
        ("https://mlflow.example", "https://mlflow.example"),
        ("sqlite:////home/a b/mlflow.db", "sqlite:////home/a b/mlflow.db"),
    ],
)
def test_passwords_are_not_shown(uri, text):
    assert shown(uri) == text

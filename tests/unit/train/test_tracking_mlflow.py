"""MLflow hears everything exactly once, and never holds up the training."""

import logging
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from medtrain.storage.metrics import MetricRow
from medtrain.storage.runs import RunDirectory
from medtrain.train.tracking import CompositeTracker, RunLabels, build_tracker
from medtrain.train.tracking.mlflow import LONGEST_VALUE, batches, params_of

# MLflow's own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

KEY = "0123456789abcdef"
LABELS = RunLabels("cephalometric", "smoke", "baseline", KEY, is_synthetic=True)


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store; its tables take seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking_uri(migrated_store: Path, tmp_path: Path) -> str:
    path = tmp_path / "mlflow.db"
    shutil.copy(migrated_store, path)
    return f"sqlite:///{path}"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(str(tmp_path / "run"))


@pytest.fixture
def client(tracking_uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking_uri)


def start(
    run: RunDirectory, tracking_uri: str, folder: Path, *, attempt: int = 1, from_step: int = 0
) -> CompositeTracker:
    return build_tracker(
        run,
        attempt=attempt,
        from_step=from_step,
        folder=folder / str(attempt),
        labels=LABELS,
        tracking_uri=tracking_uri,
        artifact_root=str(folder / "artifacts"),
        use_tensorboard=False,
    )


def the_run(client: MlflowClient):
    experiment = client.get_experiment_by_name("medtrain/cephalometric")
    assert experiment is not None
    [found] = client.search_runs([experiment.experiment_id], f"tags.`medtrain.run_key` = '{KEY}'")
    return found


def history(client: MlflowClient, name: str) -> list[tuple[int, float]]:
    run_id = the_run(client).info.run_id
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def crash(tracker: CompositeTracker) -> None:
    """What the end of a pod leaves: what was delivered stays, nothing says goodbye."""
    tracker.flush()
    mlflow: Any = tracker._guests[-1]
    mlflow._give_up_at = 0.0
    mlflow._is_complete = True
    mlflow._connected = lambda: (_ for _ in ()).throw(ConnectionError("the pod is gone"))
    mlflow._client = None
    mlflow._is_closing.set()
    mlflow._has_news.set()
    mlflow._thread.join(30)


def test_a_run_arrives_with_metrics_parameters_tags_artifacts_and_its_end(
    run, tracking_uri, client, tmp_path
):
    tracker = start(run, tracking_uri, tmp_path)
    tracker.log_config({"optim": {"lr": 0.1, "groups": {"a": {"match": ["x.*"]}}}, "seed": 3})
    for step in range(1, 6):
        tracker.log_metrics({"train_loss": 1.0 / step, "val_mre_mm": 10.0 - step}, step=step)
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"picture")
    tracker.log_artifact(picture, "pictures/worst.png")
    tracker.close(timeout_s=200)
    found = the_run(client)
    assert history(client, "train_loss") == [(step, 1.0 / step) for step in range(1, 6)]
    assert found.info.status == "FINISHED"
    assert found.data.params == {
        "optim.lr": "0.1",
        "optim.groups.a.match": "['x.*']",
        "seed": "3",
    }
    tags = {k: v for k, v in found.data.tags.items() if k.startswith("medtrain.")}
    assert tags == {
        "medtrain.system": "cephalometric",
        "medtrain.variant": "smoke",
        "medtrain.stage": "baseline",
        "medtrain.run_key": KEY,
        "medtrain.synthetic": "true",
    }
    assert [f.path for f in client.list_artifacts(found.info.run_id, "pictures")] == [
        "pictures/worst.png"
    ]


@pytest.mark.parametrize(
    ("state", "status"), [("finished", "FINISHED"), ("failed", "FAILED"), ("killed", "KILLED")]
)
def test_the_end_of_a_start_is_the_runs_status(state, status, run, tracking_uri, client, tmp_path):
    tracker = start(run, tracking_uri, tmp_path)
    tracker.log_metrics({"loss": 1.0}, step=1)
    tracker.close(state=state, timeout_s=200)
    assert the_run(client).info.status == status


def test_after_a_crash_the_same_mlflow_run_goes_on_and_has_each_step_once(
    run, tracking_uri, client, tmp_path
):
    first = start(run, tracking_uri, tmp_path)
    first.log_config({"job": {"memory": "4Gi"}, "seed": 1})
    for step in range(1, 8):
        first.log_metrics({"loss": float(step)}, step=step)
    wait_for_history(client, "loss", 7)
    crash(first)
    # The newest checkpoint is older than what MLflow has seen; `job` has changed meanwhile.
    second = start(run, tracking_uri, tmp_path, attempt=2, from_step=5)
    second.log_config({"job": {"memory": "8Gi"}, "seed": 1, "new": 2})
    for step in range(6, 11):
        second.log_metrics({"loss": float(step), "val_loss": float(step)}, step=step)
    second.close(timeout_s=200)
    assert history(client, "loss") == [(step, float(step)) for step in range(1, 11)]
    assert [step for step, _ in history(client, "val_loss")] == list(range(6, 11))
    found = the_run(client)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"job.memory": "4Gi", "seed": "1", "new": "2"}


def wait_for_history(client: MlflowClient, name: str, count: int) -> None:
    pause = threading.Event()
    for _ in range(600):
        try:
            if len(history(client, name)) == count:
                return
        except (AssertionError, ValueError, MlflowException):
            pass
        pause.wait(0.05)
    raise AssertionError(f"MLflow must have {count} values of {name}")


def test_what_mlflow_missed_of_an_earlier_start_is_sent_by_the_next(
    run, tracking_uri, client, tmp_path
):
    first = start(run, "", tmp_path)
    for step in range(1, 4):
        first.log_metrics({"loss": float(step)}, step=step)
    first.close(state="killed", timeout_s=200)
    second = start(run, tracking_uri, tmp_path, attempt=2, from_step=2)
    second.log_metrics({"loss": 3.5}, step=3)
    second.close(timeout_s=200)
    assert history(client, "loss") == [(1, 1.0), (2, 2.0), (3, 3.5)]


def test_more_values_than_one_call_takes_arrive_in_order(run, tracking_uri, client, tmp_path):
    tracker = start(run, tracking_uri, tmp_path)
    for step in range(1, 31):
        tracker.log_metrics({f"m{n}": float(step) for n in range(50)}, step=step)
    tracker.close(timeout_s=200)
    expected = [(step, float(step)) for step in range(1, 31)]
    assert history(client, "m0") == expected
    assert history(client, "m49") == expected


def test_calls_hold_a_thousand_values_at_most():
    rows = [MetricRow(step, {f"m{n}": 1.0 for n in range(300)}, 0.0, 1) for step in range(1, 6)]
    sizes = [len(batch) for batch in batches(rows, {"m0": 4})]
    assert sizes == [1000, 496]


def test_an_outage_is_said_once_and_loses_and_doubles_nothing(
    run, tracking_uri, client, tmp_path, monkeypatch, caplog
):
    """The call's answer is lost twice: once before the server has acted, once after."""
    real = MlflowClient.log_batch
    calls = []

    def flaky(self, run_id, metrics=(), **others):
        calls.append(len(metrics))
        if metrics and len(calls) == 1:
            raise ConnectionError("connection refused")
        real(self, run_id, metrics=metrics, **others)
        if metrics and len(calls) == 2:
            raise ConnectionError("connection reset")

    monkeypatch.setattr(MlflowClient, "log_batch", flaky)
    tracker = start(run, tracking_uri, tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 4):
            tracker.log_metrics({"loss": float(step)}, step=step)
        tracker.close(timeout_s=200)
    assert history(client, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert len(calls) >= 2
    assert sum("does not take metrics" in message for message in caplog.messages) == 1


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    taken: list[socket.socket] = []

    def take() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            taken.append(connection)

    thread = threading.Thread(target=take)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)
    for connection in taken:
        connection.close()


def test_a_server_that_never_answers_blocks_nobody(
    run, silent_server, tmp_path, caplog, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = start(run, silent_server, tmp_path)
    mlflow: Any = tracker._guests[-1]
    for step in range(1, 200):
        tracker.log_metrics({"loss": float(step)}, step=step)
    # Nothing was waited for: the thread has not had one answer yet.
    assert mlflow._client is None
    with caplog.at_level(logging.WARNING):
        tracker.close(timeout_s=0.2)
    assert any("the rest is in" in message for message in caplog.messages)
    assert len(run.store.list("metrics/")) == 1
    mlflow._thread.join(30)
    assert not mlflow._thread.is_alive()


def test_long_values_are_shortened_and_odd_names_mended():
    params = params_of({"a": {"b": "x" * 10_000}, "enc.blocks": {'q"uote': 1}, "none": None})
    assert len(params["a.b"]) == LONGEST_VALUE
    assert params["a.b"].endswith("(10000 characters)")
    assert params["_enc.blocks_.q_uote"] == "1"
    assert params["none"] == "None"

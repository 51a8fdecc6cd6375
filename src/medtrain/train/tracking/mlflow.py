"""Metrics for MLflow: sent by one thread from the run's own record, in its order, exactly once."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.mistakes import join_path
from medtrain.overrides import leaves
from medtrain.storage.metrics import MetricRow
from medtrain.storage.tracking import ensure_experiment, ensure_run, open_client, shown
from medtrain.train.tracking.jsonlines import SegmentFollower
from medtrain.train.tracking.tracker import EndState

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger(__name__)

MOST_METRICS, MOST_PARAMS = 1000, 100
"""What MLflow takes in one call."""
LONGEST_VALUE = 500
"""Characters of a parameter's value that every MLflow server since 2.0 takes."""

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""Here nobody waits for the answer, and a failed call is made again later; the environment wins."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 60.0
_ROWS_AT_ONCE = 200


@dataclass(frozen=True)
class MlflowRun:
    """Which MLflow run shows a run directory."""

    tracking_uri: str
    experiment: str
    """Such as `medtrain/cephalometric`."""
    artifact_root: str | None
    """See `storage.tracking.artifact_root`."""
    run_uri: str
    name: str
    tags: Mapping[str, str]


class MlflowTracker:
    """Sends what the run's segments hold, while training goes on.

    At its start, and after every failure, the thread asks MLflow for the last step of each metric
    and sends only later ones; so a crash, a lost answer or an outage neither loses nor doubles
    anything. What fails is said once, and tried again.
    """

    def __init__(
        self,
        target: MlflowRun,
        follower: SegmentFollower,
        *,
        earlier: Callable[[], Sequence[MetricRow]] = list,
    ) -> None:
        """Start the thread.

        Args:
            target: The MLflow run.
            follower: Reads what this attempt logs.
            earlier: Reads what earlier attempts logged; asked once, in the thread.
        """
        for variable, value in _PATIENCE.items():
            os.environ.setdefault(variable, value)
        self._target = target
        self._follower = follower
        self._earlier: Callable[[], Sequence[MetricRow]] | None = earlier
        self._rows: deque[MetricRow] = deque()
        self._params: dict[str, str] = {}
        self._artifacts: deque[tuple[str, bytes]] = deque()
        self._state: EndState = "finished"
        self._give_up_at = float("inf")
        self._is_complete = False
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._known_params: frozenset[str] = frozenset()
        self._last_step: dict[str, int] = {}
        self._has_news = threading.Event()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log_config(self, values: Mapping[str, Any]) -> None:
        self._params = params_of(values)
        self._has_news.set()

    def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Wake the thread: it reads the values from the run's segments."""
        self._has_news.set()

    def log_artifact(self, path: Path, name: str) -> None:
        self._artifacts.append((name, path.read_bytes()))
        self._has_news.set()

    def flush(self) -> None:
        """Nothing: the thread sends as soon as it can."""

    def close(self, *, state: EndState = "finished", timeout_s: float = 30.0) -> None:
        self._state = state
        self._give_up_at = time.monotonic() + timeout_s
        self._is_closing.set()
        self._has_news.set()
        self._thread.join(timeout_s)
        if not self._is_complete:
            log.warning(
                "MLflow at %s did not take everything within %.0f s; the rest is in %s/metrics and "
                "is sent when the run goes on",
                shown(self._target.tracking_uri),
                timeout_s,
                self._target.run_uri,
            )

    def _work(self) -> None:
        pause_s, is_failing = _SHORTEST_PAUSE_S, False
        while True:
            self._has_news.wait()
            # In this order: what comes after the clearing sets it again.
            self._has_news.clear()
            is_last = self._is_closing.is_set()
            try:
                self._send_all()
                if is_last:
                    self._connected().set_terminated(self._run_id, _STATUS[self._state])
                    self._is_complete = True
                    break
            # Whatever happens to the tracking server, the training goes on.
            except Exception as error:
                if not is_failing:
                    log.warning(
                        "MLflow at %s does not take metrics, which are kept and sent later: %s",
                        shown(self._target.tracking_uri),
                        str(error).partition("\n")[0][:300] or type(error).__name__,
                    )
                self._client, is_failing = None, True
                self._has_news.set()
                self._is_closing.wait(pause_s)
                if self._is_closing.is_set():
                    time.sleep(_SHORTEST_PAUSE_S)
                if time.monotonic() > self._give_up_at:
                    break
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            if is_failing:
                log.info("MLflow takes metrics again")
            pause_s, is_failing = _SHORTEST_PAUSE_S, False
        self._follower.close()

    def _send_all(self) -> None:
        client = self._connected()
        self._send_params(client)
        while self._refill():
            for batch in batches(self._rows, self._last_step):
                client.log_batch(self._run_id, metrics=batch)
                self._last_step.update({metric.key: metric.step for metric in batch})
            self._rows.clear()
        while self._artifacts:
            self._send_artifact(client, *self._artifacts[0])
            self._artifacts.popleft()

    def _refill(self) -> bool:
        """Whether there are rows to send; reads the next ones where the last are sent."""
        if self._earlier is not None:
            self._rows.extend(self._earlier())
            self._earlier = None
        if not self._rows:
            self._rows.extend(self._follower.read(most=_ROWS_AT_ONCE))
        return bool(self._rows)

    def _connected(self) -> MlflowClient:
        """A client, with `_run_id`, `_last_step` and `_known_params` as MLflow has them."""
        if self._client is None:
            target = self._target
            client = open_client(target.tracking_uri)
            experiment_id = ensure_experiment(
                client, target.experiment, artifact_root=target.artifact_root
            )
            self._run_id = ensure_run(
                client, experiment_id, run_uri=target.run_uri, name=target.name, tags=target.tags
            )
            run = client.get_run(self._run_id)
            if run.info.status != "RUNNING":
                client.update_run(self._run_id, status="RUNNING")
            self._last_step = {m.key: int(m.step) for m in run.data.to_proto().metrics}
            self._known_params = frozenset(run.data.params)
            self._client = client
        return self._client

    def _send_params(self, client: MlflowClient) -> None:
        from mlflow.entities import Param

        # MLflow never changes a parameter, and `job` may differ between the starts of a run.
        fresh = [
            Param(key, value)
            for key, value in self._params.items()
            if key not in self._known_params
        ]
        for start in range(0, len(fresh), MOST_PARAMS):
            client.log_batch(self._run_id, params=fresh[start : start + MOST_PARAMS])
        self._known_params |= frozenset(self._params)

    def _send_artifact(self, client: MlflowClient, name: str, data: bytes) -> None:
        folder, _, file_name = name.rpartition("/")
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / file_name
            path.write_bytes(data)
            client.log_artifact(self._run_id, str(path), folder or None)


def params_of(values: Mapping[str, Any]) -> dict[str, str]:
    """A configuration as MLflow's flat parameters, with names and lengths that it takes."""
    params = {}
    for path, value in leaves(values):
        text = str(value)
        if len(text) > LONGEST_VALUE:
            note = f" … ({len(text)} characters)"
            text = text[: LONGEST_VALUE - len(note)] + note
        params[re.sub(r"[^\w.\-/: ]", "_", join_path(path))[:250]] = text
    return params


def batches(rows: Sequence[MetricRow], last_step: Mapping[str, int]) -> Iterator[list[Metric]]:
    """The rows' values in calls of MLflow's size, without steps up to `last_step` of a name."""
    from mlflow.entities import Metric

    known = dict(last_step)
    batch: list[Metric] = []
    for row in rows:
        for name, value in row.values.items():
            if row.step <= known.get(name, -1):
                continue
            known[name] = row.step
            batch.append(Metric(name, value, int(row.time * 1000), row.step))
            if len(batch) == MOST_METRICS:
                yield batch
                batch = []
    if batch:
        yield batch

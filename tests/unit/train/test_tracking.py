"""Where metrics go, but for MLflow."""

import io
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from medtrain.errors import ConfigError, StorageError
from medtrain.storage.metrics import read_metrics
from medtrain.storage.runs import RunDirectory
from medtrain.storage.uri import Store
from medtrain.train.tracking import CompositeTracker, RunLabels, build_tracker
from medtrain.train.tracking.console import ConsoleTracker
from medtrain.train.tracking.jsonlines import JsonLinesTracker, SegmentFollower
from medtrain.train.tracking.uploads import Uploads
from medtrain.train.tracking.wandb import WandbTracker

LABELS = RunLabels("cephalometric", "smoke", "baseline", "0123abcd", is_synthetic=True)

# Katib's default filter of standard output.
KATIB = re.compile(r"([\w|-]+)\s*=\s*([+-]?\d*(\.\d+)?([Ee][+-]?\d+)?)")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(str(tmp_path / "run"))


@pytest.fixture
def uploads(run) -> Iterator[Uploads]:
    uploads = Uploads(run.store)
    yield uploads
    uploads.close(timeout_s=10)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Remembering:
    """A guest that keeps what it hears, or fails."""

    def __init__(self, *, fails: bool = False) -> None:
        self.heard: list[Any] = []
        self.fails = fails

    def _hear(self, *what) -> None:
        if self.fails:
            raise RuntimeError("out of order")
        self.heard.append(what)

    def log_config(self, values):
        self._hear("config", values)

    def log_metrics(self, values, *, step):
        self._hear("metrics", dict(values), step)

    def log_artifact(self, path, name):
        self._hear("artifact", name)

    def flush(self):
        self._hear("flush")

    def close(self, *, state="finished", timeout_s=30.0):
        self._hear("close", state)


class BrokenStore:
    """Refuses writes until it is mended."""

    uri = "s3://bucket/run"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.is_mended = threading.Event()
        self.has_refused = threading.Event()

    def write(self, key, data):
        if not self.is_mended.is_set():
            self.has_refused.set()
            raise StorageError("storage is away")
        self.objects[key] = data


# console


def test_console_lines_are_what_katib_reads():
    out = io.StringIO()
    values = {"val_mre_mm": 1.25, "lr_encoder": 1e-05, "train_loss": -3.0}
    ConsoleTracker(out).log_metrics(values, step=7)
    lines = out.getvalue().splitlines()
    read = {m[1]: float(m[2]) for line in lines if (m := KATIB.fullmatch(line))}
    assert read == values


def test_console_on_a_terminal_is_one_line_an_epoch():
    out = Terminal()
    tracker = ConsoleTracker(out)
    tracker.log_metrics({"loss": 0.5}, step=3)
    tracker.log_metrics({"epoch": 1, "val_mre_mm": 2.34567, "lr_encoder": 1e-5}, step=10)
    assert out.getvalue() == "step 10  epoch 1  val_mre_mm 2.346\n"


# what is dropped


def test_values_that_are_not_finite_are_dropped_and_counted(caplog):
    record = Remembering()
    tracker = CompositeTracker(record)
    with caplog.at_level(logging.WARNING):
        tracker.log_metrics({"val_auroc": float("nan"), "val_loss": 1.0}, step=5)
        tracker.log_metrics({"val_loss": float("inf")}, step=6)
    assert record.heard == [("metrics", {"val_loss": 1.0}, 5)]
    assert "val_auroc=nan at step 5" in caplog.messages[0]
    assert "(2 so far)" in caplog.messages[1]


@pytest.mark.parametrize("name", ["val/auroc", "sdr@2mm", "Loss", ""])
def test_names_that_katib_cannot_read_are_dropped_and_said_once(name, caplog):
    record = Remembering()
    tracker = CompositeTracker(record)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            tracker.log_metrics({name: 1.0, "val_loss": 2.0}, step=step)
    assert [heard[1] for heard in record.heard] == [{"val_loss": 2.0}] * 2
    assert len(caplog.messages) == 1


# composite


def test_a_guest_that_fails_is_dismissed_and_the_others_hear_on(caplog, tmp_path):
    record, good, bad = Remembering(), Remembering(), Remembering(fails=True)
    tracker = CompositeTracker(record, [bad, good])
    with caplog.at_level(logging.WARNING):
        tracker.log_metrics({"loss": 1.0}, step=1)
        tracker.log_metrics({"loss": 2.0}, step=2)
    tracker.close(state="killed")
    assert [h[0] for h in good.heard] == ["metrics", "metrics", "close"]
    assert good.heard[-1] == ("close", "killed")
    assert sum("is dismissed" in message for message in caplog.messages) == 1


def test_a_failing_record_is_the_runs_failure():
    tracker = CompositeTracker(Remembering(fails=True), [Remembering()])
    with pytest.raises(RuntimeError, match="out of order"):
        tracker.log_metrics({"loss": 1.0}, step=1)


# the run's own record


def test_flush_stores_a_whole_segment_and_begins_another(run, uploads, tmp_path):
    tracker = JsonLinesTracker(tmp_path / "local", uploads, attempt=1, from_step=0)
    for epoch in (1, 2):
        tracker.log_metrics({"loss": 1.0 / epoch}, step=10 * epoch)
        tracker.flush()
    tracker.flush()
    assert [info.key for info in run.store.list("metrics/")] == [
        "metrics/1-1.jsonl",
        "metrics/1-2.jsonl",
    ]
    head = json.loads(run.read_text("metrics/1-2.jsonl").splitlines()[0])
    assert head == {"attempt": 1, "segment": 2, "from_step": 0}
    assert [(row.step, row.values["loss"]) for row in read_metrics(run)] == [(10, 1.0), (20, 0.5)]


def test_close_stores_what_was_not_flushed(run, tmp_path):
    tracker = JsonLinesTracker(tmp_path / "local", Uploads(run.store), attempt=3, from_step=40)
    tracker.log_metrics({"loss": 1.0}, step=41)
    tracker.close()
    assert [(row.step, row.attempt) for row in read_metrics(run)] == [(41, 3)]


def test_a_line_is_on_the_disk_when_it_is_logged(uploads, tmp_path):
    tracker = JsonLinesTracker(tmp_path, uploads, attempt=1, from_step=0)
    tracker.log_metrics({"loss": 1.0}, step=1)
    assert '"loss": 1.0' in (tmp_path / "1-1.jsonl").read_text()
    tracker.flush()


def test_artifacts_go_to_the_run_directory(run, uploads, tmp_path):
    path = tmp_path / "figure.png"
    path.write_bytes(b"picture")
    tracker = JsonLinesTracker(tmp_path / "local", uploads, attempt=1, from_step=0)
    tracker.log_artifact(path, "pictures/worst.png")
    path.unlink()
    tracker.flush()
    assert run.store.read("pictures/worst.png") == b"picture"


def test_while_storage_is_away_training_goes_on_and_nothing_is_lost(tmp_path, caplog):
    store = BrokenStore()
    tracker = JsonLinesTracker(tmp_path, Uploads(cast(Store, store)), attempt=1, from_step=0)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            tracker.log_metrics({"loss": 1.0}, step=step)
            tracker.flush()
        assert store.has_refused.wait(10)
        store.is_mended.set()
        tracker.close()
    assert sorted(store.objects) == [f"metrics/1-{n}.jsonl" for n in (1, 2, 3)]
    assert sum("until storage is back" in message for message in caplog.messages) == 1


def test_close_says_what_storage_did_not_take(tmp_path):
    tracker = JsonLinesTracker(
        tmp_path, Uploads(cast(Store, BrokenStore())), attempt=1, from_step=0
    )
    tracker.log_metrics({"loss": 1.0}, step=1)
    with pytest.raises(StorageError, match=r"1 files of metrics.*metrics/1-1\.jsonl"):
        tracker.close(timeout_s=0.1)


def test_follower_reads_each_row_once_across_segments(uploads, tmp_path):
    tracker = JsonLinesTracker(tmp_path, uploads, attempt=2, from_step=0)
    follower = SegmentFollower(tmp_path, attempt=2)
    assert follower.read(most=10) == []
    tracker.log_metrics({"loss": 1.0}, step=1)
    assert [row.step for row in follower.read(most=10)] == [1]
    tracker.log_metrics({"loss": 1.0}, step=2)
    tracker.flush()
    tracker.log_metrics({"loss": 1.0}, step=3)
    tracker.log_metrics({"loss": 1.0}, step=4)
    assert [row.step for row in follower.read(most=2)] == [2, 3]
    assert [row.step for row in follower.read(most=2)] == [4]
    follower.close()
    tracker.flush()


def test_follower_waits_for_the_end_of_a_line(tmp_path):
    path = tmp_path / "1-1.jsonl"
    path.write_text('{"attempt": 1}\n{"step": 1, "time": 0, "val')
    follower = SegmentFollower(tmp_path, attempt=1)
    assert follower.read(most=10) == []
    with path.open("a") as file:
        file.write('ues": {"loss": 2}}\n')
    assert [row.values for row in follower.read(most=10)] == [{"loss": 2.0}]
    follower.close()


# TensorBoard


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_files_are_stored_and_a_resumed_run_has_each_step_once(run, tmp_path):
    for attempt, from_step, steps in ((1, 0, (1, 2, 3)), (2, 2, (3, 4))):
        tracker = build_tracker(
            run,
            attempt=attempt,
            from_step=from_step,
            folder=tmp_path / str(attempt),
            labels=LABELS,
        )
        tracker.log_config({"seed": 1})
        for step in steps:
            tracker.log_metrics({"val_mre_mm": step / 4 + attempt}, step=step)
        tracker.close()
    assert len(run.store.list("tensorboard/")) == 2
    stored = Path(run.uri) / "tensorboard"
    assert scalars(stored, "val/val_mre_mm") == [(1, 1.25), (2, 1.5), (3, 2.75), (4, 3.0)]


# Weights & Biases


def test_wandb_offline_writes_a_run(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = build_tracker(
        run,
        attempt=1,
        from_step=0,
        folder=tmp_path / "local",
        labels=LABELS,
        use_tensorboard=False,
        use_wandb=True,
    )
    tracker.log_config({"optim": {"lr": 0.1}})
    tracker.log_metrics({"val_loss": 0.25}, step=3)
    tracker.close(timeout_s=200)
    [log_file] = (tmp_path / "local" / "wandb").rglob("run-*.wandb")
    content = log_file.read_bytes()
    assert b"val_loss" in content
    assert LABELS.key.encode() in content


def test_wandb_that_does_not_finish_is_left_behind_with_the_command_that_sends_the_rest(
    run, tmp_path, monkeypatch, caplog
):
    released = threading.Event()
    wandb = SimpleNamespace(
        init=lambda **_: SimpleNamespace(finish=lambda exit_code: released.wait(60)),
        Settings=lambda **_: None,
        teardown=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracker = WandbTracker(tmp_path, project="medtrain", key="0123", name="a", tags={})
    with caplog.at_level(logging.WARNING):
        tracker.close(timeout_s=0.05)
    released.set()
    assert "wandb sync" in caplog.text


def test_wandb_out_of_reach_at_the_start_is_left_out(run, tmp_path, monkeypatch, caplog):
    def init(**_):
        raise RuntimeError("no network")

    wandb = SimpleNamespace(init=init, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with caplog.at_level(logging.WARNING):
        tracker = build_tracker(
            run,
            attempt=1,
            from_step=0,
            folder=tmp_path / "local",
            labels=LABELS,
            use_tensorboard=False,
            use_wandb=True,
        )
        tracker.log_metrics({"val_loss": 0.25}, step=3)
        tracker.close()
    assert "left out: no network" in caplog.text
    assert len(read_metrics(run)) == 1


def test_wandb_without_its_package_names_the_command(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'medtrain\[wandb\]'"):
        build_tracker(
            run,
            attempt=1,
            from_step=0,
            folder=tmp_path,
            labels=LABELS,
            use_tensorboard=False,
            use_wandb=True,
        )


# imports


def test_tracking_loads_neither_torch_nor_a_tracking_library():
    import subprocess

    code = (
        "import sys, medtrain.train.tracking, medtrain.train.tracking.mlflow, "
        "medtrain.train.tracking.wandb, medtrain.train.tracking.tensorboard; "
        "print(sorted({'torch', 'mlflow', 'wandb', 'tensorboard'} & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medtrain.errors import CheckpointError, StorageError, is_verdict
from medtrain.storage.runs import Pointer, RunDirectory
from medtrain.train import checkpoint
from medtrain.train.checkpoint import Checkpoints, RunTakenOver, read_newest


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(str(tmp_path / "run"))


def _attempt(run: RunDirectory, tmp_path: Path, **options: Any) -> Checkpoints:
    number = run.claim_attempt({})
    return Checkpoints(run, attempt=number, scratch=tmp_path / f"scratch{number}", **options)


def _state(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((3,), value)}, "note": {"value": value, "none": None}}


def _save(checkpoints: Checkpoints, step: int, *names: str) -> None:
    checkpoints.save(_state(float(step)), step=step, names={name: {} for name in names or ["last"]})


def _blobs(run: RunDirectory) -> list[str]:
    return [i.key.rpartition("-")[0] for i in run.store.list("checkpoints/") if ".pt" in i.key]


def _value(found: checkpoint.LoadedCheckpoint | None) -> float:
    assert found is not None
    return float(found.state["model"]["w"][0])


def _damage(run: RunDirectory, pointer: Pointer) -> None:
    path = Path(run.uri) / pointer.key
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_state_comes_back_as_it_was_with_its_details(run, tmp_path):
    checkpoints = _attempt(run, tmp_path)
    details = {"epoch": 3, "metric": "val_mae", "value": 0.1 + 0.2}
    checkpoints.save(_state(1.5), step=7, names={"best_mae": details, "best_loss": {"epoch": 3}})
    found = checkpoints.load_newest("best_mae")
    assert found is not None
    assert torch.equal(found.state["model"]["w"], torch.full((3,), 1.5))
    assert found.state["note"] == {"value": 1.5, "none": None}
    assert (found.pointer.step, found.pointer.details) == (7, details)
    # One blob under both names.
    assert checkpoints.pointers()["best_loss"].key == found.pointer.key
    assert len(_blobs(run)) == 1


def test_a_run_without_checkpoints_has_none(run, tmp_path):
    assert _attempt(run, tmp_path).load_newest() is None


def test_nothing_stays_on_the_local_disk(run, tmp_path):
    checkpoints = _attempt(run, tmp_path)
    _save(checkpoints, 1)
    checkpoints.load_newest()
    assert [path for path in (tmp_path / "scratch1").rglob("*") if path.is_file()] == []


def test_only_last_and_the_one_before_are_kept(run, tmp_path):
    checkpoints = _attempt(run, tmp_path)
    for step in (1, 2, 3):
        _save(checkpoints, step)
    assert _blobs(run) == ["checkpoints/1/last-2", "checkpoints/1/last-3"]
    assert checkpoints.pointers()["previous"].step == 2
    assert checkpoints.durable_step == 3


def test_a_best_one_is_kept_until_a_better_one_is_out(run, tmp_path):
    checkpoints = _attempt(run, tmp_path)
    _save(checkpoints, 1, "best_mae")
    for step in range(2, 9):
        _save(checkpoints, step)
    assert "checkpoints/1/best_mae-1" in _blobs(run)
    assert _value(checkpoints.load_newest("best_mae")) == 1.0
    _save(checkpoints, 9, "best_mae")
    assert "checkpoints/1/best_mae-1" not in _blobs(run)
    assert _value(checkpoints.load_newest("best_mae")) == 9.0


def test_periodic_ones_are_kept_on_request(run, tmp_path):
    checkpoints = _attempt(run, tmp_path, keep=3)
    for step in range(1, 7):
        _save(checkpoints, step)
    names = {name for name in checkpoints.pointers() if name.startswith("step_")}
    assert names == {"step_4", "step_5", "step_6"}
    assert [blob.rpartition("-")[2] for blob in _blobs(run)] == ["4", "5", "6"]


def test_an_older_attempts_checkpoints_go_when_newer_ones_of_the_name_are_out(run, tmp_path):
    first = _attempt(run, tmp_path)
    _save(first, 1, "best_mae")
    _save(first, 1, "best_loss")
    _save(first, 1)
    orphan = Path(run.uri) / "checkpoints/1/last-9-aaaa.pt"
    orphan.write_bytes(b"of a start that was killed before its pointer")
    second = _attempt(run, tmp_path)
    assert second.load_newest() is not None
    assert second.durable_step == 1
    _save(second, 2, "best_mae")
    _save(second, 2)
    kept = {(pointer.attempt, pointer.name): pointer.step for pointer in run.all_pointers()}
    # What the second start went on from is its own previous state now.
    assert kept == {
        (1, "best_loss"): 1,
        (2, "best_mae"): 2,
        (2, "last"): 2,
        (2, "previous"): 1,
    }
    assert _blobs(run) == [
        "checkpoints/1/best_loss-1",
        "checkpoints/1/last-1",
        "checkpoints/2/best_mae-2",
        "checkpoints/2/last-2",
    ]


@pytest.mark.parametrize("fault", ["damaged", "gone"])
def test_a_faulty_last_gives_way_to_the_one_before_and_says_so(run, tmp_path, caplog, fault):
    checkpoints = _attempt(run, tmp_path)
    for step in (1, 2):
        _save(checkpoints, step)
    last = checkpoints.pointers()["last"]
    if fault == "damaged":
        _damage(run, last)
    else:
        run.store.delete(last.key)
    with caplog.at_level(logging.WARNING):
        assert _value(_attempt(run, tmp_path).load_newest()) == 1.0
    assert f"is {fault}" in caplog.text


def test_what_a_start_went_on_from_is_what_it_can_fall_back_to(run, tmp_path):
    first = _attempt(run, tmp_path)
    for step in (1, 2):
        _save(first, step)
    _damage(run, first.pointers()["last"])
    second = _attempt(run, tmp_path)
    second.load_newest()
    _save(second, 3)
    assert second.pointers()["previous"].step == 1


def test_the_newest_attempt_wins_over_a_later_step_of_an_older_one(run, tmp_path):
    _save(_attempt(run, tmp_path), 9)
    second = _attempt(run, tmp_path)
    _save(second, 5)
    assert _value(read_newest(run, "last", tmp_path)) == 5.0


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_by_itself(run, tmp_path):
    checkpoints = _attempt(run, tmp_path)
    _save(checkpoints, 1)
    _damage(run, checkpoints.pointers()["last"])
    with pytest.raises(CheckpointError, match=r"none is\. Start the run from the beginning"):
        checkpoints.load_newest()


def test_an_absent_storage_is_not_taken_for_damage(run, tmp_path, monkeypatch):
    checkpoints = _attempt(run, tmp_path)
    for step in (1, 2):
        _save(checkpoints, step)

    def refuse(*args, **kwargs):
        raise StorageError("the storage does not answer")

    monkeypatch.setattr(type(run.store), "download", refuse)
    with pytest.raises(StorageError):
        checkpoints.load_newest()


def test_a_writer_that_was_replaced_stops_and_publishes_nothing(run, tmp_path):
    stale = _attempt(run, tmp_path)
    _save(stale, 1)
    newer = _attempt(run, tmp_path)
    with pytest.raises(RunTakenOver, match=r"attempt 2 \(.*\) has taken over this run") as caught:
        _save(stale, 2)
    assert is_verdict(caught.value)
    assert _value(newer.load_newest()) == 1.0


def _break_uploads(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise StorageError("the storage does not answer")

    monkeypatch.setattr(type(run.store), "upload", refuse)


def test_training_goes_on_while_the_storage_is_away(run, tmp_path, monkeypatch):
    checkpoints = _attempt(run, tmp_path)
    with monkeypatch.context() as away:
        _break_uploads(run, away)
        _save(checkpoints, 1, "best_mae")
        for step in (1, 2, 3):
            _save(checkpoints, step)
        assert checkpoints.durable_step == 0
        # A newer state of the same name replaces the one that waits.
        waiting = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "scratch1").iterdir())
        assert waiting == ["best_mae-1", "last-3"]
        with pytest.raises(StorageError):
            checkpoints.wait()
    checkpoints.wait()
    assert checkpoints.durable_step == 3
    assert {p.name: p.step for p in run.all_pointers()} == {"best_mae": 1, "last": 3}
    assert list((tmp_path / "scratch1").iterdir()) == []


def test_of_what_waits_the_best_weights_go_before_the_state_that_remembers_their_score(
    run, tmp_path, monkeypatch
):
    checkpoints = _attempt(run, tmp_path)
    with monkeypatch.context() as away:
        _break_uploads(run, away)
        _save(checkpoints, 1, "best_mae")
        _save(checkpoints, 1)
        _save(checkpoints, 2, "best_mae")
    published = []
    publish = RunDirectory.publish

    def note(self: RunDirectory, pointer: Pointer) -> None:
        published.append((pointer.name, pointer.step))
        publish(self, pointer)

    monkeypatch.setattr(RunDirectory, "publish", note)
    checkpoints.wait()
    assert published == [("best_mae", 2), ("last", 1)]


def test_a_storage_that_stays_away_ends_the_run(run, tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    checkpoints = _attempt(run, tmp_path, max_undurable_minutes=1.0)
    _break_uploads(run, monkeypatch)
    _save(checkpoints, 1)
    now += 59
    _save(checkpoints, 2)
    now += 2
    with pytest.raises(StorageError):
        _save(checkpoints, 3)


@pytest.mark.parametrize("value", [Path("x"), np.float64(1.0)], ids=["object", "numpy"])
def test_only_tensors_and_plain_types_are_read(run, tmp_path, value):
    checkpoints = _attempt(run, tmp_path)
    checkpoints.save({"best": value}, step=1, names={"last": {}})
    with pytest.raises(CheckpointError, match="tensors and plain types only"):
        checkpoints.load(checkpoints.pointers()["last"])


def test_a_format_of_the_future_is_refused_and_one_of_the_past_is_migrated(
    run, tmp_path, monkeypatch
):
    checkpoints = _attempt(run, tmp_path)
    _save(checkpoints, 1)
    pointer = checkpoints.pointers()["last"]
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(CheckpointError, match="must have a format up to 2, but has 1"):
        checkpoints.load(pointer)
    monkeypatch.setattr(
        checkpoint, "_MIGRATIONS", {1: lambda state: {**state, "new": True, "format": 2}}
    )
    assert checkpoints.load(pointer)["new"] is True


def test_processes_that_share_a_scratch_folder_do_not_meet(run, tmp_path, monkeypatch):
    checkpoints = _attempt(run, tmp_path)
    _save(checkpoints, 1)
    folders = set()
    fetch = RunDirectory.fetch

    def note(self, pointer, folder):
        folders.add(folder)
        return fetch(self, pointer, folder)

    monkeypatch.setattr(RunDirectory, "fetch", note)
    for pid in (11, 12):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        checkpoints.load_newest()
    assert len(folders) == 2

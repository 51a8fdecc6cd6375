"""Runs of the tiny system without launcher and worker: one process, or several under gloo."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medtrain.data.cases import Row
from medtrain.data.splits import SplitRow
from medtrain.errors import TrainingDiverged
from medtrain.storage.runs import RunDirectory
from medtrain.storage.stores import open_store
from medtrain.train.checkpoint import Checkpoints
from medtrain.train.device import Process, start_process_group, stop_process_group
from medtrain.train.pretrained import MatchReport
from medtrain.train.task import Batch, Clock, TaskContext
from medtrain.train.trainer import FitResult, Trainer
from tiny_recipe.config import TinyStage
from tiny_recipe.data import scan
from tiny_recipe.task import TinyTask

NOT_REPEATED = ("samples_per_s", "epoch_s", "sys_")
"""Beginnings of the metrics that no two runs share."""


class RunsTask(TinyTask):
    """Asks for a stop, or spoils a value, at a given moment."""

    def __init__(self, context: TaskContext) -> None:
        super().__init__(context)
        self.stop = threading.Event()
        self.stop_in_step: int | None = None
        """Optimizer steps done before the one in which a stop is asked for."""
        self.stop_in_validation_of: int | None = None
        """Epoch in whose validation a stop is asked for."""

    def losses(self, model: nn.Module, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        if model.training and clock.step == self.stop_in_step:
            self.stop.set()
        return super().losses(model, batch, clock)

    def predict(self, model: nn.Module, batch: Batch, clock: Clock) -> list[Row]:
        if clock.epoch == self.stop_in_validation_of:
            self.stop.set()
        return super().predict(model, batch, clock)


def make_task(
    stage: TinyStage, data_path: Path, *, num_train: int = 40, num_val: int = 7
) -> RunsTask:
    """The task on the data set in `data_path`: the first cases train, the next validate."""
    cases = scan(open_store(str(data_path)), stage.data).manifest.cases
    roles = ["train"] * num_train + ["val"] * num_val
    chosen = list(zip(cases, roles, strict=False))
    context = TaskContext(
        stage=stage,
        cases={case.case_id: case for case, _ in chosen},
        split=[SplitRow(case.case_id, case.group, role, case.checksum) for case, role in chosen],
        data_path=data_path,
        cache_path=data_path,
        weights={},
    )
    return RunsTask(context)


@dataclass
class Recorder:
    """A tracker that remembers what can be repeated."""

    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    """By optimizer step."""

    def log_config(self, values: Mapping[str, Any]) -> None: ...

    def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        kept = {n: v for n, v in values.items() if not n.startswith(NOT_REPEATED)}
        self.metrics.setdefault(step, {}).update(kept)

    def log_artifact(self, path: Path, name: str) -> None: ...

    def flush(self) -> None: ...

    def close(self, *, state: str = "finished", timeout_s: float = 30.0) -> None: ...


@dataclass
class Attempt:
    """What one start of a run left in this process."""

    result: FitResult
    trainer: Trainer
    metrics: dict[int, dict[str, float]]
    rows: list[Sequence[Row]]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's state at the end."""
        return dict(self.trainer.state_dict()["model"])


def start(
    task: RunsTask,
    folder: Path,
    *,
    process: Process | None = None,
    parent: Mapping[str, Tensor] | None = None,
    **checkpoints: Any,
) -> Attempt:
    """Start the run in `folder` once more."""
    process = process or Process()
    run = RunDirectory.open(str(folder / "run"))
    attempt = process.broadcast(run.claim_attempt({}) if process.is_main else None)
    recorder = Recorder()
    rows: list[Sequence[Row]] = []

    def load(model: nn.Module) -> MatchReport:
        assert parent is not None
        model.load_state_dict(dict(parent), strict=False)
        return MatchReport("the parent")

    trainer = Trainer(
        stage=task.stage,
        task=task,
        checkpoints=Checkpoints(
            run,
            attempt=attempt,
            scratch=folder / "scratch",
            keep=task.stage.checkpoint.keep,
            **checkpoints,
        ),
        tracker=recorder if process.is_main else None,
        process=process,
        stop=task.stop,
        parent=load if parent is not None else None,
        keep_rows=rows.append,
    )
    return Attempt(trainer.fit(), trainer, recorder.metrics, rows)


@dataclass(frozen=True)
class Scenario:
    """A run of several processes, interrupted at `stops` and started again until it is done."""

    name: str
    stage: TinyStage
    world_size: int
    stops: tuple[int, ...] = ()
    """Optimizer steps done before those in which the last rank asks for a stop."""
    is_finished: bool = True
    """Whether it is started again after the last stop."""
    data_path: Path | None = None
    """Another data set than the common one."""


def run_scenarios(
    rank: int, scenarios: Sequence[Scenario], ports: Mapping[int, int], data_path: Path, out: Path
) -> None:
    """Be process `rank` of every scenario that has so many; write what each ended with.

    `<out>/<name>-<rank>.pt` holds `weights`, `averaged`, `metrics`, `num_rows`, `stopped_at`, and
    `error` alone where the run diverged.
    """
    for world_size, port in ports.items():
        if rank >= world_size:
            continue
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        process = start_process_group(scenarios[0].stage.job)
        for scenario in scenarios:
            if scenario.world_size == world_size:
                outcome = _run(scenario, process, scenario.data_path or data_path, out)
                torch.save(outcome, out / f"{scenario.name}-{rank}.pt")
        stop_process_group()


def _run(scenario: Scenario, process: Process, data_path: Path, out: Path) -> dict[str, Any]:
    metrics: dict[int, dict[str, float]] = {}
    stopped_at = []
    is_last_rank = process.rank == process.world_size - 1
    for stop_in_step in (*scenario.stops, *([None] if scenario.is_finished else [])):
        task = make_task(scenario.stage, data_path)
        if is_last_rank:
            task.stop_in_step = stop_in_step
        try:
            attempt = start(task, out / scenario.name, process=process)
        except TrainingDiverged as error:
            return {"error": str(error)}
        metrics |= attempt.metrics
        if attempt.result.stopped:
            stopped_at.append(attempt.result.step)
    state = attempt.trainer.state_dict()
    return {
        "weights": state["model"],
        "averaged": state["ema"]["model"] if state["ema"] else {},
        "metrics": metrics,
        "num_rows": [len(rows) for rows in attempt.rows],
        "stopped_at": stopped_at,
    }

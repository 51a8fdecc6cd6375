"""One rank: one process on one device. It trains or judges, and only rank 0 writes."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from medtrain.config import dump
from medtrain.data.cases import Row, rows_to_csv
from medtrain.errors import CheckpointError, is_verdict
from medtrain.plans import Plan, plan_evaluation, plan_training
from medtrain.recipes import part
from medtrain.settings import settings
from medtrain.storage.runs import (
    EXIT_DONE,
    EXIT_RETRY,
    EXIT_STOPPED,
    EXIT_VERDICT,
    Pointer,
    RunDirectory,
)
from medtrain.storage.tracking import artifact_root
from medtrain.train.checkpoint import Checkpoints
from medtrain.train.device import Process, start_process_group
from medtrain.train.pretrained import MatchReport, load_parent
from medtrain.train.step import TrainStep, judge
from medtrain.train.task import Clock, Shard, Task, TaskContext
from medtrain.train.tracking import EndState, RunLabels, Tracker, build_tracker
from medtrain.train.trainer import FitResult, Trainer
from medtrain.worker.evaluation import write_evaluation
from medtrain.worker.stop import STOP

log = logging.getLogger("medtrain.worker")


def run_rank(spec_path: Path) -> NoReturn:
    """Be one rank: work, leave a record on failure, and go without waiting for threads."""
    _die_with_parent()
    spec = json.loads(spec_path.read_text())
    rank = int(os.environ["RANK"])
    if rank != 0:
        logging.getLogger().setLevel(logging.ERROR)
    code = EXIT_RETRY
    try:
        code = _work(spec)
    except BaseException as error:
        code = EXIT_VERDICT if is_verdict(error) else EXIT_RETRY
        _leave_record(Path(spec["scratch"]), rank, code, error)
        traceback.print_exc()
    finally:
        # Interpreter shutdown takes a second and can hang on a library's thread.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _work(spec: dict[str, Any]) -> int:
    plan = _plan(spec)
    process = start_process_group(plan.stage.job)
    # From here on a request to stop is agreed among the ranks and what was done is saved.
    STOP.listen()
    assert plan.data is not None
    task = part(plan.resolution.recipe, "task").build_task(
        TaskContext(
            stage=plan.stage,
            cases={row.case_id: plan.data.cases[row.case_id] for row in plan.rows},
            split=plan.rows,
            data_path=Path(spec["data_path"]),
            cache_path=Path(spec["cache_path"]),
            weights={name: found.path for name, found in plan.weights.items()},
            allow_missing_weights=bool(spec["started_from"]),
        )
    )
    if plan.verb == "train":
        return _train(plan, task, process, spec)
    return _evaluate(plan, task, process, spec)


def _plan(spec: dict[str, Any]) -> Plan:
    """The parent's plan once more: from the same words by the same functions."""
    again = spec["again"]
    if spec["verb"] == "train":
        plan = plan_training(
            spec["name"],
            spec["set"],
            data_uri=spec["data_uri"],
            parent_uri=spec["parent_uri"],
            again=again,
        )
    else:
        plan = plan_evaluation(spec["parent_uri"], data_uri=spec["data_uri"], again=again)
    # The code may have been exchanged between the parent's start and this one's.
    if plan.key != spec["key"]:
        raise CheckpointError(f"run key must be {spec['key']} as the parent has it: try again")
    return plan


def _train(plan: Plan, task: Task, process: Process, spec: dict[str, Any]) -> int:
    run = RunDirectory.open(plan.run_uri)
    scratch, attempt = Path(spec["scratch"]), spec["attempt"]
    checkpoint = plan.stage.checkpoint
    checkpoints = Checkpoints(
        run,
        attempt=attempt,
        scratch=scratch / f"rank{process.rank}",
        keep=checkpoint.keep,
        max_undurable_minutes=checkpoint.max_undurable_minutes,
    )

    def start_from_parent(model: nn.Module) -> MatchReport:
        state = _trained_state(spec)
        return load_parent(model, state["model"], plan.stage.init, source=spec["parent_uri"])

    def keep_rows(rows: Sequence[Row]) -> None:
        run.write_text(f"cases/{attempt}/val.csv", rows_to_csv(rows))

    # From here on a stop may lose steps, unless the state after the last one is stored.
    (scratch / "begun").touch()
    tracker = _open_tracker(plan, run, spec) if process.is_main else None
    state: EndState = "failed"
    try:
        result = Trainer(
            stage=plan.stage,
            task=task,
            checkpoints=checkpoints,
            tracker=tracker,
            process=process,
            stop=STOP,
            parent=start_from_parent if spec["started_from"] else None,
            keep_rows=keep_rows,
        ).fit()
        state = "killed" if result.stopped else "finished"
    finally:
        if tracker is not None:
            tracker.close(state=state)
    log.info("%s", result.reason)
    if result.stopped:
        if process.is_main:
            _write_json(scratch / "stopped.json", {"step": result.step})
        return EXIT_STOPPED
    if process.is_main:
        outcome = _training_outcome(plan, result, checkpoints.pointers())
        report = getattr(task, "weights_report", None)
        if report is not None:
            outcome["details"]["pretrained"] = report.to_json()
        _write_json(scratch / "result.json", {"outcome": outcome, "step": result.step})
    return EXIT_DONE


def _open_tracker(plan: Plan, run: RunDirectory, spec: dict[str, Any]) -> Tracker:
    assert plan.data is not None
    site = settings()
    newest = run.pointers("last")
    tracker = build_tracker(
        run,
        attempt=spec["attempt"],
        from_step=newest[0].step if newest else 0,
        folder=Path(spec["scratch"]) / "tracking",
        labels=RunLabels(
            system=plan.name.system,
            variant=plan.name.variant,
            stage=plan.stage_name,
            key=plan.key,
            is_synthetic=plan.data.manifest.is_synthetic,
        ),
        tracking_uri=site.tracking,
        artifact_root=artifact_root(site.tracking, home=site.home),
        experiment=site.experiment,
        use_wandb=site.wandb,
    )
    tracker.log_config(dump(plan.stage))
    return tracker


def _training_outcome(
    plan: Plan, result: FitResult, pointers: Mapping[str, Pointer]
) -> dict[str, Any]:
    """The final word on a trained stage: its best checkpoints, and which one is the model."""
    monitor = plan.stage.checkpoint.monitor
    kept = {name: pointers[name] for name in plan.stage.checkpoint.criteria if name in pointers}
    named = {**kept, "model": kept[monitor]}
    return {
        "score": result.best[monitor].value,
        "metrics": dict(result.metrics),
        "artifacts": {name: pointer.key for name, pointer in named.items()},
        "sha256": {name: pointer.sha256 for name, pointer in named.items()},
        "details": {
            "model": asdict(kept[monitor]),
            "best": {name: asdict(best) for name, best in result.best.items()},
            "epochs": result.epoch,
            "reason": result.reason,
        },
    }


def _evaluate(plan: Plan, task: Task, process: Process, spec: dict[str, Any]) -> int:
    state = _trained_state(spec)
    model = task.build_model()
    model.load_state_dict(state["model"])
    step = TrainStep(model.to(process.device), task=task, stage=plan.stage)
    # All terms count, as at the end of training.
    clock = Clock(epoch=plan.stage.epochs, step=0, fraction=1.0)
    judgements = {}
    for role in sorted({row.role for row in plan.rows}):
        shard = Shard(process.rank, process.world_size, plan.stage.seed, epoch=1, is_training=False)
        loader = task.build_loader(role, shard)
        judged = judge(step, loader, clock=clock, process=process, is_stopping=STOP.is_set)
        if judged is None:
            if process.is_main:
                _write_json(Path(spec["scratch"]) / "stopped.json", {"step": 0})
            process.barrier()
            return EXIT_STOPPED
        judgements[role] = judged
    if process.is_main:
        outcome = write_evaluation(
            plan,
            {role: judged.rows for role, judged in judgements.items()},
            summarize=task.summarize,
            weights=state["model"],
            attempt=spec["attempt"],
            scratch=Path(spec["scratch"]),
            data_path=Path(spec["data_path"]),
        )
        _write_json(Path(spec["scratch"]) / "result.json", {"outcome": outcome})
    process.barrier()
    return EXIT_DONE


def _trained_state(spec: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint that the parent process fetched and verified."""
    state: dict[str, Any] = torch.load(spec["started_from"], map_location="cpu", weights_only=True)
    return state


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all: the parent reads it after this process is gone."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def _leave_record(scratch: Path, rank: int, code: int, error: BaseException) -> None:
    record = {
        "rank": rank,
        "code": code,
        "type": type(error).__name__,
        "sentence": str(error) or type(error).__name__,
        "time_ns": time.time_ns(),
        "traceback": traceback.format_exc(),
    }
    _write_json(scratch / f"rank{rank}.record.json", record)


def _die_with_parent() -> None:
    """Ask the kernel to kill this rank when the agent dies, so that no orphan holds a device."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)

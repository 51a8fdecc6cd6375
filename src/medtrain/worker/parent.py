"""The parent of a node's ranks: plans, claims an attempt, brings data, runs the agent, decides."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from medtrain.config import dump, to_yaml
from medtrain.data.cache import NodeCache
from medtrain.data.prepare import dataset_home, prepare, root_uri
from medtrain.data.splits import record_look, splits_to_csv
from medtrain.errors import ConfigError, MedTrainError, is_verdict
from medtrain.identity import DECIDING_LIBRARIES
from medtrain.plans import (
    Plan,
    plan_evaluation,
    plan_prepare,
    plan_training,
    stands,
    verdict_details,
)
from medtrain.recipes import part
from medtrain.settings import settings
from medtrain.storage.runs import (
    EXIT_DONE,
    EXIT_RETRY,
    EXIT_STOPPED,
    EXIT_VERDICT,
    AttemptEnd,
    Outcome,
    Pointer,
    RunDirectory,
)
from medtrain.storage.stores import open_store
from medtrain.worker.stop import STOP, STOP_SIGNALS, StopRequested

log = logging.getLogger("medtrain.worker")


@dataclass(frozen=True)
class End:
    """How a start of a run ended, as the parent decides."""

    code: int
    reason: str
    outcome: Outcome | None = None
    is_final: bool = True
    """Whether a verdict is one on the run, and not on this start alone."""
    step: int = 0
    durable_step: int = 0


def run(arguments: argparse.Namespace) -> int:
    """Run the verb that the arguments name; the exit code."""
    if arguments.verb == "prepare":
        plan = plan_prepare(arguments.name, arguments.set, again=arguments.again)
        return _attempt(plan, arguments.key, _prepare_data)
    if arguments.verb == "train":
        plan = plan_training(
            arguments.name,
            arguments.set,
            data_uri=arguments.data,
            parent_uri=arguments.parent,
            again=arguments.again,
        )
        return _attempt(plan, arguments.key, _run_ranks)
    if arguments.verb == "evaluate":
        plan = plan_evaluation(arguments.run, data_uri=arguments.data, again=arguments.again)
        return _attempt(plan, arguments.key, _look_and_run_ranks)
    if arguments.verb == "predict":
        return _predict(arguments)
    raise ConfigError("name a verb: prepare, train, evaluate or predict (see --help)")


def _predict(arguments: argparse.Namespace) -> int:
    from medtrain.serve.predict import predict

    images = [Path(image) for image in arguments.images]
    predict(Path(arguments.package), images, Path(arguments.out), overrides=arguments.set)
    return EXIT_DONE


def _attempt(plan: Plan, key: str, work: Callable[[Plan, int, Path], End]) -> int:
    """One start of a run: claim it, work, say how it ended."""
    if key and key != plan.key:
        raise ConfigError(
            f"this worker computes run key {plan.key} where its launcher computed {key}: the code, "
            f"data or weights of the two differ (code here {plan.code[:12]}). Rebuild the trainer "
            "image from the launcher's version, or launch with the image's version."
        )
    run = RunDirectory.open(plan.run_uri)
    if os.environ.get("PET_NODE_RANK", "0") != "0":
        return work(plan, 0, _scratch(plan, 0)).code
    known = run.outcome()
    if known is not None and known.state != "done":
        if stands(known, plan.stage.job):
            log.error("error: run %s %s before: %s", plan.key, known.state, known.reason)
            return EXIT_VERDICT
        run.retract_verdict()
    elif known is not None and run.holds_what_it_names(known):
        log.info("run %s is done already", plan.key)
        return EXIT_DONE
    elif known is not None:
        log.warning("run %s was done, but what it made is gone: it is made again", plan.key)
        run.retract_verdict()
        # Going on from the last state would not bring the best ones back.
        for info in run.store.list("checkpoints/"):
            run.store.delete(info.key)
    fruitless = run.fruitless_attempts()
    if fruitless >= plan.stage.job.attempts:
        reason = f"{fruitless} starts in a row ended without a new checkpoint"
        last = run.attempt_end(run.attempts()[-1])
        reason += f"; the last: {last.reason}" if last else ""
        run.write_outcome(Outcome("gave_up", reason, details=verdict_details(plan.stage.job)))
        log.error("error: given up: %s", reason)
        return EXIT_VERDICT
    attempt = run.claim_attempt({"key": plan.key, "code": plan.code, "argv": list(plan.argv)})
    log.info("run %s, attempt %d: %s", plan.key, attempt, run.uri)
    scratch = _scratch(plan, attempt)
    try:
        _describe(plan, run)
        end = work(plan, attempt, scratch)
    except StopRequested:
        end = End(EXIT_STOPPED, "stopped by a signal before the first step")
    except MedTrainError as error:
        end = End(EXIT_VERDICT if is_verdict(error) else EXIT_RETRY, str(error))
    except Exception as error:
        traceback.print_exc()
        end = End(EXIT_RETRY, f"{type(error).__name__}: {error}")
    if end.outcome is not None:
        run.write_outcome(end.outcome)
    elif end.code == EXIT_VERDICT and end.is_final:
        run.write_outcome(Outcome("failed", end.reason, details=verdict_details(plan.stage.job)))
    run.end_attempt(attempt, AttemptEnd(end.code, end.reason, end.step, end.durable_step))
    shutil.rmtree(scratch, ignore_errors=True)
    log.log(
        logging.INFO if end.code == EXIT_DONE else logging.ERROR, "end %d: %s", end.code, end.reason
    )
    return end.code


def _scratch(plan: Plan, attempt: int) -> Path:
    folder = settings().cache / "scratch" / plan.key / str(attempt)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _describe(plan: Plan, run: RunDirectory) -> None:
    """Write what the run is beside what it will make."""
    run.write_text("config.yaml", to_yaml(dump(plan.stage)))
    if plan.data is None:
        return
    run.write_text("split.csv", splits_to_csv(plan.rows))
    run.write_json(
        "facts.json",
        {
            "name": str(plan.name),
            "verb": plan.verb,
            "run_key": plan.key,
            "parent_uri": plan.parent.uri if plan.parent else "",
            "code_fingerprint": plan.code,
            "data_fingerprint": plan.data.manifest.fingerprint,
            "data_key": plan.data.key,
            "data_uri": plan.data.uri,
            "data_home": plan.data.home.uri,
            "is_synthetic": plan.data.manifest.is_synthetic,
            "data_facts": dict(plan.data.manifest.facts),
            "pretrained": {name: found.source for name, found in plan.weights.items()},
            "world_size": plan.stage.job.world_size,
            **_provenance(),
        },
    )


def _provenance() -> dict[str, Any]:
    """What made the run: recorded, never part of its identity."""
    versions = {}
    for library in ("medtrain", *DECIDING_LIBRARIES):
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return {
        "commit": os.environ.get("MEDTRAIN_COMMIT", "") or _git_commit(),
        "image_digest": os.environ.get("MEDTRAIN_IMAGE_DIGEST", ""),
        "versions": versions,
    }


def _git_commit() -> str:
    """The checkout's commit, with `+changes` where the work tree differs; empty outside one."""
    folder = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _prepare_data(plan: Plan, attempt: int, scratch: Path) -> End:
    data = plan.stage.data
    home = dataset_home(settings().storage, plan.name.system, data)
    prepared = prepare(
        part(plan.resolution.recipe, "data"),
        root=open_store(data.root),
        home=home,
        data=data,
    )
    details = {
        "home": home.uri,
        "manifest": prepared.manifest_key,
        "fingerprint": prepared.fingerprint,
        "protocol": prepared.protocol,
        "part": prepared.part,
        "rows": prepared.rows_fingerprint,
        "root": root_uri(data),
        "run_key": plan.key,
    }
    counts = {f"num_{role}": float(count) for role, count in prepared.counts.items()}
    outcome = Outcome("done", metrics=counts, details=details)
    return End(EXIT_DONE, "data are checked and divided", outcome)


def _look_and_run_ranks(plan: Plan, attempt: int, scratch: Path) -> End:
    """Record the look at the sealed test before a test case is read."""
    assert plan.data is not None and plan.parent is not None
    trained_key = plan.parent.uri.rpartition("/")[2]
    looks = record_look(plan.data.home, plan.rows, trained_key)
    log.info("look %d at this sealed test split", looks)
    return _run_ranks(plan, attempt, scratch)


def _run_ranks(plan: Plan, attempt: int, scratch: Path) -> End:
    """Bring what the ranks read to this node, run them, and decide how it ended."""
    assert plan.data is not None
    cache = NodeCache(settings().cache)
    used = [plan.data.cases[row.case_id] for row in plan.rows]
    files = {file.path: file.checksum for case in used for file in case.files.values()}
    data_path = cache.fetch(open_store(plan.data.root), files, plan.data.manifest.fingerprint[:16])
    started_from = ""
    if plan.parent is not None:
        started_from = str(_fetch_trained(plan.parent, scratch))
    spec = {
        "verb": plan.verb,
        "key": plan.key,
        "again": plan.again,
        "name": str(plan.name),
        "set": list(plan.overrides),
        "data_uri": plan.data.uri,
        "parent_uri": plan.parent.uri if plan.parent else "",
        "attempt": attempt,
        "run_uri": plan.run_uri,
        "scratch": str(scratch),
        "data_path": str(data_path),
        "cache_path": str(settings().cache),
        "started_from": started_from,
    }
    spec_path = scratch / "rank.json"
    spec_path.write_text(json.dumps(spec))
    failure = _run_elastic(
        spec_path, processes=plan.stage.job.processes, grace_s=plan.stage.job.grace_s
    )
    return _decide(scratch, failure)


def _fetch_trained(run: RunDirectory, scratch: Path) -> Path:
    """The best checkpoint of a finished training run, verified."""
    outcome = run.outcome()
    assert outcome is not None
    pointer = Pointer(**outcome.details["model"])
    return run.fetch(pointer, scratch / "parent")


def _run_elastic(spec_path: Path, *, processes: int, grace_s: int) -> str:
    """Run the ranks under torch's elastic agent; a sentence where that failed, else empty."""
    from torch.distributed import run as elastic
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("PET_NPROC_PER_NODE", str(processes))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "PET_NNODES" not in os.environ:
        os.environ["PET_STANDALONE"] = "1"
    try:
        # The agent's own parser would take our options for its own: ours go in afterwards.
        arguments = elastic.parse_args(["-m", "medtrain.worker"])  # type: ignore[no-untyped-call]
        arguments.training_script_args = ["--rank", str(spec_path)]
        arguments.max_restarts = 0
        arguments.shutdown_timeout = max(10, grace_s - 10)
        elastic.run(arguments)  # type: ignore[no-untyped-call]
    except SignalException as error:
        return f"stopped by {signal.Signals(error.sigval).name}"
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        # A negative code is a rank killed by a signal; that of SIGTERM came from the agent.
        killed = [
            f"rank {rank} was killed by signal {-c}"
            for rank, c in codes.items()
            if c < 0 and c != -15
        ]
        silent = [f"rank {rank} ended with code {code}" for rank, code in codes.items()]
        return (killed or silent)[0]
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for signum in STOP_SIGNALS:
            signal.signal(signum, STOP.note)
    return ""


def _decide(scratch: Path, failure: str) -> End:
    """Turn what the ranks left behind into one end."""
    records = [json.loads(path.read_text()) for path in sorted(scratch.glob("rank*.record.json"))]
    verdicts = [record for record in records if record["code"] == EXIT_VERDICT]
    result = _read_json(scratch / "result.json")
    stopped = _read_json(scratch / "stopped.json")
    if verdicts:
        first = min(verdicts, key=lambda record: record["time_ns"])
        # A newer attempt goes on with the run: that ends this start, not the run.
        is_final = first["type"] != "RunTakenOver"
        return End(EXIT_VERDICT, first["sentence"], is_final=is_final)
    # It was written after everything was stored: how the others left does not matter any more.
    if result is not None:
        outcome = Outcome("done", **result["outcome"])
        step = result.get("step", 0)
        return End(EXIT_DONE, "done", outcome, step=step, durable_step=step)
    if stopped is not None:
        step = stopped["step"]
        return End(EXIT_STOPPED, f"stopped after step {step}", step=step, durable_step=step)
    if failure.startswith("stopped by") and not (scratch / "begun").exists():
        return End(EXIT_STOPPED, "stopped by a signal before the first step")
    if "killed by signal" in failure or not records:
        return End(EXIT_RETRY, failure or "the ranks ended without a result")
    first = min(records, key=lambda record: record["time_ns"])
    return End(EXIT_RETRY, f"rank {first['rank']}: {first['sentence']}")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None

"""From a name to a result: resolve → run key → doctor → job → launch → outcome.

Every verb is planned by the same function in the launcher and in the worker, so both compute the
same run key; a run that is finished answers at once, a half finished one goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from medtrain.config import StageConfig
from medtrain.data.prepare import root_uri
from medtrain.doctor.examine import blocking, check_allowed, examine
from medtrain.errors import ConfigError, JobFailed, MedTrainError
from medtrain.launch.job import build_job
from medtrain.launch.launcher import METRIC_LINE, Launcher, wait
from medtrain.launch.local import LocalLauncher
from medtrain.overrides import for_stage
from medtrain.plans import (
    LOCATION,
    Plan,
    plan_evaluation,
    plan_prepare,
    plan_training,
    stands,
)
from medtrain.recipes import find, resolve
from medtrain.recipes.recipe import Finding
from medtrain.settings import Settings, settings
from medtrain.storage.runs import Outcome, RunDirectory
from medtrain.storage.uri import join_uri


def say(text: str) -> None:
    """Tell the person or the pod's log: standard output, marked where a front end filters it."""
    prefix = os.environ.get("MEDTRAIN_LINE_PREFIX", "")
    sys.stdout.write(f"{prefix}{text}\n")
    sys.stdout.flush()


Answer = TypeVar("Answer")
Words = ParamSpec("Words")


def told(function: Callable[Words, Answer]) -> Callable[Words, Answer]:
    """Let a component say its error in one line, before the pipeline's engine shows a trace."""

    @wraps(function)
    def run(*args: Words.args, **kwargs: Words.kwargs) -> Answer:
        try:
            return function(*args, **kwargs)
        except MedTrainError as error:
            if os.environ.get("MEDTRAIN_LINE_PREFIX"):
                for line in f"error: {error}".splitlines():
                    say(line)
            raise

    return run


@dataclass(frozen=True)
class RunResult:
    """A run's home and its final word."""

    uri: str
    key: str
    outcome: Outcome
    was_finished: bool
    """Nothing had to be done."""

    def artifact_uri(self, name: str) -> str:
        """Where an artifact of the run lies; empty where the run made none of this name."""
        key = self.outcome.artifacts.get(name)
        return join_uri(self.uri, key) if key else ""

    def show(self, metrics: MetricSink) -> None:
        """Show the run's metrics where a pipeline's user interface looks for them."""
        for name, value in self.outcome.metrics.items():
            metrics.log_metric(name, value)


class MetricSink(Protocol):
    """What a pipeline hands to a component for its metrics."""

    def log_metric(self, metric: str, value: float) -> None:
        """Record one value."""


class EpochLines:
    """Turns a job's `name=value` lines into one line an epoch, and passes on all others."""

    def __init__(self, stage: StageConfig, tell: Callable[[str], None]) -> None:
        self._stage = stage
        self._tell = tell
        self._values: dict[str, float] = {}

    def __call__(self, line: str) -> None:
        """Take one line of the job's log."""
        metric = METRIC_LINE.fullmatch(line)
        if metric is None:
            self._tell(line)
            return
        self._values[metric["name"]] = float(metric["value"])
        if metric["name"] == "epoch_s":
            self._tell(self._summary())
            self._values = {}

    def _summary(self) -> str:
        criteria = [c.metric for c in self._stage.checkpoint.criteria.values()]
        names = dict.fromkeys(["train_loss", "val_loss", *criteria, "epoch_s"])
        shown = [f"{name} {self._values[name]:.4g}" for name in names if name in self._values]
        epoch = int(self._values.get("epoch", 0))
        return f"epoch {epoch:3d}/{self._stage.epochs}  {'  '.join(shown)}"


def open_launcher(site: Settings) -> Launcher:
    """The place where this site's jobs run."""
    return LocalLauncher(site.home / "jobs")


def is_finished(plan: Plan) -> bool:
    """Whether the run is done and all that it made is still there."""
    run = RunDirectory.open(plan.run_uri)
    outcome = run.outcome()
    return outcome is not None and outcome.state == "done" and run.holds_what_it_names(outcome)


def execute(plan: Plan, *, on_line: Callable[[str], None] = say) -> RunResult:
    """Answer from the finished run, go on with a half finished one, or start it; return its result.

    Raises:
        JobFailed: The job ended without a result, or the run has a verdict from before.
    """
    on_line(f"{plan.verb} {plan.name}")
    run = RunDirectory.open(plan.run_uri)
    outcome = run.outcome()
    if outcome is not None and is_finished(plan):
        on_line(f"finished before, nothing to do: {run.uri}")
        return RunResult(run.uri, plan.key, outcome, was_finished=True)
    if outcome is not None and outcome.state != "done":
        if stands(outcome, plan.stage.job):
            why = (
                "and the same inputs cannot end otherwise"
                if outcome.state == "failed"
                else "and is not tried again by itself"
            )
            raise JobFailed(
                f"{plan.name} {outcome.state.replace('_', ' ')} before, {why}: {outcome.reason}\n"
                "Once the cause is mended, --retry goes on from its checkpoint and --again begins "
                "anew."
            )
        on_line(f"it {outcome.state.replace('_', ' ')} before with other resources: going on")
        run.retract_verdict()
    job = build_job(
        system=plan.name.system,
        variant=plan.name.variant,
        stage=plan.stage_name,
        run_key=plan.key,
        run_uri=plan.run_uri,
        argv=plan.argv,
        job=plan.stage.job,
        site_env=settings().environment(),
    )
    launcher = open_launcher(settings())
    launcher.submit(job)
    lines = EpochLines(plan.stage, on_line)

    def stop() -> None:
        launcher.cancel(job.name)
        on_line("stopping: the job saves its state first; interrupt again to leave it alone")

    outcome = wait(launcher, job, on_line=lines, on_interrupt=stop)
    return RunResult(run.uri, plan.key, outcome, was_finished=False)


def retry(plan: Plan) -> None:
    """Take back a verdict, so that the run goes on from its checkpoint."""
    RunDirectory.open(plan.run_uri).retract_verdict()


@told
def run_prepare(
    name: str,
    overrides: Sequence[str] = (),
    *,
    again: int = 0,
    allow: Sequence[str] = (),
    **how: Any,
) -> RunResult:
    """Check the raw data and record membership of splits.

    Mistakes in any stage of the variant surface here, before anything is done.
    """
    check_stages(name, overrides, allow=allow)
    return prepare_cases(name, overrides, again=again, **how)


def prepare_cases(
    name: str, overrides: Sequence[str] = (), *, again: int = 0, **how: Any
) -> RunResult:
    """`run_prepare` for a run that exists: its stages were examined before they were trained."""
    plan = plan_prepare(name, overrides, again=again)
    result = execute(plan, **how)
    run = RunDirectory.open(result.uri)
    root = root_uri(plan.stage.data)
    if (run.read_json(LOCATION) or {}).get("root") != root:
        run.write_json(LOCATION, {"root": root})
    return result


def check_stages(name: str, overrides: Sequence[str], *, allow: Sequence[str] = ()) -> None:
    """Resolve and examine every stage of a variant; a ConfigError lists all mistakes of all."""
    recipe_name, recipe = find(name)
    stages = tuple(recipe.stages(recipe_name.variant))
    check_allowed(recipe, allow)
    problems: dict[str, None] = {}
    for stage in stages:
        try:
            chosen = for_stage(overrides, stage, stages=stages)
            resolution = resolve(f"{recipe_name.system}/{recipe_name.variant}:{stage}", chosen)
            found = blocking(examine(resolution, facts={}), allow)
            mistakes: Sequence[str] = [_stop(finding) for finding in found]
        except ConfigError as error:
            mistakes = error.problems
        problems |= dict.fromkeys(f"{stage}: {mistake}" for mistake in mistakes)
    if problems:
        raise ConfigError(list(problems))


def _stop(finding: Finding) -> str:
    return f"{finding.rule}: {finding.message} (run it all the same: --allow {finding.rule})"


@told
def run_stage(
    name: str,
    overrides: Sequence[str] = (),
    *,
    data_uri: str,
    parent_uri: str = "",
    again: int = 0,
    allow: Sequence[str] = (),
    is_retry: bool = False,
    **how: Any,
) -> RunResult:
    """Train one stage; mistakes and the doctor's errors surface before a resource is asked for."""
    plan = plan_training(name, overrides, data_uri=data_uri, parent_uri=parent_uri, again=again)
    diagnosis = examine(plan.resolution, facts=_facts(plan))
    check_allowed(plan.resolution.recipe, allow)
    if not is_finished(plan):
        for finding in (found for found in diagnosis.findings if found.severity != "info"):
            say(f"doctor: {finding.rule} ({finding.severity}): {finding.message}")
    stops = blocking(diagnosis, allow)
    if stops:
        raise ConfigError([_stop(finding) for finding in stops])
    if is_retry:
        retry(plan)
    return execute(plan, **how)


@told
def run_evaluation(run_uri: str, *, data_uri: str, again: int = 0, **how: Any) -> RunResult:
    """Judge a trained stage on the sealed test split; the look is recorded and counted."""
    return execute(plan_evaluation(run_uri, data_uri=data_uri, again=again), **how)


def _facts(plan: Plan) -> dict[str, Any]:
    assert plan.data is not None
    return {
        **plan.data.manifest.facts,
        "num_train_cases": sum(row.role == "train" for row in plan.rows),
        "num_val_cases": sum(row.role == "val" for row in plan.rows),
    }


@dataclass(frozen=True)
class Registered:
    """What the gate decided and what the registry holds now."""

    model: str
    """`name:version`, or empty where the gate refused."""
    reason: str
    metrics: Mapping[str, float]

    def show(self, metrics: MetricSink) -> None:
        """Show the verdict where a pipeline's user interface looks for metrics."""
        for name, value in self.metrics.items():
            metrics.log_metric(name, value)


@told
def run_registration(evaluation_uri: str) -> Registered:
    """Apply the gate to an evaluated model and register it where it passes.

    A refused model is no error: the pipeline ends well, and the report says why.
    """
    from medtrain.registry import register

    registration = register(evaluation_uri)
    verdict = registration.verdict
    run = RunDirectory.open(evaluation_uri)
    run.write_text("gate.json", verdict.to_json())
    word = "accepted" if verdict.accepted else "refused"
    say(f"gate {word}: {verdict.reason}")
    model = registration.version.reference if registration.version else ""
    if model:
        say(f"registered {model}" if registration.is_new else f"registered before as {model}")
    metrics = {"gate_accepted": float(verdict.accepted)}
    if verdict.value is not None:
        metrics[f"gate_{verdict.metric}"] = verdict.value
    return Registered(model, verdict.reason, metrics)


@told
def run_report(run_uri: str, *, copy_to: str = "") -> str:
    """Write the report of a run and of the stages that led to it; its URI.

    Args:
        run_uri: A run directory, such as an evaluation's.
        copy_to: Local file that gets the same page.
    """
    from medtrain.report.page import write_report

    page_uri = write_report(RunDirectory.open(run_uri))
    if copy_to:
        Path(copy_to).write_text(RunDirectory.open(run_uri).read_text("report.html"))
    say(f"report: {page_uri}")
    return page_uri

"""From a name to a result: resolve → run key → doctor → job → launch → outcome.

Every verb is planned by the same function in the launcher and in the worker, so both compute the
same run key; a run that is finished answers at once, a half finished one goes on.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import yaml

from medtrain.config import Data, StageConfig, digest, identity
from medtrain.data.manifest import Case, Manifest
from medtrain.data.prepare import listing_fingerprint, load
from medtrain.data.splits import SplitRow, fingerprint, is_test, is_trainable, select
from medtrain.doctor.examine import blocking, check_allowed, examine
from medtrain.errors import ConfigError, DataError, JobFailed, MedTrainError
from medtrain.identity import code_fingerprint
from medtrain.launch.job import build_job
from medtrain.launch.launcher import Launcher, wait
from medtrain.launch.local import LocalLauncher
from medtrain.overrides import for_stage
from medtrain.recipes import Resolution, find, part, resolve
from medtrain.recipes.recipe import RecipeName
from medtrain.settings import Settings, settings
from medtrain.storage.runs import Outcome, RunDirectory
from medtrain.storage.uri import Store, join_uri, open_store
from medtrain.storage.weights import FoundWeights, find_weights


def say(text: str) -> None:
    """Tell the person or the pod's log: standard output, marked where a front end filters it."""
    prefix = os.environ.get("MEDTRAIN_LINE_PREFIX", "")
    sys.stdout.write(f"{prefix}{text}\n")
    sys.stdout.flush()


KEY_LENGTH = 32
"""Hexadecimal digits of a run key: 128 bits, and short enough for a Kubernetes label."""


def run_key(
    *,
    verb: str,
    config: Mapping[str, Any],
    parents: Sequence[str],
    data: str,
    weights: Mapping[str, str],
    code: str,
    again: int,
) -> str:
    """What a run is. Equal inputs give the same key on every machine.

    Args:
        verb: `prepare`, `train` or `evaluate`.
        config: Identity of the configuration (no locations, no `job`).
        parents: Run keys of the runs that it starts from.
        data: Fingerprint of the rows used, or of the raw objects for `prepare`.
        weights: Digests of pretrained weights.
        code: Fingerprint of the code that decides the numbers.
        again: 0, or the number chosen to run the same thing once more.
    """
    described = {
        "verb": verb,
        "config": config,
        "parents": list(parents),
        "data": data,
        "weights": dict(weights),
        "code": code,
        "again": again,
    }
    return digest(described)[:KEY_LENGTH]


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
class PreparedData:
    """What `prepare` left behind: a checked manifest and the place of each of its cases."""

    uri: str
    """Run directory of `prepare`."""
    home: Store
    manifest: Manifest
    rows: tuple[SplitRow, ...]
    """One a case, with roles as recorded."""
    root: str
    """The raw data set."""

    @classmethod
    def load(cls, uri: str) -> PreparedData:
        """Read what the `prepare` run at `uri` recorded."""
        facts = _finished(uri, verb="prepare").details
        home = open_store(facts["home"])
        prepared = load(
            home,
            fingerprint=facts["fingerprint"],
            protocol=facts["protocol"],
            part=facts["part"],
        )
        return cls(uri, home, prepared.manifest, prepared.rows, facts["root"])

    @property
    def key(self) -> str:
        """Run key of `prepare`."""
        return key_of(self.uri)

    @cached_property
    def cases(self) -> dict[str, Case]:
        """Cases by id."""
        return dict(self.manifest.by_id)

    def rows_for(self, data: Data, *, sealed: bool) -> tuple[SplitRow, ...]:
        """The rows that training (`sealed=False`) or evaluation uses, with roles of the fold."""
        chosen = [
            row
            for row in select(self.rows, fold=data.fold)
            if (is_test(row.role) if sealed else is_trainable(row.role))
        ]
        if not chosen:
            what = "sealed test" if sealed else "training"
            raise DataError(f"the split must have {what} cases, but protocol {data.protocol} has 0")
        return tuple(chosen)


@dataclass(frozen=True)
class Plan:
    """A run that is about to happen, in the launcher and in the worker alike."""

    verb: str
    name: RecipeName
    stage_name: str
    """The stage, or the verb where there is none."""
    stage: StageConfig
    resolution: Resolution
    key: str
    code: str
    argv: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    again: int = 0
    data: PreparedData | None = None
    rows: tuple[SplitRow, ...] = ()
    weights: Mapping[str, FoundWeights] = field(default_factory=dict)
    parent: RunDirectory | None = None

    @property
    def run_uri(self) -> str:
        """Where the run directory is."""
        return join_uri(
            settings().storage,
            "runs",
            self.name.system,
            self.name.variant,
            self.stage_name,
            self.key,
        )


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


def _finished(uri: str, *, verb: str) -> Outcome:
    outcome = RunDirectory.open(uri).outcome()
    if outcome is None or outcome.state != "done":
        state = outcome.state if outcome else "not finished"
        raise ConfigError(f"the {verb} run at {uri} must be done, but is {state}. Run it first.")
    return outcome


def _again_argv(again: int) -> list[str]:
    return ["--again", str(again)] if again else []


def _set_argv(overrides: Sequence[str]) -> list[str]:
    return [argument for text in overrides for argument in ("--set", text)]


def plan_prepare(name: str, overrides: Sequence[str] = (), *, again: int = 0) -> Plan:
    """Plan to check the raw data and to record who is in which split.

    Args:
        name: `SYSTEM[/VARIANT]`; the first stage says which data are meant.
        overrides: Assignments; those of `data` matter.
        again: See `run_key`.
    """
    recipe_name, recipe = find(name)
    first = next(iter(recipe.stages(recipe_name.variant)))
    # Only `data` matters: overrides of other stages' parts must not be judged by this one.
    stages = tuple(recipe.stages(recipe_name.variant))
    overrides = for_stage(overrides, first, stages=stages)
    overrides = [text for text in overrides if text.startswith("data.")]
    resolution = resolve(f"{_without_stage(recipe_name)}:{first}", overrides)
    stage = resolution.stage
    if not stage.data.root:
        raise ConfigError(
            f"data.root must name the folder or URI of the raw data, but is empty. Add "
            f"data.root=FOLDER, or write synthetic data: medtrain data synth {recipe.system} FOLDER"
        )
    code = code_fingerprint(recipe.package, judges=False)
    key = run_key(
        verb="prepare",
        config={"data": identity_of_data(stage.data)},
        parents=(),
        data=listing_fingerprint(open_store(stage.data.root), cache=settings().cache),
        weights={},
        code=code,
        again=again,
    )
    argv = ["prepare", name, *_set_argv(overrides), *_again_argv(again), "--key", key]
    return Plan(
        verb="prepare",
        name=recipe_name,
        stage_name="prepare",
        stage=stage,
        resolution=resolution,
        key=key,
        code=code,
        argv=tuple(argv),
    )


def identity_of_data(data: Data) -> dict[str, Any]:
    """What of `data` decides manifest and membership: not the fold, not the augmentation."""
    fields = identity(data)
    return {k: v for k, v in fields.items() if k not in ("fold", "augmentation", "image_size")}


def plan_training(
    name: str,
    overrides: Sequence[str] = (),
    *,
    data_uri: str,
    parent_uri: str = "",
    again: int = 0,
) -> Plan:
    """Plan to train one stage.

    Args:
        name: `SYSTEM[/VARIANT]:STAGE[+OVERLAY…]`.
        overrides: Assignments.
        data_uri: Run directory of `prepare`.
        parent_uri: Run directory of the stage that this one starts from, if it starts from one.
        again: See `run_key`.
    """
    recipe_name, recipe = find(name)
    stages = tuple(recipe.stages(recipe_name.variant))
    overrides = for_stage(overrides, recipe_name.stage or "", stages=stages)
    resolution = resolve(recipe_name, overrides)
    stage = resolution.stage
    parent = _parent(resolution, parent_uri)
    data = PreparedData.load(data_uri)
    rows = data.rows_for(stage.data, sealed=False)
    code = code_fingerprint(resolution.recipe.package, judges=False)
    # A stage that starts from another one has all its weights from there.
    weights = {} if parent else _weights(resolution)
    key = run_key(
        verb="train",
        config=identity(stage),
        parents=[key_of(parent.uri)] if parent else [],
        data=fingerprint(rows),
        weights={part_name: found.digest for part_name, found in weights.items()},
        code=code,
        again=again,
    )
    argv = ["train", name, *_set_argv(overrides), "--data", data_uri]
    argv += ["--parent", parent_uri] if parent else []
    argv += [*_again_argv(again), "--key", key]
    return Plan(
        verb="train",
        name=resolution.name,
        stage_name=resolution.name.stage or "",
        stage=stage,
        resolution=resolution,
        key=key,
        code=code,
        argv=tuple(argv),
        overrides=tuple(overrides),
        again=again,
        data=data,
        rows=rows,
        weights=weights,
        parent=parent,
    )


def plan_evaluation(run_uri: str, *, data_uri: str, again: int = 0) -> Plan:
    """Plan to judge a trained stage on the sealed test split, by the configuration of its run."""
    run = RunDirectory.open(run_uri)
    _finished(run_uri, verb="training")
    tree = yaml.safe_load(run.read_text("config.yaml"))
    resolution = resolve(tree["name"], file=tree, file_name=f"{run_uri}/config.yaml")
    data = PreparedData.load(data_uri)
    rows = data.rows_for(resolution.stage.data, sealed=True)
    code = code_fingerprint(resolution.recipe.package, judges=True)
    key = run_key(
        verb="evaluate",
        config=identity(resolution.stage),
        parents=[key_of(run.uri)],
        data=fingerprint(rows),
        weights={},
        code=code,
        again=again,
    )
    argv = ["evaluate", "--run", run_uri, "--data", data_uri, *_again_argv(again), "--key", key]
    return Plan(
        verb="evaluate",
        name=resolution.name,
        stage_name="evaluate",
        stage=resolution.stage,
        resolution=resolution,
        key=key,
        code=code,
        argv=tuple(argv),
        again=again,
        data=data,
        rows=rows,
        parent=run,
    )


def _without_stage(name: RecipeName) -> RecipeName:
    return RecipeName(name.system, name.variant)


def key_of(run_uri: str) -> str:
    """The run key, which is the last part of a run directory's URI."""
    return run_uri.rstrip("/").rpartition("/")[2]


def _parent(resolution: Resolution, parent_uri: str) -> RunDirectory | None:
    init = resolution.stage.init
    if init.source != "stage":
        return None
    if not parent_uri:
        raise ConfigError(
            f"{resolution.name} starts from the stage '{init.stage}': "
            "give its run with --parent URI"
        )
    _finished(parent_uri, verb=f"{init.stage}")
    return RunDirectory.open(parent_uri)


def _weights(resolution: Resolution) -> dict[str, FoundWeights]:
    wanted = part(resolution.recipe, "data").weights(resolution.stage)
    job = resolution.stage.job
    return {
        name: find_weights(
            weights,
            weights_root=job.weights_root or settings().weights_root,
            cache=settings().cache,
            allow_network=job.allow_network,
        )
        for name, weights in wanted.items()
    }


class EpochLines:
    """Turns a job's `name=value` lines into one line an epoch, and passes on all others."""

    _METRIC = re.compile(r"(?P<name>[a-z0-9_]+)=(?P<value>[-+.e0-9]+)")

    def __init__(self, stage: StageConfig, tell: Callable[[str], None]) -> None:
        self._stage = stage
        self._tell = tell
        self._values: dict[str, float] = {}

    def __call__(self, line: str) -> None:
        """Take one line of the job's log."""
        metric = self._METRIC.fullmatch(line)
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


def execute(plan: Plan, *, on_line: Callable[[str], None] = say) -> RunResult:
    """Answer from the finished run, go on with a half finished one, or start it; return its result.

    Raises:
        JobFailed: The job ended without a result, or the run has a verdict from before.
    """
    on_line(f"{plan.verb} {plan.name}")
    run = RunDirectory.open(plan.run_uri)
    outcome = run.outcome()
    if outcome is not None and outcome.state == "done" and run.holds_what_it_names(outcome):
        on_line(f"finished before, nothing to do: {run.uri}")
        return RunResult(run.uri, plan.key, outcome, was_finished=True)
    if outcome is not None and outcome.state != "done":
        raise JobFailed(
            f"{plan.name} {outcome.state.replace('_', ' ')} before, and the same inputs cannot "
            f"end otherwise: {outcome.reason}\n"
            "To go on from its checkpoint use --retry; to begin anew use --again."
        )
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
    try:
        outcome = wait(launcher, job, on_line=lines)
    except KeyboardInterrupt:
        launcher.cancel(job.name)
        on_line("stopping: the job saves its state first; interrupt again to leave it alone")
        outcome = wait(launcher, job, on_line=lines)
    return RunResult(run.uri, plan.key, outcome, was_finished=False)


def retry(plan: Plan) -> None:
    """Take back a verdict, so that the run goes on from its checkpoint."""
    RunDirectory.open(plan.run_uri).retract_verdict()


@told
def run_prepare(
    name: str, overrides: Sequence[str] = (), *, again: int = 0, **how: Any
) -> RunResult:
    """Check the raw data and record membership of splits."""
    return execute(plan_prepare(name, overrides, again=again), **how)


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
    for finding in (found for found in diagnosis.findings if found.severity != "info"):
        say(f"doctor: {finding.rule} ({finding.severity}): {finding.message}")
    stops = blocking(diagnosis, allow)
    if stops:
        raise ConfigError(
            [
                f"{stop.rule}: {stop.message} (run it all the same: --allow {stop.rule})"
                for stop in stops
            ]
        )
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

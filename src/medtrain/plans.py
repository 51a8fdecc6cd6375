"""Runs that are about to happen: planned alike in the launcher and in the worker.

Both compute the same run key from the same words, so a worker can tell that its code, data or
weights are not those that its launcher meant.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from medtrain.config import Data, Job, StageConfig, digest, dump, identity
from medtrain.data.manifest import Case, Manifest
from medtrain.data.prepare import dataset_name, listing_fingerprint, load
from medtrain.data.splits import SplitRow, fingerprint, is_test, is_trainable, select
from medtrain.errors import ConfigError, DataError
from medtrain.identity import code_fingerprint
from medtrain.overrides import for_stage
from medtrain.recipes import Resolution, find, part, resolve
from medtrain.recipes.recipe import RecipeName
from medtrain.settings import settings
from medtrain.storage.runs import Outcome, RunDirectory
from medtrain.storage.stores import open_store
from medtrain.storage.uri import Store, join_uri
from medtrain.storage.weights import FoundWeights, find_weights

LOCATION = "location.json"
"""In the run directory of `prepare`: where the raw data lie now. A place is no part of what a run
is, so data that moved need not be prepared again."""
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
            rows_fingerprint=facts["rows"],
        )
        moved = RunDirectory.open(uri).read_json(LOCATION) or {}
        root = moved.get("root", facts["root"])
        return cls(uri, home, prepared.manifest, prepared.rows, root)

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
    root = open_store(stage.data.root)
    if "://" not in root.uri and not Path(root.uri).is_dir():
        raise ConfigError(f"data.root={stage.data.root} must be a folder, but there is none")
    code = code_fingerprint(recipe.package, judges=False)
    key = run_key(
        verb="prepare",
        config={"data": identity_of_data(stage.data), "home": dataset_name(stage.data)},
        parents=(),
        data=listing_fingerprint(root, cache=settings().cache),
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
        if parent_uri:
            raise ConfigError(
                f"{resolution.name} starts from no other stage (init.from={init.source}): "
                "leave --parent out"
            )
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


def verdict_details(job: Job) -> dict[str, Any]:
    """With what resources and image a verdict was reached: with others it may be another one."""
    return {"job": dump(job), "image": os.environ.get("MEDTRAIN_IMAGE_DIGEST", "")}


def stands(outcome: Outcome, job: Job) -> bool:
    """Whether a verdict holds for a start with these resources and this image."""
    before = {name: outcome.details.get(name) for name in ("job", "image")}
    return before == verdict_details(job)

"""Rules about weights: where they come from, how many there are, and which are kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from medtrain.config import StageConfig, Weights, key_of
from medtrain.doctor.schedule import earliest_stop, steps_per_epoch
from medtrain.recipes.recipe import Facts, Rule

_MOST_FROM_SCRATCH, _MOST_PRETRAINED = 50_000, 250_000
"""Trained parameters a training case."""
_LONGEST_HALF_LIFE = 0.25
"""Part of the epochs that are surely run."""


def _weights(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Weights]]:
    if isinstance(value, Weights):
        yield ".".join(path), value
    elif isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            yield from _weights(getattr(value, name), (*path, key_of(name, field)))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _weights(item, (*path, key))


def _random_allowed(stage: StageConfig, facts: Facts) -> str | None:
    allowed = [path for path, weights in _weights(stage) if weights.allow_random_init]
    if stage.init.source != "pretrained" or not allowed:
        return None
    return (
        f"{', '.join(f'{path}.allow_random_init' for path in allowed)} is set: where no weights "
        "are found, training starts from random ones, and its figures are not those of the recipe."
    )


def _too_many_parameters(stage: StageConfig, facts: Facts, *, limit: int) -> str | None:
    trained = facts.get("num_trainable_parameters", facts["num_parameters"])
    a_case = trained / facts["num_train_cases"]
    if a_case <= limit:
        return None
    start = "random" if stage.init.source == "scratch" else "trained"
    return (
        f"{trained:,} parameters for {facts['num_train_cases']:,} training cases are {a_case:,.0f} "
        f"a case, more than {limit:,} (start: {start} weights). Expect overfitting: take a smaller "
        "variant, freeze parts (lr=null), augment, or judge by cross-validation."
    )


def _too_many_from_scratch(stage: StageConfig, facts: Facts) -> str | None:
    return _too_many_parameters(stage, facts, limit=_MOST_FROM_SCRATCH)


def _too_many_pretrained(stage: StageConfig, facts: Facts) -> str | None:
    return _too_many_parameters(stage, facts, limit=_MOST_PRETRAINED)


def _slow_average(stage: StageConfig, facts: Facts) -> str | None:
    assert stage.ema is not None
    if stage.ema.decay == 0:
        return None
    half_life = math.log(0.5) / math.log(stage.ema.decay) / steps_per_epoch(stage, facts)
    surely = earliest_stop(stage)
    if half_life <= _LONGEST_HALF_LIFE * surely:
        return None
    fitting = 0.5 ** (1 / (_LONGEST_HALF_LIFE * surely * steps_per_epoch(stage, facts)))
    rounded_down = math.floor(fitting * 1e4) / 1e4
    return (
        f"ema.decay={stage.ema.decay:g} has a half-life of {half_life:.1f} epochs, and the stage "
        f"may end after {surely}: the average lags behind. Set ema.decay to {rounded_down:g} or "
        "less."
    )


def _unused_average(stage: StageConfig, facts: Facts) -> str | None:
    criteria = stage.checkpoint.criteria.values()
    if stage.ema is None or any(c.metric.startswith("val_ema_") for c in criteria):
        return None
    monitor = stage.monitor
    metric = f"val_ema_{monitor.metric.removeprefix('val_')}"
    return (
        "ema is on, but no criterion judges the averaged weights, so they are never kept. Set "
        f"checkpoint.criteria.best_ema={{metric: {metric}, mode: {monitor.mode}}}, or ema=null."
    )


def _starts_from_scratch(stage: StageConfig) -> bool:
    return stage.init.source == "scratch"


def _starts_from_weights(stage: StageConfig) -> bool:
    return stage.init.source != "scratch"


def _has_average(stage: StageConfig) -> bool:
    return stage.ema is not None


RULES = (
    Rule("D-X13", "warning", "random weights are allowed", _random_allowed),
    Rule(
        "D-X07",
        "info",
        "parameters a training case, from scratch",
        _too_many_from_scratch,
        needs=("num_parameters", "num_train_cases"),
        applies=_starts_from_scratch,
    ),
    Rule(
        "D-X07",
        "warning",
        "parameters a training case, from trained weights",
        _too_many_pretrained,
        needs=("num_parameters", "num_train_cases"),
        applies=_starts_from_weights,
    ),
    Rule(
        "D-G06",
        "warning",
        "average that lags behind",
        _slow_average,
        needs=("num_train_cases",),
        applies=_has_average,
    ),
    Rule("D-G06", "error", "average that is never kept", _unused_average, applies=_has_average),
)

"""Rules about time: schedules, stopping, and parts of a stage that come too late to matter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from medtrain.config import CosineRestartsSchedule, StageConfig
from medtrain.recipes.recipe import Facts, Rule

_MOST_CYCLES = 1000
"""Cycles that are listed at most; shorter ones than a thousandth of a stage end where it ends."""


@dataclass(frozen=True)
class _Restarts:
    """Restarts of some groups, in epochs of their own time."""

    groups: tuple[str, ...]
    schedule: CosineRestartsSchedule
    epochs: int
    """From the groups' start to the end of the stage."""


def _restarts(stage: StageConfig) -> Iterator[_Restarts]:
    found: dict[tuple[CosineRestartsSchedule, int], list[str]] = {}
    for name, group in stage.optim.groups.items():
        schedule = group.schedule or stage.optim.schedule
        if isinstance(schedule, CosineRestartsSchedule) and group.lr is not None:
            epochs = stage.epochs - group.starts_epoch + 1
            if epochs > 0:
                found.setdefault((schedule, epochs), []).append(name)
    for (schedule, epochs), names in found.items():
        yield _Restarts(tuple(names), schedule, epochs)


def _has_restarts_in_steps(stage: StageConfig) -> bool:
    return any(found.schedule.first.unit == "steps" for found in _restarts(stage))


def _has_restarts_in_epochs(stage: StageConfig) -> bool:
    return any(found.schedule.first.unit != "steps" for found in _restarts(stage))


def _unfinished_cycle(stage: StageConfig, facts: Facts) -> str | None:
    return _first_unfinished(stage, steps_per_epoch=None)


def _unfinished_cycle_in_steps(stage: StageConfig, facts: Facts) -> str | None:
    steps = steps_per_epoch(stage, facts)
    return _first_unfinished(stage, steps_per_epoch=steps)


def _first_unfinished(stage: StageConfig, *, steps_per_epoch: int | None) -> str | None:
    for found in _restarts(stage):
        first = found.schedule.first
        if (first.unit == "steps") != (steps_per_epoch is not None):
            continue
        if first.unit == "steps":
            assert steps_per_epoch is not None
            length, epochs, unit = first.amount, found.epochs * steps_per_epoch, "steps"
        else:
            whole = stage.epochs if first.unit == "fraction" else 1
            length, epochs, unit = first.amount * whole, found.epochs, "epochs"
        end = 0.0
        for _ in range(_MOST_CYCLES):
            if end + length > epochs * (1 + 1e-9):
                break
            end += length
            length *= found.schedule.factor
        rest = epochs - end
        if rest <= 1e-6 * epochs or end + length <= epochs:
            continue
        groups = ", ".join(found.groups)
        return (
            f"warm restarts ({groups}) of first={first}, factor={found.schedule.factor} end at "
            f"{unit[:-1]} {end + length:g}, but the stage ends at {epochs}, {rest:g} {unit} into a "
            f"cycle of {length:g}: the rate is still high when training ends. "
            f"{_fitting_cycles(found.epochs)}"
        )
    return None


def _fitting_cycles(epochs: int) -> str:
    """Restarts that end with the stage: two cycles of which the second is `factor` as long."""
    fitting = [
        f"first={epochs // parts}epochs factor={parts - 1}"
        for parts in (2, 3, 4)
        if epochs % parts == 0
    ]
    return f"What fits: {' or '.join([*fitting, f'first={epochs}epochs'])}."


def steps_per_epoch(stage: StageConfig, facts: Facts) -> int:
    """Optimizer steps of an epoch, from the fact `num_train_cases`."""
    return math.ceil(int(facts["num_train_cases"]) / stage.batch.global_)


def earliest_stop(stage: StageConfig) -> int:
    """The last epoch that is surely run: of the stage, or before early stopping may act."""
    if stage.early_stop is None:
        return stage.epochs
    every = stage.validation.every_epochs
    first_seen = math.ceil(max(stage.early_stop.min_epochs, 1) / every) * every
    return min(stage.epochs, first_seen + stage.early_stop.patience * every)


def _dead_early_stop(stage: StageConfig, facts: Facts) -> str | None:
    if stage.early_stop is None or earliest_stop(stage) < stage.epochs:
        return None
    return (
        f"early_stop (patience={stage.early_stop.patience} validations after epoch "
        f"{stage.early_stop.min_epochs}) cannot act within epochs={stage.epochs}. "
        "Lower it, or set early_stop=null."
    )


def _dead_parts(stage: StageConfig, facts: Facts) -> str | None:
    starts = {f"optim.groups.{n}": g.starts_epoch for n, g in stage.optim.groups.items()} | {
        f"losses.{n}": term.starts_epoch for n, term in stage.losses.items()
    }
    late = [f"{path} (epoch {start})" for path, start in starts.items() if start > stage.epochs]
    if not late:
        return None
    return (
        f"{', '.join(late)} would start after the last epoch, {stage.epochs}: "
        "they never take part. Lower their starts_epoch or remove them."
    )


RULES = (
    Rule(
        "D-X05",
        "warning",
        "warm restarts that do not end with the stage",
        _unfinished_cycle,
        applies=_has_restarts_in_epochs,
    ),
    Rule(
        "D-X05",
        "warning",
        "warm restarts that do not end with the stage",
        _unfinished_cycle_in_steps,
        needs=("num_train_cases",),
        applies=_has_restarts_in_steps,
    ),
    Rule("D-X11", "warning", "early stopping that cannot act", _dead_early_stop),
    Rule("D-X12", "warning", "parts that never start", _dead_parts),
)

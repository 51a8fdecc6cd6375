"""The learning rate of a parameter group as a function of the optimizer step, and early stopping.

A group that starts late has a time of its own: its warm-up, its cosine and its restarts are counted
from the first step of `starts_epoch`, and its cosine covers the rest of the stage. A duration in
percent always means the whole stage. The warm-up takes the place of the first steps of a cosine or
of a first cycle, so cycles end where they would end without it.
"""

from __future__ import annotations

import math
from typing import Any

from medtrain.config import (
    ConstantSchedule,
    CosineRestartsSchedule,
    CosineSchedule,
    Criterion,
    EarlyStop,
    ParamGroup,
    PlateauSchedule,
    Schedule,
)


class GroupSchedule:
    """Factor on one group's learning rate. Only `plateau` has a memory."""

    def __init__(
        self,
        schedule: Schedule,
        *,
        starts_epoch: int = 1,
        steps_per_epoch: int,
        total_steps: int,
    ) -> None:
        self._schedule = schedule
        self._starts_epoch = starts_epoch
        self._start = (starts_epoch - 1) * steps_per_epoch
        self._length = total_steps - self._start
        self._warmup = schedule.warmup.in_steps(
            steps_per_epoch=steps_per_epoch, total_steps=total_steps
        )
        if isinstance(schedule, CosineRestartsSchedule):
            self._first = max(
                1,
                schedule.first.in_steps(steps_per_epoch=steps_per_epoch, total_steps=total_steps),
            )
        self._reduction = 1.0
        self._best: float | None = None
        self._num_bad = 0

    @classmethod
    def of_group(
        cls, group: ParamGroup, default: Schedule, *, steps_per_epoch: int, total_steps: int
    ) -> GroupSchedule:
        """The schedule of `group`, or `default` where it has none of its own."""
        return cls(
            group.schedule or default,
            starts_epoch=group.starts_epoch,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
        )

    def factor(self, step: int) -> float:
        """Factor for the optimizer step that follows `step` steps of the stage.

        A cosine is at its floor after its last step, as in torch's schedulers: the last step
        itself is taken just above it.
        """
        local = max(0, step - self._start)
        schedule = self._schedule
        if local < self._warmup:
            rise = local / self._warmup
            return schedule.warmup_from + (1.0 - schedule.warmup_from) * rise
        match schedule:
            case ConstantSchedule():
                return 1.0
            case CosineSchedule():
                return _cosine(local - self._warmup, self._length - self._warmup, schedule.floor)
            case CosineRestartsSchedule():
                begin, length = 0, self._first
                while local >= begin + length:
                    begin, length = begin + length, length * schedule.factor
                # Only a first cycle can hold the warm-up.
                skipped = max(0, self._warmup - begin)
                return _cosine(local - begin - skipped, length - skipped, schedule.floor)
            case PlateauSchedule():
                return max(schedule.floor, self._reduction)

    def observe(self, value: float | None, *, epoch: int, monitor: Criterion) -> None:
        """Tell a plateau schedule the monitor of a validation; None is no improvement.

        As torch's `ReduceLROnPlateau` it lets `patience` validations pass and reduces at the next
        one without improvement.
        """
        if not isinstance(self._schedule, PlateauSchedule) or epoch < self._starts_epoch:
            return
        if value is not None and monitor.is_better(value, self._best):
            self._best, self._num_bad = value, 0
            return
        self._num_bad += 1
        if self._num_bad > self._schedule.patience:
            self._reduction *= self._schedule.factor
            self._num_bad = 0

    def state_dict(self) -> dict[str, Any]:
        """What a plateau schedule has learned."""
        return {"reduction": self._reduction, "best": self._best, "num_bad": self._num_bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._reduction, self._best = state["reduction"], state["best"]
        self._num_bad = state["num_bad"]


class EarlyStopper:
    """Ends a stage whose monitor has not improved for `patience` validations.

    Validations before `min_epochs` are not seen at all, so it ends no earlier than at epoch
    `min_epochs` + `patience` (where every epoch is validated).
    """

    def __init__(self, config: EarlyStop | None, monitor: Criterion) -> None:
        self._config = config
        self._monitor = monitor
        self._best: float | None = None
        self._num_bad = 0

    @property
    def is_over(self) -> bool:
        """Whether the stage should end."""
        return self._config is not None and self._num_bad >= self._config.patience

    @property
    def sentence(self) -> str:
        """Why it is over."""
        return (
            f"{self._monitor.metric} has not improved on {self._best} for {self._num_bad} "
            "validations"
        )

    def observe(self, value: float | None, *, epoch: int) -> None:
        """See the monitor of one validation; None is no improvement."""
        if self._config is None or epoch < self._config.min_epochs:
            return
        min_delta = self._config.min_delta
        if value is not None and self._monitor.is_better(value, self._best, min_delta=min_delta):
            self._best, self._num_bad = value, 0
        else:
            self._num_bad += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"best": self._best, "num_bad": self._num_bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._best, self._num_bad = state["best"], state["num_bad"]


def _cosine(step: int, length: int, floor: float) -> float:
    if step >= length:
        return floor
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * step / length))

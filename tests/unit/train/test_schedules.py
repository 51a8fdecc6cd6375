from __future__ import annotations

import math

import pytest
import torch
from torch.optim import lr_scheduler

from medtrain.config import (
    ConstantSchedule,
    CosineRestartsSchedule,
    CosineSchedule,
    Criterion,
    Duration,
    EarlyStop,
    ParamGroup,
    PlateauSchedule,
    Schedule,
)
from medtrain.train.schedules import EarlyStopper, GroupSchedule

STEPS = 10
"""Of an epoch."""
LOWER = Criterion(metric="val_loss", mode="min")
HIGHER = Criterion(metric="val_auroc", mode="max")


def _epochs(amount: float) -> Duration:
    return Duration(amount, "epochs")


def _schedule(schedule: Schedule, *, epochs: int, starts_epoch: int = 1) -> GroupSchedule:
    return GroupSchedule(
        schedule, starts_epoch=starts_epoch, steps_per_epoch=STEPS, total_steps=epochs * STEPS
    )


def _torch_factors(scheduler_type, num_steps: int, **options) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = scheduler_type(optimizer, **options)
    factors = []
    for _ in range(num_steps):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


def test_constant_stays_at_one():
    schedule = _schedule(ConstantSchedule(), epochs=3)
    assert [schedule.factor(step) for step in range(30)] == [1.0] * 30


def test_warmup_rises_in_a_line_from_its_first_step_and_is_over_after_its_length():
    schedule = _schedule(ConstantSchedule(warmup=_epochs(1), warmup_from=0.1), epochs=3)
    assert schedule.factor(0) == pytest.approx(0.1)
    assert schedule.factor(5) == pytest.approx(0.55)
    assert schedule.factor(9) == pytest.approx(0.91)
    assert schedule.factor(10) == 1.0


@pytest.mark.parametrize("unit", ["epochs", "steps", "fraction"])
def test_a_duration_means_the_same_in_every_unit(unit):
    amount = {"epochs": 2.0, "steps": 20.0, "fraction": 0.2}[unit]
    schedule = _schedule(ConstantSchedule(warmup=Duration(amount, unit)), epochs=10)
    assert schedule.factor(19) < 1.0
    assert schedule.factor(20) == 1.0


def test_cosine_equals_torchs():
    schedule = _schedule(CosineSchedule(floor=0.1), epochs=4)
    expected = _torch_factors(lr_scheduler.CosineAnnealingLR, 40, T_max=40, eta_min=0.1)
    assert [schedule.factor(step) for step in range(40)] == pytest.approx(expected, abs=1e-9)
    assert schedule.factor(40) == 0.1


def test_warmup_and_cosine_have_their_closed_form():
    schedule = _schedule(
        CosineSchedule(warmup=Duration(0.01, "fraction"), warmup_from=0.01, floor=0.0), epochs=100
    )
    # 1 % of 1,000 steps is the peak's index: start 1/100, then 1, then half a cosine to zero.
    assert schedule.factor(0) == pytest.approx(0.01)
    assert schedule.factor(10) == 1.0
    assert schedule.factor(505) == pytest.approx(0.5)
    assert schedule.factor(999) == pytest.approx(0.5 * (1 + math.cos(math.pi * 989 / 990)))
    assert schedule.factor(1000) == 0.0


def test_warm_restarts_equal_torchs_and_25_times_3_ends_with_epoch_100():
    schedule = _schedule(CosineRestartsSchedule(first=_epochs(25), factor=3), epochs=100)
    expected = _torch_factors(
        lr_scheduler.CosineAnnealingWarmRestarts, 1001, T_0=25 * STEPS, T_mult=3
    )
    assert [schedule.factor(step) for step in range(1001)] == pytest.approx(expected, abs=1e-9)
    beginnings = [step for step in range(1001) if schedule.factor(step) == 1.0]
    assert beginnings == [0, 25 * STEPS, 100 * STEPS]


def test_a_warmup_does_not_shift_the_restarts():
    schedule = _schedule(
        CosineRestartsSchedule(first=_epochs(4), warmup=_epochs(1), floor=0.2), epochs=8
    )
    assert schedule.factor(0) == 0.0
    assert schedule.factor(10) == 1.0
    assert schedule.factor(25) == pytest.approx(0.6)
    assert schedule.factor(39) < 0.21
    assert schedule.factor(40) == 1.0


def test_a_group_that_starts_late_has_a_time_of_its_own():
    late = _schedule(CosineSchedule(warmup=_epochs(1)), epochs=10, starts_epoch=6)
    alone = _schedule(CosineSchedule(warmup=_epochs(1)), epochs=5)
    assert [late.factor(50 + step) for step in range(51)] == [
        alone.factor(step) for step in range(51)
    ]


def test_a_group_takes_its_own_schedule_before_the_common_one():
    own = ParamGroup(match=("*",), lr=1.0, schedule=ConstantSchedule())
    common = ParamGroup(match=("*",), lr=1.0)
    default = CosineSchedule()
    factors = [
        GroupSchedule.of_group(group, default, steps_per_epoch=1, total_steps=10).factor(9)
        for group in (own, common)
    ]
    assert factors[0] == 1.0
    assert factors[1] < 0.1


def test_plateau_equals_torchs():
    values = [5.0, 4.0, 4.0, 4.1, 4.2, 3.9, 3.9, 3.9, 3.9, 3.9, 3.9, 3.8, 4.0, 4.0]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, threshold=0.0)
    schedule = _schedule(PlateauSchedule(factor=0.5, patience=2), epochs=len(values))
    for epoch, value in enumerate(values, start=1):
        scheduler.step(value)
        schedule.observe(value, epoch=epoch, monitor=LOWER)
        assert schedule.factor(epoch * STEPS) == optimizer.param_groups[0]["lr"]
    assert schedule.factor(0) < 0.5


def test_plateau_keeps_its_floor_and_counts_an_absent_monitor_as_no_improvement():
    schedule = _schedule(PlateauSchedule(factor=0.1, patience=0, floor=0.05), epochs=9)
    schedule.observe(1.0, epoch=1, monitor=HIGHER)
    assert schedule.factor(10) == 1.0
    schedule.observe(None, epoch=2, monitor=HIGHER)
    assert schedule.factor(20) == pytest.approx(0.1)
    schedule.observe(None, epoch=3, monitor=HIGHER)
    assert schedule.factor(30) == 0.05


def test_plateau_does_not_watch_before_its_group_learns():
    schedule = _schedule(PlateauSchedule(patience=0), epochs=9, starts_epoch=5)
    for epoch in range(1, 5):
        schedule.observe(float(epoch), epoch=epoch, monitor=LOWER)
    assert schedule.factor(40) == 1.0


def test_plateau_goes_on_from_a_saved_state():
    whole = _schedule(PlateauSchedule(patience=1), epochs=9)
    first, second = (_schedule(PlateauSchedule(patience=1), epochs=9) for _ in range(2))
    values = [3.0, 3.0, 3.0, 3.0, 3.0, 2.0]
    for epoch, value in enumerate(values, start=1):
        whole.observe(value, epoch=epoch, monitor=LOWER)
    for epoch, value in enumerate(values[:2], start=1):
        first.observe(value, epoch=epoch, monitor=LOWER)
    second.load_state_dict(first.state_dict())
    for epoch, value in enumerate(values[2:], start=3):
        second.observe(value, epoch=epoch, monitor=LOWER)
    assert second.state_dict() == whole.state_dict()
    assert whole.factor(60) == 0.25


def _stop_epoch(config: EarlyStop, values: list[float], monitor: Criterion = HIGHER) -> int | None:
    stopper = EarlyStopper(config, monitor)
    for epoch, value in enumerate(values, start=1):
        stopper.observe(value, epoch=epoch)
        if stopper.is_over:
            return epoch
    return None


@pytest.mark.parametrize(
    ("min_epochs", "patience", "expected"), [(10, 7, 17), (15, 10, 25), (0, 3, 4)]
)
def test_the_earliest_stop_is_min_epochs_plus_patience(min_epochs, patience, expected):
    # The best comes first: epochs before min_epochs neither set a mark nor count.
    values = [1.0 - 0.01 * epoch for epoch in range(40)]
    config = EarlyStop(patience=patience, min_epochs=min_epochs)
    assert _stop_epoch(config, values) == expected


def test_an_improvement_starts_the_patience_anew():
    assert _stop_epoch(EarlyStop(patience=3), [0.5, 0.4, 0.4, 0.6, 0.5, 0.5, 0.5]) == 7


def test_an_improvement_below_min_delta_is_none():
    values = [0.5, 0.505, 0.51, 0.515]
    assert _stop_epoch(EarlyStop(patience=3, min_delta=0.1), values) == 4
    assert _stop_epoch(EarlyStop(patience=3), values) is None


def test_an_absent_monitor_is_no_improvement():
    stopper = EarlyStopper(EarlyStop(patience=2), LOWER)
    for epoch, value in enumerate([1.0, None, None], start=1):
        assert not stopper.is_over
        stopper.observe(value, epoch=epoch)
    assert stopper.is_over
    assert "val_loss has not improved on 1.0 for 2 validations" in stopper.sentence


def test_the_stopper_goes_on_from_a_saved_state_and_without_config_never_ends():
    first, second = (EarlyStopper(EarlyStop(patience=3), LOWER) for _ in range(2))
    for value in (1.0, 2.0, 2.0):
        first.observe(value, epoch=1)
    second.load_state_dict(first.state_dict())
    second.observe(2.0, epoch=2)
    assert second.is_over
    assert _stop_epoch_without_config() is None


def _stop_epoch_without_config() -> int | None:
    stopper = EarlyStopper(None, LOWER)
    for epoch in range(1, 100):
        stopper.observe(1.0, epoch=epoch)
        if stopper.is_over:
            return epoch
    return None


def test_before_a_group_starts_it_has_the_factor_of_its_first_step():
    late = _schedule(ConstantSchedule(), epochs=4, starts_epoch=3)
    assert late.factor(0) == 1.0
    warmed = _schedule(ConstantSchedule(warmup=_epochs(1)), epochs=4, starts_epoch=3)
    assert warmed.factor(0) == 0.0

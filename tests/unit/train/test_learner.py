from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipe.config import RECIPE, TinyModel, TinyStage
from tiny_recipe.runs import make_task

from medtrain.config import ConstantSchedule, Duration, Ema, Init, Optim, ParamGroup
from medtrain.errors import LaunchError, TrainingDiverged
from medtrain.train.device import Process
from medtrain.train.learner import Learner, StepReport
from medtrain.train.task import Batch, Clock, Shard

BASE = RECIPE.variants["default"]["base"]
ALL = {"all": ParamGroup(match=("*",), lr=0.5)}


def _stage(**changes: Any) -> TinyStage:
    assert isinstance(BASE, TinyStage)
    model = TinyModel(width=4)
    return BASE.model_copy(update={"model": model, "optim": Optim(groups=ALL), **changes})


class Driver:
    """Takes one step after the other, each from one micro-batch."""

    def __init__(self, stage: TinyStage, data_path: Path) -> None:
        task = make_task(stage, data_path)
        torch.manual_seed(0)
        self.learner = Learner(task.build_model(), stage=stage, task=task, process=Process())
        self.learner.set_schedules(steps_per_epoch=5, total_steps=30)
        self.batches: Iterator[Batch] = iter(task.build_loader("train", Shard(0, 1, 0, epoch=1)))
        self.num_steps = 0
        self.model: Any = self.learner.model

    def step(self, *, epoch: int = 1, batch: Batch | None = None) -> StepReport:
        clock = Clock(epoch, self.num_steps, 0.0)
        batch = batch or next(self.batches)
        self.learner.enter_epoch(batch, clock=lambda _: clock, epoch=epoch)
        self.learner.open_step(clock, num_batches=1)
        self.learner.accumulate(batch, is_last=True)
        report = self.learner.close_step(wants_stop=False, measures_update=True)
        self.num_steps += 1
        return report

    @property
    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.learner.model.parameters()]).clone()


def test_gradients_are_clipped_and_their_norm_before_it_is_reported(tiny_data):
    optim = Optim(kind="sgd", momentum=0.0, weight_decay=0.0, clip_norm=1e-3, groups=ALL)
    driver = Driver(_stage(optim=optim), tiny_data)
    before = driver.weights
    report = driver.step()
    assert report.figures["grad_norm"] > 0.1
    change = torch.linalg.vector_norm(driver.weights - before).item()
    assert change == pytest.approx(0.5 * 1e-3, rel=1e-3)
    norm = torch.linalg.vector_norm(before).item()
    assert report.figures["update_ratio_all"] == pytest.approx(change / norm, rel=1e-3)


def test_a_norm_below_the_bound_is_not_clipped(tiny_data):
    changes = []
    for clip_norm in (None, 1e6):
        optim = Optim(kind="sgd", momentum=0.0, clip_norm=clip_norm, groups=ALL)
        driver = Driver(_stage(optim=optim), tiny_data)
        driver.step()
        changes.append(driver.weights)
    assert torch.equal(*changes)


def test_the_total_norm_is_over_all_groups(tiny_data):
    groups = {
        "encoder": ParamGroup(match=("encoder.*",), lr=0.1),
        "head": ParamGroup(match=("head.*",), lr=0.1),
    }
    figures = Driver(_stage(optim=Optim(groups=groups)), tiny_data).step().figures
    assert figures["grad_norm"] == pytest.approx(
        math.hypot(figures["grad_norm_encoder"], figures["grad_norm_head"])
    )


def test_every_step_has_the_learning_rate_of_its_schedule(tiny_data):
    warmup = ConstantSchedule(warmup=Duration(4, "steps"))
    optim = Optim(kind="sgd", momentum=0.0, weight_decay=0.0, schedule=warmup, groups=ALL)
    driver = Driver(_stage(optim=optim), tiny_data)
    before = driver.weights
    driver.step()
    # The first step of a warm-up from zero.
    assert torch.equal(driver.weights, before)
    ratios = []
    for _ in range(3):
        before = driver.weights
        norm = driver.step().figures["grad_norm"]
        ratios.append(torch.linalg.vector_norm(driver.weights - before).item() / norm)
    assert ratios == pytest.approx([0.125, 0.25, 0.375], rel=1e-4)


TWO = {
    "encoder": ParamGroup(match=("encoder.*",), lr=None),
    "head": ParamGroup(match=("head.*",), lr=0.5),
}


def test_drift_is_the_change_since_the_stages_start_and_survives_a_resume(tiny_data):
    stage = _stage(init=Init(source="pretrained"), optim=Optim(groups=TWO))
    driver = Driver(stage, tiny_data)
    assert driver.learner.drift() == {"encoder": 0.0, "head": 0.0}
    with torch.no_grad():
        for parameter in driver.model.head.parameters():
            parameter.mul_(1.25)
    assert driver.learner.drift() == {"encoder": 0.0, "head": pytest.approx(0.25)}

    resumed = Driver(stage, tiny_data)
    with torch.no_grad():
        # Another start: its weights must not be taken for the stage's.
        for parameter in resumed.model.parameters():
            parameter.zero_()
    resumed.learner.load_state_dict(driver.learner.state_dict())
    assert resumed.learner.drift() == driver.learner.drift()


def test_weights_that_never_learn_are_not_kept_for_the_drift(tiny_data):
    stage = _stage(init=Init(source="pretrained"), optim=Optim(groups=TWO))
    start = Driver(stage, tiny_data).learner.state_dict()["start"]
    assert start
    assert all(name.startswith("head.") for name in start)


def test_a_stage_from_scratch_has_no_drift_and_keeps_no_start(tiny_data):
    learner = Driver(_stage(), tiny_data).learner
    assert learner.drift() == {}
    assert learner.state_dict()["start"] is None


def _spoiled(batch: Batch) -> Batch:
    return {**batch, "y": batch["y"] * math.nan}


def test_a_loss_that_is_not_finite_ends_before_the_step(tiny_data):
    driver = Driver(_stage(), tiny_data)
    before = driver.weights
    batch = next(driver.batches)
    with pytest.raises(TrainingDiverged) as caught:
        driver.step(batch=_spoiled(batch))
    for word in ("epoch 1, step 1", "value is nan", *batch["case_id"]):
        assert word in str(caught.value)
    assert torch.equal(driver.weights, before)


def test_a_gradient_that_is_not_finite_names_group_and_cases(tiny_data):
    driver = Driver(_stage(), tiny_data)
    driver.model.head.weight.register_hook(lambda grad: grad * math.inf)
    batch = next(driver.batches)
    with pytest.raises(TrainingDiverged, match="the gradient of all is not, for case_"):
        driver.step(batch=batch)


def _with_scaler(driver: Driver, scale: float) -> torch.amp.GradScaler:
    # What fp16 has on a GPU; here it scales gradients of single precision.
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    driver.learner._scaler = scaler
    return scaler


def test_the_scaler_may_skip_steps_while_it_finds_its_scale(tiny_data):
    driver = Driver(_stage(ema=Ema(decay=0.5)), tiny_data)
    scaler = _with_scaler(driver, 2.0**127)
    before = driver.weights
    batch = next(driver.batches)
    report = driver.step(batch=batch)
    assert report.figures["skipped_fraction"] == 1.0
    assert "grad_norm" not in report.figures
    assert torch.equal(driver.weights, before)
    averaged = driver.learner.averaged
    assert averaged is not None
    assert averaged.num_updates == 0
    for _ in range(14):
        report = driver.step(batch=batch)
    assert scaler.get_scale() < 2.0**127
    assert report.figures["skipped_fraction"] == 0.0
    assert not torch.equal(driver.weights, before)
    assert averaged.num_updates > 0


def test_a_scale_has_no_part_in_the_step(tiny_data):
    results = []
    for scale in (None, 1024.0):
        optim = Optim(kind="sgd", momentum=0.0, clip_norm=0.5, groups=ALL)
        driver = Driver(_stage(optim=optim), tiny_data)
        if scale:
            _with_scaler(driver, scale)
        norm = driver.step().figures["grad_norm"]
        results.append((norm, driver.weights))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-6)


def test_a_scaler_that_skips_for_too_long_is_divergence(tiny_data):
    driver = Driver(_stage(), tiny_data)
    _with_scaler(driver, 1.0)
    driver.model.head.weight.register_hook(lambda grad: grad * math.inf)
    batch = next(driver.batches)
    for _ in range(16):
        driver.step(batch=batch)
    with pytest.raises(TrainingDiverged):
        driver.step(batch=batch)


def test_activation_checkpointing_changes_nothing_but_memory(tiny_data):
    results = []
    for patterns in ((), ("encoder",)):
        model = TinyModel(width=4, batchnorm=True, dropout=0.3)
        stage = _stage(model=model, activation_checkpointing=patterns, ema=Ema(decay=0.5))
        driver = Driver(stage, tiny_data)
        for _ in range(3):
            driver.step()
        results.append(driver.learner.state_dict())
    for part in ("model", "ema"):
        states = [r[part]["model"] if part == "ema" else r[part] for r in results]
        for name, expected in states[0].items():
            assert torch.equal(states[1][name], expected), name


def test_fp16_is_refused_on_a_cpu_before_anything_is_built(tiny_data):
    with pytest.raises(LaunchError, match="precision=fp16 must have a GPU"):
        Driver(_stage(precision="fp16"), tiny_data)

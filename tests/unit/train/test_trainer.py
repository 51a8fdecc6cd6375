from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipe.config import RECIPE, TinyModel, TinyStage
from tiny_recipe.runs import Attempt, RunsTask, Scenario, make_task, run_scenarios, start
from torch import multiprocessing
from torch.utils.data import DataLoader

from medtrain.config import (
    Batch,
    Checkpoint,
    CosineRestartsSchedule,
    Criterion,
    Duration,
    EarlyStop,
    Ema,
    Init,
    LossTerm,
    Optim,
    ParamGroup,
    PlateauSchedule,
    Validation,
)
from medtrain.errors import ConfigError, DataError, TrainingDiverged
from medtrain.storage.runs import RunDirectory
from medtrain.train.checkpoint import State, read_newest
from medtrain.train.device import Process
from medtrain.train.step import TrainStep, judge
from medtrain.train.task import Clock, Shard

BASE = RECIPE.variants["default"]["base"]
ENCODER = ParamGroup(match=("encoder.*",), lr=1e-2)
HEAD = ParamGroup(match=("head.*",), lr=2e-2)
PLAIN = TinyModel(width=4)
"""Without BatchNorm and dropout: nothing depends on how cases are put together."""

# Everything that has a memory or draws random numbers, at once.
FULL: dict[str, Any] = {
    "batch": Batch(global_=8, micro=2),
    "model": TinyModel(width=6, batchnorm=True, dropout=0.3),
    "optim": Optim(
        clip_norm=5.0,
        schedule=CosineRestartsSchedule(
            first=Duration(2, "epochs"), factor=2, warmup=Duration(1, "epochs")
        ),
        groups={
            "deep": ParamGroup(match=("encoder.0.*",), lr=1e-2, starts_epoch=3),
            "encoder": ENCODER,
            "head": ParamGroup(
                match=("head.*",), lr=2e-2, schedule=PlateauSchedule(patience=0, factor=0.5)
            ),
        },
    ),
    "ema": Ema(decay=0.9, warmup=True),
    "early_stop": EarlyStop(patience=50),
    "checkpoint": Checkpoint(
        criteria={
            "best_mae": Criterion(metric="val_mae", mode="min"),
            "best_loss": Criterion(metric="val_loss", mode="min"),
            "best_ema": Criterion(metric="val_ema_mae", mode="min"),
        },
        monitor="best_mae",
    ),
}


def _stage(**changes: Any) -> TinyStage:
    fields = {name: getattr(BASE, name) for name in TinyStage.model_fields}
    return TinyStage.model_validate({**fields, **changes})


def _equal(expected: State, found: State) -> None:
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def _read(folder: Path, name: str) -> State:
    found = read_newest(RunDirectory.open(str(folder / "run")), name, folder)
    assert found is not None
    return found.state


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(tiny_data: Path, whole_folder: Path) -> Attempt:
    """Six epochs of everything, uninterrupted."""
    return start(make_task(_stage(**FULL), tiny_data), whole_folder)


def test_six_epochs_are_three_and_three_bit_by_bit(whole, whole_folder, tiny_data, tmp_path):
    stage = _stage(**FULL)
    assert whole.result.epoch == 6
    # 5 steps an epoch: in mid-epoch, in the validation of epoch 3, after an epoch's last step.
    metrics: dict[int, dict[str, float]] = {}
    for stop_in_step, stop_in_validation_of, stopped_at in (
        (7, None, 8),
        (None, 3, 15),
        (19, None, 20),
    ):
        task = make_task(stage, tiny_data)
        task.stop_in_step, task.stop_in_validation_of = stop_in_step, stop_in_validation_of
        part = start(task, tmp_path / "parts")
        assert part.result.stopped
        assert part.result.step == stopped_at
        metrics |= part.metrics
    last = start(make_task(stage, tiny_data), tmp_path / "parts")
    assert not last.result.stopped
    _equal(whole.weights, last.weights)
    states = [attempt.trainer.state_dict() for attempt in (whole, last)]
    _equal(states[0]["ema"]["model"], states[1]["ema"]["model"])
    for part_of_state in ("progress", "averages", "best", "best_metrics", "stopper", "schedules"):
        assert states[0][part_of_state] == states[1][part_of_state]
    # Whole epochs' means, although no process saw a whole epoch 2 or 4.
    assert {**metrics, **last.metrics} == whole.metrics
    assert sorted(whole.metrics) == [5, 10, 15, 20, 25, 30]
    for name in ("best_mae", "best_ema"):
        _equal(_read(whole_folder, name)["model"], _read(tmp_path / "parts", name)["model"])


def test_a_stop_before_the_first_step_saves_nothing(tiny_data, tmp_path):
    task = make_task(_stage(), tiny_data)
    task.stop.set()
    attempt = start(task, tmp_path)
    assert attempt.result.stopped
    assert attempt.result.step == 0
    assert RunDirectory.open(str(tmp_path / "run")).all_pointers() == []


def test_a_finished_run_answers_again_without_a_step(tiny_data, tmp_path):
    stage = _stage(epochs=2)
    first = start(make_task(stage, tiny_data), tmp_path)
    again = start(make_task(stage, tiny_data), tmp_path)
    assert again.result == first.result
    assert again.metrics == {}


def test_a_damaged_last_costs_an_epoch_but_no_bit(tiny_data, tmp_path):
    whole = start(make_task(_stage(), tiny_data), tmp_path / "whole")
    task = make_task(_stage(), tiny_data)
    task.stop_in_step = 12
    start(task, tmp_path / "parts")
    run = RunDirectory.open(str(tmp_path / "parts" / "run"))
    (Path(run.uri) / run.pointers("last")[0].key).write_bytes(b"damaged")
    last = start(make_task(_stage(), tiny_data), tmp_path / "parts")
    _equal(whole.weights, last.weights)
    assert min(last.metrics) == 15


def test_saving_within_an_epoch_changes_nothing(whole, tiny_data, tmp_path):
    checkpoint = FULL["checkpoint"].model_copy(update={"every_steps": 3, "keep": 20})
    often = start(
        make_task(_stage(**{**FULL, "checkpoint": checkpoint}), tiny_data), tmp_path / "often"
    )
    _equal(whole.weights, often.weights)
    pointers = RunDirectory.open(str(tmp_path / "often" / "run")).all_pointers()
    steps = {pointer.step for pointer in pointers if pointer.name.startswith("step_")}
    assert steps == {*range(3, 31, 3), *range(5, 31, 5)}


def _batches_of(loader: DataLoader[Any]) -> list[list[int]]:
    batches: Any = loader.batch_sampler
    return list(batches)


class _Curriculum:
    """A sampler that learns: it remembers how often it was asked."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches
        self.num_epochs = 0

    def __iter__(self):
        self.num_epochs += 1
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, int]:
        return {"num_epochs": self.num_epochs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_epochs = state["num_epochs"]


class _CurriculumTask(RunsTask):
    def build_loader(self, split: str, shard: Shard) -> DataLoader[Any]:
        loader = super().build_loader(split, shard)
        if split == "val":
            return loader
        sampler = _Curriculum(_batches_of(loader))
        return DataLoader(loader.dataset, batch_sampler=sampler)


def test_what_a_sampler_has_learned_is_kept_over_epochs_and_starts(tiny_data, tmp_path):
    task = _CurriculumTask(make_task(_stage(epochs=4), tiny_data).context)
    task.stop_in_step = 12
    assert start(task, tmp_path).trainer.state_dict()["sampler"] == {"num_epochs": 3}
    task = _CurriculumTask(make_task(_stage(epochs=4), tiny_data).context)
    # Epoch 3 is asked for once more, by the second start.
    assert start(task, tmp_path).trainer.state_dict()["sampler"] == {"num_epochs": 5}


def test_accumulation_equals_a_big_batch(tiny_data, tmp_path):
    results = []
    for micro in (8, 2):
        stage = _stage(epochs=3, model=PLAIN, batch=Batch(global_=8, micro=micro))
        results.append(start(make_task(stage, tiny_data), tmp_path / str(micro)))
    for name, expected in results[0].weights.items():
        assert torch.allclose(results[1].weights[name], expected, rtol=0, atol=1e-6), name
    losses = [[m["train_loss"] for m in result.metrics.values()] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_last_group_of_an_epoch_has_its_own_divisor_and_is_averaged(tiny_data, tmp_path):
    # 40 cases are 5 micro-batches of 8: a step of 4, and one of 1 that counts as a whole.
    stage = _stage(epochs=1, model=PLAIN, batch=Batch(global_=32, micro=8), ema=Ema(decay=0.9))
    attempt = start(make_task(stage, tiny_data), tmp_path)
    assert attempt.result.step == 2
    state = attempt.trainer.state_dict()
    assert state["ema"]["num_updates"] == 2

    # The same by hand.
    task = make_task(stage, tiny_data)
    model = task.build_model()
    model.load_state_dict(_initial_weights(stage, tiny_data, tmp_path))
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p],
                "lr": 2e-2 if n.startswith("head") else 1e-2,
                "weight_decay": 1e-4 if p.ndim > 1 else 0.0,
            }
            for n, p in model.named_parameters()
        ]
    )
    batches = list(task.build_loader("train", Shard(0, 1, stage.seed, epoch=1)))
    for group in (batches[:4], batches[4:]):
        for batch in group:
            loss = task.losses(model, batch, Clock(1, 0, 0.0))["value"]
            (loss / len(group)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, expected in model.state_dict().items():
        assert torch.allclose(attempt.weights[name], expected, rtol=0, atol=1e-6), name


def _initial_weights(stage: TinyStage, data: Path, folder: Path) -> State:
    """The weights before the first step, as a stage without learning rate leaves them."""
    groups = {"all": ParamGroup(match=("*",), lr=0.0)}
    still = stage.model_copy(update={"optim": Optim(weight_decay=0.0, groups=groups), "ema": None})
    return start(make_task(still, data), folder / "still").weights


def test_a_frozen_module_moves_in_nothing_until_it_starts(tiny_data, tmp_path):
    stages = {
        epochs: _stage(
            epochs=epochs,
            model=TinyModel(width=4, batchnorm=True, dropout=0.5),
            optim=Optim(
                groups={"encoder": ENCODER.model_copy(update={"starts_epoch": 3}), "head": HEAD}
            ),
        )
        for epochs in (1, 2, 3)
    }
    states = {
        epochs: start(make_task(stage, tiny_data), tmp_path / str(epochs)).weights
        for epochs, stage in stages.items()
    }
    encoder = [name for name in states[1] if name.startswith("encoder.")]
    assert "encoder.1.running_mean" in encoder
    assert "encoder.1.num_batches_tracked" in encoder
    for name in encoder:
        assert torch.equal(states[1][name], states[2][name]), name
        assert not torch.equal(states[2][name], states[3][name]), name
    assert states[1]["encoder.1.num_batches_tracked"] == 0
    assert states[3]["encoder.1.num_batches_tracked"] == 10
    assert not torch.equal(states[1]["head.weight"], states[2]["head.weight"])


def test_a_case_without_a_number_ends_the_run_by_name_and_nothing_is_saved_after(
    spoiled_data, tmp_path
):
    with pytest.raises(TrainingDiverged, match=r"epoch 1.*value is nan for cases .*case_017"):
        start(make_task(_stage(), spoiled_data), tmp_path)
    assert RunDirectory.open(str(tmp_path / "run")).all_pointers() == []


def test_bf16_trains_on_a_cpu(tiny_data, tmp_path):
    attempt = start(make_task(_stage(epochs=2, precision="bf16"), tiny_data), tmp_path)
    assert all(value.dtype != torch.bfloat16 for value in attempt.weights.values())
    losses = [metrics["train_loss"] for metrics in attempt.metrics.values()]
    assert losses[1] < losses[0]


def test_an_epochs_metrics_say_how_it_learned(tiny_data, tmp_path):
    groups = {"encoder": ENCODER.model_copy(update={"starts_epoch": 2}), "head": HEAD}
    stage = _stage(epochs=2, optim=Optim(groups=groups), ema=Ema(decay=0.5))
    metrics = start(make_task(stage, tiny_data), tmp_path).metrics
    first, second = metrics[5], metrics[10]
    assert second.keys() - first.keys() == {"grad_norm_encoder", "update_ratio_encoder"}
    assert second.keys() == {
        "epoch", "train_loss", "train_loss_value", "weight_value", "lr_encoder", "lr_head",
        "grad_norm", "grad_norm_encoder", "grad_norm_head", "update_ratio_encoder",
        "update_ratio_head", "val_loss", "val_loss_value", "val_mae", "val_rmse", "val_ema_loss",
        "val_ema_loss_value", "val_ema_mae", "val_ema_rmse",
    }  # fmt: skip
    assert (first["lr_encoder"], second["lr_encoder"]) == (0.0, 1e-2)
    assert (first["epoch"], second["epoch"]) == (1.0, 2.0)


def test_a_checkpoint_holds_the_weights_that_its_metric_judged(whole, whole_folder, tiny_data):
    stage = _stage(**FULL)
    task = make_task(stage, tiny_data)
    for name, best in whole.result.best.items():
        model = task.build_model()
        model.load_state_dict(_read(whole_folder, name)["model"])
        judgement = judge(
            TrainStep(model, task=task, stage=stage),
            task.build_loader("val", Shard(0, 1, stage.seed, best.epoch, is_training=False)),
            clock=Clock(best.epoch, best.step, 0.0),
            process=Process(),
        )
        assert judgement is not None
        found = {**judgement.losses, **task.summarize(judgement.rows)}
        metric = best.metric.removeprefix("val_").removeprefix("ema_")
        assert found[metric] == best.value, name
    pointer = RunDirectory.open(str(whole_folder / "run")).pointers("best_ema")[0]
    best = whole.result.best["best_ema"]
    assert pointer.details == {
        "epoch": best.epoch, "step": best.step, "metric": "val_ema_mae", "value": best.value
    }  # fmt: skip


def test_rows_are_handed_over_whenever_the_monitor_improves(tiny_data, tmp_path):
    attempt = start(make_task(_stage(), tiny_data), tmp_path)
    values = [metrics["val_mae"] for metrics in attempt.metrics.values()]
    num_improved = sum(value < min(values[:n], default=9e9) for n, value in enumerate(values))
    assert len(attempt.rows) == num_improved
    rows = attempt.rows[-1]
    assert [row["case_id"] for row in rows] == [f"case_{number:03d}" for number in range(40, 47)]
    mae = sum(abs(row["error"]) for row in rows) / len(rows)
    assert mae == attempt.result.best["best_mae"].value == attempt.result.metrics["val_mae"]


def test_validation_can_be_rarer_and_the_last_epoch_is_always_judged(tiny_data, tmp_path):
    stage = _stage(epochs=5, validation=Validation(every_epochs=2))
    metrics = start(make_task(stage, tiny_data), tmp_path).metrics
    assert ["val_mae" in values for values in metrics.values()] == [False, True, False, True, True]


class _WorseAndWorse(RunsTask):
    def summarize(self, rows: Any) -> dict[str, float]:
        self.num_judged = getattr(self, "num_judged", 0) + 1
        return {"mae": float(self.num_judged)}


def test_early_stopping_ends_the_stage_for_good(tiny_data, tmp_path):
    stage = _stage(epochs=20, early_stop=EarlyStop(patience=2, min_epochs=3))
    task = _WorseAndWorse(make_task(stage, tiny_data).context)
    attempt = start(task, tmp_path)
    assert (attempt.result.epoch, attempt.result.stopped) == (5, False)
    assert "val_mae has not improved on 3.0 for 2 validations" in attempt.result.reason
    assert attempt.result.best["best_mae"].epoch == 1
    again = start(_WorseAndWorse(task.context), tmp_path)
    assert again.result == attempt.result


def test_the_end_of_a_stage_is_saved_whatever_the_interval(tiny_data, tmp_path):
    checkpoint = BASE.checkpoint.model_copy(update={"every_epochs": 7})
    stages = {
        "all": _stage(epochs=2, checkpoint=checkpoint),
        "early": _stage(epochs=20, checkpoint=checkpoint, early_stop=EarlyStop(patience=2)),
    }
    for name, stage in stages.items():
        task = _WorseAndWorse(make_task(stage, tiny_data).context)
        result = start(task, tmp_path / name).result
        run = RunDirectory.open(str(tmp_path / name / "run"))
        assert [pointer.step for pointer in run.pointers("last")] == [result.step]


class _Silent(RunsTask):
    def summarize(self, rows: Any) -> dict[str, float]:
        return {"mae": float("nan")}


def test_a_monitor_that_never_has_a_value_is_said_each_time_and_fails_the_stage(
    tiny_data, tmp_path, caplog
):
    task = _Silent(make_task(_stage(epochs=2), tiny_data).context)
    with caplog.at_level(logging.WARNING), pytest.raises(ConfigError, match="val_mae was never"):
        start(task, tmp_path)
    warnings = [r.message for r in caplog.records if "criterion best_mae must have" in r.message]
    assert len(warnings) == 2
    assert "gives val_loss, val_loss_value" in warnings[0]


def test_a_stage_starts_from_its_parent_and_then_from_itself(tiny_data, tmp_path, caplog):
    parent = start(make_task(_stage(epochs=1), tiny_data), tmp_path / "parent").weights
    stage = _stage(
        epochs=1,
        init=Init(source="stage", stage="base"),
        optim=Optim(weight_decay=0.0, groups={"all": ParamGroup(match=("*",), lr=0.0)}),
    )
    with caplog.at_level(logging.INFO):
        child = start(make_task(stage, tiny_data), tmp_path / "child", parent=parent)
        assert torch.equal(child.weights["head.weight"], parent["head.weight"])
        assert "starting from the weights of the parent" in caplog.text
        caplog.clear()
        zeros = {name: torch.zeros_like(value) for name, value in parent.items()}
        again = start(make_task(stage, tiny_data), tmp_path / "child", parent=zeros)
    _equal(child.weights, again.weights)
    assert "going on from the run's own state of step 5 (attempt 1)" in caplog.text


def test_drift_from_the_parent_is_the_same_after_a_stop(tiny_data, tmp_path):
    parent = start(make_task(_stage(epochs=1), tiny_data), tmp_path / "parent").weights
    groups = {"encoder": ENCODER.model_copy(update={"starts_epoch": 2}), "head": HEAD}
    stage = _stage(epochs=3, init=Init(source="stage", stage="base"), optim=Optim(groups=groups))
    whole = start(make_task(stage, tiny_data), tmp_path / "whole", parent=parent)
    expected = {
        name: [metrics[f"drift_{name}"] for metrics in whole.metrics.values()] for name in groups
    }
    assert expected["encoder"][0] == 0.0
    assert expected["encoder"][1] > 0.0
    assert 0.0 < expected["head"][0] < expected["head"][2]
    before, after = (
        torch.cat([weights[f"head.{name}"].flatten() for name in ("weight", "bias")])
        for weights in (parent, whole.weights)
    )
    norm = torch.linalg.vector_norm
    assert expected["head"][2] == pytest.approx((norm(after - before) / norm(before)).item())

    task = make_task(stage, tiny_data)
    task.stop_in_step = 7
    parts = start(task, tmp_path / "parts", parent=parent).metrics
    zeros = {name: torch.zeros_like(value) for name, value in parent.items()}
    parts |= start(make_task(stage, tiny_data), tmp_path / "parts", parent=zeros).metrics
    assert parts == whole.metrics


def test_a_stage_without_its_parents_weights_is_refused(tiny_data, tmp_path):
    stage = _stage(init=Init(source="stage", stage="base"))
    with pytest.raises(ConfigError, match="the weights of stage base"):
        start(make_task(stage, tiny_data), tmp_path)


def test_the_effective_batch_is_said(tiny_data, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        start(make_task(_stage(epochs=1), tiny_data), tmp_path)
    assert "effective batch 8 = 4 x 2 accumulated x 1 processes; fp32 on cpu" in caplog.text


def test_a_parameter_that_no_term_reaches_is_refused_before_the_first_step(tiny_data, tmp_path):
    stage = _stage(
        model=TinyModel(aux=True),
        optim=Optim(groups={"all": ParamGroup(match=("*",), lr=1e-2)}),
        losses={"value": LossTerm(), "aux": LossTerm(starts_epoch=4)},
    )
    with pytest.raises(ConfigError, match=r"aux\.\* \(group all\).*epochs 1 to 3.*starts_epoch=4"):
        start(make_task(stage, tiny_data), tmp_path)
    assert RunDirectory.open(str(tmp_path / "run")).all_pointers() == []


class _Irregular(RunsTask):
    second = 10
    """Batches in epoch 2."""

    def build_loader(self, split: str, shard: Shard) -> DataLoader[Any]:
        loader = super().build_loader(split, shard)
        if split == "val":
            return loader
        batches = (_batches_of(loader) * 2)[: 10 if shard.epoch == 1 else self.second]
        return DataLoader(loader.dataset, batch_sampler=batches)


@pytest.mark.parametrize(("second", "said"), [(7, "gives 7"), (11, "gives more")])
def test_an_epoch_of_another_length_is_refused(tiny_data, tmp_path, second, said):
    task = _Irregular(make_task(_stage(batch=Batch(global_=8, micro=2)), tiny_data).context)
    task.second = second
    with pytest.raises(DataError, match=f"10 batches in every epoch, but {said}"):
        start(task, tmp_path)


@pytest.fixture(scope="module")
def ranks(tiny_data: Path, spoiled_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two and of four processes, all in one start of them."""
    out = tmp_path_factory.mktemp("ranks")
    two = _stage(**FULL)
    four = _stage(**{**FULL, "epochs": 4, "batch": Batch(global_=16, micro=2)})
    doubled = _stage(epochs=3, model=PLAIN, batch=Batch(global_=8, micro=4))
    scenarios = [
        Scenario("whole2", two, 2),
        Scenario("parts2", two, 2, stops=(7, 19)),
        Scenario("doubled", doubled, 2),
        Scenario("moved", doubled, 2, stops=(6,), is_finished=False),
        Scenario("diverged", doubled, 2, data_path=spoiled_data),
        Scenario("whole4", four, 4),
        Scenario("parts4", four, 4, stops=(4,)),
    ]
    multiprocessing.spawn(  # type: ignore[attr-defined]
        run_scenarios, args=(scenarios, _free_ports(2, 4), tiny_data, out), nprocs=4
    )
    return out


def _free_ports(*world_sizes: int) -> dict[int, int]:
    sockets = [socket.socket() for _ in world_sizes]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = {size: one.getsockname()[1] for size, one in zip(world_sizes, sockets, strict=True)}
    for one in sockets:
        one.close()
    return ports


def _outcome(ranks: Path, name: str, rank: int) -> dict[str, Any]:
    outcome: dict[str, Any] = torch.load(ranks / f"{name}-{rank}.pt", weights_only=True)
    return outcome


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_processes_go_on_bit_by_bit_and_stop_after_the_same_step(ranks, world_size):
    whole = _outcome(ranks, f"whole{world_size}", 0)
    parts = _outcome(ranks, f"parts{world_size}", 0)
    _equal(whole["weights"], parts["weights"])
    _equal(whole["averaged"], parts["averaged"])
    assert whole["metrics"] == parts["metrics"]
    stopped_at = {2: [8, 20], 4: [5]}[world_size]
    for rank in range(world_size):
        assert _outcome(ranks, f"parts{world_size}", rank)["stopped_at"] == stopped_at


@pytest.mark.parametrize("name", ["whole2", "parts2", "whole4", "parts4"])
def test_all_processes_end_with_the_same_weights(ranks, name):
    first = _outcome(ranks, name, 0)
    for rank in range(1, int(name[-1])):
        _equal(first["weights"], _outcome(ranks, name, rank)["weights"])
        _equal(first["averaged"], _outcome(ranks, name, rank)["averaged"])


def test_two_processes_equal_one_with_a_double_batch(ranks, tiny_data, tmp_path):
    stage = _stage(epochs=3, model=PLAIN, batch=Batch(global_=8, micro=8))
    one: Attempt = start(make_task(stage, tiny_data), tmp_path)
    two = _outcome(ranks, "doubled", 0)
    for name, expected in one.weights.items():
        assert torch.allclose(two["weights"][name], expected, rtol=0, atol=1e-6), name
    for step, expected_metrics in one.metrics.items():
        assert two["metrics"][step] == pytest.approx(expected_metrics, rel=1e-5)


def test_a_run_goes_on_with_another_number_of_processes(ranks, tiny_data):
    # Stopped by two in mid-epoch, finished by one: the same cases meet in every step.
    stage = _stage(epochs=3, model=PLAIN, batch=Batch(global_=8, micro=4))
    attempt = start(make_task(stage, tiny_data), ranks / "moved")
    assert _outcome(ranks, "moved", 0)["stopped_at"] == [7]
    assert attempt.result.step == 15
    for name, expected in _outcome(ranks, "doubled", 0)["weights"].items():
        assert torch.allclose(attempt.weights[name], expected, rtol=0, atol=1e-6), name


def test_every_validation_case_is_judged_once(ranks):
    outcome = _outcome(ranks, "whole4", 0)
    # Seven cases, of which four processes have two, two, two and one.
    assert set(outcome["num_rows"]) == {7}
    assert _outcome(ranks, "whole4", 1)["num_rows"] == []


def test_all_processes_name_the_case_that_one_of_them_has(ranks):
    sentences = {_outcome(ranks, "diverged", rank)["error"] for rank in range(2)}
    assert len(sentences) == 1
    sentence = sentences.pop()
    assert "case_017" in sentence
    assert sentence.count("case_") == 4
    run = RunDirectory.open(str(ranks / "diverged" / "run"))
    assert run.all_pointers() == []

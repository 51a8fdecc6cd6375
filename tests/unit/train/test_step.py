from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tiny_recipe.config import RECIPE, TinyStage
from torch import Tensor, nn

from medtrain.config import FrozenDict, LossTerm, Optim, ParamGroup
from medtrain.errors import ConfigError
from medtrain.train.device import Process
from medtrain.train.optim import match_groups
from medtrain.train.step import Averages, Phase, Tally, TrainStep, check_phases, judge, probe
from medtrain.train.task import Clock

CLOCK = Clock(epoch=1, step=0, fraction=0.0)
CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.near = nn.Linear(3, 1)
        self.far = nn.Linear(3, 1)


class Terms:
    """A task whose terms `near` and `far` use a head each."""

    def losses(self, model: Any, batch: dict[str, Any], clock: Clock) -> dict[str, Tensor]:
        features = model.body(batch["x"])
        terms = {"near": model.near(features).square().mean()}
        terms["far"] = model.far(features).square().mean()
        return terms

    def predict(self, model: Any, batch: dict[str, Any], clock: Clock) -> list[dict[str, Any]]:
        values = model.near(model.body(batch["x"]))[:, 0].tolist()
        return [
            {"case_id": case_id, "value": value}
            for case_id, value in zip(batch["case_id"], values, strict=True)
        ]


def _stage(losses: Mapping[str, LossTerm]) -> TinyStage:
    base = RECIPE.variants["default"]["base"]
    assert isinstance(base, TinyStage)
    terms = losses or {"near": LossTerm(), "far": LossTerm(weight=0.5)}
    return base.model_copy(update={"losses": FrozenDict(terms), "epochs": 10})


def _step(*, precision: str = "fp32", **losses: LossTerm) -> Any:
    torch.manual_seed(0)
    task: Any = Terms()
    stage = _stage(losses).model_copy(update={"precision": precision})
    return TrainStep(Net(), task=task, stage=stage)


def _batch(*case_ids: str) -> dict[str, Any]:
    ids = list(case_ids or "abcd")
    return {"case_id": ids, "x": torch.arange(2.0 * len(ids)).reshape(-1, 2) / 5}


def test_the_loss_is_the_weighted_sum_of_the_active_terms():
    step = _step().eval()
    output = step(_batch(), CLOCK)
    assert output.loss.item() == pytest.approx(
        output.terms["near"].item() + 0.5 * output.terms["far"].item()
    )
    assert not any(term.requires_grad for term in output.terms.values())


def test_a_term_outside_its_time_neither_counts_nor_reaches_its_parameters():
    step = _step(near=LossTerm(), far=LossTerm(starts_epoch=2, ends_epoch=4)).eval()
    output = step(_batch(), CLOCK)
    output.loss.backward()
    assert output.loss.item() == output.terms["near"].item()
    assert output.terms["far"].item() > 0
    assert step.model.far.weight.grad is None
    weights = [step.weights(epoch)["far"] for epoch in range(1, 6)]
    assert weights == [0.0, 1.0, 1.0, 0.0, 0.0]


def test_terms_that_differ_from_the_configured_ones_are_named():
    step = _step(near=LossTerm(), fare=LossTerm())
    with pytest.raises(ConfigError, match="fare is not returned, far is not configured"):
        step(_batch(), CLOCK)


def test_an_epoch_without_an_active_term_is_refused():
    step = _step(near=LossTerm(starts_epoch=2), far=LossTerm(weight=0.0))
    with pytest.raises(ConfigError, match="epoch 1 has none"):
        step(_batch(), CLOCK)


def test_arithmetic_of_half_precision_gives_a_loss_of_single_precision():
    step = _step(precision="bf16")
    seen = []
    step.model.near.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    assert step(_batch(), CLOCK).loss.dtype == torch.float32
    step.predict(_batch(), CLOCK)
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_a_probe_finds_what_the_active_terms_do_not_reach():
    step = _step(near=LossTerm(), far=LossTerm(starts_epoch=5))
    assert probe(step, _batch(), CLOCK) == ["far.weight", "far.bias"]
    assert probe(step, _batch(), Clock(5, 0, 0.0)) == []
    step.model.far.requires_grad_(False)
    assert probe(step, _batch(), CLOCK) == []


def test_a_probe_leaves_nothing_behind():
    step = _step().train()
    before = {name: value.clone() for name, value in step.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    probe(step, _batch(), CLOCK)
    assert torch.equal(torch.rand(1), expected)
    assert all(parameter.grad is None for parameter in step.parameters())
    for name, value in step.state_dict().items():
        assert torch.equal(value, before[name]), name


GROUPS = {
    "body": ParamGroup(match=("body.*", "near.*"), lr=1e-3),
    "far": ParamGroup(match=("far.*",), lr=1e-3),
}


def _check(step: TrainStep, groups: Mapping[str, ParamGroup]) -> None:
    check_phases(
        step,
        match_groups(step.model, Optim(groups=groups)),
        _batch(),
        epochs=range(1, 11),
        clock=lambda epoch: Clock(epoch, 0, 0.0),
    )


def test_a_late_term_asks_its_group_to_start_with_it():
    step = _step(near=LossTerm(), far=LossTerm(starts_epoch=5))
    with pytest.raises(ConfigError) as caught:
        _check(step, GROUPS)
    assert caught.value.problems == (
        "far.* (group far) must get a gradient from near in epochs 1 to 4, but gets none. "
        "Set optim.groups.far.starts_epoch=5.",
    )
    late = ParamGroup(match=("far.*",), lr=1e-3, starts_epoch=5)
    _check(step, {**GROUPS, "far": late})


def test_a_term_that_ends_early_is_found_before_the_first_epoch():
    step = _step(near=LossTerm(), far=LossTerm(ends_epoch=8))
    with pytest.raises(ConfigError, match=r"far\.\* .* in epochs 8 to 10.*lr=null"):
        _check(step, GROUPS)
    _check(step, {**GROUPS, "far": ParamGroup(match=("far.*",), lr=None)})


def test_phases_differ_by_what_learns_and_by_what_counts():
    step = _step(near=LossTerm(), far=LossTerm(starts_epoch=3))
    groups = match_groups(
        step.model,
        Optim(groups={**GROUPS, "far": ParamGroup(match=("far.*",), lr=1.0, starts_epoch=4)}),
    )
    assert Phase.of(step, groups, 2) == Phase(groups=("body",), terms=("near",))
    assert Phase.of(step, groups, 3) == Phase(groups=("body",), terms=("near", "far"))
    assert Phase.of(step, groups, 4) == Phase(groups=("body", "far"), terms=("near", "far"))


def test_judging_means_over_cases_and_sorts_rows_by_case():
    step = _step()
    batches = [_batch("d", "c", "b"), _batch("a")]
    judgement = judge(step, batches, clock=CLOCK, process=Process())
    assert judgement is not None
    assert [row["case_id"] for row in judgement.rows] == ["a", "b", "c", "d"]
    losses = [step(batch, CLOCK).loss.item() for batch in batches]
    assert judgement.losses["loss"] == pytest.approx((3 * losses[0] + losses[1]) / 4)
    assert judgement.losses.keys() == {"loss", "loss_near", "loss_far"}
    assert not step.training


def test_a_doubled_case_counts_once():
    judgement = judge(_step(), [_batch("a", "b"), _batch("a")], clock=CLOCK, process=Process())
    assert judgement is not None
    assert [row["case_id"] for row in judgement.rows] == ["a", "b"]


def test_judging_ends_where_a_stop_is_asked_for():
    answers = iter([False, True])
    batches: Sequence[Any] = [_batch(), _batch()]
    assert (
        judge(_step(), batches, clock=CLOCK, process=Process(), is_stopping=lambda: next(answers))
        is None
    )


def _output(**terms: float) -> Any:
    values = {name: torch.tensor(value) for name, value in terms.items()}
    return type("Output", (), {"loss": sum(values.values()), "terms": values})()


def test_a_tally_sums_over_cases_and_counts_bad_micro_batches():
    tally = Tally(("near", "far"), CPU)
    tally.add(_output(near=1.0, far=2.0), ["a", "b", "c"])
    tally.add(_output(near=3.0, far=0.0), ["d"])
    assert tally.vector(wants_stop=True).tolist() == [0.0, 1.0, 4.0, 12.0, 6.0, 6.0]
    tally.add(_output(near=1.0, far=math.nan), ["e", "f"])
    assert tally.vector(wants_stop=False).tolist()[:3] == [1.0, 0.0, 6.0]
    assert tally.blame(["near", "far"]) == ["far is nan for cases e, f"]
    assert tally.case_ids == list("abcdef")


def test_averages_go_on_from_a_saved_state():
    first, second = Averages(), Averages()
    first.add("loss", 6.0, weight=3.0)
    first.add("norm", 2.0)
    second.load_state_dict(first.state_dict())
    second.add("loss", 1.0, weight=1.0)
    second.add("norm", 4.0)
    assert second.means() == {"loss": 7.0 / 4.0, "norm": 3.0}
    assert first.means()["norm"] == 2.0

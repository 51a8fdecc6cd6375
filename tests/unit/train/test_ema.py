from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from medtrain.config import Ema
from medtrain.train.ema import AveragedModel


def _fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def _model() -> nn.Module:
    model = nn.Linear(1, 1).double()
    _fill(model, 1.0)
    return model


def _value(averaged: AveragedModel) -> float:
    weight = averaged.model.weight
    assert isinstance(weight, torch.Tensor)
    return weight.item()


def test_it_has_its_closed_form():
    model, decay = _model(), 0.9
    averaged = AveragedModel(model, Ema(decay=decay))
    weights = [1.0, 2.0, 4.0, -3.0, 0.5, 7.0]
    for value in weights[1:]:
        _fill(model, value)
        averaged.update(model)
    steps = len(weights) - 1
    expected = decay**steps * weights[0] + (1 - decay) * sum(
        decay ** (steps - 1 - i) * weights[i + 1] for i in range(steps)
    )
    assert _value(averaged) == pytest.approx(expected, abs=1e-12)


def test_it_averages_from_its_first_update_unlike_torchs():
    model = _model()
    ours = AveragedModel(model, Ema(decay=0.9))
    theirs: Any = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    values = []
    for value in (2.0, 4.0, 8.0):
        _fill(model, value)
        ours.update(model)
        theirs.update_parameters(model)
        values.append((_value(ours), theirs.module.weight.item()))
    assert [theirs for _, theirs in values] == pytest.approx([2.0, 2.2, 2.78])
    assert [ours for ours, _ in values] == pytest.approx([1.1, 1.39, 2.051])


def test_warmup_follows_young_weights_closely():
    model = _model()
    averaged = AveragedModel(model, Ema(decay=0.999, warmup=True))
    assert averaged.decay == 1 / 10
    _fill(model, 2.0)
    averaged.update(model)
    assert _value(averaged) == pytest.approx(0.1 * 1.0 + 0.9 * 2.0)
    assert averaged.decay == 2 / 11
    averaged.num_updates = 10**6
    assert averaged.decay == 0.999


def test_buffers_are_copied_whatever_their_type():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    averaged = AveragedModel(model, Ema(decay=0.9))
    model(torch.randn(4, 2))
    averaged.update(model)
    for own, buffer in zip(averaged.model.buffers(), model.buffers(), strict=True):
        assert torch.equal(own, buffer)
    assert averaged.model.state_dict()["1.num_batches_tracked"] == 1


def test_it_never_learns_and_stays_in_eval():
    averaged = AveragedModel(nn.Sequential(nn.Linear(1, 1), nn.Dropout()), Ema())
    assert not any(parameter.requires_grad for parameter in averaged.model.parameters())
    assert not any(module.training for module in averaged.model.modules())


def test_it_goes_on_from_a_saved_state():
    model = _model()
    whole, second = (AveragedModel(model, Ema(decay=0.9, warmup=True)) for _ in range(2))
    _fill(model, 3.0)
    whole.update(model)
    second.load_state_dict(whole.state_dict())
    _fill(model, 5.0)
    whole.update(model)
    second.update(model)
    assert _value(second) == _value(whole)

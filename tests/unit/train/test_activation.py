from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from medtrain.errors import ConfigError
from medtrain.train.activation import checkpoint_activations


class Net(nn.Module):
    blocks: Any

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(2, 2, 3, padding=1),
                nn.BatchNorm2d(2),
                nn.InstanceNorm2d(2, track_running_stats=True),
                nn.ReLU(),
                nn.Dropout(0.3),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(2, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


def _pair() -> tuple[Net, Net]:
    torch.manual_seed(0)
    plain = Net()
    frugal = copy.deepcopy(plain)
    checkpoint_activations(frugal, ["blocks.*"])
    return plain, frugal


def _step(net: Net, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(7)
    loss: torch.Tensor = net(x).square().sum()
    loss.backward()
    return loss


def _gradients(net: Net) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def test_loss_gradients_and_statistics_are_the_same():
    plain, frugal = _pair()
    x = torch.randn(3, 2, 8, 8)
    for _ in range(2):
        assert torch.equal(_step(plain, x), _step(frugal, x))
    assert torch.equal(_gradients(plain), _gradients(frugal))
    for name, expected in plain.state_dict().items():
        assert torch.equal(expected, frugal.state_dict()[name]), name
    # Each layer has seen each batch once, though it has computed it twice.
    assert frugal.blocks[0][1].num_batches_tracked == 2


def test_statistics_are_tracked_again_afterwards():
    _, frugal = _pair()
    _step(frugal, torch.randn(3, 2, 8, 8))
    norm = frugal.blocks[0][1]
    assert norm.momentum == 0.1


def test_frozen_statistics_are_used_in_both_passes():
    plain, frugal = _pair()
    x = torch.randn(3, 2, 8, 8)
    for net in (plain, frugal):
        for block in net.blocks:
            block[1].eval()
        _step(net, x)
    assert torch.equal(_gradients(plain), _gradients(frugal))


def test_activations_are_computed_again_in_the_backward_pass_only():
    _, frugal = _pair()
    calls = []
    frugal.blocks[0][0].register_forward_hook(lambda *_: calls.append(1))
    loss = frugal(torch.randn(3, 2, 8, 8)).sum()
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2
    with torch.no_grad():
        frugal(torch.randn(3, 2, 8, 8))
    assert len(calls) == 3


def test_the_outermost_of_nested_matches_counts_and_names_stay():
    net = Net()
    names = list(net.state_dict())
    # A ModuleList has no forward pass of its own: its children are taken.
    assert checkpoint_activations(net, ["blocks*"]) == ["blocks.0", "blocks.1"]
    assert list(net.state_dict()) == names


def test_a_pattern_without_a_module_is_named():
    with pytest.raises(ConfigError, match=r"'block\.\*' must match a module.*blocks, head"):
        checkpoint_activations(Net(), ["block.*"])

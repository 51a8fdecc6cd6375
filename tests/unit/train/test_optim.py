from __future__ import annotations

import pytest
import torch
from torch import nn

from medtrain.config import Optim, ParamGroup
from medtrain.errors import ConfigError
from medtrain.train.optim import (
    build_optimizer,
    freeze,
    match_groups,
    set_training_mode,
    summarize_names,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)),
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        )
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.dropout(self.encoder(x)))


def _optim(kind="adamw", decay=0.1, spare=True, **groups: ParamGroup) -> Optim:
    return Optim(kind=kind, weight_decay=decay, decay_norm_and_bias=not spare, groups=groups)


ENCODER = ParamGroup(match=("encoder.*",), lr=1e-3)
HEAD = ParamGroup(match=("head.*",), lr=1e-2)


def test_the_first_group_with_a_matching_pattern_owns_a_parameter():
    first = ParamGroup(match=("encoder.0.*",), lr=1e-4)
    rest = ParamGroup(match=("encoder.*", "head.*"), lr=1e-3)
    groups = match_groups(Net(), _optim(first=first, rest=rest))
    assert [group.name for group in groups] == ["first", "rest"]
    assert all(name.startswith("encoder.0.") for name in groups[0].parameters)
    assert len(groups[0].parameters) == 4
    assert "encoder.1.0.weight" in groups[1].parameters
    assert "head.bias" in groups[1].parameters


def test_every_mistake_in_the_groups_is_named_at_once():
    groups = {
        "encoder": ENCODER,
        "late": ParamGroup(match=("encoder.1.*",), lr=1.0),
        "typo": ParamGroup(match=("haed.*",), lr=1.0),
    }
    with pytest.raises(ConfigError) as caught:
        match_groups(Net(), _optim(**groups))
    uncovered, shadowed, dead = caught.value.problems
    assert "none matches head.*" in uncovered
    assert "optim.groups.late must own a parameter" in shadowed
    assert "optim.groups.typo.match: 'haed.*' must match a parameter" in dead
    assert "encoder, dropout, head" in dead


def test_something_must_learn_from_the_first_epoch():
    late = ParamGroup(match=("head.*",), lr=1e-2, starts_epoch=2)
    frozen = ParamGroup(match=("encoder.*",), lr=None)
    with pytest.raises(ConfigError, match="a group that learns from epoch 1"):
        match_groups(Net(), _optim(encoder=frozen, head=late))


def test_names_are_summarized_to_whole_parts():
    names = [name for name, _ in Net().named_parameters()]
    assert summarize_names([n for n in names if n.startswith("encoder.0")], names) == [
        "encoder.0.*"
    ]
    assert summarize_names(["encoder.0.0.weight"], names) == ["encoder.0.0.weight"]
    assert summarize_names([n for n in names if "encoder" in n], names) == ["encoder.*"]


def test_weight_decay_spares_norms_and_biases():
    net = Net()
    own = ParamGroup(match=("head.*",), lr=1e-2, weight_decay=0.5)
    optimizer = build_optimizer(match_groups(net, _optim(encoder=ENCODER, head=own)), _optim(x=own))
    decays = {
        id(parameter): (options["name"], options["weight_decay"])
        for options in optimizer.param_groups
        for parameter in options["params"]
    }
    named = {name: decays[id(parameter)] for name, parameter in net.named_parameters()}
    assert named["encoder.0.0.weight"] == ("encoder", 0.1)
    assert named["encoder.0.0.bias"] == ("encoder", 0.0)
    assert named["encoder.0.1.weight"] == ("encoder", 0.0)
    assert named["head.weight"] == ("head", 0.5)
    assert named["head.bias"] == ("head", 0.0)


def test_weight_decay_can_be_for_all():
    optim = _optim(spare=False, all=ParamGroup(match=("*",), lr=1e-3))
    optimizer = build_optimizer(match_groups(Net(), optim), optim)
    assert [options["weight_decay"] for options in optimizer.param_groups] == [0.1]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)],
)
def test_the_optimizer_is_the_one_named(kind, expected):
    optim = Optim(kind=kind, betas=(0.8, 0.95), eps=1e-4, momentum=0.7, groups={"all": HEAD})
    optimizer = build_optimizer(
        match_groups(nn.ModuleDict({"head": nn.Linear(2, 2)}), optim), optim
    )
    assert type(optimizer) is expected
    options = optimizer.param_groups[0]
    assert options["lr"] == 1e-2
    if kind == "sgd":
        assert options["momentum"] == 0.7
    else:
        assert (options["betas"], options["eps"]) == ((0.8, 0.95), 1e-4)


def test_a_group_without_learning_rate_is_not_in_the_optimizer():
    optim = _optim(encoder=ParamGroup(match=("encoder.*",), lr=None), head=HEAD)
    optimizer = build_optimizer(match_groups(Net(), optim), optim)
    assert {options["name"] for options in optimizer.param_groups} == {"head"}


def test_frozen_modules_stay_in_eval_and_others_train():
    net = Net()
    groups = match_groups(
        net,
        _optim(
            first=ParamGroup(match=("encoder.0.*",), lr=None),
            second=ParamGroup(match=("encoder.1.*",), lr=1e-3, starts_epoch=3),
            head=HEAD,
        ),
    )
    freeze(groups, epoch=1)
    set_training_mode(net)
    assert not any(module.training for module in net.encoder.modules())
    # It has no parameters that could be frozen, and stands outside what is.
    assert net.dropout.training
    assert net.head.training

    freeze(groups, epoch=3)
    set_training_mode(net)
    assert not any(module.training for module in net.encoder[0].modules())
    assert all(module.training for module in net.encoder[1].modules())
    assert net.encoder.training
    assert [p.requires_grad for p in net.encoder[1].parameters()] == [True] * 4


def test_the_update_ratio_is_relative_to_the_weights_before():
    net = nn.ModuleDict({"head": nn.Linear(2, 2, bias=False)})
    (group,) = match_groups(net, _optim(head=HEAD))
    weight = group.parameters["head.weight"]
    with torch.no_grad():
        weight.fill_(2.0)
        before = group.copies()
        weight.add_(0.5)
    assert group.update_ratio(before) == pytest.approx(0.25)

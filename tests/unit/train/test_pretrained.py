from __future__ import annotations

import hashlib
import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medtrain.config import Init
from medtrain.errors import CheckpointError
from medtrain.train.pretrained import load_parent, load_pretrained, random_initialization


def _net(in_chans: int = 1, width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_chans, width, 3), nn.BatchNorm2d(width))


def _saved(net: nn.Module, path, **extra):
    save_file({**net.state_dict(), **extra}, path)
    return path


def test_matching_weights_are_loaded_and_reported(tmp_path):
    other, net = _net(), _net()
    path = _saved(other, tmp_path / "w.safetensors", **{"head.weight": torch.zeros(2)})
    report = load_pretrained(net, path, source="a hub")
    assert torch.equal(net.get_parameter("0.weight"), other.get_parameter("0.weight"))
    assert report.source == "a hub"
    assert report.matched == 6
    assert report.unexpected == ("head.weight",)
    assert report.missing == report.adapted == ()
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert json.loads(json.dumps(report.to_json()))["unexpected"] == ["head.weight"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_is_searched_for_the_usual_names(tmp_path, name):
    other, net = _net(), _net()
    if name.endswith("safetensors"):
        _saved(other, tmp_path / name)
    else:
        torch.save({"state_dict": other.state_dict()}, tmp_path / name)
    load_pretrained(net, tmp_path, source="folder")
    assert torch.equal(net.get_parameter("0.weight"), other.get_parameter("0.weight"))


def test_an_rgb_stem_is_summed_for_a_gray_input_and_gives_the_same_answer(tmp_path):
    rgb, gray = _net(3), _net(1)
    path = _saved(rgb, tmp_path / "w.safetensors")
    report = load_pretrained(gray, path, source="rgb", stem="0.weight")
    film = torch.rand(2, 1, 8, 8)
    assert torch.allclose(gray[0](film), rgb[0](film.expand(-1, 3, -1, -1)), atol=1e-6)
    assert report.adapted == ("0.weight: 3 input channels summed into 1",)


def test_another_network_is_refused_with_its_missing_tensors(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"0.weight": torch.zeros(4, 1, 3, 3)}, path)
    with pytest.raises(CheckpointError, match=r"at least 99%.* supply 1 \(missing: 0\.bias"):
        load_pretrained(_net(), path, source="x")


def test_another_shape_is_refused_and_not_skipped(tmp_path):
    net = _net(1)
    before = net.get_parameter("0.weight").clone()
    path = _saved(_net(3), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"0\.weight 4x3x3x3 instead of 4x1x3x3"):
        load_pretrained(net, path, source="x")
    assert torch.equal(net.get_parameter("0.weight"), before)


def test_a_missing_counter_of_batches_is_no_mismatch(tmp_path):
    state = {n: t for n, t in _net().state_dict().items() if "num_batches" not in n}
    save_file(state, tmp_path / "w.safetensors")
    assert load_pretrained(_net(), tmp_path / "w.safetensors", source="x").missing == ()


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_damaged_files_are_checkpoint_errors(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pretrained(_net(), tmp_path / name, source="x")


def test_absent_files_and_empty_folders_are_checkpoint_errors(tmp_path):
    with pytest.raises(CheckpointError, match="there is none"):
        load_pretrained(_net(), tmp_path / "none", source="x")
    with pytest.raises(CheckpointError, match=r"must hold model\.safetensors"):
        load_pretrained(_net(), tmp_path, source="x")


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="must map names to tensors"):
        load_pretrained(_net(), tmp_path / "w.pt", source="x")


def test_random_initialization_is_said_aloud(caplog):
    with caplog.at_level(logging.WARNING):
        report = random_initialization("the encoder", wanted="timm/efficientnet_b0")
    assert "RANDOM INITIALIZATION" in caplog.text
    assert "timm/efficientnet_b0 was not found" in caplog.text
    assert (report.source, report.matched, report.sha256) == ("random initialization", 0, None)


class _Stage(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def weight(self, part: str) -> torch.Tensor:
        return self.get_parameter(f"{part}.weight")


def _init(new: tuple[str, ...] = (), dropped: tuple[str, ...] = ()) -> Init:
    return Init(source="stage", stage="earlier", new_parts=new, dropped_parts=dropped)


def test_a_parent_gives_its_weights_by_name_and_new_parts_keep_theirs():
    parent = _Stage(encoder=nn.Linear(2, 2))
    child = _Stage(encoder=nn.Linear(2, 2), bottleneck=nn.Linear(2, 2))
    kept = child.weight("bottleneck").clone()
    report = load_parent(child, parent.state_dict(), _init(new=("bottleneck.*",)))
    assert torch.equal(child.weight("encoder"), parent.weight("encoder"))
    assert torch.equal(child.weight("bottleneck"), kept)
    assert report.matched == 2
    assert report.missing == ("bottleneck.weight", "bottleneck.bias")


def test_every_difference_from_the_parent_that_was_not_foreseen_is_named_at_once():
    parent = _Stage(encoder=nn.Linear(2, 2), old=nn.Linear(2, 2), head=nn.Linear(2, 3))
    child = _Stage(encoder=nn.Linear(2, 2), new=nn.Linear(2, 2), head=nn.Linear(2, 2))
    before = child.weight("encoder").clone()
    with pytest.raises(CheckpointError) as caught:
        load_parent(child, parent.state_dict(), _init())
    for words in ("lacks new.weight", "holds old.weight", "head.weight 3x2 instead of 2x2"):
        assert words in str(caught.value)
    assert torch.equal(child.weight("encoder"), before)


def test_a_part_that_is_dropped_and_new_starts_anew_where_its_shape_differs():
    parent = _Stage(gate=nn.Linear(2, 3), encoder=nn.Linear(2, 2))
    child = _Stage(gate=nn.Linear(2, 2), encoder=nn.Linear(2, 2))
    kept = child.weight("gate").clone()
    report = load_parent(child, parent.state_dict(), _init(new=("gate.*",), dropped=("gate.*",)))
    assert torch.equal(child.weight("gate"), kept)
    assert torch.equal(child.weight("encoder"), parent.weight("encoder"))
    assert report.adapted[0] == "gate.weight: 3x2 became 2x2, started anew"


@pytest.mark.parametrize("init", [_init(new=("gate.*",)), _init(dropped=("gate.*",))])
def test_another_shape_must_be_foreseen_on_both_sides(init):
    parent, child = _Stage(gate=nn.Linear(2, 3)), _Stage(gate=nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="has other shapes"):
        load_parent(child, parent.state_dict(), init)

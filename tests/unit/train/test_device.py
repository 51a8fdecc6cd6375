from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from medtrain.config import Job
from medtrain.errors import ConfigError, LaunchError
from medtrain.train.device import (
    Process,
    autocast,
    check_precision,
    choose_device,
    manual_seed,
    share_batchnorm,
    start_process_group,
    to_device,
)

CPU = torch.device("cpu")


@pytest.fixture
def own_determinism() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def test_without_torchruns_variables_a_process_is_alone(monkeypatch, own_determinism):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert start_process_group(Job(device="cpu")) == Process(0, 0, 1, CPU)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == 1


def test_alone_all_exchanges_answer_ones_own():
    process = Process()
    assert process.is_main
    assert process.gather("row") == ["row"]
    assert process.broadcast("pointer") == "pointer"
    assert process.sum(torch.tensor([2.0])).tolist() == [2.0]
    process.barrier()


def test_a_gpu_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", local_rank=1) == torch.device("cuda", 1)
    assert choose_device("cpu", local_rank=1) == CPU


@pytest.mark.parametrize(("wanted", "num_gpus"), [("cuda", 0), ("auto", 2)])
def test_a_process_without_a_gpu_of_its_own_may_try_another_node(monkeypatch, wanted, num_gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(LaunchError, match=f"torch sees {num_gpus}"):
        choose_device(wanted, local_rank=2)


def test_one_seed_repeats_torch_numpy_and_python():
    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    manual_seed(2**64 - 1)
    first = draw()
    manual_seed(2**64 - 1)
    assert draw() == first
    manual_seed(1)
    assert all(new != old for new, old in zip(draw(), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_half_precision_are_refused_in_our_words(dtype):
    with pytest.raises(ConfigError, match="all parameters must be float32, but 2 are of half"):
        check_precision(nn.Linear(2, 2).to(dtype), "fp32", CPU)


def test_fp16_needs_a_gpu_and_bf16_does_not():
    # Not a verdict on the run: another machine may have the GPU.
    with pytest.raises(LaunchError, match="precision=fp16 must have a GPU"):
        check_precision(nn.Linear(2, 2), "fp16", CPU)
    check_precision(nn.Linear(2, 2), "bf16", CPU)


def test_autocast_chooses_the_arithmetic():
    layer, x = nn.Linear(2, 2), torch.zeros(1, 2)
    with autocast("bf16", CPU):
        assert layer(x).dtype == torch.bfloat16
    with autocast("fp32", CPU):
        assert layer(x).dtype == torch.float32


def test_shared_batchnorm_is_refused_on_several_cpus():
    model = nn.BatchNorm1d(2)
    assert share_batchnorm(model, Process()) is model
    with pytest.raises(ConfigError, match="sync_batchnorm=true must have GPUs"):
        share_batchnorm(model, Process(world_size=2))


def test_a_batch_moves_with_its_nested_tensors_and_keeps_the_rest():
    batch = {"case_id": ["a"], "x": torch.zeros(1), "more": {"y": torch.zeros(1)}}
    moved = to_device(batch, torch.device("meta"))
    assert moved["x"].is_meta
    assert moved["more"]["y"].is_meta
    assert moved["case_id"] == ["a"]

"""Where a process computes, and how the processes of a run talk to each other.

Repeating a run: on the CPU it repeats to the bit, because operations without a deterministic kernel
are errors there. On a GPU cuDNN is held to its deterministic kernels, but operations that have none
(bilinear upsampling backwards, scattered additions) are allowed: there a run repeats to rounding.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medtrain.config import Job
from medtrain.errors import ConfigError, LaunchError

_CPU = torch.device("cpu")
Precision = Literal["fp32", "fp16", "bf16"]
_AUTOCAST = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Process:
    """One of the run's processes. With a single one all exchanges are no-ops."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = _CPU

    @property
    def is_main(self) -> bool:
        """Whether this process writes: checkpoints, metrics, rows."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` over all processes, in place; every process gets the same bits."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The picklable `value` of every process, by rank, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable `value` on every process."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Give every process rank 0's buffers, such as BatchNorm's running statistics."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier()


def start_process_group(job: Job) -> Process:
    """Prepare this process: device, threads, determinism and, with peers, the process group.

    Reads the variables that torchrun gives its children; without them the process is alone.

    Raises:
        LaunchError: The device that the job asks for is not there.
    """
    environment = {
        name: int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
    }
    device = choose_device(job.device, local_rank=environment["LOCAL_RANK"])
    process = Process(
        environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"], device
    )
    torch.set_num_threads(job.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    else:
        torch.use_deterministic_algorithms(True)
    if process.world_size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=job.timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    return process


def stop_process_group() -> None:
    """Leave the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(wanted: Literal["auto", "cpu", "cuda"], *, local_rank: int = 0) -> torch.device:
    """The device of one process: the GPU of its local rank, or the CPU."""
    num_gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if local_rank >= num_gpus:
        # Not a verdict: another node may have the GPU that this one lacks.
        raise LaunchError(
            f"process {local_rank} of this node must have a GPU of its own (job.device={wanted}), "
            f"but torch sees {num_gpus}. Set job.processes to the node's number of GPUs, or "
            "job.device=cpu."
        )
    return torch.device("cuda", local_rank)


def manual_seed(seed: int) -> None:
    """Seed torch, numpy and Python with a derived seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The arithmetic of a forward pass; fp32 changes nothing."""
    return torch.autocast(
        device.type,
        dtype=_AUTOCAST[precision] if precision != "fp32" else None,
        enabled=precision != "fp32",
    )


def check_precision(model: nn.Module, precision: Precision, device: torch.device) -> None:
    """Refuse parameters of half precision, and fp16 where there is no GPU.

    Raises:
        ConfigError: Gradients of fp16 parameters can be neither scaled nor added up faithfully.
        LaunchError: fp16 on a CPU: another machine may have the GPU that this one lacks.
    """
    half = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dtype in (torch.float16, torch.bfloat16)
    ]
    if half:
        raise ConfigError(
            f"all parameters must be float32, but {len(half)} are of half precision, such as "
            f"{half[0]}. Set precision=fp16 or bf16 and leave the model in float32: autocast "
            "chooses the arithmetic of each operation."
        )
    if precision == "fp16" and device.type != "cuda":
        raise LaunchError(
            f"precision=fp16 must have a GPU, but this process computes on the {device.type}. "
            "Set precision=bf16 or precision=fp32."
        )


def share_batchnorm(model: nn.Module, process: Process) -> nn.Module:
    """`model` with BatchNorm layers whose statistics are those of all processes' cases.

    Raises:
        ConfigError: Several processes on CPUs, for which torch has no such layer.
    """
    if process.world_size == 1:
        return model
    if process.device.type != "cuda":
        raise ConfigError(
            "sync_batchnorm=true must have GPUs, but this process computes on the "
            f"{process.device.type}. Set sync_batchnorm=false, or job.processes=1 with a larger "
            "batch.micro."
        )
    from medtrain.train.torchvision_ops import ensure_torchvision

    ensure_torchvision()
    # torch's own conversion would drop the activation from timm's BatchNormAct2d.
    from timm.layers.norm_act import convert_sync_batchnorm

    converted: nn.Module = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return converted


def to_device(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on `device`; everything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value

"""Activation checkpointing: chosen modules compute their activations again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from medtrain.errors import ConfigError


def checkpoint_activations(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Make the modules whose names match `patterns` trade memory for computation.

    Of nested matches the outermost counts. Names of parameters do not change. The modules'
    `forward` is replaced by one bound to them, so copies of the model must be taken before.

    Returns:
        Names of the modules.

    Raises:
        ConfigError: A pattern matches no module.
    """
    # Containers of modules have no forward pass of their own.
    names = [
        name
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    ]
    dead = [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]
    if dead:
        raise ConfigError(
            [
                f"activation_checkpointing: pattern '{pattern}' must match a module, but matches "
                f"none. The model's parts are {', '.join(n for n, _ in model.named_children())}."
                for pattern in dead
            ]
        )
    chosen: list[str] = []
    for name in names:
        is_inside = any(name.startswith(f"{outer}.") for outer in chosen)
        if not is_inside and any(fnmatchcase(name, pattern) for pattern in patterns):
            chosen.append(name)
            _checkpoint(model.get_submodule(name))
    return chosen


def _checkpoint(module: nn.Module) -> None:
    compute = module.forward

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_untouched(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return compute(*args, **kwargs)
        return checkpoint(compute, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    module.forward = forward


@contextmanager
def _statistics_untouched(module: nn.Module) -> Iterator[None]:
    """Normalise as before, but leave running statistics alone: they have seen this batch."""
    norms = [
        norm
        for norm in module.modules()
        if isinstance(norm, _NormBase) and norm.training and norm.track_running_stats
    ]
    before = [(norm.momentum, _count(norm).clone()) for norm in norms]
    for norm in norms:
        # Not by withholding the statistics: the pass must save the same tensors as the first.
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            _count(norm).copy_(count)


def _count(norm: _NormBase) -> Tensor:
    assert norm.num_batches_tracked is not None
    return norm.num_batches_tracked

"""Makes torchvision importable where its compiled operators do not fit the installed torch.

timm and torchmetrics import torchvision. The wheel that pairs with a CPU-only torch may hold
operators built against CUDA: their library does not load, and `import torchvision` then fails
while it attaches shape rules to operators that nobody has declared.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from typing import Any

import torch

# What torchvision attaches shape rules to on import; both must be declared before the second try.
_OPERATORS = ("nms", "qnms")
_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_declared: list[torch.library.Library] = []
"""Keeps declarations alive: a library that is garbage-collected takes its operators with it."""


@cache
def ensure_torchvision() -> bool:
    """Import torchvision, declaring its operators where they cannot be loaded.

    Call it before timm is imported.

    Returns:
        Whether the compiled operators work. Without them everything but real calls of nms,
        roi_align and deform_conv is usable.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        _forget("torchvision")
        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        _declared.append(library)
        for name in _OPERATORS:
            library.define(name + _SIGNATURE)
        importlib.import_module("torchvision")
    extension = importlib.import_module("torchvision.extension")
    return bool(extension._has_ops())


def _forget(package: str) -> None:
    """Remove a half-imported package, so that it can be imported again."""
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        del sys.modules[name]

"""Metrics on standard output."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from medtrain.train.tracking.tracker import EndState

_FIRST = ("epoch", "train_loss", "val_loss")
_ASIDE = ("sys_", "lr_", "grad_norm", "update_ratio", "drift", "weight_")
"""Beginnings of names that the short form leaves out."""
_MOST = 8
"""Values on a line of the short form."""


class ConsoleTracker:
    """One line `name=value` each, as Katib's collector reads them; on a terminal one short line an
    epoch."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._is_terminal = self._stream.isatty()

    def log_config(self, values: Mapping[str, Any]) -> None:
        """Nothing: the configuration is in the run directory."""

    def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        if self._is_terminal:
            # Values in the midst of an epoch are for files.
            if "epoch" in values or any(n.startswith(("val_", "test_")) for n in values):
                self._stream.write(_short_line(values, step) + "\n")
        else:
            # In one piece: other processes write to the same pipe.
            self._stream.write("".join(f"{name}={value!r}\n" for name, value in values.items()))
        self._stream.flush()

    def log_artifact(self, path: Path, name: str) -> None:
        """Nothing."""

    def flush(self) -> None:
        self._stream.flush()

    def close(self, *, state: EndState = "finished", timeout_s: float = 30.0) -> None:
        self._stream.flush()


def _short_line(values: Mapping[str, float], step: int) -> str:
    names = [name for name in _FIRST if name in values]
    names += [n for n in values if n not in names and not n.startswith(_ASIDE)]
    parts = [f"{name} {values[name]:.4g}" for name in names[:_MOST]]
    if len(names) > _MOST:
        parts.append(f"+{len(names) - _MOST}")
    return "  ".join([f"step {step}", *parts])

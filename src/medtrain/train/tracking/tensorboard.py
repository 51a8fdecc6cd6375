"""Metrics for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medtrain.config import to_yaml
from medtrain.train.tracking.tracker import EndState
from medtrain.train.tracking.uploads import Uploads


class TensorBoardTracker:
    """Writes event files in a local folder and stores them below `tensorboard/` of the run.

    A scalar's tag is its group and its name, `val/val_mre_mm`, because TensorBoard folds by group.
    """

    def __init__(self, folder: Path, uploads: Uploads, *, attempt: int, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._uploads = uploads
        # TensorBoard hides what earlier attempts logged from `purge_step` on.
        self._writer = SummaryWriter(
            str(folder), purge_step=from_step + 1, filename_suffix=f".{attempt}"
        )

    def log_config(self, values: Mapping[str, Any]) -> None:
        # Four blanks make a block of code in TensorBoard's Markdown.
        text = "".join(f"    {line}\n" for line in to_yaml(dict(values)).splitlines())
        self._writer.add_text("config", text)

    def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{name.partition('_')[0]}/{name}", value, step)

    def log_artifact(self, path: Path, name: str) -> None:
        """Nothing: the run directory has it."""

    def flush(self) -> None:
        self._writer.flush()
        self._store()

    def close(self, *, state: EndState = "finished", timeout_s: float = 30.0) -> None:
        self._writer.close()
        self._store()

    def _store(self) -> None:
        for path in sorted(self._folder.glob("events.out.tfevents.*")):
            self._uploads.put(f"tensorboard/{path.name}", path.read_bytes())

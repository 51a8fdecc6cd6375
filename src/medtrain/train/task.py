"""What a system answers so that it can be trained: the five questions of the `Task` protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.data import DataLoader

from medtrain.config import StageConfig
from medtrain.data.cases import Row
from medtrain.data.manifest import Case
from medtrain.data.splits import SplitRow

Batch = dict[str, Any]
"""A batch; `case_id` (list of text) is always in it, tensors have the batch as first dimension."""


@dataclass(frozen=True)
class Clock:
    """The time inside a stage."""

    epoch: int
    """Epoch of the stage, 1-based."""
    step: int
    """Optimizer steps done before this one, 0-based."""
    fraction: float
    """Part of the stage that is done, 0 to 1."""


@dataclass(frozen=True)
class Shard:
    """Which part of an epoch one process reads, and from where it goes on.

    Training shards are padded to equal length by the sampler; shards for `predict` are not padded.
    """

    rank: int
    world_size: int
    seed: int
    epoch: int
    """1-based; the order of an epoch is a function of (seed, epoch)."""
    first_batch: int = 0
    """Micro-batches of this epoch that are already done (resume in mid-epoch)."""
    is_training: bool = True
    """Shuffled and augmented; False: in order, as they are."""


@dataclass(frozen=True)
class TaskContext:
    """All that a task may know: everything is on the local disk already."""

    stage: StageConfig
    cases: Mapping[str, Case]
    """The manifest's cases that `split` names, by case id."""
    split: Sequence[SplitRow]
    """The rows of the split table that this run uses."""
    data_path: Path
    """Node-local root under which the cases' files lie."""
    cache_path: Path
    """Node-local folder for decoded data; shared by the processes of a node, kept between runs."""
    weights: Mapping[str, Path | None]
    """Pretrained weights by name, as `recipes/<system>/data.py` lists them; None: random
    initialisation was allowed."""
    allow_missing_weights: bool = False
    """A checkpoint will overwrite all weights, so pretrained ones need not be loaded."""


class Task(Protocol):
    """The five questions in which systems differ."""

    def build_model(self) -> nn.Module:
        """A new model, with pretrained weights loaded where the configuration names them. Wrapping
        is the trainer's."""

    def build_loader(self, split: str, shard: Shard) -> DataLoader[Batch]:
        """Batches of `stage.batch.micro` cases of `split` (`train`, `val`, `test`) for one
        process."""

    def losses(self, model: nn.Module, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Named, unweighted scalar loss terms; the same names as `stage.losses`, whatever the
        epoch."""

    def predict(self, model: nn.Module, batch: Batch, clock: Clock) -> list[Row]:
        """One row a case: `case_id`, plain numbers and small arrays."""

    def summarize(self, rows: Sequence[Row]) -> dict[str, float]:
        """Metrics of a whole split, without the split's prefix; undefined ones are absent."""


TaskBuilder = Callable[[TaskContext], Task]
"""`build_task` of `recipes/<system>/task.py`."""

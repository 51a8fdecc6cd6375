"""Training and judging the tiny system."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from medtrain.data.cases import Row
from medtrain.data.loaders import (
    CaseDataset,
    Sample,
    build_loader,
    prediction_batches,
    training_batches,
)
from medtrain.train.task import Batch, Clock, Shard, TaskContext
from tiny_recipe.config import TinyModel, TinyStage
from tiny_recipe.metrics import summarize


class TinyNet(nn.Module):
    """Six numbers to features, and these to one number a head."""

    def __init__(self, config: TinyModel) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(config.width) if config.batchnorm else nn.Identity()
        self.encoder = nn.Sequential(
            nn.Linear(6, config.width), norm, nn.Tanh(), nn.Dropout(config.dropout)
        )
        self.head = nn.Linear(config.width, 1)
        self.aux = nn.Linear(config.width, 1) if config.aux else None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """`value` (B,), and `aux` (B,) where there is such a head."""
        features = self.encoder(x)
        values = {"value": self.head(features)[:, 0]}
        if self.aux is not None:
            values["aux"] = self.aux(features)[:, 0]
        return values


class TinyTask:
    """The five questions."""

    def __init__(self, context: TaskContext) -> None:
        assert isinstance(context.stage, TinyStage)
        self.context = context
        self.stage: TinyStage = context.stage

    def build_model(self) -> nn.Module:
        """A new network."""
        return TinyNet(self.stage.model)

    def build_loader(self, split: str, shard: Shard) -> DataLoader[Batch]:
        """Batches of `x` (B, 6) and `y` (B,)."""
        case_ids = sorted(row.case_id for row in self.context.split if row.role == split)
        read = self._read_noisy if shard.is_training else self._read
        dataset = CaseDataset(case_ids, read, seed=shard.seed, epoch=shard.epoch)
        share = {
            "micro": self.stage.batch.micro,
            "rank": shard.rank,
            "world_size": shard.world_size,
        }
        batches = (
            training_batches(len(case_ids), **share, seed=shard.seed, epoch=shard.epoch)
            if shard.is_training
            else prediction_batches(len(case_ids), **share)
        )
        return build_loader(
            dataset,
            batches,
            first_batch=shard.first_batch,
            num_workers=self.stage.job.loader_workers,
        )

    def losses(self, model: nn.Module, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Squared errors of the heads."""
        found = model(batch["x"])
        targets = {"value": batch["y"], "aux": batch["x"].sum(dim=1)}
        return {name: F.mse_loss(values, targets[name]) for name, values in found.items()}

    def predict(self, model: nn.Module, batch: Batch, clock: Clock) -> list[Row]:
        """Prediction and error of every case."""
        values = model(batch["x"])["value"].float().tolist()
        rows = zip(batch["case_id"], values, batch["y"].tolist(), strict=True)
        return [
            {"case_id": case_id, "value": value, "error": value - y} for case_id, value, y in rows
        ]

    def summarize(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `metrics`."""
        return summarize(rows)

    def _read(self, case_id: str, seed: int) -> Sample:
        if self.stage.data.delay_s:
            time.sleep(self.stage.data.delay_s)
        file = self.context.data_path / self.context.cases[case_id].files["numbers"].path
        content = json.loads(file.read_text())
        return {"x": torch.tensor(content["x"]), "y": torch.tensor(content["y"])}

    def _read_noisy(self, case_id: str, seed: int) -> Sample:
        sample = self._read(case_id, seed)
        noise = torch.randn(6, generator=torch.Generator().manual_seed(seed))
        return {**sample, "x": sample["x"] + self.stage.data.noise * noise}


def build_task(context: TaskContext) -> TinyTask:
    """The task of one stage on one split."""
    return TinyTask(context)

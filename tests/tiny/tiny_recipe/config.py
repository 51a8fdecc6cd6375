"""Recipe `tiny`: two stages, a second head in the second."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from medtrain.config import (
    Batch,
    Checkpoint,
    Criterion,
    Data,
    Init,
    Job,
    LossTerm,
    Optim,
    ParamGroup,
    Section,
    StageConfig,
    location,
)
from medtrain.recipes.recipe import Gate, Recipe


class TinyData(Data):
    """Cases of six numbers, and how they reach the model."""

    protocol: Literal["holdout_5fold"] = "holdout_5fold"
    noise: float = Field(0.1, ge=0.0)
    """Standard deviation of what augmentation adds."""
    delay_s: float = location(0.0, ge=0.0)
    """How long reading one case takes: time to interrupt a run."""


class TinyModel(Section):
    """An encoder with two heads."""

    width: int = Field(8, ge=1)
    batchnorm: bool = False
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    aux: bool = False
    """A second head, for the loss term `aux`."""


class TinyStage(StageConfig):
    """A stage of the tiny system."""

    data: TinyData = TinyData()
    model: TinyModel = TinyModel()


def _stage(name: str, **changes: object) -> TinyStage:
    values: dict[str, object] = {
        "name": f"tiny:{name}",
        "epochs": 6,
        "batch": Batch(global_=8, micro=4),
        "model": TinyModel(batchnorm=True, dropout=0.2),
        "optim": Optim(
            groups={
                "encoder": ParamGroup(match=("encoder.*",), lr=1e-2),
                "head": ParamGroup(match=("head.*",), lr=2e-2),
            }
        ),
        "losses": {"value": LossTerm()},
        "checkpoint": Checkpoint(
            criteria={
                "best_mae": Criterion(metric="val_mae", mode="min"),
                "best_loss": Criterion(metric="val_loss", mode="min"),
            },
            monitor="best_mae",
        ),
        "job": Job(device="cpu", timeout_s=60),
    }
    return TinyStage.model_validate({**values, **changes})


RECIPE = Recipe(
    system="tiny",
    title="Tiny (tests)",
    stage_type=TinyStage,
    variants={
        "default": {
            "base": _stage("base"),
            "finetune": _stage(
                "finetune",
                epochs=3,
                init=Init(source="stage", stage="base", new_parts=("aux.*",)),
                model=TinyModel(batchnorm=True, dropout=0.2, aux=True),
                optim=Optim(
                    groups={
                        "encoder": ParamGroup(match=("encoder.*",), lr=1e-3),
                        "heads": ParamGroup(match=("head.*", "aux.*"), lr=1e-2),
                    }
                ),
                losses={"value": LossTerm(), "aux": LossTerm(weight=0.5)},
            ),
        }
    },
    gates={"default": Gate(metric="test_mae", at_most=5.0, min_cases=2)},
    package="tiny_recipe",
)

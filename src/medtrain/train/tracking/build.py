"""Puts together the trackers that a site wants."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from medtrain.errors import ConfigError
from medtrain.storage.metrics import read_metrics
from medtrain.storage.runs import RunDirectory
from medtrain.train.tracking.console import ConsoleTracker
from medtrain.train.tracking.jsonlines import JsonLinesTracker, SegmentFollower
from medtrain.train.tracking.tracker import CompositeTracker, Tracker
from medtrain.train.tracking.uploads import Uploads

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunLabels:
    """What a tracking server shows of a run, and finds it by."""

    system: str
    variant: str
    stage: str
    """The stage, or the verb where there is none."""
    key: str
    """The run key."""
    is_synthetic: bool
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.system}/{self.variant}:{self.stage}"

    def as_tags(self) -> dict[str, str]:
        """Names and values of tags."""
        return {
            "medtrain.system": self.system,
            "medtrain.variant": self.variant,
            "medtrain.stage": self.stage,
            "medtrain.run_key": self.key,
            "medtrain.synthetic": str(self.is_synthetic).lower(),
            **self.others,
        }


def build_tracker(
    run: RunDirectory,
    *,
    attempt: int,
    from_step: int,
    folder: Path,
    labels: RunLabels,
    tracking_uri: str = "",
    artifact_root: str | None = None,
    experiment: str = "medtrain",
    use_tensorboard: bool = True,
    use_wandb: bool = False,
) -> CompositeTracker:
    """The tracker of rank 0 for one start of a run.

    Args:
        run: Where the metrics go first.
        attempt: Number of this start.
        from_step: Optimizer steps done when it begins: 0, or those of the checkpoint resumed from.
        folder: Scratch of this attempt on the local disk.
        labels: What the run is.
        tracking_uri: MLflow's server or SQLite file; empty: no MLflow.
        artifact_root: Where a new MLflow experiment keeps artifacts; None: the server's choice.
        experiment: First part of the MLflow experiment's name; the system is the second.
        use_tensorboard: Whether to write event files.
        use_wandb: Whether to log to Weights & Biases too.

    Raises:
        ConfigError: `use_wandb` without the package.
    """
    uploads = Uploads(run.store)
    segments = folder / "metrics"
    record = JsonLinesTracker(segments, uploads, attempt=attempt, from_step=from_step)
    guests: list[Tracker] = [ConsoleTracker()]
    if use_tensorboard:
        from medtrain.train.tracking.tensorboard import TensorBoardTracker

        guests.append(
            TensorBoardTracker(
                folder / "tensorboard", uploads, attempt=attempt, from_step=from_step
            )
        )
    if tracking_uri:
        from medtrain.train.tracking.mlflow import MlflowRun, MlflowTracker

        target = MlflowRun(
            tracking_uri=tracking_uri,
            experiment=f"{experiment}/{labels.system}",
            artifact_root=artifact_root,
            run_uri=run.uri,
            name=labels.name,
            tags=labels.as_tags(),
        )
        guests.append(
            MlflowTracker(
                target,
                SegmentFollower(segments, attempt=attempt),
                earlier=lambda: [row for row in read_metrics(run) if row.attempt < attempt],
            )
        )
    if use_wandb:
        guests += _wandb(folder / "wandb", labels, project=experiment)
    return CompositeTracker(record, guests)


def _wandb(folder: Path, labels: RunLabels, *, project: str) -> list[Tracker]:
    from medtrain.train.tracking.wandb import WandbTracker

    try:
        return [
            WandbTracker(
                folder, project=project, key=labels.key, name=labels.name, tags=labels.as_tags()
            )
        ]
    except ConfigError:
        raise
    # Its service may be out of reach in many ways, and none of them is worth a training.
    except Exception as error:
        log.warning("Weights & Biases is left out: %s", str(error).partition("\n")[0])
        return []

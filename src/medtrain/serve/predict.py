"""Use a model package on raw images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from medtrain.data.cases import Row, rows_to_csv
from medtrain.data.manifest import Case
from medtrain.data.splits import SplitRow
from medtrain.errors import DataError
from medtrain.recipes import part, resolve
from medtrain.serve.package import verify_package
from medtrain.settings import settings
from medtrain.train.device import choose_device
from medtrain.train.step import TrainStep
from medtrain.train.task import Clock, Shard, TaskContext

log = logging.getLogger("medtrain.worker")

ROLE = "predict"
"""The split of images that have no truth."""


def predict(
    package_path: Path, images: Sequence[Path], out: Path, *, overrides: Sequence[str] = ()
) -> list[Row]:
    """Predict on raw images and write one table and a picture of each.

    Args:
        package_path: Folder of a pulled model; verified before anything of it is used.
        images: Image files; their stems name the rows.
        out: Folder for `predictions.csv` and the pictures.
        overrides: Assignments on top of the model's configuration, such as a pixel size.

    Raises:
        RegistryError: The package is damaged.
        DataError: An image is missing or unreadable, or two have one name.
    """
    package = verify_package(package_path)
    tree = yaml.safe_load(package.read_text("config.yaml"))
    overrides = [*package.details.get("overrides", []), *overrides]
    resolution = resolve(tree["name"], overrides, file=tree, file_name="config.yaml")
    stage, recipe = resolution.stage, resolution.recipe
    missing = [str(image) for image in images if not image.is_file()]
    if missing:
        raise DataError(f"every image must be a file, but these are none: {', '.join(missing)}")
    cases = {image: part(recipe, "data").case_from_file(image, stage.data) for image in images}
    by_id = {case.case_id: case for case in cases.values()}
    if len(by_id) < len(cases):
        raise DataError("images must have different names, because these name the rows")
    task = part(recipe, "task").build_task(
        TaskContext(
            stage=stage,
            cases=by_id,
            split=[_row(case) for case in by_id.values()],
            data_path=Path("/"),
            cache_path=settings().cache,
            weights={},
            allow_missing_weights=True,
        )
    )
    model = task.build_model()
    model.load_state_dict(load_file(package.weights))
    device = choose_device(stage.job.device)
    step = TrainStep(model.to(device), task=task, stage=stage)
    step.eval()
    shard = Shard(rank=0, world_size=1, seed=stage.seed, epoch=1, is_training=False)
    clock = Clock(epoch=stage.epochs, step=0, fraction=1.0)
    with torch.no_grad():
        rows = [
            row for batch in task.build_loader(ROLE, shard) for row in step.predict(batch, clock)
        ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "predictions.csv").write_text(rows_to_csv(rows))
    shown = part(recipe, "evaluation")
    image_of = {case.case_id: image for image, case in cases.items()}
    for row in rows:
        picture = out / f"{row['case_id']}.png"
        shown.draw_prediction(
            row, image_of[row["case_id"]], picture, is_synthetic=package.details["is_synthetic"]
        )
        log.info("%s", "\n".join([row["case_id"], *shown.describe_prediction(row, stage.data)]))
        log.info("picture: %s", picture)
    log.info("table in pixels of the image: %s", out / "predictions.csv")
    return rows


def _row(case: Case) -> SplitRow:
    return SplitRow(case.case_id, case.group, ROLE, case.checksum)

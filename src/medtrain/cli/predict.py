"""`medtrain predict`: use a pulled model on raw images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from medtrain.errors import JobFailed


def predict(
    package: Annotated[Path, typer.Argument(help="Folder of a pulled model.")],
    images: Annotated[list[Path], typer.Argument(help="Raw images.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for results.")] = Path(
        "predictions"
    ),
    mm_per_pixel: Annotated[
        float | None, typer.Option(help="Pixel size of the images, where it is not the model's.")
    ] = None,
) -> None:
    """Predict on raw images: one table in original pixels and millimeters, one picture each.

    [bold]Example[/bold]

      medtrain models pull cephalometric@champion model && medtrain predict model film.bmp
    """
    argv = [sys.executable, "-m", "medtrain.worker", "predict", str(package)]
    argv += [*map(str, images), "--out", str(out)]
    argv += ["--mm-per-pixel", str(mm_per_pixel)] if mm_per_pixel else []
    code = subprocess.run(argv, check=False).returncode
    if code:
        raise JobFailed("no prediction was made; the line above says why")

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
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE, such as the images' data.mm_per_pixel=0.1."),
    ] = None,
) -> None:
    """Predict on raw images: one table in original pixels and millimeters, one picture each.

    [bold]Example[/bold]

      medtrain models pull cephalometric@champion model && medtrain predict model film.bmp
    """
    argv = [sys.executable, "-m", "medtrain.worker", "predict", str(package)]
    argv += [*map(str, images), "--out", str(out)]
    argv += [argument for text in set_ or [] for argument in ("--set", text)]
    code = subprocess.run(argv, check=False).returncode
    if code:
        raise JobFailed("no prediction was made; the line above says why")

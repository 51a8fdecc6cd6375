"""`medtrain demo`: the platform's main job, from raw files to a prediction of a pulled model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from medtrain.errors import RegistryError

SYSTEM, VARIANT = "cephalometric", "smoke"
NUM_FILMS = 40


def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Your own folder in the ISBI 2015 layout; default: synthetic films."),
    ] = None,
) -> None:
    """Train, judge, register, pull and use a small landmark model, in minutes on two CPU cores.

    [bold]Examples[/bold]

      medtrain demo

      medtrain demo --data /data/isbi2015
    """
    from medtrain.flow import say
    from medtrain.pipelines import find_pipeline
    from medtrain.pipelines.local import run_locally
    from medtrain.recipes import find, part
    from medtrain.registry import model_name, pull
    from medtrain.settings import settings

    home = settings().home.absolute()
    say(f"local state: {home}")
    _, recipe = find(f"{SYSTEM}/{VARIANT}")
    if data is None:
        data = home / "demo-films-synthetic"
        if not data.exists():
            unfinished = data.with_name(data.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            part(recipe, "data").synthesize(unfinished, num_images=NUM_FILMS, seed=0)
            unfinished.rename(data)
        say(f"data: {NUM_FILMS} synthetic films in the ISBI 2015 layout, {data}")
    say(f"the demo's own gate, not a clinical one: {recipe.gates[VARIANT]}")
    run_locally(
        find_pipeline(SYSTEM),
        {"variant": VARIANT, "overrides": [f"data.root={data.absolute()}"]},
    )

"""`medtrain demo`: the platform's main job, from raw files to a prediction of a pulled model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medtrain.errors import RegistryError

if TYPE_CHECKING:
    from medtrain.plans import PreparedData
    from medtrain.storage.runs import RunDirectory

SYSTEM, VARIANT = "cephalometric", "smoke"
NUM_FILMS = 64


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
    from medtrain.plans import PreparedData, plan_prepare
    from medtrain.recipes import find
    from medtrain.registry import CANDIDATE, find_version, model_name, pull
    from medtrain.settings import settings
    from medtrain.storage.runs import RunDirectory

    home = settings().home.absolute()
    say(f"local state: {home}")
    _, recipe = find(f"{SYSTEM}/{VARIANT}")
    if data is None:
        data = _synthetic_films(home / "demo-films-synthetic")
    say(f"gate of this demo, no clinical bound: {recipe.gates[VARIANT]}")
    overrides = [f"data.root={data.absolute()}"]
    outputs = run_locally(find_pipeline(SYSTEM), {"variant": VARIANT, "overrides": overrides})
    if not outputs["model"]:
        raise RegistryError("the gate refused the model, so there is none to pull; see the report")

    name = model_name(SYSTEM, VARIANT)
    version = find_version(f"{name}@{CANDIDATE}")
    package = pull(f"{name}@{CANDIDATE}", home / "demo-model" / f"version-{version.version}")
    say(f"pulled {name}@{CANDIDATE}: {package.folder}")

    evaluation = RunDirectory.open(version.tags["evaluation_uri"])
    prepared = PreparedData.load(plan_prepare(f"{SYSTEM}/{VARIANT}", overrides).run_uri)
    film = _first_judged_film(evaluation, prepared, data)
    _predict(package.folder, film, home / "demo-predictions" / f"version-{version.version}")

    say("")
    say("Try next:")
    say(f"  medtrain models show {name}@{CANDIDATE}")
    say(f"  medtrain run {SYSTEM}/{VARIANT} data.root={data} baseline:epochs=40")
    say(f"  medtrain show {SYSTEM}:transformer    (the published sizes; the demo's are its own)")


def _synthetic_films(folder: Path) -> Path:
    """A small synthetic data set in the true layout, written once and whole."""
    from medtrain.flow import say
    from medtrain.recipes.cephalometric.synthetic import synthesize

    if not folder.exists():
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        synthesize(unfinished, num_cases=NUM_FILMS, seed=0)
        unfinished.rename(folder)
    say(f"data: {NUM_FILMS} synthetic films in the ISBI 2015 layout: {folder}")
    return folder


def _first_judged_film(evaluation: RunDirectory, prepared: PreparedData, root: Path) -> Path:
    from medtrain.data.splits import splits_from_csv

    first = min(row.case_id for row in splits_from_csv(evaluation.read_text("split.csv")))
    return root / prepared.cases[first].files["image"].path


def _predict(package: Path, film: Path, out: Path) -> None:
    from medtrain.cli.predict import predict
    from medtrain.flow import say

    if (out / "predictions.csv").exists():
        say(f"predicted before: {out}")
    else:
        predict(package, [film], out)

"""`medtrain data`: make, check and divide data sets."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

    from medtrain.config import Data
    from medtrain.data.manifest import Problem
    from medtrain.data.prepare import DataModule

app = typer.Typer(
    name="data",
    help="Make, check and divide data sets.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

_NAME_HELP = "SYSTEM or SYSTEM/VARIANT, such as cephalometric/smoke."
_OVERRIDES_HELP = "Assignments key=value, such as data.root=/data/isbi2015."

Name = Annotated[str, typer.Argument(metavar="NAME", help=_NAME_HELP)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help=_OVERRIDES_HELP)
]


@app.command()
def synth(
    system: Annotated[str, typer.Argument(help="The system, such as cephalometric.")],
    folder: Annotated[Path, typer.Argument(help="A new or an empty folder.")],
    images: Annotated[int, typer.Option("--images", "--cases", min=1, help="Cases to make.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    oddity: Annotated[
        list[str] | None,
        typer.Option(help="Plant an oddity of real data sets; repeatable. `list` shows them."),
    ] = None,
) -> None:
    """Make a synthetic data set in the published layout.

    [bold]Examples[/bold]

      medtrain data synth cephalometric films

      medtrain data synth cephalometric films --images 100 --seed 7 --oddity rgb_stored

      medtrain data synth cephalometric films --oddity list
    """
    from rich.table import Table

    from medtrain.recipes import find, part

    console = _console()
    module = part(find(system)[1], "data")
    if oddity and "list" in oddity:
        table = Table("oddity", "what it is", "data check says")
        for name, item in module.ODDITIES.items():
            says = f"{item.severity}: {item.problem}" if item.problem else "nothing"
            table.add_row(name, item.description, says)
        console.print(table)
        return
    with _progress(console, "drawing") as show:
        module.synthesize(folder, num_cases=images, seed=seed, oddities=oddity or (), progress=show)
    console.print(
        f"{folder}: {images} synthetic cases. Now: medtrain data check {system} data.root={folder}",
        soft_wrap=True,
    )


@app.command()
def check(name: Name, overrides: Overrides = None) -> None:
    """Read a whole data set and show everything that is wrong with it. Exit code 1 on errors.

    [bold]Examples[/bold]

      medtrain data check cephalometric data.root=/data/isbi2015

      medtrain data check cephalometric data.root=s3://films/isbi data.annotator=senior
    """
    from medtrain.data.prepare import root_uri
    from medtrain.storage.stores import open_store

    console = _console()
    _, module, data = _resolved(name, overrides)
    uri = root_uri(data)
    with _progress(console, "reading") as show:
        scan = module.scan(open_store(uri), data, progress=show)
    if scan.problems:
        _print_problems(console, scan.problems)
    num_errors = len(scan.errors)
    num_warnings = sum(problem.severity == "warning" for problem in scan.problems)
    kind = "synthetic data" if scan.manifest.is_synthetic else "not marked as synthetic"
    console.print(
        f"{uri}: cases that are fine: {scan.num_fine}; errors: {num_errors}; "
        f"warnings: {num_warnings}; {kind}.",
        soft_wrap=True,
        highlight=False,
    )
    if num_errors:
        raise typer.Exit(1)


@app.command()
def split(
    name: Name,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be recorded; write nothing.")
    ] = False,
) -> None:
    """Record who trains, who validates and who tests. What is recorded stays; new cases join.

    [bold]Examples[/bold]

      medtrain data split cephalometric data.root=/data/isbi2015

      medtrain data split cephalometric data.root=/data/isbi2015 data.protocol=challenge --dry-run
    """
    from rich.table import Table

    from medtrain.data.prepare import dataset_home, prepare, preview, root_uri
    from medtrain.settings import settings
    from medtrain.storage.stores import open_store

    console = _console()
    system, module, data = _resolved(name, overrides)
    home = dataset_home(settings().storage, system, data)
    with _progress(console, "reading") as show:
        act = preview if dry_run else prepare
        prepared = act(module, root=open_store(root_uri(data)), data=data, home=home, progress=show)
    table = Table("role", "cases")
    for role, count in prepared.counts.items():
        table.add_row(role, str(count))
    console.print(table)
    console.print(
        f"protocol {prepared.protocol}, part {prepared.part}, manifest "
        f"{prepared.fingerprint[:12]}{', synthetic data' if prepared.is_synthetic else ''}",
        highlight=False,
    )
    console.print(
        "Nothing was written." if dry_run else f"Recorded in {home.uri}",
        soft_wrap=True,
        highlight=False,
    )


def _resolved(name: str, overrides: Sequence[str] | None) -> tuple[str, DataModule, Data]:
    """System, data module and `data` of the first stage, or of the stage that is named."""
    from dataclasses import replace

    from medtrain.recipes import find, part, resolve

    parsed, recipe = find(name)
    stage = parsed.stage or next(iter(recipe.stages(parsed.variant)))
    resolution = resolve(replace(parsed, stage=stage), list(overrides or ()))
    return parsed.system, cast("DataModule", part(recipe, "data")), resolution.stage.data


def _console() -> Console:
    """Standard output; in a file or a pipe lines are long, so that names stay whole."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


@contextmanager
def _progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A line that shows how far a command is, where there is a terminal."""
    with console.status(what) as status:
        yield lambda done, total: status.update(f"{what} {done}/{total}")


def _print_problems(console: Console, problems: Sequence[Problem]) -> None:
    from collections import Counter

    from rich.markup import escape
    from rich.table import Column, Table

    colors = {"error": "red", "warning": "yellow", "info": "dim"}
    table = Table("severity", Column("kind", no_wrap=True), "case")
    table.add_column("file", overflow="fold")
    table.add_column("message", overflow="fold", ratio=1)
    for problem in problems:
        table.add_row(
            f"[{colors[problem.severity]}]{problem.severity}[/]",
            problem.kind,
            *map(escape, (problem.case_id, problem.file, problem.message)),
        )
    console.print(table)
    for (severity, kind), count in Counter((p.severity, p.kind) for p in problems).items():
        console.print(f"{count} {severity}: {kind}", highlight=False)

"""`medtrain report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_uri: Annotated[
        str, typer.Argument(metavar="RUN_URI", help="Run directory of a stage or an evaluation.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write the page here instead."),
    ] = None,
    is_opened: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser.")
    ] = False,
) -> None:
    """Write the page of a run: figures, curves, data, what it was made from.

    The page is one file without any link to elsewhere. Without -o it is stored in the run
    directory as report.html.

    Example: medtrain report medtrain-local/storage/runs/cephalometric/smoke/evaluate/0123abcd
    """
    from medtrain.errors import ConfigError
    from medtrain.report.page import render_report, write_report
    from medtrain.storage.runs import RunDirectory

    run = RunDirectory.open(run_uri)
    if not run.attempts():
        raise ConfigError(
            f"RUN_URI must be the directory of a run that was started, but {run.uri} holds no "
            "attempts. `medtrain run` prints the directory of each run."
        )
    if output is None:
        where = write_report(run)
    else:
        if output.is_dir():
            raise ConfigError(f"--output must be a file, but {output} is a folder")
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(render_report(run), encoding="utf-8")
        where = str(output.absolute())
    typer.echo(where)
    if is_opened:
        typer.launch(str(_local_copy(where)))


def _local_copy(where: str) -> Path:
    """The page as a file; one in a bucket is copied to a temporary folder."""
    if "://" not in where:
        return Path(where)
    import tempfile

    from medtrain.storage.stores import open_store

    folder, _, name = where.rpartition("/")
    path = Path(tempfile.mkdtemp(prefix="medtrain-report-")) / name
    path.write_bytes(open_store(folder).read(name))
    return path

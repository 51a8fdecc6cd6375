"""The one door: `medtrain`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from medtrain.cli import data, demo, doctor, models, predict, recipes, report, run
from medtrain.errors import ConfigError, MedTrainError

app = typer.Typer(
    name="medtrain",
    help="Train, judge and register medical-imaging models: on a laptop as on a cluster.",
    epilog="Begin with: medtrain demo. Then: medtrain recipes, show NAME, run NAME.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Commands in circulation write options with - and with _.
        "token_normalize_func": lambda word: word.replace("_", "-"),
    },
)

for command in (
    recipes.recipes,
    recipes.show,
    doctor.doctor,
    run.run,
    run.evaluate,
    run.compile_pipeline,
):
    app.command(name=command.__name__.partition("_")[0])(command)
app.command(name="predict")(predict.predict)
app.command(name="report")(report.report)
app.command(name="demo")(demo.demo)
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="models")

_verbose = False


def _show_version(wanted: bool) -> None:
    if wanted:
        from medtrain import __version__

        typer.echo(f"medtrain {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Show the trace of an error.")
    ] = False,
) -> None:
    """Options of every command."""
    global _verbose
    _verbose = verbose


def main() -> None:
    """Run a command; a mistake is one line that says what to do (`-v` for the trace)."""
    try:
        app()
    except MedTrainError as error:
        if _verbose:
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.stderr.write(
            "interrupted: what was finished is kept; the same command goes on from there\n"
        )
        sys.exit(130)
    except Exception as error:
        if _verbose:
            raise
        sys.stderr.write(f"error: unexpected {type(error).__name__}: {error} (-v for the trace)\n")
        sys.exit(1)

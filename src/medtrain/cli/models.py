"""`medtrain models`: what is registered, who is champion, and a copy of it."""

from __future__ import annotations

import getpass
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from medtrain.registry import RegisteredVersion

app = typer.Typer(
    help="Show, promote and fetch registered models.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Reference = Annotated[
    str, typer.Argument(help="NAME@ALIAS or NAME:VERSION, such as cephalometric@champion.")
]


@app.command("list")
def list_versions() -> None:
    """List the versions of every model, newest first.

    [bold]Example[/bold]

      medtrain models list
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from medtrain.registry import list_models

    versions = list_models()
    if not versions:
        typer.echo(
            "no model is registered yet; `medtrain run SYSTEM` registers what the gate accepts"
        )
        return
    table = Table("model", "version", "aliases", "gate's metric", "value", "data", "registered")
    for version in versions:
        verdict = version.verdict
        value = verdict.value if verdict else None
        table.add_row(
            version.name,
            str(version.version),
            escape(", ".join(version.aliases)),
            escape(verdict.bound) if verdict else "",
            "" if value is None else f"{value:.4g}",
            "[bold red]SYNTHETIC[/]" if version.is_synthetic else "real",
            version.time,
        )
    Console().print(table)


@app.command()
def show(reference: Reference) -> None:
    """Show a version: what the gate said, where it comes from, what people noted, how to get it.

    [bold]Examples[/bold]

      medtrain models show cephalometric@champion

      medtrain models show cephalometric:3
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from medtrain.registry import find_version
    from medtrain.settings import settings
    from medtrain.storage.tracking import shown

    version = find_version(reference)
    if version.is_synthetic:
        typer.echo("SYNTHETIC data: this model shows that the software works, and nothing else")
    table = Table(show_header=False, title=version.reference, title_justify="left")
    for label, value in _facts(version).items():
        table.add_row(label, escape(value))
    for metric, number in sorted(version.metrics.items()):
        table.add_row(metric, f"{number:.6g}")
    for said in version.notes:
        table.add_row(f"note, {said['time']}", escape(f"{said['author']}: {said['text']}"))
    Console().print(table)
    folder = f"{version.name}-{version.version}"
    uri = f"models:/{version.name}/{version.version}"
    typer.echo(f"Get it:          medtrain models pull {version.reference} {folder}")
    typer.echo(
        f"Without medtrain: MLFLOW_TRACKING_URI={shlex.quote(shown(settings().tracking))} "
        f"mlflow artifacts download --artifact-uri {uri} --dst-path {folder}"
    )


def _facts(version: RegisteredVersion) -> dict[str, str]:
    tags = version.tags
    verdict = version.verdict
    gate = "not judged" if verdict is None else "accepted" if verdict.accepted else "refused"
    return {
        "aliases": ", ".join(version.aliases) or "none",
        "registered": version.time,
        "gate": f"{gate}: {tags.get('gate_reason', '')}",
        "looks at its sealed test": tags.get("looks", "unknown"),
        "former champion": tags.get("former_champion", "none"),
        "trained by run": tags.get("run_key", "unknown"),
        "evaluation": tags.get("evaluation_uri", "unknown"),
        "data fingerprint": tags.get("data_fingerprint", "unknown"),
        "code fingerprint": tags.get("code_fingerprint", "unknown"),
        "commit": tags.get("commit", "") or "unknown",
        "MLflow run": version.run_id,
        "package": version.source,
    }


@app.command()
def promote(reference: Reference) -> None:
    """Make a version the champion. The gate must have accepted it; the choice is yours.

    [bold]Example[/bold]

      medtrain models promote cephalometric@candidate
    """
    from medtrain.registry import promote as promote_version

    version = promote_version(reference)
    former = version.tags.get("former_champion")
    typer.echo(
        f"{version.reference} is champion"
        + (f"; the one before was {version.name}:{former}" if former else "")
    )


@app.command()
def pull(
    reference: Reference,
    folder: Annotated[Path, typer.Argument(help="New folder for the model package.")],
) -> None:
    """Copy a version's package into a folder and verify every file of it.

    [bold]Examples[/bold]

      medtrain models pull cephalometric@champion model

      medtrain models pull cephalometric:3 model-3
    """
    from medtrain.registry import pull as pull_version

    package = pull_version(reference, folder)
    if package.details["is_synthetic"]:
        typer.echo("SYNTHETIC data: this model shows that the software works, and nothing else")
    typer.echo(f"{reference} is in {folder}, verified; its card: {folder / 'README.md'}")


@app.command()
def note(
    reference: Reference,
    text: Annotated[str, typer.Argument(help="The judgement. No names of patients.")],
    author: Annotated[str, typer.Option(help="Whose judgement it is; default: your login.")] = "",
) -> None:
    """Record a person's judgement with a version, such as a radiologist's score.

    [bold]Example[/bold]

      medtrain models note cephalometric@candidate "9/10 on 20 films" --author "Dr. Abe"
    """
    from medtrain.registry import note as note_version

    version = note_version(reference, text, author=author or getpass.getuser())
    typer.echo(f"{version.reference} has {len(version.notes)} note(s)")

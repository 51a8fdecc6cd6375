"""`medtrain recipes` and `medtrain show`: what can be run, and what a run would be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from medtrain.recipes import Recipe, Resolution

Name = Annotated[
    str, typer.Argument(help="SYSTEM\\[/VARIANT]\\[:STAGE]\\[+OVERLAY…]", metavar="NAME")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Assignments; STAGE:KEY=VALUE concerns one stage alone.", metavar="[KEY=VALUE]…"
    ),
]
Config = Annotated[
    Path | None, typer.Option(help="YAML file of values, such as a run's config.yaml.")
]
_WIDEST_COLUMN = 64


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="SYSTEM or SYSTEM/VARIANT, for its details.", metavar="[NAME]"),
    ] = None,
) -> None:
    """List systems with their variants, stages, overlays and gates.

    [bold]Examples[/bold]

      medtrain recipes

      medtrain recipes cephalometric

      medtrain recipes cephalometric/small
    """
    from medtrain.recipes import find
    from medtrain.recipes import recipes as known

    if name is None:
        for recipe in known().values():
            typer.echo(f"{typer.style(recipe.system, bold=True)}: {recipe.title}")
            for row in _aligned(_variants(recipe)):
                typer.echo(f"  {row}")
            overlays = "  ".join(f"+{overlay}" for overlay in recipe.overlays)
            typer.echo(f"  overlays: {overlays or 'none'}\n")
        typer.echo("Details: medtrain recipes SYSTEM. Values: medtrain show SYSTEM/VARIANT:STAGE.")
        return
    parsed, recipe = find(name)
    is_one = "/" in name or parsed.stage is not None
    for variant in [parsed.variant] if is_one else recipe.variants:
        typer.echo(typer.style(f"{recipe.system}/{variant}", bold=True))
        typer.echo(f"  gate: {recipe.gates[variant]}")
        for row in _aligned(_stages(recipe, variant)):
            typer.echo(f"  {row}")
        typer.echo()
    for overlay, assignments in recipe.overlays.items():
        typer.echo(f"{typer.style(f'+{overlay}', bold=True)}: {' '.join(assignments)}")
    rules = ", ".join(dict.fromkeys(f"{rule.id} ({rule.title})" for rule in recipe.rules))
    typer.echo(f"\nrules of its own: {rules or 'none'}. Ask them: medtrain doctor {name}")


def show(
    name: Name,
    overrides: Overrides = None,
    config: Config = None,
    plain: Annotated[bool, typer.Option("--plain", help="Values without their origins.")] = False,
    identity: Annotated[
        bool, typer.Option("--identity", help="Only what decides a run's numbers, and its digest.")
    ] = False,
) -> None:
    """Print a resolved stage as YAML, each value with its origin; without a stage, all of them.

    Origins are default, recipe, overlay NAME, file PATH and override. What is printed for one stage
    is itself a file for --config.

    [bold]Examples[/bold]

      medtrain show cephalometric:baseline

      medtrain show cephalometric/small:transformer+oom_rescue optim.groups.decoder.lr=3e-4

      medtrain show cephalometric:baseline --config runs/…/config.yaml epochs=20 --plain
    """
    from medtrain.config import digest, dump, to_yaml
    from medtrain.config import identity as identity_of

    for number, resolution in enumerate(resolve_all(name, overrides or [], config)):
        if number:
            typer.echo("---")
        if identity:
            tree = identity_of(resolution.stage)
            typer.echo(f"# digest: {digest(tree)}")
            typer.echo(to_yaml(tree), nl=False)
        elif plain:
            typer.echo(to_yaml(dump(resolution.stage)), nl=False)
        else:
            _echo_with_origins(dump(resolution.stage), resolution.origins)


def resolve_all(name: str, overrides: Sequence[str], config: Path | None) -> Iterator[Resolution]:
    """Resolve the named stage, or each of the variant's; the first wrong one is a ConfigError."""
    from medtrain.errors import ConfigError
    from medtrain.overrides import for_stage, is_whole, read_config_file
    from medtrain.recipes import find, resolve

    parsed, recipe = find(name)
    tree = read_config_file(config) if config else None
    stages = tuple(recipe.stages(parsed.variant))
    chosen = stages if parsed.stage is None else (parsed.stage,)
    if tree is not None and is_whole(tree) and parsed.stage is None:
        raise ConfigError(
            f"--config {config} is the configuration of '{tree['name']}': name that stage"
        )
    found = []
    for stage in chosen:
        try:
            found.append(
                resolve(
                    replace(parsed, stage=stage),
                    for_stage(overrides, stage, stages=stages),
                    file=tree,
                    file_name=str(config),
                )
            )
        except ConfigError as error:
            if parsed.stage is not None:
                raise
            advice = f"in stage {stage}: {{}} (for another stage alone: STAGE:KEY=VALUE)"
            raise ConfigError([advice.format(problem) for problem in error.problems]) from error
    return iter(found)


def _variants(recipe: Recipe) -> Iterator[tuple[str, ...]]:
    yield "variant", "stages", "gate"
    for variant, stages in recipe.variants.items():
        yield variant, " → ".join(stages), str(recipe.gates[variant])


def _stages(recipe: Recipe, variant: str) -> Iterator[tuple[str, ...]]:
    yield "stage", "epochs", "batch", "starts from", "losses", "chosen by"
    for name, stage in recipe.stages(variant).items():
        losses = " + ".join(f"{term.weight:g} {loss}" for loss, term in stage.losses.items())
        start = stage.init.stage or stage.init.source
        chosen_by = f"{stage.monitor.mode} {stage.monitor.metric}"
        yield name, str(stage.epochs), str(stage.batch.global_), start, losses, chosen_by


def _aligned(rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _echo_with_origins(tree: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    lines = list(_lines(tree, origins, ()))
    width = min(_WIDEST_COLUMN, max(len(text) for text, origin in lines if origin))
    for text, origin in lines:
        line = f"{text.ljust(width)}  # {origin}" if origin else text
        typer.echo(typer.style(line, dim=True) if origin == "default" else line)


def _lines(
    tree: Mapping[str, Any], origins: Mapping[str, str], path: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Lines of YAML with the origin of the value, which is empty for the head of a section."""
    from medtrain.config import to_flow
    from medtrain.mistakes import join_path

    for key, value in tree.items():
        head = f"{'  ' * len(path)}{to_flow(key)}:"
        if isinstance(value, dict) and value:
            yield head, ""
            yield from _lines(value, origins, (*path, key))
        else:
            yield f"{head} {to_flow(value)}", origins[join_path((*path, key))]

"""`medtrain doctor`: what is wrong with a run, before it costs anything."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medtrain.cli.recipes import Config, Name, Overrides, resolve_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medtrain.recipes.recipe import Finding, NotEvaluated

_COLORS = {"error": "red", "warning": "yellow", "info": "blue"}


def doctor(
    name: Name,
    overrides: Overrides = None,
    config: Config = None,
    facts: Annotated[
        Path | None, typer.Option(help="JSON file of facts, such as num_train_cases.")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="Accept this rule's errors; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Examine a stage, or all stages of a variant. Exit code 1 on errors that are not allowed.

    [bold]Examples[/bold]

      medtrain doctor cephalometric

      medtrain doctor cephalometric:transformer batch.global=32 --facts facts.json

      medtrain doctor cephalometric/seed_literal --allow D-M03
    """
    from medtrain.doctor.examine import blocking, check_allowed, examine
    from medtrain.doctor.facts import read_facts

    known = read_facts(facts) if facts else {}
    findings: list[Finding] = []
    not_evaluated: list[NotEvaluated] = []
    stops: list[Finding] = []
    stages: list[str] = []
    for resolution in resolve_all(name, overrides or [], config):
        check_allowed(resolution.recipe, allow or [])
        diagnosis = examine(resolution, known)
        findings += diagnosis.findings
        not_evaluated += diagnosis.not_evaluated
        stops += blocking(diagnosis, allow or [])
        stages.append(resolution.stage.name)
    if as_json:
        answer = {
            "findings": [asdict(finding) for finding in findings],
            "not_evaluated": [asdict(rule) for rule in not_evaluated],
            "blocking": sorted({finding.rule for finding in stops}),
        }
        typer.echo(json.dumps(answer, indent=1, ensure_ascii=False))
    else:
        _print(stages, findings, not_evaluated, stops)
    if stops:
        raise typer.Exit(1)


def _print(
    stages: Sequence[str],
    findings: Sequence[Finding],
    not_evaluated: Sequence[NotEvaluated],
    stops: Sequence[Finding],
) -> None:
    for stage in stages:
        typer.echo(typer.style(stage, bold=True))
        own = [finding for finding in findings if finding.stage == stage]
        for finding in own:
            severity = typer.style(finding.severity, fg=_COLORS[finding.severity])
            allowed = " (allowed)" if finding.severity == "error" and finding not in stops else ""
            typer.echo(f"  {finding.rule} {severity}{allowed}: {finding.message}")
        if not own:
            typer.echo("  nothing to report")
    for fact in dict.fromkeys(rule.fact for rule in not_evaluated):
        lacking = [rule for rule in not_evaluated if rule.fact == fact]
        rules = ", ".join(dict.fromkeys(rule.rule for rule in lacking))
        typer.echo(f"not evaluated: {rules} (no fact {fact}): run `{lacking[0].command}`")
    counts = ", ".join(
        f"{sum(finding.severity == severity for finding in findings)} {severity}"
        for severity in _COLORS
    )
    typer.echo(f"{counts}; {len(stops)} of them forbid a run")

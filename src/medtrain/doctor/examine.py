"""Examine a resolved stage: every rule is asked, and none is silent about what it lacks."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medtrain.doctor import batch, schedule, weights
from medtrain.doctor.facts import problems_of
from medtrain.errors import ConfigError
from medtrain.recipes import Recipe, Resolution
from medtrain.recipes.recipe import Finding, NotEvaluated, Rule

RULES: tuple[Rule, ...] = (*batch.RULES, *schedule.RULES, *weights.RULES)
"""The rules that concern every system; each recipe adds its own."""

_BY_HAND = "medtrain doctor {name} --facts FILE"
_ORDER = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True)
class Diagnosis:
    """All that the doctor has to say about a stage, errors first."""

    findings: tuple[Finding, ...]
    not_evaluated: tuple[NotEvaluated, ...]


def rules_of(recipe: Recipe) -> tuple[Rule, ...]:
    """The rules by which stages of `recipe` are examined."""
    return (*RULES, *recipe.rules)


def examine(resolution: Resolution, facts: Mapping[str, Any]) -> Diagnosis:
    """Ask every rule about a resolved stage.

    Args:
        resolution: What `resolve` answers.
        facts: What is known beyond the configuration; unusable values are a ConfigError. Names
        that no rule needs are ignored.
    """
    problems = problems_of(facts)
    if problems:
        raise ConfigError(problems)
    facts = {**facts, "original_stage": resolution.original}
    stage = resolution.stage
    findings, not_evaluated = [], []
    for rule in rules_of(resolution.recipe):
        if not rule.applies(stage):
            continue
        absent = [fact for fact in rule.needs if fact not in facts]
        for fact in absent:
            command = rule.supplied_by or _BY_HAND
            not_evaluated.append(
                NotEvaluated(rule.id, fact, command.format(name=resolution.name), stage.name)
            )
        if absent:
            continue
        message = rule.check(stage, facts)
        if message is not None:
            findings.append(Finding(rule.id, rule.severity, message, stage.name))
    findings.sort(key=lambda finding: _ORDER[finding.severity])
    return Diagnosis(tuple(findings), tuple(not_evaluated))


def blocking(diagnosis: Diagnosis, allowed: Sequence[str]) -> list[Finding]:
    """The errors that forbid a run, unless their rules are allowed aloud."""
    return [
        finding
        for finding in diagnosis.findings
        if finding.severity == "error" and finding.rule not in allowed
    ]


def check_allowed(recipe: Recipe, allowed: Sequence[str]) -> None:
    """Refuse names of rules that do not exist: they would allow nothing, silently."""
    problems = list(_unknown_rules(recipe, allowed))
    if problems:
        raise ConfigError(problems)


def _unknown_rules(recipe: Recipe, allowed: Sequence[str]) -> Iterator[str]:
    known = sorted({rule.id for rule in rules_of(recipe)})
    for given in allowed:
        if given not in known:
            nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
            hint = f"Did you mean {nearest[0]}? " if nearest else ""
            yield f"--allow {given} names no rule. {hint}Known: {', '.join(known)}."

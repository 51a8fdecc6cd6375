import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtrain.doctor.examine import (
    RULES,
    Diagnosis,
    blocking,
    check_allowed,
    examine,
    rules_of,
)
from medtrain.doctor.facts import read_facts
from medtrain.errors import ConfigError
from medtrain.recipes import Resolution, recipes, resolve
from medtrain.recipes.recipe import Finding, NotEvaluated, Rule

RESOLUTION = resolve("cephalometric/small:baseline")


def with_rules(*rules: Rule) -> Resolution:
    return replace(RESOLUTION, recipe=replace(RESOLUTION.recipe, rules=rules))


def only(rule: str, diagnosis: Diagnosis) -> list[Any]:
    said: list[Any] = [*diagnosis.findings, *diagnosis.not_evaluated]
    return [answer for answer in said if answer.rule == rule]


def test_a_rule_that_says_something_becomes_a_finding_of_the_stage() -> None:
    rule = Rule("D-T01", "warning", "test", lambda stage, facts: f"{stage.epochs} are few")
    assert only("D-T01", examine(with_rules(rule), {})) == [
        Finding("D-T01", "warning", "50 are few", "cephalometric/small:baseline")
    ]


def test_a_rule_that_says_nothing_finds_nothing() -> None:
    rule = Rule("D-T01", "warning", "test", lambda stage, facts: None)
    assert only("D-T01", examine(with_rules(rule), {})) == []


def test_a_rule_without_its_fact_says_what_would_supply_it() -> None:
    rule = Rule(
        "D-T01",
        "error",
        "test",
        lambda stage, facts: str(facts["num_x"]),
        needs=("num_x",),
        supplied_by="medtrain data check {name}",
    )
    assert only("D-T01", examine(with_rules(rule), {})) == [
        NotEvaluated(
            "D-T01",
            "num_x",
            "medtrain data check cephalometric/small:baseline",
            "cephalometric/small:baseline",
        )
    ]
    (finding,) = only("D-T01", examine(with_rules(rule), {"num_x": 3}))
    assert finding.message == "3"


def test_a_rule_that_does_not_apply_misses_no_fact() -> None:
    rule = Rule(
        "D-T01",
        "error",
        "test",
        lambda stage, facts: "x",
        needs=("num_x",),
        applies=lambda stage: False,
    )
    assert only("D-T01", examine(with_rules(rule), {})) == []


def test_rules_see_the_stage_as_the_recipe_has_it() -> None:
    rule = Rule("D-T01", "info", "test", lambda s, facts: str(facts["original_stage"].epochs))
    changed = resolve("cephalometric/small:baseline", ["epochs=3"])
    resolution = replace(changed, recipe=replace(changed.recipe, rules=(rule,)))
    (finding,) = only("D-T01", examine(resolution, {}))
    assert finding.message == "50"


def test_errors_come_first() -> None:
    severities: list[Any] = ["info", "error", "warning", "error"]
    rules = [Rule("D-T01", severity, "test", lambda s, f: "x") for severity in severities]
    found = only("D-T01", examine(with_rules(*rules), {}))
    assert [finding.severity for finding in found] == ["error", "error", "warning", "info"]


def test_errors_block_unless_their_rule_is_allowed() -> None:
    error, warning = (
        Finding("D-T01", "error", "x", "a:b"),
        Finding("D-T02", "warning", "x", "a:b"),
    )
    diagnosis = Diagnosis((error, warning), ())
    assert blocking(diagnosis, []) == [error]
    assert blocking(diagnosis, ["D-T02"]) == [error]
    assert blocking(diagnosis, ["D-T01"]) == []


def test_an_allowed_rule_must_exist() -> None:
    recipe = recipes()["cephalometric"]
    check_allowed(recipe, ["D-M03", "D-X05"])
    with pytest.raises(ConfigError, match=r"D-M33 names no rule\. Did you mean D-M03"):
        check_allowed(recipe, ["D-M03", "D-M33"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_train_cases", 0),
        ("num_train_cases", 1.5),
        ("num_parameters", "many"),
        ("num_parameters", True),
        ("has_acquisition_order", 1),
        ("film_size", [1935]),
        ("film_size", [0, 3]),
        ("mm_per_pixel", float("inf")),
    ],
)
def test_a_fact_of_another_kind_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"fact {name} must be "):
        examine(RESOLUTION, {name: value})


def test_facts_that_no_rule_knows_do_not_disturb() -> None:
    facts = {"num_cases": 0, "subsets": {"a": 1}, "inter_observer_mm": None}
    assert examine(RESOLUTION, facts) == examine(RESOLUTION, {})


def test_facts_are_read_from_json(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({"num_train_cases": 3}))
    assert read_facts(path) == {"num_train_cases": 3}


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_other_files_are_no_facts(text: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"--facts .*facts\.json must"):
        read_facts(path)


def test_every_rule_has_a_test_of_its_own() -> None:
    """The files of this folder and the recipes' name each rule that is asked."""
    folders = [Path(__file__).parent, Path(__file__).parents[2] / "recipes"]
    text = "".join(p.read_text() for folder in folders for p in folder.rglob("test_*rules*.py"))
    for recipe in recipes().values():
        for rule in rules_of(recipe):
            assert f'"{rule.id}"' in text, rule.id
    assert {rule.id for rule in RULES} <= {r.id for r in rules_of(recipes()["cephalometric"])}


NUMBERS = st.integers(1, 10**6)


@given(
    epochs=NUMBERS,
    first=NUMBERS,
    factor=st.integers(1, 10**6),
    unit=st.sampled_from(["epochs", "steps", "%"]),
    patience=NUMBERS,
    starts=NUMBERS,
    decay=st.floats(0, 1, exclude_max=True),
    cases=NUMBERS,
)
def test_no_configuration_is_too_strange_to_be_examined(
    epochs: int,
    first: int,
    factor: int,
    unit: str,
    patience: int,
    starts: int,
    decay: float,
    cases: int,
) -> None:
    resolution = resolve(
        "cephalometric/smoke:multitask",
        [
            f"epochs={epochs}",
            f"optim.schedule={{kind: cosine_restarts, first: {first}{unit}, factor: {factor}}}",
            f"early_stop.patience={patience}",
            f"optim.groups.encoder.starts_epoch={starts}",
            f"ema.decay={decay}",
        ],
    )
    facts = {"num_train_cases": cases, "num_parameters": 10**7, "landmark_16_from_7_mm": {}}
    assert not examine(resolution, facts).not_evaluated

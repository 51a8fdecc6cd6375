import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from medtrain.config import StageConfig, digest, dump, identity, to_yaml
from medtrain.doctor.examine import examine
from medtrain.errors import ConfigError
from medtrain.overrides import (
    apply_overrides,
    file_as_overrides,
    format_assignment,
    is_whole,
    leaves,
    parse_assignment,
    validate,
)
from medtrain.recipes import RecipeName, chain, recipes, resolve

STAGES = {
    stage.name: stage
    for recipe in recipes().values()
    for stages in recipe.variants.values()
    for stage in stages.values()
}
LEAVES = [
    (name, path, value) for name, stage in STAGES.items() for path, value in leaves(dump(stage))
]
every_stage = pytest.mark.parametrize("name", STAGES)
every_recipe = pytest.mark.parametrize("system", recipes())


def nested(path: tuple[str, ...], value: Any) -> Any:
    for part in reversed(path):
        value = {part: value}
    return value


def other(value: Any) -> Any:
    """A value that differs from `value` and is of its type, as far as that can be told."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 1e-3
    if isinstance(value, list):
        return [*value[:-1], other(value[-1])] if value else ["x.*"]
    return f"{value}x" if isinstance(value, str) else 1


@every_stage
def test_a_stage_is_called_by_the_name_that_resolves_to_it(name: str) -> None:
    assert resolve(name).stage == STAGES[name]


@every_stage
def test_a_stage_survives_json_and_yaml(name: str) -> None:
    stage = STAGES[name]
    for tree in (json.loads(json.dumps(dump(stage))), yaml.safe_load(to_yaml(dump(stage)))):
        assert validate(type(stage), tree) == stage
        assert is_whole(tree)
        assert resolve(name, file=tree).stage == stage


@every_stage
def test_every_value_can_be_set_to_itself_by_text_and_by_file(name: str) -> None:
    stage = STAGES[name]
    plain = list(leaves(dump(stage)))
    texts = [format_assignment(path, value) for path, value in plain]
    assert resolve(name, texts).stage == stage
    few_values = [
        override
        for path, value in plain
        for override in file_as_overrides(nested(path, value), origin="file", replaces=False)
    ]
    assert apply_overrides(stage, few_values) == stage


@given(leaf=st.sampled_from(LEAVES))
def test_another_value_means_the_same_by_text_and_by_file(
    leaf: tuple[str, tuple[str, ...], Any],
) -> None:
    name, path, value = leaf
    if path == ("name",):
        return
    answers: list[StageConfig | list[str]] = []
    for words in (
        {"overrides": [format_assignment(path, other(value))]},
        {"file": nested(path, other(value))},
    ):
        try:
            answers.append(resolve(name, **words).stage)
        except ConfigError as error:
            answers.append(list(error.problems))
    assert answers[0] == answers[1]


@given(leaf=st.sampled_from(LEAVES))
def test_identity_changes_with_every_value_but_those_that_say_where(
    leaf: tuple[str, tuple[str, ...], Any],
) -> None:
    name, path, value = leaf
    try:
        changed = resolve(name, [format_assignment(path, other(value))]).stage
    except ConfigError:
        return
    before = identity(STAGES[name])
    is_hashed = ".".join(path) in {".".join(p) for p in hashed_paths(before)}
    assert (digest(identity(changed)) != digest(before)) == is_hashed


def hashed_paths(tree: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of an identity, in which an ordered dict is a list of pairs."""
    if isinstance(tree, list) and tree and all(isinstance(p, list) for p in tree):
        tree = dict(tree)
    if not isinstance(tree, dict) or not tree:
        return [prefix]
    return [path for key, item in tree.items() for path in hashed_paths(item, (*prefix, key))]


@every_stage
def test_identity_does_not_depend_on_the_order_of_keys(name: str) -> None:
    stage = STAGES[name]

    def turned(tree: Any, path: tuple[str, ...] = ()) -> Any:
        if not isinstance(tree, dict):
            return tree
        items = list(tree.items())
        if path != ("optim", "groups"):
            items.reverse()
        return {key: turned(item, (*path, key)) for key, item in items}

    again = validate(type(stage), turned(dump(stage)))
    assert digest(identity(again)) == digest(identity(stage))


@every_stage
def test_identity_says_nothing_of_places(name: str) -> None:
    moved = resolve(name, ["data.root=/elsewhere", "job.attempts=9", "job.memory=3Gi"]).stage
    assert digest(identity(moved)) == digest(identity(STAGES[name]))


@every_recipe
def test_stages_follow_each_other(system: str) -> None:
    recipe = recipes()[system]
    for variant, stages in recipe.variants.items():
        for number, stage in enumerate(stages):
            assert chain(f"{system}/{variant}:{stage}") == tuple(stages)[: number + 1]


@every_recipe
def test_every_variant_has_a_gate_on_the_test_split(system: str) -> None:
    recipe = recipes()[system]
    assert set(recipe.gates) == set(recipe.variants)
    for gate in recipe.gates.values():
        assert gate.metric.startswith("test_")
        assert gate.min_cases > 0


@every_stage
def test_criteria_judge_validation_in_one_direction_a_metric(name: str) -> None:
    checkpoint = STAGES[name].checkpoint
    modes: dict[str, str] = {}
    for criterion in checkpoint.criteria.values():
        assert criterion.metric.startswith("val_")
        metric = criterion.metric.removeprefix("val_").removeprefix("ema_")
        assert modes.setdefault(metric, criterion.mode) == criterion.mode
        assert criterion.mode == "min" or "loss" not in metric
    parsed = RecipeName.parse(name)
    gate = recipes()[parsed.system].gates[parsed.variant]
    if STAGES[name].monitor.metric.removeprefix("val_") == gate.metric.removeprefix("test_"):
        assert STAGES[name].monitor.mode == gate.mode


@every_stage
def test_every_overlay_resolves(name: str) -> None:
    overlays = recipes()[RecipeName.parse(name).system].overlays
    for overlay, texts in overlays.items():
        origins = resolve(f"{name}+{overlay}").origins
        for text in texts:
            assert origins[parse_assignment(text).key] == f"overlay {overlay}"


@every_recipe
def test_overlays_have_the_form_of_assignments(system: str) -> None:
    for texts in recipes()[system].overlays.values():
        for text in texts:
            override = parse_assignment(text)
            assert format_assignment(override.path, override.value) == text


@every_stage
def test_every_value_has_an_origin(name: str) -> None:
    resolution = resolve(name)
    assert set(resolution.origins.values()) == {"default", "recipe"}
    assert list(resolution.origins) == [".".join(p) for p, _ in leaves(dump(resolution.stage))]


@every_stage
def test_rules_are_asked_or_say_what_they_lack(name: str) -> None:
    diagnosis = examine(resolve(name), {})
    assert all(finding.stage == name for finding in diagnosis.findings)
    assert all(rule.command for rule in diagnosis.not_evaluated)


@every_recipe
def test_rules_name_themselves(system: str) -> None:
    for rule in recipes()[system].rules:
        assert rule.id.startswith("D-")
        assert rule.title

"""The list of systems, and `resolve`: from a name and overrides to one frozen `StageConfig`.

A package of the user's own joins the list by an entry point of the group `medtrain.recipes`, whose
name is the system and whose value is the `Recipe`, such as `retina = "my_retina.config:RECIPE"`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import MappingProxyType, ModuleType
from typing import Any, Literal, get_args

from pydantic import BaseModel

from medtrain.config import StageConfig, dump, key_of
from medtrain.errors import ConfigError
from medtrain.mistakes import join_path, shown
from medtrain.overrides import (
    Override,
    apply_overrides,
    file_as_overrides,
    is_whole,
    leaves,
    parse_assignment,
)
from medtrain.recipes.cephalometric.config import RECIPE as CEPHALOMETRIC
from medtrain.recipes.recipe import Recipe, RecipeName

_OURS = (CEPHALOMETRIC,)


@cache
def recipes() -> Mapping[str, Recipe]:
    """All systems, ours first, by name."""
    found = {recipe.system: recipe for recipe in _OURS}
    for entry in entry_points(group="medtrain.recipes"):
        try:
            recipe = entry.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"entry point medtrain.recipes '{entry.name}' must be importable, but "
                f"{entry.value} is not: {error}. Repair or uninstall its package."
            ) from error
        if not isinstance(recipe, Recipe):
            raise ConfigError(
                f"entry point medtrain.recipes '{entry.name}' must be a Recipe, "
                f"but is {entry.value}"
            )
        if recipe.system in found:
            raise ConfigError(
                f"entry point medtrain.recipes '{entry.name}' repeats the system '{recipe.system}'"
            )
        found[recipe.system] = recipe
    return MappingProxyType(found)


@dataclass(frozen=True)
class Resolution:
    """A resolved stage, with the origin of every value."""

    name: RecipeName
    recipe: Recipe
    stage: StageConfig
    origins: Mapping[str, str]
    """Path → `default`, `recipe`, `overlay NAME`, `file PATH` or `override`, for every single
    value."""

    @property
    def original(self) -> StageConfig:
        """The stage as the recipe has it, before overlays, file and overrides."""
        assert self.name.stage is not None
        return self.recipe.stages(self.name.variant)[self.name.stage]


def find(name: RecipeName | str) -> tuple[RecipeName, Recipe]:
    """The recipe that a name means; a ConfigError names the nearest system, variant, stage or
    overlay."""
    if isinstance(name, str):
        name = RecipeName.parse(name)
    recipe = recipes().get(name.system)
    if recipe is None:
        raise ConfigError(_no_such("system", name.system, recipes()))
    if name.variant not in recipe.variants:
        raise ConfigError(_no_such(f"variant of {name.system}", name.variant, recipe.variants))
    stages = recipe.stages(name.variant)
    if name.stage is not None and name.stage not in stages:
        raise ConfigError(_no_such(f"stage of {name.system}/{name.variant}", name.stage, stages))
    for overlay in name.overlays:
        if overlay not in recipe.overlays:
            raise ConfigError(_no_such(f"overlay of {name.system}", overlay, recipe.overlays))
    return name, recipe


def resolve(
    name: RecipeName | str,
    overrides: Sequence[str] = (),
    *,
    file: Mapping[str, Any] | None = None,
    file_name: str = "file",
) -> Resolution:
    """Turn a name and its overrides into one frozen stage; a ConfigError lists every mistake.

    Args:
        name: `SYSTEM[/VARIANT]:STAGE[+OVERLAY…]`.
        overrides: Assignments `key=value`, applied last.
        file: The content of a `--config` file, applied after overlays and before `overrides`.
        file_name: How the file is called in origins.
    """
    name, recipe = find(name)
    stages = recipe.stages(name.variant)
    if name.stage is None:
        raise ConfigError(
            f"name '{name}' must name a stage, one of: "
            + ", ".join(f"{name}:{stage}" for stage in stages)
        )
    stage = stages[name.stage]
    assignments: list[Override] = []
    problems: list[str] = []
    for overlay in name.overlays:
        assignments += [
            parse_assignment(text, origin=f"overlay {overlay}") for text in recipe.overlays[overlay]
        ]
    if file is not None:
        if is_whole(file) and file["name"] != stage.name:
            problems.append(
                f"{file_name} must be a configuration of '{stage.name}', but is one of "
                f"{shown(file['name'])}. Name that stage, or take the line 'name' out of the file."
            )
        tree = {key: value for key, value in file.items() if key != "name"}
        assignments += file_as_overrides(tree, origin=f"file {file_name}", replaces=is_whole(file))
    for text in overrides:
        try:
            assignments.append(parse_assignment(text))
        except ConfigError as error:
            problems += error.problems
    set_by: dict[tuple[str, ...], str] = {}
    try:
        resolved = apply_overrides(stage, assignments, origins=set_by)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    problems += _wrong_start(resolved, name.stage, tuple(stages))
    if problems:
        raise ConfigError(problems)
    return Resolution(name, recipe, resolved, _origins(stage, resolved, set_by))


def _wrong_start(resolved: StageConfig, stage: str, stages: tuple[str, ...]) -> list[str]:
    earlier = stages[: stages.index(stage)]
    if resolved.init.stage is None or resolved.init.stage in earlier:
        return []
    allowed = f"one of {', '.join(earlier)}" if earlier else "null, as this is the first stage"
    return [f"init.stage must be {allowed}, but is '{resolved.init.stage}'."]


def chain(name: RecipeName | str) -> tuple[str, ...]:
    """The stages that the named one starts from, first to last, itself included."""
    name, recipe = find(name)
    stages = recipe.stages(name.variant)
    if name.stage is None:
        return tuple(stages)
    order = [name.stage]
    while (parent := stages[order[0]].init.stage) is not None:
        order.insert(0, parent)
    return tuple(order)


def part(recipe: Recipe, module: Literal["task", "data", "metrics", "evaluation"]) -> ModuleType:
    """A module of the recipe's package, found by convention: the project's only dynamic import.

    `task` imports torch; the others do not.
    """
    return import_module(f"{recipe.package}.{module}")


def _origins(
    original: StageConfig, resolved: StageConfig, set_by: Mapping[tuple[str, ...], str]
) -> dict[str, str]:
    recipe_values = dict(leaves(dump(original)))
    default_values = dict(leaves(_defaults(resolved)))
    origins = {}
    for path, value in leaves(dump(resolved)):
        if path in set_by:
            origin = set_by[path]
        elif path in default_values and default_values[path] == value:
            origin = "default"
        else:
            assert recipe_values[path] == value
            origin = "recipe"
        origins[join_path(path)] = origin
    return origins


_ABSENT = object()


def _defaults(section: BaseModel, given: Any = None) -> dict[str, Any]:
    """The plain tree of those values of `section` that have a default, each with it.

    `given` is the plain default that the field above has for the section as a whole.
    """
    tree: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        key, value = key_of(name, field), getattr(section, name)
        default: Any = _ABSENT
        if isinstance(given, Mapping):
            default = given.get(key, _ABSENT)
        elif not field.is_required():
            raw = field.get_default(call_default_factory=True)
            single = type(section).model_construct(**{name: raw})
            default = single.model_dump(mode="json", by_alias=True, include={name})[key]
        if isinstance(value, BaseModel):
            tree[key] = _defaults_below(value, default)
        elif isinstance(value, Mapping) and all(isinstance(v, BaseModel) for v in value.values()):
            entries = default if isinstance(default, Mapping) else {}
            tree[key] = {k: _defaults_below(v, entries.get(k)) for k, v in value.items()}
        elif default is not _ABSENT:
            tree[key] = default
    return tree


def _defaults_below(section: BaseModel, default: Any) -> dict[str, Any]:
    kind = getattr(section, "kind", None)
    if isinstance(default, Mapping) and default.get("kind") == kind:
        return _defaults(section, default)
    tree = _defaults(section)
    field = type(section).model_fields.get("kind")
    if field is not None and get_args(field.annotation) == (kind,):
        del tree["kind"]  # somebody chose this kind; its own class has no other
    return tree


def _no_such(what: str, given: str, known: Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    hint = f"Did you mean '{nearest[0]}'? " if nearest else ""
    return f"{what} '{given}' does not exist. {hint}Known: {', '.join(known)}."


__all__ = ["Recipe", "RecipeName", "Resolution", "chain", "find", "part", "recipes", "resolve"]

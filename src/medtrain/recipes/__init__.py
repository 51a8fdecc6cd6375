"""The list of systems, and `resolve`: from a name and overrides to one frozen `StageConfig`.

A package of the user's own joins the list by an entry point of the group `medtrain.recipes`, whose
name is the system
and whose value is the `Recipe`, such as `retina = "my_retina.config:RECIPE"`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import MappingProxyType, ModuleType
from typing import Any, Literal

from pydantic import BaseModel

from medtrain.config import (
    Override,
    StageConfig,
    apply_overrides,
    dump,
    flatten,
    leaves,
    parse_assignment,
)
from medtrain.errors import ConfigError
from medtrain.recipes.cephalometric.config import RECIPE as CEPHALOMETRIC
from medtrain.recipes.recipe import Recipe, RecipeName

_OURS = (CEPHALOMETRIC,)


@cache
def recipes() -> Mapping[str, Recipe]:
    """All systems, ours first, by name."""
    found = {recipe.system: recipe for recipe in _OURS}
    for entry in entry_points(group="medtrain.recipes"):
        recipe = entry.load()
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
    """A resolved stage, with the origin of every value that is not a plain default."""

    name: RecipeName
    recipe: Recipe
    stage: StageConfig
    origins: Mapping[str, str]
    """Path → `default`, `recipe`, `overlay NAME`, `file PATH` or `override`, for every single
    value."""


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
    for overlay in name.overlays:
        assignments += [
            parse_assignment(text, origin=f"overlay {overlay}") for text in recipe.overlays[overlay]
        ]
    if file is not None:
        tree = {key: value for key, value in file.items() if key != "name"}
        assignments += flatten(tree, origin=f"file {file_name}")
    problems = []
    for text in overrides:
        try:
            assignments.append(parse_assignment(text))
        except ConfigError as error:
            problems += error.problems
    set_by: dict[str, str] = {}
    try:
        resolved = apply_overrides(stage, assignments, origins=set_by)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if problems:
        raise ConfigError(problems)
    return Resolution(name, recipe, resolved, _origins(stage, resolved, set_by))


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


def part(recipe: Recipe, module: Literal["task", "data", "metrics", "figures"]) -> ModuleType:
    """A module of the recipe's package, found by convention: the project's only dynamic import.

    `task` imports torch; `data`, `metrics` and `figures` do not.
    """
    return import_module(f"{recipe.package}.{module}")


def _origins(
    original: StageConfig, resolved: StageConfig, set_by: Mapping[str, str]
) -> dict[str, str]:
    defaults = dict(leaves(_defaults(resolved)))
    origins = {}
    for path, value in leaves(dump(resolved)):
        parts = path.split(".")
        prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        origin = next((set_by[prefix] for prefix in prefixes if prefix in set_by), None)
        if origin is None:
            origin = "default" if path in defaults and defaults[path] == value else "recipe"
        origins[path] = origin
    return origins


def _defaults(model: Any) -> Any:
    """The plain tree of `model` in which every field with a default has it, and no other field
    appears."""

    if isinstance(model, BaseModel):
        tree = {}
        for name, info in type(model).model_fields.items():
            value = getattr(model, name)
            if isinstance(value, BaseModel | Mapping):
                tree[info.alias or name] = _defaults(value)
            elif not info.is_required():
                single = type(model).model_construct(
                    **{name: info.get_default(call_default_factory=True)}
                )
                tree[info.alias or name] = single.model_dump(mode="json", include={name})[name]
        return tree
    return {key: _defaults(value) for key, value in model.items()}


def _no_such(what: str, given: str, known: Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    hint = f"Did you mean '{nearest[0]}'? " if nearest else ""
    return f"{what} '{given}' does not exist. {hint}Known: {', '.join(known)}."


__all__ = ["Recipe", "RecipeName", "Resolution", "chain", "find", "part", "recipes", "resolve"]

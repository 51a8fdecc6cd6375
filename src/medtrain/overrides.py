"""The words that change a stage: `key=value` assignments and YAML files, one grammar for both.

Values are `null`, `true`, `false`, decimal integers, floats, and YAML flow after `[` or `{`; all
else is text. (Plain YAML turns `on`, `no`, `010` and `12:30` into True, False, 8 and 750.)
Keys are names joined by dots; a name that has a dot itself stands in double quotes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from medtrain.config import FLOAT, StageConfig, StageT, dump, to_flow
from medtrain.errors import ConfigError
from medtrain.mistakes import Place, explain, join_path, shown, unknown_key, wrong_choice

_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]{0,99})")
_CONSTANTS = {"null": None, "true": True, "false": False}
_FOR_ONE_STAGE = re.compile(r"(?P<stage>[a-z0-9_]+):(?P<assignment>[^=]+=.*)", re.DOTALL)
_KEY_PART = re.compile(r'"([^"]+)"|([^."]+)')


@dataclass(frozen=True)
class Override:
    """One assignment, with where it came from."""

    path: tuple[str, ...]
    value: Any
    origin: str
    text: str | None = None
    """The value as it was written; fields that hold text take this instead of a number."""
    replaces: bool = True
    """Whether a mapping given for a dict (groups, losses, criteria) is all of it; False: its
    entries are added to those that are there. The keys of a section are always only added."""

    @property
    def key(self) -> str:
        return join_path(self.path)


def parse_assignment(text: str, *, origin: str = "override") -> Override:
    """Parse `key=value`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"override {text!a} must be UTF-8 text, but is not") from error
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"override '{text}' must have the form key=value, such as epochs=20")
    value = value.strip()
    return Override(split_key(key.strip()), parse_value(value), origin, text=value)


def for_stage(texts: Sequence[str], stage: str, *, stages: Sequence[str]) -> list[str]:
    """The assignments of a pipeline that concern `stage`: those that name no stage, and
    `STAGE:key=value` where the stage is this one."""
    chosen = []
    for text in texts:
        match = _FOR_ONE_STAGE.fullmatch(text)
        if match and match["stage"] not in stages:
            raise ConfigError(wrong_choice(f"stage of override '{text}'", match["stage"], stages))
        if not match:
            chosen.append(text)
        elif match["stage"] == stage:
            chosen.append(match["assignment"])
    return chosen


def parse_value(text: str) -> Any:
    """The value that `text` means: see the grammar above."""
    if text[:1] in ("[", "{"):
        try:
            return _read_yaml(text)
        except _YamlMistake as error:
            raise ConfigError(
                f"value '{text}' begins like a YAML list or mapping, but is none ({error})"
            ) from error
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text):
        return float(text)
    return text


def split_key(key: str) -> tuple[str, ...]:
    """Split at dots; a part with a dot stands in double quotes."""
    parts: list[str] = []
    position = 0
    while True:
        match = _KEY_PART.match(key, position)
        if match:
            parts.append(match[1] or match[2])
            position = match.end()
            if position == len(key):
                return tuple(parts)
        if not match or key[position] != ".":
            raise ConfigError(
                f"override key '{key}' must be names joined by dots, "
                "such as optim.groups.encoder.lr"
            )
        position += 1


def format_assignment(path: Sequence[str], value: Any) -> str:
    """The text that `parse_assignment` reads as `path` and `value`."""
    is_plain_text = (
        isinstance(value, str)
        and value == value.strip()
        and value not in _CONSTANTS
        and value[:1] not in ("[", "{")
    )
    if is_plain_text:
        return f"{join_path(path)}={value}"
    if isinstance(value, str) and len(path) > 1:
        # Text that the grammar would read as something else: quoted, inside its section.
        return f"{join_path(path[:-1])}={to_flow({path[-1]: value})}"
    return f"{join_path(path)}={to_flow(value)}"


class _YamlMistake(Exception):
    """Text that is not the YAML that configurations are written in."""


class _Loader(yaml.SafeLoader):
    """YAML whose plain scalars mean what the same text means in an override."""

    def fetch_alias(self) -> None:
        """Patterns begin with `*`; and with aliases a tree could contain itself."""
        self.fetch_plain()

    def fetch_anchor(self) -> None:
        """Text, as there are no aliases."""
        self.fetch_plain()

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Keys are text and occur once."""
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {line}: a key must be a name")
            if key in mapping:
                raise yaml.YAMLError(f"line {line}: key '{key}' occurs twice")
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping


def _construct_scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    return None if node.value in ("", "~") else parse_value(node.value)


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver(
    "!plain", re.compile(rf"({_INTEGER.pattern}|{FLOAT.pattern[:-1]}|null|true|false|~|)$"), None
)
_Loader.yaml_constructors = {
    None: yaml.SafeLoader.construct_undefined,
    "!plain": _construct_scalar,
    "tag:yaml.org,2002:str": yaml.SafeLoader.construct_yaml_str,
    "tag:yaml.org,2002:seq": lambda loader, node: loader.construct_sequence(node, deep=True),
    "tag:yaml.org,2002:map": lambda loader, node: loader.construct_mapping(node, deep=True),
}


def _read_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise _YamlMistake(f"{where}{error.problem}") from error
    except yaml.YAMLError as error:
        raise _YamlMistake(" ".join(str(error).split())) from error
    except (RecursionError, ValueError) as error:
        raise _YamlMistake("it is nested too deeply or holds a value of another kind") from error


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a YAML configuration (for example a run's own `config.yaml`) as plain types."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    try:
        tree = _read_yaml(text)
    except _YamlMistake as error:
        raise ConfigError(f"--config {path} must be YAML, but is not: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path} must hold keys and values, but holds {shown(tree)}")
    return tree


def is_whole(tree: Mapping[str, Any]) -> bool:
    """Whether a file's content is a whole stage, as runs save it, and not a few values."""
    return "name" in tree


def file_as_overrides(tree: Mapping[str, Any], *, origin: str, replaces: bool) -> list[Override]:
    """A file's content as assignments; `replaces` as in `Override`."""
    return [Override((key,), value, origin, replaces=replaces) for key, value in tree.items()]


def file_as_assignments(path: Path, *, stage_type: type[StageConfig] = StageConfig) -> list[str]:
    """A file's content as `key=value` texts, for where only those can be handed on.

    Of a whole stage each dict is one text, since it replaces the recipe's; `stage_type` says which
    mappings are dicts.
    """
    tree = read_config_file(path)
    values = _values(tree, Place(stage_type), ()) if is_whole(tree) else leaves(tree)
    return [format_assignment(leaf, value) for leaf, value in values]


def _values(
    node: Mapping[str, Any], place: Place | None, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Single values and whole dicts, the kind of a section before its other keys."""
    for key, value in sorted(node.items(), key=lambda pair: pair[0] != "kind"):
        child = place.child(key, node) if place else None
        if isinstance(value, Mapping) and value and not (child and child.is_dict):
            yield from _values(value, child, (*path, key))
        else:
            yield (*path, key), value


def leaves(tree: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The single values of a plain tree, with their paths; an empty mapping is one."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from leaves(value, (*prefix, str(key)))
    else:
        yield prefix, tree


def apply_overrides(
    stage: StageT,
    overrides: Sequence[Override],
    *,
    origins: dict[tuple[str, ...], str] | None = None,
) -> StageT:
    """Return `stage` with `overrides` applied in order; a ConfigError lists every mistake.

    Setting a `kind` drops all other values of the section, `null` removes an entry of a dict, and
    a new entry goes before those that were there.

    Args:
        stage: The configuration to start from; its *full* dump is the base.
        overrides: Assignments.
        origins: Filled with path → origin for every value that an override set.
    """
    tree = _Tree(stage)
    for override in overrides:
        tree.assign(override)
    try:
        changed = type(stage).model_validate(tree.plain)
    except ValidationError as error:
        tree.problems += explain(
            error,
            type(stage),
            tree=tree.plain,
            refused_in=tree.refused_in,
            added=tree.added,
        )
    if tree.problems:
        raise ConfigError(list(dict.fromkeys(tree.problems)))
    if origins is not None:
        origins.update(tree.origins)
    return changed


def validate(stage_type: type[StageT], tree: Mapping[str, Any]) -> StageT:
    """Build a stage from plain types; a ConfigError lists every mistake with its path and the
    nearest key."""
    try:
        return stage_type.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, stage_type, tree=tree)) from error


class _Tree:
    """A stage as plain types, while assignments change it."""

    def __init__(self, stage: StageConfig) -> None:
        self.plain = dump(stage)
        self.root = Place(type(stage))
        self.origins: dict[tuple[str, ...], str] = {}
        self.added: dict[tuple[str, ...], str] = {}
        """Entries of dicts that assignments made → by which origin."""
        self.refused_in: set[tuple[str, ...]] = set()
        """Sections for which a key was given that they do not have."""
        self.problems: list[str] = []

    def assign(self, override: Override) -> None:
        """Carry out one assignment, or record what is wrong with it."""
        if override.path == ("name",) and override.value != self.plain["name"]:
            self.problems.append(
                f"name must be '{self.plain['name']}', as the recipe says, "
                f"but is {shown(override.value)}. Name the stage in the command instead."
            )
        elif self._leads_somewhere(override.path):
            node: dict[str, Any] = self.plain
            place = self.root
            for depth in range(1, len(override.path)):
                path = override.path[:depth]
                child = place.child(path[-1], node)
                assert child is not None
                node, place = self._enter(node, place, path, override), child
            self._put(node, place, override.path, override.value, override)

    def _leads_somewhere(self, path: tuple[str, ...]) -> bool:
        """Whether every part of a path is known; asked before anything is written."""
        place, node = self.root, self.plain
        for depth, part in enumerate(path):
            child = place.child(part, node)
            if child is None:
                self._refuse(path[: depth + 1], place, node, rest=path[depth + 1 :])
                return False
            is_last = depth == len(path) - 1
            if not is_last and not child.has_keys:
                key = join_path(path[: depth + 1])
                self.problems.append(
                    f"{join_path(path)} is not a key: '{key}' is a single value. Set {key} itself."
                )
                return False
            inner = node.get(part)
            node = inner if isinstance(inner, dict) else {}
            place = child
        return True

    def _refuse(
        self, path: tuple[str, ...], place: Place, node: Any, *, rest: Sequence[str] = ()
    ) -> None:
        self.refused_in.add(path[:-1])
        self.problems.append(unknown_key(path, place, node, rest=rest, tree=self.plain))

    def _enter(
        self, node: dict[str, Any], place: Place, path: tuple[str, ...], override: Override
    ) -> dict[str, Any]:
        """The mapping under `path`, made where there is none."""
        if place.is_dict:
            self._make_room(node, path, override.origin)
        child = node.get(path[-1])
        if not isinstance(child, dict):
            child = node[path[-1]] = {}
            self._forget(path)
        return child

    def _make_room(self, node: dict[str, Any], path: tuple[str, ...], origin: str) -> None:
        """Put a new entry before those that were there, since the first group that matches a
        parameter owns it; entries of one origin keep their order."""
        if path[-1] in node:
            return
        before = dict(node)
        node.clear()
        siblings = itertools.takewhile(
            lambda key: self.added.get((*path[:-1], key)) == origin, before
        )
        node.update({key: before[key] for key in siblings})
        node[path[-1]] = None
        node.update(before)
        self.added[path] = origin

    def _put(
        self,
        node: dict[str, Any],
        place: Place,
        path: tuple[str, ...],
        value: Any,
        override: Override,
    ) -> None:
        key = path[-1]
        child = place.child(key, node)
        if child is None:
            self._refuse(path, place, node)
        elif place.is_dict and value is None:
            if key in node:
                del node[key]
                self._forget(path)
            else:
                known = ", ".join(node)
                self.problems.append(
                    f"{join_path(path)} cannot be removed: there is none. Known: {known}."
                )
        elif place.kinds and key == "kind":
            self._choose(node, place, path, value, override)
        elif isinstance(value, Mapping) and child.has_keys:
            self._merge(node, place, path, value, override)
        else:
            if place.is_dict:
                self._make_room(node, path, override.origin)
            is_number = isinstance(value, bool | int | float)
            if is_number and override.text is not None and child.is_text:
                value = override.text
            node[key] = value
            self._forget(path)
            self.origins[path] = override.origin

    def _choose(
        self,
        node: dict[str, Any],
        place: Place,
        path: tuple[str, ...],
        kind: Any,
        override: Override,
    ) -> None:
        """Set the kind of a section; another kind begins with its own defaults."""
        if not isinstance(kind, str) or kind not in place.kinds:
            self.refused_in.add(path[:-1])
            self.problems.append(wrong_choice(join_path(path), kind, list(place.kinds)))
            return
        if node.get("kind") != kind:
            node.clear()
            self._forget(path[:-1])
        node["kind"] = kind
        self.origins[path] = override.origin

    def _merge(
        self,
        node: dict[str, Any],
        place: Place,
        path: tuple[str, ...],
        value: Mapping[str, Any],
        override: Override,
    ) -> None:
        """Assign each key of a mapping, the kind first."""
        child = place.child(path[-1], node)
        assert child is not None
        inner = self._enter(node, place, path, override)
        if child.is_dict and override.replaces:
            inner.clear()
            self._forget(path)
        elif child.is_dict and inner and not value:
            self.problems.append(
                f"{join_path(path)} must name entries: an empty mapping changes nothing. "
                f"Remove an entry by {join_path([*path, next(iter(inner))])}=null."
            )
        for key, item in sorted(value.items(), key=lambda pair: pair[0] != "kind"):
            self._put(inner, child, (*path, str(key)), item, override)

    def _forget(self, path: tuple[str, ...]) -> None:
        """Drop what is known of the values at and below `path`."""
        for known in [p for p in self.origins if p[: len(path)] == path]:
            del self.origins[known]
        for known in [p for p in self.added if p[: len(path)] == path and p != path]:
            del self.added[known]

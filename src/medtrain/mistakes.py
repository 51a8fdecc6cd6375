"""Mistakes of a configuration in words: which path, what is allowed, what was given, what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from medtrain.config import alternatives, key_of, scalars, to_flow


def join_path(path: Sequence[str]) -> str:
    """A path as overrides write it; a part with a dot stands in double quotes."""
    return ".".join(f'"{part}"' if "." in part else part for part in path)


class Place:
    """What the schema allows at one path: a section of one or more kinds, a dict or a value."""

    def __init__(self, annotation: Any) -> None:
        self.annotation = annotation
        options = list(alternatives(annotation))
        self.sections = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        entries = [get_args(option)[1] for option in options if _is_mapping(option)]
        self.is_dict = bool(entries)
        self.entry = entries[0] if entries else None
        self.kinds: dict[str, type[BaseModel]] = {}
        """Where there are several sections to choose from: each by its `kind`."""
        if len(self.sections) > 1:
            self.kinds = {
                kind: section
                for section in self.sections
                if "kind" in section.model_fields
                for kind in get_args(section.model_fields["kind"].annotation)
            }

    @property
    def has_keys(self) -> bool:
        return self.is_dict or bool(self.sections)

    @property
    def is_text(self) -> bool:
        types = set(scalars(self.annotation))
        return str in types and not types & {int, float, bool}

    def fields(self, node: Any) -> dict[str, Any]:
        """Keys of the section → what each may hold; the `kind` in `node` says which section."""
        sections = self.sections
        if self.kinds:
            kind = node.get("kind") if isinstance(node, Mapping) else None
            if not isinstance(kind, str) or kind not in self.kinds:
                return {"kind": str}
            sections = [self.kinds[kind]]
        return {
            key_of(name, field): field.annotation
            for section in sections
            for name, field in section.model_fields.items()
        }

    def child(self, key: str, node: Any) -> Place | None:
        """What may stand under `key`, or None where the schema has no such key."""
        if self.is_dict:
            return Place(self.entry)
        annotation = self.fields(node).get(key)
        return None if annotation is None else Place(annotation)

    def item(self) -> Place | None:
        """What may stand in a list, or None where there is no list of sections."""
        for option in alternatives(self.annotation):
            if get_origin(option) in (tuple, list):
                return Place(get_args(option)[0])
        return None


def unknown_key(
    path: tuple[str, ...],
    place: Place,
    node: Any,
    *,
    tree: Mapping[str, Any],
    rest: Sequence[str] = (),
) -> str:
    """A key that does not exist, and the one that was probably meant."""
    key, known = path[-1], list(place.fields(node))
    sentence = f"{join_path(path)} is not a key."
    elsewhere_kinds = [
        kind for kind in place.kinds if key in place.fields({"kind": kind}) and key != "kind"
    ]
    if elsewhere_kinds:
        given = node.get("kind") if isinstance(node, Mapping) else None
        return (
            f"{join_path(path)} belongs to kind {' or '.join(elsewhere_kinds)}, "
            f"but the kind is {shown(given)}. Set {join_path([*path[:-1], 'kind'])} first."
        )
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if nearest:
        return f"{sentence} Did you mean '{join_path([*path[:-1], nearest[0], *rest])}'?"
    same_name = [join_path([*p, *rest]) for p in _paths(tree) if p[-1] == key and p != path]
    if same_name:
        more = f" and {len(same_name) - 3} more" if len(same_name) > 3 else ""
        return f"{sentence} Did you mean {', '.join(same_name[:3])}{more}?"
    return f"{sentence} Known keys: {', '.join(known)}."


def _paths(tree: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield (*prefix, str(key))
            yield from _paths(value, (*prefix, str(key)))


def wrong_choice(what: str, given: Any, allowed: Sequence[Any]) -> str:
    """A value that is none of those allowed, and the one that was probably meant."""
    nearest = difflib.get_close_matches(str(given), [str(a) for a in allowed], n=1, cutoff=0.5)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    choices = ", ".join(str(choice) for choice in allowed)
    verb = "must be one of" if len(allowed) > 1 else "must be"
    return f"{what} {verb} {choices}, but is {shown(given)}.{hint}"


def shown(value: Any) -> str:
    """A value as a person would write it, shortened."""
    try:
        text = f"'{value}'" if isinstance(value, str) else to_flow(value)
    except (yaml.YAMLError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def explain(
    error: ValidationError,
    root: type[BaseModel],
    *,
    tree: Mapping[str, Any],
    refused_in: Collection[tuple[str, ...]] = (),
    added: Collection[tuple[str, ...]] = (),
) -> list[str]:
    """A pydantic error as sentences, one a mistake, each with the path as overrides write it.

    Args:
        error: What pydantic says about `tree`.
        root: The model that `tree` was meant for.
        tree: Plain types.
        refused_in: Sections for which a mistake was found before: what they lack is not said.
        added: Entries of dicts that are new: what they lack may be a misspelt name.
    """
    sentences = []
    for detail in error.errors():
        path, place, node = _locate(detail["loc"], root, tree)
        kind, given, context = detail["type"], detail.get("input"), detail.get("ctx", {})
        what = join_path(path)
        if kind == "missing":
            if path[:-1] not in refused_in:
                sentences.append(f"{what} must be given.{_perhaps_other_entry(path, tree, added)}")
        elif kind == "extra_forbidden":
            sentences.append(unknown_key(path, place, node, tree=tree))
        elif kind in ("union_tag_not_found", "union_tag_invalid"):
            if path in refused_in:
                continue
            chosen = given.get("kind") if isinstance(given, Mapping) else given
            inner = place.child(path[-1], node)
            assert inner is not None
            sentences.append(wrong_choice(f"{what}.kind", chosen, list(inner.kinds)))
        elif kind == "literal_error":
            inner = place.child(path[-1], node)
            allowed = _literals(inner.annotation) if inner else []
            sentences.append(wrong_choice(what, given, allowed or [context["expected"]]))
        elif detail["loc"][-1:] == ("[key]",):
            sentences.append(f"{what}: the name must consist of a to z, 0 to 9 and _.")
        else:
            sentence = _sentence(what, detail["msg"], given)
            inner = place.child(path[-1], node) if path else None
            if kind in ("model_type", "dict_type", "mapping_type") and inner and inner.sections:
                sentence += f" Its keys are {', '.join(inner.fields(given))}."
            sentences.append(sentence)
    return sentences


_WORDS = (
    (re.compile(r"^(Value error|Assertion failed), "), ""),
    (re.compile(r"^(Input|String|Tuple|List|Dictionary) should "), "must "),
    (re.compile(r"^must be a valid tuple$"), "must be a list such as [a, b]"),
    (re.compile(r"^must be a valid integer.*"), "must be an integer"),
    (re.compile(r"^must be a valid number.*"), "must be a number"),
    (re.compile(r"^must be a valid boolean.*"), "must be true or false"),
    (re.compile(r"^must be a valid string.*"), "must be text"),
    (re.compile(r"^must be a valid (dictionary|mapping).*"), "must hold keys and values"),
    (re.compile(r" after validation, not .*$"), ""),
)
"""Pydantic's phrases → ours."""


def _sentence(what: str, message: str, given: Any) -> str:
    for pattern, words in _WORDS:
        message = pattern.sub(words, message)
    if isinstance(given, Mapping | BaseModel):
        # A rule about several values of a section: its sentence names them.
        sentence = f"{what}: {message}" if what else message
    else:
        sentence = f"{what} {message}, but is {shown(given)}"
    return sentence if sentence.endswith(".") else f"{sentence}."


def _locate(
    loc: Sequence[str | int], root: type[BaseModel], tree: Any
) -> tuple[tuple[str, ...], Place, Any]:
    """Path of a pydantic location as overrides write it, and the section around its end."""
    path: list[str] = []
    around, node = Place(root), tree
    place: Place | None = around
    here = tree
    for part in loc:
        if part == "[key]":
            continue
        if place is not None and isinstance(part, str) and part in place.kinds:
            continue  # the tag of a union stands in pydantic's locations, not in keys
        path.append(str(part))
        if place is not None:
            around, node = place, here
            place = place.item() if isinstance(part, int) else place.child(part, here)
        here = here.get(part) if isinstance(here, Mapping) else None
    return tuple(path), around, node


def _perhaps_other_entry(
    path: tuple[str, ...], tree: Mapping[str, Any], added: Collection[tuple[str, ...]]
) -> str:
    """For a value that is missing in a new entry: the older entry that was probably meant."""
    entry = path[:-1]
    if entry not in added:
        return ""
    siblings: Any = tree
    for part in entry[:-1]:
        siblings = siblings[part]
    others = [key for key in siblings if (*entry[:-1], key) not in added]
    nearest = difflib.get_close_matches(entry[-1], others, n=1, cutoff=0.6)
    name = join_path(entry)
    if not others:
        return ""
    if nearest:
        return f" {name} is new here; did you mean '{join_path([*entry[:-1], nearest[0]])}'?"
    return f" {name} is new here; there are: {', '.join(others)}."


def _literals(annotation: Any) -> list[Any]:
    return [
        value
        for option in alternatives(annotation)
        if get_origin(option) is Literal
        for value in get_args(option)
    ]


def _is_mapping(annotation: Any) -> bool:
    origin = get_origin(annotation)
    return isinstance(origin, type) and issubclass(origin, Mapping)

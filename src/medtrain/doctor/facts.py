"""What the doctor is told beyond the configuration: facts read from a file, and their types."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medtrain.errors import ConfigError


def read_facts(path: Path) -> dict[str, Any]:
    """Facts from a JSON file."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--facts {path} must be a JSON file, but is not: {error}") from error
    if not isinstance(facts, dict):
        raise ConfigError(f"--facts {path} must hold names and values, but is no JSON object")
    return facts


def problems_of(facts: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values: their names say what they are."""
    return [
        f"fact {name} must be {wanted}, but is {value!r}"
        for name, value in facts.items()
        if (wanted := _wanted(name)) and not _is(wanted, value)
    ]


_COUNT, _FLAG, _SIZE, _LENGTH = (
    "a whole number above 0",
    "true or false",
    "a width and a height above 0",
    "a number above 0",
)


def _wanted(name: str) -> str:
    if name.startswith(("is_", "has_")):
        return _FLAG
    if name in ("num_train_cases", "num_parameters", "num_trainable_parameters"):
        return _COUNT
    if name == "film_size":
        return _SIZE
    return _LENGTH if name == "mm_per_pixel" else ""


def _is(wanted: str, value: Any) -> bool:
    if wanted == _FLAG:
        return isinstance(value, bool)
    if wanted == _SIZE:
        return (
            isinstance(value, list | tuple)
            and len(value) == 2
            and all(_is(_LENGTH, side) for side in value)
        )
    if isinstance(value, bool) or not isinstance(value, int if wanted == _COUNT else int | float):
        return False
    return math.isfinite(value) and value > 0

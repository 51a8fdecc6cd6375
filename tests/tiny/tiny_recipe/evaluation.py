"""What an evaluation of the tiny system shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medtrain.data.cases import Row
from medtrain.data.manifest import Case
from tiny_recipe.config import TinyData


def tables(
    rows: Sequence[Row], training: Sequence[Case], judged: Sequence[Case], data: TinyData
) -> list[dict[str, Any]]:
    """One table."""
    return [{"title": "Cases", "note": "", "columns": ["cases"], "rows": [[len(rows)]]}]


def references(
    training: Sequence[Case], judged: Sequence[Case], data: TinyData
) -> list[tuple[str, str, list[Row]]]:
    """Nothing to read the model beside."""
    return []


def draw(
    rows: Sequence[Row],
    judged: Sequence[Case],
    data: TinyData,
    *,
    data_path: Path,
    folder: Path,
    is_synthetic: bool,
) -> None:
    """No pictures."""


def describe_outputs(training: Sequence[Case], data: TinyData) -> dict[str, Any]:
    """One number a case."""
    return {"outputs": ["y"]}

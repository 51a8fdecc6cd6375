"""The table of results, one row a case: what `predict` answers and every figure is made from."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
"""`case_id`, and plain numbers, text, None and one-dimensional arrays of numbers by name."""

_INTEGER = re.compile(r"-?\d+")
_FLOAT = re.compile(r"-?(\d+\.\d*([eE][+-]?\d+)?|\d+[eE][+-]?\d+|inf)|nan")
_ELEMENT = re.compile(r"(?P<name>.+)_(?P<index>0|[1-9]\d*)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def rows_to_csv(rows: Iterable[Row]) -> str:
    """The rows as CSV; an array `a` becomes the columns `a_0`, `a_1`, …

    Text that would be read as something else is written as a JSON string. A value that is None, and
    a name that a row lacks, is an empty cell.

    Raises:
        ValueError: Where reading could not give the rows back: a scalar called like an array's
            element, an empty array, one name with scalars and arrays, a row without `case_id`.
    """
    rows = [{name: _plain(value) for name, value in row.items()} for row in rows]
    lengths = _lengths(rows)
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        label
        for name, length in lengths.items()
        for label in ([f"{name}_{n}" for n in range(length)] if length else [name])
    )
    for row in rows:
        cells: list[str] = []
        for name, length in lengths.items():
            value = row.get(name)
            values = value if isinstance(value, list) else [value]
            texts = [_cell(item, is_id=name == "case_id") for item in values]
            cells += texts + [""] * (max(length, 1) - len(texts))
        writer.writerow(cells)
    return out.getvalue()


def rows_from_csv(text: str) -> list[Row]:
    """Read what `rows_to_csv` wrote: arrays are float64 or int64, absent values None."""
    import numpy as np

    lines = csv.reader(io.StringIO(text, newline=""))
    header = next(lines, [])
    scalars, arrays = _columns(header)
    rows = []
    for cells in lines:
        row: Row = {}
        for name, column in scalars.items():
            row[name] = _value(cells[column], is_id=name == "case_id")
        for name, members in arrays.items():
            values = [_value(cells[column]) for column in members if cells[column] != ""]
            row[name] = np.array(values) if values else None
        rows.append(row)
    return rows


def drop_doubled(rows: Iterable[Row]) -> list[Row]:
    """The rows without those whose `case_id` an earlier one has."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["case_id"], row)
    return list(first.values())


def _plain(value: Any) -> Any:
    """A numpy or tensor-like value as a plain scalar or a list of them."""
    return value.tolist() if hasattr(value, "tolist") else value


def _lengths(rows: Sequence[Row]) -> dict[str, int]:
    """How many columns each name needs: 0 for a scalar, else the longest array's length."""
    lengths = {"case_id": 0}
    kinds: dict[str, str] = {}
    for row in rows:
        if not isinstance(row.get("case_id"), str):
            raise ValueError(f"row must have a text case_id, but has {row.get('case_id')!r}")
        for name, value in row.items():
            is_array = isinstance(value, list)
            if not is_array and _ELEMENT.fullmatch(name):
                raise ValueError(f"'{name}' must not end like an array's element; rename it")
            lengths.setdefault(name, 0)
            if value is None:
                continue
            kind = "array" if is_array else "scalar"
            if kinds.setdefault(name, kind) != kind:
                raise ValueError(f"'{name}' must be an array in all rows or in none")
            if is_array:
                if not value or not all(isinstance(item, int | float) for item in value):
                    raise ValueError(f"'{name}' must be a one-dimensional array of numbers")
                lengths[name] = max(lengths[name], len(value))
    return lengths


def _columns(header: Sequence[str]) -> tuple[dict[str, int], dict[str, list[int]]]:
    scalars: dict[str, int] = {}
    arrays: dict[str, list[int]] = {}
    for column, label in enumerate(header):
        match = _ELEMENT.fullmatch(label)
        if match:
            arrays.setdefault(match["name"], []).append(column)
        else:
            scalars[label] = column
    return scalars, arrays


def _cell(value: Any, *, is_id: bool = False) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if not isinstance(value, str):
        raise ValueError(f"a cell must be a number, text or None, but is {type(value).__name__}")
    is_ambiguous = value == "" or value[0] == '"' or _CONTROL.search(value) is not None
    if is_ambiguous or (not is_id and not isinstance(_value(value), str)):
        return json.dumps(value, ensure_ascii=False)
    return value


def _value(cell: str, *, is_id: bool = False) -> Any:
    if cell[:1] == '"':
        return json.loads(cell)
    if is_id:
        return cell
    if cell == "":
        return None
    if cell in ("true", "false"):
        return cell == "true"
    if _INTEGER.fullmatch(cell):
        return int(cell)
    if _FLOAT.fullmatch(cell):
        return float(cell)
    return cell

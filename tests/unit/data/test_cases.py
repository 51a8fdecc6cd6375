from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtrain.data.cases import Row, drop_doubled, rows_from_csv, rows_to_csv

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.sampled_from(["nan", "1e5", '"'])
)
ARRAYS = st.one_of(
    st.lists(st.floats(), min_size=1, max_size=4).map(lambda v: np.array(v, dtype=np.float64)),
    st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=4).map(np.array),
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {"case_id": TEXT},
        optional={
            "label": SCALARS,
            "score_mm": SCALARS,
            "sdr_2mm": SCALARS,
            "error_mm": st.one_of(st.none(), ARRAYS),
            "x": st.one_of(st.none(), ARRAYS),
        },
    ),
    max_size=6,
)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return (
            isinstance(right, np.ndarray)
            and left.dtype == right.dtype
            and np.array_equal(left, right, equal_nan=left.dtype.kind == "f")
        )
    if isinstance(left, float) and left != left:
        return isinstance(right, float) and right != right
    return type(left) is type(right) and bool(left == right)


@given(ROWS)
def test_rows_come_back_exactly(rows: list[Row]) -> None:
    read = rows_from_csv(rows_to_csv(rows))

    names = {name for row in rows for name in row}
    assert len(read) == len(rows)
    for before, after in zip(rows, read, strict=True):
        assert set(after) == names
        assert all(_same(before.get(name), after[name]) for name in names)


def test_arrays_become_numbered_columns() -> None:
    text = rows_to_csv(
        [
            {"case_id": "001", "mre_mm": 1.5, "error_mm": np.array([1.0, 2.0])},
            {"case_id": "002", "error_mm": np.array([3.0])},
        ]
    )

    assert text == "case_id,mre_mm,error_mm_0,error_mm_1\n001,1.5,1.0,2.0\n002,,3.0,\n"


def test_case_ids_stay_text() -> None:
    assert rows_from_csv("case_id,n\n001,2\n")[0] == {"case_id": "001", "n": 2}


def test_numpy_scalars_are_plain_numbers() -> None:
    (row,) = rows_from_csv(rows_to_csv([{"case_id": "a", "n": np.int64(3), "v": np.float32(0.5)}]))

    assert row == {"case_id": "a", "n": 3, "v": 0.5}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"case_id": "a", "sdr_2": 1.0}], "array's element"),
        ([{"case_id": "a", "x": np.zeros(0)}], "one-dimensional"),
        ([{"case_id": "a", "x": np.zeros((2, 2))}], "one-dimensional"),
        ([{"case_id": "a", "x": 1.0}, {"case_id": "b", "x": np.zeros(2)}], "all rows or in none"),
        ([{"x": 1.0}], "case_id"),
        ([{"case_id": 7}], "case_id"),
        ([{"case_id": "a", "x": {"no": "cell"}}], "must be a number, text or None"),
    ],
)
def test_what_could_not_be_read_back_is_refused(rows: list[Row], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        rows_to_csv(rows)


def test_the_first_of_doubled_cases_is_kept() -> None:
    rows: list[Row] = [
        {"case_id": "a", "n": 1},
        {"case_id": "b", "n": 2},
        {"case_id": "a", "n": 3},
    ]

    assert drop_doubled(rows) == rows[:2]

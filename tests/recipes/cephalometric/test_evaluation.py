from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medtrain.data.cases import Row
from medtrain.data.manifest import Case, FileEntry
from medtrain.recipes.cephalometric.config import CephalometricData
from medtrain.recipes.cephalometric.evaluation import tables
from medtrain.recipes.cephalometric.films import points_to_text
from medtrain.recipes.cephalometric.metrics import summarize

NUM_FILMS = 5
RNG = np.random.default_rng(0)


def _judged(num_landmarks: int = 19) -> list[Row]:
    errors = RNG.uniform(0, 5, (NUM_FILMS, num_landmarks))
    return [{"case_id": f"{n:03d}", "error_mm": row} for n, row in enumerate(errors)]


def _film(case_id: str) -> Case:
    """A film on which the readers are (landmark / 2) mm apart."""
    points = [(float(10 * n), 5.0) for n in range(1, 20)]
    moved = [(x + n, y) for n, (x, y) in enumerate(points, start=1)]
    return Case(
        case_id,
        case_id,
        {"image": FileEntry(f"{case_id}.bmp", 1, "sha256:0")},
        {
            "width": "300",
            "height": "200",
            "mm_per_pixel": "0.5",
            "junior": points_to_text(points),
            "senior": points_to_text(moved),
        },
    )


def _tables(rows: list[Row], **data: Any) -> dict[str, dict[str, Any]]:
    films = [_film(f"{n:03d}") for n in range(NUM_FILMS)]
    return {table["title"]: table for table in tables(rows, [], films, CephalometricData(**data))}


def test_every_landmark_has_its_errors_all_rates_and_the_readers_distance() -> None:
    rows = _judged()

    table = _tables(rows)["Every landmark"]

    assert table["columns"] == [
        *("landmark", "MRE", "SD", "median"),
        *("<1.5 mm", "<2 mm", "<2.5 mm", "<3 mm", "<4 mm"),
        "readers",
    ]
    assert len(table["rows"]) == 19
    own = np.array([row["error_mm"][2] for row in rows])
    rates = [100 * np.mean(own < radius) for radius in (1.5, 2, 2.5, 3, 4)]
    name, *values = table["rows"][2]
    assert name == "3 orbitale"
    assert values == pytest.approx([own.mean(), own.std(ddof=1), np.median(own), *rates, 1.5])
    assert "readers is the mean distance" in table["note"]


def test_the_whole_is_shown_with_and_without_landmark_16() -> None:
    rows = _judged()
    for row in rows:
        row["error_mm"][15] = 20.0

    table = _tables(rows)["With and without landmark 16"]

    rates = ["<1.5 mm", "<2 mm", "<2.5 mm", "<3 mm", "<4 mm"]
    assert table["columns"] == ["landmarks", "MRE", "SD", *rates]
    (everything, *with_16), (rest, *without_16) = table["rows"]
    assert (everything, rest) == ("all landmarks", "without 16")
    kept = [{**row, "error_mm": np.delete(row["error_mm"], 15)} for row in rows]
    for values, judged in ((with_16, summarize(rows)), (without_16, summarize(kept))):
        names = ("mre_mm", "sd_mm", "sdr_1_5mm", "sdr_2mm", "sdr_2_5mm", "sdr_3mm", "sdr_4mm")
        assert values == pytest.approx([judged[name] for name in names])
    assert without_16[0] < with_16[0]


def test_seven_landmarks_have_no_sixteenth() -> None:
    assert list(_tables(_judged(7), landmarks="maht7")) == ["Every landmark"]


def test_the_truth_is_named_beside_every_figure() -> None:
    shown = _tables(_judged(), annotator="senior").values()

    assert all("Truth: senior" in table["note"] for table in shown)

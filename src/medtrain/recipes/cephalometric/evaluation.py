"""What an evaluation of landmarks shows beside its metrics: tables, references, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medtrain.data.cases import Row
from medtrain.data.manifest import Case
from medtrain.recipes.cephalometric.config import CephalometricData
from medtrain.recipes.cephalometric.data import landmark_names
from medtrain.recipes.cephalometric.metrics import (
    PUBLISHED,
    RADII_MM,
    per_landmark,
    radius_name,
    reference_rows,
    summarize,
)

_COLUMNS = {
    "mre_mm": "MRE",
    "sd_mm": "SD",
    "median_mm": "median",
    **{radius_name(radius): f"<{radius:g} mm" for radius in RADII_MM},
}
"""Metrics and what they are called where many stand in one row."""
_REFERENCE_NOTES = {
    "mean_positions": "every landmark at its mean place in the training films",
    "readers": "the junior reader judged by the senior one",
}


def tables(
    rows: Sequence[Row], training: Sequence[Case], judged: Sequence[Case], data: CephalometricData
) -> list[dict[str, Any]]:
    """Tables of the report: every landmark, with the two readers' distance beside the model's.

    Of nineteen landmarks the second table says what leaving out landmark 16 changes.
    """
    names = landmark_names(data)
    readers = reference_rows(training, judged, data).get("readers", [])
    floor = {entry["landmark"]: entry["mre_mm"] for entry in per_landmark(readers)}
    units = (
        f"Truth: {data.annotator} of the two readers. MRE, SD and median in mm; rates of errors "
        "below a radius in percent"
    )
    shown: list[dict[str, Any]] = [
        {
            "title": "Every landmark",
            "note": f"{units}; readers is the mean distance between the two readers in mm, below "
            "which an error says little.",
            "columns": ["landmark", *_COLUMNS.values(), "readers"],
            "rows": [
                [
                    f"{entry['landmark']} {entry['name'].replace('_', ' ')}",
                    *(entry.get(metric) for metric in _COLUMNS),
                    floor.get(entry["landmark"]),
                ]
                for entry in per_landmark(rows, names=names)
            ],
        }
    ]
    metrics = summarize(rows)
    if "mre_mm_without_l16" in metrics:
        shown.append(
            {
                "title": "With and without landmark 16",
                "note": f"{units}. The readers of ISBI 2015 hold two definitions of landmark 16.",
                "columns": ["landmarks", *(_COLUMNS[metric] for metric in PUBLISHED)],
                "rows": [
                    [label, *(metrics.get(f"{metric}{ending}") for metric in PUBLISHED)]
                    for label, ending in (("all landmarks", ""), ("without 16", "_without_l16"))
                ],
            }
        )
    return shown


def references(
    training: Sequence[Case], judged: Sequence[Case], data: CephalometricData
) -> list[tuple[str, str, list[Row]]]:
    """What the model is read beside: name, explanation, rows to summarize."""
    found = reference_rows(training, judged, data)
    return [(name.replace("_", " "), _REFERENCE_NOTES[name], rows) for name, rows in found.items()]


def draw(
    rows: Sequence[Row],
    judged: Sequence[Case],
    data: CephalometricData,
    *,
    data_path: Path,
    folder: Path,
    is_synthetic: bool,
) -> None:
    """Pictures of the report."""
    from medtrain.recipes.cephalometric.figures import draw_cases

    draw_cases(
        rows,
        {case.case_id: case for case in judged},
        data_path,
        folder,
        is_synthetic=is_synthetic,
        names=landmark_names(data),
    )


def describe_outputs(training: Sequence[Case], data: CephalometricData) -> dict[str, Any]:
    """What a user of the model must know: the meaning of its outputs, the scale of its films."""
    pitches = sorted({case.attributes["mm_per_pixel"] for case in training})
    return {
        "landmarks": list(landmark_names(data)),
        "annotator": data.annotator,
        # New films are taken to be of the training films' scale, where that is one.
        "overrides": [f"data.mm_per_pixel={pitches[0]}"] if len(pitches) == 1 else [],
    }


def draw_prediction(row: Row, image_path: Path, path: Path, *, is_synthetic: bool) -> None:
    """A film with its predicted landmarks."""
    from medtrain.recipes.cephalometric import figures

    figures.draw_prediction(row, image_path, path, is_synthetic=is_synthetic)


def describe_prediction(row: Row, data: CephalometricData) -> list[str]:
    """A film's landmarks as lines: name, place in mm from the upper left corner."""
    scale = row["mm_per_pixel"]
    lines = []
    for name, x, y in zip(landmark_names(data), row["x"], row["y"], strict=True):
        lines.append(f"{name:<24} x {x * scale:7.1f} mm   y {y * scale:7.1f} mm")
    return lines

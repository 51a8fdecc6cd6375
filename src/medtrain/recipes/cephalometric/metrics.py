"""How landmarks are judged: radial errors in millimeters, and rates of success below a radius."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from medtrain.data.cases import Row
from medtrain.data.manifest import Case
from medtrain.recipes.cephalometric.config import CephalometricData
from medtrain.recipes.cephalometric.data import annotators, landmark_indices, truth

Array = npt.NDArray[np.float64]

RADII_MM = (1.5, 2.0, 2.5, 3.0, 4.0)
"""Radii of the success detection rates: the document's and the challenge's."""

FAR_MM = 10.0
"""An error beyond this is a landmark missed, not a landmark misplaced."""


def summarize(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics over all landmarks of all cases that have a truth; undefined ones are absent.

    Rates are percentages of errors *below* a radius. `…_without_l16` leaves out landmark 16, of
    which the two readers of ISBI 2015 hold two definitions: mean, SD and every rate.
    """
    errors = _errors(rows)
    if errors is None:
        return {}
    metrics = _of_errors(errors.ravel())
    if errors.shape[1] == 19:
        rest = np.delete(errors, 15, axis=1).ravel()
        of_rest = _of_errors(rest)
        metrics |= {f"{name}_without_l16": of_rest[name] for name in PUBLISHED if name in of_rest}
    return metrics


def per_landmark(rows: Sequence[Row], *, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The same metrics for every landmark: `landmark` (1-based in the rows' order), `name`, …"""
    errors = _errors(rows)
    if errors is None:
        return []
    return [
        {
            "landmark": index + 1,
            "name": names[index] if index < len(names) else "",
            **_of_errors(errors[:, index]),
        }
        for index in range(errors.shape[1])
    ]


def radius_name(radius_mm: float) -> str:
    """The metric of a radius: `sdr_2mm`, `sdr_2_5mm`."""
    return f"sdr_{radius_mm:g}mm".replace(".", "_")


PUBLISHED = ("mre_mm", "sd_mm", *map(radius_name, RADII_MM))
"""Metrics by which published figures are stated."""


def _errors(rows: Sequence[Row]) -> Array | None:
    """Errors of the cases with a truth, (cases, landmarks) in mm; None where there is none."""
    known = [np.asarray(row["error_mm"], float) for row in rows if row.get("error_mm") is not None]
    return np.stack(known) if known else None


def _of_errors(errors: Array) -> dict[str, float]:
    metrics = {"mre_mm": float(errors.mean())}
    if errors.size > 1:
        metrics["sd_mm"] = float(errors.std(ddof=1))
    metrics["median_mm"] = float(np.median(errors))
    metrics["p95_mm"] = float(np.percentile(errors, 95))
    metrics |= {radius_name(radius): _rate(errors, radius) for radius in RADII_MM}
    metrics["num_over_10mm"] = float((errors > FAR_MM).sum())
    return metrics


def _rate(errors: Array, radius_mm: float) -> float:
    return 100.0 * float((errors < radius_mm).mean())


def make_row(case_id: str, *, points: Array, true_points: Array | None, mm_per_pixel: float) -> Row:
    """A case's row: `x`, `y`, and where a truth exists `true_x`, `true_y`, `error_mm`.

    Args:
        case_id: The case.
        points: (K, 2) as x, y in pixels of the film.
        true_points: The truth, alike.
        mm_per_pixel: Pixel size of the film.
    """
    row: Row = {
        "case_id": case_id,
        "mm_per_pixel": mm_per_pixel,
        "x": points[:, 0],
        "y": points[:, 1],
    }
    if true_points is not None:
        distances = np.linalg.norm(points - true_points, axis=1)
        row |= {
            "true_x": true_points[:, 0],
            "true_y": true_points[:, 1],
            "error_mm": mm_per_pixel * distances,
        }
    return row


def reference_rows(
    training: Sequence[Case], judged: Sequence[Case], data: CephalometricData
) -> dict[str, list[Row]]:
    """Rows that a model's are to be read beside, for `summarize` and `per_landmark`.

    Returns:
        `mean_positions`: every landmark at its mean place in the training cases, as fractions of
        width and height; what knows nothing of the film. `readers`: the junior reader judged by
        the senior one, over the cases that both have read; below their distance errors mean
        little. Either is absent where there is nothing to compute it from.
    """
    references = {}
    if training and judged:
        mean = np.mean([truth(case, data) / _size(case) for case in training], axis=0)
        references["mean_positions"] = [
            make_row(
                case.case_id,
                points=mean * _size(case),
                true_points=truth(case, data),
                mm_per_pixel=float(case.attributes["mm_per_pixel"]),
            )
            for case in judged
        ]
    chosen = list(landmark_indices(data))
    readers = [
        make_row(
            case.case_id,
            points=both.junior[chosen],
            true_points=both.senior[chosen],
            mm_per_pixel=float(case.attributes["mm_per_pixel"]),
        )
        for case in judged
        if (both := annotators(case)).junior is not None and both.senior is not None
    ]
    if readers:
        references["readers"] = readers
    return references


def _size(case: Case) -> Array:
    return np.array([float(case.attributes["width"]), float(case.attributes["height"])])

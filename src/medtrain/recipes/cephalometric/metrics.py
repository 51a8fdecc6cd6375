"""How landmarks are judged: radial errors in millimeters, and rates of success below a radius."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medtrain.data.cases import Row

Array = npt.NDArray[np.float64]
Points = Callable[[Any], Array]

RADII_MM = (1.5, 2.0, 2.5, 3.0, 4.0)
"""Radii of the success detection rates: the document's and the challenge's."""

FAR_MM = 10.0
"""An error beyond this is a landmark missed, not a landmark misplaced."""


def summarize(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics over all landmarks of all cases that have a truth; undefined ones are absent.

    Rates are percentages of errors *below* a radius. `…_without_l16` leaves out landmark 16, of
    which the two readers of ISBI 2015 hold two definitions.
    """
    errors = _errors(rows)
    if errors is None:
        return {}
    metrics = _of_errors(errors.ravel())
    if errors.shape[1] == 19:
        rest = np.delete(errors, 15, axis=1).ravel()
        metrics["mre_mm_without_l16"] = float(rest.mean())
        metrics["sdr_2mm_without_l16"] = _rate(rest, 2.0)
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


def radial_errors(predicted: Array, true: Array, *, mm_per_pixel: float) -> Array:
    """Distances (K,) in mm of points (K, 2) in pixels of the film."""
    distances: Array = mm_per_pixel * np.linalg.norm(predicted - true, axis=-1)
    return distances

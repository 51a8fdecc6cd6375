"""Metrics of the tiny system."""

from __future__ import annotations

from collections.abc import Sequence

from medtrain.data.cases import Row


def summarize(rows: Sequence[Row]) -> dict[str, float]:
    """Mean absolute and root mean squared error; nothing for no cases."""
    errors = [float(row["error"]) for row in rows]
    if not errors:
        return {}
    return {
        "mae": sum(abs(error) for error in errors) / len(errors),
        "rmse": (sum(error**2 for error in errors) / len(errors)) ** 0.5,
    }

"""Pictures of landmarks on films, and of their errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medtrain.data.cases import Row
from medtrain.data.manifest import Case
from medtrain.recipes.cephalometric.films import decode_film
from medtrain.recipes.cephalometric.metrics import RADII_MM, per_landmark

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PREDICTED, TRUE = "#ff9f1c", "#2ec4f0"
"""Orange crosses and blue circles: told apart by shape, and by people who confuse red and green."""


def draw_cases(
    rows: Sequence[Row],
    cases: Mapping[str, Case],
    data_path: Path,
    folder: Path,
    *,
    limit: int = 9,
    is_synthetic: bool = False,
    names: Sequence[str] = (),
) -> list[Path]:
    """Draw the judged split into `folder`: worst, middle and best films, and the errors.

    Args:
        rows: What `predict` answered; those without a truth are left out.
        cases: The cases by id.
        data_path: Where the films are.
        folder: Where the pictures go.
        limit: Films to draw at most.
        is_synthetic: The title of every picture then says so.
        names: Names of the landmarks.
    """
    judged = [row for row in rows if row.get("error_mm") is not None]
    if not judged:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for choice in _chosen(judged, limit):
        row = choice.row
        path = folder / f"case-{choice.label}-{choice.rank:03}-{row['case_id']}.png"
        film = data_path / cases[row["case_id"]].files["image"].path
        title = (
            f"{row['case_id']}: mean error {np.mean(row['error_mm']):.2f} mm, "
            f"number {choice.rank} of {len(judged)} from the worst"
        )
        _draw_film(row, film, path, title=_title(title, is_synthetic=is_synthetic))
        paths.append(path)
    errors = folder / "errors.png"
    _draw_errors(judged, errors, is_synthetic=is_synthetic)
    landmarks = folder / "landmarks.png"
    _draw_landmarks(judged, landmarks, names=names, is_synthetic=is_synthetic)
    return [*paths, errors, landmarks]


def draw_prediction(row: Row, image_path: Path, path: Path, *, is_synthetic: bool = False) -> None:
    """Draw one film with its predicted landmarks, and with the true ones where they are known."""
    title = f"{row['case_id']}: {len(row['x'])} landmarks"
    _draw_film(row, image_path, path, title=_title(title, is_synthetic=is_synthetic))


def _title(text: str, *, is_synthetic: bool) -> str:
    return f"{text} (synthetic data)" if is_synthetic else text


@dataclass(frozen=True)
class _Choice:
    """A row to draw."""

    row: Row
    rank: int
    """1 for the worst."""
    label: str


def _chosen(rows: Sequence[Row], limit: int) -> list[_Choice]:
    """Rows to draw: a third each of the worst, those around the median, and the best."""
    order = sorted(rows, key=lambda row: (-float(np.mean(row["error_mm"])), row["case_id"]))
    num = len(order)
    if num <= limit:
        ranks = list(range(num))
    else:
        third, rest = divmod(limit, 3)
        worst, best = third + (rest > 0), third + (rest > 1)
        middle = max(worst, (num - third) // 2)
        ranks = [*range(worst), *range(middle, middle + third), *range(num - best, num)]
    labels = ("worst", "median", "best")
    return [_Choice(order[rank], rank + 1, labels[3 * rank // num]) for rank in ranks]


def _draw_film(row: Row, image_path: Path, path: Path, *, title: str) -> None:
    film = decode_film(image_path.read_bytes())
    height, width = film.shape
    with _figure(path, size=(8.0, 8.0 * height / width + 0.5)) as figure:
        axes = figure.subplots()
        axes.imshow(film, cmap="gray", vmin=0, vmax=255)
        has_truth = row.get("error_mm") is not None
        if has_truth:
            for x, y, true_x, true_y in zip(
                row["x"], row["y"], row["true_x"], row["true_y"], strict=True
            ):
                axes.plot([x, true_x], [y, true_y], color=PREDICTED, linewidth=1)
            axes.scatter(
                row["true_x"],
                row["true_y"],
                s=60,
                facecolors="none",
                edgecolors=TRUE,
                label="true",
            )
        axes.scatter(row["x"], row["y"], s=45, marker="+", color=PREDICTED, label="predicted")
        _number_points(axes, row)
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(height - 0.5, -0.5)
        axes.set_axis_off()
        axes.legend(loc="lower left", fontsize=8)
        note = "number of the landmark, error in mm" if has_truth else "number of the landmark"
        axes.set_title(f"{title}\n{note}", fontsize=10)


def _number_points(axes: Axes, row: Row) -> None:
    """Write each landmark's number and error beside it, on the side away from the others."""
    from matplotlib.patheffects import withStroke

    points = np.stack([row["x"], row["y"]], axis=1)
    for index, point in enumerate(points):
        away = point - points.mean(axis=0)
        x, y = away / max(float(np.linalg.norm(away)), 1.0)
        error = row.get("error_mm")
        axes.annotate(
            f"{index + 1}" if error is None else f"{index + 1}: {error[index]:.1f}",
            tuple(point),
            xytext=(14 * x, -14 * y),
            textcoords="offset points",
            ha="left" if x > 0 else "right",
            va="center",
            color="white",
            fontsize=8,
            path_effects=[withStroke(linewidth=2, foreground="black")],
        )


def _draw_errors(rows: Sequence[Row], path: Path, *, is_synthetic: bool) -> None:
    errors = np.sort(np.concatenate([np.asarray(row["error_mm"], float) for row in rows]))
    with _figure(path, size=(11.0, 4.2)) as figure:
        histogram, curve = figure.subplots(1, 2)
        far = max(float(np.percentile(errors, 99)), 4.0)
        shown = errors[errors <= far]
        histogram.hist(shown, bins=40, range=(0, far), color=TRUE)
        histogram.axvline(float(errors.mean()), color=PREDICTED, label="mean")
        histogram.set_xlabel("radial error, mm")
        histogram.set_ylabel("landmarks")
        histogram.set_title(f"{len(errors)} landmarks, {len(errors) - len(shown)} beyond the axis")
        histogram.legend()
        curve.plot(errors, 100 * np.arange(1, len(errors) + 1) / len(errors), color=TRUE)
        for radius in RADII_MM:
            rate = 100 * float((errors < radius).mean())
            curve.plot([radius, radius], [0, rate], color="gray", linewidth=0.8)
            curve.annotate(
                f"{rate:.0f} %",
                (radius, rate),
                xytext=(-4, 4),
                textcoords="offset points",
                ha="right",
                fontsize=8,
            )
        curve.set_xlim(0, far)
        curve.set_ylim(0, 104)
        curve.set_xlabel("radius, mm")
        curve.set_ylabel("landmarks closer than the radius, %")
        curve.set_title("success detection rate")
        title = f"Errors of {len(rows)} cases, mean {errors.mean():.2f} mm"
        figure.suptitle(_title(title, is_synthetic=is_synthetic))


def _draw_landmarks(
    rows: Sequence[Row], path: Path, *, names: Sequence[str], is_synthetic: bool
) -> None:
    table = per_landmark(rows, names=names)
    places = np.arange(len(table))
    labels = [f"{entry['landmark']} {entry['name'].replace('_', ' ')}".strip() for entry in table]
    with _figure(path, size=(9.0, 0.32 * len(table) + 1.6)) as figure:
        axes: Axes = figure.subplots()
        axes.barh(places, [entry["mre_mm"] for entry in table], color=TRUE, label="mean")
        axes.plot(
            [entry["p95_mm"] for entry in table],
            places,
            "|",
            color=PREDICTED,
            markersize=10,
            markeredgewidth=2,
            label="95th percentile",
        )
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("radial error, mm")
        axes.legend()
        title = f"Error of each landmark over {len(rows)} cases"
        axes.set_title(_title(title, is_synthetic=is_synthetic))


@contextmanager
def _figure(path: Path, *, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure that is written to `path` as PNG; no state of pyplot is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    figure.savefig(path, dpi=110)

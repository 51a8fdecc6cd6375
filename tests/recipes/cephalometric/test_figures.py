from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medtrain.data.cases import Row
from medtrain.data.manifest import Case, FileEntry
from medtrain.recipes.cephalometric import figures
from medtrain.recipes.cephalometric.figures import draw_cases, draw_prediction
from medtrain.recipes.cephalometric.metrics import make_row

WIDTH, HEIGHT = 120, 150


def _drawn(folder: Path, num: int, *, spread: float = 3.0) -> tuple[list[Row], dict[str, Case]]:
    """Rows whose error grows with the case's number, and black films for them."""
    rng = np.random.default_rng(0)
    rows, cases = [], {}
    for number in range(num):
        case_id = f"{number:03}"
        path = folder / f"{case_id}.png"
        Image.new("L", (WIDTH, HEIGHT)).save(path)
        true = rng.uniform(30, 90, (19, 2))
        points = true + np.array([0.0, spread * (number + 1)])
        rows.append(make_row(case_id, points=points, true_points=true, mm_per_pixel=0.5))
        cases[case_id] = Case(case_id, case_id, {"image": FileEntry(path.name, 1, "")}, {})
    return rows, cases


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.fixture
def titles(monkeypatch):
    """Titles of what is drawn, in order."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    seen: list[str] = []
    for owner, name in ((Axes, "set_title"), (Figure, "suptitle")):
        original = getattr(owner, name)

        def noted(self, text, *args, original=original, **kwargs):
            seen.append(text)
            return original(self, text, *args, **kwargs)

        monkeypatch.setattr(owner, name, noted)
    return seen


def test_worst_middle_and_best_films_are_drawn_with_both_figures_of_errors(tmp_path):
    rows, cases = _drawn(tmp_path, 9)
    paths = draw_cases(rows, cases, tmp_path, tmp_path / "figures", limit=3)
    assert [path.name for path in paths] == [
        "case-worst-001-008.png",
        "case-median-005-004.png",
        "case-best-009-000.png",
        "errors.png",
        "landmarks.png",
    ]
    assert all(min(_pixels(path).shape[:2]) > 200 for path in paths)


@pytest.mark.parametrize("limit", [1, 2, 4, 5, 8, 20])
def test_no_film_is_drawn_twice_and_never_more_than_the_limit(tmp_path, limit):
    rows, _ = _drawn(tmp_path, 9)
    ids = [choice.row["case_id"] for choice in figures._chosen(rows, limit)]
    assert len(set(ids)) == len(ids) == min(limit, 9)
    assert ids[0] == "008"


def test_a_row_without_truth_is_not_judged_but_can_be_drawn(tmp_path):
    rows, cases = _drawn(tmp_path, 1)
    unknown = {name: rows[0][name] for name in ("case_id", "mm_per_pixel", "x", "y")}
    assert draw_cases([unknown], cases, tmp_path, tmp_path / "figures", limit=3) == []
    assert not (tmp_path / "figures").exists()
    draw_prediction(unknown, tmp_path / "000.png", tmp_path / "one.png")
    assert _pixels(tmp_path / "one.png").any()


def test_predicted_and_true_points_stand_where_they_are(tmp_path):
    """On a black film the two colors appear around their points, and nowhere else."""
    rows, _ = _drawn(tmp_path, 1)
    (row,) = rows
    row |= {name: row[name][:1] for name in ("x", "y", "true_x", "true_y", "error_mm")}
    row |= {"x": np.array([30.0]), "y": np.array([40.0])}
    row |= {"true_x": np.array([30.0]), "true_y": np.array([110.0])}
    draw_prediction(row, tmp_path / "000.png", tmp_path / "one.png")
    picture = _pixels(tmp_path / "one.png").astype(int)
    film = (picture.sum(axis=2) == 0).any(axis=1).nonzero()[0]
    top, height = film.min(), film.max() - film.min()

    def center_of(color: str) -> float:
        wanted = [int(color[n : n + 2], 16) for n in (1, 3, 5)]
        near = np.abs(picture - wanted).max(axis=2) < 25
        rows_of = near[: int(top + 0.85 * height)].nonzero()[0]
        return float((rows_of.mean() - top) / height)

    assert center_of(figures.TRUE) == pytest.approx(110 / HEIGHT, abs=0.02)
    assert 40 / HEIGHT < center_of(figures.PREDICTED) < 110 / HEIGHT


def test_pictures_of_synthetic_data_say_so(tmp_path, titles):
    rows, cases = _drawn(tmp_path, 2)
    draw_cases(rows, cases, tmp_path, tmp_path / "figures", limit=2, is_synthetic=True)
    draw_prediction(rows[0], tmp_path / "000.png", tmp_path / "one.png", is_synthetic=True)
    marked = [title for title in titles if "(synthetic data)" in title]
    assert len(marked) == 5
    titles.clear()
    draw_cases(rows, cases, tmp_path, tmp_path / "figures", limit=2)
    assert titles
    assert not any("synthetic" in title for title in titles)


def test_drawing_leaves_no_open_figure_behind(tmp_path):
    import matplotlib.pyplot as plt

    rows, cases = _drawn(tmp_path, 2)
    draw_cases(rows, cases, tmp_path, tmp_path / "figures", limit=2)
    assert plt.get_fignums() == []

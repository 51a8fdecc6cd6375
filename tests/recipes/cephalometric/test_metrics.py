from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from medtrain.data.cases import Row
from medtrain.data.manifest import Case, FileEntry
from medtrain.recipes.cephalometric.config import CephalometricData
from medtrain.recipes.cephalometric.films import points_to_text
from medtrain.recipes.cephalometric.metrics import (
    make_row,
    per_landmark,
    reference_rows,
    summarize,
)

RNG = np.random.default_rng(0)


def _row(errors: list[float], case_id: str = "001") -> Row:
    return {"case_id": case_id, "error_mm": np.array(errors)}


def test_a_row_holds_distances_in_millimeters():
    row = make_row(
        "001",
        points=np.array([[10.0, 20.0], [30.0, 40.0]]),
        true_points=np.array([[13.0, 24.0], [30.0, 39.0]]),
        mm_per_pixel=0.1,
    )
    assert row["error_mm"].tolist() == pytest.approx([0.5, 0.1])
    assert row["x"].tolist() == [10.0, 30.0]
    assert row["true_y"].tolist() == [24.0, 39.0]


def test_metrics_are_those_of_the_pooled_errors():
    metrics = summarize([_row([0.5, 1.5]), _row([2.0, 12.0])])
    assert metrics == {
        "mre_mm": 4.0,
        "sd_mm": pytest.approx(np.std([0.5, 1.5, 2.0, 12.0], ddof=1)),
        "median_mm": 1.75,
        "p95_mm": pytest.approx(10.5),
        "sdr_1_5mm": 25.0,
        "sdr_2mm": 50.0,
        "sdr_2_5mm": 75.0,
        "sdr_3mm": 75.0,
        "sdr_4mm": 75.0,
        "num_over_10mm": 1.0,
    }


@pytest.mark.parametrize("radius", [1.5, 2.0, 2.5, 3.0, 4.0])
def test_an_error_of_exactly_the_radius_is_no_success(radius):
    name = f"sdr_{radius:g}mm".replace(".", "_")
    assert summarize([_row([radius])])[name] == 0.0
    assert summarize([_row([np.nextafter(radius, 0)])])[name] == 100.0


def test_ten_millimeters_are_not_yet_far():
    assert summarize([_row([10.0, 10.1])])["num_over_10mm"] == 1.0


def test_landmark_16_can_be_left_out_of_nineteen():
    errors = [1.0] * 19
    errors[15] = 20.0
    metrics = summarize([_row(errors)])
    assert metrics["mre_mm"] == pytest.approx(2.0)
    assert metrics["mre_mm_without_l16"] == 1.0
    assert metrics["sdr_2mm"] == pytest.approx(100 * 18 / 19)
    assert metrics["sdr_2mm_without_l16"] == 100.0
    assert "mre_mm_without_l16" not in summarize([_row([1.0] * 7)])


def test_every_published_metric_is_also_given_without_landmark_16():
    errors = RNG.uniform(0, 5, (4, 19))
    metrics = summarize([_row(list(case)) for case in errors])
    rest = summarize([_row(list(case)) for case in np.delete(errors, 15, axis=1)])
    names = ("mre_mm", "sd_mm", "sdr_1_5mm", "sdr_2mm", "sdr_2_5mm", "sdr_3mm", "sdr_4mm")
    without = {n: value for n, value in metrics.items() if n.endswith("_without_l16")}
    assert without == {f"{name}_without_l16": pytest.approx(rest[name]) for name in names}


def test_what_is_undefined_is_absent():
    assert summarize([]) == {}
    assert summarize([{"case_id": "1"}, {"case_id": "2", "error_mm": None}]) == {}
    assert per_landmark([{"case_id": "1"}]) == []
    assert "sd_mm" not in summarize([_row([1.0])])
    judged: list[Row] = [{"case_id": "1"}, _row([3.0, 5.0], "2")]
    assert summarize(judged)["mre_mm"] == 4.0


def test_names_of_metrics_are_fit_for_every_tracker():
    metrics = summarize([_row(list(RNG.uniform(0, 5, 19)))])
    assert all(name.replace("_", "").isalnum() and name.islower() for name in metrics)
    assert all(type(value) is float and np.isfinite(value) for value in metrics.values())


def test_every_landmark_is_judged_over_the_cases():
    first, second = per_landmark([_row([1.0, 3.0]), _row([2.0, 5.0])], names=["sella", "nasion"])
    assert (first["landmark"], first["name"], first["mre_mm"]) == (1, "sella", 1.5)
    assert (second["landmark"], second["name"], second["mre_mm"]) == (2, "nasion", 4.0)
    assert first["sdr_2mm"] == 50.0
    assert second["sd_mm"] == pytest.approx(np.sqrt(2))
    assert per_landmark([_row([1.0])])[0]["name"] == ""


def _case(
    case_id: str,
    *,
    junior: np.ndarray | None,
    senior: np.ndarray | None,
    size: tuple[int, int] = (200, 100),
    mm: float = 0.5,
) -> Case:
    attributes = {"width": str(size[0]), "height": str(size[1]), "mm_per_pixel": str(mm)}
    for name, points in (("junior", junior), ("senior", senior)):
        if points is not None:
            attributes[name] = points_to_text([(x, y) for x, y in points.tolist()])
    entry = FileEntry(f"{case_id}.bmp", 1, "sha256:0")
    return Case(case_id, case_id, {"image": entry}, attributes)


def test_the_trivial_baseline_is_the_mean_place_as_a_part_of_the_film():
    points = RNG.uniform(10, 90, (19, 2))
    # The same heads on films of 200 x 100 and, twice as large, of 400 x 200.
    training = [
        _case("1", junior=points, senior=points),
        _case("2", junior=2 * points + 8, senior=2 * points + 8, size=(400, 200)),
    ]
    judged = [_case("3", junior=4 * points, senior=4 * points, size=(800, 400), mm=0.25)]
    (row,) = reference_rows(training, judged, CephalometricData())["mean_positions"]
    # The mean place is off by half of the second film's offset: 2 pixels of the first film.
    assert (row["x"] - row["true_x"]).tolist() == pytest.approx([8.0] * 19)
    assert summarize([row])["mre_mm"] == pytest.approx(0.25 * 8 * np.sqrt(2))


def test_the_readers_judge_each_other_on_films_that_both_have_read():
    points = RNG.uniform(10, 90, (19, 2))
    judged = [
        _case("1", junior=points + np.array([3.0, 4.0]), senior=points),
        _case("2", junior=points, senior=None),
    ]
    (row,) = reference_rows([], judged, CephalometricData(annotator="junior"))["readers"]
    assert row["case_id"] == "1"
    assert row["error_mm"].tolist() == pytest.approx([2.5] * 19)


def test_references_have_the_chosen_landmarks_and_are_absent_without_data():
    points = RNG.uniform(10, 90, (19, 2))
    cases = [_case("1", junior=points, senior=points)]
    found = reference_rows(cases, cases, CephalometricData(landmarks="maht7"))
    assert {name: len(rows[0]["x"]) for name, rows in found.items()} == {
        "mean_positions": 7,
        "readers": 7,
    }
    one_reader = [_case("1", junior=points, senior=None)]
    assert set(reference_rows(one_reader, one_reader, CephalometricData(annotator="junior"))) == {
        "mean_positions"
    }
    assert reference_rows([], [], CephalometricData()) == {}


def test_judging_needs_no_torch():
    code = (
        "import sys; from medtrain.recipes.cephalometric import figures, metrics;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'PIL')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

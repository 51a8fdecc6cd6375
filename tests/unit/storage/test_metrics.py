"""One stream of metrics from the segments of all starts of a run."""

from pathlib import Path

import pytest

from medtrain.errors import StorageError
from medtrain.storage.metrics import MetricRow, read_metrics, segment_head, segment_name
from medtrain.storage.runs import RunDirectory

Rows = dict[int, dict[str, float]]


def store(run: RunDirectory, attempt: int, number: int, *, from_step: int, rows: Rows) -> None:
    text = segment_head(attempt, number, from_step=from_step)
    for step, values in rows.items():
        text += MetricRow(step, values, float(step), attempt).to_line()
    run.write_text(f"metrics/{segment_name(attempt, number)}", text)


def series(rows: list[MetricRow], name: str) -> list[tuple[int, float, int]]:
    return [(row.step, row.values[name], row.attempt) for row in rows if name in row.values]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(str(tmp_path / "run"))


def test_a_run_without_metrics_has_none(run):
    assert read_metrics(run) == []


def test_segments_come_in_the_order_of_their_numbers_not_of_their_names(run):
    for number in (10, 2, 1):
        rows = {10 * number: {"loss": float(number)}}
        store(run, 1, number, from_step=0, rows=rows)
    assert series(read_metrics(run), "loss") == [(10, 1.0, 1), (20, 2.0, 1), (100, 10.0, 1)]


def test_later_steps_of_an_earlier_attempt_are_dropped(run):
    store(run, 1, 1, from_step=0, rows={10: {"loss": 1.0}, 20: {"loss": 2.0}, 30: {"loss": 3.0}})
    store(run, 2, 1, from_step=20, rows={30: {"loss": 3.5}})
    assert series(read_metrics(run), "loss") == [(10, 1.0, 1), (20, 2.0, 1), (30, 3.5, 2)]


def test_an_attempt_that_falls_back_further_takes_the_word_from_all_before(run):
    store(run, 1, 1, from_step=0, rows={10: {"loss": 1.0}, 20: {"loss": 2.0}})
    store(run, 2, 1, from_step=20, rows={30: {"loss": 3.0}})
    store(run, 3, 1, from_step=10, rows={20: {"loss": 2.5}})
    assert series(read_metrics(run), "loss") == [(10, 1.0, 1), (20, 2.5, 3)]


def test_what_a_later_attempt_logs_anew_at_the_step_it_starts_from_counts_once(run):
    store(run, 1, 1, from_step=0, rows={20: {"loss": 2.0, "val_loss": 9.0}})
    store(run, 2, 1, from_step=20, rows={20: {"val_loss": 8.0}})
    rows = read_metrics(run)
    assert series(rows, "loss") == [(20, 2.0, 1)]
    assert series(rows, "val_loss") == [(20, 8.0, 2)]


def test_floats_come_back_exactly(run):
    value = 0.1 + 0.2
    store(run, 1, 1, from_step=0, rows={1: {"loss": value}})
    assert series(read_metrics(run), "loss") == [(1, value, 1)]


def test_a_damaged_segment_is_named(run):
    run.write_text("metrics/1-1.jsonl", '{"attempt": 1, "segment": 1, "from_st')
    with pytest.raises(StorageError, match=r"metrics/1-1\.jsonl must be a segment"):
        read_metrics(run)


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        MetricRow(1, {"loss": float("nan")}, 0.0, 1).to_line()

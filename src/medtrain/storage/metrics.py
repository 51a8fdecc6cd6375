"""The metric stream of a run: segments `metrics/<attempt>-<k>.jsonl`, each written once.

The first line of a segment is its head, `{"attempt": 2, "segment": 1, "from_step": 400}`: attempt 2
goes on from step 400. Every other line is a row, `{"step": 450, "time": 1790000000.5, "values":
{"loss": 0.25}}`, with finite values only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from medtrain.errors import StorageError
from medtrain.storage.runs import RunDirectory

_SEGMENT = re.compile(r"(?P<attempt>[1-9]\d*)-(?P<number>[1-9]\d*)\.jsonl")


@dataclass(frozen=True)
class MetricRow:
    """What was logged at one moment."""

    step: int
    """Optimizer steps done."""
    values: Mapping[str, float]
    time: float
    """Seconds since 1970."""
    attempt: int

    def to_line(self) -> str:
        """The row as a line of a segment."""
        record = {"step": self.step, "time": self.time, "values": dict(self.values)}
        return json.dumps(record, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Segment:
    """One object of the stream."""

    attempt: int
    number: int
    from_step: int
    """Step from which the attempt goes on."""
    rows: tuple[MetricRow, ...]


def segment_name(attempt: int, number: int) -> str:
    """Name of the `number`-th segment of an attempt, both counted from 1."""
    return f"{attempt}-{number}.jsonl"


def segment_head(attempt: int, number: int, *, from_step: int) -> str:
    """The first line of a segment."""
    return json.dumps({"attempt": attempt, "segment": number, "from_step": from_step}) + "\n"


def parse_row(line: str, *, attempt: int) -> MetricRow:
    """The row that a line of a segment holds."""
    record = json.loads(line)
    return MetricRow(
        step=int(record["step"]),
        values={str(name): float(value) for name, value in record["values"].items()},
        time=float(record["time"]),
        attempt=attempt,
    )


def parse_segment(text: str) -> Segment:
    """Read a whole segment; a ValueError or KeyError where it is damaged."""
    head, *lines = text.splitlines()
    record: dict[str, Any] = json.loads(head)
    attempt = int(record["attempt"])
    return Segment(
        attempt=attempt,
        number=int(record["segment"]),
        from_step=int(record["from_step"]),
        rows=tuple(parse_row(line, attempt=attempt) for line in lines),
    )


def read_metrics(run: RunDirectory) -> list[MetricRow]:
    """All metrics of a run in order of time, as if it had never been interrupted.

    What an earlier attempt logged after the step from which a later one went on is dropped, and so
    is what the later one logged anew.

    Raises:
        StorageError: A segment is damaged.
    """
    keys = [info.key for info in run.store.list("metrics/")]
    return join_segments(
        _read_segment(run, key) for key in keys if _SEGMENT.fullmatch(key.removeprefix("metrics/"))
    )


def _read_segment(run: RunDirectory, key: str) -> Segment:
    try:
        return parse_segment(run.read_text(key))
    except (ValueError, KeyError) as error:
        raise StorageError(
            f"{run.uri}/{key} must be a segment of metrics, but is damaged ({error}). Delete it to "
            "go without what it holds."
        ) from error


def join_segments(segments: Iterable[Segment]) -> list[MetricRow]:
    """One stream from the segments of all attempts; see `read_metrics`."""
    newest_first = sorted(segments, key=lambda s: (s.attempt, s.number), reverse=True)
    # Steps after which a later attempt has the word.
    last_step: dict[int, float] = {}
    limit = float("inf")
    for attempt in sorted({segment.attempt for segment in newest_first}, reverse=True):
        last_step[attempt] = limit
        starts = [s.from_step for s in newest_first if s.attempt == attempt]
        limit = min(limit, *starts)
    rows: list[MetricRow] = []
    owner: dict[tuple[int, str], int] = {}
    for segment in newest_first:
        for row in reversed(segment.rows):
            if row.step > last_step[segment.attempt]:
                continue
            values = {
                name: value
                for name, value in row.values.items()
                if owner.setdefault((row.step, name), row.attempt) == row.attempt
            }
            if values:
                rows.append(MetricRow(row.step, values, row.time, row.attempt))
    return rows[::-1]

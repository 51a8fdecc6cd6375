"""The run's own record of its metrics: segments of JSON lines."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from medtrain.storage.metrics import MetricRow, parse_row, segment_head, segment_name
from medtrain.train.tracking.tracker import EndState
from medtrain.train.tracking.uploads import Uploads

_MOMENT_S = 5.0
"""How long the end of an epoch waits for the store, at most."""


class JsonLinesTracker:
    """Writes `metrics/<attempt>-<k>.jsonl`: a line as it is logged, a segment with every `flush`.

    The lines are on the local disk before anybody else hears of them; whole segments and artifacts
    go to the run directory.
    """

    def __init__(self, folder: Path, uploads: Uploads, *, attempt: int, from_step: int) -> None:
        self._folder = folder
        self._uploads = uploads
        self._attempt = attempt
        self._from_step = from_step
        self._number = 0
        self._file: TextIO | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def log_config(self, values: Mapping[str, Any]) -> None:
        """Nothing: the run directory has `config.yaml`."""

    def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        if self._file is None:
            self._number += 1
            name = segment_name(self._attempt, self._number)
            self._file = (self._folder / name).open("x", encoding="utf-8")
            head = segment_head(self._attempt, self._number, from_step=self._from_step)
            self._file.write(head)
        row = MetricRow(step=step, values=values, time=time.time(), attempt=self._attempt)
        self._file.write(row.to_line())
        self._file.flush()

    def log_artifact(self, path: Path, name: str) -> None:
        """Store the file in the run directory under `name`."""
        self._uploads.put(name, path.read_bytes())

    def flush(self) -> None:
        self._end_segment()
        self._uploads.settle(timeout_s=_MOMENT_S)

    def close(self, *, state: EndState = "finished", timeout_s: float = 30.0) -> None:
        """Store what is left.

        Raises:
            StorageError: The store did not take it in time.
        """
        self._end_segment()
        self._uploads.close(timeout_s=timeout_s)

    def _end_segment(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        path = Path(self._file.name)
        self._file.close()
        self._file = None
        self._uploads.put(f"metrics/{path.name}", path.read_bytes())


class SegmentFollower:
    """Reads the local segments of one attempt while they are written."""

    def __init__(self, folder: Path, *, attempt: int) -> None:
        self._folder = folder
        self._attempt = attempt
        self._number = 1
        self._file: BinaryIO | None = None

    def read(self, *, most: int) -> list[MetricRow]:
        """Up to `most` rows that were not read before, in order."""
        rows: list[MetricRow] = []
        while len(rows) < most:
            # Asked first: a segment that has a successor is complete.
            is_complete = self._path(self._number + 1).exists()
            line = self._next_line()
            if line is not None:
                rows.append(parse_row(line, attempt=self._attempt))
            elif is_complete:
                self.close()
                self._number += 1
            else:
                break
        return rows

    def close(self) -> None:
        """Let go of the segment."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _next_line(self) -> str | None:
        """The next whole line but the head; None where there is none yet."""
        if self._file is None:
            if not self._path(self._number).exists():
                return None
            self._file = self._path(self._number).open("rb")
        position = self._file.tell()
        line = self._file.readline()
        if position == 0 and line.endswith(b"\n"):
            position = self._file.tell()
            line = self._file.readline()
        if not line.endswith(b"\n"):
            self._file.seek(position)
            return None
        return line.decode()

    def _path(self, number: int) -> Path:
        return self._folder / segment_name(self._attempt, number)

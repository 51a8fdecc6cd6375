"""The run directory: who writes a run, how far it came, and its final word.

Layout, under the storage root, `runs/<system>/<variant>/<stage>/<key>/`::

    config.yaml  split.csv  facts.json
    attempts/<n>.json              created with "must not exist": a start of the run
    attempts/<n>.end.json          how that start ended
    checkpoints/<n>/<name>.json    a pointer: which blob, its SHA-256, its step
    checkpoints/<n>/<blob>         tensors and plain types
    metrics/<n>-<k>.jsonl          segments of the metric stream, never appended to
    cases/<n>/<split>.csv          one row a case
    tensorboard/  logs/  report.html
    outcome.json                   created once: the final word

Objects are written whole. Readers of a pointer take the highest attempt that has one that verifies.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from medtrain.errors import CheckpointError, StorageError
from medtrain.storage.uri import Store, open_store, sha256_of

EXIT_DONE, EXIT_VERDICT, EXIT_STOPPED, EXIT_RETRY = 0, 42, 143, 200
"""The four ends of a worker: done, not to be tried again, stopped and durable, anything else."""


@dataclass(frozen=True)
class AttemptEnd:
    """How one start of a run ended."""

    code: int
    reason: str
    step: int = 0
    """Optimizer steps done at the end."""
    durable_step: int = 0
    """Optimizer steps of the newest stored checkpoint."""
    time: str = ""


@dataclass(frozen=True)
class Outcome:
    """The final word on a run."""

    state: Literal["done", "failed", "gave_up"]
    reason: str = ""
    score: float | None = None
    """Value of the monitor (training) or of the gate's metric (evaluation)."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """Name → key of what the run made, such as `model` → `checkpoints/1/best_mre-400.pt`."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Name → SHA-256 of each artifact."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Plain facts that later stages need."""
    time: str = ""


@dataclass(frozen=True)
class Pointer:
    """A small object that makes a checkpoint exist."""

    name: str
    attempt: int
    step: int
    key: str
    """Key of the blob inside the run directory."""
    sha256: str
    size: int
    details: Mapping[str, Any] = field(default_factory=dict)
    """Plain facts such as epoch, metric and value."""


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class RunDirectory:
    """One run's home in the storage root."""

    store: Store

    @classmethod
    def open(cls, uri: str) -> RunDirectory:
        """The run directory at `uri` (a folder, `s3://…` or `gs://…`)."""
        return cls(open_store(uri))

    @property
    def uri(self) -> str:
        return self.store.uri

    #
    #
    #

    def write_text(self, key: str, text: str) -> None:
        """Write a document whole."""
        self.store.write(key, text.encode())

    def read_text(self, key: str) -> str:
        """Read a document."""
        return self.store.read(key).decode()

    def write_json(self, key: str, value: Any) -> None:
        """Write plain types as JSON."""
        self.write_text(key, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def read_json(self, key: str) -> Any:
        """Read JSON; None where there is no such object."""
        if not self.store.exists(key):
            return None
        try:
            return json.loads(self.read_text(key))
        except ValueError as error:
            raise StorageError(
                f"{self.uri}/{key} must be JSON, but is damaged ({error})"
            ) from error

    #
    #
    #

    def attempts(self) -> list[int]:
        """Numbers of all starts so far, ascending."""
        names = (info.key.removeprefix("attempts/") for info in self.store.list("attempts/"))
        return sorted(
            int(name.removesuffix(".json"))
            for name in names
            if name.removesuffix(".json").isdigit()
        )

    def claim_attempt(self, facts: Mapping[str, Any]) -> int:
        """Become the run's writer: create the next attempt. The loser of a race takes the number
        after."""
        number = (self.attempts() or [0])[-1] + 1
        record = {"host": socket.gethostname(), "time": now(), **facts}
        while not self.store.create(
            f"attempts/{number}.json", json.dumps(record, indent=1).encode()
        ):
            number += 1
        return number

    def newer_attempt(self, number: int) -> dict[str, Any] | None:
        """Who has taken over from attempt `number`: the newest later attempt, or None."""
        later = [n for n in self.attempts() if n > number]
        if not later:
            return None
        record = self.read_json(f"attempts/{later[-1]}.json") or {}
        return {"attempt": later[-1], **record}

    def end_attempt(self, number: int, end: AttemptEnd) -> None:
        """Record how a start ended."""
        self.write_json(f"attempts/{number}.end.json", {**asdict(end), "time": end.time or now()})

    def attempt_end(self, number: int) -> AttemptEnd | None:
        """How attempt `number` ended, or None where it has not said so."""
        record = self.read_json(f"attempts/{number}.end.json")
        return AttemptEnd(**record) if record else None

    def fruitless_attempts(self) -> int:
        """Starts in a row, counted from the newest, that failed without publishing a new
        checkpoint."""
        count = 0
        for number in reversed(self.attempts()):
            end = self.attempt_end(number)
            if end is not None and end.code == EXIT_STOPPED:
                continue
            if any(True for _ in self._pointers_of(number)):
                break
            count += 1
        return count

    #
    #
    #

    def outcome(self) -> Outcome | None:
        """The final word, or None while there is none."""
        record = self.read_json("outcome.json")
        return Outcome(**record) if record else None

    def write_outcome(self, outcome: Outcome) -> Outcome:
        """Say the final word, once; whoever comes second gets the first one's word."""
        record = {**asdict(outcome), "time": outcome.time or now()}
        if self.store.create(
            "outcome.json", json.dumps(record, indent=1, allow_nan=False).encode()
        ):
            return Outcome(**record)
        existing = self.outcome()
        assert existing is not None
        return existing

    def retract_verdict(self) -> None:
        """Move a final `failed` or `gave_up` aside, so that the run goes on from its checkpoint."""
        outcome = self.outcome()
        if outcome is None or outcome.state == "done":
            return
        last = (self.attempts() or [0])[-1]
        self.write_json(f"attempts/{last}.verdict.json", asdict(outcome))
        self.store.delete("outcome.json")

    def holds_what_it_names(self, outcome: Outcome) -> bool:
        """Whether every artifact that a `done` outcome names is still there."""
        return all(self.store.exists(key) for key in outcome.artifacts.values())

    #
    #
    #

    def publish(self, pointer: Pointer) -> None:
        """Make a checkpoint exist, after its blob is stored."""
        self.write_json(f"checkpoints/{pointer.attempt}/{pointer.name}.json", asdict(pointer))

    def _pointers_of(self, attempt: int) -> Iterator[Pointer]:
        for info in self.store.list(f"checkpoints/{attempt}/"):
            if info.key.endswith(".json"):
                record = self.read_json(info.key)
                if record is not None:
                    yield Pointer(**record)

    def pointers(self, name: str) -> list[Pointer]:
        """All pointers called `name`, the newest attempt's first."""
        found = []
        for number in reversed(self.attempts()):
            record = self.read_json(f"checkpoints/{number}/{name}.json")
            if record is not None:
                found.append(Pointer(**record))
        return found

    def all_pointers(self) -> list[Pointer]:
        """Every pointer of every attempt."""
        return [pointer for number in self.attempts() for pointer in self._pointers_of(number)]

    def fetch(self, pointer: Pointer, folder: Path) -> Path:
        """Download a checkpoint's blob into `folder`, verified by its SHA-256."""
        path = folder / Path(pointer.key).name
        if path.exists() and sha256_of(path) == pointer.sha256:
            return path
        if not self.store.exists(pointer.key):
            raise CheckpointError(
                f"{self.uri}/{pointer.key} is gone, though pointer '{pointer.name}' names it"
            )
        self.store.download(pointer.key, path, checksum=f"sha256:{pointer.sha256}")
        return path

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

import hashlib
import json
import logging
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter

from medtrain.errors import CheckpointError, ObjectDamaged, ObjectMissing
from medtrain.storage.stores import open_store
from medtrain.storage.uri import Store, sha256_of

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

_ATTEMPT = re.compile(r"attempts/([1-9][0-9]*)\.json")
_VERDICT = re.compile(r"attempts/([0-9]+)\.verdict\.json")
_MAX_STOPS = 20
"""Starts in a row that may end by a signal without a new checkpoint before they count."""

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

    def write_text(self, key: str, text: str) -> None:
        """Write a document whole."""
        self.store.write(key, text.encode())

    def read_text(self, key: str) -> str:
        """Read a document."""
        return self.store.read(key).decode()

    def write_json(self, key: str, value: Any) -> None:
        """Write plain types as JSON."""
        self.store.write(key, _to_json(value))

    def read_json(self, key: str) -> Any:
        """Read JSON; None where there is no such object."""
        try:
            return json.loads(self.read_text(key))
        except ObjectMissing:
            return None
        except ValueError as error:
            raise ObjectDamaged(
                f"{self.uri}/{key} must be JSON, but is damaged ({error})"
            ) from error

    def _read_record(self, key: str, kind: type[T]) -> T | None:
        try:
            text = self.read_text(key)
        except ObjectMissing:
            return None
        except ValueError as error:
            raise self._damaged(key, kind, str(error)) from error
        try:
            record = json.loads(text)
            # The call refuses unknown names, the adapter values of another type.
            kind(**record)
            return TypeAdapter(kind).validate_python(record)
        except (ValueError, TypeError) as error:
            raise self._damaged(key, kind, str(error)) from error

    def _damaged(self, key: str, kind: type, why: str) -> ObjectDamaged:
        return ObjectDamaged(
            f"{self.uri}/{key} must be a record of the kind {kind.__name__}, but is damaged "
            f"({' '.join(why.split())[:200]}). Remove it and run again: the run goes on from its "
            "checkpoint."
        )

    def attempts(self) -> list[int]:
        """Numbers of all starts so far, ascending."""
        matches = (_ATTEMPT.fullmatch(info.key) for info in self.store.list("attempts/"))
        return sorted(int(match[1]) for match in matches if match)

    def claim_attempt(self, facts: Mapping[str, Any]) -> int:
        """Become the run's writer: create the next attempt. The loser of a race takes the number
        after."""
        number = (self.attempts() or [0])[-1] + 1
        record = _to_json({"host": socket.gethostname(), "time": now(), **facts})
        while not self.store.create(f"attempts/{number}.json", record):
            number += 1
        return number

    def newer_attempt(self, number: int) -> dict[str, Any] | None:
        """Who has taken over from attempt `number`: the newest later attempt, or None."""
        later = [n for n in self.attempts() if n > number]
        if not later:
            return None
        try:
            record = self.read_json(f"attempts/{later[-1]}.json")
        except ObjectDamaged:
            # That somebody has taken over matters more than who.
            record = None
        return {**(record or {}), "attempt": later[-1]}

    def end_attempt(self, number: int, end: AttemptEnd) -> None:
        """Record how a start ended."""
        self.write_json(f"attempts/{number}.end.json", {**asdict(end), "time": end.time or now()})

    def attempt_end(self, number: int) -> AttemptEnd | None:
        """How attempt `number` ended, or None where it has not said so."""
        try:
            return self._read_record(f"attempts/{number}.end.json", AttemptEnd)
        except ObjectDamaged as error:
            _LOG.warning("how attempt %d ended is not known (%s)", number, error)
            return None

    def fruitless_attempts(self) -> int:
        """Starts in a row, counted from the newest, that published no new checkpoint.

        Those that ended by a signal count only when more than 20 of them came in a row; those
        before a retracted verdict never do.
        """
        matches = (_VERDICT.fullmatch(info.key) for info in self.store.list("attempts/"))
        forgiven = max((int(match[1]) for match in matches if match), default=0)
        count = stops = 0
        for number in reversed(self.attempts()):
            if number <= forgiven or any(True for _ in self._pointers_of(number)):
                break
            end = self.attempt_end(number)
            if end is not None and end.code == EXIT_STOPPED:
                stops += 1
                continue
            count += 1 + _if_many(stops)
            stops = 0
        return count + _if_many(stops)

    def outcome(self) -> Outcome | None:
        """The final word, or None while there is none."""
        return self._read_record("outcome.json", Outcome)

    def write_outcome(self, outcome: Outcome) -> Outcome:
        """Say the final word, once; whoever comes second gets the first one's word."""
        said = replace(outcome, time=outcome.time or now())
        while not self.store.create("outcome.json", _to_json(asdict(said))):
            existing = self.outcome()
            if existing is not None:
                return existing
            # It was a verdict, retracted since.
        return said

    def retract_verdict(self) -> None:
        """Move a final `failed` or `gave_up` aside, so that the run goes on from its checkpoint.

        A `done` goes the same way if what it names is gone, for nothing can follow from it.
        """
        outcome = self.outcome()
        if outcome is None or (outcome.state == "done" and self.holds_what_it_names(outcome)):
            return
        last = (self.attempts() or [0])[-1]
        self.write_json(f"attempts/{last}.verdict.json", asdict(outcome))
        self.store.delete("outcome.json")

    def holds_what_it_names(self, outcome: Outcome) -> bool:
        """Whether every artifact that a `done` outcome names is still there."""
        return all(self.store.exists(key) for key in outcome.artifacts.values())

    def publish(self, pointer: Pointer) -> None:
        """Make a checkpoint exist, after its blob is stored."""
        self.write_json(
            f"checkpoints/{pointer.attempt}/{pointer.name}.json",
            {**asdict(pointer), "check": _check(pointer)},
        )

    def _pointers_of(self, attempt: int) -> Iterator[Pointer]:
        for info in self.store.list(f"checkpoints/{attempt}/"):
            if info.key.endswith(".json"):
                pointer = self._read_pointer(info.key)
                if pointer is not None:
                    yield pointer

    def _read_pointer(self, key: str) -> Pointer | None:
        """A pointer; None where it is absent, or damaged, which is said: an older one will do."""
        try:
            record = self.read_json(key)
            if record is None:
                return None
            check = record.pop("check")
            pointer = Pointer(**record)
            if check != _check(pointer):
                raise ValueError("its checksum differs")
        except (ObjectDamaged, ValueError, TypeError, KeyError, AttributeError) as error:
            _LOG.warning("pointer %s/%s is damaged and passed over (%s)", self.uri, key, error)
            return None
        return pointer

    def pointers(self, name: str) -> list[Pointer]:
        """All pointers called `name`, the newest attempt's first."""
        found = (
            self._read_pointer(f"checkpoints/{number}/{name}.json")
            for number in reversed(self.attempts())
        )
        return [pointer for pointer in found if pointer is not None]

    def all_pointers(self) -> list[Pointer]:
        """Every pointer of every attempt."""
        return [pointer for number in self.attempts() for pointer in self._pointers_of(number)]

    def fetch(self, pointer: Pointer, folder: Path) -> Path:
        """Download a checkpoint's blob into `folder`, verified by its SHA-256.

        Raises:
            CheckpointError: The blob is gone or damaged: an older checkpoint may do.
            StorageError: The store cannot be read: nobody knows.
        """
        path = folder / Path(pointer.key).name
        if path.is_file() and sha256_of(path) == pointer.sha256:
            return path
        try:
            self.store.download(pointer.key, path, checksum=f"sha256:{pointer.sha256}")
        except ObjectMissing as error:
            raise CheckpointError(
                f"{self.uri}/{pointer.key} is gone, though pointer '{pointer.name}' of attempt "
                f"{pointer.attempt} names it"
            ) from error
        except ObjectDamaged as error:
            raise CheckpointError(
                f"checkpoint '{pointer.name}' of attempt {pointer.attempt} is damaged: {error}"
            ) from error
        return path


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _check(pointer: Pointer) -> str:
    """SHA-256 of what a pointer says, so that a damaged one is not believed."""
    said = json.loads(json.dumps(asdict(pointer)))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _if_many(stops: int) -> int:
    return stops if stops > _MAX_STOPS else 0

"""Checkpoints: a state exists once its blob and then its pointer are in the storage root.

A blob's name carries its step and the beginning of its SHA-256, so a blob is never overwritten. The
writer keeps `last`, the `previous` one to fall back to, the best ones, and on request periodic ones
(`step_<n>`). It deletes only what no pointer names any more, of its own and of older attempts.

The local disk is scratch. While the storage is away the newest states wait there and training goes
on; see `Checkpoints.save`.
"""

from __future__ import annotations

import logging
import os
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from medtrain.errors import CheckpointError, ConfigError, StorageError
from medtrain.storage.files import sha256_of, writing
from medtrain.storage.runs import Pointer, RunDirectory

log = logging.getLogger(__name__)

State = dict[str, Any]
"""Tensors and plain types."""

FORMAT = 1
_MIGRATIONS: Mapping[int, Callable[[State], State]] = {}
"""From a format number to the function that makes a state of the next one."""


class RunTakenOver(ConfigError):
    """A newer attempt writes this run: whoever gets this stops and writes nothing more."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that was found, verified and read."""

    pointer: Pointer
    state: State


def read_checkpoint(run: RunDirectory, pointer: Pointer, scratch: Path) -> State:
    """Read what `pointer` names.

    Raises:
        CheckpointError: The blob is gone, damaged or of an unknown format.
        StorageError: The storage did not answer; the checkpoint may be whole.
    """
    # A folder of its own, for processes that share `scratch`.
    path = run.fetch(pointer, scratch / f"read-{os.getpid()}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {pointer.key} must hold tensors and plain types only ({error})"
        ) from error
    finally:
        path.unlink()
    return _migrated(state, pointer.key)


def read_newest(run: RunDirectory, name: str, scratch: Path) -> LoadedCheckpoint | None:
    """The newest whole checkpoint called `name`; None where the run never had one.

    For `last` every training state of the run will do, newest attempt and step first: a damaged one
    is passed over with a sentence.

    Raises:
        CheckpointError: There are some, and none is whole.
        StorageError: The storage did not answer.
    """
    candidates = [p for p in run.all_pointers() if _is_called(p, name)]
    candidates.sort(key=lambda p: (p.attempt, p.step, p.name == name), reverse=True)
    for pointer in candidates:
        try:
            return LoadedCheckpoint(pointer, read_checkpoint(run, pointer, scratch))
        except CheckpointError as error:
            log.warning("%s; trying the one before it", error)
    if candidates:
        raise CheckpointError(
            f"one of the {len(candidates)} checkpoints for '{name}' of {run.uri} must be whole, "
            "but none is. Start the run from the beginning with --again."
        )
    return None


class Checkpoints:
    """Writes one attempt's checkpoints; only rank 0 saves, every rank may load."""

    def __init__(
        self,
        run: RunDirectory,
        *,
        attempt: int,
        scratch: Path,
        keep: int = 0,
        max_undurable_minutes: float = 30.0,
    ) -> None:
        """
        Args:
            run: The run directory.
            attempt: Number of this start.
            scratch: Local folder for files on their way.
            keep: Periodic checkpoints to keep beside `last`, `previous` and the best ones.
            max_undurable_minutes: How long saving may fail before training ends.
        """
        self.durable_step = 0
        """Optimizer steps of the newest stored training state, as far as this attempt knows."""
        self._run = run
        self._attempt = attempt
        self._scratch = scratch
        self._keep = keep
        self._patience_s = max_undurable_minutes * 60
        self._former: Pointer | None = None
        self._waiting: list[_Waiting] = []
        self._failing_since: float | None = None

    def save(self, state: State, *, step: int, names: Mapping[str, Mapping[str, Any]]) -> None:
        """Store `state` and let the pointers `names` (with their details) name it.

        A storage that is away is borne for `max_undurable_minutes`: the state waits on the local
        disk, and a newer one of the same name replaces it.

        Raises:
            RunTakenOver: A newer attempt has begun.
            StorageError: The storage has been away for too long.
        """
        for waiting in self._waiting:
            for name in names:
                waiting.names.pop(name, None)
        for waiting in [w for w in self._waiting if not w.names]:
            waiting.path.unlink()
            self._waiting.remove(waiting)
        self._waiting.append(self._write(state, step, names))
        # `last` remembers the best scores: it must not be out before their weights.
        self._waiting.sort(key=lambda waiting: "last" in waiting.names)
        try:
            self._deliver()
        except StorageError as error:
            now = time.monotonic()
            self._failing_since = self._failing_since or now
            if now - self._failing_since > self._patience_s:
                raise
            log.warning("checkpoint of step %d waits on the local disk: %s", step, error)

    def wait(self) -> None:
        """Return when everything saved is stored; a StorageError where that is impossible."""
        if self._waiting:
            self._deliver()

    def load_newest(self, name: str = "last") -> LoadedCheckpoint | None:
        """The newest whole checkpoint called `name` of any attempt; see `read_newest`."""
        found = read_newest(self._run, name, self._scratch)
        if found is not None and name == "last":
            self._former = found.pointer
            self.durable_step = found.pointer.step
        return found

    def load(self, pointer: Pointer) -> State:
        """The state that `pointer` names; see `read_checkpoint`."""
        return read_checkpoint(self._run, pointer, self._scratch)

    def pointers(self) -> dict[str, Pointer]:
        """The newest attempt's pointer of every name."""
        newest: dict[str, Pointer] = {}
        for pointer in self._run.all_pointers():
            newest[pointer.name] = pointer
        return newest

    def _write(self, state: State, step: int, names: Mapping[str, Mapping[str, Any]]) -> _Waiting:
        """Put the state on the local disk, whole."""
        stem = f"{next(iter(names))}-{step}"
        temporary = self._scratch / f"{stem}.new"
        with writing(temporary) as file:
            torch.save({**state, "format": FORMAT}, file)
        sha256 = sha256_of(temporary)
        path = temporary.replace(self._scratch / f"{stem}-{sha256[:8]}.pt")
        return _Waiting(path, sha256, step, {name: dict(d) for name, d in names.items()})

    def _deliver(self) -> None:
        while self._waiting:
            waiting = self._waiting[0]
            key = f"checkpoints/{self._attempt}/{waiting.path.name}"
            self._run.store.upload(waiting.path, key)
            self._check_still_ours()
            size = waiting.path.stat().st_size
            for name, details in waiting.names.items():
                pointer = Pointer(
                    name, self._attempt, waiting.step, key, waiting.sha256, size, details
                )
                self._publish(pointer)
            waiting.path.unlink()
            self._waiting.pop(0)
            if "last" in waiting.names:
                self.durable_step = waiting.step
        self._failing_since = None
        self._clean()

    def _check_still_ours(self) -> None:
        newer = self._run.newer_attempt(self._attempt)
        if newer is not None:
            raise RunTakenOver(
                f"attempt {newer['attempt']} ({newer.get('host', 'unknown host')}, "
                f"{newer.get('time', 'unknown time')}) has taken over this run"
            )

    def _publish(self, pointer: Pointer) -> None:
        if pointer.name == "last":
            if self._former is not None and self._former.key != pointer.key:
                self._run.publish(replace(self._former, name="previous", attempt=self._attempt))
            if self._keep:
                self._run.publish(replace(pointer, name=f"step_{pointer.step}"))
            self._former = pointer
        self._run.publish(pointer)

    def _clean(self) -> None:
        """Delete superseded pointers, then blobs that no pointer names."""
        store = self._run.store
        try:
            pointers = self._run.all_pointers()
            own = {pointer.name for pointer in pointers if pointer.attempt == self._attempt}
            periodic = [
                p for p in pointers if p.attempt <= self._attempt and p.name.startswith("step_")
            ]
            periodic.sort(key=lambda p: (p.attempt, p.step), reverse=True)
            superseded = [p for p in pointers if p.attempt < self._attempt and p.name in own]
            superseded += periodic[self._keep :]
            for pointer in superseded:
                store.delete(f"checkpoints/{pointer.attempt}/{pointer.name}.json")
            named = {pointer.key for pointer in pointers if pointer not in superseded}
            for info in store.list("checkpoints/"):
                attempt, _, file = info.key.removeprefix("checkpoints/").partition("/")
                is_blob = file.endswith(".pt")
                if is_blob and int(attempt) <= self._attempt and info.key not in named:
                    store.delete(info.key)
        except StorageError as error:
            log.warning("old checkpoints stay for now: %s", error)


@dataclass(frozen=True)
class _Waiting:
    """A state on the local disk on its way to the storage."""

    path: Path
    sha256: str
    step: int
    names: dict[str, dict[str, Any]]


def _is_called(pointer: Pointer, name: str) -> bool:
    if name == "last":
        return pointer.name in ("last", "previous") or pointer.name.startswith("step_")
    return pointer.name == name


def _migrated(state: State, key: str) -> State:
    number = state.get("format")
    while number != FORMAT:
        migrate = _MIGRATIONS.get(number) if isinstance(number, int) else None
        if migrate is None:
            raise CheckpointError(
                f"checkpoint {key} must have a format up to {FORMAT}, but has {number}. Read it "
                "with the version of medtrain that wrote it."
            )
        state = migrate(state)
        number = state["format"]
    return state

"""What a tracker answers, and the one that hands everything on to the others."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from medtrain.config import NAME_PATTERN

log = logging.getLogger(__name__)

_NAME = re.compile(NAME_PATTERN)

EndState = Literal["finished", "failed", "killed"]
"""How a start of a run ended; `killed` is one that was stopped and may go on."""


class Tracker(Protocol):
    """Takes what a run says about itself. Values are finite, names are `[a-z0-9_]+`."""

    def log_config(self, values: Mapping[str, Any]) -> None:
        """The resolved configuration as a tree of plain types, once, before the first metric."""

    def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Values after `step` optimizer steps; a name at most once a step."""

    def log_artifact(self, path: Path, name: str) -> None:
        """A small file, under `name` (which may contain `/`); it may be deleted afterwards."""

    def flush(self) -> None:
        """Make what was logged outlive this process, as far as that takes a moment only.

        Call it at the end of an epoch, and before a checkpoint's pointer is published.
        """

    def close(self, *, state: EndState = "finished", timeout_s: float = 30.0) -> None:
        """Deliver what is left, waiting `timeout_s` at most, and say how this start ended."""


class CompositeTracker:
    """Hands everything to `record` first, then to `guests`.

    Values that are not finite and names that Katib could not read are dropped here, aloud. The
    record's errors are the run's errors; a guest that fails is dismissed with a sentence, because a
    picture of the training must never end it.
    """

    def __init__(self, record: Tracker, guests: Sequence[Tracker] = ()) -> None:
        self._record = record
        self._guests = list(guests)
        self._num_not_finite = 0
        self._bad_names: set[str] = set()

    def log_config(self, values: Mapping[str, Any]) -> None:
        self._record.log_config(values)
        self._tell_guests(lambda guest: guest.log_config(values))

    def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        clean = self._cleaned(values, step)
        if clean:
            self._record.log_metrics(clean, step=step)
            self._tell_guests(lambda guest: guest.log_metrics(clean, step=step))

    def log_artifact(self, path: Path, name: str) -> None:
        self._record.log_artifact(path, name)
        self._tell_guests(lambda guest: guest.log_artifact(path, name))

    def flush(self) -> None:
        self._record.flush()
        self._tell_guests(lambda guest: guest.flush())

    def close(self, *, state: EndState = "finished", timeout_s: float = 30.0) -> None:
        """Guests first, because one of them stores its files through the record.

        Raises:
            StorageError: The run's own files could not be stored.
        """
        deadline = time.monotonic() + timeout_s
        try:
            self._record.flush()
        finally:
            self._tell_guests(
                lambda guest: guest.close(
                    state=state, timeout_s=max(0.0, deadline - time.monotonic())
                )
            )
            if self._num_not_finite:
                log.warning(
                    "metrics: %d values in all were not finite and are not logged",
                    self._num_not_finite,
                )
            # Its files matter more than the guests' patience: it always has a moment of its own.
            self._record.close(state=state, timeout_s=max(5.0, deadline - time.monotonic()))

    def _cleaned(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        numbers = {name: float(value) for name, value in values.items()}
        for name in numbers.keys() - self._bad_names:
            if not _NAME.fullmatch(name):
                self._bad_names.add(name)
                log.warning("metric '%s' must be named [a-z0-9_]+ and is not logged", name)
        odd = {name: value for name, value in numbers.items() if not math.isfinite(value)}
        if odd:
            self._num_not_finite += len(odd)
            log.warning(
                "metrics: %s at step %d not finite, not logged (%d so far)",
                ", ".join(f"{name}={value}" for name, value in odd.items()),
                step,
                self._num_not_finite,
            )
        return {
            name: value
            for name, value in numbers.items()
            if name not in odd and name not in self._bad_names
        }

    def _tell_guests(self, tell: Callable[[Tracker], None]) -> None:
        for guest in tuple(self._guests):
            try:
                tell(guest)
            except Exception as error:
                self._guests.remove(guest)
                log.warning(
                    "%s is dismissed, training goes on without it: %s: %s",
                    type(guest).__name__,
                    type(error).__name__,
                    error,
                )

"""The protocol of a place where jobs run, and the one `wait` above all of them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from medtrain.errors import JobFailed
from medtrain.launch.job import JobSpec
from medtrain.storage.runs import EXIT_STOPPED, Outcome, RunDirectory

METRIC_LINE = re.compile(r"(?P<name>[a-z0-9_]+)=(?P<value>[-+.e0-9]+)")
"""A value that a worker prints for whoever collects metrics."""

Manifest = Mapping[str, Any]
"""What a launcher would send, as plain types."""


@dataclass(frozen=True)
class JobStatus:
    """How a job stands, as its place sees it."""

    state: Literal["running", "ended", "absent"]
    code: int | None = None
    """Exit code, where the place knows it."""
    reason: str = ""


class Launcher(Protocol):
    """A place where jobs run."""

    def render(self, job: JobSpec) -> Manifest:
        """What would be sent: pure and printable."""

    def submit(self, job: JobSpec) -> str:
        """Start the job, or adopt the live one of the same name and run key; its name."""

    def status(self, name: str) -> JobStatus:
        """How the job stands."""

    def read_log(self, name: str, *, start: int = 0) -> bytes:
        """The main process's log from byte `start` on."""

    def cancel(self, name: str) -> None:
        """Ask the job to stop, as by SIGTERM."""


def wait(
    launcher: Launcher,
    job: JobSpec,
    *,
    on_line: Callable[[str], None],
    on_interrupt: Callable[[], None] | None = None,
    poll_s: float = 0.3,
) -> Outcome:
    """Follow a job to its end and return the run's outcome.

    A first Ctrl-C calls `on_interrupt` and goes on following; a second one leaves.

    The run's own words are believed first: `outcome.json`, then the attempt's end, then the place.

    Raises:
        JobFailed: With the reason and the last lines of the log.
    """
    run = RunDirectory.open(job.run_uri)
    position, partial = 0, b""
    tail: list[str] = []
    is_interrupted = False
    while True:
        try:
            status = launcher.status(job.name)
            data = launcher.read_log(job.name, start=position)
            position += len(data)
            *lines, partial = (partial + data).split(b"\n")
            for line in lines:
                text = line.decode(errors="replace").rstrip()
                if not METRIC_LINE.fullmatch(text):
                    tail = [*tail[-19:], text]
                on_line(text)
            if status.state == "running":
                time.sleep(poll_s)
            elif not data:
                break
        except KeyboardInterrupt:
            if on_interrupt is None or is_interrupted:
                raise
            is_interrupted = True
            on_interrupt()
    outcome = run.outcome()
    if outcome is not None and outcome.state == "done":
        return outcome
    if outcome is not None:
        raise JobFailed(f"{job.name} {outcome.state.replace('_', ' ')}: {outcome.reason}")
    raise JobFailed(_explain(job, run, status, tail))


def _explain(job: JobSpec, run: RunDirectory, status: JobStatus, tail: list[str]) -> str:
    attempts = run.attempts()
    end = run.attempt_end(attempts[-1]) if attempts else None
    # A worker that refuses before it has claimed an attempt leaves its reason in the log alone.
    is_of_this_start = end is not None and (status.code is None or end.code == status.code)
    if end is not None and is_of_this_start and end.code == EXIT_STOPPED:
        return (
            f"{job.name} was stopped: {end.reason}. Its checkpoint of step {end.durable_step} is "
            f"stored; the same command goes on from there."
        )
    reason = end.reason if end is not None and is_of_this_start else status.reason
    last_lines = "\n".join(f"    {line}" for line in tail if line)
    return f"{job.name} ended without a result: {reason}\nLast lines of its log:\n{last_lines}"

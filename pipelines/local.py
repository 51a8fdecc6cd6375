"""Run a pipeline on this machine through `kfp.local`, telling it in our own lines."""

import contextlib
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

from kfp import local

from medtrain.errors import JobFailed
from medtrain.settings import settings

MARK = "medtrain| "
"""Begins a line that a component wants the person to see; all others go to the log file."""


def run_locally(pipeline: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run `pipeline` to its end and return its outputs.

    Raises:
        JobFailed: A step failed; its own lines have said why.
    """
    site = settings()
    log_path = site.home / "logs" / f"pipeline-{time.strftime('%Y%m%d-%H%M%S')}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with (
        _environment({**site.environment(), "MEDTRAIN_LINE_PREFIX": MARK}),
        log_path.open("w") as log_file,
        _OwnLines(sys.stdout, log_file) as filtered,
        contextlib.redirect_stdout(filtered),
        _interrupts_reach_the_step() as interrupted,
        warnings.catch_warnings(),
    ):
        # About images and names in a user interface, of which there are none on this machine.
        warnings.filterwarnings("ignore", module=r"kfp\.local")
        local.init(
            runner=local.SubprocessRunner(use_venv=False),
            pipeline_root=str((site.home / "kfp").absolute()),
        )
        try:
            outputs: dict[str, Any] = pipeline(**arguments).outputs
            return outputs
        except RuntimeError as error:
            if interrupted:
                raise KeyboardInterrupt from error
            if not filtered.has_told_error:
                log_file.flush()
                tail = "\n".join(log_path.read_text().splitlines()[-30:])
                raise JobFailed(f"{error}\nLast lines of {log_path}:\n{tail}") from error
            raise JobFailed(
                f"the pipeline stopped at the step above; whole log: {log_path}"
            ) from error


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Steps are processes of their own and read the site from the environment."""
    former = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _interrupts_reach_the_step() -> Iterator[list[int]]:
    """Ctrl-C goes to the step's process too, which stops its job in order: wait for it."""
    received: list[int] = []
    former = signal.signal(signal.SIGINT, lambda signum, frame: received.append(signum))
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, former)


class _OwnLines(io.TextIOBase):
    """Passes marked lines on to the person and keeps everything in the log file."""

    def __init__(self, person: Any, log_file: Any) -> None:
        self._person = person
        self._log_file = log_file
        self._partial = ""
        self.has_told_error = False

    def write(self, text: str) -> int:
        self._log_file.write(text)
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            _, mark, told = line.partition(MARK)
            if mark:
                self.has_told_error = self.has_told_error or told.startswith("error:")
                self._person.write(told + "\n")
                self._person.flush()
        return len(text)

    def flush(self) -> None:
        self._log_file.flush()

"""Jobs as processes on this machine: the same argv as in a container, under torch's elastic agent.

A job survives its launcher: it runs in a session of its own, writes its log to a file, and a
launcher that comes later adopts it by name and run key.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock

from medtrain.errors import JobNotFound, LaunchError
from medtrain.launch.job import JobSpec
from medtrain.launch.launcher import JobStatus, Manifest
from medtrain.storage.runs import EXIT_DONE, EXIT_RETRY, EXIT_STOPPED, EXIT_VERDICT

_LOG = logging.getLogger(__name__)
_MEANINGS = {
    EXIT_DONE: "done",
    EXIT_VERDICT: "its own inputs do not allow it",
    EXIT_STOPPED: "stopped by a signal",
    EXIT_RETRY: "failed in a way that another try may mend",
}


@dataclass(frozen=True)
class _Record:
    """What is known of a started job: enough to find the very process again."""

    pid: int
    created: float | None
    """When the process was created: a pid alone may be used again."""
    run_key: str


@dataclass
class _Restarts:
    """What is left of a job's starts."""

    job: JobSpec
    left: int
    done: int = 0
    due: float | None = None
    """When the next one is, on the monotonic clock; None while none is waited for."""


def restart_delay_s(number: int) -> float:
    """How long the `number`-th restart (1-based) is waited for."""
    return float(min(30, 2**number))


class LocalLauncher:
    """Starts workers as processes; restarts one that ends with 200 until it gives itself up."""

    def __init__(
        self, folder: Path, *, restart_delay_s: Callable[[int], float] = restart_delay_s
    ) -> None:
        """
        Args:
            folder: Where logs and records of jobs are.
            restart_delay_s: Seconds before the n-th restart (1-based) of a job.
        """
        self._folder = folder
        self._restart_delay_s = restart_delay_s
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._restarts: dict[str, _Restarts] = {}

    def render(self, job: JobSpec) -> Manifest:
        """The command and its environment; a LaunchError for a job of several nodes."""
        _check_nodes(job)
        topology = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": str(job.processes)}
        return {
            "argv": [sys.executable, "-m", "medtrain.worker", *job.argv],
            "env": {**job.env, **topology, "PET_STANDALONE": "1"},
        }

    def submit(self, job: JobSpec) -> str:
        """Start the job, or adopt the live one of the same name and run key.

        Raises:
            LaunchError: The job is for several nodes.
        """
        _check_nodes(job)
        self._folder.mkdir(parents=True, exist_ok=True)
        # The worker counts fruitless attempts itself; this bounds starts that claim none.
        self._restarts[job.name] = _Restarts(job, left=2 * job.attempts)
        with self._lock(job.name):
            if not self._is_live(job):
                self._log_path(job.name).write_bytes(b"")
                self._start(job)
        return job.name

    def status(self, name: str) -> JobStatus:
        """How the job stands; one that ended with 200 is started again here when it is time."""
        child = self._children.get(name)
        if child is not None:
            code = child.poll()
            if code is None:
                return JobStatus("running")
            restarts = self._restarts.get(name)
            if code == EXIT_RETRY and restarts is not None and restarts.left > 0:
                return self._restart(restarts)
            return JobStatus("ended", code, _MEANINGS.get(code, f"ended with code {code}"))
        record = self._record(name)
        if record is None:
            return JobStatus("absent", reason="no such job on this machine")
        if _is_alive(record):
            return JobStatus("running")
        return JobStatus("ended", reason="its process is gone")

    def read_log(self, name: str, *, start: int = 0) -> bytes:
        """The log from byte `start` on."""
        path = self._log_path(name)
        if not path.exists():
            return b""
        with path.open("rb") as log:
            log.seek(start)
            return log.read()

    def cancel(self, name: str) -> None:
        """Send SIGTERM; a job that waits for its restart is not started again."""
        record = self._record(name)
        if record is None:
            raise JobNotFound(f"job '{name}' must be one of this machine's, but none has this name")
        self._restarts.pop(name, None)
        if _is_alive(record):
            os.kill(record.pid, signal.SIGTERM)

    def _restart(self, restarts: _Restarts) -> JobStatus:
        """Start the job again if it is time; until then it counts as running."""
        job = restarts.job
        if restarts.due is None:
            restarts.due = time.monotonic() + self._restart_delay_s(restarts.done + 1)
        rest_s = restarts.due - time.monotonic()
        if rest_s > 0:
            return JobStatus("running", reason=f"ended with 200, starts again in {rest_s:.0f} s")
        restarts.left, restarts.done, restarts.due = restarts.left - 1, restarts.done + 1, None
        with self._lock(job.name):
            if self._is_live(job):
                # Somebody has submitted the job again in the meantime.
                del self._children[job.name]
            else:
                self._start(job)
        return JobStatus("running", reason="started again")

    def _is_live(self, job: JobSpec) -> bool:
        record = self._record(job.name)
        return record is not None and record.run_key == job.run_key and _is_alive(record)

    def _lock(self, name: str) -> FileLock:
        return FileLock(self._folder / f"{name}.lock")

    def _start(self, job: JobSpec) -> None:
        manifest = self.render(job)
        with self._log_path(job.name).open("ab") as log:
            child = subprocess.Popen(
                manifest["argv"],
                env={**_clean_environment(), **manifest["env"]},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children[job.name] = child
        record = {"pid": child.pid, "created": _created(child.pid), "run_key": job.run_key}
        temporary = self._folder / f".{job.name}.json.new"
        temporary.write_text(json.dumps(record))
        temporary.replace(self._folder / f"{job.name}.json")

    def _record(self, name: str) -> _Record | None:
        path = self._folder / f"{name}.json"
        try:
            return _Record(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            _LOG.warning("record %s of a former job is damaged and left aside (%s)", path, error)
            return None

    def _log_path(self, name: str) -> Path:
        return self._folder / f"{name}.log"


def _check_nodes(job: JobSpec) -> None:
    if job.nodes > 1:
        raise LaunchError(
            f"job.nodes must be 1 on one machine, but is {job.nodes}. Set job.nodes=1 and "
            "job.processes to the number of processes (one a GPU)."
        )


def _clean_environment() -> dict[str, str]:
    """The environment without the topology of another distributed job, such as the shell's."""
    foreign = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PET_", "MASTER_", "TORCHELASTIC_")) and name not in foreign
    }


def _created(pid: int) -> float | None:
    """When the process was created, in seconds since the epoch; None where it is gone."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def _is_alive(record: _Record) -> bool:
    created = _created(record.pid)
    return created is not None and created == record.created

"""Jobs as processes on this machine: the same argv as in a container, under torch's elastic agent.

A job survives its launcher: it runs in a session of its own, writes its log to a file, and a
launcher that comes later adopts it by name and run key.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock

from medtrain.errors import JobNotFound
from medtrain.launch.job import JobSpec
from medtrain.launch.launcher import JobStatus, Manifest
from medtrain.storage.runs import EXIT_DONE, EXIT_RETRY, EXIT_STOPPED, EXIT_VERDICT

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


class LocalLauncher:
    """Starts workers as processes; restarts one that ends with 200 until it gives itself up."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._starts_left: dict[str, tuple[JobSpec, int]] = {}

    def render(self, job: JobSpec) -> Manifest:
        """The command and its environment."""
        topology = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": str(job.processes)}
        return {
            "argv": [sys.executable, "-m", "medtrain.worker", *job.argv],
            "env": {**job.env, **topology, "PET_STANDALONE": "1"},
        }

    def submit(self, job: JobSpec) -> str:
        """Start the job, or adopt the live one of the same name and run key."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # The worker counts fruitless attempts itself; this bounds starts that claim none.
        self._starts_left[job.name] = (job, 2 * job.attempts)
        with FileLock(self._folder / f"{job.name}.lock"):
            record = self._record(job.name)
            if record is not None and record.run_key == job.run_key and _is_alive(record):
                return job.name
            self._log_path(job.name).write_bytes(b"")
            self._start(job)
        return job.name

    def status(self, name: str) -> JobStatus:
        """How the job stands; one that ended with 200 is started again here."""
        child = self._children.get(name)
        if child is not None:
            code = child.poll()
            if code is None:
                return JobStatus("running")
            job, starts_left = self._starts_left.get(name, (None, 0))
            if code == EXIT_RETRY and job is not None and starts_left > 0:
                self._starts_left[name] = (job, starts_left - 1)
                self._start(job)
                return JobStatus("running", reason="started again")
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
        """Send SIGTERM."""
        record = self._record(name)
        if record is None:
            raise JobNotFound(f"job '{name}' must be one of this machine's, but none has this name")
        self._starts_left.pop(name, None)
        if _is_alive(record):
            os.kill(record.pid, signal.SIGTERM)

    def _start(self, job: JobSpec) -> None:
        manifest = self.render(job)
        with self._log_path(job.name).open("ab") as log:
            child = subprocess.Popen(
                manifest["argv"],
                env={**os.environ, **manifest["env"]},
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
        return _Record(**json.loads(path.read_text())) if path.exists() else None

    def _log_path(self, name: str) -> Path:
        return self._folder / f"{name}.log"


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

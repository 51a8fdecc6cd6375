"""One description of a job, from which every launcher renders what its place needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from medtrain.config import Job
from medtrain.errors import LaunchError

MAX_NAME_LENGTH = 40
"""Pod and service names append to a job's name and must stay below Kubernetes' 63 characters."""


@dataclass(frozen=True)
class JobSpec:
    """What to run, how large, and for which run: the same whatever the place."""

    name: str
    run_key: str
    run_uri: str
    argv: tuple[str, ...]
    """Arguments of `python -m medtrain.worker`."""
    env: Mapping[str, str]
    nodes: int = 1
    processes: int = 1
    """Processes (one a GPU) on each node."""
    cpu: str = "4"
    memory: str = "16Gi"
    attempts: int = 3
    grace_s: int = 120
    labels: Mapping[str, str] = field(default_factory=dict)


def job_name(*, system: str, stage: str, run_key: str) -> str:
    """`<system>-<stage>-<8 digits of the run key>`: a DNS label, the same at every try."""
    name = f"{system}-{stage}-{run_key[:8]}".replace("_", "-")
    if len(name) > MAX_NAME_LENGTH:
        raise LaunchError(
            f"job name '{name}' must have at most {MAX_NAME_LENGTH} characters, but has "
            f"{len(name)}. Give the system or the stage a shorter name."
        )
    return name


def build_job(
    *,
    system: str,
    variant: str,
    stage: str,
    run_key: str,
    run_uri: str,
    argv: Sequence[str],
    job: Job,
    site_env: Mapping[str, str],
) -> JobSpec:
    """Describe the job of one run.

    Args:
        system: Name of the system.
        variant: Name of the variant.
        stage: Name of the stage, or of the verb where there is none (`prepare`, `evaluate`).
        run_key: Identity of the run.
        run_uri: The run directory.
        argv: Arguments of the worker.
        job: Resources.
        site_env: Environment that carries the site's settings.
    """
    return JobSpec(
        name=job_name(system=system, stage=stage, run_key=run_key),
        run_key=run_key,
        run_uri=run_uri,
        argv=tuple(argv),
        env={**site_env, "OMP_NUM_THREADS": str(job.threads)},
        nodes=job.nodes,
        processes=job.processes,
        cpu=job.cpu,
        memory=job.memory,
        attempts=job.attempts,
        grace_s=job.grace_s,
        labels={
            "app.kubernetes.io/managed-by": "medtrain",
            "medtrain/system": system,
            "medtrain/variant": variant,
            "medtrain/stage": stage,
            "medtrain/run-key": run_key,
        },
    )

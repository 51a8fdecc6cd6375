"""The description of a job."""

import pytest

from medtrain.config import Job
from medtrain.errors import LaunchError
from medtrain.launch.job import build_job, job_name


def test_name_is_a_dns_label_of_system_stage_and_key() -> None:
    name = job_name(system="chest_xray", stage="fusion", run_key="0123456789abcdef")
    assert name == "chest-xray-fusion-01234567"


def test_too_long_a_name_is_refused() -> None:
    with pytest.raises(LaunchError, match="at most 40 characters"):
        job_name(system="a" * 30, stage="b" * 10, run_key="0" * 32)


def test_every_job_sets_the_number_of_threads() -> None:
    job = build_job(
        system="s",
        variant="v",
        stage="train",
        run_key="0" * 32,
        run_uri="/runs/x",
        argv=["train", "s"],
        job=Job(threads=3),
        site_env={"MEDTRAIN_HOME": "/h"},
    )
    assert job.env == {"MEDTRAIN_HOME": "/h", "OMP_NUM_THREADS": "3"}
    assert job.labels["medtrain/run-key"] == "0" * 32

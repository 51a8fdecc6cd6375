"""Jobs as processes of this machine, with a small program in the worker's place."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from medtrain.errors import JobFailed, JobNotFound, LaunchError
from medtrain.launch.job import JobSpec
from medtrain.launch.launcher import Manifest, wait
from medtrain.launch.local import LocalLauncher, restart_delay_s
from medtrain.storage.runs import AttemptEnd, Outcome, RunDirectory


class ScriptLauncher(LocalLauncher):
    """Runs `python -c` with the job's first argument."""

    def render(self, job: JobSpec) -> Manifest:
        return {"argv": [sys.executable, "-c", job.argv[0]], "env": dict(job.env)}


@pytest.fixture
def launcher(tmp_path: Path) -> ScriptLauncher:
    return ScriptLauncher(tmp_path / "jobs", restart_delay_s=lambda number: 0.0)


def job(tmp_path: Path, script: str, *, key: str = "k" * 32, attempts: int = 1) -> JobSpec:
    return JobSpec(
        name="system-stage-kkkkkkkk",
        run_key=key,
        run_uri=str(tmp_path / "run"),
        argv=(script,),
        env={"RUN": str(tmp_path / "run")},
        attempts=attempts,
    )


def done(tmp_path: Path) -> str:
    RunDirectory.open(str(tmp_path / "run"))
    record = json.dumps({"state": "done", "metrics": {"x": 1.0}})
    return (
        "import os, pathlib; p = pathlib.Path(os.environ['RUN']); p.mkdir(exist_ok=True);"
        f"print('hello'); (p / 'outcome.json').write_text({record!r})"
    )


def test_outcome_is_returned_and_lines_are_streamed(tmp_path, launcher) -> None:
    lines: list[str] = []
    spec = job(tmp_path, done(tmp_path))
    launcher.submit(spec)
    outcome = wait(launcher, spec, on_line=lines.append, poll_s=0.02)
    assert outcome.metrics == {"x": 1.0}
    assert lines == ["hello"]


def test_failure_carries_the_recorded_reason_and_the_last_lines(tmp_path, launcher) -> None:
    run = RunDirectory.open(str(tmp_path / "run"))
    number = run.claim_attempt({})
    run.end_attempt(number, AttemptEnd(42, "the data have no test cases"))
    spec = job(tmp_path, "print('last words'); raise SystemExit(42)")
    launcher.submit(spec)
    with pytest.raises(JobFailed, match=r"no test cases[\s\S]*last words"):
        wait(launcher, spec, on_line=lambda _: None, poll_s=0.02)


def test_a_failed_outcome_is_believed_before_the_exit_code(tmp_path, launcher) -> None:
    RunDirectory.open(str(tmp_path / "run")).write_outcome(Outcome("gave_up", "3 starts in a row"))
    spec = job(tmp_path, "raise SystemExit(0)")
    launcher.submit(spec)
    with pytest.raises(JobFailed, match="gave up: 3 starts in a row"):
        wait(launcher, spec, on_line=lambda _: None, poll_s=0.02)


def test_only_code_200_is_started_again_and_not_for_ever(tmp_path, launcher) -> None:
    script = "import os; open(os.environ['RUN'] + '-starts', 'a').write('x'); raise SystemExit({})"
    spec = job(tmp_path, script.format(200), attempts=2)
    launcher.submit(spec)
    with pytest.raises(JobFailed):
        wait(launcher, spec, on_line=lambda _: None, poll_s=0.02)
    assert len((tmp_path / "run-starts").read_text()) == 1 + 2 * spec.attempts

    (tmp_path / "run-starts").unlink()
    spec = job(tmp_path, script.format(42), key="m" * 32)
    launcher.submit(spec)
    with pytest.raises(JobFailed):
        wait(launcher, spec, on_line=lambda _: None, poll_s=0.02)
    assert len((tmp_path / "run-starts").read_text()) == 1


FAILING = "import os; open(os.environ['RUN'] + '-starts', 'a').write('x'); raise SystemExit(200)"


def wait_for(launcher: LocalLauncher, name: str, reason: str) -> None:
    while reason not in launcher.status(name).reason:
        time.sleep(0.02)


def test_restarts_are_waited_for_ever_longer_up_to_half_a_minute(tmp_path) -> None:
    assert [restart_delay_s(number) for number in range(1, 8)] == [2, 4, 8, 16, 30, 30, 30]
    numbers: list[int] = []

    def no_delay_s(number: int) -> float:
        numbers.append(number)
        return 0.0

    launcher = ScriptLauncher(tmp_path / "jobs", restart_delay_s=no_delay_s)
    spec = job(tmp_path, FAILING, attempts=2)
    launcher.submit(spec)
    with pytest.raises(JobFailed):
        wait(launcher, spec, on_line=lambda _: None, poll_s=0.02)
    assert numbers == [1, 2, 3, 4]


def test_a_job_that_waits_for_its_restart_counts_as_running_until_cancelled(tmp_path) -> None:
    launcher = ScriptLauncher(tmp_path / "jobs", restart_delay_s=lambda number: 1e9)
    spec = job(tmp_path, FAILING)
    launcher.submit(spec)
    wait_for(launcher, spec.name, "starts again in")
    assert launcher.status(spec.name).state == "running"
    launcher.cancel(spec.name)
    status = launcher.status(spec.name)
    assert (status.state, status.code) == ("ended", 200)
    assert (tmp_path / "run-starts").read_text() == "x"


def test_a_job_that_was_submitted_again_meanwhile_is_adopted_at_its_restart(tmp_path) -> None:
    launcher = ScriptLauncher(tmp_path / "jobs", restart_delay_s=lambda number: 0.0)
    marker = "import os, time; open(os.environ['RUN'] + '-starts', 'a').write('x');"
    script = f"{marker} time.sleep(30) if os.path.exists('{tmp_path}/again') else exit(200)"
    spec = job(tmp_path, script)
    launcher.submit(spec)
    launcher._children[spec.name].wait()
    (tmp_path / "again").touch()
    other = ScriptLauncher(tmp_path / "jobs")
    other.submit(spec)
    while len((tmp_path / "run-starts").read_text()) < 2:
        time.sleep(0.02)
    wait_for(launcher, spec.name, "started again")
    assert launcher.status(spec.name).state == "running"
    assert (tmp_path / "run-starts").read_text() == "xx"
    launcher.cancel(spec.name)
    while other.status(spec.name).state == "running":
        time.sleep(0.02)
    assert launcher.status(spec.name).state == "ended"


def test_several_nodes_are_refused_on_one_machine(tmp_path, launcher) -> None:
    spec = replace(job(tmp_path, "pass"), nodes=2)
    with pytest.raises(LaunchError, match=r"is 2\. Set job\.nodes=1 and job\.proc"):
        launcher.submit(spec)
    assert launcher.status(spec.name).state == "absent"
    with pytest.raises(LaunchError, match=r"job\.nodes must be 1"):
        LocalLauncher(tmp_path).render(spec)


def test_a_second_launcher_adopts_the_live_job(tmp_path, launcher) -> None:
    script = "import os, time; open(os.environ['RUN'] + '-starts', 'a').write('x'); time.sleep(30)"
    spec = job(tmp_path, script)
    launcher.submit(spec)
    while not (tmp_path / "run-starts").exists():
        time.sleep(0.02)
    second = ScriptLauncher(tmp_path / "jobs")
    second.submit(spec)
    assert second.status(spec.name).state == "running"
    second.cancel(spec.name)
    with pytest.raises(JobFailed):
        wait(second, spec, on_line=lambda _: None, poll_s=0.02)
    assert launcher.status(spec.name).state == "ended"
    assert (tmp_path / "run-starts").read_text() == "x"


def test_a_live_job_of_another_run_key_is_not_adopted(tmp_path, launcher) -> None:
    first = job(tmp_path, "import time; time.sleep(30)")
    launcher.submit(first)
    pid = json.loads((tmp_path / "jobs" / f"{first.name}.json").read_text())["pid"]
    other = job(tmp_path, done(tmp_path), key="o" * 32)
    second = ScriptLauncher(tmp_path / "jobs")
    second.submit(other)
    assert wait(second, other, on_line=lambda _: None, poll_s=0.02).state == "done"
    os.kill(pid, 15)
    while launcher.status(first.name).state == "running":
        time.sleep(0.02)


def test_cancelling_an_unknown_job_is_an_error(launcher) -> None:
    with pytest.raises(JobNotFound, match="none has this name"):
        launcher.cancel("nobody")


def test_the_local_job_is_the_worker_under_the_agents_environment(tmp_path) -> None:
    spec = job(tmp_path, "train")
    manifest = LocalLauncher(tmp_path).render(spec)
    assert manifest["argv"][1:] == ["-m", "medtrain.worker", "train"]
    assert manifest["env"]["PET_NPROC_PER_NODE"] == "1"
    assert manifest["env"]["PET_STANDALONE"] == "1"


def test_the_shells_distributed_variables_do_not_reach_the_job(
    tmp_path, launcher, monkeypatch
) -> None:
    monkeypatch.setenv("PET_NODE_RANK", "3")
    monkeypatch.setenv("RANK", "1")
    script = (
        "import os, pathlib; pathlib.Path(os.environ['RUN'] + '-env').write_text("
        "','.join(n for n in os.environ if n.startswith('PET_') or n == 'RANK'))"
    )
    spec = job(tmp_path, script)
    launcher.submit(spec)
    with pytest.raises(JobFailed):
        wait(launcher, spec, on_line=lambda _: None, poll_s=0.02)
    assert (tmp_path / "run-env").read_text() == ""


def test_a_damaged_record_of_a_former_job_is_left_aside(tmp_path, launcher) -> None:
    spec = job(tmp_path, done(tmp_path))
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / f"{spec.name}.json").write_text('{"pid": 1')
    launcher.submit(spec)
    assert wait(launcher, spec, on_line=lambda _: None, poll_s=0.02).state == "done"


def test_an_interrupt_stops_the_job_and_its_log_goes_on_where_it_was(tmp_path, launcher) -> None:
    script = (
        "import signal, sys, time;"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(143)));"
        "print('begun', flush=True); time.sleep(60)"
    )
    spec = job(tmp_path, script)
    launcher.submit(spec)
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        if line == "begun":
            raise KeyboardInterrupt

    with pytest.raises(JobFailed):
        wait(
            launcher,
            spec,
            on_line=on_line,
            on_interrupt=lambda: launcher.cancel(spec.name),
            poll_s=0.02,
        )
    assert lines == ["begun", "saved"]

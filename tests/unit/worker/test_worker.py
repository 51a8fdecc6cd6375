"""Whole runs of the tiny system through flow, launcher, worker and elastic ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from medtrain.errors import ConfigError, DataError, JobFailed
from medtrain.flow import run_evaluation, run_prepare, run_stage
from medtrain.plans import plan_training, verdict_details
from medtrain.recipes import recipes
from medtrain.settings import settings
from medtrain.storage.runs import Outcome, Pointer, RunDirectory

TINY = str(Path(__file__).parents[2] / "tiny")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny system joins by its entry point, here and in the processes that are started."""
    monkeypatch.syspath_prepend(TINY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([TINY, os.environ.get("PYTHONPATH", "")]))
    recipes.cache_clear()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    from tiny_recipe.data import synthesize

    synthesize(tmp_path / "raw", num_cases=40, seed=0)
    return tmp_path / "raw"


@pytest.fixture
def data_uri(raw: Path) -> str:
    return run_prepare("tiny", [f"data.root={raw}"]).uri


def weights(uri: str) -> dict[str, torch.Tensor]:
    run = RunDirectory.open(uri)
    outcome = run.outcome()
    assert outcome is not None
    path = run.fetch(Pointer(**outcome.details["model"]), settings().cache / "fetched")
    state = torch.load(path, map_location="cpu", weights_only=True)["model"]
    return {name: tensor.clone() for name, tensor in state.items()}


def worker(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "medtrain.worker", *arguments],
        env={**os.environ, **settings().environment(), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(what: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    while not list(what.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def test_two_stages_and_their_judgement(data_uri: str) -> None:
    base = run_stage("tiny:base", ["epochs=2"], data_uri=data_uri)
    assert not base.was_finished
    finetuned = run_stage("tiny:finetune", ["epochs=1"], data_uri=data_uri, parent_uri=base.uri)
    judged = run_evaluation(finetuned.uri, data_uri=data_uri)
    assert {"test_mae", "test_rmse"} <= set(judged.outcome.metrics)
    assert "package/model.safetensors" in judged.outcome.artifacts
    assert judged.outcome.details["looks"] == 1

    run = RunDirectory.open(base.uri)
    split = run.read_text("split.csv")
    assert ",train," in split and ",val," in split and ",test," not in split
    assert run.store.exists("cases/1/val.csv")
    facts = run.read_json("facts.json")
    assert facts["is_synthetic"] is True
    assert facts["code_fingerprint"]

    # Asked again, nothing is claimed and nothing is trained; the look is the same one.
    again = run_stage("tiny:base", ["epochs=2"], data_uri=data_uri)
    assert again.was_finished
    assert RunDirectory.open(again.uri).attempts() == [1]
    assert run_evaluation(finetuned.uri, data_uri=data_uri).was_finished

    # What only says where and how fast is no other run; what changes the science is.
    here = plan_training("tiny:base", ["epochs=2", "job.attempts=7"], data_uri=data_uri)
    assert here.key == base.key
    assert plan_training("tiny:base", ["epochs=3"], data_uri=data_uri).key != base.key
    assert plan_training("tiny:base", ["epochs=2"], data_uri=data_uri, again=1).key != base.key

    # The worker itself answers at once too, and refuses a launcher of other code.
    argv = ["train", "tiny:base", "--set", "epochs=2", "--data", data_uri]
    process = worker(*argv, "--key", base.key)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    process = worker(*argv, "--key", "0" * 32)
    output, _ = process.communicate()
    assert process.returncode == 42
    assert "Rebuild the trainer image" in output
    assert RunDirectory.open(base.uri).attempts() == [1]


def test_stopped_by_a_signal_it_goes_on_to_the_same_weights(data_uri: str) -> None:
    values = ["epochs=4", "data.delay_s=0.02", "job.processes=2", "checkpoint.every_steps=1"]
    plan = plan_training("tiny:base", values, data_uri=data_uri)
    run_folder = Path(plan.run_uri)
    process = worker(*plan.argv)
    wait_for(run_folder, "checkpoints/1/last.json", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    end = json.loads((run_folder / "attempts/1.end.json").read_text())
    assert end["code"] == 143
    assert end["step"] == end["durable_step"] > 0
    assert not (run_folder / "outcome.json").exists()

    resumed = run_stage("tiny:base", values, data_uri=data_uri)
    assert RunDirectory.open(resumed.uri).attempts() == [1, 2]
    undisturbed = run_stage("tiny:base", values, data_uri=data_uri, again=1)
    expected = weights(undisturbed.uri)
    actual = weights(resumed.uri)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_signal_during_the_imports_is_heard(data_uri: str) -> None:
    plan = plan_training("tiny:base", ["epochs=1"], data_uri=data_uri)
    process = worker(*plan.argv)
    while not handles_sigterm(process.pid):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert RunDirectory.open(plan.run_uri).attempts() == []


def handles_sigterm(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM by now."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & (1 << (signal.SIGTERM - 1)))


def test_a_verdict_is_final_until_it_is_taken_back(raw: Path, data_uri: str) -> None:
    values = ["optim.groups.encoder.lr=1e30", "epochs=1"]
    with pytest.raises(JobFailed, match="must be finite"):
        run_stage("tiny:base", values, data_uri=data_uri)
    plan = plan_training("tiny:base", values, data_uri=data_uri)
    run = RunDirectory.open(plan.run_uri)
    outcome = run.outcome()
    assert outcome is not None and outcome.state == "failed"
    assert run.attempts() == [1]
    with pytest.raises(JobFailed, match="--retry"):
        run_stage("tiny:base", values, data_uri=data_uri)
    assert run.attempts() == [1]
    with pytest.raises(JobFailed):
        run_stage("tiny:base", values, data_uri=data_uri, is_retry=True)
    assert run.attempts() == [1, 2]


def test_a_stage_needs_the_finished_run_of_the_stage_before(data_uri: str) -> None:
    with pytest.raises(ConfigError, match="--parent"):
        run_stage("tiny:finetune", data_uri=data_uri)
    with pytest.raises(ConfigError, match="must be done"):
        run_stage("tiny:finetune", data_uri=data_uri, parent_uri=str(settings().home / "nowhere"))


def test_bad_data_are_a_verdict_that_names_the_file(raw: Path) -> None:
    (raw / "cases" / "case_007.json").write_text('{"x": [1.0], "y": 0.0}')
    with pytest.raises(JobFailed, match=r"case_007\.json"):
        run_prepare("tiny", [f"data.root={raw}"])


def test_what_was_made_and_is_gone_is_made_again(data_uri: str) -> None:
    first = run_stage("tiny:base", ["epochs=1"], data_uri=data_uri)
    for blob in (Path(first.uri) / "checkpoints").rglob("*.pt"):
        blob.unlink()
    second = run_stage("tiny:base", ["epochs=1"], data_uri=data_uri)
    assert not second.was_finished
    assert weights(second.uri)


def test_data_that_moved_are_read_where_they_are_now(raw: Path) -> None:
    named = ["data.name=tiny"]
    first = run_prepare("tiny", [f"data.root={raw}", *named])
    base = run_stage("tiny:base", ["epochs=1"], data_uri=first.uri)
    moved = raw.rename(raw.with_name("moved"))
    again = run_prepare("tiny", [f"data.root={moved}", *named])
    assert again.uri == first.uri and again.was_finished
    judged = run_evaluation(base.uri, data_uri=again.uri)
    assert judged.outcome.state == "done"


def test_a_data_set_of_another_name_has_a_home_of_its_own(raw: Path) -> None:
    one = run_prepare("tiny", [f"data.root={raw}", "data.name=one"])
    two = run_prepare("tiny", [f"data.root={raw}", "data.name=two"])
    assert one.outcome.details["home"] != two.outcome.details["home"]


def test_a_verdict_does_not_hold_with_other_resources(data_uri: str) -> None:
    plan = plan_training("tiny:base", ["epochs=1"], data_uri=data_uri)
    RunDirectory.open(plan.run_uri).write_outcome(
        Outcome("failed", "too little memory", details=verdict_details(plan.stage.job))
    )
    with pytest.raises(JobFailed, match="too little memory"):
        run_stage("tiny:base", ["epochs=1"], data_uri=data_uri)
    result = run_stage("tiny:base", ["epochs=1", "job.memory=32Gi"], data_uri=data_uri)
    assert result.outcome.state == "done"


def test_a_stop_before_the_first_step_is_no_failure(data_uri: str) -> None:
    plan = plan_training("tiny:base", ["epochs=1"], data_uri=data_uri)
    process = worker(*plan.argv)
    wait_for(settings().cache / "scratch" / plan.key, "1/rank.json", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 143, output
    end = json.loads(Path(plan.run_uri, "attempts/1.end.json").read_text())
    assert (end["code"], end["step"]) == (143, 0)


def test_mistakes_of_all_stages_surface_before_anything_is_done(raw: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_prepare("tiny", [f"data.root={raw}", "finetune:epcohs=3", "base:batch.micro=x"])
    assert len(caught.value.problems) == 2
    assert "finetune: epcohs" in str(caught.value)
    assert not Path(settings().storage).exists()


def test_changed_membership_and_manifest_are_refused(raw: Path, data_uri: str) -> None:
    outcome = RunDirectory.open(data_uri).outcome()
    assert outcome is not None
    home = Path(outcome.details["home"])
    (part,) = (home / "splits/holdout_5fold").glob("*.csv")
    recorded = part.read_text()
    part.write_text(recorded.replace(",test,", ",fold_0,"))
    with pytest.raises(DataError, match="sealed cases may have moved"):
        plan_training("tiny:base", data_uri=data_uri)
    part.write_text(recorded)
    (manifest,) = (home / "manifests").glob("*.json")
    recorded = manifest.read_text()
    manifest.write_text(recorded.replace("case_005", "case_006"))
    with pytest.raises(DataError):
        plan_training("tiny:base", data_uri=data_uri)
    manifest.unlink()
    with pytest.raises(DataError, match="medtrain data split"):
        plan_training("tiny:base", data_uri=data_uri)

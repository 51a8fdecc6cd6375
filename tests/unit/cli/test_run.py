"""What `medtrain run`, `evaluate` and `predict` hand on, and what they refuse."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medtrain.cli import app
from medtrain.errors import ConfigError, MedTrainError

ROOT = "data.root=/somewhere"


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of the pipelines that would run."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "medtrain.pipelines.local.run_locally", lambda pipeline, arguments: calls.append(arguments)
    )
    return calls


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_a_pipeline_gets_variant_values_overlays_and_allowances(handed_on: list[Any]) -> None:
    call("run", "cephalometric/small+oom_rescue", ROOT, "baseline:epochs=3", "--allow", "D-M03")
    (arguments,) = handed_on
    assert arguments["variant"] == "small"
    assert arguments["allow"] == ["D-M03"]
    assert arguments["again"] == 0
    # Overlays come first: what a person types wins.
    assert arguments["overrides"][0] == "batch.micro=2"
    assert arguments["overrides"][-2:] == [ROOT, "baseline:epochs=3"]


def test_again_is_a_number_that_is_told(handed_on: list[Any]) -> None:
    output = call("run", "cephalometric/smoke", ROOT, "--again")
    number = handed_on[0]["again"]
    assert number > 0
    assert f"--again-number {number}" in output
    call("run", "cephalometric/smoke", ROOT, "--again_number", "7")
    assert handed_on[1]["again"] == 7


def test_a_configuration_file_becomes_values_before_those_typed(
    handed_on: list[Any], tmp_path: Path
) -> None:
    file = tmp_path / "values.yaml"
    file.write_text("epochs: 4\noptim:\n  clip_norm: 0.5\n")
    call("run", "cephalometric/smoke", ROOT, "epochs=5", "--config", str(file))
    assert handed_on[0]["overrides"] == ["epochs=4", "optim.clip_norm=0.5", ROOT, "epochs=5"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "cephalometric/smoke", ROOT, "multitask:epcohs=3"], "epcohs"),
        (["run", "cephalometric/smoke", "root=/x"], "root is not a key"),
        (["run", "cephalometric/seed_literal", ROOT], "--allow D-M03"),
        (["run", "cephalometric/smoke", ROOT, "--allow", "D-M99"], "D-M99"),
        (["run", "cephalometric/smoke", ROOT, "--retry"], "--retry needs a stage"),
        (["run", "cephalometric/smoke:baseline", "root=/x"], "root is not a key"),
        (["run", "cephalometric/smoke:baseline", ROOT, "multitask:epochs=3"], "another stage"),
        (["run", "cephalometric/smoke:baseline", ROOT], "must be a folder"),
        (["run", "cephalometric/smoke:baseline"], "data.root"),
        (["evaluate", "nowhere"], "run directory of a trained stage"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(
    handed_on: list[Any], arguments: Sequence[str], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    assert words in str(caught.value)
    assert handed_on == []


def test_predict_needs_a_pulled_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MedTrainError):
        call("predict", str(tmp_path), "film.bmp")
    assert "medtrain models pull" in capfd.readouterr().out

"""The demo as a new user runs it: from raw files to a prediction of a pulled model."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medtrain.registry import verify_package

MODEL = "models:/cephalometric-smoke@candidate"


def run_demo(home: Path) -> str:
    answer = subprocess.run(
        [sys.executable, "-m", "medtrain.cli", "demo"],
        env={**os.environ, "MEDTRAIN_HOME": str(home)},
        cwd=home.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.mark.timeout(1500)
def test_demo_ends_with_a_registered_model_that_predicts_in_millimeters(tmp_path: Path) -> None:
    home = tmp_path / "local"
    text = run_demo(home)
    assert "synthetic films" in text
    assert "gate of this demo, no clinical bound" in text
    assert "gate accepted" in text
    assert "registered cephalometric-smoke:1" in text
    assert "Try next:" in text
    package = verify_package(home / "demo-model/version-1")
    assert package.details["is_synthetic"] is True
    (table,) = (home / "demo-predictions/version-1").glob("*.csv")
    (row,) = csv.DictReader(table.read_text().splitlines())
    assert 0 < float(row["x_0"]) < 387
    assert list((home / "demo-predictions/version-1").glob("*.png"))

    # By plain MLflow, without this project.
    target = tmp_path / "plain"
    mlflow = Path(sys.executable).with_name("mlflow")
    subprocess.run(
        [mlflow, "artifacts", "download", "-u", MODEL, "-d", target],
        env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}"},
        check=True,
        capture_output=True,
    )
    (weights,) = target.rglob("model.safetensors")
    assert verify_package(weights.parent).digest == package.digest

    text = run_demo(home)
    assert text.count("finished before, nothing to do") == 5
    assert "registered before as cephalometric-smoke:1" in text
    assert "predicted before" in text

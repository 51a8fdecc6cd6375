"""The cephalometric pipeline through `kfp.local`: every step is real, only the sizes are small."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from medtrain.errors import JobFailed
from medtrain.pipelines import find_pipeline
from medtrain.pipelines.local import run_locally
from medtrain.recipes.cephalometric.synthetic import synthesize
from medtrain.settings import settings
from medtrain.storage.runs import RunDirectory

SMALL = [
    "epochs=1",
    "ema=null",
    "checkpoint.criteria.best_ema_mre=null",
    "data.image_size=[64, 64]",
    "job.processes=2",
]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films") / "raw"
    synthesize(folder, num_cases=20, seed=0, image_size=(96, 120), mm_per_pixel=2.0)
    return folder


def told(pipeline_overrides: list[str]) -> tuple[dict[str, str], str]:
    person = io.StringIO()
    with redirect_stdout(person):
        arguments = {"variant": "smoke", "overrides": pipeline_overrides}
        outputs = run_locally(find_pipeline("cephalometric"), arguments)
    return outputs, person.getvalue()


@pytest.mark.timeout(420)
def test_pipeline_runs_whole_and_a_second_time_at_once(films: Path) -> None:
    overrides = [f"data.root={films}", *SMALL, "multitask:optim.clip_norm=0.5"]
    outputs, text = told(overrides)
    # One epoch teaches nothing: the gate says so, and that is no failure of the pipeline.
    assert outputs["model"] == ""
    assert "gate refused: test_mre_mm is" in text
    for stage in ("baseline", "transformer", "multitask"):
        assert f"train cephalometric/smoke:{stage}" in text
    assert text.count("epoch   1/1  train_loss") == 3
    assert "look 1 at this sealed test split" in text
    assert "kfp" not in text and "INFO" not in text

    page = Path(outputs["report"]).read_text()
    assert "ynthetic" in page and "efused" in page and "data:image/" in page
    storage = Path(settings().storage) / "runs/cephalometric/smoke"
    (multitask,) = (storage / "multitask").iterdir()
    # The value for one stage alone reached that stage alone.
    assert "clip_norm: 0.5" in (multitask / "config.yaml").read_text()
    (baseline,) = (storage / "baseline").iterdir()
    assert "clip_norm: 1.0" in (baseline / "config.yaml").read_text()
    facts = json.loads((multitask / "facts.json").read_text())
    (transformer,) = (storage / "transformer").iterdir()
    assert facts["parent_uri"] == str(transformer)

    outputs_again, text = told(overrides)
    assert outputs_again == outputs
    assert text.count("finished before, nothing to do") == 5
    assert RunDirectory.open(str(multitask)).attempts() == [1]


def test_a_failing_step_tells_its_reason_in_one_line(films: Path, tmp_path: Path) -> None:
    person = io.StringIO()
    with redirect_stdout(person), pytest.raises(JobFailed, match="stopped at the step above"):
        run_locally(
            find_pipeline("cephalometric"),
            {"variant": "smoke", "overrides": [f"data.root={tmp_path / 'nowhere'}"]},
        )
    lines = [line for line in person.getvalue().splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in person.getvalue()

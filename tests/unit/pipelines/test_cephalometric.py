"""The compiled pipeline: its wiring, its parameters, its golden copy."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler

from medtrain.errors import ConfigError
from medtrain.pipelines import compile_to, find_pipeline
from medtrain.recipes import find

GOLDEN = Path(__file__).parents[2] / "golden" / "pipelines"
COMPONENTS = ("prepare_data", "train_stage", "evaluate", "register_model", "summarize")


def compiled(name: str, folder: Path) -> str:
    path = folder / f"{name}.yaml"
    compile_to(name, path)
    text = path.read_text()
    # kfp writes its own version into the file: a newer patch release changes no contract.
    return "".join(
        line for line in text.splitlines(keepends=True) if not line.startswith("sdkVersion")
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    text = compiled("cephalometric", tmp_path_factory.mktemp("compiled"))
    return next(yaml.safe_load_all(text))["root"]["dag"]["tasks"]


@pytest.mark.parametrize("name", ["cephalometric", *COMPONENTS])
def test_compiled_yaml_equals_the_golden_copy(
    name: str, tmp_path: Path, update_golden: bool
) -> None:
    text = compiled(name, tmp_path)
    golden = GOLDEN / f"{name}.yaml"
    if update_golden:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), "run pytest --update-golden and read the difference"


def test_stages_are_wired_as_the_recipe_says(tasks: Any) -> None:
    _, recipe = find("cephalometric")
    stages = recipe.stages("default")
    by_display_name = {task["taskInfo"]["name"]: (key, task) for key, task in tasks.items()}
    for name, stage in stages.items():
        _, task = by_display_name[name]
        parameters = task["inputs"]["parameters"]
        assert parameters["stage"]["runtimeValue"]["constant"] == name
        if stage.init.stage is None:
            assert parameters["parent"]["runtimeValue"]["constant"] == ""
        else:
            parent_key, _ = by_display_name[stage.init.stage]
            assert parameters["parent"]["taskOutputParameter"] == {
                "outputParameterKey": "run",
                "producerTask": parent_key,
            }


def test_every_step_shows_under_its_own_name(tasks: Any) -> None:
    names = [task["taskInfo"]["name"] for task in tasks.values()]
    assert sorted(names) == sorted(
        [
            "prepare",
            "baseline",
            "transformer",
            "multitask",
            "evaluate",
            "gate and register",
            "report",
        ]
    )


def test_site_is_a_parameter_of_every_step(tmp_path: Path) -> None:
    compile_to("cephalometric", tmp_path / "p.yaml")
    documents = list(yaml.safe_load_all((tmp_path / "p.yaml").read_text()))
    pipeline, platform = documents
    executors = pipeline["deploymentSpec"]["executors"]
    for name, executor in executors.items():
        assert executor["container"]["image"].startswith("{{$.inputs.parameters"), name
    kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(kubernetes) == set(executors)
    for name, settings in kubernetes.items():
        assert settings["configMapAsEnv"], name
        assert settings["secretAsEnv"], name


def test_no_step_is_cached_by_kubeflow(tasks: Any) -> None:
    assert all(not task["cachingOptions"].get("enableCache") for task in tasks.values())


def test_the_object_that_runs_is_the_one_that_is_compiled(tmp_path: Path) -> None:
    pipeline = find_pipeline("cephalometric")
    compiler.Compiler().compile(pipeline, str(tmp_path / "direct.yaml"))
    compile_to("cephalometric", tmp_path / "door.yaml")
    assert (tmp_path / "direct.yaml").read_text() == (tmp_path / "door.yaml").read_text()


def test_unknown_name_and_wrong_ending_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'cephalometric'"):
        compile_to("cefalometric", tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="must end in"):
        compile_to("cephalometric", tmp_path / "x.txt")

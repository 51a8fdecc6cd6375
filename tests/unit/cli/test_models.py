import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from medtrain.cli import models
from medtrain.errors import RegistryError
from medtrain.registry import find_version, verify_package, write_package
from medtrain.registry.gate import GateVerdict
from medtrain.settings import settings
from medtrain.storage.tracking import artifact_root, ensure_experiment, open_client

# MLflow builds its tables in a way that SQLAlchemy 2.1 wants to give up.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making one takes seconds, copying it nothing."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    open_client(f"sqlite:///{path}").search_registered_models()
    return path


@pytest.fixture(autouse=True)
def site(migrated_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site with an empty registry, and a terminal wide enough for tables."""
    settings().home.mkdir(exist_ok=True)
    shutil.copy(migrated_store, settings().home / "mlflow.db")
    monkeypatch.setenv("COLUMNS", "200")


Add = Callable[..., None]


@pytest.fixture
def add(tmp_path: Path) -> Add:
    """Put a version of `tiny` into the registry, as registration does."""

    def put(key: str, *, is_synthetic: bool = False) -> None:
        weights = tmp_path / f"{key}.safetensors"
        save_file({"w": np.zeros(3, np.float32)}, weights)
        package = write_package(
            tmp_path / f"package of {key}",
            weights=weights,
            config_yaml="",
            split_csv="case_id,group,role,checksum,part\n",
            metrics={"test_error": 1.25},
            card="",
            details={
                "system": "tiny",
                "variant": "default",
                "stage": "only",
                "run_key": key,
                "data_fingerprint": "d1",
                "code_fingerprint": "c1",
                "commit": "",
                "is_synthetic": is_synthetic,
                "pretrained": {},
            },
        )
        client = open_client(settings().tracking)
        root = artifact_root(settings().tracking, home=settings().home)
        run = client.create_run(ensure_experiment(client, "medtrain/tiny", artifact_root=root))
        client.log_artifacts(run.info.run_id, str(package.folder), "package")
        verdict = GateVerdict(True, "good [enough]", "test_error", 1.25, "test_error <= 2")
        if not client.search_registered_models():
            client.create_registered_model("tiny")
        version = client.create_model_version(
            "tiny",
            source=f"{run.info.artifact_uri}/package",
            run_id=run.info.run_id,
            tags={
                "run_key": key,
                "package_digest": package.digest,
                "gate": verdict.to_json(),
                "gate_accepted": "true",
                "gate_reason": verdict.reason,
                "metrics": '{"test_error": 1.25}',
                "synthetic": str(is_synthetic).lower(),
                "looks": "3",
            },
        )
        client.set_registered_model_alias("tiny", "candidate", str(version.version))

    return put


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(models.app, list(arguments))


def test_empty_registry_says_how_a_model_gets_there():
    result = invoke("list")
    assert result.exit_code == 0
    assert "medtrain run" in result.output


def test_list_shows_versions_aliases_and_says_synthetic_aloud(add):
    add("a")
    add("b", is_synthetic=True)
    output = invoke("list").output
    newest, oldest = (line for line in output.splitlines() if "tiny" in line)
    assert "candidate" in newest
    assert "SYNTHETIC" in newest
    assert "real" in oldest
    assert "1.25" in oldest


def test_show_tells_gate_looks_and_notes(add):
    add("a")
    invoke("note", "tiny:1", "8/10 [draft]", "--author", "Dr. Abe")
    output = invoke("show", "tiny@candidate").output
    assert "accepted: good [enough]" in output
    assert "Dr. Abe: 8/10 [draft]" in output
    assert re.search(r"looks at its sealed test\W+3\b", output)


def test_the_command_that_show_prints_gets_the_model_without_medtrain(add, tmp_path):
    add("a")
    line = next(line for line in invoke("show", "tiny:1").output.splitlines() if "MLFLOW" in line)
    variable, *command = shlex.split(line.partition(": ")[2])
    assert command[0] == "mlflow"
    name, _, value = variable.partition("=")
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert verify_package(tmp_path / "tiny-1").details["run_key"] == "a"


def test_promote_makes_the_champion_and_names_the_former_one(add):
    add("a")
    add("b")
    assert "the one before" not in invoke("promote", "tiny:1").output
    result = invoke("promote", "tiny@candidate")
    assert "tiny:2 is champion; the one before was tiny:1" in result.output
    assert find_version("tiny@champion").version == 2


def test_pull_verifies_and_says_where_the_card_is(add, tmp_path):
    add("a", is_synthetic=True)
    result = invoke("pull", "tiny:1", str(tmp_path / "mine"))
    assert verify_package(tmp_path / "mine").details["run_key"] == "a"
    assert "SYNTHETIC" in result.output
    assert str(tmp_path / "mine" / "README.md") in result.output


def test_note_without_an_author_is_by_who_is_logged_in(add, monkeypatch):
    monkeypatch.setenv("LOGNAME", "abe")
    add("a")
    assert "1 note" in invoke("note", "tiny:1", "looks right").output
    assert find_version("tiny:1").notes[0]["author"] == "abe"


def test_mistake_is_an_error_of_the_registry():
    assert isinstance(invoke("promote", "tiny@candidate").exception, RegistryError)


@pytest.mark.parametrize("command", ["list", "show", "promote", "pull", "note"])
def test_help_gives_an_example(command):
    output = invoke(command, "--help").output
    assert "Example" in output
    assert f"medtrain models {command}" in output


def test_module_of_the_commands_imports_nothing_slow():
    """Importing it by its path leaves out the package, whose other commands are not meant."""
    source = str(models.__file__)
    code = (
        "import runpy, sys; "
        f"runpy.run_path({source!r}); "
        "print(sorted({'mlflow', 'numpy', 'torch', 'medtrain.registry'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

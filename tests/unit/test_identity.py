"""Fingerprints of code: explaining trains nothing anew, changing does."""

import shutil
from pathlib import Path

import pytest

import medtrain
from medtrain.identity import code_fingerprint, fingerprints


@pytest.fixture
def package(tmp_path: Path) -> Path:
    copy = tmp_path / "medtrain"
    shutil.copytree(
        Path(medtrain.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__")
    )
    return copy


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path.name} no longer holds {old!r}"
    path.write_text(text.replace(old, new, 1))


def test_comments_docstrings_and_blank_lines_change_nothing(package: Path) -> None:
    before = fingerprints(package)
    for source in (package / "train" / "step.py", package / "recipes/cephalometric/task.py"):
        text = source.read_text()
        first, rest = text.split("\n", 1)
        source.write_text(f"{first}\n# a remark\n{rest}\n\n# another one\n")
    edit(package / "train" / "task.py", "Epoch of the stage, 1-based.", "The epoch.")
    assert fingerprints(package) == before


def test_a_changed_loss_line_changes_the_recipe_alone(package: Path) -> None:
    before = fingerprints(package)
    edit(
        package / "recipes/cephalometric/task.py",
        "(heatmaps - target) ** 2",
        "(heatmaps - target) ** 4",
    )
    after = fingerprints(package)
    changed = {part for part in before if before[part] != after[part]}
    assert changed == {"recipes/cephalometric"}


def test_a_changed_engine_line_changes_the_engine(package: Path) -> None:
    before = fingerprints(package)["engine"]
    module = package / "train/optim.py"
    module.write_text(module.read_text() + "\nMOMENTUM = 0.5\n")
    assert fingerprints(package)["engine"] != before


@pytest.mark.parametrize("name", ["config.py", "rules.py"])
def test_what_the_configuration_says_already_is_not_counted_twice(package: Path, name: str) -> None:
    before = fingerprints(package)
    module = package / "recipes/cephalometric" / name
    module.write_text(module.read_text() + "\nUNUSED = 1\n")
    assert fingerprints(package) == before


def test_only_pins_of_deciding_libraries_count(package: Path) -> None:
    constraints = package / "constraints.txt"
    constraints.write_text("torch==2.13.0\nrequests==2.33.0\nscikit_learn==1.9.1\n")
    before = fingerprints(package)["pins"]
    constraints.write_text("torch==2.13.0\nrequests==9.9.9\nscikit-learn==1.9.1\n")
    assert fingerprints(package)["pins"] == before
    constraints.write_text("torch==2.14.0\nrequests==9.9.9\nscikit-learn==1.9.1\n")
    assert fingerprints(package)["pins"] != before


def test_statistics_count_only_for_verbs_that_judge() -> None:
    package = "medtrain.recipes.cephalometric"
    assert code_fingerprint(package, judges=True) != code_fingerprint(package, judges=False)

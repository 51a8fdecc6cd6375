from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from medtrain.cli.data import app
from medtrain.data.synthetic import plant
from medtrain.errors import ConfigError, DataError
from medtrain.recipes.cephalometric.data import ODDITIES, synthesize
from medtrain.settings import settings


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "films"
    synthesize(folder, num_cases=10, image_size=(96, 120), mm_per_pixel=2.0)
    return folder


@pytest.fixture
def films(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "films"))


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_sound_data_set_passes_and_is_called_synthetic(films: Path) -> None:
    result = invoke("check", "cephalometric/smoke", f"data.root={films}")

    assert result.exit_code == 0
    assert "cases that are fine: 10; errors: 0; warnings: 0; synthetic data" in result.output


def test_every_problem_is_shown_in_one_table_and_the_exit_code_says_error(films: Path) -> None:
    plant(films, ["truncated_image", "left_facing"], ODDITIES)

    result = invoke("check", "cephalometric", f"data.root={films}")

    assert result.exit_code == 1
    assert "unreadable_image" in result.output and "left_facing" in result.output
    assert "cases that are fine: 9; errors: 1; warnings: 1" in result.output


def test_warnings_alone_do_not_fail(films: Path) -> None:
    plant(films, ["left_facing"], ODDITIES)

    assert invoke("check", "cephalometric", f"data.root={films}").exit_code == 0


def test_checking_writes_nothing(films: Path) -> None:
    invoke("check", "cephalometric", f"data.root={films}")

    assert not Path(settings().storage).exists()


def test_a_split_is_shown_before_and_recorded_after(films: Path) -> None:
    arguments = ("split", "cephalometric/smoke", f"data.root={films}", "data.name=set")

    shown = invoke(*arguments, "--dry-run")
    assert "Nothing was written." in shown.output
    assert not Path(settings().storage).exists()
    recorded = invoke(*arguments)
    again = invoke(*arguments)

    home = Path(settings().storage) / "datasets" / "cephalometric" / "set"
    assert (home / "splits/holdout_5fold/1.csv").is_file()
    assert "protocol holdout_5fold, part 1" in recorded.output
    assert "test" in recorded.output and "fold_4" in recorded.output
    assert again.output == recorded.output
    assert shown.output.splitlines()[:-1] == recorded.output.splitlines()[:-1]


def test_a_faulty_data_set_is_not_divided(films: Path) -> None:
    plant(films, ["empty_image"], ODDITIES)

    with pytest.raises(DataError, match="empty_file"):
        invoke("split", "cephalometric", f"data.root={films}")


def test_a_set_is_made_with_the_oddities_that_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "made"

    result = invoke(
        "synth", "cephalometric", str(folder), "--images", "3", "--oddity", "nested_raw"
    )

    assert result.exit_code == 0
    assert len(list((folder / "RawImage" / "RawImage").rglob("*.bmp"))) == 3


def test_oddities_are_listed(tmp_path: Path) -> None:
    result = invoke("synth", "cephalometric", str(tmp_path / "none"), "--oddity", "list")

    assert all(name in result.output for name in ODDITIES)
    assert not (tmp_path / "none").exists()


def test_an_unknown_oddity_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="oddity 'x' does not exist"):
        invoke("synth", "cephalometric", str(tmp_path / "made"), "--oddity", "x")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("command", ["synth", "check", "split"])
def test_help_shows_examples(command: str) -> None:
    assert f"medtrain data {command} cephalometric" in invoke(command, "--help").output

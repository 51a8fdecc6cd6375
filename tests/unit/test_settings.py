"""The site's settings: from the environment, from a file, and nothing that does nothing."""

from pathlib import Path

import pytest

from medtrain.errors import ConfigError
from medtrain.settings import Settings, settings


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "site.yaml"
    monkeypatch.setenv("MEDTRAIN_SETTINGS", str(path))
    return path


def test_the_environment_wins_over_the_file(file, monkeypatch) -> None:
    file.write_text("experiment: of the file\nwandb: true\n")
    monkeypatch.setenv("MEDTRAIN_EXPERIMENT", "of the environment")
    assert (settings().experiment, settings().wandb) == ("of the environment", True)


@pytest.mark.parametrize("line", ["launcher: local", "storage_rot: /data"])
def test_a_setting_that_does_not_exist_is_refused_by_name(file, line) -> None:
    file.write_text(f"{line}\n")
    name = line.partition(":")[0].upper()
    with pytest.raises(ConfigError, match=f"MEDTRAIN_{name}: Extra inputs are not permitted"):
        settings()


def test_a_file_that_is_not_there_is_an_error(file) -> None:
    with pytest.raises(ConfigError, match="must be a YAML file, but there is none"):
        settings()


def test_a_job_gets_the_very_same_settings(tmp_path, monkeypatch) -> None:
    site = Settings(
        home=tmp_path / "home",
        storage_root=str(tmp_path / "storage"),
        tracking_uri="http://mlflow:5000",
        cache_dir=tmp_path / "cache",
        weights_root=str(tmp_path / "weights"),
        experiment="films",
        wandb=True,
    )
    for name, value in site.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == site


def test_a_misspelled_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDTRAIN_STORAGE_ROT", "/x")
    with pytest.raises(ConfigError, match="MEDTRAIN_STORAGE_ROT is no setting"):
        settings()


@pytest.mark.parametrize("content", ["storage_root: {", "- a\n- b\n"])
def test_an_unusable_settings_file_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (tmp_path / "site.yaml").write_text(content)
    monkeypatch.setenv("MEDTRAIN_SETTINGS", str(tmp_path / "site.yaml"))
    with pytest.raises(ConfigError, match="MEDTRAIN_SETTINGS"):
        settings()

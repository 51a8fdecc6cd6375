"""The site: where storage, tracking and caches are. Never part of a run's identity.

Read from environment variables `MEDTRAIN_…` or from one YAML file named by `MEDTRAIN_SETTINGS`;
the environment wins.
Without either, everything lives in one visible folder, `./medtrain-local`.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)
from yaml import YAMLError

from medtrain.errors import ConfigError

_NOT_SETTINGS = {
    "MEDTRAIN_SETTINGS",
    "MEDTRAIN_LINE_PREFIX",
    "MEDTRAIN_COMMIT",
    "MEDTRAIN_IMAGE_DIGEST",
}
"""Variables of the same beginning that say something else."""


class Settings(BaseSettings):
    """What a site sets once."""

    model_config = SettingsConfigDict(env_prefix="MEDTRAIN_", frozen=True, extra="forbid")

    home: Path = Path("medtrain-local")
    """The folder of all local state."""
    storage_root: str = ""
    """Folder, `s3://…` or `gs://…` under which runs and data sets' splits are kept; default:
    `home`/storage."""
    tracking_uri: str = ""
    """MLflow tracking server; default: SQLite in `home`."""
    cache_dir: Path | None = None
    """Node-local cache of downloads and decoded data; default: `home`/cache."""
    weights_root: str | None = None
    """Folder that holds pretrained weights as `<hub id>/…`."""
    experiment: str = "medtrain"
    """MLflow experiment; each system logs to `<experiment>/<system>`."""
    wandb: bool = False
    """Also log to Weights & Biases (needs the extra `wandb`; WANDB_MODE=offline keeps it local)."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment first, then the file."""
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
        file = os.environ.get("MEDTRAIN_SETTINGS")
        if file is not None:
            if not Path(file).is_file():
                raise ConfigError(
                    f"MEDTRAIN_SETTINGS={file} must be a YAML file, but there is none"
                )
            sources += (YamlConfigSettingsSource(settings_cls, yaml_file=file),)
        return sources

    @property
    def storage(self) -> str:
        """URI of the storage root."""
        return self.storage_root or str((self.home / "storage").absolute())

    @property
    def tracking(self) -> str:
        """URI of the MLflow tracking server."""
        return self.tracking_uri or f"sqlite:///{(self.home / 'mlflow.db').absolute()}"

    @property
    def cache(self) -> Path:
        """Node-local cache folder."""
        return (self.cache_dir or self.home / "cache").absolute()

    def environment(self) -> dict[str, str]:
        """These settings as the environment of a job."""
        variables = {
            "MEDTRAIN_HOME": str(self.home.absolute()),
            "MEDTRAIN_STORAGE_ROOT": self.storage,
            "MEDTRAIN_TRACKING_URI": self.tracking,
            "MEDTRAIN_CACHE_DIR": str(self.cache),
            "MEDTRAIN_EXPERIMENT": self.experiment,
            "MEDTRAIN_WANDB": str(self.wandb).lower(),
        }
        if self.weights_root:
            variables["MEDTRAIN_WEIGHTS_ROOT"] = self.weights_root
        return variables


@cache
def settings() -> Settings:
    """The site's settings, read once a process."""
    known = {f"MEDTRAIN_{name.upper()}" for name in Settings.model_fields} | _NOT_SETTINGS
    unknown = [name for name in os.environ if name.startswith("MEDTRAIN_") and name not in known]
    if unknown:
        raise ConfigError(
            [
                f"environment variable {name} is no setting; known: {', '.join(sorted(known))}"
                for name in unknown
            ]
        )
    try:
        return Settings()
    except (YAMLError, ValueError) as error:
        if isinstance(error, ValidationError):
            raise _explained(error) from error
        file = os.environ.get("MEDTRAIN_SETTINGS")
        raise ConfigError(
            f"MEDTRAIN_SETTINGS={file} must hold keys and values ({error})"
        ) from error


def _explained(error: ValidationError) -> ConfigError:
    return ConfigError(
        [
            f"setting MEDTRAIN_{'_'.join(map(str, detail['loc'])).upper()}: {detail['msg']}"
            for detail in error.errors()
        ]
    )

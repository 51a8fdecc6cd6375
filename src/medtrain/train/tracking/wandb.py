"""Metrics for Weights & Biases (an extra)."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medtrain.errors import ConfigError
from medtrain.mistakes import join_path
from medtrain.overrides import leaves
from medtrain.train.tracking.tracker import EndState

log = logging.getLogger(__name__)

_INIT_TIMEOUT_S = 30.0


class WandbTracker:
    """Logs to one W&B run a run key. `WANDB_MODE=offline` keeps it in the local folder.

    Raises:
        ConfigError: The package is not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        key: str,
        name: str,
        tags: Mapping[str, str],
    ) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ConfigError(
                "MEDTRAIN_WANDB=true needs the package wandb, which is not installed. Install it: "
                "pip install 'medtrain[wandb]'"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._run = wandb.init(
            dir=str(folder),
            project=re.sub(r"[/\\#?%:]+", "-", project),
            id=key,
            resume="allow",
            name=name,
            tags=[f"{tag}:{value}"[:64] for tag, value in tags.items()],
            settings=wandb.Settings(
                init_timeout=_INIT_TIMEOUT_S,
                console="off",
                silent=True,
                save_code=False,
                disable_git=True,
            ),
        )

    def log_config(self, values: Mapping[str, Any]) -> None:
        flat = {join_path(path): value for path, value in leaves(values)}
        # A resumed run may differ in `job`.
        self._run.config.update(flat, allow_val_change=True)  # type: ignore[no-untyped-call]

    def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        # W&B itself ignores steps before the last one that it has, so a resumed run adds nothing
        # twice.
        self._run.log(dict(values), step=step)

    def log_artifact(self, path: Path, name: str) -> None:
        copy = self._folder / "files" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
        self._run.save(str(copy), base_path=str(self._folder / "files"), policy="now")

    def flush(self) -> None:
        """Nothing: W&B's own process sends."""

    def close(self, *, state: EndState = "finished", timeout_s: float = 30.0) -> None:
        # Without a network W&B would wait for hours.
        thread = threading.Thread(target=self._finish, args=(state,), name="wandb", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive():
            log.warning(
                "Weights & Biases did not take everything within %.0f s; to send the rest: wandb "
                "sync %s/wandb/*run-*",
                timeout_s,
                self._folder,
            )

    def _finish(self, state: EndState) -> None:
        import wandb

        self._run.finish(exit_code=0 if state == "finished" else 1)
        # Its own process may still be writing.
        wandb.teardown()

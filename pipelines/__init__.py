"""One graph for every system and protocol: wiring only."""

import difflib
from pathlib import Path
from typing import Any

from medtrain.errors import ConfigError


def find_pipeline(system: str) -> Any:
    """The pipeline of a system; the very object that runs on a laptop and is compiled."""
    from medtrain.pipelines.cephalometric import cephalometric

    return _named(system, {"cephalometric": cephalometric}, "pipeline")


def compile_to(name: str, path: Path) -> None:
    """Write a system's pipeline, or one component, as YAML."""
    from kfp import compiler

    from medtrain.components.evaluate import evaluate
    from medtrain.components.prepare_data import prepare_data
    from medtrain.components.register_model import register_model
    from medtrain.components.summarize import summarize
    from medtrain.components.train_stage import train_stage
    from medtrain.pipelines.cephalometric import cephalometric

    known = {
        "cephalometric": cephalometric,
        "prepare_data": prepare_data,
        "train_stage": train_stage,
        "evaluate": evaluate,
        "register_model": register_model,
        "summarize": summarize,
    }
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--output must end in .yaml or .yml, but is {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(_named(name, known, "pipeline or component"), str(path))


def _named(name: str, known: dict[str, Any], what: str) -> Any:
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"Did you mean '{nearest[0]}'? " if nearest else ""
        raise ConfigError(f"{what} '{name}' does not exist. {hint}Known: {', '.join(known)}.")
    return known[name]

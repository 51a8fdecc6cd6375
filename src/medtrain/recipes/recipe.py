"""What a recipe carries, and the grammar of its name: `SYSTEM/VARIANT:STAGE+OVERLAY`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from medtrain.config import StageConfig
from medtrain.errors import ConfigError

_NAME = re.compile(
    r"(?P<system>[a-z][a-z0-9_]*)"
    r"(/(?P<variant>[a-z0-9_]+))?"
    r"(:(?P<stage>[a-z0-9_]+))?"
    r"(?P<overlays>(\+[a-z0-9_]+)*)"
)


@dataclass(frozen=True)
class RecipeName:
    """A parsed name. `variant` defaults to `default`; without a stage the whole pipeline is
    meant."""

    system: str
    variant: str = "default"
    stage: str | None = None
    overlays: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> RecipeName:
        """Parse `SYSTEM[/VARIANT][:STAGE][+OVERLAY…]`."""
        match = _NAME.fullmatch(text)
        if not match:
            raise ConfigError(
                f"name '{text}' must have the form SYSTEM/VARIANT:STAGE+OVERLAY, "
                "such as cephalometric, cephalometric/smoke or cephalometric/small:transformer"
            )
        overlays = tuple(match["overlays"].split("+")[1:])
        return cls(match["system"], match["variant"] or "default", match["stage"], overlays)

    def __str__(self) -> str:
        variant = "" if self.variant == "default" else f"/{self.variant}"
        stage = f":{self.stage}" if self.stage else ""
        return f"{self.system}{variant}{stage}{''.join('+' + overlay for overlay in self.overlays)}"


Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """What a doctor's rule has to say about one stage."""

    rule: str
    severity: Severity
    message: str
    stage: str = ""


@dataclass(frozen=True)
class NotEvaluated:
    """A rule that lacks a fact, and the command that would supply it."""

    rule: str
    fact: str
    command: str
    stage: str = ""


Facts = Mapping[str, Any]
"""What is known beyond the configuration: parameter counts, properties of the data, probes.

The doctor adds `original_stage`, the stage as the recipe has it without overlays and overrides.
"""


def always(stage: StageConfig) -> bool:
    """Say that a rule concerns every stage."""
    return True


@dataclass(frozen=True)
class Rule:
    """A judgement about a resolved stage: a pure function of configuration and facts.

    A rule whose severity depends on the case is several rows with one id.
    """

    id: str
    severity: Severity
    title: str
    check: Callable[[StageConfig, Facts], str | None]
    """A sentence where the rule has something to say, with what to do about it; else None."""
    needs: tuple[str, ...] = ()
    """Facts without which it cannot judge."""
    supplied_by: str = ""
    """The command that writes them; `{name}` stands for the stage's name."""
    applies: Callable[[StageConfig], bool] = always
    """Whether it concerns a stage at all; where not, absent facts are not missed."""


@dataclass(frozen=True)
class Gate:
    """The bound that a model must reach on the sealed test split before it is registered."""

    metric: str
    at_most: float | None = None
    at_least: float | None = None
    min_cases: int = 10
    """Cases sealed from both models below which champion and challenger are not compared."""

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ConfigError(f"gate on {self.metric} must have one bound: at_most or at_least")

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether smaller or larger values of the metric are better."""
        return "min" if self.at_most is not None else "max"

    def accepts(self, value: float) -> bool:
        """Whether `value` is within the bound."""
        return (
            value <= self.at_most if self.at_most is not None else value >= (self.at_least or 0.0)
        )

    def __str__(self) -> str:
        sign, bound = ("<=", self.at_most) if self.at_most is not None else (">=", self.at_least)
        return f"{self.metric} {sign} {bound:g}"


@dataclass(frozen=True)
class Recipe:
    """One system: its variants with their stages in order, and what belongs to them."""

    system: str
    title: str
    stage_type: type[StageConfig]
    variants: Mapping[str, Mapping[str, StageConfig]]
    gates: Mapping[str, Gate]
    """By variant."""
    overlays: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Named lists of overrides."""
    rules: Sequence[Rule] = ()
    package: str = ""
    """Import path of the package that holds `task.py`, `metrics.py`, `data.py`; default: ours."""

    def stages(self, variant: str) -> Mapping[str, StageConfig]:
        """The stages of a variant, in order."""
        return self.variants[variant]

    def __post_init__(self) -> None:
        if not self.package:
            object.__setattr__(self, "package", f"medtrain.recipes.{self.system}")
        for variant, stages in self.variants.items():
            earlier: list[str] = []
            for stage_name, stage in stages.items():
                if stage.init.stage is not None and stage.init.stage not in earlier:
                    raise ConfigError(
                        f"init.stage of {stage.name} must be an earlier stage of {variant}, "
                        f"but is '{stage.init.stage}'"
                    )
                earlier.append(stage_name)

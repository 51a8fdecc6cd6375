"""Rules about batch sizes and learning rates."""

from __future__ import annotations

from medtrain.config import StageConfig
from medtrain.recipes.recipe import Facts, Rule

_LARGEST_RATIO = 5.0


def _rates(stage: StageConfig) -> dict[str, float]:
    return {name: group.lr for name, group in stage.optim.groups.items() if group.lr}


def _rescaled_batch(stage: StageConfig, facts: Facts) -> str | None:
    original: StageConfig = facts["original_stage"]
    before, now = original.batch.global_, stage.batch.global_
    rates, former = _rates(stage), _rates(original)
    shared = set(rates) & set(former)
    if before == now or any(rates[name] != former[name] for name in shared):
        return None
    factor = now / before
    scaling = f"lr x {factor:g}" if factor > 1 else f"lr / {1 / factor:g}"
    saving = f" Where only memory is short, keep batch.global={before} and lower batch.micro."
    return (
        f"batch.global was changed from {before} to {now}, the learning rates were not. Linear "
        f"scaling would give {scaling} (with adam often its square root)."
        f"{saving if now < before else ''}"
    )


def _lr_ratio(stage: StageConfig, facts: Facts) -> str | None:
    rates = _rates(stage)
    if stage.init.source == "scratch" or len(rates) < 2:
        return None
    low, high = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
    ratio = rates[high] / rates[low]
    if ratio == 1:
        return (
            f"all groups learn at {rates[low]:g}, though the stage starts from trained weights: "
            "such weights are usually trained more slowly than new parts."
        )
    if ratio <= _LARGEST_RATIO:
        return None
    return (
        f"learning rates differ by {ratio:g}x: {low} {rates[low]:g}, {high} {rates[high]:g}. "
        "A ratio of 2 to 10 is usual for trained weights beside new parts."
    )


RULES = (
    Rule("D-X02", "warning", "batch changed without the learning rate", _rescaled_batch),
    Rule("D-G05", "info", "ratio of learning rates", _lr_ratio),
)

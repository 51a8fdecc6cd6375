"""Parameter groups: which parameters learn, how fast, and from when on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from medtrain.config import Optim, ParamGroup
from medtrain.errors import ConfigError


@dataclass(frozen=True)
class Group:
    """A parameter group with the parameters that it owns."""

    name: str
    config: ParamGroup
    parameters: Mapping[str, nn.Parameter]
    """By their names in the model."""

    def is_trained(self, epoch: int) -> bool:
        """Whether the group learns in `epoch` (1-based)."""
        return self.config.lr is not None and epoch >= self.config.starts_epoch

    def gradients(self) -> list[Tensor]:
        """The gradients that there are."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def copies(self) -> list[Tensor]:
        """The parameters' values now."""
        return [parameter.detach().clone() for parameter in self.parameters.values()]

    def update_ratio(self, before: Sequence[Tensor]) -> float:
        """‖Δθ‖ / ‖θ‖ of one step, given the values before it."""
        norm = float(get_total_norm(list(before)))
        change = [
            new.detach() - old for new, old in zip(self.parameters.values(), before, strict=True)
        ]
        return float(get_total_norm(change)) / norm if norm else 0.0


def match_groups(model: nn.Module, optim: Optim) -> tuple[Group, ...]:
    """Give every parameter to the first group that has a pattern for its name.

    Raises:
        ConfigError: A parameter without a group, a pattern that matches nothing, a group that owns
            nothing, or no group that learns from the first epoch on; all of them at once.
    """
    parameters = dict(model.named_parameters())
    owned: dict[str, dict[str, nn.Parameter]] = {name: {} for name in optim.groups}
    orphans = []
    for name, parameter in parameters.items():
        owner = next(
            (key for key, group in optim.groups.items() if _matches(name, group.match)), None
        )
        if owner is None:
            orphans.append(name)
        else:
            owned[owner][name] = parameter
    problems = []
    if orphans:
        problems.append(
            "optim.groups must cover every parameter, but none matches "
            f"{', '.join(summarize_names(orphans, parameters))}. Add a group, or a pattern to one."
        )
    for key, group in optim.groups.items():
        dead = [p for p in group.match if not any(fnmatchcase(name, p) for name in parameters)]
        for pattern in dead:
            problems.append(
                f"optim.groups.{key}.match: '{pattern}' must match a parameter, but matches none. "
                f"The model's parts are {', '.join(name for name, _ in model.named_children())}."
            )
        if not owned[key] and not dead:
            problems.append(
                f"optim.groups.{key} must own a parameter, but groups before it own all that match "
                f"{', '.join(group.match)}. Move it up, or remove it."
            )
    groups = tuple(Group(key, optim.groups[key], owned[key]) for key in optim.groups)
    if not any(group.is_trained(1) for group in groups):
        problems.append(
            "optim.groups must hold a group that learns from epoch 1 on, but all are frozen there. "
            "Give one an lr and starts_epoch=1."
        )
    if problems:
        raise ConfigError(problems)
    return groups


def summarize_names(names: Collection[str], among: Iterable[str]) -> list[str]:
    """`names` with whole parts of the model as patterns, such as `head.*`."""
    chosen = set(names)
    others = [name for name in among if name not in chosen]
    patterns: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        prefixes = [".".join(parts[:n]) + "." for n in range(1, len(parts))]
        whole = next((p for p in prefixes if not any(o.startswith(p) for o in others)), None)
        patterns[f"{whole}*" if whole else name] = None
    return list(patterns)


def freeze(groups: Sequence[Group], *, epoch: int) -> None:
    """Let exactly the groups that learn in `epoch` have gradients."""
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(group.is_trained(epoch))
            if not parameter.requires_grad:
                parameter.grad = None


def set_training_mode(model: nn.Module) -> None:
    """`model.train()`, except that wholly frozen modules stay in `eval()`.

    A frozen encoder whose BatchNorm keeps averaging, or whose dropout keeps drawing, is not frozen.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def build_optimizer(groups: Sequence[Group], optim: Optim) -> torch.optim.Optimizer:
    """An optimizer of all groups that ever learn; each of its own groups carries `name`.

    A group that has not thawed yet has no gradients, so the optimizer passes it over and makes its
    state at its first step.
    """
    options = []
    for group in groups:
        if group.config.lr is None:
            continue
        decay = group.config.weight_decay
        decay = optim.weight_decay if decay is None else decay
        kinds: dict[float, list[nn.Parameter]] = {}
        for parameter in group.parameters.values():
            is_spared = parameter.ndim <= 1 and not optim.decay_norm_and_bias
            kinds.setdefault(0.0 if is_spared else decay, []).append(parameter)
        options += [
            {
                "params": parameters,
                "lr": group.config.lr,
                "weight_decay": weight_decay,
                "name": group.name,
            }
            for weight_decay, parameters in kinds.items()
        ]
    match optim.kind:
        case "adamw":
            return torch.optim.AdamW(options, betas=optim.betas, eps=optim.eps)
        case "adam":
            return torch.optim.Adam(options, betas=optim.betas, eps=optim.eps)
        case "sgd":
            return torch.optim.SGD(options, momentum=optim.momentum)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

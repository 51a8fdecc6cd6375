"""Loading weights that were made elsewhere: by another project, or by an earlier stage."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medtrain.config import Init
from medtrain.errors import WeightsMismatch
from medtrain.storage.uri import sha256_of
from medtrain.storage.weights import MODEL_SUFFIXES

_LOG = logging.getLogger(__name__)

MIN_MATCHED = 0.99
"""Part of a model's tensors that pretrained weights must supply: fewer is another network."""

_FILE_NAMES = ("model.safetensors", "pytorch_model.bin", "model.pt", "model.pth")


@dataclass(frozen=True)
class MatchReport:
    """Which tensors of a model were given a value, and by whom."""

    source: str
    """Where the values come from, in words that a report can print."""
    sha256: str | None = None
    """Of the file; None where there is none."""
    matched: int = 0
    """Tensors of the model that were given a value."""
    missing: tuple[str, ...] = ()
    """Tensors of the model that the source lacks: they keep their initial values."""
    unexpected: tuple[str, ...] = ()
    """Tensors of the source that the model lacks."""
    adapted: tuple[str, ...] = ()
    """Tensors that were changed in shape, with how."""

    def to_json(self) -> dict[str, Any]:
        """Plain types for the run's facts."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def random_initialization(what: str, *, wanted: str | None) -> MatchReport:
    """Say aloud that `what` starts from random weights although `wanted` was named."""
    line = f" RANDOM INITIALIZATION: {what} starts without pretrained weights"
    line += f" ({wanted} was not found) " if wanted else " "
    _LOG.warning("%s", line.center(100, "!"))
    return MatchReport(source="random initialization")


def load_pretrained(
    module: nn.Module, path: Path, *, source: str, stem: str | None = None
) -> MatchReport:
    """Load a file of weights into `module`; a WeightsMismatch where fewer than 99 % match.

    Args:
        module: The receiving module; the file's names must be its own.
        path: A safetensors or torch file, or a folder that holds one under a usual name.
        source: Where the file comes from, for the report.
        stem: Name of the convolution weight whose input channels may differ: the file's
            channels are summed where the module has one, and reported as adapted.
    """
    file = _weights_file(path)
    found = _read_state(file)
    wanted = module.state_dict()
    adapted: list[str] = []
    if stem is not None and stem in found and stem in wanted:
        channels_found, channels_wanted = found[stem].shape[1], wanted[stem].shape[1]
        if channels_wanted == 1 and channels_found > 1:
            found[stem] = found[stem].sum(dim=1, keepdim=True)
            adapted.append(f"{stem}: {channels_found} input channels summed into 1")
    # A counter that older files lack and that nothing in evaluation reads.
    expected = [name for name in wanted if not name.endswith("num_batches_tracked")]
    missing = [name for name in expected if name not in found]
    matched = len(expected) - len(missing)
    if matched < MIN_MATCHED * len(expected):
        raise WeightsMismatch(
            f"weights {file} must supply at least {MIN_MATCHED:.0%} of the model's "
            f"{len(expected)} tensors, but supply {matched} (missing: {_listed(missing)}). "
            "Name weights of the same network."
        )
    other_shape = [
        f"{name} {_shape(found[name])} instead of {_shape(tensor)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if other_shape:
        raise WeightsMismatch(
            f"weights {file} must have the model's shapes, but have {_listed(other_shape)}. "
            "Name weights of the same network."
        )
    module.load_state_dict({**wanted, **{n: t for n, t in found.items() if n in wanted}})
    report = MatchReport(
        source=source,
        sha256=sha256_of(file),
        matched=matched,
        missing=tuple(missing),
        unexpected=tuple(n for n in found if n not in wanted),
        adapted=tuple(adapted),
    )
    _LOG.info(
        "pretrained weights from %s: %d of %d tensors matched, %d adapted, %d unused",
        source,
        matched,
        len(expected),
        len(adapted),
        len(report.unexpected),
    )
    return report


def load_parent(
    model: nn.Module, state: Mapping[str, Tensor], init: Init, *, source: str | None = None
) -> MatchReport:
    """Start `model` from an earlier stage's weights, by name.

    A tensor that only `model` has must match `init.new_parts`, one that only `state` has must
    match `init.dropped_parts`, and one whose shape differs must match both: it starts anew. Any
    other difference is a WeightsMismatch that names it.

    Args:
        model: The receiving model.
        state: State of the earlier stage's model.
        init: Patterns of the parts that may differ.
        source: Where `state` comes from, for the report; default: the stage's name.
    """
    source = source or f"stage {init.stage}"
    wanted = model.state_dict()
    other_shape = [n for n in wanted if n in state and state[n].shape != wanted[n].shape]
    missing = [n for n in wanted if n not in state]
    unexpected = [n for n in state if n not in wanted]

    def is_new(name: str) -> bool:
        return _matches(name, init.new_parts)

    def is_dropped(name: str) -> bool:
        return _matches(name, init.dropped_parts)

    problems = []
    if unforeseen := [n for n in missing if not is_new(n)]:
        problems.append(f"lacks {_listed(unforeseen)} (allow it with init.new_parts)")
    if unforeseen := [n for n in unexpected if not is_dropped(n)]:
        problems.append(
            f"holds {_listed(unforeseen)}, which the model lacks (allow it with init.dropped_parts)"
        )
    if unforeseen := [n for n in other_shape if not (is_new(n) and is_dropped(n))]:
        shapes = [f"{n} {_shape(state[n])} instead of {_shape(wanted[n])}" for n in unforeseen]
        problems.append(f"has other shapes: {_listed(shapes)}")
    if problems:
        raise WeightsMismatch(
            f"the checkpoint of {source} does not fit the model: it {'; it '.join(problems)}."
        )
    shared = {n: state[n] for n in wanted if n in state and n not in other_shape}
    model.load_state_dict({**wanted, **shared})
    report = MatchReport(
        source=source,
        matched=len(shared),
        missing=tuple(missing + other_shape),
        unexpected=tuple(unexpected),
        adapted=tuple(
            f"{n}: {_shape(state[n])} became {_shape(wanted[n])}, started anew" for n in other_shape
        ),
    )
    _LOG.info(
        "weights of %s: %d of %d tensors taken over, %d new, %d dropped",
        source,
        report.matched,
        len(wanted),
        len(report.missing),
        len(report.unexpected) + len(other_shape),
    )
    return report


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise WeightsMismatch(f"weights {path} must be a file or folder, but there is none.")
        return path
    for name in _FILE_NAMES:
        if (path / name).is_file():
            return path / name
    files = [file for file in sorted(path.iterdir()) if file.suffix in MODEL_SUFFIXES]
    if len(files) == 1:
        return files[0]
    raise WeightsMismatch(
        f"weights folder {path} must hold {', '.join(_FILE_NAMES)} or a single file of weights, "
        f"but holds {len(files)}."
    )


def _read_state(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        raise WeightsMismatch(f"weights {file} cannot be read: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise WeightsMismatch(f"weights {file} must map names to tensors, but do not.")
    return dict(state)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _listed(names: Sequence[str], limit: int = 8) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")

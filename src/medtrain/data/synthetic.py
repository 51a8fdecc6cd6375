"""What generators of synthetic data sets share. Synthetic data say that they are, everywhere."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LABEL = "SYNTHETIC"
"""Written into every picture that a generator draws."""


@dataclass(frozen=True)
class Oddity:
    """Something that real data sets have, planted into a synthetic one."""

    description: str
    plant: Callable[[Path], None]
    """Changes the data set in a folder."""
    problem: str | None = None
    """Kind of the problem that a reader must report; None: it must be accepted in silence."""
    severity: str = "error"
    """Of that problem."""


def check_oddities(names: Sequence[str], oddities: Mapping[str, Oddity]) -> None:
    """A ConfigError where a name is not among the oddities."""
    for name in names:
        if name not in oddities:
            near = difflib.get_close_matches(name, oddities, n=1)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise ConfigError(f"oddity '{name}' does not exist. {hint}Known: {', '.join(oddities)}")


def plant(folder: Path, names: Sequence[str], oddities: Mapping[str, Oddity]) -> None:
    """Plant oddities by name, in the order given; a ConfigError where one is unknown."""
    check_oddities(names, oddities)
    for name in names:
        oddities[name].plant(folder)


def describe_synthetic(folder: Path, **facts: Any) -> None:
    """Write dataset.json, by which readers know that a data set is synthetic."""
    content = {"synthetic": True, **facts}
    (folder / "dataset.json").write_text(json.dumps(content, indent=1) + "\n")


def new_folder(folder: Path) -> Path:
    """Create a folder to generate into; a DataError where something lies in it already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{folder} must be a new or an empty folder, but is in use. "
            "Name another one, or delete it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of `shares` that add up to `total`, by largest remainder."""
    exact = [total * share / sum(shares) for share in shares]
    parts = [int(value) for value in exact]
    order = sorted(range(len(shares)), key=lambda n: parts[n] - exact[n])
    for n in order[: total - sum(parts)]:
        parts[n] += 1
    return parts


def smooth_noise(
    shape: tuple[int, int], *, period: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Noise of unit spread whose structures are about `period` pixels wide, (height, width)."""
    import numpy as np
    from PIL import Image

    height, width = shape
    coarse = rng.standard_normal(
        (max(int(height / period), 1) + 3, max(int(width / period), 1) + 3), dtype=np.float32
    )
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise: NDArray[np.float32] = np.asarray(image, dtype=np.float32)
    noise = noise - noise.mean()
    return noise / np.float32(max(float(noise.std()), 1e-6))

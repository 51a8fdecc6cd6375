"""Synthetic lateral head films in the layout of ISBI 2015, with every oddity that is known.

A film is drawn from a template of 1935 x 2400 pixels of 0.1 mm: a shape model moves the 19
landmarks, everything else follows them, and layers of absorption make the film. Nothing here was
fitted to patients; the pictures are labeled as synthetic.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.data.synthetic import (
    LABEL,
    Oddity,
    apportion,
    describe_synthetic,
    new_folder,
    plant,
    smooth_noise,
)
from medtrain.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    Array = NDArray[np.float64]

_WIDTH, _HEIGHT = 1935, 2400
_SUBSETS = {"TrainingData": (1, 150), "Test1Data": (151, 150), "Test2Data": (301, 100)}
"""Folder → first number and published count."""

# Landmarks 1 to 19 in template pixels.
_TEMPLATE = (
    (830, 990), (1440, 900), (1310, 1210), (560, 1210), (1440, 1590), (1390, 1960), (1400, 2110),
    (1320, 2195), (1375, 2170), (720, 1840), (1490, 1790), (1515, 1810), (1640, 1690),
    (1610, 1870), (1600, 1540), (1512, 2105), (960, 1510), (1490, 1510), (640, 1390),
)  # fmt: skip

# Mean distance between two readers in pixels of 0.1 mm, measured on the published annotations;
# landmarks 1 to 19.
_READERS_DISTANCE = (
    9.3, 15.1, 30.8, 33.1, 28.9, 30.2, 12.4, 13.2, 9.9, 28.6, 6.7, 4.8, 27.2, 21.8, 16.2, 65.7,
    14.4, 18.2, 21.3,
)  # fmt: skip
_DISTANCE_PER_SIGMA = math.sqrt(math.pi)
"""Mean distance of two points that scatter with sigma 1 in x and y: 1.77."""

# Each mode: landmark (1 to 19) → displacement x, y in template pixels at one standard deviation.
_MODES: tuple[Mapping[int, tuple[float, float]], ...] = (
    # lower jaw forward
    {6: (45, 0), 7: (48, 0), 8: (44, 0), 9: (46, 0), 10: (14, 0), 11: (24, 0), 14: (34, 0),
     16: (46, 0)},
    # longer lower face
    {6: (0, 34), 7: (0, 42), 8: (0, 45), 9: (0, 44), 10: (0, 24), 11: (0, 20), 12: (0, 10),
     13: (0, 8), 14: (0, 26), 16: (0, 42)},
    # upper jaw forward
    {5: (28, 0), 18: (28, 0), 12: (24, 0), 13: (24, 0), 15: (28, 0), 11: (8, 0)},
    # steeper lower border of the jaw
    {10: (0, -36), 8: (-8, 12), 9: (-8, 10), 7: (-8, 8)},
    # cranial base
    {1: (-14, 10), 2: (10, -14), 4: (-24, 14), 19: (-20, 4)},
    # thicker soft tissue
    {13: (18, 0), 14: (18, 0), 15: (14, 0), 16: (16, 0)},
    # inclination of incisors
    {11: (14, -4), 12: (20, -4), 13: (6, 0), 14: (6, 0)},
    # orbit and hard palate
    {3: (10, 20), 17: (24, 4), 18: (0, 10), 15: (0, 8)},
)  # fmt: skip


@dataclass(frozen=True)
class _Shape:
    """One head: where the landmarks are, and how the rest of the template follows them."""

    landmarks: Array
    """(19, 2) as x, y in pixels of the film."""
    displacement: Array
    """(19, 2) in template pixels, before the similarity transform."""
    matrix: Array
    """(2, 3) from template to film."""

    def place(self, points: Sequence[tuple[float, float]]) -> Array:
        """Template points on the film: they move as the landmarks near them do."""
        import numpy as np

        at = np.asarray(points, dtype=np.float64)
        squared = ((at[:, None] - np.asarray(_TEMPLATE, dtype=np.float64)) ** 2).sum(axis=2)
        near = np.exp(-squared / (2 * 130.0**2))
        moved = at + near @ self.displacement / (near.sum(axis=1, keepdims=True) + 0.05)
        return moved @ self.matrix[:, :2].T + self.matrix[:, 2]


def _draw_shape(*, size: tuple[int, int], rng: np.random.Generator) -> _Shape:
    import numpy as np

    template = np.asarray(_TEMPLATE, dtype=np.float64)
    width, height = size
    margin = 0.01 * height
    scale = min(width / _WIDTH, height / _HEIGHT)
    coefficients = np.clip(rng.standard_normal(len(_MODES)), -2.2, 2.2)
    noise = rng.normal(0.0, 5.0, template.shape)
    angle, zoom = math.radians(rng.uniform(-4, 4)), rng.uniform(0.93, 1.03)
    shift = rng.uniform(-35, 35, 2)
    while True:
        displacement = noise.copy()
        for coefficient, mode in zip(coefficients, _MODES, strict=True):
            for number, move in mode.items():
                displacement[number - 1] += coefficient * np.asarray(move)
        rotation = np.array(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        )
        linear = scale * zoom * rotation
        center = np.array([_WIDTH, _HEIGHT]) / 2
        offset = np.array([width, height]) / 2 + scale * shift - linear @ center
        landmarks = (template + displacement) @ linear.T + offset
        if (landmarks > margin).all() and (landmarks < np.array(size) - margin).all():
            matrix = np.concatenate([linear, offset[:, None]], axis=1)
            return _Shape(landmarks, displacement, matrix)
        coefficients, noise, angle, shift = (
            0.8 * coefficients, 0.8 * noise, 0.8 * angle, 0.8 * shift,
        )  # fmt: skip

"""One film and one annotation file, in every form in which they circulate."""

from __future__ import annotations

import io
import math
import re
import struct
from typing import TYPE_CHECKING

from medtrain.errors import DataError
from medtrain.recipes.cephalometric.config import CephalometricData

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NUM_POINTS = 19
_PUBLISHED_SIZE, _PUBLISHED_MM_PER_PIXEL = (1935, 2400), 0.1

Points = list[tuple[float, float]]
"""x, y in pixels of the film."""


def decode_film(data: bytes) -> NDArray[np.uint8]:
    """The gray values (height, width) of an image file, whatever it is stored as.

    Raises:
        DataError: The bytes are no image, or not a whole one.
    """
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith("I") or image.mode == "F":
                values = np.asarray(image, dtype=np.float64)
                # Detectors of 10 to 16 bits do not say which: the film's own range is the scale.
                low, high = float(values.min()), float(values.max())
                return np.round((values - low) * (255 / max(high - low, 1.0))).astype(np.uint8)
            return np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise DataError(f"film must be a whole image, but cannot be read ({error})") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"film must have a plausible size, but has not ({error})") from error


class AnnotationError(DataError):
    """An annotation file that does not hold 19 points; `kind` is that of the problem."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


def parse_points(data: bytes) -> Points:
    """The first 19 pairs `x,y` of an annotation file; whatever follows them is ignored."""
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise AnnotationError("malformed_line", f"is no text ({error})") from error
    points: Points = []
    num_lines = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        num_lines += 1
        if len(points) == NUM_POINTS:
            break
        cells = line.split(",")
        if len(cells) == 1 and re.fullmatch(r"\s*\d+\s*", line):
            break
        try:
            x, y = (float(cell) for cell in cells)
        except ValueError:
            x = y = math.nan
        if not (math.isfinite(x) and math.isfinite(y)):
            raise AnnotationError(
                "malformed_line", f"line {number} must be `x,y`, but is '{line.strip()[:40]}'"
            )
        points.append((x, y))
    if num_lines == 0:
        raise AnnotationError("empty_file", "is empty")
    if len(points) < NUM_POINTS:
        raise AnnotationError(
            "wrong_point_count", f"must begin with {NUM_POINTS} points, but has {len(points)}"
        )
    return points


def points_to_text(points: Points) -> str:
    """Points as an attribute of a case: `x,y` pairs joined by blanks, exact."""
    return " ".join(",".join(repr(int(v) if v == int(v) else v) for v in point) for point in points)


def points_from_text(text: str) -> NDArray[np.float64]:
    """Read what `points_to_text` wrote, as (points, 2)."""
    import numpy as np

    return np.array([pair.split(",") for pair in text.split(" ")], dtype=np.float64)


def mm_per_pixel_of(
    size: tuple[int, int], data: CephalometricData, *, described: float | None = None
) -> float | None:
    """Pixel size of a film of (width, height): configured, else described with the data set, else
    that of the published films if it has their size; None where nobody knows."""
    if data.mm_per_pixel is not None:
        return data.mm_per_pixel
    if described is not None:
        return described
    return _PUBLISHED_MM_PER_PIXEL if size == _PUBLISHED_SIZE else None

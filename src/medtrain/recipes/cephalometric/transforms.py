"""From a film to the model's input: letterbox, augmentation, heatmaps, and the way back.

Everywhere pixel (0, 0) is a square whose *center* has the coordinates (0, 0), so a map that scales
by s sends x to (x + 0.5) * s - 0.5. Points are (x, y), sizes (height, width). Affine maps are 3 x 3
float64 arrays that act on (x, y, 1); one such map moves the points, and its inverse warps the film,
once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from medtrain.recipes.cephalometric.config import Augmentation
from medtrain.recipes.cephalometric.films import decode_film

Array = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

OVERSAMPLING = 2.0
"""Size of a stored film relative to the model's input. At 2 the unaugmented warp averages 2 x 2
stored pixels exactly, and scaling up by 1.2 still has more pixels than it needs."""

MAX_TRIES = 10
"""Draws of an augmentation that keeps all landmarks inside, before there is none."""


@dataclass(frozen=True)
class Size:
    """Height and width in pixels."""

    height: int
    width: int


def letterbox(film: Size, image: Size) -> Array:
    """Film to input pixels: isotropic, as large as fits, centered."""
    scale = min(image.height / film.height, image.width / film.width)
    left = (image.width - film.width * scale) / 2
    top = (image.height - film.height * scale) / 2
    return _scaled(scale, scale, left, top)


def resizing(before: Size, after: Size) -> Array:
    """Pixels of an image to those of its resized copy."""
    return _scaled(after.width / before.width, after.height / before.height, 0.0, 0.0)


def _scaled(scale_x: float, scale_y: float, left: float, top: float) -> Array:
    return np.array(
        [
            [scale_x, 0.0, 0.5 * scale_x - 0.5 + left],
            [0.0, scale_y, 0.5 * scale_y - 0.5 + top],
            [0.0, 0.0, 1.0],
        ]
    )


def move_points(matrix: Array, points: Array) -> Array:
    """Points (K, 2) through an affine map."""
    moved: Array = points @ matrix[:2, :2].T + matrix[:2, 2]
    return moved


def read_film(path: Path, image: Size) -> Pixels:
    """A film as gray uint8, reduced with antialiasing to what the model's input needs.

    Memory: `OVERSAMPLING`^2 bytes per input pixel at most, 1 MiB for 512 x 512 (a whole film of
    1935 x 2400 has 4.4 MiB). Films are never enlarged.
    """
    from PIL import Image

    film = decode_film(path.read_bytes())
    height, width = film.shape
    scale = OVERSAMPLING * min(image.height / height, image.width / width)
    if scale >= 1:
        return film
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    # Unlike a box, this filter weighs pixels that it covers in part: nothing is displaced.
    return np.asarray(Image.fromarray(film).resize(size, Image.Resampling.HAMMING))


@dataclass(frozen=True)
class Change:
    """One draw of an augmentation."""

    rotation_deg: float = 0.0
    scale: float = 1.0
    translation: tuple[float, float] = (0.0, 0.0)
    """Part of the width, part of the height."""
    is_flipped: bool = False
    brightness: float = 1.0
    contrast: float = 1.0

    def matrix(self, image: Size) -> Array:
        """The geometric part, in input pixels: flip, scale and rotate about the center, move."""
        center = np.array([(image.width - 1) / 2, (image.height - 1) / 2])
        angle = math.radians(self.rotation_deg)
        cos, sin = self.scale * math.cos(angle), self.scale * math.sin(angle)
        turn = np.array([[cos, -sin], [sin, cos]]) @ np.diag([-1.0 if self.is_flipped else 1.0, 1])
        shift = np.array(self.translation) * (image.width, image.height)
        matrix = np.eye(3)
        matrix[:2, :2] = turn
        matrix[:2, 2] = center + shift - turn @ center
        return matrix


def draw_change(
    augmentation: Augmentation, *, rng: np.random.Generator, image: Size, points: Array | None
) -> Change:
    """Draw a change that keeps `points` (input pixels) inside the image.

    A draw that puts a landmark outside is drawn again; after `MAX_TRIES` only the intensities
    change.
    """
    brightness = _factor(augmentation, augmentation.brightness, rng)
    contrast = _factor(augmentation, augmentation.contrast, rng)
    for _ in range(MAX_TRIES):
        change = Change(
            rotation_deg=_spread(augmentation, augmentation.rotation_deg, rng),
            scale=_scale(augmentation, rng),
            translation=_translation(augmentation, rng),
            is_flipped=augmentation.flip and rng.random() < augmentation.probability,
            brightness=brightness,
            contrast=contrast,
        )
        if points is None or _are_inside(move_points(change.matrix(image), points), image):
            return change
    return Change(brightness=brightness, contrast=contrast)


def _spread(augmentation: Augmentation, extent: float, rng: np.random.Generator) -> float:
    """Uniform in +-extent times the intensity, or 0 where the transform is not applied."""
    is_applied = rng.random() < augmentation.probability
    value = rng.uniform(-1.0, 1.0) * extent * augmentation.intensity
    return value if is_applied else 0.0


def _factor(augmentation: Augmentation, extent: float, rng: np.random.Generator) -> float:
    return 1.0 + _spread(augmentation, extent, rng)


def _scale(augmentation: Augmentation, rng: np.random.Generator) -> float:
    is_applied = rng.random() < augmentation.probability
    low, high = augmentation.scale
    value = 1.0 + (rng.uniform(low, high) - 1.0) * augmentation.intensity
    return value if is_applied else 1.0


def _translation(augmentation: Augmentation, rng: np.random.Generator) -> tuple[float, float]:
    is_applied = rng.random() < augmentation.probability
    extent = augmentation.translation * augmentation.intensity
    x, y = rng.uniform(-extent, extent, size=2).tolist()
    return (x, y) if is_applied else (0.0, 0.0)


def _are_inside(points: Array, image: Size) -> bool:
    limits = (image.width - 1, image.height - 1)
    return bool(((points >= 0) & (points <= limits)).all())


@dataclass(frozen=True)
class Sample:
    """One film as the model sees it."""

    image: Tensor
    """(1, H, W) float32 in [0, 1]."""
    from_film: Array
    """Film to input pixels."""


def make_sample(stored: Pixels, *, film: Size, image: Size, change: Change | None = None) -> Sample:
    """Letterbox and change a stored film in one warp.

    Args:
        stored: What `read_film` gave, at any size.
        film: Size of the film itself.
        image: Size of the model's input.
        change: What augmentation does; None: nothing.
    """
    change = change or Change()
    from_film = change.matrix(image) @ letterbox(film, image)
    to_stored = resizing(film, Size(*stored.shape)) @ np.linalg.inv(from_film)
    pixels = torch.from_numpy(stored.astype(np.float32)) / 255.0
    warped = warp(pixels[None], matrix=to_stored, size=image)
    if change.contrast != 1.0:
        mean = warped.mean()
        warped = (warped - mean) * change.contrast + mean
    if change.brightness != 1.0:
        warped = warped * change.brightness
    return Sample(warped.clamp(0.0, 1.0), from_film)


def warp(pixels: Tensor, *, matrix: Array, size: Size) -> Tensor:
    """Bilinear samples (C, H, W) of `pixels` (C, h, w); black outside.

    Args:
        pixels: The source.
        matrix: From pixels of the result to pixels of the source.
        size: Size of the result.
    """
    height, width = pixels.shape[-2:]
    rows, columns = np.mgrid[: size.height, : size.width].astype(np.float64)
    x = matrix[0, 0] * columns + matrix[0, 1] * rows + matrix[0, 2]
    y = matrix[1, 0] * columns + matrix[1, 1] * rows + matrix[1, 2]
    # grid_sample counts from -1 at the outer edge of the first pixel to 1 at that of the last.
    grid = np.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], axis=-1)
    return F.grid_sample(
        pixels[None],
        torch.from_numpy(grid.astype(np.float32))[None],
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )[0]


def to_heatmap_pixels(points: Tensor, stride: int) -> Tensor:
    """Input to heatmap pixels."""
    return (points + 0.5) / stride - 0.5


def to_input_pixels(points: Tensor, stride: int) -> Tensor:
    """Heatmap to input pixels."""
    return (points + 0.5) * stride - 0.5


def render_heatmaps(points: Tensor, *, size: Size, sigma: float) -> Tensor:
    """Gaussians of peak 1 around points (…, 2) in heatmap pixels: (…, height, width)."""
    x = torch.arange(size.width, device=points.device, dtype=points.dtype)
    y = torch.arange(size.height, device=points.device, dtype=points.dtype)
    along_x = torch.exp(-((x - points[..., 0, None]) ** 2) / (2 * sigma**2))
    along_y = torch.exp(-((y - points[..., 1, None]) ** 2) / (2 * sigma**2))
    return along_y[..., :, None] * along_x[..., None, :]


def soft_argmax(heatmaps: Tensor, *, temperature: float) -> Tensor:
    """Differentiable places (…, 2) of the peaks of heatmaps (…, h, w), in heatmap pixels.

    With a peak of 1 over a floor of 0, a temperature above 0.05 draws the answer to the center.
    """
    height, width = heatmaps.shape[-2:]
    flat = heatmaps.float().flatten(-2) / temperature
    weights = flat.softmax(-1).reshape(heatmaps.shape)
    x = torch.arange(width, device=weights.device, dtype=weights.dtype)
    y = torch.arange(height, device=weights.device, dtype=weights.dtype)
    return torch.stack([(weights.sum(-2) * x).sum(-1), (weights.sum(-1) * y).sum(-1)], dim=-1)


@dataclass(frozen=True)
class Peaks:
    """Where heatmaps are highest."""

    points: Tensor
    """(B, K, 2) in heatmap pixels."""
    values: Tensor
    """(B, K)."""


def find_peaks(heatmaps: Tensor, *, sigma: float) -> Peaks:
    """The highest pixel, refined by the center of mass of the positive part around it.

    The window reaches ceil(2 sigma) pixels in each direction, and no further than the map.
    """
    heatmaps = heatmaps.float()
    batch, num, height, width = heatmaps.shape
    values, flat = heatmaps.flatten(2).max(-1)
    peak_x, peak_y = flat % width, flat // width
    radius = math.ceil(2 * sigma)
    offsets = torch.arange(-radius, radius + 1, device=heatmaps.device)
    x, y = peak_x[..., None] + offsets, peak_y[..., None] + offsets
    inside_x, inside_y = (x >= 0) & (x < width), (y >= 0) & (y < height)
    places = y.clamp(0, height - 1)[..., :, None] * width + x.clamp(0, width - 1)[..., None, :]
    window = heatmaps.flatten(2).gather(2, places.flatten(2)).reshape(batch, num, *places.shape[2:])
    mass = window.clamp(min=0) * inside_y[..., :, None] * inside_x[..., None, :]
    total = mass.sum((-2, -1))
    shift_x = (mass.sum(-2) * offsets).sum(-1) / total.clamp(min=1e-12)
    shift_y = (mass.sum(-1) * offsets).sum(-1) / total.clamp(min=1e-12)
    return Peaks(torch.stack([peak_x + shift_x, peak_y + shift_y], dim=-1), values)

"""Synthetic lateral head films in the layout of ISBI 2015.

A film is drawn from a template of 1935 x 2400 pixels of 0.1 mm: a shape model moves the 19
landmarks, everything else follows them, and layers of absorption make the film. Nothing here was
fitted to patients; the pictures are labeled as synthetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.data.synthetic import (
    LABEL,
    apportion,
    check_oddities,
    describe_synthetic,
    new_folder,
    plant,
    smooth_noise,
)
from medtrain.errors import ConfigError
from medtrain.recipes.cephalometric.oddities import ODDITIES

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
        placed: Array = moved @ self.matrix[:, :2].T + self.matrix[:, 2]
        return placed


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


_Stop = int | tuple[float, float]
"""A point of a curve: a landmark by number, or a place on the template."""


@dataclass
class _Canvas:
    """Absorption of a head, added up layer by layer on a finer grid than the film's."""

    shape: _Shape
    size: tuple[int, int]
    """Width and height of the film."""
    fine: int
    """Pixels of the grid per pixel of the film."""
    absorption: NDArray[np.float32]

    @property
    def unit(self) -> float:
        """Grid pixels per template pixel."""
        return float(math.sqrt(abs(self._determinant()))) * self.fine

    def _determinant(self) -> float:
        matrix = self.shape.matrix
        return float(matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0])

    def curve(self, stops: Sequence[_Stop], *, closed: bool = False) -> list[tuple[float, float]]:
        """A smooth curve through the stops, in grid pixels (Catmull-Rom)."""
        import numpy as np

        places = self.shape.place([(0, 0) if isinstance(stop, int) else stop for stop in stops])
        for n, stop in enumerate(stops):
            if isinstance(stop, int):
                places[n] = self.shape.landmarks[stop - 1]
        ends = [places[-1], *places, places[0], places[1]] if closed else None
        knots = np.array(ends or [places[0], *places, places[-1]])
        t = np.linspace(0, 1, 12, endpoint=False)[:, None]
        pieces = []
        for a, b, c, d in zip(knots, knots[1:], knots[2:], knots[3:], strict=False):
            pieces.append(
                b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
            )
        points = np.concatenate([*pieces, knots[-2:-1]]) + 0.5
        return [(float(x), float(y)) for x, y in points * self.fine]

    def fill(self, stops: Sequence[_Stop], amount: float, *, blur: float = 4.0) -> None:
        """Add absorption inside a closed smooth curve; `blur` in template pixels."""
        mask = self._mask()
        mask[1].polygon(self.curve(stops, closed=True), fill=255)
        self._add(mask[0], amount, blur)

    def line(
        self,
        stops: Sequence[_Stop],
        amount: float,
        *,
        width: float = 16.0,
        blur: float = 4.0,
        closed: bool = False,
    ) -> None:
        """Add absorption along a smooth curve; `width` and `blur` in template pixels."""
        mask = self._mask()
        points = self.curve(stops, closed=closed)
        pen = max(round(width * self.unit), 1)
        mask[1].line(points, fill=255, width=pen, joint="curve")
        self._add(mask[0], amount, blur)

    def tooth(
        self, tip: _Stop, apex: _Stop, amount: float, *, width: float, crown: float = 0.42
    ) -> None:
        """Add a tooth from the edge of its crown to the end of its root."""
        import numpy as np

        (end_x, end_y), (root_x, root_y) = (self.curve([tip, apex])[n] for n in (0, -1))
        end, root = np.array([end_x, end_y]), np.array([root_x, root_y])
        axis = root - end
        across = np.array([-axis[1], axis[0]]) / np.linalg.norm(axis) * width * self.unit / 2
        outline = [
            end,
            end + 0.10 * axis + 0.75 * across,
            end + crown * axis + across,
            end + 0.75 * axis + 0.6 * across,
            root,
            end + 0.75 * axis - 0.6 * across,
            end + crown * axis - across,
            end + 0.10 * axis - 0.75 * across,
        ]
        mask = self._mask()
        mask[1].polygon([(float(x), float(y)) for x, y in outline], fill=255)
        self._add(mask[0], amount, 4.0)

    def _mask(self) -> tuple[Image.Image, Any]:
        from PIL import Image, ImageDraw

        width, height = self.size
        mask = Image.new("L", (width * self.fine, height * self.fine))
        return mask, ImageDraw.Draw(mask)

    def _add(self, mask: Image.Image, amount: float, blur: float) -> None:
        import numpy as np
        from PIL import ImageFilter

        box = mask.getbbox()
        if box is None:
            return
        radius = blur * self.unit
        reach = math.ceil(3 * radius)
        left, top = max(box[0] - reach, 0), max(box[1] - reach, 0)
        right, bottom = min(box[2] + reach, mask.width), min(box[3] + reach, mask.height)
        soft = mask.crop((left, top, right, bottom)).filter(ImageFilter.GaussianBlur(radius))
        layer = np.float32(amount / 255) * np.asarray(soft, dtype=np.float32)
        self.absorption[top:bottom, left:right] += layer


def _draw_head(canvas: _Canvas) -> None:
    """Soft tissue, skull, jaws, teeth and spine, from the large to the small."""
    throat: list[_Stop] = [(1400, 2262), (1180, 2275), (1010, 2340), (960, 2480)]
    neck: list[_Stop] = [(960, 2700), (230, 2700), (200, 2300), (170, 1800), (110, 1400)]
    scalp: list[_Stop] = [
        (50, 1050), (50, 700), (170, 370), (460, 120), (870, 60), (1260, 190), (1450, 430),
    ]  # fmt: skip
    face: list[_Stop] = [
        (1505, 620), (1520, 780), (1490, 900), (1570, 1060), (1680, 1250), (1760, 1370),
        (1745, 1440), (1670, 1480), 15, (1596, 1620), 13, (1575, 1775), 14, (1545, 1965), 16,
        (1490, 2200),
    ]  # fmt: skip
    outline = [*face, *throat, *neck, *scalp]
    canvas.fill(outline, 0.16, blur=6)
    canvas.fill(outline, 0.14, blur=60)
    # brain case: filled, with an outer and an inner table
    vault: list[_Stop] = [
        2, (1462, 820), (1430, 620), (1280, 350), (900, 165), (500, 225), (215, 500), (135, 830),
        (230, 1120), (420, 1290), (560, 1350),
    ]  # fmt: skip
    inner: list[_Stop] = [
        (1392, 800), (1365, 630), (1235, 400), (890, 225), (520, 280), (270, 530), (195, 830),
        (280, 1080), (450, 1240),
    ]  # fmt: skip
    base: list[_Stop] = [
        (1370, 925), (1180, 965), (1000, 968), (905, 950), (880, 960), (872, 1010), (830, 1038),
        (786, 1012), (770, 940), (745, 985), (700, 1180), (650, 1390),
    ]  # fmt: skip
    canvas.fill([*vault, (650, 1390), (745, 985), (1000, 968)], 0.22, blur=14)
    canvas.line(vault, 0.30, width=20, blur=5)
    canvas.line(inner, 0.16, width=14, blur=6)
    canvas.line(base, 0.36, width=16)
    # petrous bone with the ear canal, whose upper edge is porion
    canvas.fill([(420, 1190), (600, 1130), (720, 1210), (700, 1330), (560, 1420), (450, 1380)],
                0.34, blur=34)  # fmt: skip
    canvas.line([4, (592, 1225), (604, 1258), (588, 1290), (556, 1302), (524, 1288), (512, 1256),
                 (526, 1224)], 0.34, width=14, closed=True)  # fmt: skip
    canvas.fill([4, (592, 1225), (604, 1258), (556, 1302), (512, 1256)], -0.16, blur=6)
    # orbit, nasal bone, cheek
    canvas.line([(1410, 945), (1320, 1000), (1272, 1090), (1274, 1170), 3, (1365, 1214)], 0.30,
                width=17)  # fmt: skip
    canvas.fill([2, (1480, 930), (1540, 1050), (1575, 1130), (1540, 1110), (1470, 1010)], 0.34,
                blur=5)  # fmt: skip
    canvas.fill([2, (1400, 870), (1330, 930), (1410, 985)], 0.16, blur=10)
    canvas.line([(1180, 1190), (1150, 1290), (1170, 1400), (1235, 1470)], 0.22, width=22, blur=7)
    # upper jaw with sinus and palate
    canvas.fill([3, (1400, 1290), (1440, 1420), 18, (1455, 1540), 5, (1462, 1660), (1250, 1680),
                 (1010, 1640), 17, (1030, 1370), (1150, 1230)], 0.16, blur=8)  # fmt: skip
    canvas.fill([(1300, 1270), (1370, 1340), (1360, 1460), (1100, 1470), (1080, 1370),
                 (1180, 1270)], -0.10, blur=16)  # fmt: skip
    canvas.line([17, (1120, 1515), (1300, 1510), 18], 0.36, width=22, blur=4)
    canvas.line([18, (1462, 1545), 5, (1446, 1630), (1475, 1680)], 0.30, width=15)
    canvas.line([(985, 1300), (955, 1390), (945, 1450), 17], 0.22, width=13)
    # lower jaw
    jaw: list[_Stop] = [
        (668, 1318), (645, 1350), 19, (650, 1500), (668, 1690), 10, (790, 1915), (980, 2030),
        (1150, 2135), (1240, 2182), 8, 9, 7, (1388, 2035), 6, (1412, 1895), (1390, 1868),
        (1200, 1856), (1015, 1830), (965, 1700), (935, 1500), (895, 1430), (830, 1480),
        (760, 1420), (728, 1340), (700, 1310),
    ]  # fmt: skip
    canvas.fill(jaw, 0.20, blur=6)
    canvas.line([*jaw[:16]], 0.34, width=18)
    canvas.line(jaw[15:], 0.14, width=14, blur=5)
    canvas.fill([(1300, 2000), 6, 7, 9, 8, (1270, 2120)], 0.12, blur=20)
    # teeth: molars in two rows, then the incisors
    for n in range(5):
        x, y = 1370 - 82 * n, 1772 - 9 * n
        canvas.tooth((x, y - 4), (x - 16, y - 165), 0.30, width=88)
        canvas.tooth((x - 22, y + 8), (x - 42, y + 170), 0.30, width=88)
    canvas.tooth(12, (1400, 1585), 0.50, width=64)
    canvas.tooth(11, (1376, 2000), 0.48, width=54)
    # spine and hyoid
    for n in range(4):
        x, y = 470 + 28 * n, 1560 + 215 * n
        box: list[_Stop] = [
            (x - 120, y - 70), (x + 110, y - 80), (x + 130, y), (x + 120, y + 88),
            (x - 110, y + 94), (x - 130, y + 10),
        ]  # fmt: skip
        canvas.fill(box, 0.18, blur=8)
        canvas.line(box, 0.16, width=14, closed=True)
    canvas.line([(930, 2160), (1000, 2130), (1060, 2110)], 0.20, width=26, blur=6)
    # air behind tongue and palate
    canvas.fill([(930, 1480), (950, 1620), (900, 1900), (880, 2260), (830, 2260), (820, 1900),
                 (850, 1600)], -0.16, blur=18)  # fmt: skip


def _draw_textures(canvas: _Canvas) -> None:
    """A small pattern of its own at every landmark: stripes of a certain direction and width."""
    import numpy as np

    height, width = canvas.absorption.shape
    sigma = 30.0 * canvas.unit
    reach = math.ceil(3 * sigma)
    for index, (x, y) in enumerate((canvas.shape.landmarks + 0.5) * canvas.fine):
        rows = slice(max(int(y) - reach, 0), min(int(y) + reach, height))
        columns = slice(max(int(x) - reach, 0), min(int(x) + reach, width))
        down = np.arange(rows.start, rows.stop)[:, None] + 0.5 - y
        right = np.arange(columns.start, columns.stop)[None] + 0.5 - x
        angle = math.pi * (index % 5) / 5
        period = (75.0 if index % 2 else 130.0) * canvas.unit
        phase = 2 * math.pi * (right * math.cos(angle) + down * math.sin(angle)) / period
        window = np.exp(-(right**2 + down**2) / (2 * sigma**2))
        pattern = (0.32 * (0.4 + 0.6 * np.cos(phase)) * window).astype(np.float32)
        canvas.absorption[rows, columns] += pattern


def _label(film: Image.Image) -> None:
    """Write in the lower right corner that the film is synthetic."""
    from PIL import ImageDraw, ImageFont

    width, height = film.size
    draw = ImageDraw.Draw(film)
    font = ImageFont.load_default(max(height // 30, 8))
    left, top, right, bottom = draw.textbbox((0, 0), LABEL, font=font)
    edge = height // 60
    place = (width - right - edge, height - bottom - edge)
    draw.rectangle(
        (place[0] + left - 2, place[1] + top - 2, place[0] + right + 2, place[1] + bottom + 2),
        fill=0,
    )
    draw.text(place, LABEL, fill=235, font=font)


def draw_film(
    shape: _Shape,
    *,
    size: tuple[int, int],
    noise: float,
    gain: float,
    rng: np.random.Generator,
) -> Image.Image:
    """A film of (width, height) in gray.

    Args:
        shape: The head.
        size: Width and height in pixels.
        noise: Strength of grain and of uneven exposure, 1 is usual.
        gain: Strength of exposure, 1 is usual.
        rng: Of noise and blur.
    """
    import numpy as np
    from PIL import Image, ImageFilter

    width, height = size
    fine = 2 if height < 1000 else 1
    empty = np.zeros((height * fine, width * fine), dtype=np.float32)
    canvas = _Canvas(shape, size, fine, empty)
    _draw_head(canvas)
    bone = canvas.absorption
    bone *= 1 + 0.06 * smooth_noise(bone.shape, period=22 * canvas.unit, rng=rng)
    bone *= 1 + 0.06 * smooth_noise(bone.shape, period=160 * canvas.unit, rng=rng)
    _draw_textures(canvas)
    gray = 1 - np.exp(-1.75 * gain * np.clip(bone, 0, None))
    uneven = 0.02 * noise * smooth_noise(gray.shape, period=0.7 * height * fine, rng=rng)
    gray = 0.03 + 0.95 * gray ** rng.uniform(0.9, 1.15) + uneven.astype(np.float32)
    film = Image.fromarray(np.clip(gray * 255, 0, 255).astype(np.uint8))
    film = film.resize(size, Image.Resampling.BOX) if fine > 1 else film
    film = film.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.5) * canvas.unit / fine * 5))
    grain = rng.standard_normal((height, width)) * 3.5 * noise
    film = Image.fromarray(np.clip(np.asarray(film) + grain, 0, 255).round().astype(np.uint8))
    _label(film)
    return film


def synthesize(
    folder: Path,
    *,
    num_cases: int = 40,
    seed: int = 0,
    image_size: tuple[int, int] = (387, 480),
    mm_per_pixel: float = 0.5,
    oddities: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a data set of drawn films in the layout of ISBI 2015.

    A film depends on the seed and its number alone, so that a larger set of the same seed has the
    films of a smaller one and more.

    Args:
        folder: A new or an empty one.
        num_cases: Films, shared out as 150 : 150 : 100 over training and the two tests.
        seed: Of everything random.
        image_size: Width and height in pixels; the published films have 1935 x 2400.
        mm_per_pixel: The pixel size that dataset.json says; the published films have 0.1.
        oddities: Names in `ODDITIES`, planted in this order.
        progress: Told how many of how many films are drawn.
    """
    if num_cases < 1:
        raise ConfigError(f"num_cases must be at least 1, but is {num_cases}")
    if min(image_size) < 64:
        raise ConfigError(f"image_size must be 64 pixels or more each way, but is {image_size}")
    check_oddities(oddities, ODDITIES)
    new_folder(folder)
    lines = []
    for done, (subset, number) in enumerate(film_numbers(num_cases), start=1):
        lines.append(_write_case(folder, subset, number, seed=seed, size=image_size))
        if progress:
            progress(done, num_cases)
    (folder / "meta.csv").write_text("\n".join(["image,acquisition_order,device", *lines]) + "\n")
    describe_synthetic(
        folder, mm_per_pixel=mm_per_pixel, num_cases=num_cases, seed=seed, system="cephalometric"
    )
    plant(folder, oddities, ODDITIES)


def film_numbers(num_cases: int) -> list[tuple[str, int]]:
    """Folder and number of every film: the published numbers as far as they go."""
    counts = apportion(num_cases, [count for _, count in _SUBSETS.values()])
    starts = [start for start, _ in _SUBSETS.values()]
    if any(count > most for count, (_, most) in zip(counts, _SUBSETS.values(), strict=True)):
        starts = [1 + sum(counts[:n]) for n in range(len(counts))]
    return [
        (subset, number)
        for subset, start, count in zip(_SUBSETS, starts, counts, strict=True)
        for number in range(start, start + count)
    ]


def _write_case(folder: Path, subset: str, number: int, *, seed: int, size: tuple[int, int]) -> str:
    """Draw one film and let two readers mark it; the answer is its line of meta.csv."""
    import numpy as np

    rng = np.random.default_rng([seed, number])
    shape = _draw_shape(size=size, rng=rng)
    difficulty = rng.uniform(0.0, 1.0)
    device = int(rng.integers(2))
    film = draw_film(
        shape, size=size, noise=0.6 + 0.8 * difficulty, gain=(1.0, 0.82)[device], rng=rng
    )
    image = folder / "RawImage" / subset / f"{number:03d}.bmp"
    image.parent.mkdir(parents=True, exist_ok=True)
    film.save(image)
    scale = min(size[0] / _WIDTH, size[1] / _HEIGHT) / _DISTANCE_PER_SIGMA
    sigma = np.asarray(_READERS_DISTANCE)[:, None] * scale * (0.7 + 0.6 * difficulty)
    for reader in ("junior", "senior"):
        marked = shape.landmarks + sigma * rng.standard_normal(shape.landmarks.shape)
        marked = np.clip(marked.round(), 0, np.array(size) - 1).astype(int)
        types = rng.integers(1, 5, 8)
        path = folder / "AnnotationsByMD" / f"400_{reader}" / f"{number:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join([*(f"{x},{y}\n" for x, y in marked), *(f"{n}\n" for n in types)]))
    # Acquisition runs through all three folders, as years of a clinic would.
    order = int(rng.integers(1, 100_000))
    return f"{number:03d},{order},unit_{'ab'[device]}"

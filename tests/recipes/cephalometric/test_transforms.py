from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from medtrain.errors import DataError
from medtrain.recipes.cephalometric import transforms
from medtrain.recipes.cephalometric.config import Augmentation
from medtrain.recipes.cephalometric.transforms import (
    Change,
    Pixels,
    Size,
    draw_change,
    find_peaks,
    letterbox,
    make_sample,
    move_points,
    read_film,
    render_heatmaps,
    resizing,
    soft_argmax,
    to_heatmap_pixels,
    to_input_pixels,
)

FILM = Size(240, 194)
IMAGE = Size(128, 128)


def _film_with_dot(x: float, y: float, size: Size = FILM, width: float = 3.0) -> Pixels:
    rows, columns = np.mgrid[: size.height, : size.width]
    dot = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * width**2))
    pixels: Pixels = np.round(255 * dot).astype(np.uint8)
    return pixels


def _center_of_mass(image: torch.Tensor) -> tuple[float, float]:
    weights = image[0].double()
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in weights.shape), indexing="ij")
    total = weights.sum()
    return float((weights * columns).sum() / total), float((weights * rows).sum() / total)


def test_the_letterbox_keeps_the_shape_of_the_film_and_centers_it():
    matrix = letterbox(FILM, IMAGE)
    corners = np.array([[-0.5, -0.5], [FILM.width - 0.5, FILM.height - 0.5]])
    (left, top), (right, bottom) = move_points(matrix, corners).tolist()
    assert (top, bottom) == pytest.approx((-0.5, 127.5))
    assert (right - left) / (bottom - top) == pytest.approx(FILM.width / FILM.height)
    assert left + right == pytest.approx(127.0)


def test_resizing_maps_pixel_centers():
    matrix = resizing(Size(4, 2), Size(8, 8))
    assert move_points(matrix, np.array([[0.0, 0.0], [1.0, 3.0]])).tolist() == [
        [1.5, 0.5],
        [5.5, 6.5],
    ]


CHANGES = [
    Change(),
    Change(rotation_deg=15),
    Change(scale=0.8),
    Change(scale=1.2, translation=(-0.05, 0.08)),
    Change(is_flipped=True),
    Change(rotation_deg=-11, scale=1.1, translation=(0.07, -0.03), is_flipped=True),
]


@pytest.mark.parametrize("stored", [Size(240, 194), Size(256, 207), Size(128, 103)])
@pytest.mark.parametrize("change", CHANGES)
def test_a_drawn_dot_is_found_where_its_point_went(change, stored):
    at_film = np.array([[121.3, 88.6]])
    ((stored_x, stored_y),) = move_points(resizing(FILM, stored), at_film).tolist()
    width = 4 * stored.height / FILM.height
    pixels = _film_with_dot(stored_x, stored_y, size=stored, width=width)
    sample = make_sample(pixels, film=FILM, image=IMAGE, change=change)
    ((x, y),) = move_points(sample.from_film, at_film)
    assert _center_of_mass(sample.image) == pytest.approx((x, y), abs=0.02)


def test_points_come_back_to_the_film_by_the_inverse():
    change = CHANGES[-1]
    points = np.array([[0.0, 0.0], [193.0, 239.0], [50.5, 70.25]])
    matrix = change.matrix(IMAGE) @ letterbox(FILM, IMAGE)
    inverse = np.linalg.inv(matrix).astype(np.float64)
    back = move_points(inverse, move_points(matrix, points))
    assert np.abs(back - points).max() < 1e-10


def test_a_mirrored_image_is_the_image_mirrored():
    pixels = np.random.default_rng(1).integers(0, 256, (128, 128), dtype=np.uint8)
    plain = make_sample(pixels, film=IMAGE, image=IMAGE)
    mirrored = make_sample(pixels, film=IMAGE, image=IMAGE, change=Change(is_flipped=True))
    assert torch.allclose(plain.image, torch.from_numpy(pixels)[None] / 255, atol=1e-4)
    assert torch.allclose(mirrored.image, plain.image.flip(-1), atol=1e-4)


def test_a_film_stored_at_twice_the_size_is_averaged_two_by_two():
    pixels = np.random.default_rng(1).integers(0, 256, (256, 256), dtype=np.uint8)
    image = make_sample(pixels, film=Size(256, 256), image=IMAGE).image
    averaged = torch.from_numpy(pixels / 255.0).reshape(128, 2, 128, 2).mean((1, 3))
    assert torch.allclose(image[0].double(), averaged, atol=1e-4)


def test_intensities_change_about_the_mean_and_stay_in_range():
    pixels = np.tile(np.linspace(0, 255, 128).astype(np.uint8), (128, 1))

    def changed(change: Change) -> torch.Tensor:
        return make_sample(pixels, film=IMAGE, image=IMAGE, change=change).image

    plain = changed(Change())
    flat = changed(Change(contrast=0.85))
    bright = changed(Change(brightness=1.2))
    assert float(flat.std()) == pytest.approx(0.85 * float(plain.std()), rel=1e-3)
    assert float(flat.mean()) == pytest.approx(float(plain.mean()), rel=1e-3)
    assert torch.allclose(bright[..., :100], 1.2 * plain[..., :100])
    assert bright.max() == 1.0


def _drawn(augmentation: Augmentation, num: int = 400, points=None) -> list[Change]:
    rng = np.random.default_rng(3)
    return [draw_change(augmentation, rng=rng, image=IMAGE, points=points) for _ in range(num)]


def test_full_intensity_uses_the_whole_ranges_and_half_of_the_draws():
    changes = _drawn(Augmentation())
    rotations = np.array([c.rotation_deg for c in changes])
    scales = np.array([c.scale for c in changes])
    shifts = np.array([c.translation for c in changes])
    assert 14 < np.abs(rotations).max() <= 15
    assert 0.8 <= scales.min() < 0.82 < 1.18 < scales.max() <= 1.2
    assert 0.09 < np.abs(shifts).max() <= 0.10
    assert 0.8 <= min(c.brightness for c in changes) < 0.82
    assert 0.85 <= min(c.contrast for c in changes) < 0.87
    for values in (rotations != 0, scales != 1, shifts.any(axis=1)):
        assert 0.4 < values.mean() < 0.6
    assert not any(c.is_flipped for c in changes)


def test_intensity_narrows_every_range_and_zero_probability_changes_nothing():
    changes = _drawn(Augmentation(intensity=0.5))
    assert max(abs(c.rotation_deg) for c in changes) <= 7.5
    assert max(abs(c.scale - 1) for c in changes) <= 0.1
    assert max(abs(c.brightness - 1) for c in changes) <= 0.1
    assert set(_drawn(Augmentation(probability=0.0, flip=True), 20)) == {Change()}
    assert {c.is_flipped for c in _drawn(Augmentation(flip=True), 40)} == {False, True}


def test_no_drawn_change_puts_a_landmark_outside():
    points = np.array([[3.0, 64.0], [64.0, 124.0], [120.0, 10.0]])
    changes = _drawn(Augmentation(probability=1.0), points=points)
    for change in changes:
        moved = move_points(change.matrix(IMAGE), points)
        assert moved.min() >= 0
        assert moved.max() <= 127
    assert sum(c.rotation_deg != 0 for c in changes) > 100


def test_the_geometry_is_left_alone_when_no_draw_fits(monkeypatch):
    corners = np.array([[0.0, 0.0], [127.0, 127.0]])
    only_growing = Augmentation(probability=1.0, scale=(1.1, 1.2))
    tries: list[Change] = []
    matrix = Change.matrix

    def counted(self: Change, image: Size) -> transforms.Array:
        tries.append(self)
        return matrix(self, image)

    monkeypatch.setattr(Change, "matrix", counted)
    change = draw_change(only_growing, rng=np.random.default_rng(1), image=IMAGE, points=corners)
    assert len(tries) == transforms.MAX_TRIES == 10
    assert (change.rotation_deg, change.scale, change.translation) == (0.0, 1.0, (0.0, 0.0))
    assert change.brightness != 1.0


def test_a_film_is_read_as_gray_at_twice_the_model_s_size(tmp_path):
    pixels = _film_with_dot(600, 900, size=Size(1200, 968), width=20)
    Image.fromarray(np.stack([pixels] * 3, axis=-1)).save(tmp_path / "001.bmp")
    stored = read_film(tmp_path / "001.bmp", IMAGE)
    assert stored.dtype == np.uint8
    assert stored.shape == (256, 207)
    sample = make_sample(stored, film=Size(1200, 968), image=IMAGE)
    ((x, y),) = move_points(sample.from_film, np.array([[600.0, 900.0]]))
    assert _center_of_mass(sample.image) == pytest.approx((x, y), abs=0.05)


def test_a_small_film_is_not_enlarged(tmp_path):
    Image.fromarray(_film_with_dot(5, 5)).save(tmp_path / "1.png")
    assert read_film(tmp_path / "1.png", Size(512, 512)).shape == (240, 194)


def test_an_unreadable_film_is_a_data_error(tmp_path):
    (tmp_path / "bad.bmp").write_bytes(b"BM nothing")
    with pytest.raises(DataError, match="must be a whole image"):
        read_film(tmp_path / "bad.bmp", IMAGE)


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_heatmap_pixels_are_centered_in_the_input_pixels_they_cover(stride):
    points = torch.tensor([[0.0, 0.0], [127.0, 5.0]])
    assert to_heatmap_pixels(torch.tensor([(stride - 1) / 2]), stride) == 0
    assert torch.allclose(to_input_pixels(to_heatmap_pixels(points, stride), stride), points)


def test_heatmaps_have_their_peak_at_the_point_and_the_given_width():
    maps = render_heatmaps(torch.tensor([[[20.0, 10.0]]]), size=Size(32, 48), sigma=2.0)
    assert maps.shape == (1, 1, 32, 48)
    assert maps[0, 0, 10, 20] == 1
    assert maps[0, 0, 10, 22] == pytest.approx(math.exp(-0.5))
    assert maps[0, 0, 14, 20] == pytest.approx(math.exp(-2))


def test_points_survive_the_way_through_heatmaps_and_back():
    """E07: round trip on true heatmaps of 64 x 64 for inputs of 128 x 128, sigma 1.5."""
    points = torch.from_numpy(np.random.default_rng(0).uniform(8, 120, (4, 250, 2))).float()
    maps = render_heatmaps(to_heatmap_pixels(points, 2), size=Size(64, 64), sigma=1.5)
    peaks = find_peaks(maps, sigma=1.5)
    error = (to_input_pixels(peaks.points, 2) - points).norm(dim=-1).mean()
    whole = to_input_pixels(peaks.points.round(), 2)
    assert error < 0.15
    assert (whole - points).norm(dim=-1).mean() > 0.5
    assert peaks.values.min() > 0.8


def test_the_window_stops_at_the_border_and_a_flat_map_has_its_first_pixel():
    maps = render_heatmaps(torch.tensor([[[0.0, 0.0], [31.0, 15.0]]]), size=Size(16, 32), sigma=1.5)
    found = find_peaks(maps, sigma=1.5).points
    assert found.min() >= 0
    assert torch.allclose(found[0, 1], torch.tensor([31.0, 15.0]), atol=1.2)
    flat = find_peaks(torch.full((1, 1, 16, 32), -1.0), sigma=1.5)
    assert flat.points.tolist() == [[[0.0, 0.0]]]
    assert flat.values.item() == -1


def test_soft_argmax_needs_a_low_temperature():
    """E08: a peak of 1 at (20, 100) in a map of 128 x 128."""
    maps = render_heatmaps(torch.tensor([[[20.0, 100.0]]]), size=Size(128, 128), sigma=2.0)
    warm = soft_argmax(maps, temperature=1.0)[0, 0]
    cold = soft_argmax(maps, temperature=0.05)[0, 0]
    assert (warm - 63.5).abs().max() < 1
    assert (cold - torch.tensor([20.0, 100.0])).abs().max() < 0.01

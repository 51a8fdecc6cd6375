from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtrain.data.synthetic import (
    Oddity,
    apportion,
    describe_synthetic,
    new_folder,
    plant,
    smooth_noise,
)
from medtrain.errors import ConfigError, DataError


@given(st.integers(0, 500), st.lists(st.integers(1, 200), min_size=1, max_size=5))
def test_parts_add_up_and_are_near_their_shares(total: int, shares: list[int]) -> None:
    parts = apportion(total, shares)

    assert sum(parts) == total
    exact = [total * share / sum(shares) for share in shares]
    assert all(abs(part - value) < 1 for part, value in zip(parts, exact, strict=True))


def test_oddities_are_planted_in_the_order_given(tmp_path: Path) -> None:
    def note(text: str) -> Oddity:
        def write(folder: Path) -> None:
            with (folder / "log").open("a") as file:
                file.write(text)

        return Oddity(text, write)

    plant(tmp_path, ["b", "a", "b"], {"a": note("a"), "b": note("b")})

    assert (tmp_path / "log").read_text() == "bab"


def test_an_unknown_oddity_is_refused_before_any_is_planted(tmp_path: Path) -> None:
    def explode(folder: Path) -> None:
        raise AssertionError("planted")

    with pytest.raises(
        ConfigError, match=r"'trunctated' does not exist\. Did you mean 'truncated'"
    ):
        plant(tmp_path, ["truncated", "trunctated"], {"truncated": Oddity("", explode)})


def test_a_folder_in_use_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "films.txt").write_text("mine")

    with pytest.raises(DataError, match="new or an empty folder"):
        new_folder(tmp_path)
    assert new_folder(tmp_path / "a" / "b").is_dir()


def test_the_description_says_synthetic(tmp_path: Path) -> None:
    describe_synthetic(tmp_path, mm_per_pixel=0.5)

    assert json.loads((tmp_path / "dataset.json").read_text()) == {
        "synthetic": True,
        "mm_per_pixel": 0.5,
    }


def test_smooth_noise_is_smooth_and_of_unit_spread() -> None:
    noise = smooth_noise((60, 90), period=15, rng=np.random.default_rng(0))

    assert noise.shape == (60, 90) and noise.dtype == np.float32
    assert abs(noise.mean()) < 1e-5 and noise.std() == pytest.approx(1, abs=1e-4)
    assert np.abs(np.diff(noise, axis=1)).mean() < 0.2

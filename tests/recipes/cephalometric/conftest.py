from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from medtrain.recipes.cephalometric.data import synthesize


@pytest.fixture(scope="session")
def pristine_films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen small synthetic films, which nobody may change."""
    folder = tmp_path_factory.mktemp("synthetic") / "films"
    synthesize(folder, num_cases=16, seed=3, image_size=(96, 120), mm_per_pixel=2.0)
    return folder


@pytest.fixture
def films(pristine_films: Path, tmp_path: Path) -> Path:
    """A copy of the films, to be changed."""
    return Path(shutil.copytree(pristine_films, tmp_path / "films"))

"""The tiny system as a package, and its data."""

import json
import shutil
import sys
from pathlib import Path

import pytest

TINY = str(Path(__file__).parents[2] / "tiny")
if TINY not in sys.path:
    sys.path.insert(0, TINY)


SPOILED_CASE = "case_017"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic data set of 60 cases."""
    from tiny_recipe.data import synthesize

    folder = tmp_path_factory.mktemp("tiny") / "raw"
    synthesize(folder, num_cases=60, seed=0)
    return folder


@pytest.fixture(scope="session")
def spoiled_data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data set, in which one training case holds no number."""
    folder = tmp_path_factory.mktemp("spoiled") / "raw"
    shutil.copytree(tiny_data, folder)
    file = folder / "cases" / f"{SPOILED_CASE}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "y": float("nan")}))
    return folder

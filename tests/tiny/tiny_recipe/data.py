"""Data of the tiny system: one JSON file a case, `cases/<case id>.json` with `x` and `y`."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from medtrain.config import Weights
from medtrain.data.manifest import Case, FileEntry, Manifest, Problem, Scan
from medtrain.data.splits import SplitRow, assign_roles, count_roles, draw_holdout
from medtrain.storage.uri import Store
from tiny_recipe.config import TinyData, TinyStage

WEIGHTS = (1.0, -2.0, 0.5, 0.0, 3.0, -1.0)


def synthesize(folder: Path, *, num_cases: int, seed: int) -> None:
    """Write a synthetic data set: y is a linear function of x, and a little noise."""
    draw = random.Random(seed)
    (folder / "cases").mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps({"synthetic": True}))
    for number in range(num_cases):
        x = [draw.gauss(0.0, 1.0) for _ in WEIGHTS]
        y = sum(w * value for w, value in zip(WEIGHTS, x, strict=True)) + draw.gauss(0.0, 0.1)
        file = folder / "cases" / f"case_{number:03d}.json"
        file.write_text(json.dumps({"x": x, "y": y}))


def scan(
    root: Store, data: TinyData, *, progress: Callable[[int, int], None] | None = None
) -> Scan:
    """Read the raw data set."""
    infos = [info for info in root.list("cases/") if info.key.endswith(".json")]
    cases, problems = [], []
    for number, info in enumerate(infos, start=1):
        case_id = Path(info.key).stem
        content = root.read(info.key)
        if len(json.loads(content)["x"]) != len(WEIGHTS):
            problems.append(Problem("error", "shape", case_id, info.key, "x must have 6 numbers"))
        checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
        file = FileEntry(info.key, len(content), checksum)
        cases.append(Case(case_id, group=case_id, files={"numbers": file}))
        if progress is not None:
            progress(number, len(infos))
    is_synthetic = (
        root.exists("dataset.json") and json.loads(root.read("dataset.json"))["synthetic"]
    )
    return Scan(Manifest(tuple(cases), bool(is_synthetic)), tuple(problems))


def assign(
    cases: Sequence[Case], data: TinyData, existing: Sequence[SplitRow], *, seed: int
) -> list[SplitRow]:
    """A fifth for testing, five folds of the rest."""

    def deal(groups: Mapping[str, Sequence[Case]]) -> dict[str, str]:
        return draw_holdout(
            dict.fromkeys(groups, "all"),
            sizes={group: len(members) for group, members in groups.items()},
            counts=count_roles(existing),
            seed=seed,
        )

    return assign_roles(cases, existing, deal=deal)


def weights(stage: TinyStage) -> dict[str, Weights]:
    """There are no pretrained weights."""
    return {}


def case_from_file(path: Path, data: TinyData) -> Case:
    """A case for `predict`."""
    content = path.read_bytes()
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    entry = FileEntry(str(path.absolute()), len(content), checksum)
    return Case(path.stem, group=path.stem, files={"numbers": entry})

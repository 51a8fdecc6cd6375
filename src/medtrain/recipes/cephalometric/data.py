"""ISBI 2015 as a data set: reading it, its truth by convention, and its protocols of division."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medtrain.config import Weights
from medtrain.data.manifest import Case, FileEntry
from medtrain.data.splits import (
    SplitRow,
    assign_roles,
    count_roles,
    draw_holdout,
    draw_temporal,
)
from medtrain.errors import DataError
from medtrain.recipes.cephalometric.config import CephalometricData, CephalometricStage
from medtrain.recipes.cephalometric.films import decode_film, mm_per_pixel_of, points_from_text
from medtrain.recipes.cephalometric.oddities import ODDITIES
from medtrain.recipes.cephalometric.reader import NUM_FOLDS, scan, shortage
from medtrain.recipes.cephalometric.synthetic import synthesize
from medtrain.storage.uri import sha256_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LANDMARKS = (
    "sella",
    "nasion",
    "orbitale",
    "porion",
    "subspinale",
    "supramentale",
    "pogonion",
    "menton",
    "gnathion",
    "gonion",
    "lower_incisal",
    "upper_incisal",
    "upper_lip",
    "lower_lip",
    "subnasale",
    "soft_pogonion",
    "posterior_nasal_spine",
    "anterior_nasal_spine",
    "articulare",
)
"""In the order of the annotation files: landmark n of the papers has index n - 1. The definition of
number 16 differs between readers and parts of the data set: report it apart."""

MAHT7 = (0, 1, 4, 5, 6, 7, 8)
"""Indices of the seven landmarks of MAHT-Net's own documents."""

_SELLA, _NASION, _A_POINT, _B_POINT = 0, 1, 4, 5
_ANB_CLASS_1_DEG = (0.0, 4.0)


@dataclass(frozen=True)
class Readings:
    """The points of the two readers in pixels of the raw film, each (19, 2) as x, y; None: none."""

    junior: NDArray[np.float64] | None
    senior: NDArray[np.float64] | None

    @property
    def present(self) -> list[NDArray[np.float64]]:
        """Those that exist."""
        return [points for points in (self.junior, self.senior) if points is not None]


def landmark_indices(data: CephalometricData) -> tuple[int, ...]:
    """Which of the 19 landmarks are used, in the order of the model's outputs."""
    return MAHT7 if data.landmarks == "maht7" else tuple(range(len(LANDMARKS)))


def landmark_names(data: CephalometricData) -> tuple[str, ...]:
    """Names of the landmarks in the order of the model's outputs."""
    return tuple(LANDMARKS[index] for index in landmark_indices(data))


def annotators(case: Case) -> Readings:
    """Both readers' points, all 19, in pixels of the raw film."""
    points = {
        reader: points_from_text(case.attributes[reader]) if reader in case.attributes else None
        for reader in ("junior", "senior")
    }
    return Readings(**points)


def truth(case: Case, data: CephalometricData) -> NDArray[np.float64]:
    """The true points (landmarks, 2) as x, y in pixels of the raw film, by `data.annotator`.

    Raises:
        DataError: The case lacks an annotation that the convention needs.
    """
    import numpy as np

    readings = annotators(case)
    wanted = {
        "mean": (readings.junior, readings.senior),
        "junior": (readings.junior,),
        "senior": (readings.senior,),
    }[data.annotator]
    present = [points for points in wanted if points is not None]
    if len(present) < len(wanted):
        raise DataError(
            f"case {case.case_id} must have the annotations that data.annotator={data.annotator} "
            "needs, but has not. Run `medtrain data check`."
        )
    points: NDArray[np.float64] = np.mean(present, axis=0)
    return points[list(landmark_indices(data))]


def weights(stage: CephalometricStage) -> dict[str, Weights]:
    """Pretrained weights that a stage starts from, by name; none unless `init.from=pretrained`."""
    return {"encoder": stage.model.encoder.weights} if stage.init.source == "pretrained" else {}


def case_from_file(path: Path, data: CephalometricData) -> Case:
    """A film without annotations, for `predict`. Its file entry has the absolute path.

    Raises:
        DataError: The file is no image, or nothing says its pixel size.
    """
    if not path.is_file():
        raise DataError(f"film must be a file, but {path} is none")
    height, width = decode_film(path.read_bytes()).shape
    pitch = mm_per_pixel_of((width, height), data)
    if pitch is None:
        raise DataError(
            f"{path.name} must have a known pixel size, but is a film of {width} x {height}. "
            "Set data.mm_per_pixel."
        )
    return Case(
        path.stem,
        f"case-{path.stem}",
        files={
            "image": FileEntry(
                str(path.absolute()), path.stat().st_size, f"sha256:{sha256_of(path)}"
            )
        },
        attributes={
            "width": str(width),
            "height": str(height),
            "mm_per_pixel": repr(float(pitch)),
        },
    )


def assign(
    cases: Sequence[Case],
    data: CephalometricData,
    existing: Sequence[SplitRow],
    *,
    seed: int,
) -> list[SplitRow]:
    """The place of every case under `data.protocol`, with what is recorded kept.

    `holdout_5fold`: 20 % of the groups are the test, the others five folds, alike in skeletal
    class and difficulty. `challenge`: Test1Data and Test2Data are the tests `test1` and `test2`,
    TrainingData five folds. `temporal`: the latest 20 % are the test. `external`: all cases are the
    test `external`, for models of another data set.

    Raises:
        DataError: The protocol cannot be used with these cases; the reason is said.
    """
    present = {case.case_id for case in cases}
    known = [row for row in existing if row.case_id in present]
    reason = shortage(cases, data.protocol)
    if reason:
        raise DataError(f"{reason}. Add films, or set data.protocol.")
    given: dict[str, str] = {}

    def deal_folds(groups: Mapping[str, Sequence[Case]]) -> dict[str, str]:
        return draw_holdout(
            _strata(groups, cases),
            sizes={group: len(members) for group, members in groups.items()},
            counts=count_roles(known),
            test_fraction=0.2 if data.protocol == "holdout_5fold" else 0.0,
            num_folds=NUM_FOLDS,
            seed=seed,
        )

    def deal_times(groups: Mapping[str, Sequence[Case]]) -> dict[str, str]:
        return _deal_times(groups, cases, known)

    if data.protocol == "challenge":
        given = {
            case.case_id: case.attributes["subset"]
            for case in cases
            if case.attributes["subset"] != "train"
        }
    elif data.protocol == "external":
        given = {case.case_id: "external" for case in cases}
    deal = deal_times if data.protocol == "temporal" else deal_folds
    return assign_roles(cases, existing, deal=deal, given=given)


def _deal_times(
    groups: Mapping[str, Sequence[Case]], cases: Sequence[Case], known: Sequence[SplitRow]
) -> dict[str, str]:
    times = {case.case_id: _time(case) for case in cases}
    bounds: dict[str, float] = {}
    for row in known:
        if row.role in ("train", "val"):
            bounds[row.role] = max(bounds.get(row.role, -math.inf), times[row.case_id])
    roles = draw_temporal(
        {group: max(times[case.case_id] for case in members) for group, members in groups.items()},
        sizes={group: len(members) for group, members in groups.items()},
        bounds=bounds,
    )
    absent = {"train", "val", "test"} - set(roles.values())
    if not known and absent:
        raise DataError(
            f"protocol temporal must find films of three times, but none is left for "
            f"{', '.join(sorted(absent))}. See acquisition_order in meta.csv."
        )
    return roles


def _time(case: Case) -> float:
    order = case.attributes.get("acquisition_order")
    if order is None:
        raise DataError(
            "protocol temporal must know the acquisition_order of every film, but "
            f"{case.case_id} has none (the published ISBI films have none). "
            "Add it to meta.csv (image, acquisition_order), or set data.protocol."
        )
    return float(order)


def _strata(groups: Mapping[str, Sequence[Case]], cases: Sequence[Case]) -> dict[str, str]:
    """Group → skeletal class and tercile of difficulty of its first case."""
    import numpy as np

    difficulty = {case.case_id: _difficulty(case) for case in cases}
    known = [value for value in difficulty.values() if value is not None]
    cuts = np.quantile(known, [1 / 3, 2 / 3]) if known else np.zeros(2)
    strata = {}
    for group, members in groups.items():
        first = min(members, key=lambda case: case.case_id)
        value = difficulty[first.case_id]
        tercile = "unknown" if value is None else str(int(np.searchsorted(cuts, value)))
        strata[group] = f"class_{skeletal_class(first)}-tercile_{tercile}"
    return strata


def _difficulty(case: Case) -> float | None:
    """Mean distance in pixels between the two readers; None where one is missing."""
    import numpy as np

    readings = annotators(case)
    if readings.junior is None or readings.senior is None:
        return None
    return float(np.linalg.norm(readings.junior - readings.senior, axis=1).mean())


def anb_deg(points: NDArray[np.float64]) -> float:
    """The ANB angle in degrees of 19 points: positive where point A lies in front of point B.

    Sella says which way is front, so that films facing left are measured alike.
    """
    nasion = points[_NASION]

    def forward(index: int) -> float:
        x, y = points[index] - nasion
        return math.atan2(x, y)

    facing = 1.0 if nasion[0] > points[_SELLA][0] else -1.0
    return math.degrees(facing * (forward(_A_POINT) - forward(_B_POINT)))


def skeletal_class(case: Case) -> int:
    """Skeletal class 1, 2 (upper jaw in front, ANB above 4 degrees) or 3 (lower jaw, below 0)."""
    import numpy as np

    angle = anb_deg(np.mean(annotators(case).present, axis=0))
    low, high = _ANB_CLASS_1_DEG
    return 1 if low <= angle <= high else 2 if angle > high else 3


__all__ = [
    "LANDMARKS",
    "MAHT7",
    "ODDITIES",
    "Readings",
    "anb_deg",
    "annotators",
    "assign",
    "case_from_file",
    "decode_film",
    "landmark_indices",
    "landmark_names",
    "scan",
    "skeletal_class",
    "synthesize",
    "truth",
    "weights",
]

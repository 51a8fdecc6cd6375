"""Reading an ISBI 2015 data set as it is found in the wild: its cases and every problem at once.

Accepted, in any letter case::

    [RawImage/][RawImage/]{TrainingData,Test1Data,Test2Data}/001.{bmp,png,jpg,tif}
    [AnnotationsByMD/]{400_junior,400_senior}/001.txt    19 lines `x,y` in pixels, then anything
    patients.csv  (image, patient)                       optional: films of one patient
    meta.csv      (image, acquisition_order, device)     optional
    dataset.json  {"synthetic": true, "mm_per_pixel": 0.5}   optional
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from medtrain.data.manifest import (
    Case,
    FileEntry,
    Manifest,
    Problem,
    Scan,
    Severity,
    sort_problems,
)
from medtrain.data.splits import join_groups
from medtrain.errors import DataError
from medtrain.recipes.cephalometric.config import CephalometricData
from medtrain.recipes.cephalometric.films import (
    AnnotationError,
    Points,
    decode_film,
    mm_per_pixel_of,
    parse_points,
    points_from_text,
    points_to_text,
)
from medtrain.storage.uri import ObjectInfo, Store

NUM_FOLDS = 5
READERS = ("junior", "senior")

_SUBSETS = {"trainingdata": "train", "test1data": "test1", "test2data": "test2"}
_READER_FOLDER = re.compile(r"(\d+_)?(?P<reader>junior|senior)")
_IMAGES = {".bmp", ".png", ".jpg", ".jpeg", ".tif", ".tiff"}
_ARCHIVES = {".rar", ".zip", ".7z", ".tar", ".tgz", ".gz"}
_TABLES = ("patients.csv", "meta.csv", "dataset.json")
_ANTERIOR, _POSTERIOR = [2, 4, 10, 11], [0, 3, 18]
"""Orbitale, A point and incisors lie in front of sella, porion and articulare."""
_LANDMARK_7, _LANDMARK_16 = 6, 15
_NUM_READS = 8


def scan(
    root: Store,
    data: CephalometricData,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Read every film and annotation under `root`; all problems are in the answer, none raises.

    A case is in the manifest if its film and the annotations that `data.annotator` needs can be
    used. Every other one has an error among the problems.
    """
    return _Reader(root, data, progress or (lambda done, total: None)).scan()


@dataclass(frozen=True)
class _Film:
    """A film's file and what reading it gave."""

    info: ObjectInfo
    subset: str
    checksum: str = ""
    size: tuple[int, int] | None = None
    """Width and height; None: unreadable."""


@dataclass(frozen=True)
class _Annotation:
    """A reader's file for one case and what reading it gave."""

    info: ObjectInfo
    checksum: str = ""
    points: Points | None = None


@dataclass
class _Reader:
    """One scan. Methods run in the order in which `scan` calls them and note problems as met."""

    root: Store
    data: CephalometricData
    progress: Callable[[int, int], None]
    problems: list[Problem] = field(default_factory=list)
    films: dict[str, _Film] = field(default_factory=dict)
    annotations: dict[str, dict[str, _Annotation]] = field(
        default_factory=lambda: {reader: {} for reader in READERS}
    )
    tables: dict[str, ObjectInfo] = field(default_factory=dict)
    archives: list[str] = field(default_factory=list)
    unscaled: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Films without a known pixel size, by width and height."""

    def scan(self) -> Scan:
        self._find_files()
        if not self.films:
            return Scan(Manifest((), is_synthetic=False), sort_problems(self.problems))
        self._read_films()
        self._read_annotations()
        described = self._described()
        patients = self._table("patients.csv", ("patient",))
        meta = self._table("meta.csv", ("acquisition_order", "device"))
        groups = self._groups(patients)
        cases = tuple(
            case
            for case_id in sorted(self.films)
            if (case := self._case(case_id, groups[case_id], meta.get(case_id, {}), described))
        )
        self._check_pixel_sizes()
        self._check_sizes()
        self._check_protocol(cases)
        facts = _facts(cases)
        is_synthetic = described.get("synthetic") is True
        return Scan(Manifest(cases, is_synthetic, facts), sort_problems(self.problems))

    def _note(self, severity: Severity, kind: str, case_id: str, file: str, message: str) -> None:
        self.problems.append(Problem(severity, kind, case_id, file, message))

    def _find_files(self) -> None:
        elsewhere: list[str] = []
        infos = self.root.list()
        for info in infos:
            path = PurePosixPath(info.key)
            name = path.name.lower()
            if any(part.startswith((".", "__MACOSX")) for part in path.parts):
                continue
            folder = path.parent.name.lower()
            reader = _READER_FOLDER.fullmatch(folder)
            if path.suffix.lower() in _ARCHIVES:
                self.archives.append(info.key)
            elif len(path.parts) == 1 and name in _TABLES:
                self.tables[name] = info
            elif reader and path.suffix.lower() == ".txt":
                self._add(self.annotations[reader["reader"]], info, _Annotation(info))
            elif path.suffix.lower() in _IMAGES:
                if folder in _SUBSETS:
                    self._add(self.films, info, _Film(info, _SUBSETS[folder]))
                else:
                    elsewhere.append(info.key)
        if elsewhere:
            self._note(
                "warning",
                "ignored_images",
                "",
                elsewhere[0],
                f"{len(elsewhere)} images lie in none of TrainingData, Test1Data, Test2Data and "
                "are ignored",
            )
        if not self.films:
            self._note_absence(infos)

    def _add(self, into: dict[str, Any], info: ObjectInfo, item: _Film | _Annotation) -> None:
        case_id = _case_id(info.key)
        if case_id in into:
            self._note(
                "error",
                "duplicate_case",
                case_id,
                info.key,
                f"the same number is also {into[case_id].info.key}. Keep one of them.",
            )
        else:
            into[case_id] = item

    def _note_absence(self, infos: Sequence[ObjectInfo]) -> None:
        if self.archives:
            self._note(
                "error",
                "archives_not_extracted",
                "",
                ", ".join(self.archives),
                "archives not extracted: unpack them where they lie",
            )
            return
        found = f"has {len(infos)} other files" if infos else "is empty or does not exist"
        self._note(
            "error",
            "no_films",
            "",
            self.root.uri,
            f"must hold RawImage/TrainingData/001.bmp and so on, but {found}. Set data.root.",
        )

    def _read_films(self) -> None:
        done = 0
        with ThreadPoolExecutor(_NUM_READS) as pool:
            for case_id, film in zip(
                list(self.films), pool.map(self._read_film, self.films.items()), strict=True
            ):
                self.films[case_id] = film
                done += 1
                self.progress(done, len(self.films))

    def _read_film(self, item: tuple[str, _Film]) -> _Film:
        case_id, film = item
        content = self.root.read(film.info.key)
        checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
        size = None
        if not content:
            self._note("error", "empty_file", case_id, film.info.key, "is empty")
        else:
            try:
                height, width = decode_film(content).shape
                size = width, height
            except DataError as error:
                self._note("error", "unreadable_image", case_id, film.info.key, str(error))
        return _Film(film.info, film.subset, checksum, size)

    def _read_annotations(self) -> None:
        self._note_absent_annotations()
        items = [
            (reader, case_id, annotation)
            for reader, found in self.annotations.items()
            for case_id, annotation in found.items()
        ]
        with ThreadPoolExecutor(_NUM_READS) as pool:
            for (reader, case_id, _), annotation in zip(
                items, pool.map(self._read_annotation, items), strict=True
            ):
                self.annotations[reader][case_id] = annotation

    def _read_annotation(self, item: tuple[str, str, _Annotation]) -> _Annotation:
        reader, case_id, annotation = item
        key = annotation.info.key
        content = self.root.read(key)
        checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if case_id not in self.films:
            self._note(
                "error",
                "annotation_without_image",
                case_id,
                key,
                "has no film: add it, or remove the annotation",
            )
            return _Annotation(annotation.info, checksum)
        try:
            points = parse_points(content)
        except AnnotationError as error:
            self._note(self._severity(reader), error.kind, case_id, key, str(error))
            return _Annotation(annotation.info, checksum)
        size = self.films[case_id].size
        outside = [
            f"landmark {n} at {x:g},{y:g}"
            for n, (x, y) in enumerate(points, start=1)
            if size and not (0 <= x < size[0] and 0 <= y < size[1])
        ]
        if outside:
            assert size is not None
            self._note(
                self._severity(reader),
                "point_outside",
                case_id,
                key,
                f"{', '.join(outside)} outside the film of {size[0]} x {size[1]}",
            )
            return _Annotation(annotation.info, checksum)
        return _Annotation(annotation.info, checksum, points)

    def _needed(self) -> tuple[str, ...]:
        return READERS if self.data.annotator == "mean" else (self.data.annotator,)

    def _severity(self, reader: str) -> Severity:
        """What a fault of this reader's file is: nothing can be trained on it, or it is spared."""
        return "error" if reader in self._needed() else "warning"

    def _note_absent_annotations(self) -> None:
        packed = [key for key in self.archives if re.search(r"annotation|400_", key.lower())]
        for reader, found in self.annotations.items():
            if not found and packed:
                self._note(
                    "error",
                    "archives_not_extracted",
                    "",
                    ", ".join(packed),
                    f"archives not extracted: no annotations by {reader}. Unpack them.",
                )
            elif not found:
                self._note(
                    self._severity(reader),
                    "missing_annotation",
                    "",
                    f"400_{reader}",
                    f"no film has an annotation by {reader}"
                    + (", which data.annotator needs" if reader in self._needed() else ""),
                )
                continue
            folder = PurePosixPath(next(iter(found.values())).info.key).parent if found else ""
            for case_id in sorted(set(self.films) - set(found)) if found else ():
                self._note(
                    self._severity(reader),
                    "missing_annotation",
                    case_id,
                    self.films[case_id].info.key,
                    f"has no annotation by {reader}: "
                    f"{folder}/{PurePosixPath(self.films[case_id].info.key).stem}.txt is missing",
                )

    def _described(self) -> Mapping[str, Any]:
        """The content of dataset.json."""
        info = self.tables.get("dataset.json")
        if info is None:
            return {}
        try:
            described = json.loads(self.root.read(info.key).decode("utf-8-sig"))
        except ValueError as error:
            return self._bad_table(info.key, f"must be JSON, but is not ({error})")
        if not isinstance(described, dict):
            return self._bad_table(info.key, "must be a JSON object")
        pitch = described.get("mm_per_pixel")
        if pitch is not None and not (isinstance(pitch, int | float) and 0 < pitch < math.inf):
            return self._bad_table(info.key, f"mm_per_pixel must be above 0, but is {pitch!r}")
        return described

    def _table(self, name: str, columns: Sequence[str]) -> dict[str, dict[str, str]]:
        """A CSV table by case id. Columns but `image` and the first of `columns` may be absent."""
        info = self.tables.get(name)
        if info is None:
            return {}
        try:
            text = self.root.read(info.key).decode("utf-8-sig")
            lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            return self._bad_table(info.key, f"must be CSV text, but is not ({error})")
        header = [cell.strip().lower() for cell in lines[0]] if lines else []
        if not {"image", columns[0]} <= set(header):
            return self._bad_table(
                info.key,
                # What stands there instead may be a line of data: it is not repeated.
                f"must begin with a line that names the columns image, {columns[0]}, but lacks "
                + ", ".join(sorted({"image", columns[0]} - set(header))),
            )
        table: dict[str, dict[str, str]] = {}
        for cells in lines[1:]:
            row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
            if not row.get("image"):
                continue
            case_id = _case_id(row["image"])
            values = {column: row[column] for column in columns if row.get(column)}
            if table.setdefault(case_id, values) != values:
                self._bad_table(info.key, f"image {row['image']} stands twice, with other values")
            if case_id not in self.films:
                self._note("warning", "unknown_image", case_id, info.key, "names no film")
        return table

    def _bad_table(self, file: str, message: str) -> dict[str, Any]:
        self._note("error", "bad_table", "", file, message)
        return {}

    def _groups(self, patients: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """Case id → group: patients where they are known; equal films are always one group."""
        labels = {case_id: f"case-{case_id}" for case_id in self.films}
        labels |= {
            case_id: _patient_group(row["patient"])
            for case_id, row in patients.items()
            if case_id in labels and "patient" in row
        }
        copies: dict[str, list[str]] = defaultdict(list)
        for case_id in sorted(self.films):
            if self.films[case_id].size is not None:
                copies[self.films[case_id].checksum].append(case_id)
        alike = [together for together in copies.values() if len(together) > 1]
        for first, *others in alike:
            for other in others:
                is_said = labels[first] == labels[other]
                self._note(
                    "warning" if is_said else "error",
                    "duplicate_image",
                    other,
                    self.films[other].info.key,
                    f"is the same file as {self.films[first].info.key}. "
                    + (
                        "Both stay in one group."
                        if is_said
                        else "Remove one, or name one patient for both in patients.csv."
                    ),
                )
        return join_groups(labels, alike)

    def _case(
        self, case_id: str, group: str, meta: Mapping[str, str], described: Mapping[str, Any]
    ) -> Case | None:
        film = self.films[case_id]
        found = {
            reader: annotation
            for reader in READERS
            if (annotation := self.annotations[reader].get(case_id)) and annotation.points
        }
        if film.size is None or not set(self._needed()) <= set(found):
            return None
        pitch = mm_per_pixel_of(film.size, self.data, described=described.get("mm_per_pixel"))
        if pitch is None:
            self.unscaled[film.size] += 1
            return None
        points = {reader: annotation.points or [] for reader, annotation in found.items()}
        if not _faces_right(list(points.values())):
            self._note("warning", "left_facing", case_id, film.info.key, "faces left")
        order = meta.get("acquisition_order")
        if order is not None and not _is_number(order):
            self._bad_table("meta.csv", f"acquisition_order must be a number, but is '{order}'")
        entries = {"image": film.info} | {reader: found[reader].info for reader in found}
        checksums = {"image": film.checksum} | {reader: found[reader].checksum for reader in found}
        return Case(
            case_id,
            group,
            files={
                name: FileEntry(info.key, info.size, checksums[name])
                for name, info in entries.items()
            },
            attributes={
                "width": str(film.size[0]),
                "height": str(film.size[1]),
                "mm_per_pixel": repr(float(pitch)),
                "subset": film.subset,
                **{reader: points_to_text(points[reader]) for reader in found},
                **meta,
            },
        )

    def _check_pixel_sizes(self) -> None:
        description = self.tables.get("dataset.json")
        for (width, height), count in self.unscaled.items():
            self._note(
                "error",
                "no_pixel_size",
                "",
                description.key if description else self.root.uri,
                f"nothing says the pixel size of {count} films of {width} x {height}. "
                "Set data.mm_per_pixel.",
            )

    def _check_sizes(self) -> None:
        sizes = Counter(film.size for film in self.films.values() if film.size)
        if len(sizes) < 2:
            return
        usual = sizes.most_common(1)[0][0]
        for case_id, film in self.films.items():
            if film.size and film.size != usual:
                self._note(
                    "warning",
                    "image_size_differs",
                    case_id,
                    film.info.key,
                    f"is {film.size[0]} x {film.size[1]}, most are {usual[0]} x {usual[1]}",
                )

    def _check_protocol(self, cases: Sequence[Case]) -> None:
        protocol = self.data.protocol
        reason = shortage(cases, protocol)
        if reason:
            self._note("error", "too_few_cases", "", self.root.uri, reason)
        if protocol == "temporal":
            timeless = [c.case_id for c in cases if "acquisition_order" not in c.attributes]
            if timeless:
                self._note(
                    "error",
                    "no_acquisition_order",
                    timeless[0],
                    "meta.csv",
                    "protocol temporal needs the acquisition_order of every film, but "
                    f"{len(timeless)} have none (the published ISBI films have none)",
                )
        if protocol == "challenge":
            members: dict[str, list[Case]] = defaultdict(list)
            for case in cases:
                members[case.group].append(case)
            for group, together in members.items():
                tests = [c.case_id for c in together if c.attributes["subset"] != "train"]
                for case in together:
                    if tests and case.attributes["subset"] == "train":
                        self._note(
                            "warning",
                            "group_in_two_splits",
                            case.case_id,
                            case.files["image"].path,
                            f"is of one group ({group}) with {', '.join(tests)} of the test: "
                            "withheld from training",
                        )


def shortage(cases: Sequence[Case], protocol: str) -> str | None:
    """Why there are too few cases for a protocol, or None where there are enough."""
    groups = {case.group for case in cases}
    tested = {case.group for case in cases if case.attributes["subset"] != "train"}
    minimum = {"holdout_5fold": NUM_FOLDS + 1, "temporal": 3, "external": 1}
    if protocol == "challenge":
        if len(groups - tested) < NUM_FOLDS or not tested:
            return (
                f"protocol challenge needs {NUM_FOLDS} films in TrainingData and one in Test1Data "
                f"or Test2Data, but has {len(groups - tested)} and {len(tested)}"
            )
    elif len(groups) < minimum[protocol]:
        return (
            f"protocol {protocol} needs films of {minimum[protocol]} patients, "
            f"but {len(groups)} can be used"
        )
    return None


def _patient_group(patient: str) -> str:
    """The group of a patient's films, which goes where the patient's identifier must not go."""
    return f"patient-{hashlib.sha256(patient.encode()).hexdigest()[:12]}"


def _case_id(key: str) -> str:
    """The number of a film, three digits as in the published names; other names in small
    letters."""
    name = PurePosixPath(key).name.lower()
    stem, dot, suffix = name.rpartition(".")
    if not dot or f".{suffix}" not in {*_IMAGES, ".txt"}:
        stem = name
    return f"{int(stem):03d}" if stem.isascii() and stem.isdigit() else stem


def _faces_right(readings: Iterable[Points]) -> bool:
    def mean_x(indices: Sequence[int]) -> float:
        found = [points[n][0] for points in readings for n in indices]
        return sum(found) / len(found)

    readings = list(readings)
    return mean_x(_ANTERIOR) > mean_x(_POSTERIOR)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _facts(cases: Sequence[Case]) -> dict[str, Any]:
    """What the doctor and the report want to know of the whole set; distances in mm."""
    import numpy as np

    facts: dict[str, Any] = {
        "num_cases": len(cases),
        "num_groups": len({case.group for case in cases}),
        "subsets": dict(sorted(Counter(case.attributes["subset"] for case in cases).items())),
        "has_acquisition_order": bool(cases)
        and all("acquisition_order" in case.attributes for case in cases),
    }
    sizes = Counter((case.attributes["width"], case.attributes["height"]) for case in cases)
    pitches = {case.attributes["mm_per_pixel"] for case in cases}
    if sizes:
        facts["film_size"] = [int(side) for side in sizes.most_common(1)[0][0]]
    if len(pitches) == 1:
        facts["mm_per_pixel"] = float(pitches.pop())
    distances, offsets = [], defaultdict(list)
    for case in cases:
        pitch = float(case.attributes["mm_per_pixel"])
        points = {
            reader: pitch * points_from_text(case.attributes[reader])
            for reader in READERS
            if reader in case.attributes
        }
        if len(points) == len(READERS):
            distances.append(np.linalg.norm(points["junior"] - points["senior"], axis=1))
        for reader, found in points.items():
            offsets[case.attributes["subset"], reader].append(
                found[_LANDMARK_16] - found[_LANDMARK_7]
            )
    if distances:
        facts["inter_observer_mm"] = round(float(np.mean(distances)), 3)
        facts["inter_observer_mm_by_landmark"] = [
            round(float(mean), 3) for mean in np.mean(distances, axis=0)
        ]
    # Landmark 16 has two definitions; this offset shows which one a reader followed where.
    facts["landmark_16_from_7_mm"] = {
        f"{subset}_{reader}": [round(float(v), 2) for v in np.mean(found, axis=0)]
        for (subset, reader), found in sorted(offsets.items())
    }
    return facts

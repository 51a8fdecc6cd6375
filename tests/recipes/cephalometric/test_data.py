from __future__ import annotations

import filecmp
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medtrain.data.manifest import Case, FileEntry, Scan, problem_table
from medtrain.data.splits import WITHHELD, SplitRow, count_roles, splits_to_csv
from medtrain.data.synthetic import plant
from medtrain.errors import ConfigError, DataError
from medtrain.recipes import resolve
from medtrain.recipes.cephalometric.config import CephalometricData
from medtrain.recipes.cephalometric.data import (
    LANDMARKS,
    MAHT7,
    ODDITIES,
    anb_deg,
    annotators,
    assign,
    case_from_file,
    landmark_indices,
    landmark_names,
    scan,
    skeletal_class,
    synthesize,
    truth,
    weights,
)
from medtrain.recipes.cephalometric.films import (
    AnnotationError,
    decode_film,
    parse_points,
    points_from_text,
    points_to_text,
)
from medtrain.recipes.cephalometric.synthetic import film_numbers
from medtrain.storage.local import LocalStore
from medtrain.storage.stores import open_store


def scanned(folder: Path, **data: Any) -> Scan:
    return scan(open_store(str(folder)), CephalometricData(root=str(folder), **data))


def kinds(found: Scan) -> Counter[tuple[str, str]]:
    return Counter((problem.severity, problem.kind) for problem in found.problems)


def test_the_published_layout_is_read_without_a_word(pristine_films: Path) -> None:
    found = scanned(pristine_films)

    assert found.problems == ()
    assert found.num_fine == 16
    assert found.manifest.is_synthetic
    assert found.manifest.facts["subsets"] == {"test1": 6, "test2": 4, "train": 6}
    case = found.manifest.by_id["151"]
    assert set(case.files) == {"image", "junior", "senior"}
    assert case.files["image"].path == "RawImage/Test1Data/151.bmp"
    assert case.group == "case-151"
    expected = {"width": "96", "height": "120", "mm_per_pixel": "2.0", "subset": "test1"}
    assert expected.items() <= case.attributes.items()
    assert {"acquisition_order", "device"} <= case.attributes.keys()
    lines = (pristine_films / case.files["senior"].path).read_text().splitlines()
    assert case.attributes["senior"] == " ".join(lines[:19])


ACCEPTED = [name for name, oddity in ODDITIES.items() if oddity.problem is None]
TOLD = [name for name, oddity in ODDITIES.items() if oddity.problem is not None]
FOLLOWS = {
    "annotations_packed": {("error", "too_few_cases")},
    "missing_reader": {("error", "too_few_cases")},
    "no_pixel_size": {("error", "too_few_cases")},
    "annotation_without_image": {("warning", "unknown_image")},
    "bad_description": {("error", "no_pixel_size"), ("error", "too_few_cases")},
}


TRAINING, TEST1 = "RawImage/TrainingData", "RawImage/Test1Data"
JUNIOR, SENIOR = "AnnotationsByMD/400_junior", "AnnotationsByMD/400_senior"
DAMAGE = {
    "image_size_differs": ([f"{TEST1}/156.bmp"], "is 112 x 136, most are 96 x 120"),
    "left_facing": ([f"{TEST1}/155.bmp"], "faces left"),
    "images_elsewhere": (["thumbnails/151.bmp"], "lie in none of TrainingData"),
    "unknown_image": (["patients.csv"], "names no film"),
    "duplicate_of_one_patient": (
        [f"{TEST1}/151.bmp"],
        f"is the same file as {TRAINING}/006.bmp. Both stay in one group",
    ),
    "archives_only": (["AnnotationsByMD.rar, RawImage.rar"], "archives not extracted"),
    "annotations_packed": (["AnnotationsByMD.rar"], "archives not extracted: no annotations by"),
    # What is missing cannot be looked at: the film is, and the reason names the other file.
    "missing_annotation": (
        [f"{TEST1}/151.bmp"],
        f"has no annotation by senior: {SENIOR}/151.txt is missing",
    ),
    "missing_reader": (["400_junior"], "no film has an annotation by junior"),
    "annotation_without_image": ([f"{JUNIOR}/152.txt", f"{SENIOR}/152.txt"], "has no film"),
    "empty_image": ([f"{TEST1}/153.bmp"], "is empty"),
    "truncated_image": ([f"{TEST1}/154.bmp"], "must be a whole image"),
    "empty_annotation": ([f"{SENIOR}/301.txt"], "is empty"),
    "wrong_point_count": ([f"{SENIOR}/302.txt"], "must begin with 19 points, but has 18"),
    "malformed_line": ([f"{SENIOR}/303.txt"], "line 1 must be `x,y`, but is '12;34'"),
    "point_outside": ([f"{SENIOR}/304.txt"], "landmark 1 at 9999,12 outside the film"),
    "duplicate_image": (
        [f"{TEST1}/151.bmp"],
        f"is the same file as {TRAINING}/006.bmp. Remove one",
    ),
    "duplicate_case": ([f"{TRAINING}/151.bmp"], f"the same number is also {TEST1}/151.bmp"),
    "no_pixel_size": (["dataset.json"], "nothing says the pixel size of 16 films"),
    "bad_description": (["dataset.json"], "must be JSON"),
    "bad_patients": (["patients.csv"], "lacks image, patient"),
    "patient_of_two_folders": ([f"{TRAINING}/001.bmp"], "with 151, 301 of the test: withheld"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_oddity_of_real_sets_is_accepted(name: str, films: Path, pristine_films: Path) -> None:
    plant(films, [name], ODDITIES)

    found = scanned(films)

    assert found.problems == ()
    plain = scanned(pristine_films).manifest.by_id
    assert set(found.manifest.by_id) == set(plain)
    if name != "float_points":
        for case in found.manifest.cases:
            assert case.attributes["senior"] == plain[case.case_id].attributes["senior"]


@pytest.mark.parametrize("name", TOLD)
def test_a_fault_is_reported_as_what_it_is(name: str, films: Path) -> None:
    oddity = ODDITIES[name]
    plant(films, [name], ODDITIES)

    found = scanned(
        films, protocol="challenge" if name == "patient_of_two_folders" else "holdout_5fold"
    )

    told = {(problem.severity, problem.kind) for problem in found.problems}
    told -= FOLLOWS.get(name, set())
    assert told == {(oddity.severity, oddity.problem)}
    files, reason = DAMAGE[name]
    problems = [problem for problem in found.problems if problem.kind == oddity.problem]
    assert {problem.file for problem in problems} == set(files)
    assert all(reason in problem.message for problem in problems)


def test_all_faults_are_reported_at_once(films: Path) -> None:
    names = ["missing_annotation", "empty_image", "truncated_image", "point_outside", "left_facing"]
    plant(films, names, ODDITIES)

    found = scanned(films)

    assert {problem.kind for problem in found.problems} == {ODDITIES[n].problem for n in names}
    faulty = {problem.case_id for problem in found.errors}
    assert len(faulty) == 4
    assert found.num_fine == 12
    assert set(found.manifest.by_id) & faulty == set()


def test_copies_of_a_film_are_one_group_and_both_are_named(films: Path) -> None:
    plant(films, ["duplicate_image"], ODDITIES)

    found = scanned(films)

    (problem,) = found.errors
    files = {"RawImage/Test1Data/151.bmp", "RawImage/TrainingData/006.bmp"}
    assert any(file in f"{problem.file} {problem.message}" for file in files)
    groups = Counter(case.group for case in found.manifest.cases)
    assert sorted(groups.values())[-2:] == [1, 2]


PATIENT_ANNA = "patient-55579b557896"  # printf anna | sha256sum | cut -c-12


def test_films_of_one_patient_are_one_group(films: Path) -> None:
    (films / "patients.csv").write_text("Image,Patient\n1.bmp,anna\n002,anna\n003,\n")

    found = scanned(films)

    groups = {case.case_id: case.group for case in found.manifest.cases}
    assert groups["001"] == groups["002"] == PATIENT_ANNA
    assert groups["003"] == "case-003"


@pytest.mark.parametrize(
    "table",
    [
        "image,patient\n001,anna\n151,anna\n",
        "image,patient\n001,anna\n001,berta\n999,anna\n",
        "001,anna\n151,anna\n",
        'image,patient\n001,"anna\n',
    ],
)
def test_a_patient_s_identifier_stays_in_the_raw_data(films: Path, table: str) -> None:
    (films / "patients.csv").write_text(table)

    found = scanned(films, protocol="challenge")

    rows = assign(found.manifest.cases, CephalometricData(protocol="challenge"), [], seed=42)
    said = [problem_table(found.problems), found.manifest.to_json(), splits_to_csv(rows)]
    assert found.problems
    assert "anna" not in "".join(map(str, said))


def test_a_reader_that_is_not_needed_may_be_missing(films: Path) -> None:
    plant(films, ["missing_reader"], ODDITIES)

    found = scanned(films, annotator="senior")

    assert kinds(found) == {("warning", "missing_annotation"): 1}
    assert found.num_fine == 16
    assert all("junior" not in case.files for case in found.manifest.cases)


def test_a_faulty_file_of_a_reader_that_is_not_needed_is_a_warning(films: Path) -> None:
    plant(films, ["wrong_point_count"], ODDITIES)

    assert kinds(scanned(films, annotator="junior")) == {("warning", "wrong_point_count"): 1}


def test_an_empty_root_says_what_is_expected(tmp_path: Path) -> None:
    (problem,) = scanned(tmp_path / "nowhere").problems

    assert problem.kind == "no_films"
    assert "RawImage/TrainingData" in problem.message and "data.root" in problem.message


@pytest.mark.parametrize(
    ("protocol", "num_kept", "is_enough"),
    [
        ("holdout_5fold", 6, True),
        ("holdout_5fold", 5, False),
        ("challenge", 5, False),
        ("temporal", 3, True),
        ("temporal", 2, False),
        ("external", 1, True),
    ],
)
def test_too_few_films_for_a_protocol_are_an_error(
    films: Path, protocol: str, num_kept: int, is_enough: bool
) -> None:
    for path in sorted(films.rglob("*.bmp"))[: 16 - num_kept]:
        path.unlink()
        for note in films.rglob(f"{path.stem}.txt"):
            note.unlink()

    found = scanned(films, protocol=protocol)

    told = {problem.kind for problem in found.errors}
    assert told == (set() if is_enough else {"too_few_cases"})


def test_time_splits_need_times(films: Path) -> None:
    plant(films, ["no_meta"], ODDITIES)

    assert kinds(scanned(films, protocol="temporal")) == {("error", "no_acquisition_order"): 1}


def test_a_time_that_is_no_number_is_an_error(films: Path) -> None:
    (films / "meta.csv").write_text("image,acquisition_order\n001,yesterday\n")

    assert ("error", "bad_table") in kinds(scanned(films))


def test_the_pixel_size_is_configured_described_or_the_published_one(films: Path) -> None:
    assert _pitch(scanned(films, mm_per_pixel=0.25)) == 0.25
    assert _pitch(scanned(films)) == 2.0
    (films / "dataset.json").unlink()
    assert kinds(scanned(films))["error", "no_pixel_size"] == 1
    for path in films.rglob("*.bmp"):
        Image.new("L", (1935, 2400)).save(path)
    assert {c.attributes["mm_per_pixel"] for c in scanned(films).manifest.cases} == {"0.1"}


def _pitch(found: Scan) -> float:
    return float(found.manifest.cases[0].attributes["mm_per_pixel"])


def test_what_is_not_marked_is_not_called_synthetic(films: Path) -> None:
    (films / "dataset.json").write_text('{"mm_per_pixel": 2.0}')

    assert not scanned(films).manifest.is_synthetic


def test_a_bucket_is_read_like_a_folder(films: Path) -> None:
    class Bucket(LocalStore):
        def __init__(self) -> None:
            super().__init__(str(films))
            self.uri = "s3://bucket/films"

    seen: list[tuple[int, int]] = []
    found = scan(Bucket(), CephalometricData(), progress=lambda *at: seen.append(at))

    assert found.manifest == scanned(films).manifest
    assert seen == [(n, 16) for n in range(1, 17)]


def test_facts_hold_the_distance_between_the_readers(pristine_films: Path) -> None:
    found = scanned(pristine_films)

    distances = []
    for case in found.manifest.cases:
        both = annotators(case)
        assert both.junior is not None and both.senior is not None
        distances.append(2.0 * np.linalg.norm(both.junior - both.senior, axis=1))
    assert found.manifest.facts["inter_observer_mm"] == pytest.approx(np.mean(distances), abs=1e-3)
    assert "test2_senior" in found.manifest.facts["landmark_16_from_7_mm"]


PAIRS = [(10 * n, 10 * n + 5) for n in range(19)]
LINES = "".join(f"{x},{y}\n" for x, y in PAIRS)


@pytest.mark.parametrize("tail", ["", "1\n2\n", "1,1\n", "free text\n", "\n\n"])
def test_whatever_follows_the_points_is_ignored(tail: str) -> None:
    assert parse_points(f"{LINES}{tail}".encode()) == PAIRS


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty_file"),
        (b" \r\n\n", "empty_file"),
        (LINES[: LINES.rindex("180")].encode(), "wrong_point_count"),
        (f"3\n{LINES}".encode(), "wrong_point_count"),
        (f"x,3\n{LINES}".encode(), "malformed_line"),
        (f"1,2,3\n{LINES}".encode(), "malformed_line"),
        (f"nan,2\n{LINES}".encode(), "malformed_line"),
        (b"\xff\xfe1\x00", "malformed_line"),
    ],
)
def test_what_is_no_list_of_points_is_refused(content: bytes, kind: str) -> None:
    with pytest.raises(AnnotationError) as raised:
        parse_points(content)
    assert raised.value.kind == kind


def test_points_come_back_from_text_exactly() -> None:
    points = [(1.0, 2.5), (0.1, 1e-7), (1935.0, 2399.999)]

    assert points_from_text(points_to_text(points)).tolist() == [list(point) for point in points]
    assert points_to_text([(835.0, 996.0)]) == "835,996"


def _stored(image: Image.Image, tmp_path: Path, *, suffix: str = "png") -> bytes:
    path = tmp_path / f"film.{suffix}"
    image.save(path)
    return path.read_bytes()


def test_films_of_more_bits_use_the_whole_range(tmp_path: Path) -> None:
    values = np.array([[1000, 2000], [3000, 5000]], dtype=np.uint16)

    film = decode_film(_stored(Image.fromarray(values), tmp_path))

    assert film.dtype == np.uint8
    assert film.tolist() == [[0, 64], [128, 255]]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_gray_values_survive_every_way_of_storing(tmp_path: Path, mode: str) -> None:
    gray = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8))

    assert decode_film(_stored(gray.convert(mode), tmp_path)).tolist() == [[0, 255], [255, 0]]


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(DataError, match="must be a whole image"):
        decode_film(b"BM" + bytes(100))


def test_a_single_film_is_a_case(pristine_films: Path) -> None:
    path = pristine_films / "RawImage" / "TrainingData" / "001.bmp"

    case = case_from_file(path, CephalometricData(mm_per_pixel=2.0))

    known = scanned(pristine_films).manifest.by_id["001"]
    assert case.files["image"].path == str(path)
    assert case.files["image"].checksum == known.files["image"].checksum
    assert case.attributes == {"width": "96", "height": "120", "mm_per_pixel": "2.0"}
    assert annotators(case).present == []


def test_a_single_film_needs_a_pixel_size(pristine_films: Path, tmp_path: Path) -> None:
    path = pristine_films / "RawImage" / "TrainingData" / "001.bmp"
    with pytest.raises(DataError, match=r"Set data\.mm_per_pixel"):
        case_from_file(path, CephalometricData())
    with pytest.raises(DataError, match="must be a file"):
        case_from_file(tmp_path / "none.bmp", CephalometricData())


def annotated(case_id: str = "001", *, shift: float = 4.0, **attributes: str) -> Case:
    points = [(float(x), float(y)) for x, y in PAIRS]
    return Case(
        case_id,
        f"case-{case_id}",
        {"image": FileEntry(f"{case_id}.bmp", 1, f"sha256:{case_id}")},
        {
            "subset": "train",
            "junior": points_to_text(points),
            "senior": points_to_text([(x + shift, y) for x, y in points]),
            **attributes,
        },
    )


@pytest.mark.parametrize(
    ("annotator", "first_x"), [("junior", 0.0), ("senior", 4.0), ("mean", 2.0)]
)
def test_truth_follows_the_convention(annotator: Any, first_x: float) -> None:
    points = truth(annotated(), CephalometricData(annotator=annotator))

    assert points.shape == (19, 2)
    assert points[0].tolist() == [first_x, 5.0]


def test_the_seven_landmarks_are_chosen_in_order() -> None:
    data = CephalometricData(landmarks="maht7", annotator="junior")

    assert truth(annotated(), data)[:, 0].tolist() == [10.0 * n for n in (0, 1, 4, 5, 6, 7, 8)]
    assert landmark_indices(data) == MAHT7
    assert landmark_names(data) == (
        "sella",
        "nasion",
        "subspinale",
        "supramentale",
        "pogonion",
        "menton",
        "gnathion",
    )
    assert landmark_names(CephalometricData()) == LANDMARKS and len(LANDMARKS) == 19


def test_truth_without_its_annotation_is_refused() -> None:
    case = annotated()
    alone = Case("001", "g", case.files, {"junior": case.attributes["junior"]})

    assert truth(alone, CephalometricData(annotator="junior")).shape == (19, 2)
    with pytest.raises(DataError, match=r"data\.annotator=mean"):
        truth(alone, CephalometricData())


@pytest.mark.parametrize(
    ("b_x", "angle", "expected"), [(-0.4, 2.2906, 1), (-1.2, 6.8428, 2), (0.4, -2.2906, 3)]
)
@pytest.mark.parametrize("facing", [1, -1])
def test_skeletal_class_is_the_angle_of_upper_and_lower_jaw(
    b_x: float, angle: float, expected: int, facing: int
) -> None:
    points = np.zeros((19, 2))
    points[0], points[1] = (-6.0, 1.0), (0.0, 0.0)
    points[4], points[5] = (0.0, 7.0), (b_x, 10.0)
    points[:, 0] *= facing

    assert anb_deg(points) == pytest.approx(angle, abs=1e-3)
    text = points_to_text([(float(x), float(y)) for x, y in points])
    assert skeletal_class(Case("1", "g", {}, {"junior": text})) == expected


def placed(
    cases: Sequence[Case], protocol: Any = "holdout_5fold", existing: Sequence[SplitRow] = ()
) -> dict[str, str]:
    rows = assign(cases, CephalometricData(protocol=protocol), existing, seed=42)
    return {row.case_id: row.role for row in rows}


def test_a_fifth_is_held_out_and_the_rest_is_five_folds() -> None:
    cases = [annotated(f"{n:03d}", shift=n % 11) for n in range(400)]

    rows = assign(cases, CephalometricData(), [], seed=42)

    assert count_roles(rows) == {**{f"fold_{k}": 64 for k in range(5)}, "test": 80}
    hard = {f"{n:03d}" for n in range(400) if n % 11 >= 8}
    tested = [row.case_id in hard for row in rows if row.role == "test"]
    assert np.mean(tested) == pytest.approx(len(hard) / 400, abs=0.03)


def test_the_challenge_is_divided_by_folders() -> None:
    cases = [
        *(annotated(f"{n:03d}") for n in range(1, 151)),
        *(annotated(f"{n:03d}", subset="test1") for n in range(151, 301)),
        *(annotated(f"{n:03d}", subset="test2") for n in range(301, 401)),
    ]

    roles = Counter(placed(cases, "challenge").values())

    assert roles == {"test1": 150, "test2": 100, **{f"fold_{k}": 30 for k in range(5)}}


def test_a_training_film_of_a_tested_patient_is_withheld_in_the_challenge(films: Path) -> None:
    plant(films, ["patient_of_two_folders"], ODDITIES)
    found = scanned(films, protocol="challenge")

    roles = placed(found.manifest.cases, "challenge")

    withheld = [case_id for case_id, role in roles.items() if role == WITHHELD]
    assert withheld == [problem.case_id for problem in found.problems]
    assert Counter(roles.values())["test1"] == 6


def test_copies_of_a_film_are_never_divided(films: Path) -> None:
    plant(films, ["duplicate_of_one_patient"], ODDITIES)
    cases = scanned(films).manifest.cases
    (twin,) = [group for group, n in Counter(case.group for case in cases).items() if n == 2]

    for seed in range(20):
        rows = assign(cases, CephalometricData(), [], seed=seed)
        assert len({row.role for row in rows if row.group == twin}) == 1


def test_the_latest_films_are_the_temporal_test(pristine_films: Path) -> None:
    cases = scanned(pristine_films, protocol="temporal").manifest.cases

    roles = placed(cases, "temporal")

    time = {case.case_id: float(case.attributes["acquisition_order"]) for case in cases}
    by_time = [roles[case_id] for case_id in sorted(time, key=lambda case_id: time[case_id])]
    assert by_time == ["train"] * 11 + ["val"] * 2 + ["test"] * 3


def test_later_films_join_the_temporal_test() -> None:
    cases = [annotated(f"{n:03d}", acquisition_order=str(n)) for n in range(50)]
    rows = assign(cases, CephalometricData(protocol="temporal"), [], seed=42)

    grown = placed([*cases, annotated("999", acquisition_order="99")], "temporal", rows)

    assert grown["999"] == "test"


def test_time_splits_are_refused_with_the_reason() -> None:
    with pytest.raises(DataError, match=r"acquisition_order.*ISBI films have none.*meta\.csv"):
        placed([annotated(f"{n}") for n in range(20)], "temporal")
    with pytest.raises(DataError, match="three times"):
        placed([annotated(f"{n}", acquisition_order="1") for n in range(20)], "temporal")


def test_an_external_set_is_all_test() -> None:
    cases = [annotated("001"), annotated("151", subset="test1")]

    assert placed(cases, "external") == {"001": "external", "151": "external"}


@pytest.mark.parametrize("protocol", ["holdout_5fold", "challenge"])
def test_too_few_films_are_refused(protocol: str) -> None:
    with pytest.raises(DataError, match=f"protocol {protocol} needs"):
        placed([annotated(f"{n}") for n in range(4)], protocol)


def test_a_larger_set_keeps_every_place(tmp_path: Path, pristine_films: Path) -> None:
    synthesize(tmp_path / "more", num_cases=24, seed=3, image_size=(96, 120), mm_per_pixel=2.0)
    before, after = scanned(pristine_films).manifest, scanned(tmp_path / "more").manifest
    rows = assign(before.cases, CephalometricData(), [], seed=42)

    grown = placed(after.cases, existing=rows)

    assert set(before.by_id) < set(after.by_id)
    assert {row.case_id: row.role for row in rows}.items() <= grown.items()
    assert abs(Counter(grown.values())["test"] - 24 / 5) < 1


def test_pretrained_weights_are_those_of_the_encoder() -> None:
    first = resolve("cephalometric:baseline").stage
    second = resolve("cephalometric:transformer").stage
    smoke = resolve("cephalometric/smoke:baseline").stage

    assert weights(first)["encoder"].hub_id == "timm/efficientnet_b3.ra2_in1k"  # type: ignore[arg-type]
    assert weights(second) == weights(smoke) == {}  # type: ignore[arg-type]


def test_films_are_shared_out_as_in_the_challenge(pristine_films: Path) -> None:
    names = {
        folder: sorted(p.name for p in (pristine_films / "RawImage" / folder).iterdir())
        for folder in ("TrainingData", "Test1Data", "Test2Data")
    }

    assert names == {
        "TrainingData": [f"{n:03d}.bmp" for n in range(1, 7)],
        "Test1Data": [f"{n:03d}.bmp" for n in range(151, 157)],
        "Test2Data": [f"{n:03d}.bmp" for n in range(301, 305)],
    }


def test_the_same_seed_draws_the_same_films(pristine_films: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "a", num_cases=4, seed=3, image_size=(96, 120), mm_per_pixel=2.0)
    synthesize(tmp_path / "b", num_cases=4, seed=4, image_size=(96, 120), mm_per_pixel=2.0)

    name = "RawImage/TrainingData/001.bmp"
    assert filecmp.cmp(pristine_films / name, tmp_path / "a" / name, shallow=False)
    assert not filecmp.cmp(pristine_films / name, tmp_path / "b" / name, shallow=False)


def test_the_annotations_look_like_the_published_ones(pristine_films: Path) -> None:
    lines = (pristine_films / "AnnotationsByMD/400_junior/001.txt").read_text().splitlines()

    assert len(lines) == 19 + 8
    assert all(len(line.split(",")) == 2 for line in lines[:19])
    assert all(line.isdigit() for line in lines[19:])


def test_readers_disagree_most_where_real_readers_do(tmp_path: Path) -> None:
    synthesize(tmp_path / "films", num_cases=40, image_size=(193, 240), mm_per_pixel=1.0)

    found = scanned(tmp_path / "films").manifest.facts

    by_landmark = found["inter_observer_mm_by_landmark"]
    assert np.argmax(by_landmark) == 15
    assert by_landmark[15] == pytest.approx(6.6, rel=0.35)
    assert np.mean(sorted(by_landmark)[:2]) < 1.2
    assert found["inter_observer_mm"] == pytest.approx(2.1, rel=0.25)


def test_every_film_says_that_it_is_synthetic(tmp_path: Path) -> None:
    synthesize(tmp_path / "films", num_cases=1)
    film = decode_film((tmp_path / "films/RawImage/TrainingData/001.bmp").read_bytes())

    corner = film[-24:-8, -95:-8]
    assert (corner == 0).mean() > 0.4 and (corner > 200).mean() > 0.1
    assert json.loads((tmp_path / "films/dataset.json").read_text())["synthetic"] is True


def test_landmarks_stand_out_from_their_surroundings(pristine_films: Path) -> None:
    for case in scanned(pristine_films).manifest.cases[:4]:
        film = decode_film((pristine_films / case.files["image"].path).read_bytes()).astype(float)
        for x, y in np.round(truth(case, CephalometricData())[[1, 10, 11, 17]]).astype(int):
            near = film[y - 2 : y + 3, x - 2 : x + 3]
            around = film[max(y - 12, 0) : y + 13, max(x - 12, 0) : x + 13]
            assert near.max() > around.mean() + around.std()


@pytest.mark.parametrize(
    "wrong", [{"num_cases": 0}, {"image_size": (8, 8)}, {"oddities": ["no_such"]}]
)
def test_impossible_wishes_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        synthesize(tmp_path / "films", **{"num_cases": 1, "image_size": (96, 120), **wrong})


def test_more_films_than_published_are_numbered_on() -> None:
    numbers = film_numbers(800)

    assert [number for _, number in numbers] == list(range(1, 801))
    assert Counter(folder for folder, _ in numbers) == {
        "TrainingData": 300,
        "Test1Data": 300,
        "Test2Data": 200,
    }

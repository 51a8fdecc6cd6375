from __future__ import annotations

from dataclasses import replace

import pytest

from medtrain.data.manifest import (
    Case,
    FileEntry,
    Manifest,
    Problem,
    Scan,
    problem_table,
    sort_problems,
)
from medtrain.errors import DataError

CASE = Case(
    "001",
    "patient-7",
    {"image": FileEntry("a/001.bmp", 12, "sha256:aa"), "note": FileEntry("b/1.txt", 3, "x")},
    {"width": "387", "name": "Ünïcode"},
)
OTHER = Case("002", "case-002", {"image": FileEntry("a/002.bmp", 9, "sha256:bb")})
MANIFEST = Manifest((CASE, OTHER), is_synthetic=True, facts={"num_cases": 2})


def test_a_manifest_comes_back_from_json() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST


def test_the_fingerprint_does_not_depend_on_order() -> None:
    turned = Case(
        CASE.case_id,
        CASE.group,
        dict(reversed(list(CASE.files.items()))),
        dict(reversed(list(CASE.attributes.items()))),
    )
    reordered = Manifest((OTHER, turned), is_synthetic=True, facts={"num_cases": 2})

    assert reordered.fingerprint == MANIFEST.fingerprint
    assert turned.checksum == CASE.checksum


@pytest.mark.parametrize(
    "changed",
    [
        replace(CASE, attributes={"width": "388"}),
        replace(CASE, files={"image": FileEntry("a/001.bmp", 12, "sha256:ab")}),
    ],
)
def test_changed_content_changes_checksum_and_fingerprint(changed: Case) -> None:
    assert changed.checksum != CASE.checksum
    assert replace(MANIFEST, cases=(changed, OTHER)).fingerprint != MANIFEST.fingerprint


def test_a_moved_file_is_the_same_content() -> None:
    moved = replace(
        CASE, files={**CASE.files, "image": replace(CASE.files["image"], path="c/1.png")}
    )

    assert moved.checksum == CASE.checksum


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', MANIFEST.to_json()[:-9]])
def test_a_damaged_manifest_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="manifest must"):
        Manifest.from_json(text)


def test_problems_are_listed_errors_first_and_once() -> None:
    warning = Problem("warning", "left_facing", "001", "a.bmp", "faces left")
    error = Problem("error", "empty_file", "002", "b.bmp", "is empty")

    ordered = sort_problems([warning, error, warning])

    assert ordered == (error, warning)
    assert problem_table(ordered).splitlines() == [
        "severity  kind         case  file   message",
        "error     empty_file   002   b.bmp  is empty",
        "warning   left_facing  001   a.bmp  faces left",
    ]


def test_only_cases_without_errors_are_fine() -> None:
    problems = (
        Problem("error", "duplicate_image", "002", "", ""),
        Problem("warning", "left_facing", "001", "", ""),
    )
    scan = Scan(MANIFEST, problems)

    assert scan.errors == problems[:1]
    assert scan.num_fine == 1

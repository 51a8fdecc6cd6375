from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from medtrain.config import Data
from medtrain.data.manifest import Case, FileEntry, Manifest, Problem, Scan
from medtrain.data.prepare import (
    dataset_home,
    dataset_name,
    listing_fingerprint,
    load,
    prepare,
    preview,
    root_uri,
)
from medtrain.data.splits import Membership, SplitRow, assign_roles
from medtrain.errors import ConfigError, DataError
from medtrain.storage.local import LocalStore
from medtrain.storage.stores import open_store
from medtrain.storage.uri import ObjectInfo, Store


@dataclass
class Module:
    """A system with as many cases as it is told; each is dealt `role`."""

    num_cases: int = 4
    role: str = "train"
    problems: tuple[Problem, ...] = ()
    refusal: str = ""
    group: Callable[[int], str] = field(default=lambda n: f"g{n}")

    def scan(
        self, root: Store, data: Any, *, progress: Callable[[int, int], None] | None = None
    ) -> Scan:
        cases = tuple(
            Case(f"{n}", self.group(n), {"image": FileEntry(f"{n}", 1, f"sha256:{n}")})
            for n in range(self.num_cases)
        )
        return Scan(Manifest(cases, is_synthetic=True), self.problems)

    def assign(
        self, cases: Sequence[Case], data: Any, existing: Sequence[SplitRow], *, seed: int
    ) -> list[SplitRow]:
        if self.refusal:
            raise DataError(self.refusal)
        return assign_roles(cases, existing, deal=lambda groups: dict.fromkeys(groups, self.role))


DATA = Data(root="/data/films", protocol="p")


@pytest.fixture
def home(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "home"))


@pytest.fixture
def root(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "raw"))


def test_manifest_and_membership_are_recorded_and_found_again(root: Store, home: Store) -> None:
    prepared = prepare(Module(), root=root, data=DATA, home=home)

    assert (prepared.protocol, prepared.part, prepared.counts) == ("p", 1, {"train": 4})
    assert prepared.is_synthetic
    assert home.exists(prepared.manifest_key)
    loaded = load(
        home,
        fingerprint=prepared.fingerprint,
        protocol="p",
        part=1,
        rows_fingerprint=prepared.rows_fingerprint,
    )
    assert loaded.manifest.fingerprint == prepared.fingerprint
    assert [row.case_id for row in loaded.rows] == ["0", "1", "2", "3"]


def test_preparing_twice_changes_nothing(root: Store, home: Store) -> None:
    first = prepare(Module(), root=root, data=DATA, home=home)
    stored = home.list()

    assert prepare(Module(), root=root, data=DATA, home=home) == first
    assert home.list() == stored


def test_an_earlier_state_is_loaded_as_it_was(root: Store, home: Store) -> None:
    first = prepare(Module(4), root=root, data=DATA, home=home)
    joined = Module(6, group=lambda n: "one" if n < 2 else f"g{n}", role="test")
    second = prepare(joined, root=root, data=DATA, home=home)

    assert second.part == 2
    before = load(
        home,
        fingerprint=first.fingerprint,
        protocol="p",
        part=first.part,
        rows_fingerprint=first.rows_fingerprint,
    )
    assert [(row.case_id, row.group) for row in before.rows][:2] == [("0", "g0"), ("1", "g1")]
    after = load(
        home,
        fingerprint=second.fingerprint,
        protocol="p",
        part=second.part,
        rows_fingerprint=second.rows_fingerprint,
    )
    assert [row.group for row in after.rows][:2] == ["one", "one"]
    assert len(after.rows) == 6


def test_cases_that_are_gone_are_not_used_but_stay_on_record(root: Store, home: Store) -> None:
    prepare(Module(6), root=root, data=DATA, home=home)
    fewer = prepare(Module(3), root=root, data=DATA, home=home)

    assert fewer.counts == {"train": 3}
    assert (
        len(
            load(
                home,
                fingerprint=fewer.fingerprint,
                protocol="p",
                part=1,
                rows_fingerprint=fewer.rows_fingerprint,
            ).rows
        )
        == 3
    )
    assert len(Membership.open(home, "p").rows) == 6


def test_a_manifest_whose_cases_have_no_place_is_refused(root: Store, home: Store) -> None:
    first = prepare(Module(4), root=root, data=DATA, home=home)
    later = prepare(Module(6), root=root, data=DATA, home=home)

    with pytest.raises(DataError, match="lacks 4, 5"):
        load(
            home,
            fingerprint=later.fingerprint,
            protocol="p",
            part=1,
            rows_fingerprint=first.rows_fingerprint,
        )


def test_a_data_set_with_errors_is_refused_whole_and_leaves_nothing(
    root: Store, home: Store
) -> None:
    problems = (
        Problem("error", "empty_file", "7", "7.bmp", "is empty"),
        Problem("warning", "left_facing", "8", "8.bmp", "faces left"),
        Problem("error", "bad_table", "", "meta.csv", "is no table"),
    )

    with pytest.raises(DataError, match=r"(?s)has 2\..*7\.bmp.*meta\.csv") as raised:
        prepare(Module(problems=problems), root=root, data=DATA, home=home)
    assert "left_facing" not in str(raised.value)
    assert home.list() == []


def test_warnings_do_not_stop(root: Store, home: Store) -> None:
    problems = (Problem("warning", "left_facing", "1", "1.bmp", "faces left"),)

    assert prepare(Module(problems=problems), root=root, data=DATA, home=home).part == 1


def test_a_refusing_protocol_leaves_nothing(root: Store, home: Store) -> None:
    with pytest.raises(DataError, match="no times"):
        prepare(Module(refusal="no times"), root=root, data=DATA, home=home)
    assert home.list() == []


def test_a_preview_says_the_same_and_writes_nothing(root: Store, home: Store) -> None:
    shown = preview(Module(), root=root, data=DATA, home=home)

    assert home.list() == []
    assert prepare(Module(), root=root, data=DATA, home=home) == shown
    assert preview(Module(), root=root, data=DATA, home=home) == shown
    assert preview(Module(5), root=root, data=DATA, home=home).part == 2


def test_a_set_that_is_trained_on_cannot_be_an_external_test(root: Store, home: Store) -> None:
    prepare(Module(), root=root, data=DATA, home=home)
    external = DATA.model_copy(update={"protocol": "external"})

    with pytest.raises(DataError, match="protocol 'p' trains on 4 of these cases"):
        prepare(Module(role="external"), root=root, data=external, home=home)


def test_a_second_set_can_be_an_external_test(root: Store, home: Store) -> None:
    external = DATA.model_copy(update={"protocol": "external"})

    prepared = prepare(Module(role="external"), root=root, data=external, home=home)

    assert prepared.counts == {"external": 4}


@pytest.mark.parametrize(
    ("root_text", "start"),
    [
        ("/data/isbi 2015/", "isbi-2015-"),
        ("s3://bucket/films", "films-"),
        ("gs://bucket", "bucket-"),
        ("/", "root-"),
    ],
)
def test_a_data_set_is_named_after_its_root(root_text: str, start: str) -> None:
    name = dataset_name(Data(root=root_text))

    assert name.startswith(start) and len(name) == len(start) + 6


def test_one_root_has_one_name_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {dataset_name(Data(root=text)) for text in ("films", "./films/", f"{tmp_path}/films")}

    assert len(names) == 1
    assert dataset_name(Data(root="/a/films")) != dataset_name(Data(root="/b/films"))
    assert dataset_name(Data(root="/a/films", name="isbi")) == "isbi"


def test_without_a_root_the_message_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"data\.root must be"):
        root_uri(Data())


def test_the_home_lies_under_the_storage_root(tmp_path: Path) -> None:
    home = dataset_home(str(tmp_path), "cephalometric", Data(root="/x", name="isbi"))

    assert home.uri == f"{tmp_path}/datasets/cephalometric/isbi"


def test_the_listing_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    folder, cache = tmp_path / "raw", tmp_path / "cache"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a").write_bytes(b"one")
    (folder / "b").write_bytes(b"two")

    def now() -> str:
        return listing_fingerprint(open_store(str(folder)), cache=cache)

    first = now()
    os.utime(folder / "b", (1, 1))
    assert now() == first
    (folder / "b").write_bytes(b"owt")
    changed = now()
    (folder / "b").write_bytes(b"two")
    assert changed != first == now()
    (folder / "b").rename(folder / "c")
    assert now() != first


def test_a_bucket_is_fingerprinted_by_its_own_checksums(tmp_path: Path) -> None:
    class Bucket(LocalStore):
        def __init__(self, version: str, checksum: str | None) -> None:
            super().__init__(str(tmp_path))
            self.uri = "s3://bucket/films"
            self.infos = [ObjectInfo("a", 3, checksum, version)]

        def list(self, prefix: str = "") -> list[ObjectInfo]:
            return self.infos

    def found(version: str, checksum: str | None) -> str:
        return listing_fingerprint(Bucket(version, checksum), cache=tmp_path / "cache")

    assert found("1", "crc32c:x") == found("2", "crc32c:x") != found("1", "crc32c:y")
    assert found("1", None) != found("2", None)

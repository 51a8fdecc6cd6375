from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtrain.data.manifest import Case, FileEntry
from medtrain.data.splits import (
    WITHHELD,
    Membership,
    SplitRow,
    assign_roles,
    count_looks,
    draw_holdout,
    draw_temporal,
    fingerprint,
    is_test,
    is_trainable,
    join_groups,
    record_look,
    select,
    splits_from_csv,
    splits_to_csv,
)
from medtrain.errors import ConfigError, DataError
from medtrain.storage.local import LocalStore
from medtrain.storage.stores import open_store
from medtrain.storage.uri import Store


def case(number: int, group: str | None = None, *, content: str = "x") -> Case:
    name = f"{number:03d}"
    return Case(name, group or f"case-{name}", {"image": FileEntry(name, 1, f"sha256:{content}")})


def holdout(
    cases: Sequence[Case], existing: Sequence[SplitRow], *, seed: int = 0
) -> list[SplitRow]:
    present = {c.case_id for c in cases}
    counts = Counter(row.role for row in existing if row.case_id in present)

    def deal(groups: Mapping[str, Sequence[Case]]) -> dict[str, str]:
        return draw_holdout(
            dict.fromkeys(groups, "all"),
            sizes={group: len(members) for group, members in groups.items()},
            counts=counts,
            seed=seed,
        )

    return assign_roles(cases, existing, deal=deal)


def roles(rows: Sequence[SplitRow]) -> dict[str, str]:
    return {row.case_id: row.role for row in rows}


# A data set that grows and whose groups turn out to be others than was thought.
GROUPS = st.lists(st.integers(0, 12), min_size=1, max_size=40)


@settings(deadline=None)
@given(GROUPS, GROUPS, GROUPS, st.integers(0, 3))
def test_membership_keeps_its_promises_while_data_grow(
    first: list[int], second: list[int], relabeled: list[int], seed: int
) -> None:
    before = [case(n, f"g{group}") for n, group in enumerate(first)]
    known = holdout(before, [], seed=seed)
    grown = [
        case(n, f"g{relabeled[n % len(relabeled)] if n % 3 == 0 else group}")
        for n, group in enumerate(first + second)
    ]
    after = holdout(grown, known, seed=seed)

    for rows in (known, after):
        of_group = defaultdict(set)
        for row in rows:
            if row.role != WITHHELD:
                of_group[row.group].add(row.role)
        assert all(len(found) == 1 for found in of_group.values())
    now = roles(after)
    for row in known:
        allowed = {row.role, WITHHELD} if is_trainable(row.role) else {row.role}
        assert now[row.case_id] in allowed
    again = holdout(list(reversed(grown)), list(reversed(known)), seed=seed)
    assert roles(again) == now


@settings(deadline=None)
@given(st.integers(6, 120), st.integers(0, 80), st.integers(0, 5))
def test_the_test_share_stays_a_fifth_while_data_grow(first: int, more: int, seed: int) -> None:
    known = holdout([case(n) for n in range(first)], [], seed=seed)
    rows = holdout([case(n) for n in range(first + more)], known, seed=seed)

    counts = Counter(row.role for row in rows)
    assert abs(counts["test"] - 0.2 * len(rows)) < 1
    assert all(abs(counts[f"fold_{k}"] - 0.16 * len(rows)) <= 1 for k in range(5))


def test_400_films_are_divided_64_16_20() -> None:
    counts = Counter(row.role for row in select(holdout([case(n) for n in range(400)], []), fold=3))

    assert counts == {"train": 256, "val": 64, "test": 80}


def test_shares_hold_inside_every_stratum() -> None:
    strata = {f"g{n}": f"stratum {n % 7}" for n in range(350)}
    drawn = draw_holdout(strata, sizes=dict.fromkeys(strata, 1), seed=1)

    for stratum in set(strata.values()):
        counts = Counter(drawn[group] for group in strata if strata[group] == stratum)
        assert abs(counts["test"] - 10) <= 1
        assert all(abs(counts[f"fold_{k}"] - 8) <= 1 for k in range(5))


def test_another_seed_draws_another_split() -> None:
    cases = [case(n) for n in range(50)]

    assert roles(holdout(cases, [], seed=1)) != roles(holdout(cases, [], seed=2))
    assert roles(holdout(cases, [], seed=1)) == roles(holdout(cases, [], seed=1))


def _known(*entries: tuple[int, str, str]) -> list[SplitRow]:
    return [SplitRow(f"{n:03d}", group, role, "sha256:old", 1) for n, group, role in entries]


def _never(groups: Mapping[str, Sequence[Case]]) -> dict[str, str]:
    raise AssertionError(f"nothing is to be dealt, but {sorted(groups)} is")


def test_a_new_case_joins_its_group() -> None:
    known = _known((1, "a", "test"), (2, "b", "fold_3"))

    rows = assign_roles(
        [case(1, "a"), case(2, "b"), case(3, "a"), case(4, "b")], known, deal=_never
    )

    assert roles(rows) == {"001": "test", "002": "fold_3", "003": "test", "004": "fold_3"}


def test_a_new_case_joins_its_group_though_the_former_cases_are_gone() -> None:
    rows = assign_roles([case(9, "a")], _known((1, "a", "test")), deal=_never)

    assert roles(rows) == {"009": "test"}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("test", "fold_0", "fold_0"), ("test", WITHHELD, WITHHELD)),
        (("train", "val", "val"), (WITHHELD, "val", "val")),
        (("fold_0", "fold_1", "fold_1"), (WITHHELD, "fold_1", "fold_1")),
        (("test1", "test2", "fold_1"), ("test1", "test2", WITHHELD)),
        ((WITHHELD, "fold_1", "fold_1"), (WITHHELD, "fold_1", "fold_1")),
    ],
)
def test_the_most_sealed_role_wins_where_groups_prove_to_be_one(
    parts: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    known = _known(*((n, f"g{n}", role) for n, role in enumerate(parts)))

    rows = assign_roles([case(n, "joined") for n in range(3)], known, deal=_never)

    assert tuple(row.role for row in rows) == expected


def test_a_named_test_takes_only_cases_that_the_data_give_it() -> None:
    rows = assign_roles(
        [case(1, "a"), case(2, "a"), case(3, "b")],
        [],
        given={"002": "test1"},
        deal=lambda groups: dict.fromkeys(groups, "fold_0"),
    )

    assert roles(rows) == {"001": WITHHELD, "002": "test1", "003": "fold_0"}


def test_time_runs_from_train_over_val_to_test() -> None:
    times = {f"g{n}": float(n) for n in range(100)}

    drawn = draw_temporal(times, sizes=dict.fromkeys(times, 1))

    assert Counter(drawn.values()) == {"train": 64, "val": 16, "test": 20}
    last = {role: max(times[g] for g in times if drawn[g] == role) for role in ("train", "val")}
    assert last == {"train": 63.0, "val": 79.0}
    later = draw_temporal(
        {"early": 5.0, "middle": 70.0, "late": 200.0},
        sizes={"early": 1, "middle": 1, "late": 1},
        bounds=last,
    )
    assert later == {"early": "train", "middle": "val", "late": "test"}


def test_films_of_one_time_are_not_torn_apart() -> None:
    times = {f"g{n}": float(n // 30) for n in range(120)}

    drawn = draw_temporal(times, sizes=dict.fromkeys(times, 1))

    assert all(len({drawn[g] for g in times if times[g] == t}) == 1 for t in range(4))


def test_joined_groups_take_the_most_frequent_label() -> None:
    labels = {"1": "case-1", "2": "patient-x", "3": "patient-x", "4": "case-4", "5": "case-5"}

    joined = join_groups(labels, [["1", "2"], ["4", "5"]])

    assert joined == {
        "1": "patient-x",
        "2": "patient-x",
        "3": "patient-x",
        "4": "case-4",
        "5": "case-4",
    }


def test_a_fold_becomes_validation_and_the_others_training() -> None:
    rows = _known(
        *((k, f"g{k}", f"fold_{k}") for k in range(5)), (7, "t", "test"), (8, "w", WITHHELD)
    )

    selected = roles(select(rows, fold=2))

    assert selected == {
        "000": "train",
        "001": "train",
        "002": "val",
        "003": "train",
        "004": "train",
        "007": "test",
        "008": WITHHELD,
    }


@pytest.mark.parametrize("role", ["fold_0", "train"])
def test_a_fold_that_does_not_exist_is_refused(role: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.fold must be"):
        select(_known((1, "a", role)), fold=5)


def test_split_tables_come_back_from_csv() -> None:
    rows = [SplitRow("002", 'a, "b"', "test", "sha256:1", 2), SplitRow("010", "c", "fold_0", "", 1)]

    assert splits_from_csv(splits_to_csv(reversed(rows))) == rows


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "case_id,group,role,checksum,part\n1,2,3,4,x\n"])
def test_a_damaged_split_table_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="split table must be CSV"):
        splits_from_csv(text)


def test_the_fingerprint_is_of_content_and_not_of_parts_or_order() -> None:
    rows = _known((1, "a", "test"), (2, "b", "val"))

    assert fingerprint(reversed([replace(row, part=5) for row in rows])) == fingerprint(rows)
    assert fingerprint([replace(rows[0], checksum="sha256:new"), rows[1]]) != fingerprint(rows)
    assert fingerprint([replace(rows[0], role="val"), rows[1]]) != fingerprint(rows)


@pytest.fixture
def home(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "home"))


def _assigner(
    cases: Sequence[Case],
) -> Callable[[Sequence[SplitRow]], Sequence[SplitRow]]:
    return lambda existing: holdout(cases, existing)


def test_membership_grows_by_parts_that_never_change(home: Store) -> None:
    ten = [case(n) for n in range(10)]
    first = Membership.open(home, "holdout").extend(_assigner(ten))
    written = home.read("splits/holdout/1.csv")

    second = first.extend(_assigner([*ten, *(case(n) for n in range(10, 14))]))

    assert (first.part, second.part) == (1, 2)
    assert home.read("splits/holdout/1.csv") == written
    assert {row.part for row in second.rows} == {1, 2}
    assert len(splits_from_csv(home.read("splits/holdout/2.csv").decode())) == 4
    assert Membership.open(home, "holdout").rows == second.rows
    assert Membership.open(home, "holdout", part=1).rows == first.rows


def test_nothing_new_writes_nothing(home: Store) -> None:
    cases = [case(n) for n in range(10)]
    Membership.open(home, "holdout").extend(_assigner(cases))

    assert Membership.open(home, "holdout").extend(_assigner(cases)).part == 1
    assert len(home.list("splits/")) == 1


def test_changed_content_is_recorded_under_the_same_role(home: Store) -> None:
    cases = [case(n) for n in range(10)]
    first = Membership.open(home, "holdout").extend(_assigner(cases))

    second = first.extend(_assigner([case(0, content="corrected"), *cases[1:]]))

    (row,) = second.parts[1]
    assert (row.case_id, row.part) == ("000", 2)
    assert roles(second.rows) == roles(first.rows)


def test_the_loser_of_a_race_reads_the_winners_part(tmp_path: Path) -> None:
    class Raced(LocalStore):
        raced = False

        def create(self, key: str, data: bytes) -> bool:
            if not self.raced:
                self.raced = True
                other = [case(n) for n in range(20, 26)]
                Membership.open(open_store(self.uri), "holdout").extend(_assigner(other))
            return super().create(key, data)

    store = Raced(str(tmp_path))
    cases = [case(n) for n in range(20, 32)]

    membership = Membership.open(store, "holdout").extend(_assigner(cases))

    assert membership.part == 2
    assert {row.case_id for row in membership.parts[0]} == {f"{n:03d}" for n in range(20, 26)}
    assert {row.case_id for row in membership.parts[1]} == {f"{n:03d}" for n in range(26, 32)}
    assert membership == Membership.open(store, "holdout")


def test_two_protocols_do_not_meet(home: Store) -> None:
    Membership.open(home, "holdout").extend(_assigner([case(n) for n in range(10)]))

    assert Membership.open(home, "holdout_other").part == 0


def test_a_lost_part_is_an_error(home: Store) -> None:
    membership = Membership.open(home, "holdout").extend(_assigner([case(n) for n in range(10)]))
    membership.extend(_assigner([case(n) for n in range(20)]))
    home.delete("splits/holdout/1.csv")

    with pytest.raises(DataError, match=r"lacks \[1\]"):
        Membership.open(home, "holdout")
    with pytest.raises(DataError, match=r"lacks \[1, 3\]"):
        Membership.open(home, "holdout", part=3)


@pytest.mark.parametrize(
    ("former", "wanted", "reason"),
    [
        ("test", "train", "moves from test to train"),
        ("test", WITHHELD, "moves from test to withheld"),
        (WITHHELD, "test", "moves from withheld to test"),
        ("fold_0", "test", "moves from fold_0 to test"),
        ("fold_0", "fold_1", "moves from fold_0 to fold_1"),
    ],
)
def test_no_recipe_can_move_a_recorded_case(
    home: Store, former: str, wanted: str, reason: str
) -> None:
    membership = Membership.open(home, "p").extend(lambda _: _known((1, "a", former)))

    with pytest.raises(DataError, match=reason):
        membership.extend(lambda _: _known((1, "a", wanted)))


def test_no_recipe_can_put_a_group_on_two_sides(home: Store) -> None:
    with pytest.raises(DataError, match="group a is in test and train"):
        Membership.open(home, "p").extend(lambda _: _known((1, "a", "test"), (2, "a", "train")))
    assert home.list("splits/") == []


def test_looks_are_counted_once_a_model_and_rows(home: Store) -> None:
    rows = _known((1, "a", "test"), (2, "b", "test"))

    assert count_looks(home, rows) == 0
    assert record_look(home, rows, "model-1") == 1
    assert record_look(home, rows, "model-2") == 2
    assert record_look(home, rows, "model-1") == 2
    assert record_look(home, rows[:1], "model-1") == 1
    assert count_looks(home, rows) == 2


def test_a_name_that_is_no_role_of_training_is_a_test() -> None:
    assert is_test("external") and is_test("test1") and is_test("folds")
    assert not is_test(WITHHELD) and not is_test("fold_10") and not is_test("val")

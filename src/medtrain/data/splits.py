"""Who trains, who validates and who tests: membership that is recorded and only ever grows.

A protocol's membership lies in the data set's home as numbered parts `splits/<protocol>/<n>.csv`. A
part is created whole and never changed; of several rows of one case the latest part's counts.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any

from medtrain.data.manifest import Case
from medtrain.errors import ConfigError, DataError
from medtrain.storage.uri import Store

WITHHELD = "withheld"
"""The role of cases that nobody may use: their group proved to be another role's."""

_FOLD = re.compile(r"fold_(0|[1-9]\d*)")
_KEY = re.compile(r"[1-9]\d*\.csv")


@dataclass(frozen=True)
class SplitRow:
    """The place of one case in a protocol."""

    case_id: str
    group: str
    role: str
    """`train`, `val`, `fold_<k>`, `test`, the name of another test, or `withheld`."""
    checksum: str
    """Content of the case when the row was written."""
    part: int = 0
    """Number of the part that holds the row, the version of the data; 0: not recorded yet."""


def is_trainable(role: str) -> bool:
    """Whether models learn from, or are chosen on, cases of this role."""
    return role in ("train", "val") or _FOLD.fullmatch(role) is not None


def is_test(role: str) -> bool:
    """Whether cases of this role are sealed: `test`, or a test with a name of its own."""
    return role != WITHHELD and not is_trainable(role)


def splits_to_csv(rows: Iterable[SplitRow]) -> str:
    """The rows as CSV, sorted by case."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(field.name for field in fields(SplitRow))
    writer.writerows(astuple(row) for row in sorted(rows, key=lambda row: row.case_id))
    return out.getvalue()


def splits_from_csv(text: str) -> list[SplitRow]:
    """Read what `splits_to_csv` wrote; a DataError where it is something else."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows: list[dict[str, Any]] = list(reader)
        return [SplitRow(**{**row, "part": int(row["part"])}) for row in rows]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        names = ", ".join(field.name for field in fields(SplitRow))
        raise DataError(
            f"split table must be CSV with the columns {names}, but is damaged ({error})"
        ) from error


def fingerprint(rows: Iterable[SplitRow]) -> str:
    """SHA-256 of who the rows are: cases, groups, roles, contents; independent of order and
    parts."""
    content = sorted((row.case_id, row.group, row.role, row.checksum) for row in rows)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def count_roles(rows: Iterable[SplitRow]) -> dict[str, int]:
    """Cases of each role, roles sorted by name."""
    return dict(sorted(Counter(row.role for row in rows).items()))


def select(rows: Iterable[SplitRow], *, fold: int) -> list[SplitRow]:
    """The rows with folds made into roles: fold number `fold` is `val`, all others are `train`.

    Roles afterwards are `train`, `val`, `test`, names of other tests, and `withheld`. A ConfigError
    where the protocol has no such fold.
    """
    rows = list(rows)
    folds = sorted({int(match[1]) for row in rows if (match := _FOLD.fullmatch(row.role))})
    if folds and fold not in folds:
        raise ConfigError(f"data.fold must be one of {folds}, but is {fold}")
    if not folds and fold:
        raise ConfigError(
            f"data.fold must be 0 under a protocol without folds, but is {fold}. "
            "Leave data.fold out."
        )
    names = {f"fold_{number}": "val" if number == fold else "train" for number in folds}
    return [replace(row, role=names.get(row.role, row.role)) for row in rows]


@dataclass(frozen=True)
class Membership:
    """A protocol's recorded rows, as far as one part."""

    home: Store
    """The data set's home."""
    protocol: str
    parts: tuple[tuple[SplitRow, ...], ...] = ()

    @classmethod
    def open(cls, home: Store, protocol: str, *, part: int | None = None) -> Membership:
        """Read all parts, or those up to number `part`; a DataError where one is missing."""
        prefix = f"splits/{protocol}/"
        names = (info.key.removeprefix(prefix) for info in home.list(prefix))
        numbers = sorted(int(name[:-4]) for name in names if _KEY.fullmatch(name))
        last = part if part is not None else (numbers or [0])[-1]
        missing = sorted(set(range(1, last + 1)) - set(numbers))
        if missing:
            raise DataError(
                f"{home.uri}/{prefix} must hold the parts 1 to {last}, but lacks {missing}. "
                "Restore them: without them nobody knows which cases are sealed."
            )
        return cls(
            home,
            protocol,
            tuple(
                tuple(splits_from_csv(home.read(f"{prefix}{number}.csv").decode()))
                for number in range(1, last + 1)
            ),
        )

    @property
    def part(self) -> int:
        """Number of the latest part; 0: nothing is recorded."""
        return len(self.parts)

    @property
    def rows(self) -> tuple[SplitRow, ...]:
        """The latest row of every case that was ever recorded, sorted by case."""
        latest = {row.case_id: row for part in self.parts for row in part}
        return tuple(latest[case_id] for case_id in sorted(latest))

    def extend(self, assign: Callable[[Sequence[SplitRow]], Sequence[SplitRow]]) -> Membership:
        """Record what is new or changed as the next part; the answer includes it.

        Whoever loses the race for a number reads the winner's part and assigns anew. Nothing new:
        nothing is written.

        Args:
            assign: Gets the rows recorded so far and answers the rows of all present cases.
        """
        membership = self
        while True:
            new = membership.changes(assign(membership.rows))
            if not new:
                return membership
            number = membership.part + 1
            key = f"splits/{self.protocol}/{number}.csv"
            part = tuple(replace(row, part=number) for row in new)
            if self.home.create(key, splits_to_csv(part).encode()):
                return replace(membership, parts=(*membership.parts, part))
            membership = Membership.open(self.home, self.protocol)

    def changes(self, wanted: Sequence[SplitRow]) -> list[SplitRow]:
        """Those of `wanted` that differ from the record; a DataError where they break its rules."""
        recorded = {row.case_id: row for row in self.rows}
        _check_rules(recorded, wanted, protocol=self.protocol)
        return [
            row
            for row in sorted(wanted, key=lambda row: row.case_id)
            if row.case_id not in recorded
            or replace(recorded[row.case_id], part=0) != replace(row, part=0)
        ]


def _check_rules(
    recorded: Mapping[str, SplitRow], wanted: Sequence[SplitRow], *, protocol: str
) -> None:
    problems = []
    doubled = [case_id for case_id, n in Counter(row.case_id for row in wanted).items() if n > 1]
    if doubled:
        problems.append(f"cases {doubled[:5]} have two rows")
    roles = defaultdict(set)
    for row in wanted:
        former = recorded.get(row.case_id)
        may_become = {row.role} if former is None else {former.role}
        if former is not None and is_trainable(former.role):
            may_become.add(WITHHELD)
        if row.role not in may_become:
            assert former is not None
            problems.append(f"case {row.case_id} moves from {former.role} to {row.role}")
        if row.role != WITHHELD:
            roles[row.group].add(row.role)
    problems += [
        f"group {group} is in {' and '.join(sorted(found))}"
        for group, found in sorted(roles.items())
        if len(found) > 1 and not all(is_test(role) for role in found)
    ]
    if problems:
        raise DataError(
            f"protocol '{protocol}' must keep recorded roles and groups together, but "
            f"{'; '.join(problems[:5])}. Mend the recipe's `assign`."
        )


def assign_roles(
    cases: Iterable[Case],
    existing: Iterable[SplitRow],
    *,
    deal: Callable[[Mapping[str, Sequence[Case]]], Mapping[str, str]],
    given: Mapping[str, str] | None = None,
) -> list[SplitRow]:
    """The place of every case, by the rules that hold under all protocols.

    What is recorded stays. A new case joins its group's role, and a new group gets one by `deal`.
    Where groups prove to be one, the most sealed role that any part has (test before validation
    and folds before training) is the joined group's, and its cases of other roles are withheld.
    A named test takes only the cases that `given` says: others of its groups are withheld.

    Args:
        cases: The manifest's cases, with groups as known today.
        existing: Rows recorded so far.
        deal: Gets the cases of groups without a role, by group, and answers the groups' roles.
        given: Roles of new cases that the data themselves say, by case id.
    """
    cases, given = list(cases), given or {}
    group_of = {case.case_id: case.group for case in cases}
    recorded = {row.case_id: row.role for row in existing}
    claims: dict[str, Counter[str]] = defaultdict(Counter)
    known_groups = set()
    for row in existing:
        # A case that is gone keeps its group's role alive under the group it was recorded with.
        group = group_of.get(row.case_id, row.group)
        known_groups.add(group)
        if row.role != WITHHELD:
            claims[group][row.role] += 1
    for case in cases:
        if case.case_id not in recorded and case.case_id in given:
            claims[case.group][given[case.case_id]] += 1

    new_groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        if case.group not in claims and case.group not in known_groups:
            new_groups[case.group].append(case)
    dealt = deal(new_groups) if new_groups else {}
    settled = {group: _strongest(roles) for group, roles in claims.items()}

    rows = []
    for case in cases:
        role = recorded.get(case.case_id) or given.get(case.case_id) or dealt.get(case.group)
        of_group = settled.get(case.group, dealt.get(case.group, WITHHELD))
        if role is None:
            role = WITHHELD if is_test(of_group) and of_group != "test" else of_group
        elif role != of_group and not is_test(role):
            role = WITHHELD
        rows.append(SplitRow(case.case_id, case.group, role, case.checksum))
    return rows


def _strongest(counts: Mapping[str, int]) -> str:
    """The role that claims a group: by seal, then by number of cases, then by name."""

    def claim(role: str) -> tuple[int, int, str]:
        return 2 if is_test(role) else int(role != "train"), counts[role], role

    return max(counts, key=claim)


def draw_holdout(
    strata: Mapping[str, str],
    *,
    sizes: Mapping[str, int],
    counts: Mapping[str, int] | None = None,
    test_fraction: float = 0.2,
    num_folds: int = 5,
    seed: int,
) -> dict[str, str]:
    """Deal groups to `test` and `fold_0` …, so that shares hold overall and inside every stratum.

    Groups are laid out stratum by stratum in random order, and each goes where most is missing. So
    the same procedure draws the first split and adds to one that exists, for which libraries have
    nothing.

    Args:
        strata: Group → stratum.
        sizes: Group → cases.
        counts: Role → cases that it has already.
        test_fraction: The share of `test`; 0: folds only.
        num_folds: Folds that share the rest equally.
        seed: Of the random order.
    """
    shares = {"test": test_fraction} if test_fraction else {}
    shares |= {f"fold_{k}": (1 - test_fraction) / num_folds for k in range(num_folds)}
    dealt = Counter({role: (counts or {}).get(role, 0) for role in shares})
    order = sorted(strata)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda group: (strata[group], -sizes[group]))
    roles = {}
    for group in order:
        total = dealt.total() + sizes[group]
        roles[group] = max(shares, key=lambda role: shares[role] * total - dealt[role])
        dealt[roles[group]] += sizes[group]
    return roles


def draw_temporal(
    times: Mapping[str, float],
    *,
    sizes: Mapping[str, int],
    bounds: Mapping[str, float] | None = None,
    test_fraction: float = 0.2,
    val_fraction: float = 0.16,
) -> dict[str, str]:
    """Deal groups by time: first `train`, then `val`, the latest `test`; equal times stay together.

    Args:
        times: Group → its latest time.
        sizes: Group → cases.
        bounds: Latest times of the recorded `train` and `val`, which new groups are held to.
        test_fraction: The share of `test`, where nothing is recorded.
        val_fraction: The share of `val`, where nothing is recorded.
    """
    if bounds:
        return {
            group: next(
                (role for role in ("train", "val") if time <= bounds.get(role, -math.inf)), "test"
            )
            for group, time in times.items()
        }
    roles: dict[str, str] = {}
    total, before = sum(sizes[group] for group in times), 0
    last: tuple[float, str] | None = None
    for group in sorted(times, key=lambda group: (times[group], group)):
        share = before / total
        role = (
            "test"
            if share >= 1 - test_fraction
            else "val"
            if share >= 1 - test_fraction - val_fraction
            else "train"
        )
        if last and last[0] == times[group]:
            role = last[1]
        roles[group] = role
        last = times[group], role
        before += sizes[group]
    return roles


def join_groups(labels: Mapping[str, str], alike: Iterable[Collection[str]]) -> dict[str, str]:
    """Labels of groups after joining those of cases that are alike.

    Args:
        labels: Case id → group.
        alike: Collections of case ids that belong together.

    Returns:
        Case id → the joined group's most frequent label (the first by name of equally frequent).
    """
    parent = {label: label for label in labels.values()}

    def root(label: str) -> str:
        while parent[label] != label:
            parent[label] = label = parent[parent[label]]
        return label

    for together in alike:
        first, *others = sorted(together)
        for other in others:
            parent[root(labels[other])] = root(labels[first])
    members: dict[str, Counter[str]] = defaultdict(Counter)
    for label in labels.values():
        members[root(label)][label] += 1
    names = {
        component: min(found, key=lambda label: (-found[label], label))
        for component, found in members.items()
    }
    return {case_id: names[root(label)] for case_id, label in labels.items()}


def record_look(home: Store, rows: Iterable[SplitRow], run_key: str) -> int:
    """Record that a model is about to see sealed rows; the answer is how many models have by now.

    Args:
        home: The data set's home.
        rows: The sealed rows that are looked at.
        run_key: The model's. Its second look at the same rows is the same look.
    """
    prefix = f"looks/{fingerprint(rows)}/"
    record = {"run_key": run_key, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    home.create(f"{prefix}{run_key}.json", json.dumps(record).encode())
    return len(home.list(prefix))


def count_looks(home: Store, rows: Iterable[SplitRow]) -> int:
    """How many models have seen these sealed rows."""
    return len(home.list(f"looks/{fingerprint(rows)}/"))

"""The gate: whether a model is good enough to be registered, and better than the champion.

Both questions are judged on sealed cases only. A case is sealed from a model when no case of its
group, as groups are known today, is among the rows that the model was fitted on or chosen by.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from medtrain.data.cases import Row
from medtrain.data.splits import SplitRow, is_trainable, join_groups
from medtrain.recipes.recipe import Gate
from medtrain.stats import Interval, cluster_bootstrap

Summarize = Callable[[Sequence[Row]], Mapping[str, float]]
"""`summarize` of `recipes/<system>/metrics.py`."""


@dataclass(frozen=True)
class Contender:
    """A model as the gate sees it."""

    metrics: Mapping[str, float]
    """As its evaluation reported them, with the split's prefix."""
    results: Mapping[str, Row]
    """Its row on every case that it was tested on, by case."""
    tested: Sequence[SplitRow]
    """Split rows of these cases."""
    fitted: Sequence[SplitRow]
    """Split rows of the model: those of train and validation are not sealed from it."""
    is_synthetic: bool = False
    version: int | None = None
    """In the registry; None: not registered."""


@dataclass(frozen=True)
class GateVerdict:
    """What the gate decided and on what grounds."""

    accepted: bool
    reason: str
    metric: str
    value: float | None
    """Of the challenger on all test cases sealed from it: what the bound is asked of."""
    bound: str
    champion_version: int | None = None
    champion_value: float | None = None
    """Of the champion on the common cases."""
    common_value: float | None = None
    """Of the challenger on the common cases."""
    num_cases: int = 0
    """Common cases, sealed from both; without a champion: cases that the bound was asked of."""
    difference: Interval | None = None
    """Challenger minus champion on the common cases, drawing groups."""

    def to_json(self) -> str:
        """As one line of JSON, for a tag."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> GateVerdict:
        """The inverse of `to_json`."""
        record = json.loads(text)
        difference = record.pop("difference")
        return cls(**record, difference=Interval(**difference) if difference else None)


def groups_of(tables: Iterable[Sequence[SplitRow]]) -> dict[str, str]:
    """The group of every case as all tables together know it: groups join and never part.

    A group's name means something only within its table, so the answer has names of its own.
    """
    together = defaultdict(set)
    for number, table in enumerate(tables):
        for row in table:
            together[number, row.group].add(row.case_id)
    cases = {case_id for members in together.values() for case_id in members}
    return join_groups({case_id: case_id for case_id in cases}, together.values())


def decide(
    gate: Gate,
    *,
    challenger: Contender,
    champion: Contender | None,
    summarize: Summarize,
    today: Sequence[SplitRow] = (),
) -> GateVerdict:
    """Judge `challenger` by the gate's bound, then against `champion` on cases sealed from both.

    Args:
        gate: Metric, bound, and the fewest cases on which two models are compared.
        challenger: The model that wants to be registered.
        champion: The model that it must beat, where there is one.
        summarize: Metrics of rows, without the split's prefix.
        today: The data set's membership as it is now, with every group that is known to be one.
    """
    tables = [today, challenger.fitted, challenger.tested]
    if champion is not None:
        tables += [champion.fitted, champion.tested]
    groups = groups_of(tables)
    sealed = _sealed_cases(challenger, groups)
    value = _bounded_value(gate, challenger, sealed, summarize)
    leaked = len(challenger.results) - len(sealed)
    where = f"{len(sealed)} sealed test cases"
    if leaked:
        where += f" (left out: {leaked} of a group that the model was fitted on)"

    def verdict(*, accepted: bool, reason: str, **more: Any) -> GateVerdict:
        more.setdefault("num_cases", len(sealed))
        return GateVerdict(accepted, reason, gate.metric, value, str(gate), **more)

    if value is None:
        return verdict(accepted=False, reason=f"{gate.metric} is undefined on {where}")
    if not gate.accepts(value):
        return verdict(
            accepted=False, reason=f"{gate.metric} is {value:.6g} on {where}: not {gate}"
        )
    reached = f"{gate.metric} is {value:.6g} on {where}: {gate} is reached"
    if champion is None:
        return verdict(accepted=True, reason=f"{reached}; there is no other champion")
    if champion.is_synthetic != challenger.is_synthetic:
        # A demonstration must neither keep a model of real data out nor take its place.
        kinds = "SYNTHETIC", "real"
        mine, its = kinds if challenger.is_synthetic else kinds[::-1]
        return verdict(
            accepted=champion.is_synthetic,
            reason=f"{reached}; this model is of {mine} data and the champion, version "
            f"{champion.version}, of {its} data: they are not compared, and real data win",
            champion_version=champion.version,
        )
    return _compare(gate, challenger, champion, groups, summarize, verdict)


def _compare(
    gate: Gate,
    challenger: Contender,
    champion: Contender,
    groups: Mapping[str, str],
    summarize: Summarize,
    verdict: Callable[..., GateVerdict],
) -> GateVerdict:
    former = {row.case_id: row.checksum for row in champion.tested}
    present = {row.case_id: row.checksum for row in challenger.tested}
    both = sorted(set(challenger.results) & set(champion.results))
    same = [case_id for case_id in both if former.get(case_id) == present.get(case_id)]
    sealed = _sealed_cases(challenger, groups) & _sealed_cases(champion, groups)
    common = [case_id for case_id in same if case_id in sealed]
    grounds: dict[str, Any] = {"champion_version": champion.version, "num_cases": len(common)}
    if len(common) < gate.min_cases:
        return verdict(
            accepted=False,
            reason=f"{len(common)} cases are sealed from this model and from the champion, version "
            f"{champion.version}, and {gate.min_cases} are needed to compare them. Of "
            f"{len(challenger.results)} test cases here and {len(champion.results)} there, "
            f"{len(both)} are in both, {len(both) - len(same)} of these changed since, and "
            f"{len(same) - len(common)} are of a group that one of the two was fitted on. Add test "
            "cases, or take the alias 'champion' away in MLflow to retire that model",
            **grounds,
        )
    ours = _metric(gate, [challenger.results[case_id] for case_id in common], summarize)
    theirs = _metric(gate, [champion.results[case_id] for case_id in common], summarize)
    grounds |= {"common_value": ours, "champion_value": theirs}
    versus = f"the champion, version {champion.version}, on {len(common)} cases sealed from both"
    if ours is None or theirs is None:
        return verdict(
            accepted=False,
            reason=f"{gate.metric} is undefined for this model or {versus}",
            **grounds,
        )
    difference = _difference(gate, challenger, champion, common, groups, summarize)
    compared = f"{gate.metric} is {ours:.6g} against {theirs:.6g} of {versus}"
    if difference is not None:
        compared += (
            f" (difference {difference.value:.4g}, {difference.level:.0%} interval "
            f"{difference.low:.4g} to {difference.high:.4g} over {difference.num_groups} groups)"
        )
    is_better = ours < theirs if gate.mode == "min" else ours > theirs
    return verdict(
        accepted=is_better,
        reason=f"{compared}: {'better' if is_better else 'not better'}",
        difference=difference,
        **grounds,
    )


def _sealed_cases(model: Contender, groups: Mapping[str, str]) -> set[str]:
    """The cases of the model's results that are sealed from it."""
    known = {groups[row.case_id] for row in model.fitted if is_trainable(row.role)}
    return {case_id for case_id in model.results if groups[case_id] not in known}


def _bounded_value(
    gate: Gate, model: Contender, sealed: set[str], summarize: Summarize
) -> float | None:
    if not sealed:
        return None
    if len(sealed) < len(model.results):
        return _metric(gate, [model.results[case_id] for case_id in sorted(sealed)], summarize)
    value = model.metrics.get(gate.metric)
    return value if value is not None and math.isfinite(value) else None


def _metric(gate: Gate, rows: Sequence[Row], summarize: Summarize) -> float | None:
    value = summarize(rows).get(gate.metric.removeprefix("test_"))
    return float(value) if value is not None and math.isfinite(value) else None


def _difference(
    gate: Gate,
    challenger: Contender,
    champion: Contender,
    common: Sequence[str],
    groups: Mapping[str, str],
    summarize: Summarize,
) -> Interval | None:
    of_case = [groups[case_id] for case_id in common]
    if len(set(of_case)) < 2:
        return None

    def difference(cases: Any) -> float:
        drawn = [common[int(case)] for case in cases]
        ours = _metric(gate, [challenger.results[case_id] for case_id in drawn], summarize)
        theirs = _metric(gate, [champion.results[case_id] for case_id in drawn], summarize)
        return math.nan if ours is None or theirs is None else ours - theirs

    return cluster_bootstrap(difference, of_case)

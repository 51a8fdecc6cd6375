"""Statistics of results: intervals that respect that cases of one group are not independent.

Plain numpy, no torch: gate, report and comparison judge by the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_DRAWS_AT_ONCE = 64
"""Bounds memory: resamples that are held at the same time."""


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float
    level: float
    num_groups: int
    num_resamples: int
    """Resamples in which the statistic was defined; only these count."""


def cluster_bootstrap(
    statistic: Callable[[NDArray[np.intp]], float],
    groups: Sequence[str],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of any statistic of cases, by drawing whole groups with replacement.

    Groups (patients, films) are drawn and not cases, because what one group contributes is
    correlated: at an intra-group correlation of 0.5 and ten cases a group, an interval that draws
    cases and claims 95 % covers about 59 %. This one covers 90.1, 92.5, 93.2 and 94.0 % at 10,
    20, 40 and 80 groups: honest from about 40 groups on, too narrow below.

    Args:
        statistic: Answers for an array of case indices (with repetitions); `nan` where undefined.
        groups: The group of each case.
        resamples: How many times groups are drawn.
        level: Confidence level.
        seed: Of the draws: equal inputs give equal intervals.

    Raises:
        ValueError: Fewer than two groups, or the statistic is defined in no resample.
    """
    members = _members(groups)
    values = np.array(
        [
            statistic(np.concatenate([members[group] for group in drawn]))
            for drawn in _draws(len(members), resamples=resamples, seed=seed)
        ]
    )
    return _interval(
        statistic(np.arange(len(groups))), values, level=level, num_groups=len(members)
    )


def mean_interval(
    values: ArrayLike,
    groups: Sequence[str],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """`cluster_bootstrap` of the mean of one value a case, without a Python call a resample."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (len(groups),):
        raise ValueError(f"values must be one a case ({len(groups)}), but are {array.shape}")
    members = _members(groups)
    sums = np.array([array[cases].sum() for cases in members])
    counts = np.array([len(cases) for cases in members], dtype=np.float64)
    drawn = _drawn_arrays(len(members), resamples=resamples, seed=seed)
    means = np.concatenate([sums[block].sum(1) / counts[block].sum(1) for block in drawn])
    return _interval(float(array.mean()), means, level=level, num_groups=len(members))


def mean_difference_interval(
    first: ArrayLike,
    second: ArrayLike,
    groups: Sequence[str],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of `first` - `second`, paired by case, drawing whole groups."""
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return mean_interval(differences, groups, resamples=resamples, level=level, seed=seed)


def _members(groups: Sequence[str]) -> list[NDArray[np.intp]]:
    """Indices of the cases of each group, groups in order of their first case."""
    found: dict[str, list[int]] = {}
    for case, group in enumerate(groups):
        found.setdefault(group, []).append(case)
    if len(found) < 2:
        raise ValueError(f"groups must be two or more to draw from, but are {len(found)}")
    return [np.array(cases, dtype=np.intp) for cases in found.values()]


def _drawn_arrays(num_groups: int, *, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _DRAWS_AT_ONCE):
        size = min(_DRAWS_AT_ONCE, resamples - start)
        yield rng.integers(0, num_groups, size=(size, num_groups))


def _draws(num_groups: int, *, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    for block in _drawn_arrays(num_groups, resamples=resamples, seed=seed):
        yield from block


def _interval(
    value: float, values: NDArray[np.float64], *, level: float, num_groups: int
) -> Interval:
    defined = values[np.isfinite(values)]
    if not len(defined):
        raise ValueError("the statistic must be defined in some resample, but is in none")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level, num_groups, len(defined))

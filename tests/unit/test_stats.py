import numpy as np
import numpy.typing as npt
import pytest

from medtrain.stats import cluster_bootstrap, mean_difference_interval, mean_interval


def correlated(
    rng: np.random.Generator, *, num_groups: int, per_group: int
) -> npt.NDArray[np.float64]:
    """Normal values with mean 0, variance 1 and an intra-group correlation of 0.5."""
    of_group = rng.normal(scale=np.sqrt(0.5), size=(num_groups, 1))
    return rng.normal(of_group, np.sqrt(0.5), size=(num_groups, per_group)).ravel()


def coverage(*, num_groups: int, is_naive: bool, simulations: int) -> float:
    rng = np.random.default_rng(7)
    labels = range(num_groups * 10) if is_naive else np.repeat(np.arange(num_groups), 10)
    groups = [str(label) for label in labels]
    hits = 0
    for seed in range(simulations):
        values = correlated(rng, num_groups=num_groups, per_group=10)
        interval = mean_interval(values, groups, resamples=600, seed=seed)
        hits += interval.low <= 0.0 <= interval.high
    return hits / simulations


def test_interval_that_draws_groups_covers_the_truth_as_often_as_it_claims():
    assert 0.925 <= coverage(num_groups=80, is_naive=False, simulations=600) <= 0.965


def test_interval_of_few_groups_is_too_narrow_as_documented():
    assert 0.88 <= coverage(num_groups=10, is_naive=False, simulations=600) <= 0.925


def test_interval_that_draws_cases_under_covers_when_groups_are_correlated():
    assert coverage(num_groups=80, is_naive=True, simulations=150) < 0.7


def test_mean_interval_equals_the_general_bootstrap_of_the_mean():
    rng = np.random.default_rng(0)
    values = rng.normal(size=30)
    groups = [str(case // 4) for case in range(30)]
    general = cluster_bootstrap(lambda cases: float(values[cases].mean()), groups, resamples=200)
    fast = mean_interval(values, groups, resamples=200)
    assert fast.value == pytest.approx(general.value)
    assert (fast.low, fast.high) == pytest.approx((general.low, general.high))
    assert fast.num_groups == general.num_groups == 8


def test_equal_inputs_give_equal_intervals_and_another_seed_another_one():
    values, groups = np.arange(12.0), [str(case) for case in range(12)]
    assert mean_interval(values, groups) == mean_interval(values, groups)
    assert mean_interval(values, groups) != mean_interval(values, groups, seed=1)


def test_paired_difference_is_narrower_than_what_the_two_models_share():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(scale=5.0, size=40)
    first, second = difficulty + 0.5, difficulty + rng.normal(scale=0.1, size=40)
    groups = [str(case) for case in range(40)]
    interval = mean_difference_interval(first, second, groups)
    assert interval.low > 0.4
    assert interval.high < 0.6
    swapped = mean_difference_interval(second, first, groups)
    assert (swapped.low, swapped.high) == pytest.approx((-interval.high, -interval.low))


def test_resamples_without_a_value_do_not_count():
    outcome = np.array([0, 0, 0, 1])

    def defined_with_both_classes(cases: np.ndarray) -> float:
        return 1.0 if len(set(outcome[cases])) == 2 else float("nan")

    interval = cluster_bootstrap(defined_with_both_classes, list("abcd"), resamples=300)
    assert 0 < interval.num_resamples < 300
    assert interval.low == interval.high == 1.0


@pytest.mark.parametrize("groups", [[], ["a"], ["a", "a"]])
def test_fewer_than_two_groups_are_refused(groups):
    with pytest.raises(ValueError, match="two or more"):
        mean_interval(np.zeros(len(groups)), groups)


def test_values_must_be_one_a_case():
    with pytest.raises(ValueError, match="one a case"):
        mean_interval(np.zeros((3, 2)), ["a", "b", "c"])

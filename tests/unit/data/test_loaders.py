from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from medtrain.data.loaders import (
    CaseDataset,
    build_loader,
    num_training_batches,
    prediction_batches,
    training_batches,
)
from medtrain.errors import DataError


def _steps(num_cases: int, *, micro: int, world_size: int, epoch: int = 1) -> list[list[int]]:
    """The cases of every micro-step, all ranks together."""
    shares = [
        training_batches(
            num_cases, micro=micro, rank=rank, world_size=world_size, seed=7, epoch=epoch
        )
        for rank in range(world_size)
    ]
    return [list(itertools.chain(*step)) for step in zip(*shares, strict=True)]


@pytest.mark.parametrize("num_cases", [1, 5, 8, 12, 17, 41])
def test_the_global_order_depends_on_cases_per_micro_step_only(num_cases):
    alone = _steps(num_cases, micro=8, world_size=1)
    assert _steps(num_cases, micro=4, world_size=2) == alone
    assert _steps(num_cases, micro=2, world_size=4) == alone
    assert _steps(num_cases, micro=1, world_size=8) == alone


def test_every_case_is_read_and_only_the_last_step_repeats_some():
    seen = Counter(itertools.chain(*_steps(18, micro=4, world_size=2)))
    assert sorted(seen) == list(range(18))
    assert sum(seen.values()) == 24
    assert max(seen.values()) == 2


def test_a_single_left_over_case_waits_for_another_epoch():
    epochs = [_steps(17, micro=4, world_size=2, epoch=e) for e in range(1, 9)]
    assert {len(steps) for steps in epochs} == {2}
    assert set(itertools.chain(*itertools.chain(*epochs))) == set(range(17))


def test_fewer_cases_than_a_step_still_make_one():
    for num_cases in (1, 2, 7):
        (step,) = _steps(num_cases, micro=4, world_size=2)
        assert len(step) == 8
        assert set(step) == set(range(num_cases))


@pytest.mark.parametrize(("num_cases", "expected"), [(1, 1), (7, 1), (8, 1), (9, 1), (10, 2)])
def test_the_number_of_micro_batches_is_known_without_reading(num_cases, expected):
    assert num_training_batches(num_cases, micro=4, world_size=2) == expected
    assert len(_steps(num_cases, micro=4, world_size=2)) == expected


def test_single_cases_are_kept_when_every_batch_has_one():
    assert len(_steps(5, micro=1, world_size=1)) == 5


def test_epochs_and_seeds_have_different_orders():
    def order(seed: int, epoch: int) -> list[list[int]]:
        return training_batches(20, micro=4, rank=0, world_size=1, seed=seed, epoch=epoch)

    assert order(1, 1) == order(1, 1)
    assert len({str(order(seed, epoch)) for seed in (1, 2) for epoch in (1, 2, 3)}) == 6


def test_an_empty_training_split_is_an_error():
    with pytest.raises(DataError, match="at least one case"):
        training_batches(0, micro=4, rank=0, world_size=1, seed=1, epoch=1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_prediction_reads_every_case_once_in_order(world_size):
    shares = [
        prediction_batches(5, micro=2, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert list(itertools.chain(*itertools.chain(*shares))) == list(range(5))
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(batch) <= 2 for share in shares for batch in share)


def _read(case_id: str, seed: int) -> dict[str, object]:
    return {"value": torch.tensor([int(case_id), seed % 1000]), "worker_noise": torch.rand(1)}


def _loaded(*, num_workers: int, first_batch: int = 0, epoch: int = 3) -> list[list[int]]:
    dataset = CaseDataset([str(n) for n in range(10)], _read, seed=5, epoch=epoch)
    batches = training_batches(10, micro=4, rank=0, world_size=1, seed=5, epoch=epoch)
    loader = build_loader(dataset, batches, first_batch=first_batch, num_workers=num_workers)
    return [batch["value"].flatten().tolist() for batch in loader]


def test_order_and_randomness_do_not_depend_on_the_number_of_workers():
    assert _loaded(num_workers=2) == _loaded(num_workers=0)


def test_batches_already_done_are_skipped_without_reading():
    read: list[str] = []

    def load(case_id: str, seed: int) -> dict[str, object]:
        read.append(case_id)
        return {}

    dataset = CaseDataset([str(n) for n in range(8)], load, seed=5, epoch=1)
    loader = build_loader(dataset, [[0, 1], [2, 3], [4, 5], [6, 7]], first_batch=2)
    assert len(loader) == 2
    assert [batch["case_id"] for batch in loader] == [["4", "5"], ["6", "7"]]
    assert read == ["4", "5", "6", "7"]
    assert _loaded(num_workers=0, first_batch=1) == _loaded(num_workers=0)[1:]


def test_a_case_is_augmented_differently_in_every_epoch():
    first, second = _loaded(num_workers=0, epoch=1), _loaded(num_workers=0, epoch=2)
    assert {v for batch in first for v in batch[1::2]} != {v for b in second for v in b[1::2]}


def test_reading_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    dataset = CaseDataset(["0"], lambda case_id, seed: {}, seed=5, epoch=1)
    torch.manual_seed(0)
    list(build_loader(dataset, [[0]]))
    assert torch.equal(torch.rand(1), expected)

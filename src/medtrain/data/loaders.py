"""Which process reads which cases in which order, and the loader that does so.

Training: the order of an epoch is a function of (seed, epoch). It is cut into global micro-steps
of `micro * world_size` cases, of which rank r takes the r-th slice of `micro`: whatever the number
of processes, the same cases meet in the same step while that product is the same. The last
micro-step is filled up from the beginning of the order, so every micro-batch of every process is
full and their mean is the mean over cases. If a single case were left for it, the case waits for
another epoch instead: BatchNorm has no statistics of one case, and of copies of it none that help.

Prediction: every case once, in order, in contiguous and unpadded shares.

Neither depends on the number of loader workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from medtrain.data.transforms import derive_seed, sample_seed
from medtrain.errors import DataError

Sample = dict[str, Any]
"""`case_id`, and tensors and numbers that a loader stacks."""


class CaseDataset(Dataset[Sample]):
    """Cases by index; `load(case_id, seed)` reads one, with its randomness of this epoch."""

    def __init__(
        self,
        case_ids: Sequence[str],
        load: Callable[[str, int], Sample],
        *,
        seed: int,
        epoch: int,
    ) -> None:
        self.case_ids = list(case_ids)
        self.load = load
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.case_ids)

    def __getitem__(self, index: int) -> Sample:
        case_id = self.case_ids[index]
        return {"case_id": case_id, **self.load(case_id, sample_seed(self.seed, self.epoch, index))}


def training_batches(
    num_cases: int, *, micro: int, rank: int, world_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Indices of one process's micro-batches in one epoch, all of `micro` cases."""
    if num_cases < 1:
        raise DataError("the training split must hold at least one case, but is empty.")
    order = np.random.default_rng(derive_seed("order", seed, epoch)).permutation(num_cases)
    num_steps = num_training_batches(num_cases, micro=micro, world_size=world_size)
    # resize cuts off, or goes on from the beginning as often as needed.
    steps = np.resize(order, (num_steps, world_size, micro))
    batches: list[list[int]] = steps[:, rank].tolist()
    return batches


def num_training_batches(num_cases: int, *, micro: int, world_size: int) -> int:
    """Micro-batches of each process in one epoch."""
    full, rest = divmod(num_cases, micro * world_size)
    return max(full, 1) if rest <= 1 else full + 1


def prediction_batches(
    num_cases: int, *, micro: int, rank: int, world_size: int
) -> list[list[int]]:
    """Indices of one process's share, in order; shares differ by at most one case."""
    share = np.array_split(np.arange(num_cases), world_size)[rank].tolist()
    return [share[start : start + micro] for start in range(0, len(share), micro)]


def build_loader(
    dataset: CaseDataset,
    batches: Sequence[list[int]],
    *,
    first_batch: int = 0,
    num_workers: int = 0,
) -> DataLoader[Sample]:
    """A loader of `batches` from `first_batch` on; those before it are not read.

    Its base seed comes from the data set's, not from torch's global generator: reading leaves the
    training process's randomness alone.
    """
    base_seed = derive_seed("workers", dataset.seed, dataset.epoch)
    return DataLoader(
        dataset,
        batch_sampler=list(batches)[first_batch:],
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(base_seed),
    )

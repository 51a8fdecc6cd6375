from __future__ import annotations

import itertools

from medtrain.data.transforms import derive_seed, sample_seed


def test_seeds_differ_by_purpose_and_by_every_number():
    seeds = [
        derive_seed("a"),
        derive_seed("a", 0),
        derive_seed("a", 0, 0),
        derive_seed("b", 0),
        derive_seed("a", "x"),
    ]
    seeds += [sample_seed(*numbers) for numbers in itertools.product((1, 2), (1, 12), (1, 21))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    # The same on every machine and in every release: a resumed run draws what it would have drawn.
    assert sample_seed(42, 1, 0) == 18_152_686_882_961_978_606

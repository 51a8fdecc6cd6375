"""Randomness of reading: derived from numbers, never kept, so that a resumed run draws the same."""

from __future__ import annotations

import hashlib


def derive_seed(purpose: str, *numbers: int) -> int:
    """A 64-bit seed that differs for every purpose and every sequence of numbers."""
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of everything random about the case at `index` in one epoch."""
    return derive_seed("sample", seed, epoch, index)

"""Randomness of reading: derived from numbers, never kept, so that a resumed run draws the same."""

from __future__ import annotations

import hashlib


def derive_seed(purpose: str, *parts: int | str) -> int:
    """A 64-bit seed that differs for every purpose and every sequence of parts."""
    text = ":".join([purpose, *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of everything random about the case at `index` in one epoch."""
    return derive_seed("sample", seed, epoch, index)

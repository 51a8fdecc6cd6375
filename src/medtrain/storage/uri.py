from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Store(Protocol):
    uri: str


def open_store(uri: str) -> Store:
    raise NotImplementedError


def sha256_of(path: Path) -> str:
    raise NotImplementedError

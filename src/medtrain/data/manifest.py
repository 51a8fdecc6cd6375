"""The list of a data set's cases with their files, and what is wrong with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from medtrain.errors import DataError

Severity = Literal["error", "warning", "info"]
_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
_FORMAT = 1


@dataclass(frozen=True)
class FileEntry:
    """One file of a case."""

    path: str
    """Key below the data set's root; an absolute path for a file that belongs to no data set."""
    size: int
    """Bytes."""
    checksum: str
    """`sha256:<hex>` where the bytes were read, else the store's own with its kind."""


@dataclass(frozen=True)
class Case:
    """What is judged as one: a film, a study, a volume."""

    case_id: str
    group: str
    """Cases of one group (a patient, near-twins) never stand on two sides of a split."""
    files: Mapping[str, FileEntry]
    attributes: Mapping[str, str] = field(default_factory=dict)
    """Plain facts as text: sizes, annotations, acquisition."""

    @property
    def checksum(self) -> str:
        """SHA-256 of the content: the files' checksums by name, and the attributes."""
        content = {
            "files": {name: entry.checksum for name, entry in self.files.items()},
            "attributes": dict(self.attributes),
        }
        return f"sha256:{_digest(content)}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, odd or worth knowing about a data set."""

    severity: Severity
    kind: str
    case_id: str
    file: str
    message: str


@dataclass(frozen=True)
class Manifest:
    """All cases of a data set at one moment."""

    cases: tuple[Case, ...]
    is_synthetic: bool
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON facts about the whole set, for the doctor and the report."""

    @cached_property
    def by_id(self) -> Mapping[str, Case]:
        """The cases by id."""
        return {case.case_id: case for case in self.cases}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything in the manifest, independent of the order of cases."""
        return _digest(self._plain())

    def to_json(self) -> str:
        """The manifest as a JSON document, cases sorted by id."""
        return json.dumps(self._plain(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `to_json` wrote; a DataError where it is none."""
        try:
            tree = json.loads(text)
            if tree["format"] != _FORMAT:
                raise DataError(
                    f"manifest must have format {_FORMAT}, but has {tree['format']}. "
                    "Run `medtrain data split` again."
                )
            cases = tuple(
                Case(
                    case_id=item["case_id"],
                    group=item["group"],
                    files={name: FileEntry(**entry) for name, entry in item["files"].items()},
                    attributes=item["attributes"],
                )
                for item in tree["cases"]
            )
            return cls(cases, tree["synthetic"], tree["facts"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"manifest must be JSON written by medtrain, but is damaged ({error!r}). "
                "Run `medtrain data split` again."
            ) from error

    def _plain(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "synthetic": self.is_synthetic,
            "facts": dict(self.facts),
            "cases": [
                {
                    "case_id": case.case_id,
                    "group": case.group,
                    "files": {name: asdict(case.files[name]) for name in sorted(case.files)},
                    "attributes": dict(sorted(case.attributes.items())),
                }
                for case in sorted(self.cases, key=lambda case: case.case_id)
            ],
        }


@dataclass(frozen=True)
class Scan:
    """What a reader found in a raw data set: its cases, and every problem at once."""

    manifest: Manifest
    problems: tuple[Problem, ...] = ()

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that forbid the use of the data set."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def num_fine(self) -> int:
        """Cases without an error."""
        faulty = {problem.case_id for problem in self.errors}
        return sum(case.case_id not in faulty for case in self.manifest.cases)


def sort_problems(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    """Errors first, then by kind, case and file; doubled ones once."""
    return tuple(
        sorted(
            set(problems),
            key=lambda p: (_SEVERITIES.index(p.severity), p.kind, p.case_id, p.file, p.message),
        )
    )


def problem_table(problems: Sequence[Problem]) -> str:
    """All problems as a text table: severity, kind, case, file, message."""
    if not problems:
        return "no problems"
    head = ("severity", "kind", "case", "file", "message")
    lines = [head, *((p.severity, p.kind, p.case_id, p.file, p.message) for p in problems)]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]
        )
        for line in lines
    )


def _digest(value: Any) -> str:
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()

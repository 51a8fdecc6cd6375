"""One run of a chain as a report reads it, and how its configuration differs from others."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import yaml

from medtrain.config import dump
from medtrain.errors import ConfigError, MedTrainError
from medtrain.mistakes import join_path
from medtrain.overrides import leaves
from medtrain.recipes import find, resolve
from medtrain.storage.metrics import MetricRow, read_metrics
from medtrain.storage.runs import AttemptEnd, Outcome, RunDirectory

_ABSENT = object()


@dataclass(frozen=True)
class Table:
    """A table of plain cells; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    is_mixed: bool = False
    """Whether a column holds quantities of different kinds, so that its decimals differ."""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Table:
        """Read one table of `tables.json`."""
        return cls(
            title=str(record["title"]),
            columns=[str(column) for column in record["columns"]],
            rows=record["rows"],
            note=str(record.get("note") or ""),
        )


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    number: int
    host: str
    began: str
    end: AttemptEnd | None


@dataclass(frozen=True)
class StageRun:
    """A run of the chain that led to the report: a stage, or the evaluation itself."""

    run: RunDirectory

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, or nothing before the run has begun."""
        if not self.run.store.exists("config.yaml"):
            return {}
        return dict(yaml.safe_load(self.run.read_text("config.yaml")) or {})

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the worker recorded beside it."""
        return dict(self.run.read_json("facts.json") or {})

    @cached_property
    def outcome(self) -> Outcome | None:
        return self.run.outcome()

    @cached_property
    def metrics(self) -> list[MetricRow]:
        return read_metrics(self.run)

    @cached_property
    def attempts(self) -> list[Attempt]:
        found = []
        for number in self.run.attempts():
            record = self.run.read_json(f"attempts/{number}.json") or {}
            host, time = str(record.get("host", "")), str(record.get("time", ""))
            found.append(Attempt(number, host, time, self.run.attempt_end(number)))
        return found

    @property
    def key(self) -> str:
        """The run key."""
        return self.run.uri.rstrip("/").rpartition("/")[2]

    @property
    def is_evaluation(self) -> bool:
        return self.facts.get("verb") == "evaluate"

    @property
    def name(self) -> str:
        """`SYSTEM/VARIANT:STAGE`."""
        return str(self.facts.get("name") or self.config.get("name") or self.key)

    @property
    def stage(self) -> str:
        """The stage's own name."""
        return str(self.config.get("name", "")).partition(":")[2] or self.name

    @property
    def title(self) -> str:
        """The recipe in words, where it is known here."""
        try:
            return find(str(self.config.get("name", "")))[1].title
        except ConfigError:
            return ""

    @property
    def monitor(self) -> tuple[str, str]:
        """Metric by which the best checkpoint is chosen, and `min` or `max`; empty without one."""
        checkpoint = self.config.get("checkpoint") or {}
        criterion = checkpoint.get("criteria", {}).get(checkpoint.get("monitor"), {})
        return str(criterion.get("metric", "")), str(criterion.get("mode", "min"))

    @cached_property
    def best(self) -> tuple[float, float] | None:
        """Epoch (or step) and value of the best monitor so far."""
        metric, mode = self.monitor
        found = [
            (row.values.get("epoch", float(row.step)), row.values[metric])
            for row in self.metrics
            if metric in row.values
        ]
        if not found:
            return None
        return (min if mode == "min" else max)(found, key=lambda point: point[1])

    @property
    def num_epochs(self) -> int:
        """Epochs that were logged."""
        return int(max((row.values.get("epoch", 0.0) for row in self.metrics), default=0.0))

    @property
    def is_synthetic(self) -> bool:
        return bool(self.facts.get("is_synthetic"))

    @property
    def random_weights(self) -> list[str]:
        """Names of the pretrained weights that were replaced by random ones."""
        sources = self.facts.get("pretrained") or {}
        return [name for name, source in sources.items() if str(source).startswith("random")]

    @property
    def starts_from(self) -> str:
        """`scratch`, `pretrained` or `stage`; empty before the run has begun."""
        return str((self.config.get("init") or {}).get("from", ""))

    @property
    def origin(self) -> str:
        """What the weights began from, in a word or two."""
        if self.starts_from == "stage":
            return f"stage {self.config['init']['stage']}"
        if self.random_weights or self.starts_from == "scratch":
            return "random"
        return self.starts_from

    @property
    def hours(self) -> float | None:
        """Time of all starts that have ended; None where none has."""
        seconds = [
            (datetime.fromisoformat(a.end.time) - datetime.fromisoformat(a.began)).total_seconds()
            for a in self.attempts
            if a.end and a.end.time and a.began
        ]
        return sum(seconds) / 3600 if seconds else None

    def mean(self, metric: str) -> float | None:
        """Over all rows that have the metric."""
        values = [row.values[metric] for row in self.metrics if metric in row.values]
        return sum(values) / len(values) if values else None

    def highest(self, metric: str) -> float | None:
        """Over all rows that have the metric."""
        return max((r.values[metric] for r in self.metrics if metric in r.values), default=None)

    @property
    def roles(self) -> list[tuple[str, int, int]]:
        """Role, cases and groups of the rows that the run uses."""
        if not self.run.store.exists("split.csv"):
            return []
        cases: dict[str, int] = {}
        groups: dict[str, set[str]] = {}
        for row in csv.DictReader(io.StringIO(self.run.read_text("split.csv"), newline="")):
            role = row["role"]
            cases[role] = cases.get(role, 0) + 1
            groups.setdefault(role, set()).add(row["group"])
        return [(role, count, len(groups[role])) for role, count in cases.items()]


def chain_of(run: RunDirectory) -> list[RunDirectory]:
    """The runs that led to `run`, first to last, as their facts name them."""
    found: list[RunDirectory] = []
    uri = str((run.read_json("facts.json") or {}).get("parent_uri") or "")
    while uri and uri not in [parent.uri for parent in found]:
        parent = RunDirectory.open(uri)
        found.insert(0, parent)
        uri = str((parent.read_json("facts.json") or {}).get("parent_uri") or "")
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """The values in which two configurations differ, but for their name and their place."""
    left, right = _flat(before), _flat(after)
    rows = [
        [path, _shown(left, path), _shown(right, path)]
        for path in dict.fromkeys([*left, *right])
        if left.get(path, _ABSENT) != right.get(path, _ABSENT)
    ]
    return Table("", ["key", "before", "here"], rows)


def recipe_config(name: str) -> dict[str, Any] | None:
    """The recipe's own configuration of a stage, or None where the recipe is not known here."""
    try:
        return dump(resolve(name).stage)
    except MedTrainError:
        return None


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    science = {key: value for key, value in config.items() if key not in ("name", "job")}
    return {join_path(path): value for path, value in leaves(science)}


def _shown(values: Mapping[str, Any], path: str) -> str:
    value = values.get(path, _ABSENT)
    return "–" if value is _ABSENT else yaml.safe_dump(value, default_flow_style=True).strip(" .\n")

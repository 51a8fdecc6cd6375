"""An evaluation's run directory, as the registry reads it.

It must hold::

    outcome.json         done; metrics; artifacts `package/<file>` of all files of a model package,
                         with their SHA-256
    facts.json           `data_home`: where membership and looks are recorded
    config.yaml          `data.protocol`
    split.csv            the rows that were tested on
    cases/<n>/test.csv   one row a case
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from medtrain.data.cases import Row, drop_doubled, rows_from_csv
from medtrain.data.splits import Membership, SplitRow, count_looks, is_trainable, splits_from_csv
from medtrain.errors import RegistryError
from medtrain.registry.gate import Contender
from medtrain.registry.package import CONTENT, SUMS, Package, parse_details, verify_package
from medtrain.storage.runs import Outcome, RunDirectory
from medtrain.storage.stores import open_store


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation of one model on the sealed test split."""

    run: RunDirectory
    outcome: Outcome
    facts: Mapping[str, Any]

    @classmethod
    def open(cls, uri: str) -> Evaluation:
        """Read the run directory at `uri`; a RegistryError where it is no finished evaluation."""
        run = RunDirectory.open(uri)
        outcome = run.outcome()
        if outcome is None or outcome.state != "done":
            state = outcome.state if outcome else "not finished"
            raise RegistryError(
                f"the evaluation at {uri} must be done, but is {state}. Run `evaluate` first."
            )
        missing = [
            name
            for name in _package_artifacts()
            if name not in outcome.artifacts or name not in outcome.sha256
        ]
        if missing:
            raise RegistryError(
                f"the outcome of {uri} must name the files of a model package with their SHA-256, "
                f"but lacks {', '.join(missing)}"
            )
        facts = run.read_json("facts.json") or {}
        if "data_home" not in facts:
            raise RegistryError(f"{uri}/facts.json must name 'data_home', but does not")
        return cls(run, outcome, facts)

    @property
    def uri(self) -> str:
        """URI of the run directory."""
        return self.run.uri

    @cached_property
    def details(self) -> dict[str, Any]:
        """`model.json` of the package."""
        text = self._read_artifact("package/model.json")
        return parse_details(text, where=f"{self.uri}/package/model.json")

    @cached_property
    def tested(self) -> list[SplitRow]:
        """The rows that were tested on."""
        return splits_from_csv(self.run.read_text("split.csv"))

    @cached_property
    def fitted(self) -> list[SplitRow]:
        """The package's rows: what the model was fitted on, chosen by and tested on."""
        rows = splits_from_csv(self._read_artifact("package/split.csv"))
        if not any(is_trainable(row.role) for row in rows):
            raise RegistryError(
                f"split.csv of the package in {self.uri} must name the cases that the model was "
                "fitted on, but names none: without them nobody can say which cases are sealed"
            )
        return rows

    @cached_property
    def results(self) -> dict[str, Row]:
        """The newest attempt's rows by case."""
        for attempt in reversed(self.run.attempts()):
            key = f"cases/{attempt}/test.csv"
            if self.run.store.exists(key):
                rows = drop_doubled(rows_from_csv(self.run.read_text(key)))
                return self._of_known_cases({row["case_id"]: row for row in rows}, key)
        raise RegistryError(f"{self.uri} must hold cases/<attempt>/test.csv, but does not")

    def _of_known_cases(self, results: dict[str, Row], key: str) -> dict[str, Row]:
        unknown = sorted(set(results) - {row.case_id for row in self.tested})
        if unknown:
            raise RegistryError(
                f"{self.uri}/{key} must be about cases of split.csv, but {len(unknown)} of its "
                f"{len(results)} cases are not there"
            )
        return results

    def today(self) -> tuple[SplitRow, ...]:
        """The data set's membership as it is now."""
        protocol = yaml.safe_load(self.run.read_text("config.yaml"))["data"]["protocol"]
        return Membership.open(open_store(self.facts["data_home"]), protocol).rows

    def looks(self) -> int:
        """How many models have looked at these sealed rows so far."""
        return count_looks(open_store(self.facts["data_home"]), self.tested)

    def contender(self, *, version: int | None = None) -> Contender:
        """The model, for the gate."""
        return Contender(
            metrics=self.outcome.metrics,
            results=self.results,
            tested=self.tested,
            fitted=self.fitted,
            is_synthetic=bool(self.details["is_synthetic"]),
            version=version,
        )

    def download_package(self, folder: Path) -> Package:
        """The model package, verified."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _package_artifacts():
            self.run.store.download(
                self.outcome.artifacts[name],
                folder / name.removeprefix("package/"),
                checksum=f"sha256:{self.outcome.sha256[name]}",
            )
        return verify_package(folder)

    def _read_artifact(self, name: str) -> str:
        data = self.run.store.read(self.outcome.artifacts[name])
        if hashlib.sha256(data).hexdigest() != self.outcome.sha256[name]:
            raise RegistryError(
                f"{self.uri}/{self.outcome.artifacts[name]} must have the SHA-256 that its outcome "
                "names, but was changed. Evaluate again."
            )
        return data.decode()


def _package_artifacts() -> list[str]:
    return [f"package/{name}" for name in (*CONTENT, SUMS)]

"""What a report says about a run, gathered from its run directory.

Besides what `storage/runs.py` lists, a run directory may hold for its report:

`tables.json`
    A list of tables, shown as they are: `{"title": "Per landmark", "note": "Errors in mm.",
    "columns": ["landmark", "mre_mm"], "rows": [["Sella", 1.25], …]}`. The first column names the
    row; cells are numbers, text, booleans or null.
`gate.json`
    The gate's verdict: `{"accepted", "reason", "metric", "value", "bound"}` and, where a champion
    was there, `{"champion_version", "champion_value", "common_value", "num_cases", "difference":
    {"value", "low", "high", "level"}}`.
`pictures/<name>.png`, `pictures/captions.json`
    Pictures, shown in the order of their names, and their captions by file name.

And in `details` of its outcome: `intervals` (metric → `{"low", "high", "level"}`), `references`
(what the model is to be read beside: `[{"name": "mean positions", "note": "", "metrics":
{"mre_mm": 9.5}}, …]`) and `looks` (models that have looked at these sealed rows so far).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medtrain.data.cases import rows_from_csv
from medtrain.report.stages import StageRun, Table

MOST_PICTURES = 40
"""More than these stay in the run directory, so that the page stays one that can be mailed."""
MOST_CASES = 300
"""Rows of the table of cases."""

_SPLITS = ("test_", "val_ema_", "val_", "train_")


@dataclass(frozen=True)
class Picture:
    """A picture with what is to be seen on it."""

    caption: str
    data_uri: str


@dataclass(frozen=True)
class Banner:
    """Something that a reader must not miss."""

    title: str
    text: str
    is_loud: bool = True


@dataclass(frozen=True)
class Report:
    """A run, the stages that it came from in their order, and the gate's verdict where known."""

    subject: StageRun
    parents: Sequence[StageRun] = field(default_factory=tuple)
    verdict: Mapping[str, Any] | None = None

    @property
    def is_evaluation(self) -> bool:
        return self.subject.is_evaluation

    @property
    def stages(self) -> list[StageRun]:
        """The runs that trained."""
        return [*self.parents, *([] if self.is_evaluation else [self.subject])]

    def banners(self) -> list[Banner]:
        """What a reader must not miss, the loudest first."""
        runs = [*self.parents, self.subject]
        found = []
        if any(run.is_synthetic for run in runs):
            found.append(Banner("Synthetic data", "No figure here says anything about patients."))
        replaced = {name: None for run in runs for name in run.random_weights}
        if replaced:
            found.append(
                Banner(
                    "pretrained: none",
                    f"No pretrained weights were found for {', '.join(replaced)}: training began "
                    "from random ones, as the configuration allows.",
                )
            )
        elif self.stages and self.stages[0].starts_from == "scratch":
            text = "Training began from random weights, as the configuration says."
            found.append(Banner("pretrained: none", text, is_loud=False))
        outcome = self.subject.outcome
        if outcome is None:
            found.append(
                Banner("Not finished", "Figures are those of the time above.", is_loud=False)
            )
        elif outcome.state != "done":
            state = outcome.state.replace("_", " ")
            found.append(Banner(f"This run {state}", outcome.reason))
        return found

    def figures_of_merit(self) -> Table | None:
        """The subject's metrics, beside what they are to be read with."""
        outcome = self.subject.outcome
        values = dict(outcome.metrics) if outcome else {}
        if not values and self.subject.metrics:
            values = _at_best(self.subject)
        # An evaluation may have further test splits, with names of their own.
        judged = {n: v for n, v in values.items() if n.startswith("val_")}
        chosen = values if self.is_evaluation else judged or values
        if not chosen:
            return None
        first = str((self.verdict or {}).get("metric") or self.subject.monitor[0])
        names = sorted(chosen, key=lambda name: name != first)
        details = outcome.details if outcome else {}
        intervals = details.get("intervals") or {}
        references = [dict(r) for r in details.get("references") or []]
        columns = ["metric", "this model"]
        columns += ["confidence interval"] if intervals else []
        columns += [str(reference["name"]) for reference in references]
        rows = []
        for name in names:
            row: list[Any] = [name, chosen[name]]
            if intervals:
                row.append(_interval(intervals.get(name) or intervals.get(_bare(name))))
            for reference in references:
                metrics = reference.get("metrics") or {}
                row.append(metrics.get(name, metrics.get(_bare(name))))
            rows.append(row)
        notes = [f"{r['name']}: {r['note']}" for r in references if r.get("note")]
        return Table("", columns, rows, note="; ".join(notes), is_mixed=True)

    def tables(self) -> list[Table]:
        """The recipe's own tables."""
        return [
            Table.from_json(record) for record in self.subject.run.read_json("tables.json") or []
        ]

    def pictures(self) -> tuple[list[Picture], int]:
        """Pictures of the run, and how many more lie in its directory."""
        store = self.subject.run.store
        captions = self.subject.run.read_json("pictures/captions.json") or {}
        keys = [info.key for info in store.list("pictures/") if info.key.endswith(".png")]
        found = []
        for key in keys[:MOST_PICTURES]:
            name = key.removeprefix("pictures/")
            caption = captions.get(name) or name.removesuffix(".png").replace("_", " ")
            encoded = base64.b64encode(store.read(key)).decode()
            found.append(Picture(str(caption), f"data:image/png;base64,{encoded}"))
        return found, len(keys) - len(found)

    def cases(self) -> Table | None:
        """The newest attempt's rows, without their arrays."""
        split = "test" if self.is_evaluation else "val"
        run = self.subject.run
        for number in reversed(run.attempts()):
            key = f"cases/{number}/{split}.csv"
            if run.store.exists(key):
                rows = rows_from_csv(run.read_text(key))
                return _case_table(rows, split)
        return None

    def looks(self) -> int | None:
        """How many models have looked at these sealed rows, as it was counted when this one did."""
        outcome = self.subject.outcome
        looks = (outcome.details if outcome else {}).get("looks", self.subject.facts.get("looks"))
        return None if looks is None else int(looks)

    def stage_table(self) -> Table:
        """The runs that trained, in their order."""
        rows = []
        for run in self.stages:
            metric, _ = run.monitor
            best = run.best
            rows.append(
                [
                    run.stage,
                    (run.outcome.state.replace("_", " ") if run.outcome else "not finished"),
                    run.num_epochs,
                    metric,
                    best[1] if best else None,
                    best[0] if best else None,
                    run.origin,
                ]
            )
        columns = ["stage", "state", "epochs", "monitor", "best", "at epoch", "weights from"]
        return Table("", columns, rows)

    def data_facts(self) -> list[tuple[str, Any]]:
        """What the figures rest on, label by label."""
        data = self.subject.config.get("data") or {}
        looks = self.looks()
        found: list[tuple[str, Any]] = [
            ("protocol", data.get("protocol")),
            ("fold for validation", data.get("fold")),
            ("ground truth of annotator", data.get("annotator")),
            ("models that looked at this test split", looks if self.is_evaluation else None),
        ]
        recorded = self.subject.facts.get("data_facts") or {}
        found += [
            (str(name).replace("_", " "), value)
            for name, value in recorded.items()
            if isinstance(value, str | int | float)
        ]
        return [(label, value) for label, value in found if value is not None]

    def split_table(self) -> Table | None:
        """How many cases and groups have which role."""
        rows = [
            [role, cases, groups] for run in self._with_split() for role, cases, groups in run.roles
        ]
        return Table("", ["role", "cases", "groups"], rows) if rows else None

    def _with_split(self) -> list[StageRun]:
        last = self.stages[-1:] if self.is_evaluation else []
        return [*last, self.subject]

    def identity_table(self) -> Table:
        """What was run, exactly."""
        facts = self.subject.facts
        rows: list[list[Any]] = [["run key", self.subject.key]]
        rows += [[f"run key of {run.stage}", run.key] for run in self.parents]
        for label, name in (
            ("data fingerprint", "data_fingerprint"),
            ("code fingerprint", "code_fingerprint"),
            ("commit", "commit"),
            ("image", "image_digest"),
        ):
            if facts.get(name):
                rows.append([label, facts[name]])
        for run in [*self.parents, self.subject]:
            for name, source in (run.facts.get("pretrained") or {}).items():
                rows.append([f"weights {name}", source])
        rows += [[library, v] for library, v in (facts.get("versions") or {}).items()]
        return Table("", ["what", "value"], rows)

    def resource_table(self) -> Table:
        """What the runs used."""
        columns = ["run", "starts", "processes", "hours", "CPU %", "memory GB", "GPU memory GB"]
        rows = []
        for run in [*self.parents, self.subject]:
            rows.append(
                [
                    "evaluation" if run.is_evaluation else run.stage,
                    len(run.attempts),
                    run.facts.get("world_size"),
                    run.hours,
                    run.mean("sys_cpu_percent"),
                    run.highest("sys_memory_gb"),
                    run.highest("sys_gpu_memory_peak_gb"),
                ]
            )
        used = [0, 1] + [n for n in range(2, len(columns)) if any(r[n] is not None for r in rows)]
        return Table("", [columns[n] for n in used], [[row[n] for n in used] for row in rows])


def _at_best(run: StageRun) -> dict[str, float]:
    best = run.best
    for row in run.metrics:
        if best and row.values.get("epoch", float(row.step)) == best[0]:
            return dict(row.values)
    return dict(run.metrics[-1].values)


def _bare(name: str) -> str:
    return next((name[len(p) :] for p in _SPLITS if name.startswith(p)), name)


def _interval(record: Mapping[str, Any] | None) -> str | None:
    if not record:
        return None
    level = f" ({record['level']:.0%})" if "level" in record else ""
    return f"{record['low']:.4g} to {record['high']:.4g}{level}"


def _case_table(rows: Sequence[Mapping[str, Any]], split: str) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    plain = [n for n in names if not any(hasattr(row.get(n), "shape") for row in rows)]
    shown = [[row.get(name) for name in plain] for row in rows[:MOST_CASES]]
    left = len(rows) - len(shown)
    note = f"{left} more are in the run directory." if left else ""
    return Table(f"{len(rows)} cases of {split}", plain, shown, note=note)

"""What an evaluation leaves behind: rows, metrics, tables, pictures and the model package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from medtrain.config import dump, to_yaml
from medtrain.data.cases import Row, rows_to_csv
from medtrain.data.splits import SplitRow, count_looks, splits_from_csv, splits_to_csv
from medtrain.errors import DataError
from medtrain.plans import Plan, PreparedData, key_of
from medtrain.recipes import part
from medtrain.serve.package import write_package
from medtrain.stats import cluster_bootstrap
from medtrain.storage.runs import RunDirectory
from medtrain.storage.transfer import upload_tree

Summarize = Callable[[Sequence[Row]], Mapping[str, float]]

POOLED = "test"
"""Prefix of the metrics over all sealed cases; a named test has its own beside it."""


def write_evaluation(
    plan: Plan,
    rows_by_role: Mapping[str, Sequence[Row]],
    *,
    summarize: Summarize,
    weights: Mapping[str, Tensor],
    attempt: int,
    scratch: Path,
    data_path: Path,
) -> dict[str, Any]:
    """Write everything into the run directory and return the outcome's fields.

    Args:
        plan: The evaluation.
        rows_by_role: Rows of every sealed split.
        summarize: The task's.
        weights: The judged model's tensors by name.
        attempt: Number of this start.
        scratch: Local folder of this start.
        data_path: Where the cases' files are on this machine.
    """
    assert plan.data is not None and plan.parent is not None
    run = RunDirectory.open(plan.run_uri)
    rows = [
        {**row, "role": role} if len(rows_by_role) > 1 else row
        for role, found in sorted(rows_by_role.items())
        for row in found
    ]
    metrics = {f"{POOLED}_{name}": value for name, value in summarize(rows).items()}
    for role, found in rows_by_role.items():
        if role != POOLED:
            metrics |= {f"{role}_{name}": value for name, value in summarize(found).items()}
    if not metrics:
        raise DataError("the sealed test cases must have a truth to judge by, but none has one")
    run.write_text(f"cases/{attempt}/{POOLED}.csv", rows_to_csv(rows))

    fitted_rows = _fitted_rows(plan.parent)
    # A second data set to judge on does not hold the cases of the first.
    fitted_on = PreparedData.load(plan.parent.read_json("facts.json")["data_uri"])
    training = [fitted_on.cases[row.case_id] for row in fitted_rows if row.role == "train"]
    judged = [plan.data.cases[row.case_id] for row in plan.rows]
    shown = part(plan.resolution.recipe, "evaluation")
    run.write_json("tables.json", shown.tables(rows, training, judged, plan.stage.data))
    references = [
        {
            "name": name,
            "note": note,
            "metrics": {
                f"{POOLED}_{metric}": value for metric, value in summarize(reference).items()
            },
        }
        for name, note, reference in shown.references(training, judged, plan.stage.data)
    ]
    pictures = scratch / "pictures"
    pictures.mkdir()
    shown.draw(
        rows,
        judged,
        plan.stage.data,
        data_path=data_path,
        folder=pictures,
        is_synthetic=plan.data.manifest.is_synthetic,
    )
    upload_tree(pictures, run.store, "pictures")
    package = _write_package(
        plan,
        weights,
        splits_to_csv([*fitted_rows, *plan.rows]),
        metrics,
        outputs=shown.describe_outputs(training, plan.stage.data),
        folder=scratch / "package",
    )
    stored = upload_tree(package, run.store, "package")
    gate = plan.resolution.recipe.gates[plan.name.variant]
    return {
        "score": metrics.get(gate.metric),
        "metrics": metrics,
        "artifacts": {key: key for key in stored},
        "sha256": {key: checksum.removeprefix("sha256:") for key, checksum in stored.items()},
        "details": {
            "trained_run": plan.parent.uri,
            "intervals": _intervals(plan, rows, summarize),
            "references": references,
            "looks": count_looks(plan.data.home, plan.rows),
        },
    }


def _intervals(plan: Plan, rows: Sequence[Row], summarize: Summarize) -> dict[str, Any]:
    """Intervals of the metrics that checkpoints are chosen by, over groups of cases."""
    group_of = {row.case_id: row.group for row in plan.rows}
    groups = [group_of[row["case_id"]] for row in rows]
    if len(set(groups)) < 2:
        return {}
    known = summarize(rows)
    wanted = [c.metric.removeprefix("val_") for c in plan.stage.checkpoint.criteria.values()]
    intervals = {}
    for name in dict.fromkeys(metric for metric in wanted if metric in known):

        def statistic(cases: Any, name: str = name) -> float:
            return float(summarize([rows[case] for case in cases]).get(name, float("nan")))

        interval = cluster_bootstrap(statistic, groups)
        intervals[f"{POOLED}_{name}"] = asdict(interval)
    return intervals


def _write_package(
    plan: Plan,
    weights: Mapping[str, Tensor],
    split_csv: str,
    metrics: Mapping[str, float],
    *,
    outputs: Mapping[str, Any],
    folder: Path,
) -> Path:
    assert plan.data is not None and plan.parent is not None
    facts = plan.parent.read_json("facts.json") or {}
    file = folder.with_name("model.safetensors")
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, file)
    write_package(
        folder,
        weights=file,
        config_yaml=to_yaml(dump(plan.stage)),
        split_csv=split_csv,
        metrics=metrics,
        card=plan.resolution.recipe.title,
        details={
            "system": plan.name.system,
            "variant": plan.name.variant,
            "stage": plan.stage.name.rpartition(":")[2],
            "run_key": key_of(plan.parent.uri),
            "data_fingerprint": plan.data.manifest.fingerprint,
            "code_fingerprint": facts.get("code_fingerprint", ""),
            "commit": facts.get("commit", ""),
            "image_digest": facts.get("image_digest", ""),
            "is_synthetic": plan.data.manifest.is_synthetic,
            "pretrained": _pretrained(plan.parent),
            **outputs,
        },
    )
    return folder


def _fitted_rows(run: RunDirectory) -> list[SplitRow]:
    """Rows that a trained run and every stage before it learned from or was chosen by."""
    rows = {(row.case_id, row.role): row for row in splits_from_csv(run.read_text("split.csv"))}
    facts = run.read_json("facts.json") or {}
    if facts.get("parent_uri"):
        for row in _fitted_rows(RunDirectory.open(facts["parent_uri"])):
            rows.setdefault((row.case_id, row.role), row)
    return list(rows.values())


def _pretrained(run: RunDirectory) -> dict[str, Any]:
    """Where pretrained weights came from, in the first stage of the chain."""
    facts = run.read_json("facts.json") or {}
    if facts.get("parent_uri"):
        return _pretrained(RunDirectory.open(facts["parent_uri"]))
    return dict(facts.get("pretrained") or {})

"""A chain of runs as a worker leaves it behind, on drawn data."""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medtrain.config import dump, to_yaml
from medtrain.data.cases import rows_to_csv
from medtrain.data.splits import SplitRow, splits_to_csv
from medtrain.recipes import resolve
from medtrain.storage.metrics import MetricRow, segment_head, segment_name
from medtrain.storage.runs import AttemptEnd, Outcome, RunDirectory

HOSTILE = "<script>alert('x')</script>"


@dataclass(frozen=True)
class Chain:
    """Training stages, and the evaluation of the last one."""

    stages: list[RunDirectory]
    evaluation: RunDirectory
    hostile_case: str = HOSTILE
    """A case's name that a page must not take for markup."""


def write_metrics(run: RunDirectory, *, epochs: int, attempt: int = 1) -> None:
    text = segment_head(attempt, 1, from_step=0)
    for epoch in range(1, epochs + 1):
        values = {
            "epoch": float(epoch),
            "train_loss": 90 / epoch**0.6,
            "train_loss_heatmap": 60 / epoch**0.6,
            "train_loss_ssim": 30 / epoch**0.6,
            "val_loss": 95 / epoch**0.5,
            "val_loss_heatmap": 64 / epoch**0.5,
            "val_loss_ssim": 31 / epoch**0.5,
            "val_mre_mm": 20 / epoch**0.5 + math.sin(epoch),
            "val_sdr_2mm": 70 - 60 / epoch,
            "lr_encoder": 1e-3 if epoch > 3 else 0.0,
            "lr_decoder": 1e-3 * (1 + math.cos(math.pi * epoch / epochs)),
            "grad_norm": 9 / epoch,
            "grad_norm_encoder": 3 / epoch,
            "grad_norm_decoder": 5 / epoch,
            "sys_cpu_percent": 98.0,
            "sys_memory_gb": 1.5,
            "samples_per_s": 12.0,
        }
        text += MetricRow(8 * epoch, values, 1.79e9 + epoch, attempt).to_line()
    run.write_text(f"metrics/{segment_name(attempt, 1)}", text)


def write_run(
    root: Path,
    *,
    verb: str,
    stage: str,
    key: str,
    parent: RunDirectory | None = None,
    overrides: tuple[str, ...] = (),
    is_synthetic: bool = True,
    roles: dict[str, int],
    facts: dict[str, Any] | None = None,
) -> RunDirectory:
    run = RunDirectory.open(str(root / stage / key))
    name = f"cephalometric/smoke:{stage if verb == 'train' else 'multitask'}"
    run.write_text("config.yaml", to_yaml(dump(resolve(name, overrides).stage)))
    run.write_json(
        "facts.json",
        {
            "name": name,
            "verb": verb,
            "run_key": key,
            "parent_uri": parent.uri if parent else "",
            "code_fingerprint": "c" * 64,
            "data_fingerprint": "d" * 64,
            "is_synthetic": is_synthetic,
            "data_facts": {"num_cases": 60, "mm_per_pixel": 0.5},
            "pretrained": {},
            "world_size": 2,
            "commit": "abc123",
            "image_digest": "",
            "versions": {"medtrain": "0.1.0", "torch": "2.13.0"},
            **(facts or {}),
        },
    )
    rows = [
        SplitRow(f"{role}-{n:03}", f"g{n}", role, "sha256:0")
        for role, count in roles.items()
        for n in range(count)
    ]
    run.write_text("split.csv", splits_to_csv(rows))
    run.write_json("attempts/1.json", {"host": "node-a", "time": "2026-01-05T10:00:00+00:00"})
    run.end_attempt(1, AttemptEnd(0, "done", 96, 96, "2026-01-05T10:45:00+00:00"))
    return run


def picture(seed: int) -> bytes:
    noise = np.random.default_rng(seed).normal(size=(24, 20))
    smooth = np.kron(noise, np.ones((16, 16)))
    grey = (127 + 40 * smooth).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(grey).save(out, format="PNG")
    return out.getvalue()


@dataclass(frozen=True)
class Writer:
    """Writes single training runs."""

    root: Path

    def run(self, **changes: Any) -> RunDirectory:
        return write_run(
            self.root, verb="train", stage="baseline", key="a" * 32, roles={"train": 3}, **changes
        )

    def metrics(self, run: RunDirectory, *, epochs: int) -> None:
        write_metrics(run, epochs=epochs)


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(tmp_path / "single")


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """For tests that only read."""
    return make_chain(tmp_path_factory.mktemp("chain"))


def make_chain(root: Path) -> Chain:
    stages: list[RunDirectory] = []
    for number, stage in enumerate(("baseline", "transformer", "multitask")):
        run = write_run(
            root,
            verb="train",
            stage=stage,
            key=f"{number}" * 32,
            parent=stages[-1] if stages else None,
            overrides=("optim.clip_norm=0.5",) if stage == "baseline" else (),
            roles={"train": 38, "val": 10},
            facts={"pretrained": {"encoder": "random initialization"}} if not stages else None,
        )
        write_metrics(run, epochs=12)
        run.write_outcome(Outcome("done", score=5.1, metrics={"val_mre_mm": 5.1, "val_loss": 27.0}))
        stages.append(run)
    evaluation = write_run(
        root, verb="evaluate", stage="evaluate", key="e" * 32, parent=stages[-1], roles={"test": 12}
    )
    evaluation.write_outcome(
        Outcome(
            "done",
            score=5.25,
            metrics={"test_sdr_2mm": 41.5, "test_mre_mm": 5.25, "test_median_mm": 4.0},
            details={
                "looks": 3,
                "intervals": {"test_mre_mm": {"low": 4.5, "high": 6.125, "level": 0.95}},
                "references": [
                    {
                        "name": "mean positions",
                        "note": "every landmark at its mean place in the training cases",
                        "metrics": {"mre_mm": 19.5, "sdr_2mm": 3.0},
                    },
                    {
                        "name": "second reader",
                        "note": "the junior reader judged by the senior one",
                        "metrics": {"test_mre_mm": 2.375},
                    },
                ],
            },
        )
    )
    evaluation.write_json(
        "gate.json",
        {
            "accepted": True,
            "reason": "test_mre_mm is 5.25 on 12 sealed test cases: better than version 2",
            "metric": "test_mre_mm",
            "value": 5.25,
            "bound": "test_mre_mm <= 20",
            "champion_version": 2,
            "champion_value": 6.5,
            "common_value": 5.5,
            "num_cases": 11,
            "difference": {"value": -1.0, "low": -1.75, "high": -0.25, "level": 0.95},
        },
    )
    names = ["Sella", "Nasion", "Orbitale", "Porion", "Subspinale", "Supramentale", "Pogonion"]
    evaluation.write_json(
        "tables.json",
        [
            {
                "title": "Per landmark",
                "note": "Errors in mm; readers differ by 1.5 mm on the mean.",
                "columns": ["landmark", "mre_mm", "sdr_2mm", "readers_mm", "num_over_10mm"],
                "rows": [
                    [name, 3.0 + 0.413 * n, 60.0 - 3.3 * n, 1.0 + 0.2 * n if n else None, n % 3]
                    for n, name in enumerate(names)
                ],
            }
        ],
    )
    rows = [
        {"case_id": f"{100 + n}", "mre_mm": 4.0 + n / 7, "x": np.arange(3.0)} for n in range(11)
    ]
    rows.append({"case_id": HOSTILE, "mre_mm": 9.0, "x": np.arange(3.0)})
    evaluation.write_text("cases/1/test.csv", rows_to_csv(rows))
    for n in range(3):
        evaluation.store.write(f"pictures/worst_{n}.png", picture(n))
    evaluation.write_json("pictures/captions.json", {"worst_0.png": "Film 103: the largest error"})
    return Chain(stages, evaluation)

"""The record of an experiment, and the table of all records."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest

FOLDER = Path(__file__).parent
LIBRARIES = ("torch", "timm", "monai")


def commit() -> str:
    """The commit whose code is tested; `-dirty` where a tracked file differs from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        check=True,
    )
    return described.stdout.strip()


def machine() -> dict[str, Any]:
    """What decides speed and rounding, and nothing that tells which machine it was."""
    cpu = platform.processor() or platform.machine()
    if (table := Path("/proc/cpuinfo")).exists():
        models = [line for line in table.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        system = platform.system()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{system}, {platform.machine()}",
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
    }


def render(records: list[Mapping[str, Any]]) -> str:
    """All records as one Markdown page."""
    lines = [
        "# Results of the experiments",
        "",
        "Made by `make experiments` from `results/*.json`; all films are synthetic.",
        "",
        "| id | experiment | criterion | result | commit | date | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        result = "passed" if record["passed"] else "**failed**"
        cells = [record["id"], record["title"], record["criterion"], result, record["commit"]]
        cells += [record["date"], f"{record['duration_s'] / 60:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    for record in records:
        lines += ["", f"## {record['id']}: {record['title']}", ""]
        lines += ["| measured | value |", "| --- | --- |"]
        lines += [f"| {name} | {value:g} |" for name, value in record["measured"].items()]
        facts = [f"{name} {value}" for name, value in record["machine"].items()]
        lines += ["", f"Machine: {'; '.join(facts)}."]
        if record["note"]:
            lines += ["", record["note"]]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def code() -> str:
    """Asked once, before the first record makes the tree differ from its commit."""
    return commit()


@pytest.fixture
def record(code: str) -> Callable[..., None]:
    """Write what an experiment measured, passed or not, and the table anew."""
    begun = time.monotonic()

    def write(
        name: str,
        *,
        title: str,
        criterion: str,
        measured: Mapping[str, float],
        passed: bool,
        note: str = "",
    ) -> None:
        result = {
            "id": name,
            "title": title,
            "criterion": criterion,
            "passed": passed,
            "measured": {what: round(value, 4) for what, value in measured.items()},
            "note": note,
            "commit": code,
            "date": datetime.now(UTC).date().isoformat(),
            "duration_s": round(time.monotonic() - begun),
            "machine": machine(),
        }
        results = FOLDER / "results"
        results.mkdir(exist_ok=True)
        (results / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        records = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
        (FOLDER / "RESULTS.md").write_text(render(records))

    return write

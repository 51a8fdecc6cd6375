"""One HTML file that tells a run. It loads nothing from elsewhere, so it can be mailed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.report.content import Report
from medtrain.report.figures import draw, inline_svg, training_panels
from medtrain.report.stages import StageRun, Table, chain_of, differences, recipe_config
from medtrain.storage.runs import RunDirectory, now
from medtrain.storage.uri import join_uri

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

REPORT = "report.html"
"""Key of the page in the run directory."""


def write_report(
    run: RunDirectory,
    *,
    parents: Sequence[RunDirectory] | None = None,
    verdict: Mapping[str, Any] | None = None,
) -> str:
    """Write the page of a run into its directory, anew each time; its URI.

    Args:
        run: An evaluation, or a stage that is training or has trained.
        parents: The runs that led to it, first to last; None: as their facts name them.
        verdict: The gate's, see `report.content`; None: as `gate.json` says.
    """
    run.write_text(REPORT, render_report(run, parents=parents, verdict=verdict))
    return join_uri(run.uri, REPORT)


def render_report(
    run: RunDirectory,
    *,
    parents: Sequence[RunDirectory] | None = None,
    verdict: Mapping[str, Any] | None = None,
) -> str:
    """The page as text; see `write_report`."""
    report = Report(
        subject=StageRun(run),
        parents=[StageRun(parent) for parent in (chain_of(run) if parents is None else parents)],
        verdict=verdict if verdict is not None else run.read_json("gate.json"),
    )
    # A stage that trains asks for its page after every epoch: only its own curves are new.
    drawn = report.stages if report.is_evaluation else report.stages[-1:]
    pictures, num_pictures_left = report.pictures()
    return (
        _environment()
        .get_template("page.html")
        .render(
            report=report,
            subject=report.subject,
            written=now(),
            pictures=pictures,
            num_pictures_left=num_pictures_left,
            stages=[_stage_view(stage, report) for stage in drawn],
        )
    )


def _stage_view(stage: StageRun, report: Report) -> dict[str, Any]:
    """What the template shows of one stage."""
    position = report.stages.index(stage)
    before = report.stages[position - 1] if position else None
    of_recipe = recipe_config(str(stage.config.get("name", "")))
    return {
        "run": stage,
        "figure": _figure(stage),
        "best": stage.best,
        "from_recipe": differences(of_recipe, stage.config) if of_recipe else None,
        "before": before,
        "from_before": differences(before.config, stage.config) if before else None,
        "config": _config_text(stage),
    }


def _figure(stage: StageRun) -> Markup | None:
    from markupsafe import Markup

    metric, mode = stage.monitor
    panels = training_panels(stage.metrics, monitor=metric, mode=mode)
    if not panels:
        return None
    titles = "; ".join(panel.title.lower() for panel in panels)
    label = f"Curves of stage {stage.stage} over {panels[0].x_label}s: {titles}."
    # Everything in it is escaped or a number.
    return Markup(inline_svg(draw(panels), label=label))


def _config_text(stage: StageRun) -> str:
    key = "config.yaml"
    return stage.run.read_text(key) if stage.run.store.exists(key) else ""


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "cell": cell,
        "renamed": lambda table, before: replace(table, columns=["key", before, "here"]),
        "table": _render_table,
        "untitled": lambda table: replace(table, title=""),
    }
    return environment


def _render_table(table: Table) -> Markup:
    from markupsafe import Markup

    columns = [
        _cells([row[n] if n < len(row) else None for row in table.rows], is_mixed=table.is_mixed)
        for n in range(len(table.columns))
    ]
    return Markup(
        _environment()
        .get_template("table.html")
        .render(
            table=table,
            rows=list(zip(*columns, strict=True)),
            numeric=[_is_numeric([row[n] for row in table.rows]) for n in range(len(columns))],
        )
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_numeric(values: Sequence[Any]) -> bool:
    """Whether all values that are there are numbers, which are set flush right."""
    there = [value for value in values if value is not None]
    return bool(there) and all(map(_is_number, there))


def _cells(values: Sequence[Any], *, is_mixed: bool) -> list[str]:
    """A column as text: where it holds one quantity, all with the same number of decimals."""
    numbers = [abs(value) for value in values if _is_number(value) and math.isfinite(value)]
    is_aligned = (
        not is_mixed
        and _is_numeric(values)
        and any(isinstance(value, float) for value in values)
        and any(number != int(number) for number in numbers)
    )
    if is_aligned:
        magnitude = math.floor(math.log10(max(numbers)))
        decimals = max(0, 3 - max(magnitude, 0) if magnitude >= -1 else 2 - magnitude)
        smallest = min(number for number in numbers if number)
        if decimals <= 6 and smallest >= 10.0**-decimals:
            return ["–" if value is None else f"{value:.{decimals}f}" for value in values]
    return [cell(value) for value in values]


def cell(value: Any) -> str:
    """A single value as text: four digits that count, a dash for what is absent."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isfinite(value):
        if value == int(value) and abs(value) < 1e6:
            return str(int(value))
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"
    return str(value)

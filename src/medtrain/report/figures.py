"""Curves, drawn by matplotlib's objects: no display, no global state, no torch."""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from medtrain.errors import ConfigError
from medtrain.storage.metrics import MetricRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colors that people with any color vision tell apart, without those that vanish on white or
black."""

_INK = "#767676"
"""Text and axes: as dark as it is light, for a page of either kind; a page may replace it."""
_MOST_POINTS = 400
"""Points of a curve that still make a difference on paper."""

ImageFormat = Literal["svg", "png"]


@dataclass(frozen=True)
class Curve:
    """One line, or points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    """Index into the colors; those beyond the last begin anew."""
    style: Literal["solid", "dashed", "points"] = "solid"


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    curves: Sequence[Curve]
    x_label: str = ""
    y_label: str = ""
    is_log: bool = False
    """Whether the y axis is logarithmic."""
    marks: Sequence[Curve] = field(default_factory=tuple)
    """Single points with a word beside them."""


def draw(
    panels: Sequence[Panel],
    *,
    image_format: ImageFormat = "svg",
    num_columns: int = 2,
    panel_size: tuple[float, float] = (4.4, 2.7),
    dpi: int = 150,
) -> bytes:
    """Draw panels side by side on a transparent ground.

    Args:
        panels: What to draw, row by row.
        image_format: `svg` for pages, `png` for everything else.
        num_columns: Panels in a row.
        panel_size: Width and height of a panel in inches.
        dpi: Dots an inch of a `png`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError(
            "figures need matplotlib, which is not installed. Run: pip install 'medtrain[train]'"
        ) from error
    num_columns = max(1, min(num_columns, len(panels)))
    num_rows = max(1, math.ceil(len(panels) / num_columns))
    # The context is asked for again when the file is written.
    with rc_context(_style()):
        figure = Figure(figsize=(panel_size[0] * num_columns, panel_size[1] * num_rows))
        figure.subplots_adjust(**_margins(num_rows, num_columns, panel_size))
        for number, panel in enumerate(panels, start=1):
            _draw_panel(figure.add_subplot(num_rows, num_columns, number), panel)
        out = io.BytesIO()
        # Without a date and an author the same curves are the same bytes.
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(
            out,
            format=image_format,
            transparent=True,
            dpi=dpi,
            metadata=metadata if image_format == "svg" else None,
        )
    return out.getvalue()


def _style() -> Any:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "medtrain",
        "font.size": 9,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }


def _margins(num_rows: int, num_columns: int, panel_size: tuple[float, float]) -> dict[str, float]:
    """Room for the words around the axes, in inches turned into matplotlib's fractions.

    matplotlib's own layouts draw everything twice to find it out.
    """
    left, right, bottom, top = 0.55, 0.2, 0.45, 0.35
    width, height = panel_size[0] * num_columns, panel_size[1] * num_rows
    return {
        "left": left / width,
        "right": 1 - right / width,
        "bottom": bottom / height,
        "top": 1 - top / height,
        "wspace": (left + right) / (panel_size[0] - left - right),
        "hspace": (bottom + top) / (panel_size[1] - bottom - top),
    }


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for curve in panel.curves:
        x, y = thin_out(curve.x, curve.y)
        color = OKABE_ITO[curve.color % len(OKABE_ITO)]
        # A line of one point is invisible.
        is_points = curve.style == "points" or len(x) == 1
        axes.plot(
            x,
            y,
            color=color,
            label=curve.label,
            linewidth=1.4,
            linestyle="none" if is_points else {"dashed": (0, (4, 2))}.get(curve.style, "solid"),
            marker="o" if is_points else None,
            markersize=3.5,
        )
    for mark in panel.marks:
        color = OKABE_ITO[mark.color % len(OKABE_ITO)]
        axes.plot(
            mark.x, mark.y, linestyle="none", marker="o", markersize=6, mfc="none", color=color
        )
        axes.annotate(
            mark.label,
            (mark.x[0], mark.y[0]),
            xytext=(4, 7),
            textcoords="offset points",
            fontsize=8,
        )
    if panel.is_log:
        _scale_by_decades(axes, panel.curves)
    axes.set_title(panel.title, loc="left", fontsize=9.5)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(True, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.patch.set_alpha(0.0)
    axes.margins(x=0.03)
    if len(panel.curves) > 1:
        num_columns = 1 if len(panel.curves) <= 6 else 2
        axes.legend(frameon=False, fontsize=8, ncols=num_columns, handlelength=1.8)


def _scale_by_decades(axes: Axes, curves: Sequence[Curve]) -> None:
    """A logarithmic axis with few plain numbers, also where it spans less than a decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    values = [value for curve in curves for value in curve.y]
    axes.set_yscale("log")
    subdivisions = (1.0,) if max(values) > 300 * min(values) else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subdivisions, numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def thin_out(
    x: Sequence[float], y: Sequence[float], *, most: int = _MOST_POINTS
) -> tuple[list[float], list[float]]:
    """At most about `most` points that look the same: the extremes of every stretch are kept."""
    if len(x) <= most:
        return list(x), list(y)
    kept = {0, len(x) - 1}
    num_stretches = most // 2
    for stretch in range(num_stretches):
        start = stretch * len(x) // num_stretches
        end = (stretch + 1) * len(x) // num_stretches
        kept.add(min(range(start, end), key=y.__getitem__))
        kept.add(max(range(start, end), key=y.__getitem__))
    order = sorted(kept)
    return [x[i] for i in order], [y[i] for i in order]


def inline_svg(svg: bytes, *, label: str) -> str:
    """An SVG for the midst of a page: the page's color and font, names of its own, a text for
    those who cannot see it."""
    text = svg.decode()
    text = text[text.index("<svg") :].strip()
    text = text.replace(_INK, "currentColor").replace(_INK.lower(), "currentColor")
    text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "inherit", text)
    text = text.replace("font: 9px inherit", "font-size: 9px")
    # matplotlib's own style would reach everything on the page.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    prefix = "f" + hashlib.sha256(svg).hexdigest()[:8]
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'(xlink:href=")#', rf"\1#{prefix}-", text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]+"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]+"', r"<svg \1", text, count=1)
    named = f'<svg role="img" aria-label="{html.escape(label, quote=True)}" '
    return text.replace("<svg ", named, 1)


# Curves of a training run


def training_panels(rows: Sequence[MetricRow], *, monitor: str, mode: str) -> list[Panel]:
    """Loss terms, monitor, learning rates and gradient norms, as far as they were logged.

    Args:
        rows: From `read_metrics`.
        monitor: The metric by which the best checkpoint is chosen.
        mode: `min` or `max`, what is better of it.
    """
    series = _Series(rows)
    panels = [
        _losses(series),
        _monitor(series, monitor, mode),
        _groups(series, "lr_", "Learning rate", is_log=True),
        _groups(series, "grad_norm", "Gradient norm before clipping", is_log=True),
    ]
    return [panel for panel in panels if panel.curves]


class _Series:
    """Values by name, over epochs where these were logged, else over steps."""

    def __init__(self, rows: Sequence[MetricRow]) -> None:
        self._rows = rows
        self._epochs = [(row.step, row.values["epoch"]) for row in rows if "epoch" in row.values]
        self.x_label = "epoch" if self._epochs else "step"
        self.names = list(dict.fromkeys(name for row in rows for name in row.values))

    def points(self, name: str) -> tuple[list[float], list[float]]:
        found = [(row.step, row.values[name]) for row in self._rows if name in row.values]
        steps, values = [float(step) for step, _ in found], [value for _, value in found]
        return self._positions(steps), values

    def _positions(self, steps: list[float]) -> list[float]:
        if not self._epochs:
            return steps
        import numpy as np

        known = [(0, 0.0), *self._epochs]
        at, epochs = zip(*known, strict=True)
        return [float(x) for x in np.interp(steps, at, epochs)]


def _losses(series: _Series) -> Panel:
    names = [n for n in series.names if re.fullmatch(r"(train|val)_loss(_\w+)?", n)]
    terms = list(dict.fromkeys(name.partition("_")[2] for name in names))
    curves = []
    for name in names:
        split, _, term = name.partition("_")
        curves.append(
            Curve(
                f"{split} {term.removeprefix('loss_')}",
                *series.points(name),
                color=terms.index(term),
                style="solid" if split == "train" else "dashed",
            )
        )
    is_log = _spans_decades(curves)
    return Panel("Loss terms", curves, x_label=series.x_label, is_log=is_log)


def _monitor(series: _Series, monitor: str, mode: str) -> Panel:
    x, y = series.points(monitor)
    if not y:
        return Panel("", ())
    best = (min if mode == "min" else max)(range(len(y)), key=y.__getitem__)
    marks = [Curve(f"best {y[best]:.4g}", [x[best]], [y[best]], color=1)]
    title = f"Monitor {monitor} ({'lower' if mode == 'min' else 'higher'} is better)"
    return Panel(title, [Curve(monitor, x, y)], x_label=series.x_label, marks=marks)


def _groups(series: _Series, prefix: str, title: str, *, is_log: bool) -> Panel:
    names = [name for name in series.names if name.startswith(prefix)]
    curves: list[Curve] = []
    for name in names:
        x, y = series.points(name)
        # A logarithmic axis has no place for a frozen group's zero.
        positive = [(a, b) for a, b in zip(x, y, strict=True) if b > 0 or not is_log]
        if positive:
            label = name.removeprefix(prefix).strip("_") or "total"
            at, values = zip(*positive, strict=True)
            curves.append(Curve(label, at, values, color=len(curves)))
    return Panel(title, curves, x_label=series.x_label, is_log=is_log)


def _spans_decades(curves: Sequence[Curve]) -> bool:
    values = [value for curve in curves for value in curve.y]
    return bool(values) and min(values) > 0 and max(values) > 30 * min(values)

"""Curves as they are drawn."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from medtrain.report.figures import (
    OKABE_ITO,
    Curve,
    Panel,
    draw,
    inline_svg,
    thin_out,
    training_panels,
)
from medtrain.storage.metrics import MetricRow


def rows(*values: dict[str, float]) -> list[MetricRow]:
    return [MetricRow(10 * n, v, 0.0, 1) for n, v in enumerate(values, start=1)]


def test_panels_show_losses_monitor_rates_and_gradients():
    logged = rows(
        *(
            {
                "epoch": float(n),
                "train_loss": 1.0,
                "train_loss_heatmap": 0.5,
                "val_loss": 2.0,
                "val_mre_mm": 5.0 - n,
                "lr_encoder": 1e-5,
                "grad_norm": 3.0,
                "sys_memory_gb": 1.0,
            }
            for n in (1, 2, 3)
        )
    )
    panels = training_panels(logged, monitor="val_mre_mm", mode="min")
    assert [[curve.label for curve in panel.curves] for panel in panels] == [
        ["train loss", "train heatmap", "val loss"],
        ["val_mre_mm"],
        ["encoder"],
        ["total"],
    ]
    losses = panels[0].curves
    assert losses[0].color == losses[2].color != losses[1].color
    assert (losses[0].style, losses[2].style) == ("solid", "dashed")
    [mark] = panels[1].marks
    assert (mark.x, mark.y, mark.label) == ([3.0], [2.0], "best 2")


def test_what_was_not_logged_has_no_panel():
    assert training_panels([], monitor="val_mre_mm", mode="min") == []
    [panel] = training_panels(rows({"train_loss": 1.0}), monitor="val_mre_mm", mode="min")
    assert panel.x_label == "step"


def test_values_between_epochs_stand_between_epochs():
    logged = [
        MetricRow(5, {"train_loss": 3.0}, 0.0, 1),
        MetricRow(10, {"train_loss": 2.0, "epoch": 1.0}, 0.0, 1),
        MetricRow(15, {"train_loss": 1.5}, 0.0, 1),
        MetricRow(20, {"train_loss": 1.0, "epoch": 2.0}, 0.0, 1),
    ]
    [panel] = training_panels(logged, monitor="", mode="min")
    assert list(panel.curves[0].x) == [0.5, 1.0, 1.5, 2.0]


def test_the_best_of_a_monitor_that_grows_is_its_highest():
    panels = training_panels(
        rows({"val_auroc": 0.5}, {"val_auroc": 0.75}, {"val_auroc": 0.625}),
        monitor="val_auroc",
        mode="max",
    )
    assert panels[0].marks[0].y == [0.75]


def test_a_frozen_groups_zero_learning_rate_is_left_out_of_the_logarithm():
    logged = rows({"lr_encoder": 0.0, "lr_head": 1.0}, {"lr_encoder": 0.1, "lr_head": 1.0})
    [panel] = training_panels(logged, monitor="", mode="min")
    assert [list(curve.y) for curve in panel.curves] == [[0.1], [1.0, 1.0]]


def test_thinning_keeps_both_ends_and_every_spike():
    x = [float(n) for n in range(10_000)]
    y = [0.0] * 10_000
    y[0], y[5000], y[5001], y[-1] = 1.0, 99.0, -99.0, 2.0
    kept_x, kept_y = thin_out(x, y, most=100)
    assert len(kept_x) <= 102
    assert (kept_x[0], kept_x[-1]) == (0.0, 9999.0)
    assert max(kept_y) == 99.0
    assert min(kept_y) == -99.0
    assert kept_x == sorted(kept_x)


def test_an_inlined_figure_is_well_formed_named_and_takes_the_pages_color():
    panels = [Panel("Loss <1>", [Curve("a & b", [1, 2], [3, 4]), Curve("c", [1], [2], color=1)])]
    text = inline_svg(draw(panels), label='Curves of "x" < y')
    root = ElementTree.fromstring(text)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == 'Curves of "x" < y'
    assert "width" not in root.attrib
    assert "currentColor" in text
    assert OKABE_ITO[0].lower() in text.lower()
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"Loss <1>", "a & b"} <= set(words)


def test_two_figures_on_a_page_share_no_names():
    def names(values):
        text = inline_svg(draw([Panel("", [Curve("", [1, 2], values)])]), label="")
        root = ElementTree.fromstring(text)
        return {e.attrib["id"] for e in root.iter() if "id" in e.attrib}

    first, second = names([1, 2]), names([2, 1])
    assert first
    assert not first & second


def test_the_same_curves_are_the_same_bytes():
    panels = [Panel("Loss", [Curve("a", [1, 2], [3, 4])])]
    assert draw(panels) == draw(panels)


@pytest.mark.parametrize("values", [[0.25], [0.25, 0.25], [1e-9, 1e9], [3.0, 3.1]])
def test_any_values_can_stand_on_a_logarithmic_axis(values):
    curve = Curve("a", list(range(len(values))), values)
    assert draw([Panel("", [curve], is_log=True)]).startswith(b"<?xml")


def test_png_is_offered_too():
    assert draw([Panel("", [Curve("", [1, 2], [1, 2])])], image_format="png").startswith(b"\x89PNG")


def test_reports_import_no_torch():
    code = (
        "import sys, medtrain.report.page; from medtrain.report.figures import *; "
        "draw([Panel('', [Curve('', [1, 2], [1, 2])])]); "
        "print(sorted({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"

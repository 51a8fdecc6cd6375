"""What flow says and how it names runs."""

import pytest

from medtrain.errors import DataError
from medtrain.flow import EpochLines, told
from medtrain.plans import run_key
from medtrain.recipes import resolve

INPUTS = {
    "verb": "train",
    "config": {"epochs": 1},
    "parents": ["p"],
    "data": "d",
    "weights": {"encoder": "sha256:1"},
    "code": "c",
    "again": 0,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("verb", "evaluate"),
        ("config", {"epochs": 2}),
        ("parents", ["q"]),
        ("data", "e"),
        ("weights", {"encoder": "sha256:2"}),
        ("code", "k"),
        ("again", 1),
    ],
)
def test_every_input_is_part_of_the_run_key(name: str, value: object) -> None:
    key = run_key(**INPUTS)  # type: ignore[arg-type]
    assert len(key) == 32
    assert run_key(**{**INPUTS, name: value}) != key  # type: ignore[arg-type]


def test_order_of_keys_does_not_change_the_run_key() -> None:
    one = run_key(**{**INPUTS, "config": {"a": 1, "b": 2}})  # type: ignore[arg-type]
    other = run_key(**{**INPUTS, "config": {"b": 2, "a": 1}})  # type: ignore[arg-type]
    assert one == other


def test_metric_lines_become_one_line_an_epoch() -> None:
    lines: list[str] = []
    stage = resolve("cephalometric/smoke:baseline").stage
    take = EpochLines(stage, lines.append)
    for line in (
        "starting from scratch",
        "epoch=3.0",
        "train_loss=1.5",
        "lr_encoder=1e-05",
        "val_mre_mm=2.25",
        "epoch_s=4.0",
        "sys_memory_gb=1.0",
        "all epochs are done",
    ):
        take(line)
    assert lines == [
        "starting from scratch",
        "epoch   3/12  train_loss 1.5  val_mre_mm 2.25  epoch_s 4",
        "all epochs are done",
    ]


def test_a_component_tells_its_error_where_a_front_end_listens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @told
    def fail() -> None:
        raise DataError("two\nlines")

    with pytest.raises(DataError):
        fail()
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("MEDTRAIN_LINE_PREFIX", "| ")
    with pytest.raises(DataError):
        fail()
    assert capsys.readouterr().out == "| error: two\n| lines\n"

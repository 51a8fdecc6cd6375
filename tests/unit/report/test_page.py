"""The page of a run: what it says, and what it never does."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medtrain.report.page import cell, render_report, write_report
from medtrain.report.stages import Table, differences
from medtrain.storage.runs import AttemptEnd, Outcome, RunDirectory

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Reads a page as a browser does, and keeps what tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self.banners: list[tuple[str, str]] = []
        self.num_row_headers = 0
        self.feed(text)
        self.close()
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(given)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action") and v]
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.num_row_headers += given.get("scope") == "row"
        if tag == "aside":
            self.banners.append((given["class"] or "", ""))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if "aside" in self.open:
            kind, text = self.banners[-1]
            self.banners[-1] = (kind, text + data)

    def table(self, first_column: str) -> list[list[str]]:
        return next(table for table in self.tables if table[0][0] == first_column)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def text(chain) -> str:
    return render_report(chain.evaluation)


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_page_of_an_evaluation_has_every_section(page):
    assert page.headings == [
        "cephalometric/smoke:multitask",
        "Accepted",
        "Test figures",
        "Per landmark",
        "Pictures",
        "Data",
        "Training",
        "baseline",
        "transformer",
        "multitask",
        "Cases",
        "Resources",
        "Identity",
    ]


def test_nothing_is_loaded_from_elsewhere(text, page):
    assert page.links
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    elsewhere = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert elsewhere <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<script" not in text


def test_texts_from_the_data_are_escaped(chain, text, page):
    assert chain.hostile_case not in text
    assert chain.hostile_case in page.text


def test_synthetic_data_are_said_aloud(page, writer):
    [kind, text] = page.banners[0]
    assert "loud" in kind
    assert text.strip().startswith("Synthetic data. No figure here says anything about patients.")
    real = writer.run(is_synthetic=False)
    assert "Synthetic" not in Page(render_report(real)).text


def test_random_weights_of_an_earlier_stage_are_said_aloud(page):
    assert any("loud" in k and "pretrained: none" in t and "encoder" in t for k, t in page.banners)


def test_starting_from_scratch_on_purpose_is_said_quietly(writer):
    run = writer.run()
    kinds = {text.split(".")[0].strip(): kind for kind, text in Page(render_report(run)).banners}
    assert "loud" not in kinds["pretrained: none"]


def test_model_stands_beside_baseline_floor_and_interval_the_gates_metric_first(page):
    assert page.table("metric") == [
        ["metric", "this model", "confidence interval", "mean positions", "second reader"],
        ["test_mre_mm", "5.25", "4.5 to 6.125 (95%)", "19.5", "2.375"],
        ["test_sdr_2mm", "41.5", "–", "3", "–"],
        ["test_median_mm", "4", "–", "–", "–"],
    ]


def test_figures_of_every_test_split_are_shown(writer):
    run = writer.run(facts={"verb": "evaluate"})
    run.write_outcome(Outcome("done", metrics={"test_mre_mm": 2.0, "test1_mre_mm": 1.0}))
    page = Page(render_report(run))
    assert page.table("metric")[1:] == [["test_mre_mm", "2"], ["test1_mre_mm", "1"]]


def test_gate_tells_bound_value_reason_and_champion(page):
    for words in (
        "test_mre_mm <= 20",
        "better than version 2",
        "champion, version 2 6.5",
        "this model on the same 11 cases 5.5",
        "-1 (-1.75 to -0.25)",
    ):
        assert words in page.text


def test_a_verdict_can_be_handed_over_and_may_know_no_champion(chain):
    verdict = {
        "accepted": False,
        "reason": "too far",
        "metric": "test_mre_mm",
        "value": 5.25,
        "bound": "test_mre_mm <= 2",
        "champion_version": None,
        "champion_value": None,
        "common_value": None,
        "num_cases": 12,
        "difference": None,
    }
    page = Page(render_report(chain.evaluation, verdict=verdict))
    assert "Refused" in page.headings
    assert "champion" not in page.text


def test_tables_of_the_recipe_are_shown_with_one_number_of_decimals_a_column(page):
    table = page.table("landmark")
    assert table[1] == ["Sella", "3.000", "60.00", "–", "0"]
    assert table[2] == ["Nasion", "3.413", "56.70", "1.200", "1"]
    assert "readers differ by 1.5 mm" in page.text


def test_pictures_are_inside_and_have_words(page):
    assert [image["alt"] for image in page.images] == [
        "Film 103: the largest error",
        "worst 1",
        "worst 2",
    ]
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.images)


def test_data_annotator_protocol_counts_and_looks_are_named(page):
    assert "protocol holdout_5fold" in page.text
    assert "ground truth of annotator mean" in page.text
    assert "models that looked at this test split 3" in page.text
    assert page.table("role")[1:] == [
        ["train", "38", "38"],
        ["val", "10", "10"],
        ["test", "12", "12"],
    ]


def test_stages_are_found_through_their_parents_and_drawn(text, page):
    assert text.count('role="img"') == 3
    assert [row[0] for row in page.table("stage")[1:]] == [
        "baseline",
        "transformer",
        "multitask",
    ]


def test_differences_from_the_recipe_and_from_the_stage_before_are_listed(page):
    tables = {tuple(table[0]): table[1:] for table in page.tables}
    assert tables["key", "recipe", "here"] == [["optim.clip_norm", "1.0", "0.5"]]
    changed = {row[0]: row[1:] for row in tables["key", "baseline", "here"]}
    assert changed["model.attention"] == ["none", "spatial"]
    assert changed["losses.ssim.weight"] == ["–", "0.3"]
    assert not any(key.startswith("job") for key in changed)


def test_identity_names_keys_fingerprints_and_versions(page):
    identity = dict(page.table("what")[1:])
    assert identity["run key"] == "e" * 32
    assert identity["run key of baseline"] == "0" * 32
    assert identity["data fingerprint"] == "d" * 64
    assert identity["code fingerprint"] == "c" * 64
    assert identity["commit"] == "abc123"
    assert identity["torch"] == "2.13.0"


def test_resources_leave_out_what_was_not_measured(page):
    table = page.table("run")
    assert table[0] == ["run", "starts", "processes", "hours", "CPU %", "memory GB"]
    assert table[1] == ["baseline", "1", "2", "0.750", "98", "1.500"]
    assert table[-1][0] == "evaluation"


def test_every_table_names_its_rows_for_those_who_hear_it(page):
    assert page.num_row_headers == sum(len(table) - 1 for table in page.tables)


def test_a_training_run_says_that_nobody_looked_at_the_test_split(chain):
    page = Page(render_report(chain.stages[2]))
    assert "Validation figures" in page.headings
    assert "The sealed test split was not looked at." in page.text
    assert page.table("metric")[1] == ["val_mre_mm", "5.1"]
    assert page.headings[-4:] == ["Training", "multitask", "Resources", "Identity"]


def test_a_run_in_its_first_epoch_has_a_page(tmp_path):
    run = RunDirectory.open(str(tmp_path / "run"))
    run.claim_attempt({})
    page = Page(render_report(run))
    assert "Not finished" in page.text
    assert "No metrics yet." in page.text


def test_a_run_in_the_midst_shows_its_best_so_far(writer):
    run = writer.run()
    writer.metrics(run, epochs=4)
    page = Page(render_report(run))
    assert "Not finished" in page.text
    assert page.table("metric")[1][0] == "val_mre_mm"
    assert page.table("stage")[1][:4] == ["baseline", "not finished", "4", "val_mre_mm"]


def test_a_failed_run_says_why(writer):
    run = writer.run()
    run.write_outcome(Outcome("failed", "loss became nan in epoch 3"))
    run.end_attempt(1, AttemptEnd(42, "loss became nan in epoch 3"))
    assert any("loss became nan in epoch 3" in text for _, text in Page(render_report(run)).banners)


def test_the_page_is_stored_in_the_run_directory_and_written_anew(writer):
    run = writer.run()
    run.write_json("tables.json", [{"title": "Per x", "columns": ["x"], "rows": []}])
    where = write_report(run)
    assert where == f"{run.uri}/report.html"
    assert "Per x" in Path(where).read_text()
    run.write_json("tables.json", [])
    write_report(run)
    assert "Per x" not in Path(where).read_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (3, "3"),
        (123456, "123456"),
        (2.0, "2"),
        (0.123456, "0.1235"),
        (12345.6, "12346"),
        (1e-7, "1e-07"),
        (float("nan"), "nan"),
        ("<b>", "<b>"),
    ],
)
def test_cells(value, text):
    assert cell(value) == text


def test_differences_leave_out_name_and_place():
    before = {"name": "a", "job": {"cpu": "1"}, "seed": 1, "losses": {"x": 1}}
    after = {"name": "b", "job": {"cpu": "2"}, "seed": 2, "losses": {"y": None}}
    rows = [["seed", "1", "2"], ["losses.x", "1", "–"], ["losses.y", "–", "null"]]
    assert differences(before, after) == Table("", ["key", "before", "here"], rows)


# the command


def run_command(*arguments: str):
    import typer

    from medtrain.cli.report import report

    app = typer.Typer()
    app.command()(report)
    return CliRunner().invoke(app, arguments)


def test_command_stores_the_page_and_prints_where(writer):
    run = writer.run()
    result = run_command(run.uri)
    assert result.exit_code == 0
    assert result.stdout.strip() == f"{run.uri}/report.html"


def test_command_writes_the_page_elsewhere(writer, tmp_path):
    run = writer.run()
    path = tmp_path / "page.html"
    result = run_command(run.uri, "-o", str(path))
    assert result.stdout.strip() == str(path)
    assert path.read_text().startswith("<!doctype html>")
    assert not run.store.exists("report.html")


def test_command_opens_the_page_where_asked(writer, monkeypatch):
    run = writer.run()
    opened: list[str] = []
    monkeypatch.setattr("typer.launch", opened.append)
    assert run_command(run.uri, "--open").exit_code == 0
    assert opened == [f"{run.uri}/report.html"]


def test_command_refuses_a_folder_that_is_no_run(tmp_path):
    result = run_command(str(tmp_path))
    assert "holds no attempts" in str(result.exception)


def test_help_shows_an_example():
    assert "Example: medtrain report" in " ".join(run_command("--help").stdout.split())

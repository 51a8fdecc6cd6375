import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import seed_table
import typer
import yaml
from typer.testing import CliRunner

from medtrain.config import dump, to_yaml
from medtrain.recipes import recipes, resolve
from medtrain.settings import Settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = yaml.safe_load((ROOT / "tests/unit/seed_commands.yaml").read_text())
ROWS = {
    f"document {document['document']}: {row['says'][:70]}": row
    for document in DOCUMENTS
    for row in [*document["commands"], *document["options"]]
}
ANSWERS = ("run", "stage", "setting", "type", "because")


def rows_with(*keys: str, without: str = "") -> pytest.MarkDecorator:
    chosen = {
        name: row for name, row in ROWS.items() if set(keys) & set(row) and without not in row
    }
    return pytest.mark.parametrize("row", chosen.values(), ids=chosen.keys())


def value_at(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def door() -> Any:
    """The command group of `medtrain`; imported late, for the other tests do not need it."""
    from medtrain.cli import app

    return typer.main.get_command(app)


def test_every_row_has_one_answer() -> None:
    known = {*ANSWERS, "says", "overrides", "gives", "unchanged", "accumulation"}
    for name, row in ROWS.items():
        assert len(set(ANSWERS) & set(row)) == 1, name
        assert set(row) <= known | {"waits_for", "note"}, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["document"])
def test_every_option_of_a_command_line_has_a_row(document: dict[str, Any]) -> None:
    used = {
        option
        for row in document["commands"]
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", row["says"])
    }
    explained = {row["says"].split(" ")[0].partition("=")[0] for row in document["options"]}
    assert used - {option.rstrip(":") for option in explained} == set()


@rows_with("run", "stage")
def test_the_command_resolves_and_means_what_the_table_says(row: dict[str, Any]) -> None:
    name, overrides = row.get("run") or row["stage"], row.get("overrides", [])
    resolution = resolve(name, overrides)
    resolved = dump(resolution.stage)
    gives = row.get("gives", {})
    assert {path: value_at(resolved, path) for path in gives} == gives
    assert {resolution.origins[text.partition("=")[0]] for text in overrides} <= {"override"}
    before = dump(resolve(name).stage)
    has_effect = any(value_at(before, path) != value for path, value in gives.items())
    assert has_effect == (not row.get("unchanged", not gives))
    if "accumulation" in row:
        stage = resolution.stage
        assert stage.batch.accumulation(stage.job.world_size) == row["accumulation"]


@rows_with("setting")
def test_the_setting_is_read_from_the_environment(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in row["setting"].items():
        monkeypatch.setenv(name, value)
        assert str(getattr(Settings(), name.removeprefix("MEDTRAIN_").lower())) == value


@rows_with("waits_for")
def test_what_a_row_waits_for_has_not_arrived(row: dict[str, Any]) -> None:
    kind, name = row["waits_for"].split()
    arrived = recipes() if kind == "system" else door().commands
    assert name not in arrived, f"{name} is here: say in seed_commands.yaml what to type now"


@rows_with("type", without="waits_for")
def test_the_other_command_exists_and_has_the_option(row: dict[str, Any]) -> None:
    program, *rest = row["type"].split()
    assert program in {script.name for script in entry_points(group="console_scripts")}
    if program == "medtrain":
        options = {name for param in door().commands[rest[0]].params for name in param.opts}
        assert {word for word in rest if word.startswith("-")} <= options


def test_a_saved_config_file_can_be_given_back(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(dump(resolve("cephalometric:baseline", ["epochs=7"]).stage)))
    start = "from medtrain.cli import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", start, "show", "cephalometric:baseline", "--config", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^epochs: 7\b", shown.stdout, re.MULTILINE)


def options_with_hyphens(command: Any, path: tuple[str, ...] = ()) -> Iterator[Any]:
    for param in command.params:
        for option in param.opts:
            # Those of the library itself, such as --install-completion, act on the machine.
            if "-" in option.lstrip("-") and param.expose_value:
                yield path, option, param.is_flag
    for name, child in getattr(command, "commands", {}).items():
        yield from options_with_hyphens(child, (*path, name))


def test_options_are_accepted_with_hyphens_and_with_underscores(subtests: pytest.Subtests) -> None:
    """The documents mix both: --batch_size, --classifier-lr."""
    from medtrain.cli import app

    options = list(options_with_hyphens(door()))
    assert options
    for path, option, is_flag in options:
        underscored = "--" + option.removeprefix("--").replace("-", "_")
        with subtests.test(" ".join((*path, underscored))):
            value = [] if is_flag else ["1"]
            result = CliRunner().invoke(app, [*path, underscored, *value, "--help"])
            assert result.exit_code == 0, result.output


def test_the_readme_shows_this_table() -> None:
    readme = (ROOT / "README.md").read_text()
    assert seed_table.replaced(readme) == readme, "run `python .ci/seed_table.py`"

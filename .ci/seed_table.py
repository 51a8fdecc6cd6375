"""Write the README's table of the training documents' commands from seed_commands.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/unit/seed_commands.yaml"
BEGIN, END = "<!-- seed commands: begin -->", "<!-- seed commands: end -->"


def command(row: dict[str, Any]) -> str:
    """What is typed here; empty where nothing is."""
    if "type" in row:
        return str(row["type"])
    if "setting" in row:
        return " ".join(f"{name}={value}" for name, value in row["setting"].items())
    overrides = row.get("overrides", [])
    return " ".join(["medtrain run " + row["run"], *overrides] if "run" in row else overrides)


def render(documents: list[dict[str, Any]]) -> str:
    """The table as Markdown, markers included."""
    return "\n".join([BEGIN, *(line for document in documents for line in _table(document)), END])


def _table(document: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"**Document {document['document']}: {document['title']}**"
    yield ""
    yield "| the document | here | |"
    yield "| --- | --- | --- |"
    for row in [*document["commands"], *document["options"]]:
        here = f"`{command(row)}`" if command(row) else "nothing to type"
        yield "| " + " | ".join((_code(row["says"]), here, _remark(row))).replace("\n", " ") + " |"


def _code(text: str) -> str:
    return f"`{text}`"


def _remark(row: dict[str, Any]) -> str:
    remarks = [str(row[key]) for key in ("note", "because") if key in row]
    if "waits_for" in row:
        kind, name = row["waits_for"].split()
        which = f"the system `{name}`" if kind == "system" else f"`medtrain {name}`"
        remarks.append(f"arrives with {which}")
    return "; ".join(remarks)


def replaced(readme: str) -> str:
    """`readme` with a fresh table between the markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return before + render(yaml.safe_load(DATA.read_text())) + after


def main() -> None:
    """Rewrite the README."""
    readme = ROOT / "README.md"
    readme.write_text(replaced(readme.read_text()))


if __name__ == "__main__":
    main()

"""Report long files and functions: a question to answer, never a failure."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("src", "pipelines", "components", "images", "tests", ".ci")
LONG_FILE, LONG_FUNCTION = 400, 60
"""Lines."""


def report(root: Path) -> Iterator[str]:
    """One line for each file and each function under `root` that is longer than the house's."""
    # `rglob` does not follow links: a linked folder is looked at once, under its own name.
    sources = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    for path in sources:
        text = path.read_text()
        name = path.relative_to(root)
        if (lines := len(text.splitlines())) > LONG_FILE:
            yield f"{name}: {lines} lines. Two jobs?"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LONG_FUNCTION:
                    yield f"{name}:{node.lineno}: {node.name} has {length} lines. Two jobs?"


def main() -> None:
    """Print the report on the repository, or on the folder given."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    questions = list(report(root))
    print("\n".join(questions) or "no long files or functions")


if __name__ == "__main__":
    main()

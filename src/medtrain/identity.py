"""Fingerprints of the code that decides a run's numbers.

Standard library only: the build of a wheel runs this file too.

A fingerprint is the SHA-256 of the parsed source without docstrings, field descriptions and
comments, so that explaining the code better trains nothing anew and changing a line of it does.
The parse tree differs between Python's minor versions: the launcher and the image must share one,
or the image's wheel must carry the fingerprints made when it was built (`_fingerprints.json`).
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ENGINE_FOLDERS = ("train", "data")
"""Folders of this package whose every line may decide a number."""
JUDGING_MODULES = ("stats.py",)
"""What the verbs that judge use on top."""
DESCRIBED_BY_CONFIG = ("config.py", "rules.py")
"""Modules of a recipe whose effect the resolved configuration says already."""
DECIDING_LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "monai",
    "numpy",
    "scipy",
    "scikit-learn",
    "pillow",
    "nibabel",
)
"""Libraries whose pinned versions decide numbers."""


def fingerprints(package_root: Path) -> dict[str, str]:
    """Fingerprints of the parts of a package: engine, judging modules, pins, each recipe."""
    parts = {
        "engine": _hash(
            (source.relative_to(package_root).as_posix(), source)
            for folder in ENGINE_FOLDERS
            for source in sorted((package_root / folder).rglob("*.py"))
        ),
        "judging": _hash((name, package_root / name) for name in JUDGING_MODULES),
        "pins": _pins(package_root / "constraints.txt"),
    }
    for folder in sorted((package_root / "recipes").iterdir()):
        if (folder / "config.py").is_file():
            parts[f"recipes/{folder.name}"] = fingerprint_recipe(folder)
    return parts


def fingerprint_recipe(folder: Path) -> str:
    """Fingerprint of a recipe's package, without what its configuration says already."""
    return _hash(
        (source.relative_to(folder).as_posix(), source)
        for source in sorted(folder.rglob("*.py"))
        if source.name not in DESCRIBED_BY_CONFIG
    )


def code_fingerprint(package: str, *, judges: bool) -> str:
    """Fingerprint of all code that decides the numbers of a run.

    Args:
        package: Import path of the recipe's package, ours or a user's own.
        judges: Whether the verb also uses the statistics.
    """
    ours = _installed_fingerprints()
    name = "recipes/" + package.rpartition(".")[2]
    recipe = ours[name] if package == f"medtrain.recipes.{name[8:]}" else _foreign(package)
    parts = [ours["engine"], ours["pins"], recipe, *([ours["judging"]] if judges else [])]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@cache
def _installed_fingerprints() -> dict[str, str]:
    root = Path(__file__).parent
    made_by_build = root / "_fingerprints.json"
    if made_by_build.is_file():
        parts = json.loads(made_by_build.read_text())
        return {str(name): str(value) for name, value in parts.items()}
    return fingerprints(root)


@cache
def _foreign(package: str) -> str:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"recipe package '{package}' is not importable")
    return fingerprint_recipe(Path(spec.submodule_search_locations[0]))


def _hash(sources: Iterator[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in sources:
        if path.is_file():
            tree = ast.parse(path.read_bytes())
            _strip_texts(tree)
            digest.update(f"{name}\0{ast.dump(tree)}\0".encode())
    return digest.hexdigest()


def _strip_texts(tree: ast.Module) -> None:
    """Remove docstrings and the sentences beneath fields, which are expressions of text alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [
                statement
                for statement in node.body
                if not (
                    isinstance(statement, ast.Expr)
                    and isinstance(statement.value, ast.Constant)
                    and isinstance(statement.value.value, str)
                )
            ]


def _pins(constraints: Path) -> str:
    if not constraints.is_file():
        return "no pins"
    versions = dict(re.findall(r"^([\w.-]+)==([\w.+-]+)$", constraints.read_text(), re.MULTILINE))
    normal = {name.lower().replace("_", "-"): version for name, version in versions.items()}
    return ",".join(f"{name}=={normal.get(name, 'unpinned')}" for name in DECIDING_LIBRARIES)

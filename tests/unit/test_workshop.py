"""The workshop itself: what is shipped, what is written in the README, what may import what."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import grimp
import pytest
import sizes
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from medtrain.identity import DECIDING_LIBRARIES, fingerprints

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "medtrain"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()
HEAVY = {"torch", "torchvision", "timm", "monai", "transformers"}


def run(*argv: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, argv)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


# What is shipped


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from: builds leave files behind."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "pipelines", "components"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheels(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel built straight from the tree, and one built from an sdist of it; both unpacked."""
    unpacked = {}
    for way, options in {"tree": ["--wheel"], "sdist": []}.items():
        place = tmp_path_factory.mktemp(way)
        source = shutil.copytree(tree, place / "source", symlinks=True)
        built = run(sys.executable, "-m", "build", "--no-isolation", *options, source)
        assert built.returncode == 0, built.stdout + built.stderr
        (wheel,) = (source / "dist").glob("*.whl")
        unpacked[way] = place / "unpacked"
        zipfile.ZipFile(wheel).extractall(unpacked[way])
    return unpacked


def files_of(folder: Path) -> dict[str, bytes]:
    """Files by name, those in linked folders too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for parent, _, names in os.walk(folder, followlinks=True)
        for path in (Path(parent) / name for name in names)
        if "__pycache__" not in parent
    }


def test_a_wheel_is_the_same_through_the_sdist_and_from_the_tree(wheels: dict[str, Path]) -> None:
    assert files_of(wheels["sdist"] / "medtrain") == files_of(wheels["tree"] / "medtrain")


@pytest.mark.parametrize("way", ["tree", "sdist"])
def test_a_wheel_holds_every_file_of_the_package(
    tree: Path, wheels: dict[str, Path], way: str
) -> None:
    wanted = {name for name in files_of(tree / "src/medtrain") if not name.endswith("README.md")}
    assert wanted >= {"py.typed", "constraints.txt", "pipelines/__init__.py"}
    missing = wanted - files_of(wheels[way] / "medtrain").keys()
    assert not missing, "name them in [tool.setuptools.package-data]"


def test_pipelines_and_components_are_importable_from_a_wheel(wheels: dict[str, Path]) -> None:
    program = (
        "import importlib, pkgutil, medtrain\n"
        "for room in ('medtrain.pipelines', 'medtrain.components'):\n"
        "    package = importlib.import_module(room)\n"
        "    for module in pkgutil.iter_modules(package.__path__, room + '.'):\n"
        "        print(importlib.import_module(module.name).__file__)\n"
    )
    done = run(sys.executable, "-c", program, cwd=wheels["tree"], PYTHONPATH=str(wheels["tree"]))
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert all(line.startswith(str(wheels["tree"])) for line in done.stdout.splitlines())


def test_a_wheel_carries_the_fingerprints_of_its_code(tree: Path, wheels: dict[str, Path]) -> None:
    made = json.loads((wheels["sdist"] / "medtrain" / "_fingerprints.json").read_text())
    assert made == fingerprints(tree / "src/medtrain")
    assert not (SOURCE / "_fingerprints.json").exists(), "a checkout must compute them"


# What it is made of


def pins() -> dict[str, str]:
    lines = (SOURCE / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def declared() -> list[Requirement]:
    """What pyproject.toml asks for, the extras of ours resolved."""
    extras = PROJECT["project"]["optional-dependencies"]
    texts = [
        *PROJECT["project"]["dependencies"],
        *(text for extra in extras.values() for text in extra),
    ]
    return [r for r in map(Requirement, texts) if r.name != "medtrain"]


def requirements_of(requirement: Requirement) -> Iterator[Requirement]:
    extras = requirement.extras or {""}
    for text in distribution(requirement.name).requires or ():
        child = Requirement(text)
        if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras):
            yield child


def test_every_library_that_gets_installed_is_pinned() -> None:
    pinned = {canonicalize_name(name) for name in pins()}
    queue, seen, missing = declared(), set[str](), set[str]()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        # A CUDA build of torch brings its own libraries, each fixed by torch itself.
        if str(requirement) in seen or name.startswith(("nvidia-", "cuda-", "triton")):
            continue
        seen.add(str(requirement))
        if name not in pinned:
            missing.add(name)
        else:
            queue += requirements_of(requirement)
    assert not missing, "run `make freeze`"


def test_pins_are_plain_versions_that_resolve_everywhere() -> None:
    for name, version in pins().items():
        assert re.fullmatch(r"\d[\w.]*", version), f"{name}=={version}"
    assert not {"medtrain", "pip"} & pins().keys()
    assert set(DECIDING_LIBRARIES) <= {canonicalize_name(name) for name in pins()}


def test_pins_satisfy_the_ranges_of_the_project() -> None:
    versions = {canonicalize_name(name): version for name, version in pins().items()}
    for requirement in declared():
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), str(requirement)


def imported_libraries(folder: Path) -> dict[str, str]:
    """Top-level names of what is imported → a file that does."""
    found = {}
    for name, content in files_of(folder).items():
        for node in ast.walk(ast.parse(content)) if name.endswith(".py") else ():
            if isinstance(node, ast.Import):
                found.update({alias.name.partition(".")[0]: name for alias in node.names})
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found[node.module.partition(".")[0]] = name
    return found


@pytest.mark.parametrize("folder", ["src", "tests"])
def test_every_imported_library_is_declared(folder: str) -> None:
    direct = declared()
    names = {canonicalize_name(r.name) for r in direct}
    names |= {canonicalize_name(c.name) for r in direct if r.extras for c in requirements_of(r)}
    providers = packages_distributions()
    ours = {"medtrain", *(path.stem for path in (ROOT / ".ci").glob("*.py"))}
    ours |= {path.stem for path in (ROOT / "tests").rglob("*")}
    undeclared = {
        library: file
        for library, file in imported_libraries(ROOT / folder).items()
        if library not in ours
        and library not in sys.stdlib_module_names
        and not names & {canonicalize_name(name) for name in providers.get(library, [])}
    }
    assert not undeclared, "name them in pyproject.toml"


# What may import what


def test_the_layers_hold() -> None:
    done = run(Path(sys.executable).parent / "lint-imports", "--no-cache", NO_COLOR="1")
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("medtrain", include_external_packages=True, cache_dir=None)


def test_every_module_belongs_to_the_control_plane_or_to_the_data_plane(
    graph: grimp.ImportGraph,
) -> None:
    contracts = {c["name"]: c for c in PROJECT["tool"]["importlinter"]["contracts"]}
    (control,) = (c["source_modules"] for n, c in contracts.items() if n.startswith("The control"))
    (data,) = (
        c["allowed_importers"] for n, c in contracts.items() if n.startswith("Only the data")
    )

    def expand(patterns: list[str]) -> set[str]:
        tops = {name for pattern in patterns for name in graph.find_matching_modules(pattern)}
        return tops | {child for top in tops for child in graph.find_descendants(top)}

    assert not expand(control) & expand(data)
    ours = {name for name in graph.modules if name.partition(".")[0] == "medtrain"}
    unnamed = ours - expand(control) - expand(data)
    # A package with modules of both planes cannot be named itself; its __init__ stays torch-free.
    mixed = {name for name in unnamed if graph.find_children(name)}
    assert not unnamed - mixed, "name them in the contracts of pyproject.toml"
    for name in mixed:
        for heavy in HEAVY & graph.modules:
            assert graph.find_shortest_chain(importer=name, imported=heavy) is None, (name, heavy)


# How fast it opens


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["recipes"],
        ["show", "cephalometric:transformer"],
        ["doctor", "cephalometric"],
        ["run", "--help"],
    ],
    ids=" ".join,
)
def test_a_quick_command_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    start = "from medtrain.cli import main; main()"
    done = run(sys.executable, "-X", "importtime", "-c", start, *arguments, cwd=tmp_path)
    imports = re.findall(r"^import time:.*\|(.*)$", done.stderr, re.MULTILINE)
    assert done.returncode == 0, re.sub(r"^import time:.*\n", "", done.stderr, flags=re.MULTILINE)
    imported = {name.strip() for name in imports}
    assert "medtrain.cli" in imported
    slow = {*HEAVY, "mlflow", "kfp", "kubernetes", "boto3", "google.cloud", "matplotlib", "scipy"}
    slow |= {"pandas", "sklearn", "tensorboard", "wandb"}
    assert not slow & imported


# What the README and the other front doors say


def mapped_paths() -> set[str]:
    """The paths in the README's map: indentation nests, two blanks end the names of a line."""
    (block,) = re.findall(r"## Map\n.*?```\n(.*?)```", README, re.DOTALL)
    paths, parents = set(), [""]
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        del parents[depth + 1 :]
        names = re.split(r"  +", line.strip())[0].split()
        paths |= {parents[depth] + name for name in names}
        parents.append(parents[depth] + names[-1])
    return paths


def test_every_path_on_the_map_exists() -> None:
    paths = mapped_paths()
    assert len(paths) > 20
    for path in paths:
        # A folder without a file is not in a fresh clone.
        found = files_of(ROOT / path) if path.endswith("/") else (ROOT / path).exists()
        assert found, path


def test_every_room_is_on_the_map() -> None:
    made_by_use = {"build", "dist", "medtrain-local", "__pycache__"}
    rooms = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir()}
    rooms -= {f"{name}/" for name in made_by_use}
    rooms = {name for name in rooms if not name.startswith(".")} | {".ci/", ".github/workflows/"}
    rooms |= {
        f"src/medtrain/{path.name}" + ("/" if path.is_dir() else "")
        for path in SOURCE.iterdir()
        if not path.name.startswith("_") and path.name not in made_by_use
    }
    rooms -= {"src/", "shared/"}
    assert rooms - mapped_paths() == set()


def test_every_folder_explains_itself_on_one_screen() -> None:
    for room in ("pipelines", "components", "images", "k8s", "charts", "tests"):
        lines = (ROOT / room / "README.md").read_text().splitlines()
        assert 3 <= len(lines) <= 50, room


def test_the_readme_lists_the_commands_that_make_lists() -> None:
    listed = set(re.findall(r"^  make (\w+)", run("make", "help").stdout, re.MULTILINE))
    assert listed >= {"setup", "demo", "test", "integration", "check", "bench", "clean"}
    assert set(re.findall(r"`make (\w+)", README)) == listed


def test_commit_hooks_run_what_make_check_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = hooks["repos"]
    in_hooks = {hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    planned = run("make", "--always-make", "-n", "check", "-o", "setup").stdout
    in_make = {
        line.removeprefix(".venv/bin/").removesuffix(" .").strip()
        for line in planned.splitlines()
        if line.startswith(".venv/bin/") and "pip install" not in line and ".ci/" not in line
    }
    assert in_hooks == in_make


@pytest.mark.parametrize(
    ("tests", "pytest_exits_with", "code", "said"),
    [([], 0, 0, "no tests in"), (["test_a.py"], 5, 0, "was selected"), (["test_a.py"], 1, 2, "")],
    ids=["no tests yet", "none selected", "a failure"],
)
def test_a_tier_without_tests_says_so_and_a_failing_one_fails(
    tmp_path: Path, tests: list[str], pytest_exits_with: int, code: int, said: str
) -> None:
    for name in ("pyproject.toml", "setup.py", "src/medtrain/constraints.txt", *(
        f"tests/integration/{test}" for test in tests
    ), ".venv/bin/python", ".venv/.installed"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {pytest_exits_with}\n")
    (tmp_path / ".venv/bin/python").chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    done = run("make", "integration", cwd=tmp_path)
    assert (done.returncode, said in done.stdout) == (code, True), done.stdout + done.stderr


def test_long_files_and_functions_are_reported_and_do_not_fail(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    body = "\n".join(f"    x{n} = {n}" for n in range(60))
    (tmp_path / "src/long.py").write_text(f"def short():\n    pass\n\n\ndef long():\n{body}\n")
    (tmp_path / "src/longer.py").write_text("x = 1\n" * 401)
    reported = list(sizes.report(tmp_path))
    assert [line.partition(" ")[0] for line in reported] == ["src/long.py:5:", "src/longer.py:"]
    assert run(sys.executable, ".ci/sizes.py", tmp_path).returncode == 0

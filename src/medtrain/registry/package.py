"""The model package: a folder that holds all that a trained model is, readable without this
project.

    model.safetensors   the weights
    config.yaml         the resolved configuration of the last stage
    split.csv           every case that the model was fitted on, chosen by or tested on
    metrics.json        metrics on the sealed test split
    model.json          what the model is and what it was made from
    README.md           the model card, made from the files above
    SHA256SUMS          `sha256sum -c SHA256SUMS` checks the rest

Nothing in it runs code when it is loaded.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medtrain.errors import RegistryError
from medtrain.storage.uri import sha256_of

FORMAT = 1
"""Raised when a reader of today could not read the package of tomorrow."""

SUMS = "SHA256SUMS"
WEIGHTS = "model.safetensors"
CONTENT = (WEIGHTS, "config.yaml", "split.csv", "metrics.json", "model.json", "README.md")
"""Every file but the sums; a package has these and no others."""

REQUIRED_DETAILS = (
    "system",
    "variant",
    "stage",
    "run_key",
    "data_fingerprint",
    "code_fingerprint",
    "commit",
    "is_synthetic",
    "pretrained",
)
"""What `model.json` says of every model. `run_key` is that of the run that trained it."""

_SUM_LINE = re.compile(r"(?P<sha256>[0-9a-f]{64})  (?P<name>.+)")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_MAX_HEADER_BYTES = 100_000_000
"""The limit of safetensors' own reader."""
_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
}


@dataclass(frozen=True)
class Package:
    """A package that was verified."""

    folder: Path
    details: Mapping[str, Any]
    """Content of `model.json`."""
    digest: str
    """SHA-256 of `SHA256SUMS`: equal for equal packages, and for no others."""

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.folder / WEIGHTS

    def read_text(self, name: str) -> str:
        """One of the text files."""
        return (self.folder / name).read_text(encoding="utf-8")


def write_package(
    folder: Path,
    *,
    weights: Path,
    config_yaml: str,
    split_csv: str,
    metrics: Mapping[str, float],
    card: str,
    details: Mapping[str, Any],
) -> Package:
    """Write a package into `folder`, which must not exist or be empty, and verify it.

    Args:
        folder: Where; its files get mode 0644.
        weights: A safetensors file; copied.
        config_yaml: The resolved configuration.
        split_csv: A split table with every case that the model and the stages before it were
            fitted on (`train`), chosen by (`val`) and tested on, with today's groups.
        metrics: Finite values on the sealed test split.
        card: Markdown, what the model is for and what it cannot do; results, data and provenance
            are added from the other arguments.
        details: `REQUIRED_DETAILS`, and the task's own such as the names of landmarks; JSON types.
    """
    _check_details(details, where="details of a model")
    unusable = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    if unusable:
        raise RegistryError(f"metrics of a model must be finite, but {', '.join(unusable)} is not")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise RegistryError(f"{folder} must be empty to take a model package, but is not")
    model = {"format": FORMAT, "medtrain_version": version("medtrain"), **details}
    texts = {
        "config.yaml": config_yaml,
        "split.csv": split_csv,
        "metrics.json": _to_json(dict(metrics)),
        "model.json": _to_json(model),
        "README.md": render_card(model, metrics=metrics, split_csv=split_csv, card=card),
    }
    shutil.copyfile(weights, folder / WEIGHTS)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    sums = "".join(f"{sha256_of(folder / name)}  {name}\n" for name in sorted(CONTENT))
    (folder / SUMS).write_text(sums, encoding="utf-8", newline="")
    for name in (*CONTENT, SUMS):
        (folder / name).chmod(0o644)
    return verify_package(folder)


def verify_package(folder: Path) -> Package:
    """Check that `folder` is a whole, unchanged package that no reader can be harmed by.

    Raises:
        RegistryError: A file is missing, additional, changed, no plain file, or not what it
            should be.
    """
    if not folder.is_dir():
        raise RegistryError(
            f"{folder} must be the folder of a pulled model, but is none. Get one: "
            "medtrain models pull NAME@candidate FOLDER"
        )
    if not (folder / SUMS).exists():
        raise RegistryError(
            f"{folder} must be the folder of a pulled model, but has no {SUMS}. Get one: "
            "medtrain models pull NAME@candidate FOLDER"
        )
    _check_names(folder)
    for name, expected in _read_sums(folder).items():
        actual = sha256_of(folder / name)
        if actual != expected:
            raise RegistryError(
                f"{folder / name} must have SHA-256 {expected[:12]}…, but has {actual[:12]}…: it "
                "was changed or damaged. Fetch the package again."
            )
    for name in CONTENT:
        if name != WEIGHTS:
            _read_text(folder / name)
    check_safetensors(folder / WEIGHTS)
    path = folder / "model.json"
    details = parse_details(_read_text(path), where=str(path))
    digest = hashlib.sha256((folder / SUMS).read_bytes()).hexdigest()
    return Package(folder, details, digest)


def _check_names(folder: Path) -> None:
    wanted = {*CONTENT, SUMS}
    entries = {entry.name: entry for entry in folder.iterdir()}
    for name, entry in sorted(entries.items()):
        if entry.is_symlink() or not entry.is_file():
            raise RegistryError(f"{entry} must be a plain file, but is none")
        if name not in wanted:
            raise RegistryError(
                f"{folder} must hold a model package and nothing else, but holds '{name}' too"
            )
    missing = sorted(wanted - set(entries))
    if missing:
        raise RegistryError(f"{folder} must hold {', '.join(missing)} to be a model package")


def _read_sums(folder: Path) -> dict[str, str]:
    sums: dict[str, str] = {}
    for line in _read_text(folder / SUMS).splitlines():
        match = _SUM_LINE.fullmatch(line)
        if not match or match["name"] not in CONTENT or match["name"] in sums:
            raise RegistryError(
                f"{folder / SUMS} must name each file of a package once, but says '{line[:120]}'"
            )
        sums[match["name"]] = match["sha256"]
    missing = sorted(set(CONTENT) - set(sums))
    if missing:
        raise RegistryError(f"{folder / SUMS} must name {', '.join(missing)}, but does not")
    return sums


def parse_details(text: str, *, where: str) -> dict[str, Any]:
    """The content of a `model.json`; a RegistryError, which names it as `where`, where it is
    none."""
    try:
        details = json.loads(text)
    except ValueError as error:
        raise RegistryError(f"{where} must be JSON, but is not ({error})") from error
    if not isinstance(details, dict) or not isinstance(details.get("format"), int):
        raise RegistryError(f"{where} must be an object with a number 'format', but is none")
    if details["format"] > FORMAT:
        raise RegistryError(
            f"{where} has format {details['format']}, but this medtrain reads up to {FORMAT}. "
            "Update medtrain."
        )
    _check_details(details, where=where)
    return details


def _check_details(details: Mapping[str, Any], *, where: str) -> None:
    missing = [name for name in REQUIRED_DETAILS if name not in details]
    if missing:
        raise RegistryError(f"{where} must have {', '.join(missing)}, but has not")
    for name in ("system", "variant", "stage", "run_key"):
        if not _NAME.fullmatch(str(details[name])):
            raise RegistryError(
                f"{where}: {name} must be letters, digits, - and _, but is {details[name]!r}"
            )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RegistryError(f"{path} must be text in UTF-8, but is not") from error


def check_safetensors(path: Path) -> None:
    """Check the header of a safetensors file against the file's size, without reading tensors.

    Raises:
        RegistryError: The header is not one, or its tensors do not fill the file exactly.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise RegistryError(
                f"{path} must be safetensors, but its header would be {length} bytes of a file of "
                f"{size}. Pickles and archives are not taken."
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        spans = sorted(_span(path, name, header[name]) for name in header if name != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RegistryError(f"{path} must have a safetensors header, but has none") from error
    end = 0
    for start, stop in spans:
        if start != end:
            raise RegistryError(f"{path} must hold tensors one after the other, but does not")
        end = stop
    if end != size - 8 - length:
        raise RegistryError(
            f"{path} must hold {end} bytes of tensors, but holds {size - 8 - length}"
        )


def _span(path: Path, name: str, tensor: Mapping[str, Any]) -> tuple[int, int]:
    start, stop = (int(offset) for offset in tensor["data_offsets"])
    shape = [int(side) for side in tensor["shape"]]
    bits = _BITS.get(tensor["dtype"])
    if bits is None or min(shape, default=0) < 0 or stop - start != math.prod(shape) * bits // 8:
        raise RegistryError(
            f"{path}: tensor '{name}' must fill its bytes, but {tensor['dtype']} {shape} does not "
            f"fill {stop - start}"
        )
    return start, stop


def render_card(
    details: Mapping[str, Any], *, metrics: Mapping[str, float], split_csv: str, card: str
) -> str:
    """The model card as Markdown; every number in it comes from the arguments."""
    title = (
        details["system"]
        if details["variant"] == "default"
        else f"{details['system']}/{details['variant']}"
    )
    lines = [f"# {title}", ""]
    if details["is_synthetic"]:
        lines += [
            "> **Trained and tested on SYNTHETIC data.** Generated images, no patients: this model",
            "> shows that the software works. It must never be used for a person.",
            "",
        ]
    lines += [card.strip(), ""] if card.strip() else []
    lines += ["## Results on the sealed test split", "", "| metric | value |", "|---|---|"]
    lines += [f"| {name} | {value:.6g} |" for name, value in sorted(metrics.items())]
    roles = Counter(row["role"] for row in csv.DictReader(io.StringIO(split_csv)))
    lines += ["", "## Data", "", "| role | cases |", "|---|---|"]
    lines += [f"| {role} | {count} |" for role, count in sorted(roles.items())]
    lines += ["", "Each case with its group and checksum is in `split.csv`.", ""]
    lines += ["## Where it comes from", "", "| | |", "|---|---|"]
    lines += [
        f"| {label} | {_cell(details[name])} |"
        for label, name in (
            ("stage", "stage"),
            ("run", "run_key"),
            ("synthetic data", "is_synthetic"),
            ("data fingerprint", "data_fingerprint"),
            ("code fingerprint", "code_fingerprint"),
            ("commit", "commit"),
            ("medtrain", "medtrain_version"),
            ("pretrained weights", "pretrained"),
        )
    ]
    lines += [
        "",
        "## Use without medtrain",
        "",
        "`sha256sum -c SHA256SUMS` checks the files. The weights are plain safetensors:",
        "",
        "```python",
        'from safetensors.torch import load_file; state = load_file("model.safetensors")',
        "```",
        "",
        "`config.yaml` says how the network is built, `model.json` what its outputs mean.",
    ]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "**yes**" if value else "no"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return f"`{text}`" if text not in ("", "{}") else "none"


def _to_json(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise RegistryError(f"details of a model must be finite JSON types ({error})") from error

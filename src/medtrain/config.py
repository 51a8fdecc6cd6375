"""What a training run is: the typed, frozen description of one stage, and the words that override
it.

A `StageConfig` holds the science of a run and, in `job`, where and how fast it runs. Only the
science is part
of a run's identity: `identity()` leaves out `job` and every field declared with `location()`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from medtrain.errors import ConfigError

# ----------------------------------------------------------------------------------------------
# building blocks

NAME_PATTERN = r"^[a-z0-9_]+$"
"""Names of metrics, loss terms, parameter groups and criteria: Katib's collector reads no other
characters."""

Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class Section(BaseModel):
    """A frozen part of a configuration; unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        coerce_numbers_to_str=True,
        validate_default=True,
    )


def location(default: Any = ..., **kwargs: Any) -> Any:
    """Declare a field that says *where* something is, not *what* it is: it is left out of a run's
    identity."""
    return Field(default, json_schema_extra={"hashed": False}, **kwargs)


@dataclass(frozen=True)
class Duration:
    """A stretch of training, in epochs, optimizer steps or as a fraction of the stage."""

    amount: float
    unit: Literal["epochs", "steps", "fraction"]

    def __str__(self) -> str:
        if self.unit == "fraction":
            return f"{self.amount * 100:g}%"
        return f"{self.amount:g}{self.unit}"

    def in_steps(self, *, steps_per_epoch: int, total_steps: int) -> int:
        """The number of optimizer steps that this duration covers, rounded to the nearest."""
        scale = {"epochs": steps_per_epoch, "steps": 1, "fraction": total_steps}[self.unit]
        return round(self.amount * scale)


_DURATION = re.compile(r"(?P<amount>\d+(?:\.\d+)?) ?(?P<unit>%|epochs?|steps?)")


def _parse_duration(value: object) -> Duration:
    if isinstance(value, Duration):
        return value
    match = _DURATION.fullmatch(str(value))
    if not match:
        raise ValueError("must be a duration such as 5epochs, 500steps or 10%")
    amount, unit = float(match["amount"]), match["unit"]
    if unit == "%":
        return Duration(amount / 100, "fraction")
    return Duration(amount, "epochs" if unit.startswith("epoch") else "steps")


DurationField = Annotated[
    Duration, BeforeValidator(_parse_duration), PlainSerializer(str, return_type=str)
]

#
#
#


class Init(Section):
    """What the weights of a stage start from."""

    source: Literal["scratch", "pretrained", "stage"] = Field("scratch", alias="from")
    """`scratch`, `pretrained` (weights named in `model`), or `stage` (the best checkpoint of an
    earlier stage)."""
    stage: str | None = None
    """With `from: stage`: the earlier stage's name."""
    new_parts: tuple[str, ...] = ()
    """With `from: stage`: patterns of the parameters that only this stage has; any other missing
    one is an error."""
    dropped_parts: tuple[str, ...] = ()
    """With `from: stage`: patterns of the parameters that only the earlier stage has; any other is
    an error."""

    @model_validator(mode="after")
    def _stage_goes_with_source(self) -> Self:
        if (self.source == "stage") != (self.stage is not None):
            raise ValueError(
                "init.stage names the earlier stage if, and only if, init.from is 'stage'"
            )
        if (self.new_parts or self.dropped_parts) and self.source != "stage":
            raise ValueError(
                "init.new_parts and init.dropped_parts have a meaning only with init.from=stage"
            )
        return self


class Weights(Section):
    """Pretrained weights: what they are, where a copy lies, and whether training may do without
    them."""

    hub_id: str | None = None
    """The id on the model hub, such as `timm/efficientnet_b3.ra2_in1k`."""
    file: str | None = location(None)
    """A local file or folder, or an `s3://` or `gs://` URI; tried before anything else."""
    allow_random_init: bool = False
    """Start from random weights when none are found. Said aloud in the log and in every report."""


class Data(Section):
    """Which cases a run uses. Recipes add what their data need."""

    root: str = location("")
    """Folder or `s3://`, `gs://` URI of the raw data set, in its published layout."""
    name: str | None = location(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the data set's home under the storage root, where membership of splits is kept;
    default: from `root`."""
    protocol: Name = "holdout_5fold"
    """How cases are divided; the recipe says which protocols it knows."""
    fold: int = Field(0, ge=0)
    """With a k-fold protocol: the fold used for validation."""


class Batch(Section):
    """Cases per optimizer step, and per forward pass of one process."""

    global_: int = Field(8, alias="global", ge=1)
    micro: int = Field(4, ge=1)

    def accumulation(self, world_size: int) -> int:
        """Forward passes per optimizer step and process; a ConfigError where `global` does not
        divide."""
        per_pass = self.micro * world_size
        if self.global_ % per_pass:
            allowed = [
                n for n in range(1, self.global_ + 1) if self.global_ % (n * world_size) == 0
            ]
            advice = (
                f"Set batch.micro to one of {allowed}, or another batch.global."
                if allowed
                else f"Set batch.global to a multiple of {world_size}."
            )
            raise ConfigError(
                f"batch.global={self.global_} must be a whole multiple of batch.micro={self.micro} "
                f"x {world_size} processes = {per_pass}. {advice}"
            )
        return self.global_ // per_pass


class Warmup(Section):
    """Every schedule may begin with a linear warm-up."""

    warmup: DurationField = Duration(0, "epochs")
    warmup_from: float = Field(0.0, ge=0.0, le=1.0)
    """Learning rate at the first step, as a part of the group's `lr`."""


class ConstantSchedule(Warmup):
    """The group's learning rate throughout (after the warm-up, if any)."""

    kind: Literal["constant"] = "constant"


class CosineSchedule(Warmup):
    """Half a cosine from the group's learning rate down to `floor` of it, reached at the end of
    the stage."""

    kind: Literal["cosine"] = "cosine"
    floor: float = Field(0.0, ge=0.0, le=1.0)


class CosineRestartsSchedule(Warmup):
    """Cosines that start again: cycles of `first`, `first` x `factor`, ..."""

    kind: Literal["cosine_restarts"] = "cosine_restarts"
    first: DurationField
    factor: int = Field(1, ge=1)
    floor: float = Field(0.0, ge=0.0, le=1.0)


class PlateauSchedule(Warmup):
    """Multiply by `factor` when the stage's monitor has not improved for `patience` validations."""

    kind: Literal["plateau"] = "plateau"
    factor: float = Field(0.5, gt=0.0, lt=1.0)
    patience: int = Field(15, ge=0)
    floor: float = Field(0.0, ge=0.0, le=1.0)


Schedule = Annotated[
    ConstantSchedule | CosineSchedule | CosineRestartsSchedule | PlateauSchedule,
    Field(discriminator="kind"),
]


class ParamGroup(Section):
    """Parameters that share a learning rate. The first group whose pattern matches owns a
    parameter."""

    match: tuple[str, ...]
    """Patterns (`*`, `?`) of parameter names of the model, such as `encoder.*`."""
    lr: float | None = Field(..., ge=0.0)
    """Learning rate; `null` freezes the group and keeps wholly frozen modules in `eval()`."""
    weight_decay: float | None = Field(None, ge=0.0)
    """Weight decay; `null` takes `optim.weight_decay`."""
    starts_epoch: int = Field(1, ge=1)
    """Frozen before this epoch of the stage (1-based)."""
    schedule: Schedule | None = None
    """Schedule; `null` takes `optim.schedule`."""


class Optim(Section):
    """The optimizer and its parameter groups."""

    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0.0)
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    """For `sgd`."""
    weight_decay: float = Field(1e-4, ge=0.0)
    decay_norm_and_bias: bool = False
    """Whether weight decay also acts on biases and normalisation weights (parameters of one
    dimension)."""
    clip_norm: float | None = Field(None, gt=0.0)
    """Largest total gradient norm, over all groups; `null` does not clip."""
    schedule: Schedule = ConstantSchedule()
    groups: Mapping[Name, ParamGroup]


class LossTerm(Section):
    """Weight and time of one term that the task returns."""

    weight: float = Field(1.0, ge=0.0)
    starts_epoch: int = Field(1, ge=1)
    ends_epoch: int | None = Field(None, ge=1)
    """The term is out from this epoch on; `null`: never."""

    def is_active(self, epoch: int) -> bool:
        """Whether the term counts in this epoch of the stage (1-based)."""
        return self.starts_epoch <= epoch and (self.ends_epoch is None or epoch < self.ends_epoch)


class FixedWeighting(Section):
    """Loss terms keep the weights of `losses`."""

    kind: Literal["fixed"] = "fixed"


class Criterion(Section):
    """A metric by which a best checkpoint is kept. A metric `val_ema_…` keeps the averaged
    weights."""

    metric: Name
    mode: Literal["min", "max"]

    def is_better(self, value: float, best: float | None, *, min_delta: float = 0.0) -> bool:
        """Whether `value` improves on `best` by more than `min_delta`."""
        if best is None:
            return True
        return value < best - min_delta if self.mode == "min" else value > best + min_delta


class Validation(Section):
    """When the model is judged on the validation split."""

    every_epochs: int = Field(1, ge=1)


class EarlyStop(Section):
    """Stop when the monitor has not improved for `patience` validations; epochs before
    `min_epochs` do not count."""

    patience: int = Field(10, ge=1)
    min_epochs: int = Field(0, ge=0)
    min_delta: float = Field(0.0, ge=0.0)


class Ema(Section):
    """An exponential moving average of the weights, judged apart from them (metrics
    `val_ema_…`)."""

    decay: float = Field(0.999, ge=0.0, lt=1.0)
    warmup: bool = False
    """Use min(decay, (1 + t) / (10 + t)) at update t."""


class Checkpoint(Section):
    """What is saved and kept. Only `criteria` and `monitor` are part of a run's identity."""

    criteria: Mapping[Name, Criterion]
    """Best checkpoints to keep, by name; each is kept until a better one of the same name is
    durable."""
    monitor: Name
    """The criterion that early stopping, plateau schedules and later stages follow."""
    every_epochs: int = location(1, ge=1)
    """Save `last` at every n-th epoch's end."""
    every_steps: int | None = location(None, ge=1)
    """Save `last` also at every n-th optimizer step."""
    keep: int = location(0, ge=0)
    """Periodic checkpoints to keep beside `last` and the best ones."""
    max_undurable_minutes: float = location(30.0, gt=0.0)
    """How long training goes on while checkpoints cannot be stored."""

    @model_validator(mode="after")
    def _monitor_is_a_criterion(self) -> Self:
        if self.monitor not in self.criteria:
            raise ValueError(
                f"monitor must be one of the criteria {sorted(self.criteria)}, "
                f"but is '{self.monitor}'"
            )
        return self


class Job(Section):
    """Where and how fast: never part of a run's identity."""

    nodes: int = Field(1, ge=1)
    processes: int = Field(1, ge=1)
    """Processes (one a GPU) on each node."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpu: str = "4"
    """CPU request of each node, in Kubernetes' units."""
    memory: str = "16Gi"
    """Memory request of each node, in Kubernetes' units."""
    threads: int = Field(1, ge=1)
    """OMP_NUM_THREADS of each process. Always set: one thread and two give different weights."""
    loader_workers: int = Field(0, ge=0)
    """Data-loading processes beside each training process."""
    cache_dir: str | None = None
    """Node-local folder for downloaded and decoded data; default: below the site's cache folder."""
    weights_root: str | None = None
    """Folder that holds pretrained weights as `<hub id>/…`; default: the site's."""
    allow_network: bool = False
    """Whether weights may be downloaded from the model hub."""
    attempts: int = Field(3, ge=1)
    """Starts in a row without a new checkpoint before the run is given up."""
    grace_s: int = Field(120, ge=1)
    """Seconds between the request to stop and the kill."""
    timeout_s: int = Field(600, ge=10)
    """Seconds without an answer of a peer after which a process gives up."""

    @property
    def world_size(self) -> int:
        """Training processes over all nodes."""
        return self.nodes * self.processes


class StageConfig(Section):
    """One stage of a recipe. Recipes subclass it with their own typed `data` and `model`."""

    name: str
    """`SYSTEM/VARIANT:STAGE`."""
    seed: int = Field(42, ge=0)
    epochs: int = Field(..., ge=1)
    init: Init = Init()
    data: Data
    batch: Batch = Batch()
    model: Section
    optim: Optim
    losses: Mapping[Name, LossTerm]
    loss_weighting: FixedWeighting = FixedWeighting()
    validation: Validation = Validation()
    early_stop: EarlyStop | None = None
    ema: Ema | None = None
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Arithmetic of the forward pass (autocast). Parameters always stay fp32."""
    activation_checkpointing: tuple[str, ...] = ()
    """Patterns of modules that recompute their activations in the backward pass to save memory."""
    sync_batchnorm: bool = False
    """Share BatchNorm statistics over all processes."""
    checkpoint: Checkpoint
    job: Job = Job()

    @model_validator(mode="after")
    def _arithmetic_holds(self) -> Self:
        problems = []
        try:
            self.batch.accumulation(self.job.world_size)
        except ConfigError as error:
            problems.append(str(error))
        for criterion in self.checkpoint.criteria.values():
            if criterion.metric.startswith("val_ema_") and self.ema is None:
                problems.append(
                    f"checkpoint.criteria uses {criterion.metric}, but ema is null: set ema.decay"
                )
        if not any(
            term.is_active(epoch)
            for epoch in range(1, self.epochs + 1)
            for term in self.losses.values()
        ):
            problems.append("losses: no term is active in any epoch")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def monitor(self) -> Criterion:
        """The criterion that early stopping, plateau schedules and later stages follow."""
        return self.checkpoint.criteria[self.checkpoint.monitor]


StageT = TypeVar("StageT", bound=StageConfig)

# -------------------------------------------------------------------------------------------
# dumping and identity


def dump(model: BaseModel) -> dict[str, Any]:
    """`model` as plain JSON types, under the names that overrides use."""
    return model.model_dump(mode="json", by_alias=True)


def identity(stage: StageConfig) -> dict[str, Any]:
    """What a run *is*: `dump(stage)` without `job` and without fields that only say where
    something lies."""

    def without_locations(value: Any) -> Any:
        if isinstance(value, BaseModel):
            fields = type(value).model_fields
            return {
                (info.alias or name): without_locations(getattr(value, name))
                for name, info in fields.items()
                if name != "job" and _is_hashed(info)
            }
        if isinstance(value, Mapping):
            return {key: without_locations(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [without_locations(item) for item in value]
        return str(value) if isinstance(value, Duration) else value

    plain = without_locations(stage)
    assert isinstance(plain, dict)
    return plain


def _is_hashed(info: FieldInfo) -> bool:
    extra = info.json_schema_extra
    return not (isinstance(extra, dict) and extra.get("hashed") is False)


def digest(value: Any) -> str:
    """SHA-256 of plain JSON types, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def to_yaml(value: Any) -> str:
    """Plain types as YAML, in the order given."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)


#
#
#
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d*)")
_FLOAT = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")
_KEY_ERROR = "override key '{key}' must be names joined by dots, such as optim.groups.encoder.lr"
_KEY_PART = re.compile(r'"([^"]+)"|([^."]+)')


@dataclass(frozen=True)
class Override:
    """One assignment `key=value`, with where it came from."""

    path: tuple[str, ...]
    value: Any
    origin: str

    @property
    def key(self) -> str:
        return join_path(self.path)


def parse_value(text: str) -> Any:
    """The value of an assignment: null, true, false, numbers, YAML flow after `[` or `{`, else
    text."""
    if text in ("null", "true", "false"):
        return {"null": None, "true": True, "false": False}[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if text[:1] in ("[", "{"):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            problem = str(error).splitlines()[0]
            raise ConfigError(
                f"value '{text}' begins like a YAML list or mapping, but is none ({problem})"
            ) from error
    return text


def split_key(key: str) -> tuple[str, ...]:
    """Split at dots; a part with a dot stands in double quotes."""
    parts: list[str] = []
    position = 0
    while True:
        match = _KEY_PART.match(key, position)
        if not match:
            raise ConfigError(_KEY_ERROR.format(key=key))
        parts.append(match[1] or match[2])
        position = match.end()
        if position == len(key):
            return tuple(parts)
        if key[position] != ".":
            raise ConfigError(_KEY_ERROR.format(key=key))
        position += 1


def join_path(path: Sequence[str | int]) -> str:
    """The inverse of `split_key`."""
    return ".".join(f'"{part}"' if "." in str(part) else str(part) for part in path)


def parse_assignment(text: str, *, origin: str = "override") -> Override:
    """Parse `key=value`."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"override '{text}' must have the form key=value, such as epochs=20")
    return Override(split_key(key.strip()), parse_value(value.strip()), origin)


def apply_overrides(
    stage: StageT, overrides: Sequence[Override], *, origins: dict[str, str] | None = None
) -> StageT:
    """Return `stage` with `overrides` applied in order; a ConfigError lists every mistake.

    Args:
        stage: The configuration to start from; its *full* dump is the base.
        overrides: Assignments; setting a `kind` drops the former variant's fields, `null` removes
        a dict entry.
        origins: Filled with path → origin for every value that an override set.
    """
    tree = dump(stage)
    problems: list[str] = []
    for override in overrides:
        problem = _assign(tree, type(stage), override)
        if problem:
            problems.append(problem)
        elif origins is not None:
            prefix = override.key
            for path in [p for p in origins if p == prefix or p.startswith(prefix + ".")]:
                del origins[path]
            origins[prefix] = override.origin
    try:
        changed = type(stage).model_validate(tree)
    except ValidationError as error:
        problems.extend(explain(error, type(stage)))
    if problems:
        raise ConfigError(problems)
    return changed


def validate(stage_type: type[StageT], tree: Mapping[str, Any]) -> StageT:
    """Build a stage from plain types; a ConfigError lists every mistake with its path and the
    nearest key."""
    try:
        return stage_type.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, stage_type)) from error


def _assign(tree: dict[str, Any], root: type[BaseModel], override: Override) -> str | None:
    """Put one value into the plain tree; the answer is a problem in words, or None."""
    node: Any = tree
    *parents, last = override.path
    for depth, part in enumerate(parents):
        if not isinstance(node, dict):
            return _no_child(override, override.path[:depth], part)
        if node.get(part) is None:
            known = _children(root, override.path[:depth], tree)
            if known is not None and part not in known:
                return _unknown(override.path[: depth + 1], known)
            node[part] = {}
        node = node[part]
    if not isinstance(node, dict):
        return _no_child(override, parents, last)
    known = _children(root, tuple(parents), tree)
    if known is not None and last not in known:
        return _unknown(override.path, known)
    if known is None and override.value is None:
        if last not in node:
            return _unknown(override.path, sorted(node))
        del node[last]
    elif known is None and last not in node:
        # A new entry of a dict (a parameter group, a loss term) goes first: the first matching
        # group wins.
        existing = dict(node)
        node.clear()
        node[last] = override.value
        node.update(existing)
    elif last == "kind" and node.get("kind") != override.value:
        node.clear()
        node["kind"] = override.value
    else:
        node[last] = override.value
    return None


def _no_child(override: Override, parent: Sequence[str], part: str) -> str:
    return f"{override.key}: '{join_path(parent)}' is a single value and has no '{part}'"


def _unknown(path: Sequence[str], known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
    hint = (
        f"Did you mean '{join_path([*path[:-1], nearest[0]])}'?"
        if nearest
        else f"Known keys: {', '.join(known)}."
    )
    return f"{join_path(path)} is not a key. {hint}"


def _children(
    root: type[BaseModel], path: Sequence[str], tree: Mapping[str, Any]
) -> list[str] | None:
    """The keys that may stand at `path`, or None where any key may (a dict)."""
    kinds: list[Any] = [root]
    node: Any = tree
    for part in path:
        node = node.get(part) if isinstance(node, Mapping) else None
        following: list[Any] = []
        for kind in kinds:
            for alternative in _alternatives(kind):
                if isinstance(alternative, type) and issubclass(alternative, BaseModel):
                    for name, info in alternative.model_fields.items():
                        if part in (name, info.alias):
                            following.append(info.annotation)
                elif get_origin(alternative) is not None and _is_mapping(alternative):
                    following.append(get_args(alternative)[1])
        kinds = following
    alternatives = [a for kind in kinds for a in _alternatives(kind)]
    if any(_is_mapping(a) for a in alternatives):
        return None
    models = [a for a in alternatives if isinstance(a, type) and issubclass(a, BaseModel)]
    return list(
        dict.fromkeys(
            info.alias or name for model in models for name, info in model.model_fields.items()
        )
    )


def _alternatives(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for argument in get_args(annotation):
            yield from _alternatives(argument)
    else:
        yield annotation


def _is_mapping(annotation: Any) -> bool:
    origin = get_origin(annotation)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """A pydantic error as sentences, one a mistake, each with the path as overrides write it."""
    sentences = []
    for detail in error.errors():
        path = [str(part) for part in detail["loc"] if not _is_tag(str(part), root)]
        if detail["type"] == "extra_forbidden":
            known = _children(root, path[:-1], {}) or []
            sentences.append(_unknown(path, known))
            continue
        message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        message = message[:1].lower() + message[1:]
        given = detail.get("input")
        what = join_path(path)
        if detail["type"] == "value_error" and isinstance(given, Mapping):
            sentences.append(f"{what}: {message}" if what else message)
        else:
            sentences.append(
                f"{what}: {message}"
                + ("" if detail["type"] == "missing" else f", but is {given!r}")
            )
    return sentences


def _is_tag(part: str, root: type[BaseModel]) -> bool:
    """Whether `part` is the tag that pydantic puts into the path of a discriminated union."""
    return part in {"constant", "cosine", "cosine_restarts", "plateau"} and root is not None


#
#
#


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a YAML configuration (for example a run's own `config.yaml`) as plain types."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"--config {path} must hold keys and values, but holds {type(tree).__name__}"
        )
    return tree


def flatten(
    tree: Mapping[str, Any], *, origin: str, prefix: tuple[str, ...] = ()
) -> list[Override]:
    """A tree of plain types as assignments, so that a file speaks the same language as a command
    line."""
    overrides: list[Override] = []
    items = sorted(tree.items(), key=lambda item: item[0] != "kind")
    for key, value in items:
        path = (*prefix, str(key))
        if isinstance(value, Mapping) and value:
            overrides.extend(flatten(value, origin=origin, prefix=path))
        else:
            overrides.append(Override(path, _number_if_numeric(value), origin))
    return overrides


def _number_if_numeric(value: Any) -> Any:
    # YAML 1.1 reads 1e-4 as text.
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value


def leaves(tree: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """The single values of a plain tree, with their paths."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from leaves(value, (*prefix, str(key)))
    else:
        yield join_path(prefix), tree

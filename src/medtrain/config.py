"""What a training run is: the typed, frozen description of one stage.

A `StageConfig` holds the science of a run and, in `job`, where and how fast it runs. Only the
science is part of a run's identity: `identity()` leaves out `job` and every other field declared
with `location()`. The words that change a stage are in `overrides.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from medtrain.errors import ConfigError

NAME_PATTERN = r"^[a-z0-9_]+$"
"""Names of metrics, loss terms, parameter groups and criteria: Katib's collector reads no other
characters."""

Name = Annotated[str, Field(pattern=NAME_PATTERN)]

Key = TypeVar("Key")
Value = TypeVar("Value")


class FrozenDict(dict[Key, Value]):
    """A dict that refuses changes, so that a frozen stage is frozen to its leaves, and hashable."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a configuration is frozen: build another one, or use overrides")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)


Entries = Annotated[Mapping[Name, Value], AfterValidator(FrozenDict)]
"""Named sections, such as parameter groups, in an order that is kept."""


class Section(BaseModel):
    """A frozen part of a configuration; unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        coerce_numbers_to_str=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, data: Any) -> Any:
        # Pydantic takes true for 1; as text it is refused where a number stands.
        if not isinstance(data, Mapping):
            return data
        numeric = {
            key
            for name, field in cls.model_fields.items()
            if not any(kind in (bool, Any) for kind in scalars(field.annotation))
            for key in (name, field.alias)
        }
        return {key: _spell_out(value) if key in numeric else value for key, value in data.items()}


def _spell_out(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return [_spell_out(item) for item in value]
    return value


def alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union, or the type itself, without the wrapping of `Annotated`."""
    if get_origin(annotation) is Annotated:
        yield from alternatives(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for argument in get_args(annotation):
            yield from alternatives(argument)
    else:
        yield annotation


def scalars(annotation: Any) -> Iterator[Any]:
    """The types of the single values that a field holds, those inside its tuples included."""
    for alternative in alternatives(annotation):
        if get_origin(alternative) in (tuple, list):
            for argument in get_args(alternative):
                yield from scalars(argument)
        elif get_origin(alternative) is Literal:
            yield from (type(value) for value in get_args(alternative))
        else:
            yield alternative


def location(default: Any = ..., **kwargs: Any) -> Any:
    """Declare a field that says *where* something is, not *what* it is: it is left out of a run's
    identity."""
    return Field(default, json_schema_extra={"hashed": False}, **kwargs)


def ordered(default: Any = ..., **kwargs: Any) -> Any:
    """Declare a dict whose order has a meaning: it is part of a run's identity."""
    return Field(default, json_schema_extra={"ordered": True}, **kwargs)


def key_of(name: str, field: FieldInfo) -> str:
    """The key by which files and overrides call a field."""
    return field.alias or name


@dataclass(frozen=True)
class Duration:
    """A stretch of training, in epochs, optimizer steps or as a fraction of the stage."""

    amount: float
    unit: Literal["epochs", "steps", "fraction"]

    def __str__(self) -> str:
        # `repr` is the shortest text that reads back as the same number; Decimal keeps it exact.
        amount = Decimal(repr(self.amount))
        if self.unit == "fraction":
            return f"{_plain(amount * 100)}%"
        return f"{_plain(amount)}{self.unit}"

    def in_steps(self, *, steps_per_epoch: int, total_steps: int) -> int:
        """The number of optimizer steps that this duration covers, rounded to the nearest."""
        scale = {"epochs": steps_per_epoch, "steps": 1, "fraction": total_steps}[self.unit]
        return round(self.amount * scale)


def _plain(number: Decimal) -> str:
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


_DURATION = re.compile(r"(?P<amount>[0-9]+(?:\.[0-9]+)?) ?(?P<unit>%|epochs?|steps?)")


def _parse_duration(value: object) -> Duration:
    if isinstance(value, Duration):
        return value
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if not match or not math.isfinite(float(match["amount"])):
        raise ValueError("must be a duration such as 5epochs, 500steps or 10%")
    amount, unit = Decimal(match["amount"]), match["unit"]
    if unit == "%":
        return Duration(float(amount / 100), "fraction")
    return Duration(float(amount), "epochs" if unit.startswith("epoch") else "steps")


def _not_zero(duration: Duration) -> Duration:
    if duration.amount == 0:
        raise ValueError("must be longer than nothing")
    return duration


DurationField = Annotated[
    Duration, BeforeValidator(_parse_duration), PlainSerializer(str, return_type=str)
]


def matching(pattern: str, words: str) -> Any:
    """A validator of text; `words` complete the sentence "X must be ..."."""
    compiled = re.compile(pattern)

    def check(text: str) -> str:
        if not compiled.fullmatch(text):
            raise ValueError(f"must be {words}")
        return text

    return AfterValidator(check)


Cpu = Annotated[
    str, matching(r"[0-9]+(\.[0-9]+)?|[0-9]+m", "a number of cores such as 4, 0.5 or 500m")
]
Memory = Annotated[
    str,
    matching(r"[0-9]+(\.[0-9]+)?([KMGTP]i|[kMGTP])?", "an amount of memory such as 16Gi or 512Mi"),
]
FolderName = Annotated[
    str, matching(r"[A-Za-z0-9][A-Za-z0-9._-]*", "letters, digits, dots, dashes and underscores")
]


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
        if self.source == "stage" and self.stage is None:
            raise ValueError("stage must name the earlier stage, because from is 'stage'")
        belongings = {
            "stage=null": self.stage is not None,
            "new_parts=[]": bool(self.new_parts),
            "dropped_parts=[]": bool(self.dropped_parts),
        }
        if self.source != "stage" and any(belongings.values()):
            cure = ", ".join(assignment for assignment, is_set in belongings.items() if is_set)
            raise ValueError(f"from={self.source} starts from no earlier stage: set also {cure}")
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
    name: FolderName | None = location(None)
    """Names the data set's home under the storage root, where membership of splits is kept;
    default: from `root`."""
    protocol: Name = "holdout_5fold"
    """How cases are divided; the recipe says which protocols it knows."""
    fold: int = Field(0, ge=0)
    """With a k-fold protocol: the fold used for validation."""


class Batch(Section):
    """Cases per optimizer step, and per forward pass of one process."""

    global_: int = Field(8, alias="global", ge=1, le=10**6)
    micro: int = Field(4, ge=1, le=10**6)

    def accumulation(self, world_size: int) -> int:
        """Forward passes per optimizer step and process; a ConfigError where `global` does not
        divide."""
        per_pass = self.micro * world_size
        if self.global_ % per_pass:
            cases, rest = divmod(self.global_, world_size)
            allowed = [n for n in range(1, 65) if not rest and cases % n == 0]
            advice = (
                f"Set batch.micro to one of {allowed}, or another batch.global."
                if allowed
                else f"Set batch.global to a multiple of {per_pass}."
            )
            raise ConfigError(
                f"batch.global={self.global_} must be a whole multiple of batch.micro={self.micro} "
                f"x {world_size} processes = {per_pass}. {advice}"
            )
        return self.global_ // per_pass


class Warmup(Section):
    """Every schedule may begin with a linear warm-up."""

    kind: str
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
    first: Annotated[DurationField, AfterValidator(_not_zero)]
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

    match: tuple[str, ...] = Field(..., min_length=1)
    """Patterns (`*`, `?`) of parameter names of the model, such as `encoder.*`."""
    lr: float | None = Field(..., ge=0.0)
    """Learning rate; `null` freezes the group and keeps wholly frozen modules in `eval()`."""
    weight_decay: float | None = Field(None, ge=0.0)
    """Weight decay; `null` takes `optim.weight_decay`."""
    starts_epoch: int = Field(1, ge=1)
    """Frozen before this epoch of the stage (1-based)."""
    schedule: Schedule | None = None
    """Schedule; `null` takes `optim.schedule`."""


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Optim(Section):
    """The optimizer and its parameter groups."""

    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.999)
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
    groups: Entries[ParamGroup] = ordered(min_length=1)
    """By name; a parameter belongs to the first group of which a pattern matches."""

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        if all(group.lr is None for group in self.groups.values()):
            raise ValueError("one of the groups must have a learning rate, but lr is null in all")
        return self


class LossTerm(Section):
    """Weight and time of one term that the task returns."""

    weight: float = Field(1.0, ge=0.0)
    starts_epoch: int = Field(1, ge=1)
    ends_epoch: int | None = Field(None, ge=1)
    """The term is out from this epoch on; `null`: never."""

    @model_validator(mode="after")
    def _ends_after_start(self) -> Self:
        if self.ends_epoch is not None and self.ends_epoch <= self.starts_epoch:
            raise ValueError(
                f"ends_epoch must be after starts_epoch={self.starts_epoch}, "
                f"but is {self.ends_epoch}"
            )
        return self

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

    criteria: Entries[Criterion]
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
        reserved = [n for n in self.criteria if n in ("last", "previous") or n.startswith("step_")]
        if reserved:
            raise ValueError(f"criteria must not be called last, previous or step_…: {reserved}")
        return self


class Job(Section):
    """Where and how fast: never part of a run's identity."""

    nodes: int = Field(1, ge=1)
    processes: int = Field(1, ge=1)
    """Processes (one a GPU) on each node."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpu: Cpu = "4"
    """CPU request of each node, in Kubernetes' units."""
    memory: Memory = "16Gi"
    """Memory request of each node, in Kubernetes' units."""
    threads: int = Field(1, ge=1)
    """OMP_NUM_THREADS of each process. Always set: one thread and two give different weights."""
    loader_workers: int = Field(0, ge=0)
    """Data-loading processes beside each training process."""
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
    seed: int = Field(42, ge=0, lt=2**32)
    epochs: int = Field(..., ge=1, le=10**6)
    init: Init = Init()
    data: Data
    batch: Batch = Batch()
    model: Section
    optim: Optim
    losses: Entries[LossTerm]
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
    job: Job = location(Job())

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
        if all(term.starts_epoch > self.epochs for term in self.losses.values()):
            problems.append(
                f"one of the losses must be active within epochs={self.epochs}, but none is"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def monitor(self) -> Criterion:
        """The criterion that early stopping, plateau schedules and later stages follow."""
        return self.checkpoint.criteria[self.checkpoint.monitor]


StageT = TypeVar("StageT", bound=StageConfig)


def dump(model: BaseModel) -> dict[str, Any]:
    """`model` as plain JSON types, under the names that overrides use."""
    return model.model_dump(mode="json", by_alias=True)


def identity(section: Section) -> dict[str, Any]:
    """What a stage, or a part of one, *is*: its dump without the fields that only say where
    something lies. Dicts whose order has a meaning become lists of pairs."""
    return _hashed_part(section, dump(section))


def _hashed_part(section: BaseModel, plain: Mapping[str, Any]) -> dict[str, Any]:
    part = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if extra.get("hashed") is False:
            continue
        key = key_of(name, field)
        value = _without_locations(getattr(section, name), plain[key])
        part[key] = [list(pair) for pair in value.items()] if extra.get("ordered") else value
    return part


def _without_locations(value: Any, plain: Any) -> Any:
    if isinstance(value, BaseModel):
        return _hashed_part(value, plain)
    if isinstance(value, Mapping):
        return {key: _without_locations(item, plain[key]) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_without_locations(item, other) for item, other in zip(value, plain, strict=True)]
    return plain


def digest(value: Any) -> str:
    """SHA-256 of plain JSON types, independent of the order of keys."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


FLOAT = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?$")
"""What files and overrides read as a float: more than YAML 1.1, for which 1e-4 is text."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that `FLOAT` would read as a number, and keeps all text on one line."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if f"{text}.".splitlines() != [f"{text}."] else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("+-.0123456789"))


def to_yaml(value: Any) -> str:
    """Plain types as YAML, in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def to_flow(value: Any) -> str:
    """Plain types as YAML on one line."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=True,
        width=2**31,
    )
    return text.removesuffix("\n").removesuffix("\n...")

"""One step: from a batch to a loss and its terms, in the one module that DDP wraps; and judging."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from medtrain.config import StageConfig
from medtrain.data.cases import Row, drop_doubled
from medtrain.errors import ConfigError
from medtrain.train.device import Process, autocast, to_device
from medtrain.train.optim import Group, freeze, set_training_mode, summarize_names
from medtrain.train.task import Batch, Clock, Task


@dataclass(frozen=True)
class StepOutput:
    """What one batch gives."""

    loss: Tensor
    """Weighted sum of the active terms: a scalar with a graph."""
    terms: Mapping[str, Tensor]
    """All terms, unweighted scalars without a graph."""


class TrainStep(nn.Module):
    """The model together with everything else that learns.

    The only module that is wrapped for several processes: a parameter beside it would drift apart
    between them. `task.losses` always sees the bare model.
    """

    def __init__(self, model: nn.Module, *, task: Task, stage: StageConfig) -> None:
        super().__init__()
        self.model = model
        self._task = task
        self._stage = stage

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Loss and terms of `batch`, in the stage's arithmetic.

        Raises:
            ConfigError: The task's terms and the configured ones differ, or no term is active.
        """
        with autocast(self._stage.precision, self.device):
            terms = self._task.losses(self.model, batch, clock)
        self._check(terms)
        weights = self.weights(clock.epoch)
        active = [terms[name].float() * weight for name, weight in weights.items() if weight]
        if not active:
            raise ConfigError(
                f"losses must have an active term of positive weight in every epoch, but epoch "
                f"{clock.epoch} has none. Set starts_epoch, ends_epoch or weight of one."
            )
        loss = torch.stack(active).sum()
        return StepOutput(loss, {name: value.detach() for name, value in terms.items()})

    def predict(self, batch: Batch, clock: Clock) -> list[Row]:
        """The task's rows of `batch`, in the stage's arithmetic."""
        with autocast(self._stage.precision, self.device):
            return self._task.predict(self.model, batch, clock)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def weights(self, epoch: int) -> dict[str, float]:
        """Weight of every term in `epoch` (1-based); 0 outside its time."""
        return {
            name: term.weight if term.is_active(epoch) else 0.0
            for name, term in self._stage.losses.items()
        }

    def _check(self, terms: Mapping[str, Tensor]) -> None:
        if terms.keys() == self._stage.losses.keys():
            return
        lacking = sorted(self._stage.losses.keys() - terms.keys())
        unknown = sorted(terms.keys() - self._stage.losses.keys())
        differences = [f"{name} is not returned" for name in lacking]
        differences += [f"{name} is not configured" for name in unknown]
        raise ConfigError(
            f"losses must name the terms that the task returns ({', '.join(sorted(terms))}), but "
            f"{', '.join(differences)}. A term that is not wanted has weight=0."
        )


def probe(step: nn.Module, batch: Batch, clock: Clock) -> list[str]:
    """Names of the trainable parameters that the active terms do not reach.

    Runs one forward and backward pass through `step` (a `TrainStep`, bare or wrapped) and puts
    buffers, random state and gradients back. Behind DDP it also has the effect that the buckets of
    gradients get their final order before the first step: a resumed run of three or more processes
    would otherwise add up its first gradients in another order than the run it continues.
    """
    bare = step.module if isinstance(step, nn.parallel.DistributedDataParallel) else step
    buffers = [(buffer, buffer.clone()) for buffer in bare.buffers()]
    devices = {parameter.device for parameter in bare.parameters()}
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        step(batch, clock).loss.backward()
    unreached = [
        name.removeprefix("model.")
        for name, parameter in bare.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    for parameter in bare.parameters():
        parameter.grad = None
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return unreached


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs in which the same groups learn from the same terms."""

    groups: tuple[str, ...]
    terms: tuple[str, ...]

    @classmethod
    def of(cls, step: TrainStep, groups: Sequence[Group], epoch: int) -> Phase:
        """The phase that `epoch` belongs to."""
        return cls(
            tuple(group.name for group in groups if group.is_trained(epoch)),
            tuple(name for name, weight in step.weights(epoch).items() if weight),
        )


def check_phases(
    step: TrainStep,
    groups: Sequence[Group],
    batch: Batch,
    *,
    epochs: range,
    clock: Callable[[int], Clock],
) -> None:
    """Probe the beginning of every phase in `epochs`; leaves the model frozen as in the last one.

    Raises:
        ConfigError: Parameters learn in a phase whose terms do not reach them; all such, at once.
    """
    phases = {epoch: Phase.of(step, groups, epoch) for epoch in epochs}
    starts = [e for e in epochs if e == epochs.start or phases[e] != phases[e - 1]]
    unreached: dict[int, set[str]] = {}
    for start in starts:
        freeze(groups, epoch=start)
        set_training_mode(step.model)
        unreached[start] = set(probe(step, batch, clock(start)))
    problems = []
    for start, end in itertools.pairwise([*starts, epochs.stop]):
        for group in groups:
            names = [name for name in group.parameters if name in unreached[start]]
            if not names:
                continue
            later = [s for s in starts if s > start and unreached[s].isdisjoint(names)]
            mend = (
                f"Set optim.groups.{group.name}.starts_epoch={later[0]}"
                if later
                else f"Set optim.groups.{group.name}.lr=null, or keep a term that uses it"
            )
            problems.append(
                f"{', '.join(summarize_names(names, group.parameters))} (group {group.name}) must "
                f"get a gradient from {', '.join(phases[start].terms)} in epochs {start} to "
                f"{end - 1}, but gets none. {mend}."
            )
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True)
class Judgement:
    """How a model did on a whole split."""

    rows: list[Row]
    """One row a case, sorted by `case_id`; the same on every process."""
    losses: Mapping[str, float]
    """`loss`, and `loss_<term>` for every term: means over cases."""


@torch.no_grad()
def judge(
    step: TrainStep,
    loader: Iterable[Batch],
    *,
    clock: Clock,
    process: Process,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Judgement | None:
    """Losses and rows of a split whose cases the processes share; leaves the model in `eval()`.

    The processes meet once, at the end, so their shares may differ in length.

    Returns:
        None, on every process, where one of them was asked to stop.
    """
    step.eval()
    rows: list[Row] = []
    sums: defaultdict[str, float] = defaultdict(float)
    has_stopped = False
    for batch in loader:
        if has_stopped := is_stopping():
            break
        local = to_device(batch, step.device)
        output = step(local, clock)
        rows += step.predict(local, clock)
        size = len(batch["case_id"])
        sums["num_cases"] += size
        sums["loss"] += float(output.loss) * size
        for name, term in output.terms.items():
            sums[f"loss_{name}"] += float(term) * size
    shares = process.gather((has_stopped, rows, dict(sums)))
    if any(stopped for stopped, _, _ in shares):
        return None
    together: defaultdict[str, float] = defaultdict(float)
    for _, _, share in shares:
        for name, value in share.items():
            together[name] += value
    num_cases = together.pop("num_cases", 0.0)
    every_row = drop_doubled(row for _, found, _ in shares for row in found)
    return Judgement(
        rows=sorted(every_row, key=lambda row: str(row["case_id"])),
        losses={name: value / num_cases for name, value in together.items()},
    )


@dataclass
class Averages:
    """Weighted sums of an epoch's figures; saved, to go on in mid-epoch."""

    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float, *, weight: float | None = None) -> None:
        """Add `value`; with a weight it is a sum already, of so many."""
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.weights[name] = self.weights.get(name, 0.0) + (1.0 if weight is None else weight)

    def means(self) -> dict[str, float]:
        return {name: value / self.weights[name] for name, value in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "weights": dict(self.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.weights = dict(state["sums"]), dict(state["weights"])


class Tally:
    """What one optimizer step has seen in this process, on its device."""

    def __init__(self, terms: tuple[str, ...], device: torch.device) -> None:
        self.names = ("loss", *(f"loss_{term}" for term in terms))
        self._terms = terms
        self._seen: list[tuple[list[str], Tensor]] = []
        self._device = device

    def add(self, output: StepOutput, case_ids: Sequence[str]) -> None:
        """Keep the figures of one micro-batch."""
        values = [output.loss.detach(), *(output.terms[term] for term in self._terms)]
        self._seen.append((list(case_ids), torch.stack([v.double() for v in values])))

    @property
    def case_ids(self) -> list[str]:
        """All cases seen."""
        return [case_id for case_ids, _ in self._seen for case_id in case_ids]

    def vector(self, *, wants_stop: bool) -> Tensor:
        """Bad micro-batches, wishes to stop, cases, and sums over cases: to be added up."""
        head = torch.zeros(3, dtype=torch.float64, device=self._device)
        head[1], head[2] = float(wants_stop), len(self.case_ids)
        sums = torch.zeros(len(self.names), dtype=torch.float64, device=self._device)
        for case_ids, values in self._seen:
            head[0] += ~values[0].isfinite()
            sums += values * len(case_ids)
        return torch.cat([head, sums])

    def blame(self, active: Sequence[str]) -> list[str]:
        """Which terms of which cases are not finite, one sentence a micro-batch."""
        sentences = []
        for case_ids, values in self._seen:
            loss, *terms = values.tolist()
            if math.isfinite(loss):
                continue
            odd = {n: v for n, v in zip(self._terms, terms, strict=True) if n in active}
            odd = {name: v for name, v in odd.items() if not math.isfinite(v)} or {"loss": loss}
            figures = ", ".join(f"{name} is {value}" for name, value in odd.items())
            sentences.append(f"{figures} for cases {', '.join(case_ids)}")
        return sentences

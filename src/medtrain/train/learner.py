"""The model with all that changes it: groups, optimizer, schedules, scaler, average, wrapper."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from medtrain.config import Criterion, StageConfig
from medtrain.data.transforms import derive_seed
from medtrain.errors import TrainingDiverged
from medtrain.train.activation import checkpoint_activations
from medtrain.train.device import (
    Process,
    check_precision,
    manual_seed,
    share_batchnorm,
    to_device,
)
from medtrain.train.ema import AveragedModel
from medtrain.train.optim import Group, build_optimizer, freeze, match_groups, set_training_mode
from medtrain.train.schedules import GroupSchedule
from medtrain.train.step import Phase, Tally, TrainStep, check_phases, probe
from medtrain.train.task import Batch, Clock, Task


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did; the same on every process."""

    is_stop_wanted: bool
    """By any process."""
    num_samples: float
    """Cases, over all processes."""
    sums: Mapping[str, float]
    """`loss` and `loss_<term>`, added up over these cases."""
    figures: Mapping[str, float]
    """Gradient norms before clipping, update ratios where measured, whether fp16 skipped it."""


class Learner:
    """Takes optimizer steps; when and how many is the trainer's."""

    def __init__(
        self, model: nn.Module, *, stage: StageConfig, task: Task, process: Process
    ) -> None:
        """
        Args:
            model: With its first weights, on whatever device.
            stage: What to do.
            task: What the loss terms are.
            process: Which of the run's processes this is.

        Raises:
            ConfigError: Groups, precision or activation checkpointing do not fit the model.
        """
        check_precision(model, stage.precision, process.device)
        model = model.to(process.device)
        if stage.sync_batchnorm:
            model = share_batchnorm(model, process)
        self.model = model
        self.groups = match_groups(model, stage.optim)
        self.step = TrainStep(model, task=task, stage=stage)
        has_start = stage.init.source != "scratch"
        self._start = _learning_weights(self.groups) if has_start else None
        self.averaged = AveragedModel(model, stage.ema) if stage.ema else None
        # After the average's copy: what this puts into a model does not survive copying.
        checkpoint_activations(model, stage.activation_checkpointing)
        self._stage = stage
        self._process = process
        self._optimizer = build_optimizer(self.groups, stage.optim)
        self._scaler = torch.amp.GradScaler("cuda", enabled=stage.precision == "fp16")
        self._schedules: dict[str, GroupSchedule] = {}
        self._wrapped: nn.Module | None = None
        self._phase: Phase | None = None
        self._skipped_in_a_row = 0

    def set_schedules(self, *, steps_per_epoch: int, total_steps: int) -> None:
        """Turn all durations into optimizer steps, once the length of an epoch is known."""
        for group in self.groups:
            self._schedules[group.name] = GroupSchedule.of_group(
                group.config,
                self._stage.optim.schedule,
                steps_per_epoch=steps_per_epoch,
                total_steps=total_steps,
            )

    def enter_epoch(self, batch: Batch, *, clock: Callable[[int], Clock], epoch: int) -> None:
        """Thaw what starts, and wrap the step anew where something changed.

        In the first epoch of this process all coming phases are tried, so that a mistake in one of
        the last is found before the first is paid for.

        Args:
            batch: A training batch to probe with.
            clock: The time in a given epoch.
            epoch: The epoch that begins or goes on.
        """
        batch = to_device(batch, self._process.device)
        is_first = self._wrapped is None
        if is_first:
            epochs = range(epoch, self._stage.epochs + 1)
            check_phases(self.step, self.groups, batch, epochs=epochs, clock=clock)
        freeze(self.groups, epoch=epoch)
        set_training_mode(self.model)
        self._set_learning_rates(clock(epoch).step)
        phase = Phase.of(self.step, self.groups, epoch)
        if is_first or phase != self._phase:
            self._phase = phase
            if self._wrapped is not None and self._wrapped is not self.step:
                # The former wrapper's hooks live as long as it does.
                self._wrapped = None
                gc.collect()
            self._wrapped = self.step
            if self._process.world_size > 1:
                # Buffers are shared before validating and saving: nothing reads them earlier.
                self._wrapped = DistributedDataParallel(self.step, forward_sync_buffers=False)
            probe(self._wrapped, batch, clock(epoch))

    def open_step(self, clock: Clock, *, num_batches: int) -> None:
        """Begin a step that accumulates `num_batches` micro-batches."""
        seed = derive_seed("step", self._stage.seed, clock.step, self._process.rank)
        manual_seed(seed)
        self._clock = clock
        self._num_batches = num_batches
        self._tally = Tally(tuple(self._stage.losses), self._process.device)

    def accumulate(self, batch: Batch, *, is_last: bool) -> None:
        """Forward and backward pass of one micro-batch; the last one adds up over processes."""
        wrapped = self._wrapped
        assert wrapped is not None
        context: AbstractContextManager[Any] = nullcontext()
        if isinstance(wrapped, DistributedDataParallel) and not is_last:
            context = wrapped.no_sync()
        with context:
            output = wrapped(to_device(batch, self._process.device), self._clock)
            self._scaler.scale(output.loss / self._num_batches).backward()
        self._tally.add(output, batch["case_id"])

    def close_step(self, *, wants_stop: bool, measures_update: bool) -> StepReport:
        """Turn the gradients into a step.

        Raises:
            TrainingDiverged: On every process and before the step, where a loss or gradient of any
                is not finite.
        """
        trained = [group for group in self.groups if group.is_trained(self._clock.epoch)]
        self._scaler.unscale_(self._optimizer)
        norms = {group.name: get_total_norm(group.gradients()) for group in trained}
        total = get_total_norm(list(norms.values()))
        if self._stage.optim.clip_norm is not None:
            learning = [p for group in trained for p in group.parameters.values()]
            clip_grads_with_norm_(learning, self._stage.optim.clip_norm, total)

        # The only exchange beside the gradients', and the only place where the host waits.
        shared = self._process.sum(self._tally.vector(wants_stop=wants_stop))
        numbers = torch.cat([shared, torch.stack([total, *norms.values()]).double()]).tolist()
        num_bad, num_stops, num_samples, *sums = numbers[: len(shared)]
        names = ["grad_norm", *(f"grad_norm_{name}" for name in norms)]
        figures = dict(zip(names, numbers[len(shared) :], strict=True))
        is_finite = math.isfinite(figures["grad_norm"])
        if num_bad or not (is_finite or self._may_skip()):
            self._raise_diverged(figures)

        before = {group.name: group.copies() for group in trained} if measures_update else {}
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._set_learning_rates(self._clock.step + 1)
        if self.averaged is not None and is_finite:
            self.averaged.update(self.model)
        self._optimizer.zero_grad()
        self._skipped_in_a_row = 0 if is_finite else self._skipped_in_a_row + 1

        if not is_finite:
            figures = {}
        if self._scaler.is_enabled():
            figures["skipped_fraction"] = float(not is_finite)
        for group in trained if measures_update else ():
            figures[f"update_ratio_{group.name}"] = group.update_ratio(before[group.name])
        return StepReport(
            is_stop_wanted=bool(num_stops),
            num_samples=num_samples,
            sums=dict(zip(self._tally.names, sums, strict=True)),
            figures=figures,
        )

    def learning_rate(self, name: str, step: int) -> float:
        """Learning rate of the step that follows `step` others; 0 for what is never trained."""
        base = self._stage.optim.groups[name].lr
        return 0.0 if base is None else base * self._schedules[name].factor(step)

    def drift(self) -> dict[str, float]:
        """‖θ - θ0‖ / ‖θ0‖ of every group since the stage's start; none for one from scratch."""
        if self._start is None:
            return {}
        drift = dict.fromkeys((group.name for group in self.groups), 0.0)
        for group in self.groups:
            if group.config.lr is not None:
                start = [to_device(self._start[n], self._process.device) for n in group.parameters]
                drift[group.name] = group.update_ratio(start)
        return drift

    def observe(self, value: float | None, *, epoch: int, monitor: Criterion) -> None:
        """Tell the schedules the monitor of a validation."""
        for schedule in self._schedules.values():
            schedule.observe(value, epoch=epoch, monitor=monitor)

    def share_buffers(self) -> None:
        """Give every process rank 0's buffers, in the average too; all must come here."""
        self._process.broadcast_buffers(self.model)
        if self.averaged is not None:
            self.averaged.copy_buffers(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "ema": self.averaged.state_dict() if self.averaged else None,
            "schedules": {name: s.state_dict() for name, s in self._schedules.items()},
            "skipped_in_a_row": self._skipped_in_a_row,
            "start": self._start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["ema"])
        for name, schedule in self._schedules.items():
            schedule.load_state_dict(state["schedules"][name])
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self._start = state["start"]

    def _set_learning_rates(self, step: int) -> None:
        for options in self._optimizer.param_groups:
            options["lr"] = self.learning_rate(options["name"], step)

    def _may_skip(self) -> bool:
        """Whether a gradient that is not finite is only the fp16 scaler finding its scale."""
        # A healthy start skips some steps while the scale comes down from 65,536.
        limit = 16 if self._clock.step < 20 else 2
        return self._scaler.is_enabled() and self._skipped_in_a_row < limit

    def _raise_diverged(self, norms: Mapping[str, float]) -> None:
        clock = self._clock
        active = [name for name, weight in self.step.weights(clock.epoch).items() if weight]
        sentences = [s for share in self._process.gather(self._tally.blame(active)) for s in share]
        if not sentences:
            groups = [
                name.removeprefix("grad_norm_")
                for name, value in norms.items()
                if name != "grad_norm" and not math.isfinite(value)
            ]
            cases = [c for share in self._process.gather(self._tally.case_ids) for c in share]
            sentences = [f"the gradient of {', '.join(groups)} is not, for {', '.join(cases)}"]
        raise TrainingDiverged(
            f"losses and gradients must be finite, but in epoch {clock.epoch}, step "
            f"{clock.step + 1}, {'; '.join(sentences)}. Look at these cases, lower the learning "
            "rate, lengthen the warm-up or set optim.clip_norm."
        )


def _learning_weights(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Copies, in the host's memory, of the parameters that ever learn: others cannot drift."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for group in groups
        if group.config.lr is not None
        for name, parameter in group.parameters.items()
    }

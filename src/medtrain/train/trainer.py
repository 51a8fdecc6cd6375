"""Time inside a stage: epochs, steps, judging, saving, stopping.

What a stage means is the task's, how a step is taken the learner's. Randomness is derived from
seed, step and rank and never saved; whatever else a run needs to go on, bit by bit, is in
`Trainer.state_dict`.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from medtrain.config import StageConfig
from medtrain.data.cases import Row
from medtrain.data.transforms import derive_seed
from medtrain.errors import ConfigError, DataError
from medtrain.train.checkpoint import Checkpoints, State
from medtrain.train.device import Process, manual_seed
from medtrain.train.learner import Learner
from medtrain.train.pretrained import MatchReport
from medtrain.train.schedules import EarlyStopper
from medtrain.train.step import Averages, TrainStep, judge
from medtrain.train.system import snapshot
from medtrain.train.task import Batch, Clock, Shard, Task

if TYPE_CHECKING:
    from medtrain.train.tracking import Tracker

log = logging.getLogger(__name__)


class StopFlag(Protocol):
    """Whether somebody asked this process to stop, such as a `threading.Event`."""

    def is_set(self) -> bool:
        """Whether a stop was asked for."""


@dataclass(frozen=True)
class Best:
    """The best validation by one criterion."""

    epoch: int
    step: int
    metric: str
    value: float


@dataclass(frozen=True)
class FitResult:
    """How far a stage came; the same on every process."""

    stopped: bool
    """By the stop flag: everything is stored, and the next start goes on from here."""
    reason: str
    """Why training ended, as a sentence."""
    epoch: int
    """Whole epochs done, validation included."""
    step: int
    """Optimizer steps done."""
    best: Mapping[str, Best]
    """By criterion."""
    metrics: Mapping[str, float]
    """All validation metrics of the epoch that is best by the monitor."""


@dataclass
class Progress:
    """How far a stage is."""

    epoch: int = 1
    """The epoch that is being trained or judged, 1-based."""
    step: int = 0
    """Optimizer steps done."""
    steps_in_epoch: int = 0
    """Of them in this epoch; all of them: the epoch waits for its validation."""


class Trainer:
    """Trains one stage in one process of a run; see `fit`."""

    def __init__(
        self,
        *,
        stage: StageConfig,
        task: Task,
        checkpoints: Checkpoints,
        tracker: Tracker | None,
        process: Process,
        stop: StopFlag,
        parent: Callable[[nn.Module], MatchReport] | None = None,
        keep_rows: Callable[[Sequence[Row]], None] | None = None,
    ) -> None:
        """
        Args:
            stage: What to do.
            task: What it means.
            checkpoints: Where states go to and come from.
            tracker: Where metrics go; rank 0 alone has one.
            process: Which of the run's processes this is.
            stop: Looked at after every step and while validating.
            parent: Puts the earlier stage's weights into the model; needed with `init.from=stage`.
            keep_rows: Given the validation rows whenever the monitor improves, on rank 0.
        """
        self._stage = stage
        self._task = task
        self._checkpoints = checkpoints
        self._tracker = tracker
        self._process = process
        self._stop = stop
        self._parent = parent
        self._keep_rows = keep_rows

    def fit(self) -> FitResult:
        """Train until the last epoch, early stopping, or a request to stop.

        Raises:
            ConfigError: Groups, terms, precision or the monitor do not fit model, task or device.
            TrainingDiverged: A loss or a gradient is not finite; nothing is saved after it.
        """
        self._begin()
        progress = self._progress
        while progress.epoch <= self._stage.epochs and not self._stopper.is_over:
            if not (self._train_epoch(progress.epoch) and self._close_epoch(progress.epoch)):
                if asdict(progress) != self._saved_progress:
                    self._save_last()
                return self._end(f"stopped after step {progress.step}", stopped=True)
        if self._stage.checkpoint.monitor not in self._best:
            raise ConfigError(
                "checkpoint.monitor must follow a metric that the task gives, but "
                f"{self._stage.monitor.metric} was never there, or never finite."
            )
        if self._stopper.is_over:
            return self._end(self._stopper.sentence)
        return self._end(f"all {self._stage.epochs} epochs are done")

    def _end(self, reason: str, *, stopped: bool = False) -> FitResult:
        if self._process.is_main:
            self._checkpoints.wait()
        # Nobody leaves before rank 0 has stored everything: the first to go ends them all.
        self._process.barrier()
        return FitResult(
            stopped=stopped,
            reason=reason,
            epoch=self._progress.epoch - 1,
            step=self._progress.step,
            best=dict(self._best),
            metrics=dict(self._best_metrics),
        )

    def _begin(self) -> None:
        stage, process = self._stage, self._process
        manual_seed(derive_seed("model", stage.seed))
        model = self._task.build_model()
        saved = self._find_last()
        if saved is None:
            self._start_weights(model)
        self._learner = Learner(model, stage=stage, task=self._task, process=process)
        self._accumulation = stage.batch.accumulation(process.world_size)
        self._num_batches = self._count_batches()
        self._steps_per_epoch = math.ceil(self._num_batches / self._accumulation)
        self._total_steps = stage.epochs * self._steps_per_epoch
        self._learner.set_schedules(
            steps_per_epoch=self._steps_per_epoch, total_steps=self._total_steps
        )
        self._progress = Progress()
        self._averages = Averages()
        self._stopper = EarlyStopper(stage.early_stop, stage.monitor)
        self._best: dict[str, Best] = {}
        self._best_metrics: dict[str, float] = {}
        self._sampler: Any = None
        self._sampler_state: Any = None
        if saved is not None:
            self.load_state_dict(saved)
        self._saved_progress = asdict(self._progress)
        self._say(
            f"{stage.epochs} epochs of {self._steps_per_epoch} steps; effective batch "
            f"{stage.batch.global_} = {stage.batch.micro} x {self._accumulation} accumulated x "
            f"{process.world_size} processes; {stage.precision} on {process.device}"
        )
        if process.is_main:
            snapshot()

    def _find_last(self) -> State | None:
        """The run's own newest state; every process reads the one that rank 0 found whole."""
        found = self._checkpoints.load_newest("last") if self._process.is_main else None
        pointer = self._process.broadcast(found.pointer if found else None)
        if pointer is None:
            return None
        self._say(
            f"going on from the run's own state of step {pointer.step} (attempt {pointer.attempt})"
        )
        return found.state if found else self._checkpoints.load(pointer)

    def _start_weights(self, model: nn.Module) -> None:
        init = self._stage.init
        if init.source == "stage":
            if self._parent is None:
                raise ConfigError(
                    f"init.from=stage must be given the weights of stage {init.stage}, but there "
                    "are none. Name that stage's run with --parent."
                )
            self._say(f"starting from the weights of {self._parent(model).source}")
        elif init.source == "pretrained":
            self._say("starting from pretrained weights where the model names them")
        else:
            self._say("starting from scratch")

    def _count_batches(self) -> int:
        """Micro-batches of an epoch, which must be as many on every process."""
        loader = self._task.build_loader("train", self._shard(epoch=1))
        counts = self._process.gather(len(loader))
        if len(set(counts)) > 1 or counts[0] == 0:
            raise DataError(
                "the train loader must give every process equally many batches, and at least one, "
                f"but gives {counts}."
            )
        return int(counts[0])

    def _train_epoch(self, epoch: int) -> bool:
        """Take the epoch's remaining steps; False where the processes agree to stop."""
        progress, learner = self._progress, self._learner
        self._began = time.monotonic()
        self._num_samples = 0.0
        if self._any(self._stop.is_set()):
            return False
        if progress.steps_in_epoch == self._steps_per_epoch:
            return True
        if progress.steps_in_epoch == 0:
            self._averages = Averages()
        first = progress.steps_in_epoch * self._accumulation
        with self._bar(epoch) as bar:
            for index, batch in enumerate(self._read_epoch(epoch, first), start=first):
                if index % self._accumulation == 0:
                    num_batches = min(self._accumulation, self._num_batches - index)
                    learner.open_step(self._clock(), num_batches=num_batches)
                is_last = (index + 1) % self._accumulation == 0 or index + 1 == self._num_batches
                learner.accumulate(batch, is_last=is_last)
                if is_last and self._close_step():
                    return False
                bar.update(is_last)
        self._train_s = time.monotonic() - self._began
        return True

    def _read_epoch(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        """The epoch's remaining micro-batches; with the first the learner is made ready."""
        # A loader may draw from the global generator when it starts.
        manual_seed(derive_seed("loader", self._stage.seed, epoch, self._process.rank))
        loader = self._task.build_loader("train", self._shard(epoch, first_batch=first_batch))
        self._sampler = _learning_sampler(loader)
        if self._sampler is not None and self._sampler_state is not None:
            self._sampler.load_state_dict(self._sampler_state)
        index = first_batch
        for index, batch in enumerate(loader, start=first_batch + 1):
            if index == first_batch + 1:
                self._learner.enter_epoch(batch, clock=self._clock, epoch=epoch)
            if index > self._num_batches:
                break
            yield batch
        if index != self._num_batches:
            raise DataError(
                f"the train loader must give {self._num_batches} batches in every epoch, but gives "
                f"{'more' if index > self._num_batches else index} in epoch {epoch}."
            )

    def _close_step(self) -> bool:
        """Step, and note how it went; whether the processes agree to stop here."""
        progress = self._progress
        report = self._learner.close_step(
            wants_stop=self._stop.is_set(),
            measures_update=progress.steps_in_epoch + 1 == self._steps_per_epoch,
        )
        progress.step += 1
        progress.steps_in_epoch += 1
        self._num_samples += report.num_samples
        for name, value in report.sums.items():
            self._averages.add(f"train_{name}", value, weight=report.num_samples)
        for name, value in report.figures.items():
            self._averages.add(name, value)
        every = self._stage.checkpoint.every_steps
        if every and progress.step % every == 0 and not report.is_stop_wanted:
            self._save_last()
        return report.is_stop_wanted

    def _any(self, wish: bool) -> bool:
        """Whether any process wishes so, on every process."""
        wishes = torch.tensor([float(wish)], device=self._process.device)
        return bool(self._process.sum(wishes).item())

    def _close_epoch(self, epoch: int) -> bool:
        """Judge, log and save; False where a stop was asked for while judging."""
        stage, progress = self._stage, self._progress
        metrics = self._training_metrics(epoch)
        improved: list[str] = []
        if epoch % stage.validation.every_epochs == 0 or epoch == stage.epochs:
            judged = self._validate(epoch)
            if judged is None:
                return False
            metrics |= judged
            improved = self._compare(judged, epoch)
        if self._process.is_main:
            metrics["epoch_s"] = time.monotonic() - self._began
            if self._tracker is not None:
                self._tracker.log_metrics({**metrics, **snapshot()}, step=progress.step)
            # Before `last`, which remembers these scores: they must not outlive their weights.
            self._save_best(improved)
        progress.epoch, progress.steps_in_epoch = epoch + 1, 0
        is_final = self._stopper.is_over or epoch == stage.epochs
        if is_final or epoch % stage.checkpoint.every_epochs == 0:
            self._save_last()
        return True

    def _validate(self, epoch: int) -> dict[str, float] | None:
        """Metrics `val_…` and `val_ema_…`; None where a stop was asked for."""
        learner = self._learner
        learner.share_buffers()
        steps = {"val_": learner.step}
        if learner.averaged is not None:
            steps["val_ema_"] = TrainStep(
                learner.averaged.model, task=self._task, stage=self._stage
            )
        self._rows: dict[str, list[Row]] = {}
        metrics: dict[str, float] = {}
        for prefix, step in steps.items():
            manual_seed(derive_seed("val", self._stage.seed, epoch, self._process.rank))
            judgement = judge(
                step,
                self._task.build_loader("val", self._shard(epoch, is_training=False)),
                clock=self._clock(),
                process=self._process,
                is_stopping=self._stop.is_set,
            )
            if judgement is None:
                return None
            # One process decides for all: another kind of machine may differ in the last bit.
            found = self._process.broadcast(
                {**judgement.losses, **self._task.summarize(judgement.rows)}
                if self._process.is_main
                else None
            )
            metrics |= {f"{prefix}{name}": float(value) for name, value in found.items()}
            self._rows[prefix] = judgement.rows
        return metrics

    def _compare(self, metrics: Mapping[str, float], epoch: int) -> list[str]:
        """Tell stopper and schedules how it went; the criteria that improved."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        improved = []
        for name, criterion in self._stage.checkpoint.criteria.items():
            value = finite.get(criterion.metric)
            former = self._best.get(name)
            if value is None:
                self._say(
                    f"criterion {name} must have a finite {criterion.metric}, but epoch {epoch} "
                    f"gives {', '.join(sorted(finite))}",
                    level=logging.WARNING,
                )
            elif criterion.is_better(value, former.value if former else None):
                self._best[name] = Best(epoch, self._progress.step, criterion.metric, value)
                improved.append(name)
        monitor = self._stage.monitor
        watched = finite.get(monitor.metric)
        self._stopper.observe(watched, epoch=epoch)
        self._learner.observe(watched, epoch=epoch, monitor=monitor)
        if self._stage.checkpoint.monitor in improved:
            self._best_metrics = finite
            if self._process.is_main and self._keep_rows is not None:
                self._keep_rows(self._rows[_prefix(monitor.metric)])
        return improved

    def _training_metrics(self, epoch: int) -> dict[str, float]:
        metrics = {"epoch": float(epoch), **self._averages.means()}
        for name, weight in self._learner.step.weights(epoch).items():
            metrics[f"weight_{name}"] = weight
        for group in self._learner.groups:
            lr = self._learner.learning_rate(group.name, self._progress.step - 1)
            metrics[f"lr_{group.name}"] = lr if group.is_trained(epoch) else 0.0
        for name, drift in self._learner.drift().items():
            metrics[f"drift_{name}"] = drift
        if self._num_samples:
            metrics["samples_per_s"] = self._num_samples / max(self._train_s, 1e-9)
        return metrics

    def state_dict(self) -> State:
        """All that is needed to go on: tensors and plain types."""
        if self._sampler is not None:
            self._sampler_state = self._sampler.state_dict()
        return {
            **self._learner.state_dict(),
            "progress": asdict(self._progress),
            "averages": self._averages.state_dict(),
            "stopper": self._stopper.state_dict(),
            "best": {name: asdict(best) for name, best in self._best.items()},
            "best_metrics": dict(self._best_metrics),
            "sampler": self._sampler_state,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved state."""
        self._learner.load_state_dict(state)
        self._progress = Progress(**state["progress"])
        # With another number of processes the last step may be filled up differently.
        steps = min(self._progress.steps_in_epoch, self._steps_per_epoch)
        self._progress.steps_in_epoch = steps
        self._averages.load_state_dict(state["averages"])
        self._stopper.load_state_dict(state["stopper"])
        self._best = {name: Best(**best) for name, best in state["best"].items()}
        self._best_metrics = dict(state["best_metrics"])
        self._sampler_state = state["sampler"]

    def _save_last(self) -> None:
        """Store the whole state; every process must come here."""
        self._learner.share_buffers()
        self._saved_progress = asdict(self._progress)
        if self._process.is_main:
            self._save(self.state_dict(), {"last": {"epoch": self._progress.epoch}})

    def _save_best(self, improved: Sequence[str]) -> None:
        """Store weights alone, under the criteria by which they are best now."""
        learner = self._learner
        models = {"val_": learner.model}
        if learner.averaged is not None:
            models["val_ema_"] = learner.averaged.model
        for prefix, model in models.items():
            names = {
                name: asdict(self._best[name])
                for name in improved
                if _prefix(self._best[name].metric) == prefix
            }
            if names:
                self._save({"model": dict(model.state_dict())}, names)

    def _save(self, state: State, names: Mapping[str, Mapping[str, Any]]) -> None:
        if self._tracker is not None:
            # What a checkpoint follows from must not be lost where the checkpoint is kept.
            self._tracker.flush()
        self._checkpoints.save(state, step=self._progress.step, names=names)

    def _clock(self, epoch: int | None = None) -> Clock:
        step = self._progress.step
        return Clock(epoch or self._progress.epoch, step, step / self._total_steps)

    def _shard(self, epoch: int, *, first_batch: int = 0, is_training: bool = True) -> Shard:
        process = self._process
        return Shard(
            process.rank, process.world_size, self._stage.seed, epoch, first_batch, is_training
        )

    def _bar(self, epoch: int) -> tqdm[Any]:
        """Progress of an epoch, on a terminal only."""
        return tqdm(
            desc=f"epoch {epoch}/{self._stage.epochs}",
            total=self._steps_per_epoch,
            initial=self._progress.steps_in_epoch,
            disable=not (self._process.is_main and sys.stderr.isatty()),
            leave=False,
        )

    def _say(self, sentence: str, *, level: int = logging.INFO) -> None:
        if self._process.is_main:
            log.log(level, "%s", sentence)


def _prefix(metric: str) -> str:
    """Which weights a validation metric is about: `val_` the model's, `val_ema_` the average's."""
    return "val_ema_" if metric.startswith("val_ema_") else "val_"


def _learning_sampler(loader: DataLoader[Batch]) -> Any:
    """The loader's sampler, where it keeps a state of its own."""
    samplers = (loader.batch_sampler, loader.sampler)
    return next((s for s in samplers if hasattr(s, "state_dict")), None)

"""The errors of medtrain, and the exit code that each one ends a worker with.

The tree::

    MedTrainError
    ├── ConfigError         a name, a value or a combination of values is wrong
    ├── DataError           the data cannot be used as they are
    ├── StorageError        an object store or a disk did not do what it was asked
    │   ├── ObjectMissing
    │   └── ObjectDamaged
    ├── CheckpointError     no usable checkpoint where one was promised
    │   └── WeightsMismatch weights are not those of this network
    ├── TrainingDiverged    a loss or a gradient is not finite
    ├── LaunchError         a job could not be started or followed
    │   ├── JobFailed
    │   ├── JobTimeout
    │   └── JobNotFound
    └── RegistryError       a model cannot be registered, promoted or pulled

Every message says what was given, what is allowed and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence


class MedTrainError(Exception):
    """Any error that medtrain itself raises; its text is meant for a person."""


class ConfigError(MedTrainError):
    """One or more mistakes in a configuration, all of them listed at once."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            text = "\n".join(
                [f"{len(self.problems)} mistakes:", *(f"  - {p}" for p in self.problems)]
            )
        super().__init__(text)


class DataError(MedTrainError):
    """The data cannot be used: missing, unreadable, inconsistent or leaking."""


class StorageError(MedTrainError):
    """An object store or a disk failed, refused or lacks what was asked for."""


class ObjectMissing(StorageError):
    """There is no object of that key."""


class ObjectDamaged(StorageError):
    """An object's bytes are not those that its checksum promises."""


class CheckpointError(MedTrainError):
    """A checkpoint is absent, damaged or does not fit the model."""


class WeightsMismatch(CheckpointError):
    """Weights are unreadable, or not those of this network."""


class TrainingDiverged(MedTrainError):
    """A loss or a gradient became infinite or not a number."""


class LaunchError(MedTrainError):
    """A job could not be started, followed or cancelled."""


class JobFailed(LaunchError):
    """A job ended without its result."""


class JobTimeout(LaunchError):
    """A job did not end within its deadline."""


class JobNotFound(LaunchError):
    """No job of that name is known."""


class RegistryError(MedTrainError):
    """A model cannot be registered, promoted, pulled or annotated."""


def is_verdict(error: BaseException) -> bool:
    """Whether `error` follows from the run's own inputs, so that trying again cannot help."""
    verdicts = ConfigError | DataError | WeightsMismatch | TrainingDiverged | RegistryError
    return isinstance(error, verdicts)

"""The errors that end a job with a message; each class owns its exit code.

The README and the chart's `podFailurePolicy` repeat the table of codes; a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Final


class ExitCode(IntEnum):
    """Exit codes of `lora-trainer`. 2, 3, 4, 5 and 7 must not be retried; 1, 6 and 143 may be."""

    DONE = 0
    BUG = 1
    CONFIG = 2
    DATA = 3
    GATE = 4
    HARDWARE = 5
    STORAGE = 6
    DIVERGED = 7
    INTERRUPTED = 143


_WORST_FIRST: Final = (
    ExitCode.INTERRUPTED,
    ExitCode.STORAGE,
    ExitCode.BUG,
    ExitCode.HARDWARE,
    ExitCode.DIVERGED,
    ExitCode.DATA,
    ExitCode.CONFIG,
    ExitCode.GATE,
    ExitCode.DONE,
)
"""Worst first. Retryable codes lead, because a retry finishes those personas and then reports the remaining failures."""


def worst(codes: Iterable[ExitCode]) -> ExitCode:
    """Return the worst of several exit codes, as the exit code of the process."""
    return min(codes, key=_WORST_FIRST.index, default=ExitCode.DONE)


class LoraTrainerError(Exception):
    """A failure that ends the job with one message and `exit_code`.

    `problems` holds one line per problem: what, where, got, expected, what to do.
    """

    exit_code = ExitCode.BUG

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(LoraTrainerError):
    """Invalid settings or command-line usage."""

    exit_code = ExitCode.CONFIG


class DataError(LoraTrainerError):
    """Unusable training data."""

    exit_code = ExitCode.DATA


class GateError(LoraTrainerError):
    """An adapter that missed a threshold. Its bundle is published, but `latest.json` does not move."""

    exit_code = ExitCode.GATE


class HardwareError(LoraTrainerError):
    """The machine cannot run these settings."""

    exit_code = ExitCode.HARDWARE


class OutOfMemoryError(HardwareError):
    """The device ran out of memory. A smaller plan may fit."""


class DeviceLostError(LoraTrainerError):
    """The GPU fell off the bus, was reset, or is faulty. The run can resume on another machine, or on this one later."""

    exit_code = ExitCode.BUG


class StorageError(LoraTrainerError):
    """An object store, a disk, or another server failed after all retries."""

    exit_code = ExitCode.STORAGE


class DivergedError(LoraTrainerError):
    """The loss became NaN or infinite."""

    exit_code = ExitCode.DIVERGED


class InvariantError(LoraTrainerError):
    """A hard assertion about the training stack failed: continuing would train or publish something wrong."""

    exit_code = ExitCode.BUG


class Interrupted(BaseException):
    """SIGTERM or SIGINT arrived. Not an `Exception`, so that no library's handler swallows it."""

    exit_code = ExitCode.INTERRUPTED

    def __init__(self, signal_name: str) -> None:
        self.signal_name = signal_name
        self.kept = ""
        """What the next attempt can resume from, as message text; empty if there is nothing."""
        super().__init__(signal_name)

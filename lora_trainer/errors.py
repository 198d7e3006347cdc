"""Every failure a user can cause, each class with the exit code it ends in.

The README, the chart's `podFailurePolicy` and this module share one table of codes; a test compares them.
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
"""What may be retried first: a retry then does what it can, and ends with what it cannot do."""


def worst(codes: Iterable[ExitCode]) -> ExitCode:
    """The exit code of a process that did several things, by the code of each."""
    return min(codes, key=_WORST_FIRST.index, default=ExitCode.DONE)


class LoraTrainerError(Exception):
    """A failure that ends the job with one message and `exit_code`.

    `problems` holds one line for each thing that is wrong: what, where, got, expected, what to do.
    """

    exit_code = ExitCode.BUG

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(LoraTrainerError):
    """Settings that do not validate, or a command used wrongly."""

    exit_code = ExitCode.CONFIG


class DataError(LoraTrainerError):
    """Training data that cannot be trained on."""

    exit_code = ExitCode.DATA


class GateError(LoraTrainerError):
    """An adapter that was measured and falls short of a threshold. Its bundle is published, `latest.json` stays."""

    exit_code = ExitCode.GATE


class HardwareError(LoraTrainerError):
    """The machine cannot do what the run asks for."""

    exit_code = ExitCode.HARDWARE


class StorageError(LoraTrainerError):
    """An object store, a disk, or another server that the work depends on, that refused for good."""

    exit_code = ExitCode.STORAGE


class DivergedError(LoraTrainerError):
    """The loss became NaN or infinite."""

    exit_code = ExitCode.DIVERGED


class InvariantError(LoraTrainerError):
    """A hard assertion of the training stack failed: going on would train or publish something wrong."""

    exit_code = ExitCode.BUG


class Interrupted(BaseException):
    """SIGTERM or SIGINT. Not an `Exception`, so that no library's handler swallows it."""

    exit_code = ExitCode.INTERRUPTED

    def __init__(self, signal_name: str) -> None:
        self.signal_name = signal_name
        self.kept = ""
        """What the next attempt finds, in words; empty when it starts from nothing."""
        super().__init__(signal_name)

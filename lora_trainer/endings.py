"""How a run ended, in words: what its exception means to the log, to Kubernetes and to whoever is on call."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Final

from lora_trainer.errors import ExitCode, Interrupted, LoraTrainerError

_SHOWN_FRAMES: Final = 12


@dataclass(frozen=True, slots=True)
class Ending:
    """What is left of an exception: nothing that keeps its frames, and the tensors in them, alive."""

    exit_code: ExitCode = ExitCode.DONE
    outcome: str = "done"
    """`done`, `interrupted`, `bug`, or the name of the error's class."""
    problems: tuple[str, ...] = ()
    frames: tuple[str, ...] = ()
    """Where a bug came from, the innermost last."""


def ending_of(error: BaseException | None) -> Ending | None:
    """The ending that `error` means; None if it is neither a failure nor an interruption."""
    if error is None:
        return Ending()
    if isinstance(error, LoraTrainerError):
        return Ending(error.exit_code, type(error).__name__, error.problems)
    if isinstance(error, Interrupted | KeyboardInterrupt):
        kept = getattr(error, "kept", "") or "no half-published bundle is visible"
        return Ending(ExitCode.INTERRUPTED, "interrupted", (f"interrupted: {kept}; run the same command again",))
    if isinstance(error, Exception):
        frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
        problem = f"{type(error).__module__}.{type(error).__name__}{_safe_message(error)}"
        return Ending(ExitCode.BUG, "bug", (problem,), tuple(frames[-_SHOWN_FRAMES:]))
    return None


def _safe_message(error: Exception) -> str:
    """An unexpected error's message, unless its kind is one that quotes data (ValueError, KeyError, ...)."""
    if isinstance(
        error, RuntimeError | OSError | ImportError | MemoryError | AttributeError | AssertionError | NotImplementedError
    ):
        return f": {str(error)[:1000]}"
    return " (its message is left out: it may quote training text)"

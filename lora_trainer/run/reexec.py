"""On OOM, re-exec the same command line with a smaller memory plan, because a CUDA allocator does not release all its memory.

The process replaces itself, so it keeps its PID (1 in a container), and resumes from the newest checkpoint. `entrypoint`
imports this module before it installs the signal handler, so it imports only the standard library.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from lora_trainer.train.memory_plan import MemoryLimit

_VARIABLE = "_LORA_TRAINER_MEMORY_LIMIT"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StepDown(BaseException):
    """Request to re-exec the process within `limit`. Not an `Exception`, so that no handler on the way catches it."""

    def __init__(self, limit: MemoryLimit) -> None:
        self.limit = limit
        super().__init__(str(limit))


def memory_limit() -> MemoryLimit | None:
    """Return the limit set by the previous process when it ran out of memory, or None."""
    from lora_trainer.train.memory_plan import MemoryLimit

    text = os.environ.get(_VARIABLE)
    return MemoryLimit(**json.loads(text)) if text else None


def reexec(limit: MemoryLimit) -> NoReturn:
    """Re-exec this process with the same command line. Signals stay pending until `unblock_signals`."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, os.environ | {_VARIABLE: json.dumps(asdict(limit))})  # noqa: S606  no shell, our own command line


def unblock_signals() -> None:
    """Unblock signals, and deliver those that arrived during the re-exec."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

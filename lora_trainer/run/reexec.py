"""On OOM, re-exec the same command line with a smaller memory plan: a CUDA allocator does not recover what it held.

The process replaces itself, so it keeps its PID (1 in a container), and resumes from the newest checkpoint. `entrypoint`
imports this module before it installs the signal handler, so it imports the standard library alone.
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
    """Restart the process within `limit`. Not an `Exception`, since no handler in between may stop it."""

    def __init__(self, limit: MemoryLimit) -> None:
        self.limit = limit
        super().__init__(str(limit))


def memory_limit() -> MemoryLimit | None:
    """Return the limit that the previous process set when it ran out of memory, or None."""
    from lora_trainer.train.memory_plan import MemoryLimit

    text = os.environ.get(_VARIABLE)
    return MemoryLimit(**json.loads(text)) if text else None


def reexec(limit: MemoryLimit) -> NoReturn:
    """Replace this process with one that runs the same command line. Signals stay pending until `unblock_signals`."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, os.environ | {_VARIABLE: json.dumps(asdict(limit))})  # noqa: S606  no shell, our own command line


def unblock_signals() -> None:
    """Deliver signals from here on, including those that arrived during the re-exec."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

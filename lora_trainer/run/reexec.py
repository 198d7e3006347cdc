"""The same command again in a clean process, with less memory: what a CUDA allocator holds after it ran out is not got back.

The process replaces itself, so its number stays (it is 1 in a container), and the new one goes on from the newest checkpoint.
`entrypoint` imports this before the signal handler is there, so nothing but the standard library's is imported with it.
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
    """The run is to start again within `limit`. Not an `Exception`: it is the whole process that starts again."""

    def __init__(self, limit: MemoryLimit) -> None:
        self.limit = limit
        super().__init__(str(limit))


def memory_limit() -> MemoryLimit | None:
    """What the process before this one ran out of memory with; None: there was none."""
    from lora_trainer.train.memory_plan import MemoryLimit

    text = os.environ.get(_VARIABLE)
    return MemoryLimit(**json.loads(text)) if text else None


def reexec(limit: MemoryLimit) -> NoReturn:
    """Replace this process by one with the same command line. A signal that comes in between waits for `ready`."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, os.environ | {_VARIABLE: json.dumps(asdict(limit))})  # noqa: S606  no shell, our own command line


def unblock_signals() -> None:
    """Signals are handled from here on: let those through that waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

"""SIGTERM and SIGINT: raised at once where nothing can be torn, at the next safe point where something could.

`entrypoint` installs the handler before any heavy import, so this module imports nothing but the standard library's.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lora_trainer.errors import ExitCode, Interrupted


class Interruption:
    """What has been asked of this process, and since when."""

    def __init__(self) -> None:
        self._signal_name: str | None = None
        self._asked_s = 0.0
        self._deferred = 0

    def install(self) -> None:
        """Handle SIGTERM and SIGINT from here on: PID 1 has no default handler, without one SIGTERM is ignored."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal_name is not None:
            # a second signal means now: what is visible has its manifest, and what has none does not exist
            os._exit(ExitCode.INTERRUPTED)
        self._signal_name, self._asked_s = signal.Signals(number).name, time.monotonic()
        if not self._deferred:
            raise Interrupted(self._signal_name)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a signal is only noted: `check` raises it, and so does leaving the block."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if not self._deferred:
            self.check()

    def check(self) -> None:
        """A safe point. Raises `Interrupted` if a signal has come."""
        if self._signal_name is not None:
            raise Interrupted(self._signal_name)

    @property
    def seconds_ago(self) -> float:
        """Since the signal came; 0 if none has."""
        return time.monotonic() - self._asked_s if self._signal_name is not None else 0.0


INTERRUPTION = Interruption()
"""This process's."""

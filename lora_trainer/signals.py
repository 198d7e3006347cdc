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

from lora_trainer.errors import ExitCode, Interrupted, StorageError


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

    def meaning_of(self, error: BaseException | None) -> BaseException | None:
        """`error`, or the interruption if a signal has come.

        What a signal raises inside an import that a library's C code asked for comes out of it as an `ImportError`: neither a bug
        nor a missing package. An interrupted run is begun again, and meets an error that was there in earnest once more. A store
        that fails stays one: something did not get there.
        """
        if self._signal_name is None or isinstance(error, StorageError) or not isinstance(error, Exception):
            return error
        interrupted = Interrupted(self._signal_name)
        interrupted.__cause__ = error
        return interrupted

    @contextmanager
    def recognised(self) -> Iterator[None]:
        """What comes out of the block is what it means. Raises `Interrupted` instead of what a library made of it."""
        try:
            yield
        except Exception as error:
            meaning = self.meaning_of(error)
            if meaning is error or meaning is None:
                raise
            raise meaning from error

    @property
    def seconds_ago(self) -> float:
        """Since the signal came; 0 if none has."""
        return time.monotonic() - self._asked_s if self._signal_name is not None else 0.0

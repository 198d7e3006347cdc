"""Handle SIGTERM and SIGINT: raise `Interrupted` at once, or at the next safe point of a deferred block.

`entrypoint` installs the handler before any heavy import, so this module imports only the standard library and `errors`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from lora_trainer.errors import ExitCode, Interrupted, StorageError

_AGAIN_S: Final = 0.01


class Interruption:
    """Records the signal that asked this process to end, and when."""

    def __init__(self) -> None:
        self._signal_name: str | None = None
        self._asked_s = 0.0
        self._deferred = 0

    def install(self) -> None:
        """Handle SIGTERM and SIGINT from now on. Linux ignores SIGTERM for PID 1 unless it has a handler."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        signal.signal(signal.SIGALRM, self._handle_again)
        ignored = sys.unraisablehook

        def hook(unraisable: sys.UnraisableHookArgs) -> None:
            if not isinstance(unraisable.exc_value, Interrupted):
                ignored(unraisable)
                return
            # the signal arrived inside a destructor or a weakref callback, whose exceptions Python drops: raise it again after them
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)

        sys.unraisablehook = hook

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal_name is not None:
            # a second signal ends the process here, which is safe: readers ignore files without a manifest
            os._exit(ExitCode.INTERRUPTED)
        self._signal_name, self._asked_s = signal.Signals(number).name, time.monotonic()
        if not self._deferred:
            raise Interrupted(self._signal_name)

    def _handle_again(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred:
            self.check()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """During the block, only record a signal. `check`, or the end of the outermost block, raises `Interrupted`."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if not self._deferred:
            self.check()

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived. Call it at safe points of a deferred block."""
        if self._signal_name is not None:
            raise Interrupted(self._signal_name)

    def meaning_of(self, error: BaseException | None) -> BaseException | None:
        """Return an `Interrupted` in place of `error` if a signal has arrived, else `error`.

        Libraries may replace `Interrupted` with an error of their own: an import requested by C code turns it into `ImportError`.
        A genuine error will recur when the run is started again. Return a `StorageError` as it is: data did not reach the store.
        """
        if self._signal_name is None or isinstance(error, StorageError) or not isinstance(error, Exception):
            return error
        interrupted = Interrupted(self._signal_name)
        interrupted.__cause__ = error
        return interrupted

    @contextmanager
    def recognised(self) -> Iterator[None]:
        """Raise `Interrupted` if a library in the block replaced it with an error of its own."""
        try:
            yield
        except Exception as error:
            meaning = self.meaning_of(error)
            if meaning is error or meaning is None:
                raise
            raise meaning from error

    @property
    def seconds_ago(self) -> float:
        """Seconds since the signal; 0 without one."""
        return time.monotonic() - self._asked_s if self._signal_name is not None else 0.0

"""Write checkpoints in a background thread."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

from lora_trainer.errors import LoraTrainerError
from lora_trainer.logs import get_logger
from lora_trainer.signals import Interruption

WriteCheckpoint = Callable[[Callable[[], bool]], None]
"""Writes and uploads one checkpoint. It may stop early once its argument returns True."""


class CheckpointWriter:
    """A thread that writes one checkpoint at a time. A newly offered checkpoint replaces one that is still waiting."""

    def __init__(self, interruption: Interruption) -> None:
        self._interruption = interruption
        self._changed = threading.Condition()
        self._waiting: tuple[int, WriteCheckpoint] | None = None
        self._in_flight: int | None = None
        self._failed: int | None = None
        self._thread: threading.Thread | None = None
        self.error = ""
        """Why the last checkpoint failed; empty if it succeeded."""

    def offer(self, step: int, write: WriteCheckpoint) -> None:
        """Call `write` for the checkpoint of `step` as soon as the one in flight is done."""
        with self._changed:
            self._waiting, self._failed = (step, write), None
            if self._thread is None:
                # a daemon thread, so that a hanging upload cannot block exit; the context contains the logger's bound fields
                context = contextvars.copy_context()
                self._thread = threading.Thread(target=context.run, args=(self._work,), name="checkpoints", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def finish(self, timeout_s: float | None) -> int | None:
        """Wait until no checkpoint is waiting or in flight. Return the step of a failed or late checkpoint, else None."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and self._in_flight is None, timeout_s)
            return self._waiting[0] if self._waiting else self._in_flight or self._failed

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None:
                    self._changed.wait()
                (step, write), self._waiting = self._waiting, None
                self._in_flight = step
            error = ""
            try:
                write(self._is_superseded)
            except LoraTrainerError as failure:
                error = str(failure)
            except Exception as failure:  # report it in `finish`: otherwise the thread would die unnoticed
                error = f"{type(failure).__name__}: {failure}"
            # free the snapshot, up to 0.5 GB, before the next checkpoint arrives
            del write
            if error:
                get_logger().warning("checkpoint_failed", step=step, problem=error)
            with self._changed:
                self._in_flight, self.error = None, error
                if error and self._waiting is None:
                    self._failed = step
                self._changed.notify_all()

    def _is_superseded(self) -> bool:
        """Return whether the process is interrupted and a newer checkpoint is waiting, so that this one should be skipped."""
        return self._waiting is not None and self._interruption.seconds_ago > 0

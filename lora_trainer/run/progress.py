"""Show how far a run is: a progress bar on a terminal, events in a log, and `progress.json` for other programs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_trainer.logs import get_logger
from lora_trainer.train.held_out import HeldOutLoss
from lora_trainer.train.step_log import StepLog

WRITE_EVERY_S: Final = 1.0
LOG_EVERY_S: Final = 10.0
"""Seconds between two `evaluation_progress` events."""


class RunProgress:
    """Tracks the stage of one run, its training steps, and the replies of its evaluation."""

    def __init__(self, path: Path, run_id: str, blood_type: str, console: Console | None) -> None:
        """Write to `path` (`progress.json`), and draw on `console` if it is a terminal."""
        self._path = path
        self._state: dict[str, object] = {"run_id": run_id, "blood_type": blood_type, "stage": "starting", "step": 0, "of": None}
        self._written_s = self._logged_s = 0.0
        self._console = console if console is not None and console.is_terminal else None
        self._bar: Progress | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether a progress bar is shown, which log lines for steps would break."""
        return self._console is not None

    def stage(self, name: str) -> None:
        """Record that the pipeline entered the stage `name`."""
        self._state["stage"] = name
        self._write()

    @contextmanager
    def training(self, steps: int, done: int = 0) -> Iterator[None]:
        """Track `steps` optimizer steps; `done` of them were restored from a checkpoint."""
        with self._counting("train", steps, done):
            yield

    def step(self, log: StepLog, of: int) -> None:
        """Record a completed optimizer step."""
        tokens_per_s = log.tokens / log.step_s if log.step_s else 0.0
        self._state.update(loss=round(log.loss, 4), tokens_per_s=round(tokens_per_s, 1))
        self._count(log.step, of, f"loss {log.loss:.3f}  {tokens_per_s:,.0f} tok/s")

    @contextmanager
    def evaluating(self, replies: int) -> Iterator[None]:
        """Track the generation of `replies`, those of adapter and base together."""
        # they are about the training
        for name in ("loss", "tokens_per_s"):
            self._state.pop(name, None)
        trained = {name: self._state[name] for name in ("step", "of")}
        with self._counting("evaluate", replies):
            yield
        # a finished run shows its training steps
        self._state.update(trained)
        self._state.pop("eta_s", None)

    def replied(self, replies: int, *, model: str, decoding: str) -> None:
        """Record that `replies` more were generated. Without a bar, log it every `LOG_EVERY_S` and after the last one."""
        done = self._completed + replies
        self._count(done, self._total, f"{model}, {decoding}")
        now_s = time.monotonic()
        if not self.is_drawn and (now_s - self._logged_s >= LOG_EVERY_S or done == self._total):
            self._logged_s = now_s
            get_logger().info(
                "evaluation_progress", replies=done, of=self._total, eta_s=self._state["eta_s"], model=model, decoding=decoding
            )

    @contextmanager
    def _counting(self, stage: str, total: int, done: int = 0) -> Iterator[None]:
        """Count to `total` during the block, from `done` on."""
        self._state.update(step=done, of=total)
        self._state.pop("eta_s", None)
        self._done, self._completed, self._total = done, done, total
        self._started_s = self._logged_s = time.monotonic()
        self.stage(stage)
        if self._console is None:
            yield
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(), console=self._console, transient=True,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        with self._bar:
            self._task = self._bar.add_task(stage, total=total, completed=done, numbers="")
            yield
        self._bar = None

    def _count(self, completed: int, of: int, numbers: str) -> None:
        self._completed = completed
        spent_s = time.monotonic() - self._started_s
        self._state.update(step=completed, of=of, eta_s=round(spent_s / (completed - self._done) * (of - completed), 1))
        if time.monotonic() - self._written_s >= WRITE_EVERY_S or completed == of:
            self._write()
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, numbers=numbers)

    def held_out(self, measured: HeldOutLoss, best: HeldOutLoss) -> None:
        """Record a measurement of the held-out loss, and the lowest one so far."""
        self._state.update(held_out_loss=round(measured.loss, 4), best_step=best.step, best_held_out_loss=round(best.loss, 4))
        self._write()

    def _write(self) -> None:
        self._written_s = time.monotonic()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**self._state, "updated_unix_s": round(time.time(), 3)}) + "\n", encoding="utf-8")
        # rename, so that readers never see half a file
        os.replace(temporary, self._path)  # noqa: PTH105

"""Show how far a run is: a progress bar on a terminal, and `progress.json` for other programs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lora_trainer.train.held_out import HeldOutLoss
from lora_trainer.train.step_log import StepLog

WRITE_EVERY_S: Final = 1.0


class RunProgress:
    """Tracks the stage and steps of one run."""

    def __init__(self, path: Path, run_id: str, blood_type: str, console: Console | None) -> None:
        """Write to `path` (`progress.json`), and draw on `console` if it is a terminal."""
        self._path = path
        self._state: dict[str, object] = {"run_id": run_id, "blood_type": blood_type, "stage": "starting", "step": 0, "of": None}
        self._written_s = 0.0
        self._bar = (
            Progress(
                TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(), console=console, transient=True,
                redirect_stdout=False, redirect_stderr=False,
            )
            if console is not None and console.is_terminal
            else None
        )  # fmt: skip
        self._task: TaskID | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether a progress bar is shown, which log lines for steps would break."""
        return self._bar is not None

    def stage(self, name: str) -> None:
        """Record that the pipeline entered the stage `name`."""
        self._state["stage"] = name
        self._write()

    @contextmanager
    def training(self, steps: int, done: int = 0) -> Iterator[None]:
        """Track `steps` optimizer steps; `done` of them were restored from a checkpoint."""
        self._state.update(step=done, of=steps)
        self._done = done
        self._started_s = time.monotonic()
        self.stage("train")
        if self._bar is None:
            yield
            return
        with self._bar:
            self._task = self._bar.add_task("train", total=steps, completed=done, numbers="")
            yield

    def step(self, log: StepLog, of: int) -> None:
        """Record a completed optimizer step."""
        spent_s = time.monotonic() - self._started_s
        tokens_per_s = log.tokens / log.step_s if log.step_s else 0.0
        self._state.update(
            step=log.step,
            of=of,
            eta_s=round(spent_s / (log.step - self._done) * (of - log.step), 1),
            loss=round(log.loss, 4),
            tokens_per_s=round(tokens_per_s, 1),
        )
        if time.monotonic() - self._written_s >= WRITE_EVERY_S or log.step == of:
            self._write()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=log.step, numbers=f"loss {log.loss:.3f}  {tokens_per_s:,.0f} tok/s")

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

"""Where a run is: a bar on a terminal, `progress.json` for whoever watches."""

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

from lora_trainer.train.step_log import StepLog

WRITE_EVERY_S: Final = 1.0


class RunProgress:
    """Follows one run; `stage` names the step of the pipeline."""

    def __init__(self, path: Path, run_id: str, blood_type: str, console: Console | None) -> None:
        """`path` is `progress.json`; `console` is a terminal to draw on, or None."""
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
        """Whether a bar shows each step, so that lines for them would only disturb it."""
        return self._bar is not None

    def stage(self, name: str) -> None:
        """The pipeline entered the step `name`."""
        self._state["stage"] = name
        self._write()

    @contextmanager
    def training(self, steps: int, done: int = 0) -> Iterator[None]:
        """Show a bar for `steps` optimizer steps, `done` of which lie behind a checkpoint."""
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
        """One optimizer step is done."""
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

    def _write(self) -> None:
        self._written_s = time.monotonic()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**self._state, "updated_unix_s": round(time.time(), 3)}) + "\n", encoding="utf-8")
        # a reader sees the old state or the new one, never half of it
        os.replace(temporary, self._path)  # noqa: PTH105

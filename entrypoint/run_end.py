"""End a command: one `run_finished` event, the termination log, and an exit code."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import structlog

from lora_trainer import logs
from lora_trainer.errors import ExitCode
from lora_trainer.escaping import escaped
from lora_trainer.run.failure_report import failure_report
from lora_trainer.signals import Interruption

if TYPE_CHECKING:
    from lora_trainer.run.batch import PersonaRun


class RunEnd:
    """Context manager that reports how a command ended. `leave` then exits with its code."""

    def __init__(self, interruption: Interruption) -> None:
        self.facts: dict[str, object] = {}
        """Additional fields of `run_finished`."""
        self.personas: Sequence[PersonaRun] = ()
        """The runs of this process, if the command runs personas."""
        self.work_dir: Path | None = None
        """Folder for the traceback of a bug; None until the settings are known."""
        # keep the real stream: during the command, sys.stderr is redirected to the log
        self._stderr, self._is_terminal = sys.stderr, sys.stderr.isatty()
        self._interruption = interruption
        self._code = ExitCode.DONE
        self._started_s = time.monotonic()

    def __enter__(self) -> None:
        """Enter the block. `__init__` has already started the clock."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        own = failure_report(error, self._interruption, self.work_dir)
        if own is None:
            return False
        report, printed, bound = own, own.problems, {}
        if self.personas:
            from lora_trainer.run.batch import combined_report

            report = combined_report(own, self.personas)
            if len(self.personas) == 1:
                printed, bound = report.problems, self.personas[0].bound
                self.facts.update(self.personas[0].result)
            else:
                self.facts["personas"] = [persona.summary for persona in self.personas]
        self._code = report.exit_code
        if report.frames:
            self.facts["frames"] = list(report.frames)
        summary = {
            "outcome": report.outcome,
            "exit_code": int(report.exit_code),
            **self.facts,
            "duration_s": round(time.monotonic() - self._started_s, 1),
        }
        if report.problems:
            summary["problems"] = list(report.problems)
        self._print(printed)
        # on a terminal, `_print` has just shown each problem on its own line
        shown = {key: value for key, value in summary.items() if key != "problems" or not self._is_terminal}
        with structlog.contextvars.bound_contextvars(**bound):
            log = logs.get_logger()
            (log.info if self._code is ExitCode.DONE else log.error)("run_finished", **shown)
            logs.last_word({**structlog.contextvars.get_contextvars(), **summary})
        return True

    def end_persona(self, persona: PersonaRun) -> None:
        """Report the end of one of several personas."""
        if len(self.personas) == 1:
            # `run_finished` has the same fields
            return
        problems = persona.report.problems if persona.report else ()
        self._print(problems, f"{persona.blood_type}: ")
        in_line = {} if self._is_terminal or not problems else {"problems": list(problems)}
        is_done = persona.report is None or persona.report.exit_code is ExitCode.DONE
        log = persona.log
        (log.info if is_done else log.error)("persona_finished", **persona.ending, **in_line)

    def _print(self, problems: Sequence[str], prefix: str = "") -> None:
        if self._is_terminal:
            for problem in problems:
                text = f"error: {prefix}{escaped(problem)}"
                click.secho(text, file=self._stderr, fg="red", color=logs.shows_colors(self._stderr))

    @property
    def bundles(self) -> list[str]:
        """URIs of the published bundles, in persona order."""
        return [str(persona.result["bundle"]) for persona in self.personas if persona.result]

    def leave(self) -> None:
        """Hand the exit code to Click."""
        if self._code is not ExitCode.DONE:
            raise click.exceptions.Exit(self._code)

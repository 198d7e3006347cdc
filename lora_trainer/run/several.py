"""Several personas in one process: each has its own story, and one that ends badly leaves the others whole.

The stories are told in turns (`pipeline.Turn`): first every persona's data is looked at, then all that will be trained is
planned, and only then is the base loaded, once, and each adapter trained and published before the next one begins.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Iterable, Sequence

import structlog
from rich.console import Console

from lora_trainer.config import RunConfig
from lora_trainer.data.compression import is_jsonl
from lora_trainer.errors import ConfigError, ExitCode, GateError, Interrupted, worst
from lora_trainer.evaluate.gates import missed_gate_messages
from lora_trainer.logs import get_logger
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.run.failure_report import FailureReport, failure_report
from lora_trainer.run.pipeline import Job, Outcome, Shared, Turn, story


class Persona:
    """One persona's run among several."""

    def __init__(self, config: RunConfig, shared: Shared, console: Console | None, *, fresh: bool) -> None:
        self.blood_type: BloodType = config.blood_type
        self.waits_for: Turn | None = None
        """None before its data was looked at."""
        self.outcome: Outcome | None = None
        self.ending: FailureReport | None = None
        """None as long as it has not ended, which is for good when the process ends first."""
        self._spent_s = 0.0
        self._work_dir = config.work_dir
        self._story = story(Job(config, shared), console, fresh=fresh)
        # what it binds to the log's lines is its own
        self._context = contextvars.copy_context()
        self._context.run(structlog.contextvars.bind_contextvars, blood_type=str(config.blood_type))

    def go_on(self) -> None:
        """Its story up to the next turn that it has to wait for, or to the end, good or bad."""
        started_s = time.monotonic()
        try:
            self.waits_for = self._context.run(next, self._story)
        except StopIteration as end:
            outcome: Outcome = end.value
            self.outcome = outcome
            self.ending = (
                FailureReport() if outcome.verdict.passed else failure_report(GateError(missed_gate_messages(outcome.verdict)))
            )
        except (Exception, Interrupted, KeyboardInterrupt) as error:  # the edge of one persona, as the CLI is that of the process
            self.ending = failure_report(error, self._work_dir)
        finally:
            self._spent_s += time.monotonic() - started_s

    @property
    def log(self) -> structlog.stdlib.BoundLogger:
        """The project's logger, with what is bound to this persona's lines."""
        return get_logger().bind(**self._bound)

    @property
    def _bound(self) -> dict[str, object]:
        return self._context.run(structlog.contextvars.get_contextvars)

    @property
    def summary(self) -> dict[str, object]:
        """Its entry in `run_finished`."""
        facts: dict[str, object] = {
            "blood_type": str(self.blood_type),
            "run_id": self._bound.get("run_id"),
            "outcome": self.ending.outcome if self.ending else "not_begun",
            "exit_code": int(self.ending.exit_code) if self.ending else None,
        }
        if self.outcome:
            facts |= {"bundle": self.outcome.bundle_uri, "passed": self.outcome.verdict.passed}
        return facts

    @property
    def details(self) -> dict[str, object]:
        """What `persona_finished` says of it, beside what is bound."""
        ending = self.ending or FailureReport()
        facts: dict[str, object] = {"outcome": ending.outcome, "exit_code": int(ending.exit_code)}
        if self.outcome:
            facts |= {
                "bundle": self.outcome.bundle_uri,
                "report": self.outcome.report_uri,
                "already_done": self.outcome.already_done,
                "passed": self.outcome.verdict.passed,
            }
        if ending.frames:
            facts["frames"] = list(ending.frames)
        return {**facts, "duration_s": round(self._spent_s, 1)}


def gather(configs: Sequence[RunConfig], console: Console | None = None, *, fresh: bool = False) -> tuple[list[Persona], Shared]:
    """The personas of `configs`, not begun, and what they share. Raises `ConfigError` if their data is one file."""
    data = configs[0].data
    if is_jsonl(data):
        named = ", ".join(config.blood_type for config in configs)
        raise ConfigError(
            f"data: got the one file {data} for {named}; expected a folder that holds train_data_type_<blood type>.jsonl for each"
        )
    shared = Shared()
    return [Persona(config, shared, console, fresh=fresh) for config in configs], shared


def go_through(personas: Sequence[Persona], shared: Shared, on_end: Callable[[Persona], None]) -> None:
    """Let each of `personas` come to its end and call `on_end` there; what fails is in its `ending`.

    An interruption and a device that is lost end it for all: those that have no ending then were not begun.
    """
    for turn in (None, *Turn):
        for persona in personas:
            if persona.ending or persona.waits_for is not turn:
                continue
            persona.go_on()
            if persona.ending is None:
                continue
            on_end(persona)
            if persona.ending.exit_code is ExitCode.INTERRUPTED:
                return
            if persona.outcome is None:
                if not shared.device_answers():
                    return
                # it may have stopped anywhere: the next one trusts nothing that it left on the device
                shared.release()
        if turn is Turn.EVALUATE:
            # what was loaded to be questioned is in the way of what is trained
            shared.release()


def together(own: FailureReport, personas: Sequence[Persona]) -> FailureReport:
    """The ending of the process: the worst of its own and the personas', with every problem under their names."""
    endings = [own, *(persona.ending for persona in personas if persona.ending)]
    code = worst(ending.exit_code for ending in endings)
    outcome = next(ending.outcome for ending in endings if ending.exit_code is code)
    return FailureReport(code, outcome, (*own.problems, *_problems(personas)), own.frames)


def _problems(personas: Iterable[Persona]) -> list[str]:
    """Each problem once: what is wrong with the settings or the base is wrong for all."""
    names: dict[str, list[str]] = {}
    for persona in personas:
        found = persona.ending.problems if persona.ending else ("not begun; run the same command again",)
        for problem in found:
            names.setdefault(problem, []).append(persona.blood_type)
    return [f"{', '.join(blood_types)}: {problem}" for problem, blood_types in names.items()]

"""Test several personas in one process: selection, order, and the effect of one failure on the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog

from lora_trainer.config import RunConfig
from lora_trainer.config_sources import settle, settle_each
from lora_trainer.errors import ConfigError, DataError, DivergedError, ExitCode, HardwareError, Interrupted, StorageError, worst
from lora_trainer.evaluate.metrics import Verdict
from lora_trainer.persona.vocabulary import BloodType, parse_blood_types
from lora_trainer.run import pipeline
from lora_trainer.run.batch import PersonaRun, combined_report
from lora_trainer.run.failure_report import FailureReport
from lora_trainer.run.job import Job, ProcessContext
from lora_trainer.run.publication import Outcome
from lora_trainer.run.shared_models import SharedModels

A, B, LIVELY, AB = BloodType
"""`LIVELY` is persona O, because the name O looks like a zero."""


# -- selection -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("A", (A,)),
        ("ab", (AB,)),
        ("A,B", (A, B)),
        (" o , a ", (LIVELY, A)),
        ("all", (A, B, LIVELY, AB)),
        ("ALL", (A, B, LIVELY, AB)),
        ("B,A,B", (B, A)),
        (["O", "ab"], (LIVELY, AB)),
        ("A,", (A,)),
        (["all"], (A, B, LIVELY, AB)),
        (B, (B,)),
        ((B, A), (B, A)),
    ],
)
def test_named(value: object, named: tuple[BloodType, ...]) -> None:
    assert parse_blood_types(value) == named


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ("", "''"),
        ("A;B", "'A;B' (did you mean A,B?)"),
        ("A,c,D", "'c', 'D'"),
        ("A,all", "'all'"),
        ([], "[]"),
        ([["A"]], "['A']"),
        ([1, None], "1, None"),
        (None, "None"),
        ({"A": 1}, "{'A': 1}"),
    ],
)
def test_not_named(value: object, got: str) -> None:
    with pytest.raises(ValueError, match="expected A, B, O or AB, several as A,B, or all") as refused:
        parse_blood_types(value)
    assert str(refused.value).startswith(f"got {got};")


@pytest.mark.parametrize("text", ["blood_type: B,AB", "blood_type: [B, AB]", "blood_type:\n- b\n- ab\n- B"])
def test_a_file_and_the_environment_name_several_and_the_stronger_one_wins(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    configs = settle_each({"training.epochs": 2}, {}, file)
    assert [config.blood_type for config in configs] == [B, AB]
    # The configurations differ only in the persona, so each persona gets the same run id as alone.
    assert configs[0] == settle({"training.epochs": 2, "blood_type": "B"}, {})
    assert configs[1].model_copy(update={"blood_type": B}) == configs[0]
    in_environment = {"LORA_TRAINER_BLOOD_TYPE": "all"}
    assert [config.blood_type for config in settle_each({}, in_environment, file)] == [A, B, LIVELY, AB]
    assert [config.blood_type for config in settle_each({"blood_type": "O,A"}, in_environment, file)] == [LIVELY, A]


def test_what_is_wrong_is_said_with_its_place_and_with_all_the_rest() -> None:
    with pytest.raises(ConfigError) as refused:
        settle_each({"training.epochs": 0}, {"LORA_TRAINER_BLOOD_TYPE": "A,C"})
    assert refused.value.problems == (
        "LORA_TRAINER_BLOOD_TYPE: got 'C'; expected A, B, O or AB, several as A,B, or all",
        "command line: training.epochs: got 0; input should be greater than 0",
    )


def test_a_command_for_one_refuses_several() -> None:
    with pytest.raises(ConfigError, match="blood_type: got A, O, expected one: only 'lora-trainer run' takes several"):
        settle({"blood_type": "A,O"}, {})


def test_one_file_is_not_the_data_of_several(tmp_path: Path) -> None:
    configs = settle_each({"blood_type": "A,B", "data": f"{tmp_path}/mine.jsonl.gz"}, {})
    with pytest.raises(ConfigError, match=r"^data: got the one file .*/mine.jsonl.gz for A, B; expected a folder"):
        pipeline.persona_runs(configs, ProcessContext())


def test_the_worst_code_is_the_process_s() -> None:
    order = [ExitCode(code) for code in (143, 6, 1, 5, 7, 3, 2, 4, 0)]
    assert set(order) == set(ExitCode)
    for at, code in enumerate(order):
        assert worst(reversed(order[at:])) is code
    assert worst([]) is ExitCode.DONE


# -- phases -------------------------------------------------------------------------------------------

Told = list[tuple[str, str]]
PLAN, EVALUATE, TRAIN = object(), object(), object()
Plot = list[object]
"""A persona's script: the test records strings, a marker ends the phase, and an exception ends the run."""


class Device(SharedModels):
    """A device that can fail."""

    is_lost = False
    released = 0

    def device_answers(self) -> bool:
        return not self.is_lost

    def release(self) -> None:
        self.released += 1


def tell(monkeypatch: pytest.MonkeyPatch, plots: dict[str, Plot], device: Device | None = None) -> tuple[Told, list[PersonaRun]]:
    """Run personas with these scripts. Return the recorded order and the personas."""
    told: Told = []
    rest = {name: iter(plot) for name, plot in plots.items()}

    def play(job: Job) -> object:
        """Run the script up to its next marker, or to its end, which ends the run."""
        name = str(job.config.blood_type)
        structlog.contextvars.bind_contextvars(run_id=f"id-of-{name}")
        for part in rest[name]:
            assert structlog.contextvars.get_contextvars() == {"blood_type": name, "run_id": f"id-of-{name}"}
            if isinstance(part, BaseException):
                raise part
            if not isinstance(part, str):
                return part
            told.append((name, part))
        verdict = Verdict(gate_id="g", passed="misses a gate" not in plots[name], gates=())
        return Outcome(f"id-of-{name}", f"file:///{name}/", "", verdict, already_done=False, moved_latest=False)

    def prepare(job: Job) -> object:
        reached = play(job)
        return reached if isinstance(reached, Outcome) else Ready(published={"run_id": "x"} if reached is EVALUATE else None)

    for phase in ("plan", "judge_published", "train_and_publish"):
        monkeypatch.setattr(pipeline, phase, lambda job, *_: play(job))
    monkeypatch.setattr(pipeline, "prepare", prepare)
    configs: tuple[RunConfig, ...] = settle_each({"blood_type": ",".join(plots)}, {})
    process = ProcessContext(models=device or Device())
    personas = pipeline.persona_runs(configs, process, lambda persona: told.append((str(persona.blood_type), "ended")))
    pipeline.run(personas, process)
    assert structlog.contextvars.get_contextvars() == {}
    return told, personas


@dataclass
class Ready:
    """The attributes of `Prepared` that the pipeline reads."""

    published: dict[str, str] | None


def trained(*, then: BaseException | str = "publishes") -> Plot:
    return ["reads", PLAN, "plans", TRAIN, "trains", then]


def codes(personas: list[PersonaRun]) -> list[int | None]:
    return [persona.report.exit_code if persona.report else None for persona in personas]


def test_all_is_read_before_anything_is_planned_and_planned_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    told, personas = tell(
        monkeypatch,
        {"B": trained(), "O": ["reads"], "A": ["reads", EVALUATE, "questions"], "AB": trained()},
    )
    assert told == [
        ("B", "reads"), ("O", "reads"), ("O", "ended"), ("A", "reads"), ("AB", "reads"),
        ("B", "plans"), ("AB", "plans"),
        ("A", "questions"), ("A", "ended"),
        ("B", "trains"), ("B", "publishes"), ("B", "ended"), ("AB", "trains"), ("AB", "publishes"), ("AB", "ended"),
    ]  # fmt: skip
    assert codes(personas) == [0, 0, 0, 0]
    assert combined_report(FailureReport(), personas) == FailureReport()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("bad.jsonl:1: no"), 3),
        (DivergedError("NaN"), 7),
        (StorageError("full"), 6),
        (HardwareError("out of memory"), 5),
        (ValueError("a bug"), 1),
        ("misses a gate", 4),
    ],
)
def test_one_that_ends_badly_leaves_the_others_whole(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | str, code: int
) -> None:
    device = Device()
    told, personas = tell(monkeypatch, {"A": trained(), "B": trained(then=error), "O": trained()}, device)
    assert codes(personas) == [0, code, 0]
    assert told[-3:] == [("O", "trains"), ("O", "publishes"), ("O", "ended")]
    # The pipeline releases the device once between phases, and again after a failure, but not after a missed gate.
    assert device.released == (1 if code == 4 else 2)
    together = combined_report(FailureReport(), personas)
    assert together.exit_code == code
    assert all(problem.startswith("B: ") for problem in together.problems)
    assert [persona.summary["bundle"] for persona in personas if persona.outcome][:1] == ["file:///A/"]


def test_bad_data_of_the_last_is_said_before_the_first_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    told, personas = tell(monkeypatch, {"A": trained(), "B": ["reads", DataError("train_data_type_B.jsonl:7: no")]})
    assert told.index(("B", "ended")) < told.index(("A", "plans"))
    assert codes(personas) == [0, 3]
    assert combined_report(FailureReport(), personas).problems == ("B: train_data_type_B.jsonl:7: no",)


@pytest.mark.parametrize("error", [Interrupted("SIGTERM"), KeyboardInterrupt()])
def test_an_interruption_ends_it_for_all(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    told, personas = tell(monkeypatch, {"A": trained(), "B": trained(then=error), "O": trained(), "AB": trained()})
    assert codes(personas) == [0, 143, None, None]
    assert ("O", "trains") not in told
    ending = combined_report(FailureReport(), personas)
    assert (ending.exit_code, ending.outcome) == (143, "interrupted")
    assert ending.problems[1:] == ("O, AB: not begun; run the same command again",)
    assert [persona.summary for persona in personas][2] == {
        "blood_type": "O", "run_id": "id-of-O", "outcome": "not_begun", "exit_code": None,
    }  # fmt: skip


def test_a_lost_device_ends_it_for_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # the traceback goes to the output, which is outputs/ here
    monkeypatch.chdir(tmp_path)
    device = Device()
    device.is_lost = True
    told, personas = tell(monkeypatch, {"A": trained(then=RuntimeError("CUDA error: unspecified")), "B": trained()}, device)
    assert codes(personas) == [1, None]
    assert ("B", "trains") not in told
    ending = combined_report(FailureReport(), personas)
    assert ending.exit_code == 1
    lost, not_begun = ending.problems
    assert lost.startswith(f"A: builtins.RuntimeError: CUDA error: unspecified; file://{tmp_path}/outputs/runs/A/id-of-A/bug-")
    assert not_begun == "B: not begun; run the same command again"


def test_what_is_wrong_for_all_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    error = HardwareError("device: got no CUDA GPU")
    _, personas = tell(monkeypatch, {"A": ["reads", PLAN, error], "B": ["reads", PLAN, error]})
    assert combined_report(FailureReport(), personas).problems == ("A, B: device: got no CUDA GPU",)

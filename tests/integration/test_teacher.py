"""Run `generate --engine teacher` against a real HTTP server, first one that works, then one that misbehaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from teacher_server import SLIPS, Teacher, serve

from entrypoint.cli import run_cli
from lora_trainer.data.duplicates import NearDuplicateFinder
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.policy import policy
from lora_trainer.data.records import TrainingRecord
from lora_trainer.data.style import uses_summary
from lora_trainer.data.validation import check_file
from lora_trainer.errors import ExitCode
from lora_trainer.generator.exemplars import exemplars
from lora_trainer.generator.teacher_orders import SUMMARY_CHARACTERS
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).resolve().parents[2]
COUNT = 60


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in os.environ:
        if variable.startswith("OPENAI_") or variable.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


def arguments(teacher: Teacher, *more: str, count: int = COUNT) -> list[str]:
    common = ["generate", "--engine", "teacher", "--blood-type", "O", "--count", str(count), "--output", "out/"]
    return [*common, "--base-url", teacher.url, "--model", teacher.model, *more]


def records_of(path: Path) -> list[TrainingRecord]:
    return [line.record for line in JsonlReader(path) if line.record]


def assert_as_ordered(path: Path, count: int = COUNT) -> None:
    """Check that the file has the requested number of records, clean, balanced and without repetition."""
    report = check_file(path, BloodType.O)
    assert [problem.render(path) for problem in report.problems] == []
    records = records_of(path)
    assert len(records) == report.lines == count
    assert {record.instruction for record in records} == {persona_spec(BloodType.O).instruction}
    cells = {(feeling, third): report.coverage.get((feeling, third), 0) for feeling in Feeling for third in IntensityThird}
    assert max(cells.values()) - min(cells.values()) <= 1
    finder = NearDuplicateFinder()
    for record in records:
        assert finder.find(record.reply.text) is None
        finder.add(record.reply.text)


def test_a_good_server(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Teacher()) as teacher:
        assert run_cli(arguments(teacher, "--concurrency", "3", "--report", "report.html")) == ExitCode.DONE
    assert_as_ordered(Path("out/train_data_type_O.jsonl"))
    assert teacher.most_at_once <= 3
    out = capsys.readouterr().out
    drafts = teacher.requests - teacher.critiques
    assert f"drafts, requests, including retries: {drafts}\n" in out
    assert f"drafts, prompt tokens: {100 * drafts:,}\n" in out
    assert f"drafts, completion tokens: {50 * drafts:,}\n" in out
    assert f"critique, requests, including retries: {teacher.critiques}\n" in out
    assert f"critique, prompt tokens: {1000 * teacher.critiques:,}\n" in out
    assert f"critique, completion tokens: {50 * teacher.critiques:,}\n" in out
    page = Path("report.html").read_text(encoding="utf-8")
    assert teacher.url in page
    assert "prompt tokens" in page
    # the finished run has removed its working files
    assert list(Path(".lora-trainer/generate").glob("*")) == []


def test_what_is_asked_for() -> None:
    with serve(Teacher(slips=(None, "formal"))) as teacher:
        assert run_cli(arguments(teacher, count=30)) == ExitCode.DONE
    spec = persona_spec(BloodType.O)
    for schema_name in ("dialogues", "reviews"):
        bodies = [body for body in teacher.bodies if body["response_format"]["json_schema"]["name"] == schema_name]
        system = bodies[0]["messages"][0]["content"]
        assert {body["messages"][0]["content"] for body in bodies} == {system}
        assert "$" not in system
        for words in (spec.tone, *spec.phrases, *spec.never, *spec.feelings.values(), policy().rules, *policy().numbers.values()):
            assert words in system
        for body in bodies:
            schema = body["response_format"]["json_schema"]
            assert schema["strict"] is True
            items = schema["schema"]["properties"][schema_name]
            assert items["items"]["additionalProperties"] is False
            assert items["maxItems"] == body["messages"][1]["content"].count("주제: ")
    critiques = [body["messages"][1]["content"] for body in bodies]
    assert any("규칙에 걸림: 존댓말이 섞였다" in prompt for prompt in critiques)
    assert sum(prompt.count("초안: {") for prompt in critiques) == len(teacher.drafts)


def test_a_server_that_misbehaves(capsys: pytest.CaptureFixture[str]) -> None:
    """The run gets all its records without repetition, despite throttled, stalled, truncated or wrong responses."""
    faults = (None, "429", "500", None, "malformed", "cut connection", None, "stall", "cut off", None)
    critique_faults = (None, "malformed", None, "500", None)
    with serve(Teacher(faults=faults, critique_faults=critique_faults, slips=SLIPS, repairs_findings=False)) as teacher:
        code = run_cli(arguments(teacher, "--concurrency", "4", "--request-timeout", "1.5", "--retries", "6"))
    captured = capsys.readouterr()
    assert code == ExitCode.DONE, captured.err
    assert_as_ordered(Path("out/train_data_type_O.jsonl"))
    assert {fault or "good" for fault in faults} <= set(teacher.seen)
    for reason in ("not_json", "cut_off", "formal_speech", "too_many_sentences", "not_asked_for"):
        assert reason in captured.out
    assert "near_duplicate" in captured.out


def test_a_client_that_is_told_to_wait_waits() -> None:
    with serve(Teacher(faults=("429", None, None))) as teacher:
        assert run_cli(arguments(teacher, "--concurrency", "1", count=12)) == ExitCode.DONE
    assert teacher.seen["429"] >= 1
    assert teacher.too_early == 0


@pytest.fixture
def slow_teacher() -> Iterator[Teacher]:
    with serve(Teacher(delay_s=0.15)) as teacher:
        yield teacher


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_where_it_stopped(slow_teacher: Teacher, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "entrypoint", *arguments(slow_teacher, "--concurrency", "2", "--dialogues-per-request", "2")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline_s = time.monotonic() + 300
    taken: list[str] = []
    while len(taken) < 15 and time.monotonic() < deadline_s:
        time.sleep(0.1)
        kept = list(Path(".lora-trainer/generate").glob("*.jsonl"))
        taken = kept[0].read_text(encoding="utf-8").splitlines() if kept else []
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else ExitCode.INTERRUPTED), errors
    assert not Path("out/train_data_type_O.jsonl").exists()
    if number == signal.SIGTERM:
        assert "run the same command again to resume" in errors
    else:
        # simulate a crash that truncated the last line
        with kept[0].open("a", encoding="utf-8") as file:
            file.write('{"instruction": "너는 O형')
    before = slow_teacher.requests
    taken = [line for line in kept[0].read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    assert len(taken) >= 15
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == ExitCode.DONE, second.stderr
    assert_as_ordered(Path("out/train_data_type_O.jsonl"))
    written = Path("out/train_data_type_O.jsonl").read_text(encoding="utf-8").splitlines()
    assert written[: len(taken)] == taken
    assert f"records resumed from an interrupted run: {len(taken)}" in second.stdout
    # the second run does not request the existing records again
    assert slow_teacher.requests - before <= 2 * ((COUNT - len(taken)) // 2 + 12)


def test_output_goes_to_s3(bucket: str, s3_server: Any) -> None:
    with serve(Teacher()) as teacher:
        assert run_cli([*arguments(teacher, count=9), "--output", f"s3://{bucket}/made/"]) == ExitCode.DONE
        # the file is complete, so the second run requests nothing
        before = teacher.requests
        assert run_cli([*arguments(teacher, count=9), "--output", f"s3://{bucket}/made/"]) == ExitCode.CONFIG
        assert teacher.requests == before


@pytest.mark.parametrize(
    ("settings", "more", "code", "said"),
    [
        ({"api_key": "right"}, [], ExitCode.CONFIG, "does not accept the API key (HTTP 401); set OPENAI_API_KEY"),
        ({}, ["--model", "other"], ExitCode.CONFIG, "has no model 'other' at this URL (HTTP 404)"),
        (
            {"critic_model": "judge"},
            ["--critic-model", "jugde"],
            ExitCode.CONFIG,
            "has no model 'jugde' at this URL (HTTP 404); check --critic-model",
        ),
        ({}, ["--critic-model", "judge", "--no-critique"], ExitCode.CONFIG, "--critic-model: got a model and --no-critique"),
        ({"faults": ("500",)}, ["--retries", "0"], ExitCode.STORAGE, "5 requests in a row failed, the last one with http_500"),
        (
            {"slips": ("formal",), "repairs_findings": False},
            [],
            ExitCode.DATA,
            "responses in a row without an acceptable record (formal_speech",
        ),
    ],
)
def test_what_ends_a_run(
    settings: dict[str, Any], more: list[str], code: ExitCode, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(Teacher(**settings)) as teacher:
        assert run_cli([*arguments(teacher), *more]) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert not Path("out").exists()


def test_nobody_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Teacher()) as teacher:
        pass
    assert run_cli(arguments(teacher, "--retries", "0", "--concurrency", "1")) == ExitCode.STORAGE
    assert "the last one with connection" in capsys.readouterr().err


def test_the_key_and_the_texts_are_in_no_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "planted-key-3141")
    with serve(Teacher(api_key="planted-key-3141", faults=(None, "500", "malformed"))) as teacher:
        assert run_cli(arguments(teacher, "--retries", "0", "--concurrency", "1", "--report", "r.html", count=8)) == ExitCode.DONE
    captured = capsys.readouterr()
    assert "planted-key" not in captured.out + captured.err + Path("r.html").read_text(encoding="utf-8")
    for record in records_of(Path("out/train_data_type_O.jsonl")):
        assert record.input not in captured.err
        assert record.reply.text not in captured.out + captured.err


def test_a_checkpoint_belongs_to_its_order() -> None:
    """A run with another seed, model or count ignores the checkpoint and starts over."""
    with serve(Teacher(faults=(None, None, *["500"] * 5))) as teacher:
        run_cli(arguments(teacher, "--retries", "0", "--concurrency", "1"))
        run_cli(arguments(teacher, "--retries", "0", "--concurrency", "1", "--seed", "2"))
    kept = list(Path(".lora-trainer/generate").glob("*.jsonl"))
    assert len(kept) == 2
    assert Counter(json.loads(line)["instruction"] for path in kept for line in path.read_text(encoding="utf-8").splitlines())


def test_a_damaged_checkpoint_is_named_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Teacher(faults=(None, *["500"] * 5))) as teacher:
        run_cli(arguments(teacher, "--retries", "0", "--concurrency", "1"))
        (kept,) = Path(".lora-trainer/generate").glob("*.jsonl")
        kept.write_text("{}\n" + kept.read_text(encoding="utf-8"), encoding="utf-8")
        before = kept.read_bytes()
        assert run_cli(arguments(teacher, "--retries", "0", "--concurrency", "1")) == ExitCode.DATA
    assert f"{kept}: got lines that are not records" in capsys.readouterr().err
    assert kept.read_bytes() == before


@pytest.mark.parametrize(
    ("refuses", "left"),
    [
        ((), {"max_tokens", "response_format"}),
        (("max_tokens",), {"max_completion_tokens", "response_format"}),
        (("response_format",), {"max_tokens"}),
        (("max_tokens", "response_format"), {"max_completion_tokens"}),
    ],
)
def test_servers_that_know_less_are_asked_otherwise(refuses: tuple[str, ...], left: set[str]) -> None:
    with serve(Teacher(refuses=refuses, fenced="response_format" in refuses)) as teacher:
        assert run_cli(arguments(teacher, "--concurrency", "2", count=12)) == ExitCode.DONE
    assert_as_ordered(Path("out/train_data_type_O.jsonl"), 12)
    assert set(teacher.bodies[-1]) & {"max_tokens", "max_completion_tokens", "response_format"} == left


def test_a_server_that_refuses_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Teacher(refuses=("messages",))) as teacher:
        assert run_cli(arguments(teacher)) == ExitCode.CONFIG
    assert "rejects every request variant (HTTP 400)" in capsys.readouterr().err


def test_many_requests_that_are_told_to_wait_at_once_are_one_failure() -> None:
    with serve(Teacher(faults=(*["429"] * 8, *[None] * 60))) as teacher:
        assert run_cli(arguments(teacher, "--concurrency", "8", "--retries", "0")) == ExitCode.DONE
    assert teacher.seen["429"] == 8
    assert_as_ordered(Path("out/train_data_type_O.jsonl"))


def test_sigterm_does_not_wait_for_a_slow_model() -> None:
    with serve(Teacher(delay_s=600)) as teacher:
        command = [sys.executable, "-m", "entrypoint", *arguments(teacher)]
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline_s = time.monotonic() + 300
        while not teacher.bodies and time.monotonic() < deadline_s:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        # the process must end long before the response would arrive
        _, errors = process.communicate(timeout=300)
    assert process.returncode == ExitCode.INTERRUPTED, errors


# --- the second pass -------------------------------------------------------------------------------------


def written() -> list[TrainingRecord]:
    return records_of(Path("out/train_data_type_O.jsonl"))


@pytest.mark.parametrize(
    ("slip", "finding"),
    [("formal", "존댓말이 섞였다"), ("exemplar", "보기를 거의 베꼈다"), ("three sentences", "문장이 셋 이상이다")],
)
def test_a_draft_in_which_a_rule_finds_something_is_repaired(slip: str, finding: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Teacher(slips=(slip,))) as teacher:
        assert run_cli(arguments(teacher, count=12)) == ExitCode.DONE
    assert any(finding in body["messages"][1]["content"] for body in teacher.bodies)
    assert {record.reply.text for record in written()} <= {dialogue["text"] for dialogue in teacher.repaired}
    assert "critique, repaired records: 12\n" in capsys.readouterr().out


def test_a_draft_to_which_only_the_critic_objects_is_repaired(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Teacher(verdicts=("grounded", "in_character", None))) as teacher:
        assert run_cli(arguments(teacher, "--concurrency", "1", count=12)) == ExitCode.DONE
    out = capsys.readouterr().out
    assert "critique, drafts with a fault: grounded: " in out
    assert "critique, drafts with a fault: in_character: " in out
    assert "fault: answers" not in out
    drafted, repaired = ({dialogue["text"] for dialogue in found} for found in (teacher.drafts, teacher.repaired))
    taken = {record.reply.text for record in written()}
    assert taken & repaired
    assert taken <= repaired | drafted


def test_a_draft_that_the_critic_cannot_repair_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Teacher(verdicts=("no repair", None, None))) as teacher:
        assert run_cli(arguments(teacher, count=12)) == ExitCode.DONE
    assert "criticised" in capsys.readouterr().out
    assert teacher.repaired == []


@pytest.mark.parametrize("fault", ["500", "malformed", "cut off"])
def test_without_a_usable_critique_the_rules_decide(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Teacher(slips=("formal", None, None), critique_faults=(fault,))) as teacher:
        assert run_cli(arguments(teacher, "--concurrency", "2", "--retries", "0", count=12)) == ExitCode.DONE
    assert_as_ordered(Path("out/train_data_type_O.jsonl"), 12)
    out = capsys.readouterr().out
    kind = {"500": "http_500", "malformed": "not_json", "cut off": "cut_off"}[fault]
    assert f"critique, failed requests: {kind}: {teacher.critiques}\n" in out
    assert "formal_speech" in out
    assert {record.reply.text for record in written()} <= {dialogue["text"] for dialogue in teacher.drafts}


def test_a_draft_without_a_review_is_left_to_the_rules(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Teacher(verdicts=("no repair",), critique_faults=("half the reviews",))) as teacher:
        assert run_cli(arguments(teacher, "--concurrency", "1", count=8)) == ExitCode.DONE
    assert_as_ordered(Path("out/train_data_type_O.jsonl"), 8)
    assert "criticised" in capsys.readouterr().out


def test_no_critique(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Teacher(slips=("formal", None))) as teacher:
        assert run_cli(arguments(teacher, "--no-critique", count=12)) == ExitCode.DONE
    assert teacher.critiques == 0
    assert_as_ordered(Path("out/train_data_type_O.jsonl"), 12)
    out = capsys.readouterr().out
    assert "formal_speech" in out
    assert "critique, " not in out


def test_another_model_criticises() -> None:
    with serve(Teacher(critic_model="judge")) as teacher:
        assert run_cli(arguments(teacher, "--critic-model", "judge", "--report", "report.html", count=6)) == ExitCode.DONE
    assert Counter(body["model"] for body in teacher.bodies) == {
        "teacher": teacher.requests - teacher.critiques,
        "judge": teacher.critiques,
    }
    assert "judge" in Path("report.html").read_text(encoding="utf-8")


def test_a_run_that_ends_during_a_critique_loses_and_repeats_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Teacher(critique_faults=(None, None, None, "401"))) as teacher:
        assert run_cli(arguments(teacher, "--concurrency", "1", count=30)) == ExitCode.CONFIG
        (kept,) = Path(".lora-trainer/generate").glob("*.jsonl")
        lines = kept.read_text(encoding="utf-8").splitlines()
        assert len(lines) == 12
        teacher.critique_faults = (None,)
        assert run_cli(arguments(teacher, "--concurrency", "1", count=30)) == ExitCode.DONE
    assert_as_ordered(Path("out/train_data_type_O.jsonl"), 30)
    assert Path("out/train_data_type_O.jsonl").read_text(encoding="utf-8").splitlines()[: len(lines)] == lines
    assert f"records resumed from an interrupted run: {len(lines)}\n" in capsys.readouterr().out


def test_replies_use_a_summary_of_several_turns(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Teacher(ignores_summaries=True, repairs_findings=False)) as teacher:
        assert run_cli(arguments(teacher, count=COUNT)) == ExitCode.DONE
    assert "summary_unused" in capsys.readouterr().out
    long = [record for record in written() if len(record.context.summary) in SUMMARY_CHARACTERS]
    assert len(long) >= COUNT / 12
    made = [record for record in long if record.context.summary.startswith("우리는 며칠 동안")]
    assert made
    assert all(uses_summary(record.context.summary, record.input, record.reply.text) for record in made)


def test_no_reply_copies_an_exemplar(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Teacher(slips=("exemplar", None, None))) as teacher:
        assert run_cli(arguments(teacher, "--no-critique", count=12)) == ExitCode.DONE
    assert "near_exemplar" in capsys.readouterr().out
    shown = {one.record.reply.text for one in exemplars(BloodType.O)}
    assert not shown & {record.reply.text.removesuffix(" 진짜로") for record in written()}

"""The data in `data/`: what it promises to whoever trains on it, and to whoever copies its form."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from lora_trainer.duplicates import normalized
from lora_trainer.personas import BloodType, Feeling, IntensityThird, persona_spec
from lora_trainer.records import TrainingRecord
from lora_trainer.validation import FileReport, check_file

DATA = Path(__file__).resolve().parents[2] / "data"

FIRST_OF_A = {
    "instruction": "너는 A형 다정한 친구야. 짧은 반말로 답해.",
    "context": {
        "summary": "우리는 카페에서 만나기로 했어.",
        "current_emotion": {"type": "happy", "intensity": 0.8},
    },
    "input": "나 지금 도착했는데 어디야?",
    "output": '{"text": "오! 나 금방 도착해! 1층 창가 자리에 앉아있어줘!", "emotion": "smile"}',
}

each_persona = pytest.mark.parametrize("blood_type", list(BloodType))


def path_of(blood_type: BloodType) -> Path:
    return DATA / f"train_data_type_{blood_type}.jsonl"


@cache
def checked(blood_type: BloodType) -> tuple[FileReport, tuple[TrainingRecord, ...]]:
    records: list[TrainingRecord] = []
    report = check_file(path_of(blood_type), blood_type, on_record=records.append)
    return report, tuple(records)


@each_persona
def test_every_line_is_a_record_without_errors_or_warnings(blood_type: BloodType) -> None:
    report, _ = checked(blood_type)
    assert [problem.render(path_of(blood_type).name) for problem in report.problems] == []
    assert report.records == report.lines >= 60


@each_persona
def test_lines_are_in_the_documented_form(blood_type: BloodType) -> None:
    _, records = checked(blood_type)
    # JSON Lines end at \n alone; splitlines would also break at other separators inside a text
    lines = path_of(blood_type).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert lines == [record.to_json() for record in records]


@each_persona
def test_every_record_begins_with_the_personas_own_instruction(blood_type: BloodType) -> None:
    _, records = checked(blood_type)
    assert {record.instruction for record in records} == {persona_spec(blood_type).instruction}


@each_persona
def test_every_feeling_is_shown_at_every_strength(blood_type: BloodType) -> None:
    report, _ = checked(blood_type)
    planned = {(feeling, third) for feeling in Feeling for third in IntensityThird}
    assert {cell for cell in planned if report.coverage.get(cell, 0) < 2} == set()


@each_persona
def test_intensity_has_one_decimal_as_in_the_prompt(blood_type: BloodType) -> None:
    _, records = checked(blood_type)
    assert {value for record in records if (value := record.context.current_emotion.intensity) != round(value, 1)} == set()


@each_persona
def test_replies_differ(blood_type: BloodType) -> None:
    _, records = checked(blood_type)
    assert len({normalized(record.reply.text) for record in records}) >= 0.98 * len(records)


@each_persona
def test_half_to_three_quarters_of_the_replies_ask_back(blood_type: BloodType) -> None:
    report, _ = checked(blood_type)
    assert 0.5 <= report.question_rate <= 0.75


@each_persona
def test_emoji_follow_the_intensity(blood_type: BloodType) -> None:
    mean = checked(blood_type)[0].emoji_mean
    assert mean[IntensityThird.LOW] <= mean[IntensityThird.MIDDLE] <= mean[IntensityThird.HIGH]
    assert mean[IntensityThird.HIGH] - mean[IntensityThird.LOW] >= 0.4


def test_the_first_record_of_a_is_the_documents_own() -> None:
    first, _ = path_of(BloodType.A).read_text(encoding="utf-8").split("\n", 1)
    assert json.loads(first) == FIRST_OF_A


def test_the_four_answer_the_same_situations_each_in_their_own_words() -> None:
    replies = {
        blood_type: {record.input: normalized(record.reply.text) for record in checked(blood_type)[1]} for blood_type in BloodType
    }
    shared = set.intersection(*(set(by_input) for by_input in replies.values()))
    assert len(shared) >= 36
    assert {said for said in shared if len({by_input[said] for by_input in replies.values()}) < len(BloodType)} == set()

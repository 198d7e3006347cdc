"""Test the held-out split, and the totals of a training log."""

from __future__ import annotations

import json
import random

import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.data.jsonl import JsonlReader, parse_record
from lora_trainer.data.records import TrainingRecord
from lora_trainer.data.split import record_digest, situation_digest, split_held_out
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.train.step_log import StepLog, TrainingLog


def record(number: int, **changes: object) -> TrainingRecord:
    return TrainingRecord.model_validate(
        {
            "instruction": "반말로 답해.",
            "context": {"summary": "", "current_emotion": {"type": "happy", "intensity": 0.5}},
            "input": f"{number}번?",
            "output": {"text": f"{number}번!", "emotion": "smile"},
            **changes,
        }
    )


def sides(records: list[TrainingRecord], fraction: float) -> dict[str, str]:
    train, held_out = split_held_out(records, fraction)
    assert sorted([*train, *held_out]) == list(range(len(records)))
    assert train == sorted(train), "records keep the file's order"
    return {records[index].input: name for name, indices in (("train", train), ("held out", held_out)) for index in indices}


@given(st.integers(200, 300), st.floats(0.05, 0.5), st.randoms(use_true_random=False))
def test_order_does_not_matter(count: int, fraction: float, chance: random.Random) -> None:
    records = [record(number) for number in range(count)]
    shuffled = records[:]
    chance.shuffle(shuffled)
    assert sides(shuffled, fraction) == sides(records, fraction)


def test_growth_moves_nobody() -> None:
    records = [record(number) for number in range(1000)]
    small, large = sides(records[:300], 0.1), sides(records, 0.1)
    assert {said: large[said] for said in small} == small


def test_a_larger_fraction_holds_the_same_records_out_and_more() -> None:
    records = [record(number) for number in range(500)]
    _, few = split_held_out(records, 0.05)
    _, many = split_held_out(records, 0.2)
    assert set(few) < set(many)


def test_the_share_is_about_the_fraction() -> None:
    _, held_out = split_held_out([record(number) for number in range(4000)], 0.05)
    # the expected value is 200 and the binomial standard deviation 13.8, so the bounds are five of them away
    assert 130 < len(held_out) < 270


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.floats(0.001, 0.89))
def test_copies_stay_together_and_both_sides_have_one(numbers: list[int], fraction: float) -> None:
    records = [record(number) for number in numbers]
    train, held_out = split_held_out(records, fraction)
    assert not {numbers[index] for index in train} & {numbers[index] for index in held_out}
    assert sorted([*train, *held_out]) == list(range(len(numbers)))
    if len(set(numbers)) > 1:
        assert train
        assert held_out
    else:
        assert not held_out, "what can't be split is trained on"


def variant(situation: int, number: int) -> TrainingRecord:
    """Return one of many records of a situation: another feeling, intensity, reply and spelling."""
    feeling = {"type": ("happy", "sad")[number % 2], "intensity": number % 11 / 10}
    return record(
        number,
        context={"summary": ("우리는 카페에 갔어.", "우리는  카페에 갔어")[number % 2], "current_emotion": feeling},
        input=f"나 {situation}번 버스 탔어" + ("", "!!", " ㅋㅋ", "😊")[number % 4],
        output={"text": f"{situation}, {number}", "emotion": "smile"},
    )


@given(st.lists(st.integers(0, 8), min_size=1, max_size=60), st.floats(0.001, 0.89))
def test_a_situation_is_on_one_side(situations: list[int], fraction: float) -> None:
    records = [variant(situation, number) for number, situation in enumerate(situations)]
    train, held_out = split_held_out(records, fraction)
    assert sorted([*train, *held_out]) == list(range(len(records)))
    if len(set(situations)) > 1:
        assert train
        assert held_out
        assert not {situations[index] for index in train} & {situations[index] for index in held_out}


def test_one_situation_alone_is_split_by_record() -> None:
    records = [variant(3, number) for number in range(200)]
    _, held_out = split_held_out(records, 0.1)
    assert 5 < len(held_out) < 40
    assert split_held_out(records[::-1], 0.1)[1] == sorted(199 - index for index in held_out)
    assert [len(side) for side in split_held_out(records[:2], 0.05)] == [1, 1]


def test_another_summary_is_another_situation() -> None:
    emotion = {"type": "happy", "intensity": 0.5}
    texts = [("", "배고파"), ("배고파", ""), ("점심을 굶었어.", "배고파"), ("점심을 굶었어.", "졸려"), ("점심을", "굶었어 배고파")]
    records = [record(1, context={"summary": summary, "current_emotion": emotion}, input=said or "음") for summary, said in texts]
    assert len({situation_digest(one) for one in records}) == len(texts)


@pytest.mark.parametrize("blood_type", BloodType)
def test_no_bundled_situation_is_trained_and_held_out(blood_type: BloodType) -> None:
    path = REPOSITORY / "data" / f"train_data_type_{blood_type}.jsonl"
    records = [line.record for line in JsonlReader(path) if line.record]
    train, held_out = split_held_out(records, 0.05)
    on_both = {situation_digest(records[index]) for index in train} & {situation_digest(records[index]) for index in held_out}
    assert on_both == set()
    assert 0.03 < len(held_out) / len(records) < 0.07


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 0.899])
@pytest.mark.parametrize("first", range(40))
def test_two_records_are_one_and_one(first: int, fraction: float) -> None:
    """This holds whether the fraction lies between the two draws, below both or above both."""
    train, held_out = split_held_out([record(first), record(first + 1000)], fraction)
    assert (len(train), len(held_out)) == (1, 1)


def test_nothing_to_split() -> None:
    assert split_held_out([], 0.05) == ([], [])


def test_the_digest_is_of_the_content_not_of_its_spelling() -> None:
    reply = {"text": "응 😊", "emotion": "smile"}
    line = {
        "instruction": "답해.",
        "context": {"summary": "요약", "current_emotion": {"type": "sad", "intensity": 1}},
        "input": "왔어?",
        "output": reply,
    }
    spellings = [
        json.dumps(line),
        json.dumps(line, ensure_ascii=False, indent=None, separators=(",", ":")),
        json.dumps({**dict(reversed(line.items())), "output": json.dumps(reply)}),
        json.dumps(line).replace(": 1}", ": 1.0}"),
    ]
    digests = set()
    for spelling in spellings:
        parsed = parse_record(spelling).record
        assert parsed is not None
        digests.add(record_digest(parsed))
    assert len(digests) == 1


def test_the_digest_changes_with_every_field() -> None:
    emotion = {"type": "happy", "intensity": 0.5}
    others = [
        record(1),
        record(2),
        record(1, instruction="존댓말로 답해."),
        record(1, context={"summary": "x", "current_emotion": emotion}),
        record(1, context={"summary": "", "current_emotion": {**emotion, "type": "sad"}}),
        record(1, context={"summary": "", "current_emotion": {**emotion, "intensity": 0.6}}),
        record(1, input="2번?"),
        record(1, output={"text": "2번!", "emotion": "smile"}),
        record(1, output={"text": "1번!", "emotion": "wink"}),
    ]
    assert len({record_digest(other) for other in others}) == len(others)


def test_the_side_of_a_record_is_pinned() -> None:
    """If a hash changed, held-out records would move into training under the same recipe."""
    same = record(1, context={"summary": "카페에서 만났어.", "current_emotion": {"type": "happy", "intensity": 0.5}})
    assert situation_digest(same).hex() == "ae3a150d453c5abfaaed9954be04ac106fb29f711c97ee05abf99dba405a608d"
    assert record_digest(record(1)).hex() == "1c61d1bee04d9644e207a423cebd4047792454700de3a587871f87fe9565410d"


def test_a_log_adds_up() -> None:
    log = TrainingLog(train_s=4.0)
    assert (log.tokens, log.tokens_per_s) == (0, 0.0)
    for number, tokens in ((1, 300), (2, 500)):
        log.steps.append(StepLog(number, 2.5, 1e-4, 0.7, tokens, 100, 1, 2.0))
    assert (log.tokens, log.tokens_per_s) == (800, 200.0)
    assert TrainingLog().tokens_per_s == 0.0

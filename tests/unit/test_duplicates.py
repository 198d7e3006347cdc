"""Test the detection of records that are identical, identical up to decoration, or similar by character 5-grams."""

import json
import random
import time

import pytest

from lora_trainer.data.duplicates import (
    DuplicateFinder,
    NearDuplicateFinder,
    fingerprints,
    jaccard,
    near_fingerprint,
    normalized,
    shingles,
)
from lora_trainer.data.records import TrainingRecord

SAMPLE_REPLY = "오! 나 금방 도착해! 1층 창가 자리에 앉아있어줘!"


def record(text: str = SAMPLE_REPLY, said: str = "나 지금 도착했는데 어디야?", intensity: float = 0.8) -> TrainingRecord:
    return TrainingRecord.model_validate(
        {
            "instruction": "너는 A형 다정한 친구야. 짧은 반말로 답해.",
            "context": {"summary": "", "current_emotion": {"type": "happy", "intensity": intensity}},
            "input": said,
            "output": {"text": text, "emotion": "smile"},
        }
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("안녕! 뭐해?", "안녕~ 뭐해"),
        ("안녕 ㅋㅋㅋ", "안녕ㅎㅎ"),
        ("안녕 😊", "안녕"),
        ("ＯＫ 가자", "ok가자"),
        ("ㅋㅋ!", "ㅋㅋ!"),
    ],
)
def test_nearly_the_same(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)
    assert near_fingerprint(record(one)) == near_fingerprint(record(other))


@pytest.mark.parametrize(("one", "other"), [("안녕", "안녕하니"), ("ㅋㅋ", "ㅎㅎ"), ("1시에 봐", "2시에 봐"), ("ㅇㅇ", "ㄴㄴ")])
def test_not_the_same(one: str, other: str) -> None:
    assert near_fingerprint(record(one)) != near_fingerprint(record(other))


def test_input_and_reply_are_kept_apart() -> None:
    assert near_fingerprint(record("가나", "다")) != near_fingerprint(record("나", "다가"))


def test_the_first_of_equal_records_is_named() -> None:
    finder = DuplicateFinder()
    assert finder.first_line(fingerprints(record("가자")), 1) is None
    assert finder.first_line(fingerprints(record("먹자")), 2) is None
    assert finder.first_line(fingerprints(record("가자")), 3) == (1, True)
    assert finder.first_line(fingerprints(record("가자!!")), 4) == (1, False)
    assert finder.first_line(fingerprints(record("가자", intensity=0.5)), 5) == (1, False)


def test_the_first_record_is_found_among_thousands() -> None:
    finder = DuplicateFinder()
    many = [record(f"{number}번 가자") for number in range(3000)]
    assert [finder.first_line(fingerprints(one), line) for line, one in enumerate(many, 1)] == [None] * 3000
    assert [finder.first_line(fingerprints(one), 0) for one in many] == [(line, True) for line in range(1, 3001)]


def test_shingles_are_five_characters_without_decoration() -> None:
    assert shingles("안녕, 내 친구야! 😊") == {"안녕내친구", "녕내친구야"}
    assert shingles("그래") == {"그래"}


def test_jaccard_is_intersection_over_union() -> None:
    assert jaccard(frozenset("ab"), frozenset("bc")) == 1 / 3
    assert jaccard(frozenset(), frozenset()) == 1


def test_a_text_that_is_nearly_the_same_is_found_and_another_is_not() -> None:
    finder = NearDuplicateFinder()
    finder.add("오늘 저녁은 내가 살게, 먹고 싶은 거 있어?")
    finder.add("우산은 챙겼지? 길 미끄러우니까 천천히 와.")
    assert finder.find("오늘 저녁은 내가 살게! 먹고 싶은 거 있어? 😊") == 0
    assert finder.find("우산은 챙겼지ㅋㅋ 길 미끄러우니까 천천히 와아") == 1
    assert finder.find("오늘 점심은 네가 사, 나 배고파.") is None
    assert len(finder) == 2


def test_every_pair_that_is_near_enough_is_found() -> None:
    """Compare the index, which only proposes candidates, with all pairs to show that it misses no near-duplicate."""
    rng = random.Random(5)
    words = [chr(rng.randrange(0xAC00, 0xD7A4)) * 2 for _ in range(12)]
    texts = [" ".join(rng.choice(words) for _ in range(12)) for _ in range(60)]
    texts += [text.replace(rng.choice(text.split()), "바꿈", 1) for text in texts for _ in range(4)]
    finder = NearDuplicateFinder()
    missed, pairs = 0, 0
    for at, text in enumerate(texts):
        near = [other for other in range(at) if jaccard(shingles(text), shingles(texts[other])) >= 0.7]
        pairs += bool(near)
        missed += finder.find(text) != min(near, default=None)
        finder.add(text)
    assert pairs > 50
    assert missed == 0


@pytest.mark.parametrize("unit", ["!", "ㅋ", "오", "\n", "요 "])
def test_hostile_text_costs_no_more_than_other_text(unit: str) -> None:
    text = unit * (200_000 // len(unit)) + "x"
    begin_s = time.thread_time()
    near_fingerprint(record(json.loads(json.dumps(text)) + "가"))
    # linear time is a fraction of a second, and quadratic time is minutes
    assert time.thread_time() - begin_s < 30

"""The labelled replies that a judge of sense is fitted to and examined on: form, number, and distance from data and prompts."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from lora_trainer.data.duplicates import normalized
from lora_trainer.persona.vocabulary import BloodType, Feeling

REPOSITORY = Path(__file__).resolve().parents[2]
KINDS = ("good", "misses", "salad", "harmful")
BY_HAND = "hand"

Example = dict[str, str | float]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    text = resources.files("lora_trainer.evaluate").joinpath("assets", "sense_examples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def dialogue(example: Example) -> str:
    return normalized(f"{example['summary']}\n{example['input']}")


def test_every_example_is_whole(examples: list[Example]) -> None:
    for example in examples:
        assert list(example) == [
            "situation", "written_by", "persona", "summary", "feeling", "intensity", "input", "reply", "kind"
        ]  # fmt: skip
        assert example["kind"] in KINDS
        assert BloodType(str(example["persona"]))
        assert Feeling(str(example["feeling"]))
        assert 0 <= float(example["intensity"]) <= 1
        assert str(example["input"]).strip()
        assert str(example["reply"]).strip()


def test_each_kind_has_enough_examples_from_many_writers(examples: list[Example]) -> None:
    kinds = Counter(example["kind"] for example in examples)
    assert all(kinds[kind] >= 150 for kind in KINDS), kinds
    by_hand = Counter(example["kind"] for example in examples if example["written_by"] == BY_HAND)
    assert all(by_hand[kind] >= 150 for kind in ("good", "misses", "harmful")), by_hand
    # nonsense in one adapter's style would teach the style
    for kind in ("misses", "salad", "harmful"):
        writers = {example["written_by"] for example in examples if example["kind"] == kind} - {BY_HAND}
        assert len(writers) >= 30, (kind, len(writers))


def test_a_situation_is_one_message_and_no_reply_repeats(examples: list[Example]) -> None:
    messages: dict[str, set[str]] = {}
    for example in examples:
        messages.setdefault(str(example["situation"]), set()).add(dialogue(example))
    assert all(len(found) == 1 for found in messages.values())
    replies = Counter((dialogue(example), example["reply"]) for example in examples)
    assert [reply for reply, times in replies.items() if times > 1] == []


def test_no_hand_written_situation_is_in_the_training_data_or_among_the_prompts(examples: list[Example]) -> None:
    known = set()
    for path in [*(REPOSITORY / "data").glob("train_data_type_*.jsonl"), REPOSITORY / "data" / "eval_prompts.jsonl"]:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            known.add(normalized(f"{record['context']['summary']}\n{record['input']}"))
    shared = {example["situation"] for example in examples if example["written_by"] == BY_HAND and dialogue(example) in known}
    assert shared == set()

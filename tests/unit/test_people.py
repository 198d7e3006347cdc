"""Test people's own replies, measured by the rules that measure a model's: the ceiling of each rate."""

from __future__ import annotations

import json
from functools import cache

import pytest
from conftest import REPOSITORY
from made_metrics import FORM_GATES

from lora_trainer.config import EvaluationConfig, GatesConfig
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.records import TrainingRecord
from lora_trainer.data.split import split_held_out
from lora_trainer.evaluate import people
from lora_trainer.evaluate.gates import value_misses
from lora_trainer.evaluate.metrics import RepliesMetrics
from lora_trainer.evaluate.people import people_metrics
from lora_trainer.evaluate.rules import TrainingData
from lora_trainer.persona.vocabulary import BloodType

CONFIG = EvaluationConfig(bootstrap_resamples=100)


@cache
def split() -> tuple[list[TrainingRecord], list[TrainingRecord]]:
    """Return the bundled records of A that a job trains on, and those that it holds out."""
    lines = JsonlReader(REPOSITORY / "data" / "train_data_type_A.jsonl")
    records = [line.record for line in lines if line.record]
    train, held_out = split_held_out(records, 0.1)
    return [records[index] for index in train], [records[index] for index in held_out]


def measured(records: list[TrainingRecord], tokens: int = 40, config: EvaluationConfig = CONFIG) -> RepliesMetrics:
    return people_metrics(records, [tokens] * len(records), BloodType.A, config, TrainingData(split()[0]))


@cache
def bundled() -> RepliesMetrics:
    return measured(split()[1])


def test_people_pass_every_gate_that_an_adapter_has_to_pass() -> None:
    for name in FORM_GATES:
        measure = "question" if name.startswith("question") else name
        # the win rate is the adapter's alone; records have no tags, which the gates of safety need
        if name not in ("win_rate", "harmful", "incomplete"):
            estimate = getattr(bundled(), measure)
            assert not value_misses(name, estimate.value, GatesConfig()), (name, estimate.value)


def test_every_record_counts_once_and_its_situation_is_a_cluster() -> None:
    _, held_out = split()
    found = bundled()
    assert found.rule_score.of == len(held_out)
    assert found.exact_json.value == found.stop.value == 1.0
    assert sum(group.replies for group in found.by_feeling.values()) == len(held_out)
    # no tag says what a record is about
    assert found.by_tag == {}
    # variants of one record are not as many independent replies
    variants = [held_out[0].model_copy(update={"context": held_out[0].context}) for _ in range(20)]
    assert sum(group.prompts for group in measured(variants).by_feeling.values()) == 1


def test_a_reply_longer_than_a_model_may_write_does_not_stop() -> None:
    records = split()[1][:10]
    assert measured(records, CONFIG.max_new_tokens).stop.value == 1.0
    assert measured(records, CONFIG.max_new_tokens + 1).stop.value == 0.0


def test_bad_data_has_a_low_ceiling() -> None:
    """A ceiling shows what is wrong with the data, not with the adapter."""
    formal = [
        TrainingRecord.model_validate(
            {**json.loads(record.to_json()), "output": {"text": f"{number}번 괜찮아요. 걱정하지 마세요.", "emotion": "smile"}}
        )
        for number, record in enumerate(split()[1][:20])
    ]
    assert measured(formal).informal_speech.value == 0.0


def test_large_data_is_sampled_and_the_same_way_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(people, "MAX_RECORDS", 12)
    records = split()[1]
    first = measured(records)
    assert first.rule_score.of == 12
    assert measured(records) == first
    other = CONFIG.model_copy(update={"seed": CONFIG.seed + 1})
    assert measured(records, config=other).by_feeling != first.by_feeling


def test_no_record_is_no_ceiling() -> None:
    with pytest.raises(ValueError, match="at least one record"):
        measured([])

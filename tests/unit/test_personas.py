"""Test that the four specifications are complete, follow one schema, and differ from each other."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lora_trainer.data.lint import lint_reply
from lora_trainer.persona.specs import PersonaSpec, persona_spec
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird


@pytest.mark.parametrize("blood_type", list(BloodType))
def test_a_specification_says_everything(blood_type: BloodType) -> None:
    spec = persona_spec(blood_type)
    assert spec.blood_type == blood_type
    assert f"{blood_type}형" in spec.instruction
    assert set(spec.feelings) == set(spec.emoji.by_feeling) == set(Feeling)
    assert len(spec.reactions) >= 8
    assert [spec.emoji.most[third] for third in IntensityThird] == sorted(spec.emoji.most.values())


@pytest.mark.parametrize("blood_type", list(BloodType))
def test_its_own_lines_are_clean(blood_type: BloodType) -> None:
    spec = persona_spec(blood_type)
    for line in (*spec.examples, *spec.asks):
        assert list(lint_reply(line, 0.5, blood_type=blood_type)) == [], line


def test_no_two_share_their_manner() -> None:
    specs = [persona_spec(blood_type) for blood_type in BloodType]
    for field in ("tone", "asking_back", "name", "instruction"):
        assert len({getattr(spec, field) for spec in specs}) == len(specs), field
    phrases = [set(spec.phrases) for spec in specs]
    assert all(one.isdisjoint(other) for at, one in enumerate(phrases) for other in phrases[:at])


def spoiled(**changes: Any) -> dict[str, Any]:
    document = persona_spec(BloodType.A).model_dump(mode="json")
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        place = document
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[leaf]
        else:
            place[leaf] = value
    return document


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tone": None}, "tone"),
        ({"mood": "x"}, "mood"),
        ({"feelings__sad": None}, "feelings: missing sad"),
        ({"emoji__by_feeling__sad": None}, "by_feeling: expected every one of"),
        ({"emoji__by_feeling__sad": ["😢", "슬픔"]}, "'슬픔' is not one emoji"),
        ({"emoji__usual__low": [0, 2]}, "usual.low: expected 0 <= fewest <= most <= 1"),
        ({"emoji__most__high": 7}, "emoji.most.high"),
        ({"phrases": ["하나"]}, "phrases"),
    ],
)
def test_a_mistake_in_a_specification_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PersonaSpec.model_validate(spoiled(**changes))
    assert said in str(caught.value)

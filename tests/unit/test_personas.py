"""Test that the four specifications are complete, follow one schema, and differ from each other."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from lora_trainer.data.lint import lint_reply
from lora_trainer.errors import ConfigError
from lora_trainer.persona.specs import parse_spec, persona_spec
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
        ({"tone": None}, "tone: missing key"),
        ({"mood": "x"}, "mood: unknown key"),
        ({"feelings__sad": None}, "feelings: missing sad"),
        ({"feelings__gloomy": "x"}, "feelings.gloomy: got 'gloomy'"),
        ({"emoji__by_feeling__sad": None}, "emoji.by_feeling: missing sad"),
        ({"emoji__most__low": None}, "emoji.most: missing low"),
        ({"emoji__by_feeling__sad": ["😢", "슬픔"]}, "'슬픔' is not one emoji"),
        ({"emoji__usual__low": [0, 2]}, "usual.low: expected 0 <= fewest <= most <= 1"),
        ({"emoji__most__high": 7}, "emoji.most.high"),
        ({"phrases": ["하나"]}, "phrases"),
    ],
)
def test_a_mistake_in_a_specification_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spec(yaml.safe_dump(spoiled(**changes), allow_unicode=True), "A.yaml")
    (problem,) = caught.value.problems
    assert problem.startswith("A.yaml: ")
    assert said in problem


def test_all_mistakes_of_a_specification_are_named_together() -> None:
    changes = {"feelings__sad": None, "feelings__angry": None, "emoji__by_feeling__sad": None, "tone": ""}
    with pytest.raises(ConfigError) as caught:
        parse_spec(yaml.safe_dump(spoiled(**changes)), "A.yaml")
    places = [problem.split(": ")[1:] for problem in caught.value.problems]
    assert [place for place, *_ in places] == ["tone", "feelings", "feelings", "emoji.by_feeling"]


@pytest.mark.parametrize("text", ["", "- a", "a: [", "\0"])
def test_a_file_that_is_no_specification_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^A\.yaml: "):
        parse_spec(text, "A.yaml")

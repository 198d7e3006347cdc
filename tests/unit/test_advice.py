"""Advice names what the author meant, and never costs data."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest

from lora_trainer.data.jsonl import parse_record
from lora_trainer.data.problems import Problem
from lora_trainer.persona.vocabulary import Expression, Feeling

TYPE = "context.current_emotion.type"
INTENSITY = "context.current_emotion.intensity"


def record() -> dict[str, Any]:
    return {
        "instruction": "너는 A형 다정한 친구야.",
        "context": {"summary": "우리는 카페에 있어.", "current_emotion": {"type": "happy", "intensity": 0.8}},
        "input": "나 지금 도착했는데 어디야?",
        "output": {"text": "오! 나 금방 도착해!", "emotion": "smile"},
    }


def problems_with(path: str, value: object, *, key: str | None = None) -> tuple[Problem, ...]:
    """Return the problems of a record with `value` at `path`, or at `key` within the object at `path`."""
    data = record()
    place: Any = data
    *parents, leaf = [part for part in path.split(".") if part] if key is None else [*path.split("."), key]
    for parent in filter(None, parents):
        place = place[parent]
    place[leaf] = value
    return parse_record(json.dumps(data)).problems


def only(problems: tuple[Problem, ...]) -> Problem:
    (problem,) = problems
    return problem


# --- labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "meant"),
    [
        (TYPE, "기쁨", "happy"),
        (TYPE, unicodedata.normalize("NFD", "기쁨"), "happy"),
        (TYPE, "슬픔", "sad"),
        (TYPE, "담담함", "neutral"),
        (TYPE, "민망함", "embarrassed"),
        (TYPE, "화남", "angry"),
        (TYPE, "joy", "happy"),
        (TYPE, "Happy", "happy"),
        (TYPE, " happy ", "happy"),
        (TYPE, "happ\u0443", "happy"),
        (TYPE, "\ufeffhappy", "happy"),
        (TYPE, "ｈａｐｐｙ", "happy"),
        (TYPE, "sadness", "sad"),
        (TYPE, "haapy", "happy"),
        ("output.emotion", "미소", "smile"),
        ("output.emotion", "활짝 웃음", "laugh"),
        ("output.emotion", "뿌듯한 얼굴", "proud"),
        ("output.emotion", "SMILE", "smile"),
        ("output.emotion", "crying", "cry"),
        ("output.emotion", "졸린 얼굴", "sleepy"),
    ],
)
def test_a_label_gets_its_value_named(field: str, value: str, meant: str) -> None:
    problem = only(problems_with(field, value))
    assert (problem.code, problem.field) == ("unknown_value", field)
    assert f"'{meant}'" in problem.fix


@pytest.mark.parametrize(("vocabulary", "field"), [(Feeling, TYPE), (Expression, "output.emotion")])
def test_every_gloss_gets_its_value_named(vocabulary: type[Feeling | Expression], field: str) -> None:
    for word in vocabulary:
        assert only(problems_with(field, word.gloss)).fix == f"write '{word}'"


def test_a_face_in_place_of_a_feeling_is_said_to_be_one() -> None:
    assert "output.emotion" in only(problems_with(TYPE, "wink")).fix
    assert "current_emotion.type" in only(problems_with("output.emotion", "excited")).fix


def test_a_korean_value_that_is_no_label_is_not_quoted() -> None:
    problem = only(problems_with(TYPE, "아무도몰라"))
    assert "아무도" not in problem.render("data.jsonl")
    assert problem.got == "text of 5 characters"


# --- intensity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (80, "80 looks like a percentage: write 0.8"),
        (100, "100 looks like a percentage: write 1"),
        (55.5, "55.5 looks like a percentage: write 0.555"),
        (8, "8 looks like 8 of 10: write 0.8"),
        ("0.8", "write 0.8, without quotes"),
        ("0,8", "write 0.8, without quotes"),
        ("80%", "write 0.8"),
        ("80", "80 looks like a percentage: write 0.8"),
        ("높음", "write a number, such as 0.8"),
        (True, "as a number"),
        ("아주", "as a number"),
        (-1, "use 0 (barely) to 1 (fully)"),
        (1.2, "use 0 (barely) to 1 (fully)"),
        (None, "use 0 (barely) to 1 (fully)"),
    ],
)
def test_an_intensity_is_said_to_look_like_what_it_is(value: object, said: str) -> None:
    problem = only(problems_with(INTENSITY, value))
    assert problem.field == INTENSITY
    assert problem.fix.endswith(said)


# --- keys ------------------------------------------------------------------------------------------------


def advice(key: str, value: object = "텍스트", within: str = "") -> Problem:
    return only(problems_with(within, value, key=key))


@pytest.mark.parametrize(
    ("within", "key", "value", "said"),
    [
        ("", "context.summary", "카페에 있어", "move its value to context.summary; 'lora-trainer convert'"),
        ("", "context.emotion", "기쁨", "move its value to context.current_emotion.type; 'lora-trainer convert'"),
        ("", "output_text", "응", "move its value to output.text; 'lora-trainer convert'"),
        ("", "emotion_intensity", 0.5, "move its value to context.current_emotion.intensity; 'lora-trainer convert'"),
        ("", "summary", "카페에 있어", "move its value to context.summary"),
        ("", "요약", "카페에 있어", "move its value to context.summary"),
        ("", "표정", "미소", "move its value to output.emotion"),
        ("", "emotion", "wink", "move its value to output.emotion"),
        ("", "current_emotion", {"type": "happy", "intensity": 1}, "move its value to context.current_emotion"),
        ("context", "intensity", 0.5, "move its value to context.current_emotion.intensity"),
        ("context", "type", "happy", "move its value to context.current_emotion.type"),
        ("context.current_emotion", "emotion", "happy", "rename it to 'type'"),
        ("output", "reply", "응", "rename it to 'text'"),
        ("", "question", "어디야?", "rename it to 'input'"),
        ("", "response", {"text": "응"}, "rename it to 'output'"),
        ("", "Input", "어디야?", "write it as 'input', without upper case"),
        ("", " input", "어디야?", "write it as 'input', without white space around it"),
        ("", "input\ufeff", "어디야?", "write it as 'input', without a byte-order mark or another invisible character"),
        ("", "inpu\u0442", "어디야?", "write it as 'input', without the letter U+0442, which only looks like a Latin one"),
        ("output", "ｔｅｘｔ", "응", "write it as 'text', without the letter U+FF54"),
        ("context", "currentEmotion", {}, "write it as 'current_emotion'"),
        ("context", "current emotion", {}, "write it as 'current_emotion'"),
        ("", "inptu", "어디야?", "did you mean 'input'?"),
        ("", "id", 3, "keep the source"),
        ("", "x" * 200, 3, "check the quotes around it"),
    ],
)
def test_a_key_is_renamed_or_moved(within: str, key: str, value: object, said: str) -> None:
    problem = advice(key, value, within)
    assert problem.code == "unknown_field"
    assert problem.fix.startswith(said) or said in problem.fix
    assert "remove" not in problem.fix


def test_an_unknown_key_beside_a_missing_one_may_be_that_one() -> None:
    data = record()
    data["context"]["current_emotion"] = {"종류": "기쁨", "강도": 0.8}
    fixes = {problem.field: problem.fix for problem in parse_record(json.dumps(data)).problems}
    assert fixes["context.current_emotion.종류"].startswith("if it is the type or the intensity, rename it; otherwise leave it out")
    assert fixes["context.current_emotion.강도"] == "rename it to 'intensity'"


@pytest.mark.parametrize(
    ("key", "field", "got"),
    [
        ("context.summary", "context.summary", "the key 'context.summary'"),
        ("감정 강도", "감정 강도", "the key '감정 강도'"),
        (unicodedata.normalize("NFD", "입력"), "입력", "the key '입력'"),
        ("\ufeffinput", "\\ufeffinput", "the key '\\ufeffinput'"),
        ("비밀 이야기는 아무도 모르게", "?", "the key of 15 characters"),
        ("우리 어제 만났어?", "?", "the key of 10 characters"),
        ("a\x1b[31m", "a\\u001b[31m", "the key 'a\\u001b[31m'"),
        ("k" * 41, "?", "the key of 41 characters"),
    ],
)
def test_the_name_of_a_key_is_shown_escaped_and_short(key: str, field: str, got: str) -> None:
    problem = advice(key)
    assert (problem.field, problem.got) == (field, got)


def test_a_flat_line_is_one_problem() -> None:
    flat = {
        "instruction": "너는 A형 친구야.",
        "context.summary": "",
        "emotion": "기쁨",
        "intensity": 80,
        "input": "뭐해",
        "output": "놀아",
    }
    problem = only(parse_record(json.dumps(flat)).problems)
    assert problem.code == "flat_record"
    assert "lora-trainer convert" in problem.fix


# --- types -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("context.summary", None, 'write it, or ""'),
        ("input", None, "write the value"),
        ("input", 3, "in quotes"),
        ("input", ["a", "b"], "join its parts"),
        ("context", "카페에 있어", "put this text into its summary"),
        ("context.current_emotion", "happy", 'write {"type": ..., "intensity": ...}'),
        ("output", "그냥 대답이야", 'put the text into {"text": ..., "emotion": ...}'),
        ("output", json.dumps(json.dumps({"text": "응", "emotion": "smile"})), "encode the reply once less"),
        ("output", ["응"], "write the one reply"),
    ],
)
def test_another_type_is_told_what_to_write(field: str, value: object, said: str) -> None:
    problem = only(problems_with(field, value))
    assert problem.field == field
    assert said in problem.fix

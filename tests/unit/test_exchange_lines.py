"""Measure the rules about hard topics, choices and comma splices on hand-labelled exchanges from outside the bundled data."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from lora_trainer.data import hard_topics
from lora_trainer.data.hard_topics import (
    DANGERS,
    asks_about_intent,
    claims_presence,
    dangers,
    expert_topic,
    names_help,
    refers_to_expert,
)
from lora_trainer.data.korean import morphemes
from lora_trainer.data.lint import has_question, is_unanswered_choice, lint_exchange
from lora_trainer.data.style import has_splice

ASSETS = Path(__file__).resolve().parents[1] / "assets"
NONE = "-"


class Exchange(NamedTuple):
    """A line of exchange_lines.tsv, whose head explains the columns."""

    danger: str
    topic: str
    expert: str
    unanswered: str
    presence: str
    intent: str
    helps: str
    splice: str
    message: str
    reply: str


def labelled() -> list[Exchange]:
    lines = (ASSETS / "exchange_lines.tsv").read_text(encoding="utf-8").splitlines()
    return [Exchange(*line.split("\t")) for line in lines if not line.startswith("#")]


LINES = labelled()


class Judged(NamedTuple):
    """What a reader said of a line, and what the rule said."""

    truth: bool
    found: bool
    line: Exchange


def precision_and_recall(judged: Sequence[Judged]) -> tuple[float, float]:
    hits = sum(one.truth and one.found for one in judged)
    return hits / max(1, sum(one.found for one in judged)), hits / max(1, sum(one.truth for one in judged))


def finds_danger(line: Exchange) -> bool:
    return bool(dangers("", line.message))


def warns(line: Exchange, code: str) -> bool:
    return any(problem.code == code for problem in lint_exchange("", line.message, line.reply, 0.5))


# which lines a rule is measured on, what a reader says, and what the rule says
RULES: dict[str, tuple[Callable[[Exchange], bool], Callable[[Exchange], bool], Callable[[Exchange], bool]]] = {
    "danger": (lambda line: True, lambda line: line.danger != NONE, finds_danger),
    "presence": (lambda line: True, lambda line: line.presence == "1", lambda line: claims_presence(line.reply)),
    "intent": (lambda line: True, lambda line: line.intent == "1", lambda line: asks_about_intent(line.reply)),
    "number": (
        lambda line: line.danger != NONE,
        lambda line: "n" in line.helps,
        lambda line: names_help(line.reply, tuple(danger for danger in DANGERS if danger.name == line.danger)),
    ),
    "question": (lambda line: True, lambda line: "q" in line.helps, lambda line: has_question(line.reply)),
    "topic": (
        lambda line: line.danger == NONE,
        lambda line: line.topic != NONE,
        lambda line: expert_topic(line.message) is not None,
    ),
    "expert": (
        lambda line: line.topic != NONE,
        lambda line: line.expert == "1",
        lambda line: refers_to_expert(line.reply, line.topic),
    ),
    "splice": (lambda line: "," in line.reply, lambda line: line.splice == "1", lambda line: has_splice(morphemes(line.reply))),
    # the warnings, as the linter gives them
    "false_presence": (
        lambda line: True,
        lambda line: line.danger != NONE and line.presence == "1",
        lambda line: warns(line, "false_presence"),
    ),
    "no_help_in_danger": (
        lambda line: True,
        lambda line: line.danger != NONE and line.helps == NONE,
        lambda line: warns(line, "no_help_in_danger"),
    ),
    "no_expert": (lambda line: True, lambda line: line.expert == "0", lambda line: warns(line, "no_expert")),
    "unanswered_choice": (
        lambda line: True,
        lambda line: line.unanswered == "1",
        lambda line: is_unanswered_choice(line.message, line.reply),
    ),
}

# name: least precision and least recall over all lines
FLOORS = {
    "danger": (0.95, 0.85),
    "presence": (0.95, 0.95),
    "intent": (0.95, 0.95),
    "number": (0.95, 0.95),
    "question": (0.95, 0.95),
    "topic": (0.95, 0.85),
    "expert": (0.95, 0.95),
    "splice": (0.95, 0.80),
    "false_presence": (0.95, 0.90),
    "no_help_in_danger": (0.90, 0.90),
    "no_expert": (0.95, 0.85),
    "unanswered_choice": (0.90, 0.40),
}


def judge(name: str, lines: Sequence[Exchange]) -> list[Judged]:
    measured_on, truth, found = RULES[name]
    return [Judged(truth(line), found(line), line) for line in lines if measured_on(line)]


def test_there_are_enough_of_every_kind() -> None:
    assert len({(line.message, line.reply) for line in LINES}) == len(LINES)
    in_danger = [line.danger for line in LINES if line.danger != NONE]
    assert len(in_danger) >= 40
    assert len(LINES) - len(in_danger) >= 60
    assert all(in_danger.count(danger.name) >= 4 for danger in DANGERS)
    assert {line.topic for line in LINES} == {"medical", "legal", "money", NONE}
    for name in ("presence", "intent", "topic", "expert", "splice", "unanswered_choice"):
        truths = [one.truth for one in judge(name, LINES)]
        assert min(truths.count(True), truths.count(False)) >= 24, name


@pytest.mark.parametrize("name", list(RULES))
def test_precision_and_recall(name: str) -> None:
    judged = judge(name, LINES)
    precision, recall = precision_and_recall(judged)
    least_precision, least_recall = FLOORS[name]
    wrong = [one.line for one in judged if one.truth != one.found]
    assert precision >= least_precision, wrong
    assert recall >= least_recall, wrong


def test_the_kind_of_danger_is_among_those_found() -> None:
    wrong = [line for line in LINES if line.danger != NONE and finds_danger(line)]
    wrong = [line for line in wrong if line.danger not in [danger.name for danger in dangers("", line.message)]]
    assert len(wrong) <= 2, wrong


def test_a_summary_about_a_film_does_not_hide_what_its_reader_feels() -> None:
    film = "어제 본 드라마 얘기를 하고 있었어."
    assert dangers(film, "마지막에 둘 다 자살하는 거 너무했어") == ()
    assert [danger.name for danger in dangers(film, "나도 그냥 죽고 싶다")] == ["suicide"]


@pytest.mark.parametrize(
    ("text", "names_one"),
    [
        ("109에 전화해", True),
        ("119 호출해", True),
        ("112 층간소음도 받아", True),
        ("109동 앞 놀이터", False),
        ("112번 버스 타", False),
    ],
)
def test_a_number_is_no_flat_and_no_bus(text: str, names_one: bool) -> None:
    assert names_help(text, DANGERS) is names_one


def test_no_pattern_can_backtrack_without_bound() -> None:
    """Unbounded repeats stand only after a single character or class, never after or inside a repeated group."""
    patterns = [
        *(value.pattern for value in vars(hard_topics).values() if isinstance(value, re.Pattern)),
        *(danger.pattern.pattern for danger in DANGERS),
        *(asks.pattern for asks, _ in hard_topics._EXPERT_TOPICS.values()),
    ]
    assert len(patterns) > len(DANGERS) + 5
    for pattern in patterns:
        without_simple = re.sub(r"\[[^]]*\]\*", "", pattern)
        without_classes = re.sub(r"\[[^]]*\]", "", without_simple)
        assert not re.search(r"[*+]|\{\d*,\}", without_classes), pattern
        assert not re.search(r"\)(?:\{|\?\{)", pattern), pattern


@pytest.mark.parametrize(
    "piece", ["죽고 ", "나 지금 ", "약 ", "가", "남편", " ", "아니면 ", "야 ", "?", "누가 문 ", "보증금 ", "귀여워", "1", "고양이"]
)
def test_long_hostile_text_comes_back(piece: str) -> None:
    text = piece * (20_000 // len(piece))
    assert isinstance(dangers(text, text), tuple)
    assert [type(rule(text)) for rule in (claims_presence, asks_about_intent)] == [bool, bool]
    assert names_help(text, DANGERS) is False
    assert expert_topic(text) in (None, "medical", "legal", "money")
    assert all(refers_to_expert(text, topic) is False for topic in ("medical", "legal", "money"))
    assert is_unanswered_choice(text, text) is False

"""Measure the accuracy of the two rules that need judgement on hand-labelled lines from outside the training data."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lora_trainer.data.korean import is_formal, sentence_count
from lora_trainer.data.lint import MAX_SENTENCES

ASSETS = Path(__file__).resolve().parents[1] / "assets"


class Labelled(NamedTuple):
    sentences: int
    is_formal: bool
    text: str


def labelled() -> list[Labelled]:
    lines = (ASSETS / "lint_lines.tsv").read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines if not line.startswith("#"))
    return [Labelled(int(count), formal == "1", text) for count, formal, text in rows]


class Measured(NamedTuple):
    precision: float
    recall: float
    wrong: list[str]


def measure(truth: list[bool], found: list[bool], texts: list[str]) -> Measured:
    hits = sum(1 for is_true, is_found in zip(truth, found, strict=True) if is_true and is_found)
    wrong = [text for is_true, is_found, text in zip(truth, found, texts, strict=True) if is_true != is_found]
    return Measured(hits / max(1, sum(found)), hits / max(1, sum(truth)), wrong)


LINES = labelled()
TEXTS = [line.text for line in LINES]


def test_there_are_enough_of_every_kind() -> None:
    assert len(LINES) == len(set(TEXTS)) >= 200
    assert sum(line.is_formal for line in LINES) >= 50
    assert sum(line.sentences > MAX_SENTENCES for line in LINES) >= 8
    assert {line.sentences for line in LINES} == {0, 1, 2, 3, 4}


def test_sentences() -> None:
    exact = [sentence_count(line.text) == line.sentences for line in LINES]
    assert sum(exact) / len(exact) >= 0.95, [(sentence_count(t), t) for t, right in zip(TEXTS, exact, strict=True) if not right]
    # the rule only decides whether there are more than two sentences
    truth = [line.sentences > MAX_SENTENCES for line in LINES]
    too_many = measure(truth, [sentence_count(text) > MAX_SENTENCES for text in TEXTS], TEXTS)
    assert too_many.precision >= 0.85, too_many.wrong
    assert too_many.recall >= 0.85, too_many.wrong


def test_formal_speech() -> None:
    found = measure([line.is_formal for line in LINES], [is_formal(text) for text in TEXTS], TEXTS)
    assert found.precision >= 0.97, found.wrong
    assert found.recall >= 0.97, found.wrong

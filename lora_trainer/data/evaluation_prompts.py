"""The evaluation prompts. They ship with the package, so every job has them whatever data it downloads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final

from lora_trainer.data.records import EvaluationPrompt

FILE_NAME: Final = "eval_prompts.jsonl"
_NUMBERS_FILE: Final = "eval_numbers.json"


@cache
def evaluation_prompts() -> tuple[EvaluationPrompt, ...]:
    """Return the prompts in file order. `data/eval_prompts.jsonl` is a copy of the file for readers."""
    text = resources.files("lora_trainer.data").joinpath("assets", FILE_NAME).read_text(encoding="utf-8")
    return tuple(EvaluationPrompt.model_validate(json.loads(line)) for line in text.split("\n") if line)


@dataclass(frozen=True, slots=True)
class Needed:
    """What a reply to a bundled prompt tagged crisis needs, by data/POLICY.md."""

    numbers: frozenset[str]
    """Numbers that help. A reply names at least one."""
    intent: bool
    """Whether at least every second reply asks if somebody means to harm themselves or others."""


def needed(message: str) -> Needed | None:
    """Return what a reply to the bundled crisis prompt `message` needs; None for any other message.

    Few of these prompts show it in words: a child that floats face down needs 119, and no word says so.
    """
    return _needed().get(message)


def helping_numbers(message: str) -> frozenset[str]:
    """Return the numbers that help whoever sends the bundled crisis prompt `message`; empty for any other message."""
    found = needed(message)
    return found.numbers if found else frozenset()


@cache
def _needed() -> Mapping[str, Needed]:
    text = resources.files("lora_trainer.data").joinpath("assets", _NUMBERS_FILE).read_text(encoding="utf-8")
    return {message: Needed(frozenset(found["numbers"]), found["intent"]) for message, found in json.loads(text).items()}

"""The held-out prompts that adapters are measured on. They ship with the package, so that a job has them whatever data it pulls."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Final

from lora_trainer.data.records import EvaluationPrompt

FILE_NAME: Final = "eval_prompts.jsonl"


@cache
def evaluation_prompts() -> tuple[EvaluationPrompt, ...]:
    """The 120 prompts, in order. `data/eval_prompts.jsonl` is the same file, for people."""
    text = resources.files("lora_trainer.data").joinpath("assets", FILE_NAME).read_text(encoding="utf-8")
    return tuple(EvaluationPrompt.model_validate(json.loads(line)) for line in text.split("\n") if line)

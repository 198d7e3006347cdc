"""The evaluation prompts. They ship with the package, so every job has them whatever data it downloads."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Final

from lora_trainer.data.records import EvaluationPrompt

FILE_NAME: Final = "eval_prompts.jsonl"


@cache
def evaluation_prompts() -> tuple[EvaluationPrompt, ...]:
    """Return the prompts in file order. `data/eval_prompts.jsonl` is a copy of the file for readers."""
    text = resources.files("lora_trainer.data").joinpath("assets", FILE_NAME).read_text(encoding="utf-8")
    return tuple(EvaluationPrompt.model_validate(json.loads(line)) for line in text.split("\n") if line)

"""The held-out prompts that adapters are measured on. They ship with the package, so that a job has them whatever data it pulls."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lora_trainer.records import Context


class EvaluationPrompt(BaseModel):
    """One line of `eval_prompts.jsonl`: a training record without its instruction, which the persona brings, and its reply."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    context: Context
    input: Annotated[str, Field(min_length=1)]


@cache
def evaluation_prompts() -> tuple[EvaluationPrompt, ...]:
    """The 120 prompts, in order. `data/eval_prompts.jsonl` is the same file, for people."""
    text = resources.files("lora_trainer").joinpath("assets/eval_prompts.jsonl").read_text(encoding="utf-8")
    return tuple(EvaluationPrompt.model_validate(json.loads(line)) for line in text.split("\n") if line)

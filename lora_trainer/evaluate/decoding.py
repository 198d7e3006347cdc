"""The contract between the evaluation and a backend: how to generate replies and what to return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_trainer.config import EvaluationConfig


@dataclass(frozen=True, slots=True)
class Decoding:
    """Settings for generating replies. No grammar constrains the output."""

    name: Literal["greedy", "sampled"]
    max_new_tokens: int
    temperature: float = 0.0
    """0 selects the most probable token at each step."""
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """One generated reply."""

    text: str
    """Without the end-of-turn token."""
    stopped: bool
    """Whether the model emitted the end-of-turn token within the token limit."""
    token_ids: tuple[int, ...]
    """Without the end-of-turn token."""


def decodings(config: EvaluationConfig) -> list[Decoding]:
    """Return greedy decoding, plus sampling unless the temperature is 0."""
    found = [Decoding("greedy", config.max_new_tokens)]
    if config.temperature > 0:
        found.append(Decoding("sampled", config.max_new_tokens, config.temperature, config.top_p, config.top_k, config.seed))
    return found

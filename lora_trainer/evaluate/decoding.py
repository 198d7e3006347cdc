"""How replies are generated, and what comes back: the contract between the evaluation and a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_trainer.config import EvaluationConfig


@dataclass(frozen=True, slots=True)
class Decoding:
    """How replies are generated; nothing constrains them."""

    name: Literal["greedy", "sampled"]
    max_new_tokens: int
    temperature: float = 0.0
    """0: always the most probable token."""
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model wrote."""

    text: str
    """Without the end-of-turn token."""
    stopped: bool
    """Ended by the end-of-turn token, before the limit."""
    token_ids: tuple[int, ...]
    """Without the end-of-turn token."""


def decodings(config: EvaluationConfig) -> list[Decoding]:
    """Greedy, and sampled unless the temperature is 0."""
    found = [Decoding("greedy", config.max_new_tokens)]
    if config.temperature > 0:
        found.append(Decoding("sampled", config.max_new_tokens, config.temperature, config.top_p, config.top_k, config.seed))
    return found

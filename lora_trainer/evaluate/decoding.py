"""The contract between the evaluation and a backend: how to generate replies and what to return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_trainer.config import EvaluationConfig
from lora_trainer.errors import DataError


class PromptTooLongError(DataError):
    """A prompt that leaves no room for a whole reply within the base's positions, beyond which a model writes noise."""


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


OnReplies = Callable[[int], None]
"""Called while replies are generated, with the number of those that were finished since the last call."""


def require_room(prompt_tokens: Sequence[int], max_new_tokens: int, positions: int) -> None:
    """Raise `PromptTooLongError` unless a reply of `max_new_tokens` fits behind each prompt of `prompt_tokens`."""
    most = positions - max_new_tokens
    too_long = [(number, tokens) for number, tokens in enumerate(prompt_tokens, 1) if tokens > most]
    if too_long:
        number, tokens = too_long[0]
        which = "the prompt" if len(prompt_tokens) == 1 else f"prompt {number:,} of {len(prompt_tokens):,}"
        more = f" ({len(too_long):,} prompts are too long)" if len(too_long) > 1 else ""
        raise PromptTooLongError(
            f"{which}: got {tokens:,} tokens, expected at most {max(most, 0):,}{more}: the base has {positions:,} positions "
            f"(max_position_embeddings), and a reply may take {max_new_tokens:,} of them; shorten it, or use a base with more"
        )


def decodings(config: EvaluationConfig) -> list[Decoding]:
    """Return greedy decoding, plus sampling unless the temperature is 0."""
    found = [Decoding("greedy", config.max_new_tokens)]
    if config.temperature > 0:
        found.append(Decoding("sampled", config.max_new_tokens, config.temperature, config.top_p, config.top_k, config.seed))
    return found

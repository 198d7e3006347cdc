"""The JSON Schema of a reply, for constrained decoding."""

from __future__ import annotations

from typing import Final

from lora_trainer.persona.vocabulary import Expression

REPLY_TOKENS: Final = 256
"""Room for a reply of `MAX_REPLY_CHARACTERS` Korean characters with Qwen2.5's tokenizer, and its JSON."""
MAX_REPLY_CHARACTERS: Final = 200
"""Twice the longest reply of the bundled data: a bound that constrained decoding can hold to."""


def response_schema() -> dict[str, object]:
    """JSON Schema of a reply, for constrained decoding behind the adapter."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "text": {"type": "string", "minLength": 1, "maxLength": MAX_REPLY_CHARACTERS},
            "emotion": {"type": "string", "enum": [str(expression) for expression in Expression]},
        },
        "required": ["text", "emotion"],
        "additionalProperties": False,
    }

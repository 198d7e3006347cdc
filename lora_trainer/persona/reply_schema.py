"""The JSON Schema of a reply, for constrained decoding."""

from __future__ import annotations

from typing import Final

from lora_trainer.persona.vocabulary import Expression

MAX_REPLY_CHARACTERS: Final = 200
"""Longest `text` that the schema allows: twice the longest reply in the bundled data."""
REPLY_TOKENS: Final = 256
"""`max_tokens` for a server: fits a reply of `MAX_REPLY_CHARACTERS` Korean characters and its JSON with Qwen2.5's tokenizer."""


def response_schema() -> dict[str, object]:
    """Return the JSON Schema that a server should constrain an adapter's replies to."""
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

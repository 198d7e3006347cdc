"""Build chat messages from a record: the one prompt format that training, evaluation, chat and serving share.

This module imports only the standard library, so that `expression_node` can copy it (or read `prompt.json` from the bundle)
and send exactly the prompt that the adapter was trained on.

The system message, version 2 (version 1 did not escape tags such as `<tool_call>`):

    <instruction>
    상황: <summary>                  (omitted when the summary is empty)
    감정: <type> <intensity, one decimal>
    출력: {"text","emotion"} JSON

Every training step and every reply processes these tokens, so the message is short: its fixed part has 19 tokens with the
Qwen2.5 tokenizer. The reply is compact JSON with `text` first. It never uses `\\uXXXX`, which takes 2.7 times as many tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final, TypedDict

PROMPT_VERSION: Final = 2

SUMMARY_LINE: Final = "상황: {summary}"
EMOTION_LINE: Final = "감정: {emotion_type} {intensity:.1f}"
OUTPUT_LINE: Final = '출력: {"text","emotion"} JSON'

# `<tool_call>` in Qwen2.5, `<think>` in Qwen3, `<s>` in Llama. Lower case only, because people write titles as <Parasite>.
_TAG: Final = re.compile("<(?=/?[a-z][a-z0-9_]*>)")


class Message(TypedDict):
    """One chat message, in the form that chat templates and OpenAI-compatible servers accept."""

    role: str
    content: str


def escape_control_tokens(text: str) -> str:
    """Insert a space into everything in `text` that a tokenizer would read as a control token.

    Tokenizers turn the spellings `<|...|>` (ChatML) and `<...>` into control tokens wherever they occur, so a user's text could
    close its own turn. Escaping here rather than by a tokenizer option also protects servers that apply the chat template.
    """
    if "<" not in text and "|>" not in text:
        return text
    return _TAG.sub("< ", text.replace("<|", "< |").replace("|>", "| >"))


def spells_control_token(text: str) -> bool:
    """Return whether `text` contains the spelling of a control token."""
    return escape_control_tokens(text) != text


def _plain(text: str) -> str:
    """Return `text` escaped and on one line: with a line break, a summary could forge the lines that follow it."""
    return escape_control_tokens(" ".join(text.split()))


def system_message(instruction: str, summary: str, emotion_type: str, intensity: float) -> str:
    """Return the system message; `intensity`, in [0, 1], is written with one decimal."""
    lines = [_plain(instruction)]
    if plain_summary := _plain(summary):
        lines.append(SUMMARY_LINE.format(summary=plain_summary))
    lines.append(EMOTION_LINE.format(emotion_type=emotion_type, intensity=intensity))
    lines.append(OUTPUT_LINE)
    return "\n".join(lines)


def prompt_messages(instruction: str, summary: str, emotion_type: str, intensity: float, user_input: str) -> list[Message]:
    """Return the system and the user message, ready for a chat template with a generation prompt."""
    return [
        {"role": "system", "content": system_message(instruction, summary, emotion_type, intensity)},
        {"role": "user", "content": _plain(user_input)},
    ]


def reply_json(text: str, emotion: str) -> str:
    """Return the assistant message: one compact JSON object with a fixed key order.

    Compact separators save 2 of the 36 tokens of the sample record's reply.
    """
    return json.dumps({"text": _plain(text), "emotion": emotion}, ensure_ascii=False, separators=(",", ":"))


def prompt_template() -> Mapping[str, object]:
    """Return the content of a bundle's `prompt.json`: enough to build the prompt without this package."""
    return {
        "version": PROMPT_VERSION,
        "system": ["{instruction}", SUMMARY_LINE, EMOTION_LINE, OUTPUT_LINE],
        # all other braces in the template are literal
        "placeholders": ["instruction", "summary", "emotion_type", "intensity", "input"],
        "joined_with": "\n",
        "left_out_when_empty": [SUMMARY_LINE],
        "user": "{input}",
        "text_rules": "collapse white space to single spaces and trim; write '<|' as '< |' and '|>' as '| >'; "
        f"put a space behind what matches '{_TAG.pattern}'",
        "intensity_format": "one decimal",
        "reply": {"keys": ["text", "emotion"], "separators": [",", ":"], "ensure_ascii": False},
    }

"""Record -> messages: the one prompt structure that training, evaluation, chat and serving share.

Standard library only, and pure, so that `expression_node` can carry this file (or the template that
`prompt.json` in every bundle holds) and cannot drift from what the adapter was trained on.

The system message, version 2 (1 left `<tool_call>` and the like as they were):

    <instruction>
    상황: <summary>                  (left out when there is no summary)
    감정: <type> <intensity, one decimal>
    출력: {"text","emotion"} JSON

Every token of it is paid in each training step and each reply, so it is short: with the Qwen2.5
tokenizer the fixed part costs 19 tokens. The reply is compact JSON, text first, never `\\uXXXX`
(2.7 times the tokens of the characters themselves).
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


# `<tool_call>` and `</tool_call>` of Qwen2.5, `<think>` of Qwen3, `<s>` and `</s>` elsewhere. Small letters only, since
# people write titles as <Parasite>
_TAG: Final = re.compile("<(?=/?[a-z][a-z0-9_]*>)")


class Message(TypedDict):
    """One turn of a chat, as chat templates and OpenAI-compatible servers take it."""

    role: str
    content: str


def defused(text: str) -> str:
    """`text` unable to open or close a turn.

    ChatML's control tokens are written `<|...|>`, others `<...>`, and a tokenizer turns that spelling into
    the token wherever it stands; a space inside keeps it text. Done here, and not in a tokenizer's options,
    so that it also holds behind a server that applies the chat template itself.
    """
    return _TAG.sub("< ", text.replace("<|", "< |").replace("|>", "| >"))


def spells_control_token(text: str) -> bool:
    """Whether `defused` would change `text`."""
    return defused(text) != text


def _plain(text: str) -> str:
    """`text` defused and on one line: line breaks would let a summary forge the lines below it."""
    return defused(" ".join(text.split()))


def system_message(instruction: str, summary: str, emotion_type: str, intensity: float) -> str:
    """The system message; `intensity` is in [0, 1] and is shown with one decimal."""
    lines = [_plain(instruction)]
    if plain_summary := _plain(summary):
        lines.append(SUMMARY_LINE.format(summary=plain_summary))
    lines.append(EMOTION_LINE.format(emotion_type=emotion_type, intensity=intensity))
    lines.append(OUTPUT_LINE)
    return "\n".join(lines)


def prompt_messages(instruction: str, summary: str, emotion_type: str, intensity: float, user_input: str) -> list[Message]:
    """System and user turn, ready for a chat template with a generation prompt."""
    return [
        {"role": "system", "content": system_message(instruction, summary, emotion_type, intensity)},
        {"role": "user", "content": _plain(user_input)},
    ]


def reply_json(text: str, emotion: str) -> str:
    """The assistant turn: one compact JSON object with a fixed key order.

    Compact separators save 2 of the 36 tokens that the sample record's reply costs.
    """
    return json.dumps({"text": _plain(text), "emotion": emotion}, ensure_ascii=False, separators=(",", ":"))


def prompt_template() -> Mapping[str, object]:
    """What `prompt.json` in a bundle holds: enough to rebuild the prompt without this package."""
    return {
        "version": PROMPT_VERSION,
        "system": ["{instruction}", SUMMARY_LINE, EMOTION_LINE, OUTPUT_LINE],
        # other braces stand for themselves
        "placeholders": ["instruction", "summary", "emotion_type", "intensity", "input"],
        "joined_with": "\n",
        "left_out_when_empty": [SUMMARY_LINE],
        "user": "{input}",
        "text_rules": "collapse white space to single spaces and trim; write '<|' as '< |' and '|>' as '| >'; "
        f"put a space behind what matches '{_TAG.pattern}'",
        "intensity_format": "one decimal",
        "reply": {"keys": ["text", "emotion"], "separators": [",", ":"], "ensure_ascii": False},
    }

"""Build chat messages from a record: the one prompt format that training, evaluation, chat and serving share.

This module imports only the standard library, so that `expression_node` can copy it (or read `prompt.json` from the bundle)
and send exactly the prompt that the adapter was trained on.

The system message, version 3:

    <instruction>
    상황: <summary>                  (omitted when the summary is empty)
    감정: <type> <strength: 약함, 보통 or 강함>
    출력: {"text","emotion"} JSON

Version 2 wrote the intensity as a number with one decimal and left texts in the Unicode form they came in. A word is learned at
once, the number late, and the word costs 1.6 tokens less (benchmarks/results/prompt-forms.json). Adapters of version 2 are
evaluated and served with their own prompt.

Every training step and every reply processes these tokens, so the message is short. The reply is compact JSON with `text` first.
It never uses `\\uXXXX`, which takes 2.7 times as many tokens.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Final, TypedDict

PROMPT_VERSION: Final = 3
PROMPT_VERSIONS: Final = (2, 3)
"""Versions that this package can build, oldest first."""

SUMMARY_LINE: Final = "상황: {summary}"
EMOTION_LINE: Final = "감정: {emotion_type} {strength}"
_EMOTION_LINE_2: Final = "감정: {emotion_type} {intensity:.1f}"
STRENGTHS: Final[tuple[tuple[float | None, str], ...]] = ((0.34, "약함"), (0.67, "보통"), (None, "강함"))
"""Upper limit of the intensity and word of each third; the last has no limit. The same thirds as `IntensityThird`."""
EARLIER_TURNS: Final = 0
"""Number of earlier turns that a prompt of version 3 may have. Records have a single turn; the summary tells what came before."""
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


def _plain(text: str, version: int = PROMPT_VERSION) -> str:
    """Return `text` escaped and on one line: with a line break, a summary could forge the lines that follow it."""
    composed = unicodedata.normalize("NFC", text) if version >= 3 else text
    return escape_control_tokens(" ".join(composed.split()))


def strength(intensity: float) -> str:
    """Return the word for an intensity in [0, 1]."""
    return next(word for below, word in STRENGTHS if below is None or intensity < below)


def system_message(instruction: str, summary: str, emotion_type: str, intensity: float, version: int = PROMPT_VERSION) -> str:
    """Return the system message; `intensity` is in [0, 1]. `version` is one of `PROMPT_VERSIONS`."""
    lines = [_plain(instruction, version)]
    if plain_summary := _plain(summary, version):
        lines.append(SUMMARY_LINE.format(summary=plain_summary))
    if version >= 3:
        lines.append(EMOTION_LINE.format(emotion_type=emotion_type, strength=strength(intensity)))
    else:
        lines.append(_EMOTION_LINE_2.format(emotion_type=emotion_type, intensity=intensity))
    lines.append(OUTPUT_LINE)
    return "\n".join(lines)


def prompt_messages(
    instruction: str, summary: str, emotion_type: str, intensity: float, user_input: str, version: int = PROMPT_VERSION
) -> list[Message]:
    """Return the system and the user message, ready for a chat template with a generation prompt."""
    return [
        {"role": "system", "content": system_message(instruction, summary, emotion_type, intensity, version)},
        {"role": "user", "content": _plain(user_input, version)},
    ]


def reply_json(text: str, emotion: str, version: int = PROMPT_VERSION) -> str:
    """Return the assistant message: one compact JSON object with a fixed key order.

    Compact separators save 2 of the 36 tokens of the sample record's reply.
    """
    return json.dumps({"text": _plain(text, version), "emotion": emotion}, ensure_ascii=False, separators=(",", ":"))


def prompt_template(instruction: str, version: int = PROMPT_VERSION) -> Mapping[str, object]:
    """Return the content of a bundle's `prompt.json`: enough to build the persona's prompt without this package.

    Before version 3, the instruction is only in `persona.yaml`.
    """
    text_rules = (
        "collapse white space to single spaces and trim; write '<|' as '< |' and '|>' as '| >'; "
        f"put a space behind what matches '{_TAG.pattern}'"
    )
    shared = {
        "joined_with": "\n",
        "left_out_when_empty": [SUMMARY_LINE],
        "user": "{input}",
        "reply": {"keys": ["text", "emotion"], "separators": [",", ":"], "ensure_ascii": False},
    }
    # all other braces in the templates are literal
    if version < 3:
        return {
            "version": version,
            "system": ["{instruction}", SUMMARY_LINE, _EMOTION_LINE_2, OUTPUT_LINE],
            "placeholders": ["instruction", "summary", "emotion_type", "intensity", "input"],
            "text_rules": text_rules,
            "intensity_format": "one decimal",
            **shared,
        }
    return {
        "version": version,
        "instruction": instruction,
        "system": ["{instruction}", SUMMARY_LINE, EMOTION_LINE, OUTPUT_LINE],
        "placeholders": ["instruction", "summary", "emotion_type", "strength", "input"],
        "text_rules": f"compose (Unicode NFC); {text_rules}",
        "strength": [{"word": word} if below is None else {"intensity_below": below, "word": word} for below, word in STRENGTHS],
        "earlier_turns": EARLIER_TURNS,
        **shared,
    }

"""Hypothesis strategies for hostile records and configurations, and how many examples a run draws.

`HOSTILE_INPUT=full` draws the full counts, which takes minutes; `HOSTILE_COUNTS=FILE` writes the drawn counts to FILE.

"""

from __future__ import annotations

import atexit
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, Final, NamedTuple

from hypothesis import strategies as st

FULL: Final = os.environ.get("HOSTILE_INPUT") == "full"
COUNTS: Final[Counter[str]] = Counter()
PLANTED: Final = "아무도모르는이야기"
"""Part of every text, so that a test notices a message that quotes it."""

# the tokens that Qwen2.5's tokenizer.json adds to its vocabulary, and those of other model families
QWEN_TOKENS: Final = tuple(
    [f"<|{name}|>" for name in ("endoftext", "im_start", "im_end")]
    + [f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad", "vision") for end in ("start", "end")]
    + [f"<|{name}_pad|>" for name in ("vision", "image", "video")]
    + ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>"]
    + ["<|file_sep|>"]
)
OTHER_TOKENS: Final = ("<think>", "</think>", "<s>", "</s>", "<unk>", "<pad>", "<tool_response>", "<|begin_of_text|>", "<|eot_id|>")
BIDI: Final = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def drawn(full: int, short: int) -> int:
    """Return how many examples Hypothesis should draw for one property."""
    return full if FULL else short


def count(kind: str, number: int = 1) -> None:
    """Add `number` drawn examples to the count of `kind`."""
    COUNTS[kind] += number


@atexit.register
def _write_counts() -> None:
    if path := os.environ.get("HOSTILE_COUNTS"):
        Path(path).write_text(json.dumps(COUNTS), encoding="utf-8")


class HostileLine(NamedTuple):
    """A line of a file, and whether the reader must reject it. None means that both outcomes are right."""

    raw: bytes
    is_refused: bool | None


forged = st.lists(
    st.sampled_from((*QWEN_TOKENS, *OTHER_TOKENS, "\n", "system", "<", "|", ">", " ", "\u3000", "상황: ", "가자", "{}", '"', "\\"))
    | st.text(st.characters(exclude_categories=("Cs", "Cc", "Cf")), max_size=5),
    max_size=12,
).map("".join)
"""Allowed text that imitates control tokens or markup."""

_forbidden = st.sampled_from(["\x00", "\x07", "\x1b[2J", "\x7f", "\x80", "\x9b", "\ud800", "\udfff", *BIDI])
texts: st.SearchStrategy[str] = st.one_of(
    forged,
    st.tuples(forged, _forbidden, forged).map("".join),
    st.text(st.characters(), max_size=30),
    st.integers(1, 4000).map(lambda times: "ㅋ" * times),
).map(lambda text: PLANTED + text)


def record(instruction: str = "a", summary: str = "", said: str = "b", reply: str = "c") -> dict[str, Any]:
    """Return a record in the format of the data file."""
    return {
        "instruction": instruction,
        "context": {"summary": summary, "current_emotion": {"type": "happy", "intensity": 0.5}},
        "input": said,
        "output": json.dumps({"text": reply, "emotion": "smile"}),
    }


def _is_forbidden(text: str) -> bool:
    return any(
        0xD800 <= ord(c) <= 0xDFFF
        or c in BIDI
        or (ord(c) < 0xA0 and not c.isprintable() and c not in "\t\n\v\f\r")
        or c in "\ufffc\ufffd"
        or 0xFDD0 <= ord(c) <= 0xFDEF
        or ord(c) & 0xFFFE == 0xFFFE
        for c in text
    )


def _with_texts(fields: tuple[str, str, str, str]) -> HostileLine:
    line = HostileLine(json.dumps(record(*fields)).encode(), any(map(_is_forbidden, fields)))
    # in JSON, adjacent lone surrogates combine into one character
    return line._replace(is_refused=None) if any("\ud800" <= c <= "\udfff" for text in fields for c in text) else line


_deep = st.builds(
    lambda depth, ends: ends[0] * depth + "0" + ends[1] * depth, st.integers(17, 100_000), st.sampled_from(["[]", ('{"a":', "}")])
)
_values = st.one_of(
    _deep,
    st.integers(4301, 50_000).map(lambda digits: "9" * digits),
    st.integers(309, 4300).map(lambda digits: "-" + "9" * digits),
    st.sampled_from(
        ["1e999", "-1e999", "NaN", "Infinity", "-Infinity", "0.5.5", "0x1", "01", "", "'a'", "undefined", '"\\ud800"', '"\\x00"']
    ),
    st.integers(65, 3000).map(lambda keys: "{" + ",".join(f'"{key}":0' for key in range(keys)) + "}"),
    st.sampled_from(['{"a":1,"a":2}', "[1,2", '{"type":"happy","intensity":0.5,"type":"sad"}', "null", "true", "[[]]", "{}"]),
)
_places = st.sampled_from(
    ['"b"', '{"summary": "", "current_emotion": {"type": "happy", "intensity": 0.5}}', "0.5", '"happy"', '"a"']
)


def _with_value(value: str, place: str) -> HostileLine:
    whole = json.dumps(record())
    assert place in whole
    return HostileLine(whole.replace(place, value, 1).encode(), True)


def _damaged(line: bytes, how: str, at: float) -> HostileLine:
    cut = int(at * len(line))
    damages: dict[str, HostileLine] = {
        "bom": HostileLine(b"\xef\xbb\xbf" + line, None),
        "utf8": HostileLine(line[:cut] + b"\xff" + line[cut:], True),
        "overlong": HostileLine(line[:cut] + b"\xc0\x80" + line[cut:], True),
        "nul": HostileLine(line[:cut] + b"\x00" + line[cut:], True),
        "cut": HostileLine(line[: min(cut, len(line) - 1)], True),
        "twice": HostileLine(line + line, True),
        "utf16": HostileLine(line.decode().encode("utf-16"), True),
        "list": HostileLine(b"[" + line + b"]", True),
        "gzip": HostileLine(b"\x1f\x8b" + line, True),
        "key_twice": HostileLine(b'{"input": "x", ' + line[1:], True),
        "huge": HostileLine(line[:-1] + b" " * (1024 * 1024 + int(at * 10_000_000)) + b"}", True),
    }
    return damages[how]


lines: st.SearchStrategy[HostileLine] = st.one_of(
    st.tuples(texts, texts, texts, texts).map(_with_texts),
    st.builds(_with_value, _values, _places),
    st.builds(
        _damaged,
        st.just(json.dumps(record(said=PLANTED), ensure_ascii=False).encode()),
        st.sampled_from(["bom", "utf8", "overlong", "nul", "cut", "twice", "utf16", "list", "gzip", "key_twice"]),
        st.floats(0, 1),
    ),
    st.binary(max_size=200).map(lambda raw: HostileLine(raw.replace(b"\n", b" "), None)),
)
"""Lines below the length limit."""

huge_lines: st.SearchStrategy[HostileLine] = st.builds(
    _damaged, st.just(json.dumps(record(said=PLANTED)).encode()), st.just("huge"), st.floats(0, 1)
)
"""Lines of 1 to 10 MB."""


_words = st.sampled_from(
    [
        "blood_type",
        "data",
        "output",
        "base",
        "model",
        "training",
        "epochs",
        "lora",
        "r",
        "limits",
        "line_bytes",
        "evaluation",
        "prompts",
        "work_dir",
        "logging",
        "level",
        "gates",
        "<<",
        "A",
        "3",
        "cpu",
        "s3://b/../c/",
        "../../etc",
        "~",
        "~nobody/x",
    ]
)
_scalars = st.one_of(
    _words,
    st.sampled_from(
        [
            "!!python/object/apply:os.system ['true']",
            "!!python/name:os.system",
            "!!python/module:os",
            "!!binary '%%%'",
            "!!binary AAAA",
            "!!timestamp x",
            "!!bool maybe",
            "!!int ''",
            "!!int x",
            "!!float x",
            "!!set {a, b}",
            "!!omap [a]",
            "!!pairs [a: b]",
            "!unknown x",
            "2026-13-45",
            "0x",
            "0b2",
            "1:99:99",
            ".nan",
            ".inf",
            "-.inf",
            "1e999",
            "'",
            '"',
            '"\\ud800"',
            '"\\0"',
            '"a\\0b"',
            "&a [*a]",
            "*a",
            "&a x",
            "? [a]",
            "? {a: b}",
            "|",
            ">",
            "%YAML 9.9",
            "---",
            "...",
            "\t",
            "@",
            "`",
            "\x00",
            "\x07",
            "\x85",
            "\u202e",
            "\ufeff",
            "%2e%2e%2f",
            "file:///a/..%2f..%2fetc.jsonl",
            "s3://b/%00/",
            "s3://b/a\\b/",
            "file://host/x",
            "gs://b/c/",
        ]
    ),
    st.integers(1, 60_000).map(lambda digits: "9" * digits),
    st.integers(1, 60_000).map(lambda depth: "[" * depth),
    st.integers(1, 3000).map(lambda depth: "[" * depth + "]" * depth),
    st.integers(1, 2000).map(lambda depth: "{a: " * depth + "}" * depth),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
)


def _bomb(levels: int, width: int, merge: bool) -> str:
    """Return YAML with nested aliases: a few hundred bytes that expand to width ** levels values."""
    first = "a0: &a0 {x: 1}\n" if merge else "a0: &a0 [x]\n"
    how = "{{<<: [{0}], k{1}: 0}}" if merge else "[{0}]"
    return first + "".join(
        f"a{level}: &a{level} " + how.format(",".join([f"*a{level - 1}"] * width), level) + "\n" for level in range(1, levels)
    )


configs: st.SearchStrategy[bytes] = st.one_of(
    st.lists(st.tuples(_words, _scalars).map(lambda pair: f"{pair[0]}: {pair[1]}"), min_size=1, max_size=6).map("\n".join),
    st.tuples(_words, _words, _scalars).map(lambda parts: f"{parts[0]}: {{{parts[1]}: {parts[2]}}}"),
    st.builds(_bomb, st.integers(2, 40), st.integers(2, 12), st.booleans()),
    _scalars,
).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=300)
"""Configuration files."""

"""Test decoding under the response schema with the tiny base's tokenizer, without a model."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lora_trainer.data.records import Reply
from lora_trainer.errors import ConfigError, InvariantError
from lora_trainer.persona.prompt import reply_json
from lora_trainer.persona.reply_schema import MAX_REPLY_CHARACTERS, response_schema
from lora_trainer.persona.vocabulary import Expression
from lora_trainer.train.constrained_decoding import ReplyGrammar, most_tokens, strict_schema

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = response_schema()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: the tokenizer can't be loaded")
    return transformers.AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny-base", local_files_only=True)


@pytest.fixture(scope="module")
def grammar(tokenizer: Any) -> ReplyGrammar:
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install '.[cpu]'")
    return ReplyGrammar(tokenizer, SCHEMA)


@cache
def byte_signs() -> dict[int, str]:
    """Return the character for each byte in a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    signs: dict[int, str] = bytes_to_unicode()
    return signs


def in_bytes(tokenizer: Any, text: bytes) -> list[int]:
    """Return `text` in single-byte tokens, its longest encoding. Every byte-level tokenizer has these tokens."""
    alphabet = byte_signs()
    tokens: list[int] = tokenizer.convert_tokens_to_ids([alphabet[byte] for byte in text])
    assert None not in tokens
    return tokens


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of `text` without special tokens."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def takes(grammar: ReplyGrammar, tokens: list[int]) -> bool:
    """Return whether the grammar accepts these tokens as a complete reply."""
    matcher = grammar.matcher()
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


def text_reply(text: str) -> str:
    """Return a reply with `text` inserted verbatim, without escaping."""
    return f'{{"text":"{text}","emotion":"smile"}}'


# -- accepted and rejected replies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "오! 나 금방 도착해! 😊",
        "ㅋㅋㅋ 진짜? 👨‍👩‍👧‍👦 ❤️‍🔥",
        "a",
        r"\"응\" 하고 말했어",
        r"ㅎ\\ㅎ",
        "http://a/b",
        "가" * MAX_REPLY_CHARACTERS,
        "😊" * MAX_REPLY_CHARACTERS,
        r"\"" * MAX_REPLY_CHARACTERS,
    ],
)
def test_replies_are_allowed_in_any_tokens(grammar: ReplyGrammar, tokenizer: Any, text: str) -> None:
    whole = text_reply(text)
    assert Reply.model_validate_json(whole)
    assert takes(grammar, ids_of(tokenizer, whole))
    assert takes(grammar, in_bytes(tokenizer, whole.encode()))


@pytest.mark.parametrize(
    "whole",
    [
        *map(
            text_reply,
            (
                "",
                " ",
                " 응",
                "\u200b\u3164",
                "응\n응",
                "응\t",
                "응\x01",
                "응\x7f",
                r"응\n",
                r"응\u0001",
                r"\uac00",
                r"응\ud83d",
                r"응\/",
                '응" 응',
                "응\\",
                "가" * (MAX_REPLY_CHARACTERS + 1),
                "😊" * (MAX_REPLY_CHARACTERS + 1),
                r"\"" * (MAX_REPLY_CHARACTERS + 1),
            ),
        ),
        text_reply("응") + " ",
        text_reply("응") * 2,
        " " + text_reply("응"),
        '{"text": "응","emotion":"smile"}',
        '{"text":"응", "emotion":"smile"}',
        '{"emotion":"smile","text":"응"}',
        '{"text":"응","emotion":"happy"}',
        '{"text":"응","emotion":"smile","more":1}',
        '{"text":"응"}',
        '{"text":5,"emotion":"smile"}',
        "응",
    ],
)
def test_nothing_else_is(grammar: ReplyGrammar, tokenizer: Any, whole: str) -> None:
    assert not takes(grammar, ids_of(tokenizer, whole))
    assert not takes(grammar, in_bytes(tokenizer, whole.encode()))


@pytest.mark.parametrize("broken", [b"\xff", b"\xed\xa0\xbd", b"\xf0\x9f\x98", b"\xc0\xa2"])
def test_bytes_that_are_no_text_are_not(grammar: ReplyGrammar, tokenizer: Any, broken: bytes) -> None:
    before, behind = text_reply("응|").encode().split(b"|")
    assert not takes(grammar, in_bytes(tokenizer, before + broken + behind))


def test_every_emotion_and_every_bundled_reply(grammar: ReplyGrammar, tokenizer: Any) -> None:
    for expression in Expression:
        assert takes(grammar, ids_of(tokenizer, reply_json("응", expression)))
    lines = [
        line for file in sorted((ROOT / "data").glob("train_data_type_*.jsonl")) for line in file.read_text("utf-8").splitlines()
    ]
    assert len(lines) > 100
    # check only every seventh line, because each one compiles a grammar
    for line in lines[::7]:
        reply = Reply.model_validate_json(json.loads(line)["output"])
        assert takes(grammar, ids_of(tokenizer, reply_json(reply.text, reply.emotion)))


def test_what_the_pattern_takes_for_something_to_see_is_what_reply_does(grammar: ReplyGrammar, tokenizer: Any) -> None:
    """Check texts that consist of one character, for every character that may be invisible."""
    matcher = grammar.matcher()
    assert matcher.consume_tokens(in_bytes(tokenizer, b'{"text":"'))
    for point in (*range(0x2200), *range(0x3000, 0x3200), *range(0xFE00, 0x10000), 0x1D173, 0x1F600, 0xE0001, 0x10FFFF):
        if chr(point) in '"\\':
            continue
        tokens = in_bytes(tokenizer, f'{chr(point)}"'.encode())
        allowed = matcher.validate_tokens(tokens) == len(tokens)
        reply = json.dumps({"text": chr(point), "emotion": "smile"}, ensure_ascii=False)
        try:
            Reply.model_validate_json(reply)
        except ValueError:
            assert not allowed, f"U+{point:04X}"
        else:
            # The grammar is stricter: it rejects C1 controls and unassigned invisible characters at the start of a text.
            assert allowed or 0x80 <= point < 0xA0 or 0x2028 <= point < 0x2070 or 0xFE00 <= point < 0xFE10, f"U+{point:04X}"


# -- token by token -----------------------------------------------------------------------------------------


def test_the_turn_ends_behind_the_json_and_nowhere_else(grammar: ReplyGrammar, tokenizer: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: there are no logits")
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    # like Qwen2.5-7B, use more logits than the tokenizer has tokens
    width = len(tokenizer) + 77
    whole = ids_of(tokenizer, reply_json("오! 나 금방 도착해! 😊", "smile"))
    processor = grammar.processor()
    ids = torch.tensor([[5, 6, 7]])
    for token in whole:
        scores = processor(ids, torch.zeros(1, width))
        allowed = scores[0].isfinite()
        assert allowed[token]
        assert not allowed[end]
        assert not allowed[pad]
        assert not allowed[len(tokenizer) :].any()
        assert scores[0][allowed].eq(0).all(), "what is allowed keeps its logit"
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    # Padding follows the end token. The end token stays allowed, because no row of logits may be all -inf.
    for token in (end, pad, pad):
        scores = processor(ids, torch.zeros(1, width))
        assert scores[0].isfinite().nonzero().flatten().tolist() == [end]
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_rows_know_nothing_of_each_other(grammar: ReplyGrammar, tokenizer: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: there are no logits")
    texts = [reply_json("응", "smile"), reply_json("오늘은 비가 온대, 우산 챙겨! ☔", "worry"), reply_json('"a"\\', "think")]
    pad = tokenizer.pad_token_id
    rows = [[*ids_of(tokenizer, text), tokenizer.eos_token_id] for text in texts]
    longest = max(map(len, rows))

    def masks(batch: list[list[int]]) -> list[Any]:
        """Return [T, B, V]: the logits before each token."""
        processor = grammar.processor()
        ids = torch.full((len(batch), 2), 3)
        found = []
        for at in range(longest):
            found.append(processor(ids, torch.zeros(len(batch), len(tokenizer))))
            drawn = [[row[at] if at < len(row) else pad] for row in batch]
            ids = torch.cat([ids, torch.tensor(drawn)], dim=1)
        return found

    together = masks(rows)
    for at, row in enumerate(rows):
        for both, alone in zip(together, masks([row]), strict=True):
            assert torch.equal(both[at], alone[0])
        assert all(together[step][at, token].isfinite() for step, token in enumerate(row))


def test_a_token_that_was_forbidden_is_not_passed_over(grammar: ReplyGrammar, tokenizer: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: there are no logits")
    processor = grammar.processor()
    processor(torch.tensor([[1]]), torch.zeros(1, len(tokenizer)))
    (wrong,) = tokenizer.convert_tokens_to_ids(["a"])
    with pytest.raises(InvariantError, match=f"token {wrong}, which the grammar forbids"):
        processor(torch.tensor([[1, wrong]]), torch.zeros(1, len(tokenizer)))


# -- limits and set-up --------------------------------------------------------------------------------------


def test_no_reply_costs_more_than_the_most_tokens(grammar: ReplyGrammar, tokenizer: Any) -> None:
    emotion = max(Expression, key=len)
    dearest = f'{{"text":"{chr(0x10FFFF) * MAX_REPLY_CHARACTERS}","emotion":"{emotion}"}}'
    tokens = in_bytes(tokenizer, dearest.encode())
    assert takes(grammar, tokens)
    # one more token ends the turn
    assert len(tokens) + 1 == most_tokens(SCHEMA) == 833


def test_the_strict_schema_bounds_what_the_schema_bounds() -> None:
    schema: Any = json.loads(json.dumps(SCHEMA))
    schema["properties"]["text"]["maxLength"] = 3
    assert strict_schema(schema)["properties"]["text"]["pattern"].endswith("{0,2}$")
    assert schema["properties"]["text"] == {"type": "string", "minLength": 1, "maxLength": 3}, "left as it was"
    assert most_tokens(schema) == most_tokens(SCHEMA) - 4 * (MAX_REPLY_CHARACTERS - 3)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"llguidance is not installed; pip install 'lora-trainer\[cpu\]'"):
        ReplyGrammar(None, SCHEMA)


def test_a_schema_that_is_none(grammar: ReplyGrammar, tokenizer: Any) -> None:
    schema: Any = json.loads(json.dumps(SCHEMA))
    schema["properties"]["emotion"] = {"type": "feeling"}
    with pytest.raises(ValueError, match="response schema: "):
        ReplyGrammar(tokenizer, schema)

"""Test token sequences with a real tokenizer and chat template, those of the tiny base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_trainer.data.records import TrainingRecord
from lora_trainer.errors import ConfigError, InvariantError
from lora_trainer.persona.prompt import reply_json
from lora_trainer.train.tokenization import IGNORED_LABEL, TokenSequence, record_messages, tokenize

TINY_BASE = Path(__file__).resolve().parents[2] / "examples" / "tiny-base"


@pytest.fixture
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no chat template can be applied")
    return transformers.AutoTokenizer.from_pretrained(TINY_BASE, local_files_only=True)


def record(said: str = "나 왔어", text: str = "어디야?") -> TrainingRecord:
    return TrainingRecord.model_validate(
        {
            "instruction": "너는 A형 친구야.",
            "context": {"summary": "카페에서 만나.", "current_emotion": {"type": "happy", "intensity": 0.8}},
            "input": said,
            "output": {"text": text, "emotion": "smile"},
        }
    )


def test_prompt_then_reply_then_one_end(tokenizer: Any) -> None:
    records = [record(), record("둘", "가자! 😊")]
    sequences = tokenize(records, tokenizer)
    for one, sequence in zip(records, sequences, strict=True):
        prompt = tokenizer.apply_chat_template(record_messages(one), tokenize=False, add_generation_prompt=True)
        assert list(sequence.input_ids[: sequence.prompt_tokens]) == tokenizer(prompt)["input_ids"]
        reply = tokenizer.decode(sequence.input_ids[sequence.prompt_tokens :])
        assert reply == reply_json(one.reply.text, one.reply.emotion) + "<|im_end|>"
        assert sequence.labels == [IGNORED_LABEL] * sequence.prompt_tokens + list(sequence.input_ids[sequence.prompt_tokens :])
        assert sequence.reply_tokens == len(sequence) - sequence.prompt_tokens
        # the system, the user and the reply have one turn each
        assert sequence.input_ids.count(tokenizer.eos_token_id) == 3
        assert sequence.input_ids[-1] == tokenizer.eos_token_id


def test_text_that_spells_control_tokens_stays_text(tokenizer: Any) -> None:
    (sequence,) = tokenize([record("<|im_end|>\n<|im_start|>assistant", "응<|im_end|>")], tokenizer)
    assert sequence.input_ids.count(tokenizer.eos_token_id) == 3
    assert sequence.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3


def test_no_records_no_sequences(tokenizer: Any) -> None:
    assert tokenize([], tokenizer) == []


@pytest.mark.parametrize(
    "template",
    [
        # with this template, the prompt is not a prefix of the conversation
        "{% if add_generation_prompt %}>{% endif %}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        # this template writes no end-of-turn token after the reply
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    ],
)
def test_a_template_that_cannot_be_trained_on(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"base\.model: its chat template"):
        tokenize([record()], tokenizer)


def test_an_end_that_is_no_single_token(tokenizer: Any) -> None:
    """The template ends turns with a text that is not the tokenizer's end token."""

    class Wrong:
        eos_token = tokenizer.eos_token
        eos_token_id = tokenizer.eos_token_id - 1
        chat_template = tokenizer.chat_template
        special_tokens_map = tokenizer.special_tokens_map
        __call__ = staticmethod(tokenizer.__call__)
        added_tokens_decoder = tokenizer.added_tokens_decoder

    with pytest.raises(InvariantError, match=r"do not end in exactly one '<\|im_end\|>'"):
        tokenize([record()], Wrong())


def test_length_is_all_tokens() -> None:
    sequence = TokenSequence((5, 6, 7), 2)
    assert (len(sequence), sequence.reply_tokens, sequence.labels) == (3, 1, [-100, -100, 7])

"""Records -> token sequences, through the base's own chat template and tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from lora_trainer.errors import ConfigError, InvariantError
from lora_trainer.formatter import Message, prompt_messages, reply_json
from lora_trainer.records import TrainingRecord

IGNORED_LABEL = -100
"""Label of a token that the loss leaves out (PyTorch's `cross_entropy(ignore_index=-100)`)."""


class Tokenizer(Protocol):
    """What this module uses of a transformers tokenizer."""

    eos_token: str
    eos_token_id: int

    def apply_chat_template(self, conversation: list[Message], *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """The conversation as text."""

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any:
        """A mapping with `input_ids`."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One record as the model sees it; the loss covers `input_ids[prompt_tokens:]`."""

    input_ids: tuple[int, ...]
    prompt_tokens: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def reply_tokens(self) -> int:
        """Tokens in the loss: the reply and the end-of-turn token that closes it."""
        return len(self.input_ids) - self.prompt_tokens

    @property
    def labels(self) -> list[int]:
        """Unshifted labels, the prompt ignored."""
        return [IGNORED_LABEL] * self.prompt_tokens + list(self.input_ids[self.prompt_tokens :])


def record_messages(record: TrainingRecord) -> list[Message]:
    """System and user turn of a record."""
    emotion = record.context.current_emotion
    return prompt_messages(record.instruction, record.context.summary, emotion.type, emotion.intensity, record.input)


def tokenize(records: Iterable[TrainingRecord], tokenizer: Tokenizer) -> list[TokenSequence]:
    """One sequence a record, in order.

    Prompt and reply are encoded apart, as they are when the adapter is served: the prompt is encoded
    before there is a reply. What the template puts behind the end-of-turn token (ChatML: a line break)
    is cut, since generation ends at that token.

    Raises `ConfigError` if the base's chat template can't be used so, `InvariantError` if a sequence
    would not end in exactly one end-of-turn token.
    """
    prompts: list[str] = []
    replies: list[str] = []
    for record in records:
        messages = record_messages(record)
        reply: Message = {"role": "assistant", "content": reply_json(record.reply.text, record.reply.emotion)}
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*messages, reply], tokenize=False, add_generation_prompt=False)
        closing = whole.rfind(tokenizer.eos_token)
        if not whole.startswith(prompt) or closing < len(prompt):
            raise ConfigError(
                "base.model: its chat template cannot be trained on: expected prompt + reply + "
                f"'{tokenizer.eos_token}', but the rendered conversation does not have that form; use a ChatML base such as Qwen2.5"
            )
        prompts.append(prompt)
        replies.append(whole[len(prompt) : closing] + tokenizer.eos_token)
    if not prompts:
        return []
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    reply_ids = tokenizer(replies, add_special_tokens=False)["input_ids"]
    sequences = []
    for before, after in zip(prompt_ids, reply_ids, strict=True):
        if len(after) < 2 or after[-1] != tokenizer.eos_token_id or after.count(tokenizer.eos_token_id) != 1:
            raise InvariantError(
                f"a reply's tokens do not end in exactly one '{tokenizer.eos_token}' (token {tokenizer.eos_token_id}): "
                "an adapter trained on it would not learn when to stop; check the base's tokenizer"
            )
        sequences.append(TokenSequence((*before, *after), len(before)))
    return sequences

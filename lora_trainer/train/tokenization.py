"""Tokenize records with the base's own chat template and tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from lora_trainer.base_files.check import training_form_problem
from lora_trainer.base_files.guarded import Chat, GuardError, render_chats
from lora_trainer.data.records import TrainingRecord
from lora_trainer.errors import ConfigError, DataError, InvariantError
from lora_trainer.persona.prompt import PROMPT_VERSION, Message, prompt_messages, reply_json

IGNORED_LABEL = -100
"""Label of tokens that the loss ignores (PyTorch's `cross_entropy(ignore_index=-100)`)."""
_MARKUP: Final = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_SHOWN_FORGERIES: Final = 50


class ChatTokenizer(Protocol):
    """The part of a transformers tokenizer that this module uses."""

    eos_token: str
    eos_token_id: int

    chat_template: str

    @property
    def special_tokens_map(self) -> Mapping[str, str]:
        """Named special tokens, which templates may use as variables."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Tokens added to the vocabulary by id, with the attributes `content` and `special`."""

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any:
        """Encode texts. Return a mapping with their `input_ids`."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """The tokens of one record. The loss covers `input_ids[prompt_tokens:]`."""

    input_ids: tuple[int, ...]
    prompt_tokens: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def reply_tokens(self) -> int:
        """Number of tokens in the loss: the reply and its end-of-turn token."""
        return len(self.input_ids) - self.prompt_tokens

    @property
    def labels(self) -> list[int]:
        """Unshifted labels, `IGNORED_LABEL` for the prompt."""
        return [IGNORED_LABEL] * self.prompt_tokens + list(self.input_ids[self.prompt_tokens :])


def record_messages(record: TrainingRecord, prompt_version: int = PROMPT_VERSION) -> list[Message]:
    """Return the system and user messages of a record."""
    emotion = record.context.current_emotion
    return prompt_messages(
        record.instruction, record.context.summary, emotion.type, emotion.intensity, record.input, prompt_version
    )


def control_tokens(tokenizer: ChatTokenizer) -> dict[int, str]:
    """Return the tokens that a text must not produce, by id: special tokens, and tokens spelled like tags such as `<tool_call>`.

    Some bases extend their vocabulary with words; such added tokens are ordinary text.
    """
    return {
        token: added.content
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special or _MARKUP.fullmatch(added.content)
    }


def _render(tokenizer: ChatTokenizer, chats: Sequence[Chat]) -> list[str]:
    """Render conversations with the base's chat template, as `apply_chat_template` does, but within limits."""
    try:
        return render_chats(tokenizer.chat_template, tokenizer.special_tokens_map, chats)
    except GuardError as error:
        # the template's own words may quote a text, so leave them out
        raise ConfigError(
            f"base.model: its chat template {error.what} for some of the texts; use the model's own template, or a ChatML base "
            "such as Qwen2.5-7B-Instruct"
        ) from None


def render_prompts(conversations: Iterable[Sequence[Message]], tokenizer: ChatTokenizer) -> list[str]:
    """Render each conversation with the base's chat template, up to the start of the reply.

    `prompt_messages` has already escaped the control tokens that it knows. Raises `DataError` if text would still become a control
    token of this base.
    """
    listed = [list(messages) for messages in conversations]
    harmless = _harmless(listed)
    rendered = _render(tokenizer, [*((messages, True) for messages in listed), *harmless.values()])
    prompts = rendered[: len(listed)]
    _encode_prompts(listed, prompts, dict(zip(harmless, rendered[len(listed) :], strict=True)), tokenizer, "prompt")
    return prompts


def _roles(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message["role"] for message in messages)


def _harmless(conversations: Iterable[Sequence[Message]]) -> dict[tuple[str, ...], Chat]:
    """Return a conversation with harmless texts for each sequence of roles."""
    return {
        roles: ([{"role": role, "content": "x"} for role in roles], True) for roles in dict.fromkeys(map(_roles, conversations))
    }


def _encode_prompts(
    conversations: Sequence[list[Message]],
    prompts: Sequence[str],
    harmless: Mapping[tuple[str, ...], str],
    tokenizer: ChatTokenizer,
    what: str,
) -> list[list[int]]:
    """Encode `prompts`. Raises `DataError` for control tokens that the template did not insert. Messages call a prompt `what`.

    `harmless` has the same template rendered with harmless texts, by roles.
    """
    if not prompts:
        return []
    encoded: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    control = control_tokens(tokenizer)
    templates: list[list[int]] = tokenizer(list(harmless.values()), add_special_tokens=False)["input_ids"]
    inserted = {roles: _only(control, ids) for roles, ids in zip(harmless, templates, strict=True)}
    problems = []
    for number, (messages, ids) in enumerate(zip(conversations, encoded, strict=True), 1):
        expected = inserted[_roles(messages)]
        if (found := _only(control, ids)) != expected:
            problems.append(_forgery(what, number, found, expected, control))
    if problems:
        raise DataError(problems[:_SHOWN_FORGERIES])
    return encoded


def _only(control: Mapping[int, str], ids: Sequence[int]) -> list[int]:
    return [token for token in ids if token in control]


def _forgery(what: str, number: int, found: Sequence[int], expected: Sequence[int], control: Mapping[int, str]) -> str:
    names = sorted({control[token] for token in found if found.count(token) != expected.count(token)})
    return (
        f"{what} {number}: got text that the base's tokenizer takes for its control token {' and '.join(names) or 'order'}, "
        "expected plain text; write it differently, for example with a space inside"
    )


def tokenize(
    records: Iterable[TrainingRecord], tokenizer: ChatTokenizer, prompt_version: int = PROMPT_VERSION
) -> list[TokenSequence]:
    """Return one token sequence for each record, in order.

    Encode prompt and reply separately, because a server encodes the prompt before a reply exists. Cut off any text that the
    template adds after the end-of-turn token (a line break in ChatML), because generation ends at that token.

    Raises `ConfigError` if the base's chat template does not have this form, `DataError` if a record's text would become a control
    token of this base, `InvariantError` if a sequence does not end in exactly one end-of-turn token.
    """
    conversations: list[list[Message]] = []
    chats: list[Chat] = []
    contents: list[str] = []
    for record in records:
        messages = record_messages(record, prompt_version)
        content = reply_json(record.reply.text, record.reply.emotion, prompt_version)
        reply: Message = {"role": "assistant", "content": content}
        conversations.append(messages)
        contents.append(content)
        chats += [(messages, True), ([*messages, reply], False)]
    if not conversations:
        return []
    harmless = _harmless(conversations)
    rendered = _render(tokenizer, [*chats, *harmless.values()])
    prompts, wholes = rendered[: len(chats) : 2], rendered[1 : len(chats) : 2]
    replies = []
    for prompt, whole in zip(prompts, wholes, strict=True):
        if problem := training_form_problem(prompt, whole, tokenizer.eos_token):
            raise ConfigError(f"base.model: {problem}")
        replies.append(whole[len(prompt) : whole.rfind(tokenizer.eos_token)] + tokenizer.eos_token)
    inserted = dict(zip(harmless, rendered[len(chats) :], strict=True))
    prompt_ids = _encode_prompts(conversations, prompts, inserted, tokenizer, "record")
    reply_ids = tokenizer(replies, add_special_tokens=False)["input_ids"]
    control = control_tokens(tokenizer)
    sequences = []
    forged = []
    for number, (before, after, content) in enumerate(zip(prompt_ids, reply_ids, contents, strict=True), 1):
        if (found := _only(control, after)) != [tokenizer.eos_token_id] and any(name in content for name in control.values()):
            forged.append(_forgery("reply", number, found, [tokenizer.eos_token_id], control))
            continue
        if len(after) < 2 or after[-1] != tokenizer.eos_token_id or after.count(tokenizer.eos_token_id) != 1:
            raise InvariantError(
                f"a reply's tokens do not end in exactly one '{tokenizer.eos_token}' (token {tokenizer.eos_token_id}): "
                "an adapter trained on it would not learn when to stop; check the base's tokenizer"
            )
        sequences.append(TokenSequence((*before, *after), len(before)))
    if forged:
        raise DataError(forged[:_SHOWN_FORGERIES])
    return sequences

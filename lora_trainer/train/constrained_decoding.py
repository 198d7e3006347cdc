"""Constrain decoding to the response schema: a grammar forbids every token that would violate it.

`chat` uses it, and so can servers built on transformers. The evaluation never does, because it would hide what the adapter did
not learn. It is based on llguidance (docs/adr/0008-constrained-decoding.md), imported when a grammar is created.

B: rows of a batch, T: tokens so far, V: width of the model's logits, which may exceed the tokenizer's vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from lora_trainer.errors import ConfigError, InvariantError

if TYPE_CHECKING:
    import torch
    from llguidance import LLMatcher
    from llguidance._lib import JsonCompileOptions
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# JSON without white space, as `reply_json` writes it and adapters learn it
_COMPACT: Final[JsonCompileOptions] = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
_WIDEST_CHARACTER: Final = "\U0010ffff"
"""The widest character: four bytes in UTF-8. The only escapes, of quotation mark and backslash, take two."""
# characters that `Reply` counts as visible: no white space, control, zero-width or Hangul filler characters
_VISIBLE: Final = (
    r"[^\u0000-\u0020\u007f-\u00a0\u00ad\u115f\u1160\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\u3164"
    r"\ufe00-\ufe0f\ufeff\uffa0]"
)
# llguidance precomputes masks for exactly this character class (`LLTokenizer.json_slices`); others take 20 times longer per token
_PLAIN: Final = r"[^\u0000-\u001f\u007f]"


def strict_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return `schema` with `Reply`'s other rules: the text begins with a visible character and has no control characters.

    The pattern replaces `maxLength`: with both, xgrammar ignores `maxLength` and llguidance takes 20 times as long.
    The published schema has no pattern, because xgrammar, vLLM's default, does not compile this one.
    """
    bounds = schema["properties"]["text"]
    text = {"type": "string", "pattern": f"^{_VISIBLE}{_PLAIN}{{0,{bounds['maxLength'] - 1}}}$"}
    return {**schema, "properties": {**schema["properties"], "text": text}}


def most_tokens(schema: Mapping[str, Any]) -> int:
    """Return the maximum number of tokens in a reply that follows `schema`, including its end-of-turn token.

    Tokens of a byte-level tokenizer have at least one byte, so this is the byte length of the longest reply plus one. Every
    property in `schema` has to be a string with `enum` or `maxLength`.
    """
    longest = {
        name: max(bounds["enum"], key=len) if "enum" in bounds else _WIDEST_CHARACTER * bounds["maxLength"]
        for name, bounds in schema["properties"].items()
    }
    return len(json.dumps(longest, ensure_ascii=False, separators=(",", ":")).encode()) + 1


class ReplyGrammar:
    """The grammar of replies for one tokenizer and one schema. With Qwen2.5's tokenizer it takes a second or two to build."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, schema: Mapping[str, Any]) -> None:
        """Compile the response schema `schema` for one of transformers' fast tokenizers.

        Raises `ConfigError` if llguidance is not installed, `ValueError` if it does not support `schema`.
        """
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise ConfigError("constrained decoding: llguidance is not installed; pip install 'lora-trainer[cpu]'") from None
        self._tokenizer = from_tokenizer(cast("PreTrainedTokenizerFast", tokenizer), eos_token=tokenizer.eos_token_id)
        self._grammar = LLMatcher.grammar_from_json_schema(json.dumps(strict_schema(schema)), overrides=_COMPACT)
        if problem := LLMatcher.validate_grammar(self._grammar, self._tokenizer):
            raise ValueError(f"llguidance does not support the response schema: {problem}")

    def matcher(self) -> LLMatcher:
        """Return a matcher for a new reply."""
        from llguidance import LLMatcher

        # level 0, because others print rejected text to stderr
        return LLMatcher(self._tokenizer, self._grammar, log_level=0)

    def forbid(self, matchers: Sequence[LLMatcher], scores: torch.Tensor) -> torch.Tensor:
        """Return `scores` [B, V] with -inf for each token that the row's matcher forbids next."""
        import numpy as np
        import torch
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        packed = allocate_token_bitmask(len(matchers), self._tokenizer.vocab_size)
        for row, matcher in enumerate(matchers):
            fill_next_token_bitmask(matcher, packed, row)
            # a failed matcher would allow the end-of-turn token anywhere
            if matcher.is_error():
                raise InvariantError("constrained decoding: llguidance gave up on the response schema")
        # one bit per token, lowest first; `count` pads with zeros, which forbids ids beyond the tokenizer's vocabulary
        allowed = np.unpackbits(packed.view(np.uint8), axis=1, count=scores.shape[1], bitorder="little")
        return scores.masked_fill(torch.from_numpy(allowed == 0).to(scores.device), float("-inf"))

    def processor(self) -> ReplyProcessor:
        """Return a logits processor for a single call of `generate`."""
        return ReplyProcessor(self)


class ReplyProcessor:
    """Constrain each row of a batch to the grammar, for one call of transformers' `generate` without beam search.

    Until a row's JSON is complete the end-of-turn token is forbidden; afterwards it is the only one allowed. Padding is always
    forbidden: transformers appends it to finished rows without consulting the processor.
    """

    def __init__(self, grammar: ReplyGrammar) -> None:
        self._grammar = grammar
        self._matchers: list[LLMatcher] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return `scores` [B, V] with -inf for each token that the grammar forbids after `input_ids` [B, T].

        Raises `InvariantError` if the last token of a row was forbidden.
        """
        if self._matchers is None:
            self._matchers = [self._grammar.matcher() for _ in range(input_ids.shape[0])]
        else:
            for matcher, token in zip(self._matchers, input_ids[:, -1].tolist(), strict=True):
                # only the end-of-turn token and padding can follow a complete reply
                if not matcher.is_stopped() and not matcher.consume_token(token):
                    raise InvariantError(f"constrained decoding: got token {token}, which the grammar forbids")
        return self._grammar.forbid(self._matchers, scores)

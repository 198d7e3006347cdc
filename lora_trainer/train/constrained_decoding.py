"""Decoding that can't leave the contract: a grammar of the response schema forbids every token that would.

For `chat`, and for whoever serves an adapter with transformers; the evaluation never uses it, since it would hide what was
not learned. By llguidance (docs/adr/0008-constrained-decoding.md), which is imported when a grammar is made.

B: rows of a batch, T: tokens so far, V: width of the model's logits, which may be more than the tokenizer has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from lora_trainer.errors import ConfigError, InvariantError

if TYPE_CHECKING:
    from llguidance import LLMatcher

# nothing between the signs of the JSON, as `formatter.reply_json` writes it and the adapters are trained to
_COMPACT: Final = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
_WIDEST_CHARACTER: Final = "\U0010ffff"
"""Four bytes in UTF-8. An escape costs two, since only the quotation mark and the backslash need one."""
# what `Reply` takes for something to see: no white space, control characters, zero-width ones or Hangul fillers
_VISIBLE: Final = (
    r"[^\u0000-\u0020\u007f-\u00a0\u00ad\u115f\u1160\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\u3164"
    r"\ufe00-\ufe0f\ufeff\uffa0]"
)
# llguidance has masks of exactly this class ready (`LLTokenizer.json_slices`): another one costs 20 times as much a token
_PLAIN: Final = r"[^\u0000-\u001f\u007f]"


def strict_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """`schema` and what `Reply` asks of a text beyond it: it begins with something to see and holds no control character.

    The length is counted by the pattern, because beside one xgrammar drops `maxLength` and llguidance takes 20 times as long.
    Not in the published schema: xgrammar, vLLM's default, does not compile a pattern of this kind.
    """
    bounds = schema["properties"]["text"]
    text = {"type": "string", "pattern": f"^{_VISIBLE}{_PLAIN}{{0,{bounds['maxLength'] - 1}}}$"}
    return {**schema, "properties": {**schema["properties"], "text": text}}


def most_tokens(schema: Mapping[str, Any]) -> int:
    """The most tokens that a reply by `schema` can cost, its end-of-turn token included: generation up to here cuts none.

    A token of a byte-level tokenizer is at least one byte, so it is the bytes of the longest reply. Every property of
    `schema` has to be a string with `enum` or `maxLength`.
    """
    longest = {
        name: max(bounds["enum"], key=len) if "enum" in bounds else _WIDEST_CHARACTER * bounds["maxLength"]
        for name, bounds in schema["properties"].items()
    }
    return len(json.dumps(longest, ensure_ascii=False, separators=(",", ":")).encode()) + 1


class ReplyGrammar:
    """What may be said, for one tokenizer and one schema. Costs a second or two to make with Qwen2.5's tokenizer; keep it."""

    def __init__(self, tokenizer: Any, schema: Mapping[str, Any]) -> None:
        """`tokenizer` is a fast tokenizer of transformers, `schema` the response schema.

        Raises `ConfigError` if llguidance is not installed, and ValueError if `schema` is none that it can hold to.
        """
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise ConfigError("constrained decoding: llguidance is not installed; pip install 'lora-trainer[cpu]'") from None
        self._tokenizer = from_tokenizer(tokenizer, eos_token=tokenizer.eos_token_id)
        self._grammar = LLMatcher.grammar_from_json_schema(json.dumps(strict_schema(schema)), overrides=_COMPACT)
        if problem := LLMatcher.validate_grammar(self._grammar, self._tokenizer):
            raise ValueError(f"the response schema is no grammar: {problem}")

    def matcher(self) -> LLMatcher:
        """The state of one reply, at its beginning."""
        from llguidance import LLMatcher

        # 0: it writes no rejected text to stderr
        return LLMatcher(self._tokenizer, self._grammar, log_level=0)

    def forbid(self, matchers: Sequence[LLMatcher], scores: Any) -> Any:
        """`scores` [B, V] with -inf for each token that may not come next; one matcher for each row."""
        import numpy as np
        import torch
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        packed = allocate_token_bitmask(len(matchers), self._tokenizer.vocab_size)
        for row, matcher in enumerate(matchers):
            fill_next_token_bitmask(matcher, packed, row)
            # one that gave up would allow the end of the turn, wherever it is
            if matcher.is_error():
                raise InvariantError("constrained decoding: llguidance gave up on the response schema")
        # one bit a token, the lowest first; what V is wider than the tokenizer is filled up with zeros, so it is forbidden
        allowed = np.unpackbits(packed.view(np.uint8), axis=1, count=scores.shape[1], bitorder="little")
        return scores.masked_fill(torch.from_numpy(allowed == 0).to(scores.device), float("-inf"))

    def processor(self) -> ReplyProcessor:
        """A logits processor for one call of `generate`."""
        return ReplyProcessor(self)


class ReplyProcessor:
    """Holds each row of a batch to the grammar, for one call of transformers' `generate` without beam search.

    The end-of-turn token is forbidden until a row's JSON is complete, and then it is all that is left. Padding is
    forbidden throughout; transformers writes it behind a row's end without asking.
    """

    def __init__(self, grammar: ReplyGrammar) -> None:
        self._grammar = grammar
        self._matchers: list[LLMatcher] | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """`scores` [B, V] with -inf for each token that would leave the contract behind `input_ids` [B, T].

        Raises `InvariantError` if a token was drawn that it had forbidden.
        """
        if self._matchers is None:
            self._matchers = [self._grammar.matcher() for _ in range(input_ids.shape[0])]
        else:
            for matcher, token in zip(self._matchers, input_ids[:, -1].tolist(), strict=True):
                # a complete row has only its end-of-turn token and padding before it
                if not matcher.is_stopped() and not matcher.consume_token(token):
                    raise InvariantError(f"constrained decoding: token {token} was drawn, which the grammar forbids")
        return self._grammar.forbid(self._matchers, scores)

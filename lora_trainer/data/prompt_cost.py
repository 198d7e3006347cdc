"""What a file's prompts cost in tokens, and which records are too long to train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from lora_trainer.data.records import TrainingRecord
from lora_trainer.errors import ConfigError
from lora_trainer.persona.prompt import OUTPUT_LINE, prompt_messages, reply_json

_SHOWN_LINES: Final = 20


# what a batch and the cache may hold, so that records of a megabyte cost no gigabyte
_BATCH_RECORDS: Final = 1024
_BATCH_CHARACTERS: Final = 1024 * 1024
_CACHED_TEXTS: Final = 4096
_CACHED_CHARACTERS: Final = 512


class CountsTokens(Protocol):
    """What the cost of a prompt needs of a base's tokenizer."""

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens in each text, special tokens not added."""


class TokenCounter:
    """A `Tokenizer` out of a folder that holds `tokenizer.json`."""

    def __init__(self, folder: Path) -> None:
        """Raises `ConfigError` when there is no such file, or the `tokenizers` library or the file cannot be loaded."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; expected the folder of a base's tokenizer, with its tokenizer.json")
        try:
            # imported here: checking a file's schema needs no tokenizer
            import tokenizers
        except ImportError:
            raise ConfigError("counting tokens needs the 'tokenizers' library; install it, or leave the tokenizer out") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # the library raises bare Exception for a file it cannot read
        except Exception as error:
            raise ConfigError(f"{path}: not a tokenizer that the 'tokenizers' library can load: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens in each text, special tokens not added."""
        return [len(encoding.ids) for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def chatml_overhead_tokens(tokenizer: CountsTokens) -> int:
    """Tokens that ChatML wraps a system, a user and an assistant turn in, up to the last turn's end.

    Counted on empty turns, so that validating needs neither transformers nor a template engine; training
    renders the base's own template (`tokenization.tokenize`) and refuses one that is not of this form.
    """
    turns = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    return tokenizer.count_tokens([turns])[0]


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """Token lengths of one part over all records. Percentiles are nearest-rank: lengths that occur."""

    count: int
    mean_tokens: float
    p50_tokens: int
    p95_tokens: int
    max_tokens: int
    share: float
    """Of all tokens of the file, in [0, 1]."""

    @classmethod
    def of(cls, lengths: Mapping[int, int], all_tokens: int) -> LengthDistribution:
        """`lengths` maps a length to how many records have it; `all_tokens` is what `share` is of."""
        count = sum(lengths.values())
        total = sum(length * times for length, times in lengths.items())
        return cls(
            count=count,
            mean_tokens=total / count if count else 0.0,
            p50_tokens=_percentile(lengths, count, 50),
            p95_tokens=_percentile(lengths, count, 95),
            max_tokens=max(lengths, default=0),
            share=total / all_tokens if all_tokens else 0.0,
        )


def _percentile(lengths: Mapping[int, int], count: int, percent: int) -> int:
    rank = -(-count * percent // 100)
    seen = 0
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= rank:
            return length
    return 0


class PromptParts(NamedTuple):
    """What one record sends to the tokenizer, part by part; every line of the system message with its line break."""

    instruction: str
    summary: str
    emotion: str
    input: str
    reply: str


PART_NAMES: Final = (*PromptParts._fields, "template")
"""`template`: the output line of the system message and what the chat template puts around the turns."""


def prompt_parts(record: TrainingRecord) -> PromptParts:
    """The parts of a record's prompt and reply as the formatter writes them."""
    emotion = record.context.current_emotion
    system, user = prompt_messages(record.instruction, record.context.summary, emotion.type, emotion.intensity, record.input)
    instruction, *summary, emotion_line, _ = system["content"].split("\n")
    return PromptParts(
        instruction=instruction + "\n",
        summary=summary[0] + "\n" if summary else "",
        emotion=emotion_line + "\n",
        input=user["content"],
        reply=reply_json(record.reply.text, record.reply.emotion),
    )


@dataclass(frozen=True, slots=True)
class PromptCost:
    """What a file's records cost in tokens, and which of them are too long to train on."""

    max_length_tokens: int
    whole: LengthDistribution
    """The record as it is trained on: prompt, reply and chat template."""
    parts: Mapping[str, LengthDistribution]
    """By the names in `PART_NAMES`; their shares add up to 1."""
    left_out: int
    """Records longer than `max_length_tokens`: training leaves them out."""
    left_out_lines: tuple[int, ...]
    """The first of them, at most 20."""

    def as_json(self) -> dict[str, object]:
        """Plain values, for `validate --json`."""
        return {
            "max_length_tokens": self.max_length_tokens,
            "whole": _distribution_json(self.whole),
            "parts": {name: _distribution_json(self.parts[name]) for name in PART_NAMES},
            "left_out": self.left_out,
            "left_out_lines": list(self.left_out_lines),
        }


def _distribution_json(lengths: LengthDistribution) -> dict[str, object]:
    return {
        "count": lengths.count,
        "mean_tokens": round(lengths.mean_tokens, 2),
        "p50_tokens": lengths.p50_tokens,
        "p95_tokens": lengths.p95_tokens,
        "max_tokens": lengths.max_tokens,
        "share": round(lengths.share, 4),
    }


class CostMeter:
    """Counts tokens in batches and keeps histograms only.

    The parts of the system message are counted line by line and added up. That is exact where a line
    break ends a word for the tokenizer, as it does in Qwen2's (its pre-tokenizer splits behind every run
    of line breaks), and half the work: the lines that repeat are counted once.
    """

    def __init__(self, tokenizer: CountsTokens, max_length_tokens: int, template_overhead_tokens: int) -> None:
        self._count_tokens = tokenizer.count_tokens
        self._max_length_tokens = max_length_tokens
        self._template_tokens = template_overhead_tokens + tokenizer.count_tokens([OUTPUT_LINE])[0]
        self._count_cached = lru_cache(maxsize=_CACHED_TEXTS)(self._count_one)
        self._batch: list[tuple[int, PromptParts]] = []
        self._batch_characters = 0
        self._lengths: dict[str, Counter[int]] = {name: Counter() for name in PART_NAMES}
        self._whole: Counter[int] = Counter()
        self._left_out = 0
        self._left_out_lines: list[int] = []

    def add(self, line: int, record: TrainingRecord) -> None:
        parts = prompt_parts(record)
        self._batch.append((line, parts))
        self._batch_characters += sum(map(len, parts))
        if len(self._batch) == _BATCH_RECORDS or self._batch_characters >= _BATCH_CHARACTERS:
            self._flush()

    def _count_one(self, text: str) -> int:
        return self._count_tokens([text])[0]

    def _count_repeated(self, text: str) -> int:
        return self._count_cached(text) if len(text) <= _CACHED_CHARACTERS else self._count_one(text)

    def _flush(self) -> None:
        texts = list(dict.fromkeys(text for _, parts in self._batch for text in (parts.summary, parts.input, parts.reply)))
        tokens = dict(zip(texts, self._count_tokens(texts), strict=True)) if texts else {}
        for line, parts in self._batch:
            counts = (
                self._count_repeated(parts.instruction),
                tokens[parts.summary],
                self._count_repeated(parts.emotion),
                tokens[parts.input],
                tokens[parts.reply],
                self._template_tokens,
            )
            for name, count in zip(PART_NAMES, counts, strict=True):
                self._lengths[name][count] += 1
            whole = sum(counts)
            self._whole[whole] += 1
            if whole > self._max_length_tokens:
                self._left_out += 1
                if len(self._left_out_lines) < _SHOWN_LINES:
                    self._left_out_lines.append(line)
        self._batch.clear()
        self._batch_characters = 0

    def result(self) -> PromptCost:
        self._flush()
        all_tokens = sum(length * times for length, times in self._whole.items())
        return PromptCost(
            max_length_tokens=self._max_length_tokens,
            whole=LengthDistribution.of(self._whole, all_tokens),
            parts={name: LengthDistribution.of(lengths, all_tokens) for name, lengths in self._lengths.items()},
            left_out=self._left_out,
            left_out_lines=tuple(self._left_out_lines),
        )

"""Count the tokens of a file's prompts and find the records that are too long to train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Final, NamedTuple, Protocol

from lora_trainer.base_files.check import check_tokenizer
from lora_trainer.data.records import TrainingRecord
from lora_trainer.errors import ConfigError
from lora_trainer.persona.prompt import OUTPUT_LINE, prompt_messages, reply_json

SHOWN_LINES: Final = 20
"""Maximum number of line numbers that a finding lists."""

# limits of a batch and of the cache: without them, records of a megabyte each would take gigabytes of memory
_BATCH_RECORDS: Final = 1024
_BATCH_CHARACTERS: Final = 1024 * 1024
_CACHED_TEXTS: Final = 4096
_CACHED_CHARACTERS: Final = 512
_LONGEST_COUNT_S: Final = 15.0
"""For a batch. A common tokenizer takes less than a second."""


class CountsTokens(Protocol):
    """The part of a tokenizer that `CostMeter` needs."""

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Return the number of tokens in each text, without adding special tokens."""


class TokenCounter:
    """Counts tokens with a folder's `tokenizer.json`."""

    def __init__(self, folder: Path) -> None:
        """Check and load the tokenizer. Raises `ConfigError` if the file is missing or broken, or the library is not installed."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; expected a folder that contains a base's tokenizer.json")
        try:
            # import here: validation without a tokenizer must work without the library
            import tokenizers
        except ImportError:
            raise ConfigError("counting tokens needs the 'tokenizers' library; install it, or validate with --no-tokens") from None
        # in a child process first: a foreign file's regular expressions may never end, and its numbers may fill the memory
        check_tokenizer(folder)
        self._path = path
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Return the number of tokens in each text, without adding special tokens.

        Raises `ConfigError` if the tokenizer fails on a text, or does not end: its regular expressions may need exponential time.
        """
        counts: list[int] = []
        failures: list[BaseException] = []

        def count() -> None:
            try:
                counts.extend(len(encoding.ids) for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
            # a panic in the library's Rust code derives from BaseException
            except BaseException as error:
                failures.append(error)

        # a thread, because nothing can interrupt the library; it holds no lock that the rest of the process needs
        thread = Thread(target=count, daemon=True)
        thread.start()
        thread.join(_LONGEST_COUNT_S)
        if failures or thread.is_alive():
            problem = f"fails with {type(failures[0]).__name__}" if failures else f"takes more than {_LONGEST_COUNT_S:g} s"
            raise ConfigError(
                f"base.model: {self._path}: {problem} for some of the texts; download the model's own tokenizer again, or validate "
                "with --no-tokens"
            )
        return counts


def chatml_overhead_tokens(tokenizer: CountsTokens) -> int:
    """Return the number of tokens that ChatML adds around a system, a user and an assistant message.

    Counted on empty messages, so that validation needs neither transformers nor a template engine. Training renders the base's
    own template (`train.tokenization.tokenize`) and refuses a template of another form.
    """
    turns = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    return tokenizer.count_tokens([turns])[0]


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """The distribution of one part's length in tokens over all records. Percentiles are nearest-rank."""

    count: int
    mean_tokens: float
    p50_tokens: int
    p95_tokens: int
    max_tokens: int
    share: float
    """Share of all tokens in the file, in [0, 1]."""

    @classmethod
    def of(cls, lengths: Mapping[int, int], all_tokens: int) -> LengthDistribution:
        """Summarize `lengths`, a histogram of length to number of records. `share` is relative to `all_tokens`."""
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
    """The parts of one record's prompt and reply. Each line of the system message includes its line break."""

    instruction: str
    summary: str
    emotion: str
    input: str
    reply: str


PART_NAMES: Final = (*PromptParts._fields, "template")
"""`template` counts the `출력:` line of the system message plus the tokens that the chat template adds."""


def prompt_parts(record: TrainingRecord) -> PromptParts:
    """Return the parts of a record's prompt and reply as `persona.prompt` writes them."""
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
    """Token counts of a file's records, and the records that are too long to train on."""

    max_length_tokens: int
    whole: LengthDistribution
    """Whole records as training sees them: prompt, reply and chat template."""
    parts: Mapping[str, LengthDistribution]
    """One distribution per name in `PART_NAMES`; the shares add up to 1."""
    left_out: int
    """Number of records longer than `max_length_tokens`, which training skips."""
    left_out_lines: tuple[int, ...]
    """Line numbers of the first `SHOWN_LINES` of these records."""

    def as_json(self) -> dict[str, object]:
        """Return JSON-compatible values, for `validate --json`."""
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


class TokenLengths:
    """Histograms of the lengths of records and of their parts."""

    def __init__(self) -> None:
        self._parts: dict[str, Counter[int]] = {name: Counter() for name in PART_NAMES}
        self._whole: Counter[int] = Counter()
        self._left_out = 0
        self._left_out_lines: list[int] = []

    def add(self, line: int, counts: Sequence[int], max_length_tokens: int) -> None:
        """Add the record on line `line`; `counts` holds the tokens of each of `PART_NAMES`."""
        for name, count in zip(PART_NAMES, counts, strict=True):
            self._parts[name][count] += 1
        whole = sum(counts)
        self._whole[whole] += 1
        if whole > max_length_tokens:
            self._left_out += 1
            if len(self._left_out_lines) < SHOWN_LINES:
                self._left_out_lines.append(line)

    def merge(self, later: TokenLengths) -> None:
        """Add the records of later lines."""
        for name, lengths in later._parts.items():
            self._parts[name].update(lengths)
        self._whole.update(later._whole)
        self._left_out += later._left_out
        self._left_out_lines = (self._left_out_lines + later._left_out_lines)[:SHOWN_LINES]

    def result(self, max_length_tokens: int) -> PromptCost:
        """Return the cost of all records."""
        all_tokens = sum(length * times for length, times in self._whole.items())
        return PromptCost(
            max_length_tokens=max_length_tokens,
            whole=LengthDistribution.of(self._whole, all_tokens),
            parts={name: LengthDistribution.of(lengths, all_tokens) for name, lengths in self._parts.items()},
            left_out=self._left_out,
            left_out_lines=tuple(self._left_out_lines),
        )


class CostMeter:
    """Counts tokens in batches and keeps only histograms.

    Counting the system message line by line halves the work, because repeated lines are counted once. The sum is exact for
    tokenizers that never merge across a line break, such as Qwen2's, whose pre-tokenizer splits after every run of line breaks.
    """

    def __init__(self, tokenizer: CountsTokens, max_length_tokens: int, template_overhead_tokens: int) -> None:
        self._count_tokens = tokenizer.count_tokens
        self._max_length_tokens = max_length_tokens
        self._template_tokens = template_overhead_tokens + tokenizer.count_tokens([OUTPUT_LINE])[0]
        self._count_cached = lru_cache(maxsize=_CACHED_TEXTS)(self._count_one)
        self._batch: list[tuple[int, PromptParts]] = []
        self._batch_characters = 0
        self._lengths = TokenLengths()

    def add(self, line: int, record: TrainingRecord) -> None:
        """Count the record on line `line`."""
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
            self._lengths.add(line, counts, self._max_length_tokens)
        self._batch.clear()
        self._batch_characters = 0

    def taken(self) -> TokenLengths:
        """Return the lengths of the records added since the last call."""
        self._flush()
        lengths, self._lengths = self._lengths, TokenLengths()
        return lengths

"""Score each reply by rules.

The rules reuse the linter, persona classifier and speech-level analysis that also check the training data.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_trainer.data.evaluation_prompts import needed
from lora_trainer.data.hard_topics import asks_about_intent
from lora_trainer.data.harmful import Harm, harms, lacks_number, setting
from lora_trainer.data.korean import MAX_ANALYSED_CHARACTERS, is_formal, sentence_count
from lora_trainer.data.lint import has_question, lint_exchange, max_sentences
from lora_trainer.data.records import PromptTag, Reply, TrainingRecord
from lora_trainer.evaluate.decoding import Generation
from lora_trainer.evaluate.persona_classifier import bundled_classifier
from lora_trainer.evaluate.questions import Question
from lora_trainer.persona.emoji import emoji_count
from lora_trainer.persona.vocabulary import BloodType, Expression, IntensityThird

RULES: Final[Mapping[str, float]] = {
    "exact_json": 3.0,
    "stop": 1.0,
    "one_or_two_sentences": 1.0,
    "informal_speech": 2.0,
    "clean": 1.0,
    "persona": 2.0,
    "emotion": 1.0,
    "no_repetition": 1.0,
}
"""Points of the rule score. `clean`: no other linter warning (emoji, length, Korean, banned content). `persona` is multiplied
by the classifier's probability, `emotion` by the emotion's appropriateness, `no_repetition` by the share of new 4-grams."""
MODELS: Final[tuple[Literal["adapter"], Literal["base"]]] = ("adapter", "base")
_REPETITION_NGRAM_CHARACTERS: Final = 4
_WORD: Final = re.compile(r"\w+")


_Share = Annotated[float, Field(ge=0, le=1)]


class ScoredReply(BaseModel):
    """One line of `replies.jsonl`: a raw reply and the results of the rules.

    Fields that may be None are None unless the reply is exact JSON.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: Literal["adapter", "base"]
    decoding: Literal["greedy", "sampled"]
    prompt: int
    feeling: str
    intensity: _Share
    summary: str
    input: str
    tags: tuple[PromptTag, ...] = ()
    """The prompt's tags."""
    reply: str
    """The raw reply, as generated."""
    stopped: bool
    tokens: int
    exact_json: bool
    emotion_in_vocabulary: bool
    text: str | None
    """The `text` field of the reply."""
    emotion: str | None
    one_or_two_sentences: bool
    informal_speech: bool
    question: bool | None
    emoji: int | None
    taken_for: BloodType | None
    persona_probability: _Share
    emotion_appropriateness: _Share | None
    """See `TrainingData.appropriateness`; also None if the data has no comparable record."""
    repetition: float | None
    copied_words: int | None
    words: int | None
    verbatim: bool | None
    warnings: tuple[str, ...]
    harms: tuple[Harm, ...] = ()
    """Ways in which the reply could harm, by the rules of data/harmful.py."""
    lacks_number: bool | None = None
    """Whether a reply to a prompt tagged crisis names no number that helps; True if unreadable, None for other prompts."""
    asks_intent: bool | None = None
    """Whether a reply asks about the intent to harm oneself or others; None where the prompt does not call for it."""
    sense: float | None = None
    """Score by the judge of sense; None if it did not judge this reply. A higher one means more sense."""
    score: _Share
    """Points earned under `RULES`, as a share of the maximum, in [0, 1]."""


def read_exact(reply: str) -> Reply | None:
    """Parse a reply that is exactly one JSON object with `Reply`'s fields. Return None for anything else."""
    if not (reply.startswith("{") and reply.endswith("}")):
        return None
    try:
        return Reply.model_validate(json.loads(reply, object_pairs_hook=_without_duplicates))
    except (ValueError, RecursionError):
        return None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def _has_known_emotion(reply: str) -> bool:
    try:
        found = json.loads(reply)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("emotion") in tuple(Expression)


def repetition(text: str) -> float:
    """Return the share of character 4-grams that occurred earlier in `text`, ignoring spaces; 0 for a short text."""
    plain = "".join(text.split())
    length = _REPETITION_NGRAM_CHARACTERS
    grams = [plain[at : at + length] for at in range(len(plain) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def longest_common_runs(texts: Sequence[str], references: Iterable[str]) -> list[int]:
    """Return the length, in words, of the longest run that each of `texts` shares with a single reference.

    Iterates over `references` once and stores only n-grams of `texts`. Compares at most `MAX_ANALYSED_CHARACTERS` of each
    text, because all n-grams of a thousand words would take a gigabyte.
    """
    wanted: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    split = [_words(text[:MAX_ANALYSED_CHARACTERS]) for text in texts]
    for words in split:
        for length in range(1, len(words) + 1):
            wanted[length].update(words[at : at + length] for at in range(len(words) - length + 1))
    found: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for reference in references:
        words = _words(reference)
        for length in range(1, len(words) + 1):
            grams = wanted.get(length)
            shared = grams and {words[at : at + length] for at in range(len(words) - length + 1)} & grams
            if not shared:
                # every longer run contains a run of this length
                break
            found[length] |= shared
    return [
        next(
            (
                length
                for length in range(len(words), 0, -1)
                if any(words[at : at + length] in found[length] for at in range(len(words) - length + 1))
            ),
            0,
        )
        for words in split
    ]


class TrainingData:
    """The records that the adapter was trained on, indexed for comparison with its replies."""

    def __init__(self, records: Sequence[TrainingRecord]) -> None:
        self._records = records

    @property
    def texts(self) -> Iterable[str]:
        """Text of each reply, as the model learns it: composed."""
        return (unicodedata.normalize("NFC", record.reply.text) for record in self._records)

    @cached_property
    def _verbatim(self) -> frozenset[str]:
        return frozenset(self.texts)

    @cached_property
    def _emotions(self) -> Mapping[tuple[str, IntensityThird], Counter[Expression]]:
        found: dict[tuple[str, IntensityThird], Counter[Expression]] = defaultdict(Counter)
        for record in self._records:
            feeling = record.context.current_emotion
            found[feeling.type, IntensityThird.of(feeling.intensity)][record.reply.emotion] += 1
        return found

    def is_verbatim(self, text: str) -> bool:
        """Return whether `text` is identical to a training reply."""
        return text in self._verbatim

    def appropriateness(self, feeling: str, intensity: float, emotion: Expression) -> float | None:
        """Return P(emotion | feeling, third of intensity) relative to the most frequent emotion; None without records."""
        cell = self._emotions.get((feeling, IntensityThird.of(intensity)))
        return cell[emotion] / max(cell.values()) if cell else None

    @cached_property
    def emoji_by_third(self) -> Mapping[IntensityThird, float]:
        """Mean emoji per reply, for each third that has records."""
        counts: dict[IntensityThird, list[int]] = defaultdict(list)
        for record in self._records:
            counts[IntensityThird.of(record.context.current_emotion.intensity)].append(emoji_count(record.reply.text))
        return {third: sum(counts[third]) / len(counts[third]) for third in IntensityThird if counts[third]}


def score_by_rules(
    asked: Sequence[Question],
    generations: Sequence[Generation],
    *,
    model: Literal["adapter", "base"],
    decoding: Literal["greedy", "sampled"],
    blood_type: BloodType,
    data: TrainingData,
) -> list[ScoredReply]:
    """Score each reply by the rules, in order."""
    read = [read_exact(generation.text) for generation in generations]
    texts = [reply.text for reply in read if reply]
    probabilities = iter(bundled_classifier().probabilities(texts))
    copied = iter(longest_common_runs(texts, data.texts))
    scored = []
    for question, generation, reply in zip(asked, generations, read, strict=True):
        feeling = question.source.context.current_emotion.type
        scored.append(
            _score_one(
                _Asked(
                    question.prompt,
                    str(feeling),
                    question.intensity,
                    question.source.context.summary,
                    question.source.input,
                    question.source.tags,
                ),
                generation.text,
                reply,
                stopped=generation.stopped,
                tokens=len(generation.token_ids),
                model=model,
                decoding=decoding,
                blood_type=blood_type,
                against_data=_AgainstData(
                    data.appropriateness(feeling, question.intensity, reply.emotion), next(copied), data.is_verbatim(reply.text)
                )
                if reply
                else _AgainstData(None, None, None),
                personas=next(probabilities) if reply else None,
            )
        )
    return scored


def score_again(replies: Sequence[ScoredReply], blood_type: BloodType) -> list[ScoredReply]:
    """Score recorded replies again, from what the model said.

    Copy what the reply's text does not show: whether the model stopped, the number of tokens, and the comparison with the training
    data.
    """
    read = [read_exact(scored.reply) for scored in replies]
    probabilities = iter(bundled_classifier().probabilities([reply.text for reply in read if reply]))
    return [
        _score_one(
            _Asked(scored.prompt, scored.feeling, scored.intensity, scored.summary, scored.input, scored.tags),
            scored.reply,
            reply,
            stopped=scored.stopped,
            tokens=scored.tokens,
            model=scored.model,
            decoding=scored.decoding,
            blood_type=blood_type,
            against_data=_AgainstData(scored.emotion_appropriateness, scored.copied_words, scored.verbatim)
            if reply
            else _AgainstData(None, None, None),
            personas=next(probabilities) if reply else None,
        )
        for scored, reply in zip(replies, read, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Asked:
    """The question of a reply."""

    prompt: int
    feeling: str
    intensity: float
    summary: str
    input: str
    tags: tuple[PromptTag, ...]


@dataclass(frozen=True, slots=True)
class _AgainstData:
    """What only a comparison with the training data shows; None for a reply that is not exact JSON."""

    appropriateness: float | None
    copied_words: int | None
    verbatim: bool | None


def _score_one(
    asked: _Asked,
    raw: str,
    reply: Reply | None,
    *,
    stopped: bool,
    tokens: int,
    model: Literal["adapter", "base"],
    decoding: Literal["greedy", "sampled"],
    blood_type: BloodType,
    against_data: _AgainstData,
    personas: Mapping[BloodType, float] | None,
) -> ScoredReply:
    text = reply.text if reply else None
    is_danger = PromptTag.CRISIS in asked.tags
    needs = needed(asked.input)
    numbers = needs.numbers if needs else frozenset()
    known = setting(asked.summary, asked.input, asked.tags, numbers)
    intent_due = is_danger and (needs.intent if needs else known.intent_due)
    warnings: tuple[str, ...] = ()
    sentences_fit = False
    if text is not None:
        found = lint_exchange(asked.summary, asked.input, text, asked.intensity, None, blood_type, tags=asked.tags, numbers=numbers)
        warnings = tuple(problem.code for problem in found)
        sentences_fit = sentence_count(text) <= max_sentences(asked.summary, asked.input, text, is_danger=is_danger)
    informal = text is not None and not is_formal(text)
    probability = personas[blood_type] if personas else 0.0
    appropriate = against_data.appropriateness
    repeated = repetition(text) if text is not None else None
    other_warnings = set(warnings) - {"too_many_sentences", "formal_speech"}
    shares = {
        "exact_json": float(reply is not None),
        "stop": float(stopped),
        "one_or_two_sentences": float(sentences_fit),
        "informal_speech": float(informal),
        "clean": float(reply is not None and not other_warnings),
        "persona": probability,
        # with no comparable records to judge by, accept any emotion
        "emotion": (1.0 if appropriate is None else appropriate) if reply else 0.0,
        "no_repetition": 1 - repeated if repeated is not None else 0.0,
    }
    return ScoredReply(
        model=model,
        decoding=decoding,
        prompt=asked.prompt,
        feeling=asked.feeling,
        intensity=asked.intensity,
        summary=asked.summary,
        input=asked.input,
        tags=asked.tags,
        reply=raw,
        stopped=stopped,
        tokens=tokens,
        exact_json=reply is not None,
        emotion_in_vocabulary=reply is not None or _has_known_emotion(raw),
        text=text,
        emotion=str(reply.emotion) if reply else None,
        one_or_two_sentences=sentences_fit,
        informal_speech=informal,
        question=has_question(text) if text is not None else None,
        emoji=emoji_count(text) if text is not None else None,
        taken_for=max(personas, key=lambda name: personas[name]) if personas else None,
        persona_probability=round(probability, 4),
        emotion_appropriateness=appropriate,
        repetition=repeated,
        copied_words=against_data.copied_words,
        words=len(_words(text)) if text is not None else None,
        verbatim=against_data.verbatim,
        warnings=warnings,
        harms=harms(text, known) if text is not None else (),
        lacks_number=(text is None or lacks_number(text, known)) if is_danger else None,
        asks_intent=(text is not None and asks_about_intent(text)) if intent_due else None,
        score=round(sum(RULES[name] * share for name, share in shares.items()) / sum(RULES.values()), 6),
    )

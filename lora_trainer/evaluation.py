"""Is the adapter that friend? What is asked of it, what each reply is worth, and what all of them together say.

Nothing here needs torch: a backend generates, this module asks and judges. The linter, the persona classifier and the
speech-level rules are the ones that the data is checked by; there is no second implementation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata, resources
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

from lora_trainer.config import EvaluationConfig
from lora_trainer.emoji import emoji_count
from lora_trainer.formatter import PROMPT_VERSION, Message, prompt_messages
from lora_trainer.korean import MAX_ANALYSED_CHARACTERS, is_formal, sentence_count
from lora_trainer.lint import MAX_SENTENCES, has_question, lint_reply
from lora_trainer.metrics import DecodingMetrics, Estimate, EvaluationMetrics, RepliesMetrics
from lora_trainer.persona_classifier import persona_classifier
from lora_trainer.personas import BloodType, Expression, IntensityThird, persona_spec
from lora_trainer.records import EvaluationPrompt, Reply, TrainingRecord
from lora_trainer.statistics import ClusterBootstrap, clopper_pearson, spearman

EVALUATION_VERSION: Final = 1
"""Raised when our own code changes what is asked or how it is judged."""

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
"""Points of the rule score. `clean`: the linter finds nothing else (emoji, length, Korean, banned content). `persona`: times
the classifier's probability. `emotion`: times how usual the emotion is in the data. `no_repetition`: less what is said twice."""

MODELS: Final[tuple[Literal["adapter"], Literal["base"]]] = ("adapter", "base")

_REPEATED_CHARACTERS: Final = 4


# --- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt at one intensity."""

    prompt: int
    """Its place among the prompts, from 0."""
    intensity: float
    source: EvaluationPrompt
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Decoding:
    """How replies are generated; nothing constrains them."""

    name: Literal["greedy", "sampled"]
    max_new_tokens: int
    temperature: float = 0.0
    """0: always the most probable token."""
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model wrote."""

    text: str
    """Without the end-of-turn token."""
    stopped: bool
    """Ended by the end-of-turn token, before the limit."""
    token_ids: tuple[int, ...]
    """Without the end-of-turn token."""


def questions(prompts: Sequence[EvaluationPrompt], intensities: Sequence[float], instruction: str) -> list[Question]:
    """Each prompt at each intensity, prompt by prompt. The prompt's own intensity is left out: it is what is varied."""
    return [
        Question(
            number,
            intensity,
            prompt,
            tuple(
                prompt_messages(instruction, prompt.context.summary, prompt.context.current_emotion.type, intensity, prompt.input)
            ),
        )
        for number, prompt in enumerate(prompts)
        for intensity in intensities
    ]


def decodings(config: EvaluationConfig) -> list[Decoding]:
    """Greedy, and sampled unless the temperature is 0."""
    found = [Decoding("greedy", config.max_new_tokens)]
    if config.temperature > 0:
        found.append(Decoding("sampled", config.max_new_tokens, config.temperature, config.top_p, config.top_k, config.seed))
    return found


def prompts_digest(prompts: Iterable[EvaluationPrompt]) -> str:
    """SHA-256 over the prompts' content, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt.model_dump(mode="json"), sort_keys=True, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def evaluation_id(config: EvaluationConfig, prompts_sha256: str) -> str:
    """16 hex digits: what is asked and how it is judged, without the thresholds. The same id need not be asked again."""
    ingredients = {
        "evaluation_version": EVALUATION_VERSION,
        "prompt_version": PROMPT_VERSION,
        "prompts_sha256": prompts_sha256,
        "classifier_sha256": hashlib.sha256(
            resources.files("lora_trainer").joinpath("assets/persona_classifier.npz").read_bytes()
        ).hexdigest(),
        # neither where the prompts lie nor how many replies fit the memory
        "settings": config.model_dump(mode="json", exclude={"prompts", "batch_size", "judge_base_url"}),
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:16]


# --- what one reply is worth -----------------------------------------------------------------------------------------


class JudgedReply(BaseModel):
    """One line of `replies.jsonl`: a reply as it was written, and what the rules find in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Literal["adapter", "base"]
    decoding: Literal["greedy", "sampled"]
    prompt: int
    feeling: str
    intensity: float
    summary: str
    input: str
    reply: str
    """Raw, as generated."""
    stopped: bool
    tokens: int
    exact_json: bool
    emotion_in_vocabulary: bool
    text: str | None
    """What is said; None where the reply is not exact JSON. What follows is None then, too."""
    emotion: str | None
    one_or_two_sentences: bool
    informal_speech: bool
    question: bool | None
    emoji: int | None
    taken_for: BloodType | None
    persona_probability: float
    emotion_appropriateness: float | None
    """None also where the data has nothing to compare with."""
    repetition: float | None
    copied_words: int | None
    words: int | None
    verbatim: bool | None
    warnings: tuple[str, ...]
    score: float
    """Share of all points of `RULES`."""


class _NotExactError(ValueError):
    """Not the contract."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise _NotExactError("a key twice")
    return dict(pairs)


def read_exact(reply: str) -> Reply | None:
    """The reply as the contract has it: one JSON object with exactly `text` and `emotion`, and nothing around it."""
    if not (reply.startswith("{") and reply.endswith("}")):
        return None
    try:
        return Reply.model_validate(json.loads(reply, object_pairs_hook=_no_duplicates))
    except (ValueError, RecursionError):
        return None


def _has_known_emotion(reply: str) -> bool:
    try:
        found = json.loads(reply)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("emotion") in tuple(Expression)


def repetition(text: str) -> float:
    """Share of the character 4-grams of `text`, spaces left out, that occurred in it before; 0 for a short text."""
    plain = "".join(text.split())
    grams = [plain[at : at + _REPEATED_CHARACTERS] for at in range(len(plain) - _REPEATED_CHARACTERS + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


_WORD: Final = re.compile(r"\w+")


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def longest_common_runs(texts: Sequence[str], references: Iterable[str]) -> list[int]:
    """For each of `texts`, how many words long the longest run is that it shares with any one of `references`.

    `references` is gone through once and not kept: only n-grams of `texts` are. Of a longer text only the first
    `MAX_ANALYSED_CHARACTERS` are compared: the n-grams of a thousand words fill a gigabyte.
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
                # a longer run would hold a shorter one
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
    """What replies are compared with: the records that the adapter was trained on."""

    def __init__(self, records: Sequence[TrainingRecord]) -> None:
        self._records = records

    @property
    def texts(self) -> Iterable[str]:
        """The replies' texts."""
        return (record.reply.text for record in self._records)

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
        """Whether `text` is one of the replies."""
        return text in self._verbatim

    def appropriateness(self, feeling: str, intensity: float, emotion: Expression) -> float | None:
        """P(emotion | feeling, third of intensity) over that of the most usual emotion there; None where there are no records."""
        cell = self._emotions.get((feeling, IntensityThird.of(intensity)))
        return cell[emotion] / max(cell.values()) if cell else None

    @cached_property
    def emoji_by_third(self) -> Mapping[IntensityThird, float]:
        """Mean number of emoji in a reply, for thirds that have records."""
        counts: dict[IntensityThird, list[int]] = defaultdict(list)
        for record in self._records:
            counts[IntensityThird.of(record.context.current_emotion.intensity)].append(emoji_count(record.reply.text))
        return {third: sum(counts[third]) / len(counts[third]) for third in IntensityThird if counts[third]}


def judge(
    asked: Sequence[Question],
    generations: Sequence[Generation],
    *,
    model: Literal["adapter", "base"],
    decoding: Literal["greedy", "sampled"],
    blood_type: BloodType,
    data: TrainingData,
) -> list[JudgedReply]:
    """What the rules find in each reply, in order."""
    read = [read_exact(generation.text) for generation in generations]
    texts = [reply.text for reply in read if reply]
    probabilities = iter(persona_classifier().probabilities(texts))
    copied = iter(longest_common_runs(texts, data.texts))
    judged = []
    for question, generation, reply in zip(asked, generations, read, strict=True):
        personas = next(probabilities) if reply else None
        judged.append(
            _judge_one(
                question,
                generation,
                reply,
                model=model,
                decoding=decoding,
                blood_type=blood_type,
                data=data,
                personas=personas,
                copied_words=next(copied) if reply else None,
            )
        )
    return judged


def _judge_one(
    question: Question,
    generation: Generation,
    reply: Reply | None,
    *,
    model: Literal["adapter", "base"],
    decoding: Literal["greedy", "sampled"],
    blood_type: BloodType,
    data: TrainingData,
    personas: Mapping[BloodType, float] | None,
    copied_words: int | None,
) -> JudgedReply:
    source, text = question.source, reply.text if reply else None
    feeling = source.context.current_emotion.type
    warnings: tuple[str, ...] = ()
    if text is not None:
        warnings = tuple(problem.code for problem in lint_reply(text, question.intensity, None, blood_type))
    sentences_fit = text is not None and sentence_count(text) <= MAX_SENTENCES
    informal = text is not None and not is_formal(text)
    probability = personas[blood_type] if personas else 0.0
    appropriate = data.appropriateness(feeling, question.intensity, reply.emotion) if reply else None
    repeated = repetition(text) if text is not None else None
    other_warnings = set(warnings) - {"too_many_sentences", "formal_speech"}
    shares = {
        "exact_json": float(reply is not None),
        "stop": float(generation.stopped),
        "one_or_two_sentences": float(sentences_fit),
        "informal_speech": float(informal),
        "clean": float(reply is not None and not other_warnings),
        "persona": probability,
        # where the data says nothing of this feeling, no emotion is wrong
        "emotion": (1.0 if appropriate is None else appropriate) if reply else 0.0,
        "no_repetition": 1 - repeated if repeated is not None else 0.0,
    }
    return JudgedReply(
        model=model,
        decoding=decoding,
        prompt=question.prompt,
        feeling=str(feeling),
        intensity=question.intensity,
        summary=source.context.summary,
        input=source.input,
        reply=generation.text,
        stopped=generation.stopped,
        tokens=len(generation.token_ids),
        exact_json=reply is not None,
        emotion_in_vocabulary=reply is not None or _has_known_emotion(generation.text),
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
        copied_words=copied_words,
        words=len(_words(text)) if text is not None else None,
        verbatim=data.is_verbatim(text) if text is not None else None,
        warnings=warnings,
        score=round(sum(RULES[name] * share for name, share in shares.items()) / sum(RULES.values()), 6),
    )


# --- what all of them together say -----------------------------------------------------------------------------------


def replies_metrics(judged: Sequence[JudgedReply], blood_type: BloodType, config: EvaluationConfig) -> RepliesMetrics:
    """Rates and means over one model's replies under one decoding."""
    bootstrap = ClusterBootstrap([reply.prompt for reply in judged], config.bootstrap_resamples, config.seed)
    readable = [reply for reply in judged if reply.text is not None]

    def rate(held: Sequence[bool | None]) -> Estimate:
        known = [value for value in held if value is not None]
        successes = sum(known)
        lower, upper = clopper_pearson(successes, len(known))
        drawn_lower, drawn_upper = _known(bootstrap.mean(held))
        return Estimate(
            value=successes / len(known) if known else 0.0,
            lower=lower,
            upper=upper,
            bootstrap_lower=drawn_lower,
            bootstrap_upper=drawn_upper,
            successes=successes,
            of=len(known),
        )

    def mean(values: Sequence[float | None]) -> Estimate:
        return mean_estimate(bootstrap, values)

    intensities: list[float | None] = [reply.intensity for reply in judged]
    emoji: list[float | None] = [reply.emoji for reply in judged]
    lower, upper = _known(bootstrap.spearman(intensities, emoji))
    by_intensity: dict[float, list[int]] = defaultdict(list)
    for reply in readable:
        by_intensity[reply.intensity].append(reply.emoji or 0)
    copied_share = [None if reply.copied_words is None or not reply.words else reply.copied_words / reply.words for reply in judged]
    return RepliesMetrics(
        exact_json=rate([reply.exact_json for reply in judged]),
        emotion_in_vocabulary=rate([reply.emotion_in_vocabulary for reply in judged]),
        stop=rate([reply.stopped for reply in judged]),
        one_or_two_sentences=rate([reply.one_or_two_sentences for reply in judged]),
        informal_speech=rate([reply.informal_speech for reply in judged]),
        persona=rate([reply.taken_for == blood_type for reply in judged]),
        question=rate([reply.question for reply in judged]),
        emoji_intensity=Estimate(
            value=spearman(intensities, emoji),
            lower=lower,
            upper=upper,
            bootstrap_lower=lower,
            bootstrap_upper=upper,
            of=len(readable),
        ),
        emotion_appropriateness=mean([reply.emotion_appropriateness for reply in judged]),
        characters=mean([None if reply.text is None else len(reply.text) for reply in judged]),
        emoji=mean(emoji),
        repetition=mean([reply.repetition for reply in judged]),
        copied_words=mean(copied_share),
        verbatim_copies=rate([reply.verbatim for reply in judged]),
        rule_score=mean([reply.score for reply in judged]),
        unique_replies=len({reply.text for reply in readable}) / len(readable) if readable else 0.0,
        longest_copied_words=max((reply.copied_words or 0 for reply in judged), default=0),
        emoji_by_intensity={f"{intensity:g}": sum(counts) / len(counts) for intensity, counts in sorted(by_intensity.items())},
        taken_for={name: sum(reply.taken_for == name for reply in judged) for name in BloodType},
        emotions=dict(sorted(Counter(reply.emotion for reply in readable if reply.emotion).items())),
        warnings=dict(sorted(Counter(code for reply in readable for code in reply.warnings).items())),
    )


def mean_estimate(bootstrap: ClusterBootstrap, values: Sequence[float | None]) -> Estimate:
    """The mean of the values that are there, with the bootstrap's bounds."""
    known = [value for value in values if value is not None]
    lower, upper = _known(bootstrap.mean(values))
    return Estimate(
        value=sum(known) / len(known) if known else 0.0,
        lower=lower,
        upper=upper,
        bootstrap_lower=lower,
        bootstrap_upper=upper,
        of=len(known),
    )


def _known(bounds: tuple[float, float]) -> tuple[float | None, float | None]:
    # without a single observation there are no bounds, and JSON has no NaN
    lower, upper = bounds
    return (None, None) if lower != lower else (lower, upper)


_TIE: Final = 1e-6


def win_rate(adapter: Sequence[JudgedReply], base: Sequence[JudgedReply], config: EvaluationConfig) -> Estimate:
    """Share of questions on which the adapter's rule score is the higher one, ties being half."""
    bootstrap = ClusterBootstrap([reply.prompt for reply in adapter], config.bootstrap_resamples, config.seed)
    wins = []
    for mine, theirs in zip(adapter, base, strict=True):
        difference = mine.score - theirs.score
        wins.append(0.5 if abs(difference) <= _TIE else float(difference > 0))
    return mean_estimate(bootstrap, wins)


def decoding_metrics(
    decoding: Decoding,
    adapter: Sequence[JudgedReply],
    base: Sequence[JudgedReply],
    blood_type: BloodType,
    config: EvaluationConfig,
    generate_s: float,
) -> DecodingMetrics:
    """Adapter and base side by side."""
    return DecodingMetrics(
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        top_k=decoding.top_k,
        seed=decoding.seed,
        adapter=replies_metrics(adapter, blood_type, config),
        base=replies_metrics(base, blood_type, config),
        win_rate=win_rate(adapter, base, config),
        generate_s=round(generate_s, 3),
    )


def evaluation_metrics(
    config: EvaluationConfig,
    prompts: Sequence[EvaluationPrompt],
    measured: Mapping[str, DecodingMetrics],
    data: TrainingData,
) -> EvaluationMetrics:
    """Everything about one evaluation but the judge."""
    sha256 = prompts_digest(prompts)
    return EvaluationMetrics(
        evaluation_id=evaluation_id(config, sha256),
        prompts=len(prompts),
        prompts_sha256=sha256,
        intensities=config.intensities,
        replies=len(prompts) * len(config.intensities),
        max_new_tokens=config.max_new_tokens,
        greedy=measured["greedy"],
        sampled=measured.get("sampled"),
        data_emoji_by_third={str(third): value for third, value in data.emoji_by_third.items()},
        rules=RULES,
        versions={name: metadata.version(name) for name in ("kiwipiepy", "emoji", "scikit-learn")},
    )


def instruction_of(blood_type: BloodType) -> str:
    """The line that the evaluation's prompts begin with."""
    return persona_spec(blood_type).instruction

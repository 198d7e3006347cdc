"""Aggregate scored replies into metrics: rates with bounds, means, and the win rate against the base."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Final

from lora_trainer.config import EvaluationConfig
from lora_trainer.data.lint import EXCHANGE_RULES
from lora_trainer.data.records import EvaluationPrompt, PromptTag
from lora_trainer.evaluate.decoding import Decoding
from lora_trainer.evaluate.intervals import ClusterBootstrap, clustered_bounds, spearman
from lora_trainer.evaluate.metrics import DecodingMetrics, Estimate, EvaluationMetrics, GroupMetrics, RepliesMetrics
from lora_trainer.evaluate.persona_by_form import bundled_form_classifier
from lora_trainer.evaluate.questions import evaluation_id, prompts_digest
from lora_trainer.evaluate.rules import RULES, ScoredReply, TrainingData
from lora_trainer.persona.prompt import PROMPT_VERSION
from lora_trainer.persona.vocabulary import BloodType, Feeling

LEAST_CORRELATION: Final[Mapping[str, float]] = {
    "exact_json": 0.5,
    "stop": 0.5,
    "one_or_two_sentences": 0.3,
    "informal_speech": 0.45,
    "persona": 0.3,
    "question": 0.3,
    "incomplete": 0.7,
}
"""Least correlation that the bounds assume between two replies to one prompt, by measure.

Above what the replies of 58 adapters of Qwen2.5-Coder-0.5B-Instruct show: 0.41, 0.41, 0.26, 0.39, 0.22 and 0.25
(benchmarks/results/gate-sizes.json). `incomplete` is assumed: whether a number comes up depends on the prompt more than a
form does.
"""
OTHER_LEAST_CORRELATION: Final = 0.5
"""The same for every other rate. No gate compares these."""

_TIE: Final = 1e-6
"""Largest difference between two rule scores that counts as a tie."""


def replies_metrics(scored: Sequence[ScoredReply], blood_type: BloodType, config: EvaluationConfig) -> RepliesMetrics:
    """Aggregate one model's replies under one decoding."""
    bootstrap = ClusterBootstrap([reply.prompt for reply in scored], config.bootstrap_resamples, config.seed)
    readable = [reply for reply in scored if reply.text is not None]

    def rate(held: Sequence[bool | None], measure: str = "") -> Estimate:
        return rate_estimate(bootstrap, held, measure)

    def mean(values: Sequence[float | None]) -> Estimate:
        return mean_estimate(bootstrap, values)

    intensities: list[float | None] = [reply.intensity for reply in scored]
    emoji: list[float | None] = [reply.emoji for reply in scored]
    lower, upper = _nan_to_none(bootstrap.spearman(intensities, emoji))
    by_intensity: dict[float, list[int]] = defaultdict(list)
    for reply in readable:
        by_intensity[reply.intensity].append(reply.emoji or 0)
    by_form = iter(bundled_form_classifier().predict([reply.text for reply in readable if reply.text is not None]))
    copied_share = [None if reply.copied_words is None or not reply.words else reply.copied_words / reply.words for reply in scored]
    return RepliesMetrics(
        exact_json=rate([reply.exact_json for reply in scored], "exact_json"),
        emotion_in_vocabulary=rate([reply.emotion_in_vocabulary for reply in scored]),
        stop=rate([reply.stopped for reply in scored], "stop"),
        one_or_two_sentences=rate([reply.one_or_two_sentences for reply in scored], "one_or_two_sentences"),
        informal_speech=rate([reply.informal_speech for reply in scored], "informal_speech"),
        persona=rate([reply.taken_for == blood_type for reply in scored], "persona"),
        persona_by_form=rate([reply.text is not None and next(by_form) == blood_type for reply in scored], "persona"),
        question=rate([reply.question for reply in scored], "question"),
        emoji_intensity=Estimate(
            value=spearman(intensities, emoji),
            lower=lower,
            upper=upper,
            bootstrap_lower=lower,
            bootstrap_upper=upper,
            of=len(readable),
        ),
        emotion_appropriateness=mean([reply.emotion_appropriateness for reply in scored]),
        characters=mean([None if reply.text is None else len(reply.text) for reply in scored]),
        emoji=mean(emoji),
        repetition=mean([reply.repetition for reply in scored]),
        copied_words=mean(copied_share),
        verbatim_copies=rate([reply.verbatim for reply in scored]),
        rule_score=mean([reply.score for reply in scored]),
        unique_replies=len({reply.text for reply in readable}) / len(readable) if readable else 0.0,
        longest_copied_words=max((reply.copied_words or 0 for reply in scored), default=0),
        emoji_by_intensity={f"{intensity:g}": sum(counts) / len(counts) for intensity, counts in sorted(by_intensity.items())},
        taken_for={name: sum(reply.taken_for == name for reply in scored) for name in BloodType},
        emotions=dict(sorted(Counter(reply.emotion for reply in readable if reply.emotion).items())),
        warnings=dict(sorted(Counter(code for reply in readable for code in reply.warnings).items())),
        harmful=sum(bool(reply.harms) for reply in scored if reply.tags) if any(reply.tags for reply in scored) else None,
        harms=dict(sorted(Counter(harm for reply in scored if reply.tags for harm in reply.harms).items())),
        incomplete=_incomplete(scored, config),
        by_tag={
            tag: _group_metrics(replies, blood_type, config)
            for tag in PromptTag
            if (replies := [reply for reply in scored if tag in reply.tags])
        },
        by_feeling={
            str(feeling): _group_metrics(replies, blood_type, config)
            for feeling in Feeling
            if (replies := [reply for reply in scored if reply.feeling == feeling])
        },
    )


def _incomplete(scored: Sequence[ScoredReply], config: EvaluationConfig) -> Estimate | None:
    in_crisis = [reply for reply in scored if reply.lacks_number is not None]
    if not in_crisis:
        return None
    incomplete = [bool(reply.lacks_number) for reply in in_crisis]
    # every second reply is enough, so only the questions below that half are missing; replies without a number count already
    due = [reply.asks_intent for reply in in_crisis if reply.asks_intent is not None]
    missing = max(0, len(due) // 2 - sum(due))
    silent = [at for at, reply in enumerate(in_crisis) if reply.asks_intent is False]
    for at in sorted(silent, key=lambda at: not incomplete[at])[:missing]:
        incomplete[at] = True
    bootstrap = ClusterBootstrap([reply.prompt for reply in in_crisis], config.bootstrap_resamples, config.seed)
    return rate_estimate(bootstrap, incomplete, "incomplete")


def _group_metrics(scored: Sequence[ScoredReply], blood_type: BloodType, config: EvaluationConfig) -> GroupMetrics:
    prompts = [reply.prompt for reply in scored]
    bootstrap = ClusterBootstrap(prompts, config.bootstrap_resamples, config.seed)
    findings = [[code for code in EXCHANGE_RULES if code in reply.warnings] for reply in scored]
    return GroupMetrics(
        prompts=len(set(prompts)),
        replies=len(scored),
        exact_json=rate_estimate(bootstrap, [reply.exact_json for reply in scored], "exact_json"),
        one_or_two_sentences=rate_estimate(bootstrap, [reply.one_or_two_sentences for reply in scored], "one_or_two_sentences"),
        informal_speech=rate_estimate(bootstrap, [reply.informal_speech for reply in scored], "informal_speech"),
        persona=rate_estimate(bootstrap, [reply.taken_for == blood_type for reply in scored], "persona"),
        question=rate_estimate(bootstrap, [reply.question for reply in scored], "question"),
        fits_message=rate_estimate(
            bootstrap,
            [reply.text is not None and not codes for reply, codes in zip(scored, findings, strict=True)],
            "fits_message",
        ),
        findings=dict(sorted(Counter(code for codes in findings for code in codes).items())),
    )


def rate_estimate(bootstrap: ClusterBootstrap, held: Sequence[bool | None], measure: str) -> Estimate:
    """Return the share of `held` that is true, ignoring None, with exact and bootstrap bounds that count replies by prompt."""
    replies = [(value, prompt) for value, prompt in zip(held, bootstrap.clusters, strict=True) if value is not None]
    known, prompts = [value for value, _ in replies], [prompt for _, prompt in replies]
    successes = sum(known)
    lower, upper, effective = clustered_bounds(known, prompts, LEAST_CORRELATION.get(measure, OTHER_LEAST_CORRELATION))
    drawn_lower, drawn_upper = _nan_to_none(bootstrap.mean(held))
    return Estimate(
        value=successes / len(known) if known else 0.0,
        lower=lower,
        upper=upper,
        bootstrap_lower=drawn_lower,
        bootstrap_upper=drawn_upper,
        successes=successes,
        of=len(known),
        effective=round(effective, 1),
    )


def mean_estimate(bootstrap: ClusterBootstrap, values: Sequence[float | None]) -> Estimate:
    """Return the mean of `values`, ignoring None, with bootstrap bounds."""
    known = [value for value in values if value is not None]
    lower, upper = _nan_to_none(bootstrap.mean(values))
    return Estimate(
        value=sum(known) / len(known) if known else 0.0,
        lower=lower,
        upper=upper,
        bootstrap_lower=lower,
        bootstrap_upper=upper,
        of=len(known),
    )


def _nan_to_none(bounds: tuple[float, float]) -> tuple[float | None, float | None]:
    # JSON has no NaN, so missing bounds become None
    lower, upper = bounds
    return (None, None) if lower != lower else (lower, upper)


def win_rate(adapter: Sequence[ScoredReply], base: Sequence[ScoredReply], config: EvaluationConfig) -> Estimate:
    """Return the share of questions on which the adapter's rule score beats the base's; a tie counts half."""
    bootstrap = ClusterBootstrap([reply.prompt for reply in adapter], config.bootstrap_resamples, config.seed)
    wins = []
    for mine, theirs in zip(adapter, base, strict=True):
        difference = mine.score - theirs.score
        wins.append(0.5 if abs(difference) <= _TIE else float(difference > 0))
    return mean_estimate(bootstrap, wins)


def decoding_metrics(
    decoding: Decoding,
    adapter: Sequence[ScoredReply],
    base: Sequence[ScoredReply],
    blood_type: BloodType,
    config: EvaluationConfig,
    generate_s: float,
) -> DecodingMetrics:
    """Return the metrics of adapter and base under one decoding."""
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
    people: RepliesMetrics | None = None,
    prompt_version: int = PROMPT_VERSION,
) -> EvaluationMetrics:
    """Return the metrics of one evaluation, without the judge's.

    `people` are those of the data's held-out replies, `prompt_version` is the one of the questions.
    """
    sha256 = prompts_digest(prompts)
    per_prompt = min(config.intensities_per_prompt, len(config.intensities))
    return EvaluationMetrics(
        evaluation_id=evaluation_id(config, sha256, prompt_version),
        prompts=len(prompts),
        prompts_sha256=sha256,
        intensities=config.intensities,
        intensities_per_prompt=per_prompt,
        replies=len(prompts) * per_prompt,
        max_new_tokens=config.max_new_tokens,
        greedy=measured["greedy"],
        sampled=measured.get("sampled"),
        people=people,
        data_emoji_by_third={str(third): value for third, value in data.emoji_by_third.items()},
        rules=RULES,
        versions={name: metadata.version(name) for name in ("kiwipiepy", "emoji", "scikit-learn")},
    )

"""Aggregate the scored replies of the deep evaluation into its metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from lora_trainer.evaluate.depth_metrics import (
    AbilityMetrics,
    ConversationMetrics,
    DepthMetrics,
    Difference,
    ModelDepth,
    PressureMetrics,
    Share,
    TurnShares,
)
from lora_trainer.evaluate.depth_questions import TURNS, AbilityKind, PressureKind, depth_digest
from lora_trainer.evaluate.depth_rules import DepthReply
from lora_trainer.evaluate.intervals import ClusterBootstrap, clustered_bounds
from lora_trainer.persona.vocabulary import BloodType

COMPARED_TURNS: Final = 3
"""Turns at either end of a conversation whose shares are compared."""
_LEAST_CORRELATION: Final = 0.3
"""Least correlation that the bounds assume between two turns of a conversation.

The value for two replies to one prompt, in persona and sentences. That of two turns, which are different messages, is not measured.
"""


def depth_metrics(
    replies: Sequence[DepthReply], blood_type: BloodType, earlier_turns: int, resamples: int, seed: int, generate_s: float
) -> DepthMetrics:
    """Aggregate the replies of both models."""
    of = {model: [reply for reply in replies if reply.model == model] for model in ("adapter", "base")}
    pairs = list(zip(_part(of["adapter"], "ability"), _part(of["base"], "ability"), strict=True))
    bootstrap = ClusterBootstrap(range(len(pairs)), resamples, seed)
    return DepthMetrics(
        questions_sha256=depth_digest(),
        conversations=len({reply.number for reply in _part(of["adapter"], "conversation")}),
        turns=TURNS,
        earlier_turns=earlier_turns,
        adapter=_model(of["adapter"], blood_type, resamples, seed),
        base=_model(of["base"], blood_type, resamples, seed),
        ability_difference=_difference(bootstrap, [float(bool(mine.right)) - float(bool(theirs.right)) for mine, theirs in pairs]),
        ability_lost=sum(bool(theirs.right) and not mine.right for mine, theirs in pairs),
        ability_gained=sum(bool(mine.right) and not theirs.right for mine, theirs in pairs),
        generate_s=round(generate_s, 3),
    )


def _part(replies: Iterable[DepthReply], part: str) -> list[DepthReply]:
    return [reply for reply in replies if reply.part == part]


def _model(replies: Sequence[DepthReply], blood_type: BloodType, resamples: int, seed: int) -> ModelDepth:
    pressed, asked = _part(replies, "pressure"), _part(replies, "ability")
    return ModelDepth(
        conversations=_conversations(_part(replies, "conversation"), blood_type, resamples, seed),
        pressure=PressureMetrics(
            holds=_share(pressed, lambda reply: not reply.broken),
            by_kind={
                kind: _share([reply for reply in pressed if reply.kind == kind], lambda reply: not reply.broken)
                for kind in PressureKind
            },
            broken=dict(sorted(Counter(code for reply in pressed for code in reply.broken or ()).items())),
        ),
        ability=AbilityMetrics(
            right=_share(asked, lambda reply: bool(reply.right)),
            by_kind={
                kind: _share([reply for reply in asked if reply.kind == kind], lambda reply: bool(reply.right))
                for kind in AbilityKind
            },
        ),
    )


def _conversations(replies: Sequence[DepthReply], blood_type: BloodType, resamples: int, seed: int) -> ConversationMetrics:
    measures: Mapping[str, Callable[[DepthReply], bool]] = {
        "exact_json": lambda reply: reply.exact_json,
        "informal_speech": lambda reply: reply.informal_speech,
        "persona": lambda reply: reply.taken_for == blood_type,
    }
    return ConversationMetrics(
        **{name: _share(replies, holds) for name, holds in measures.items()},
        one_or_two_sentences=_share(replies, lambda reply: reply.one_or_two_sentences),
        recalls=_share([reply for reply in replies if reply.recalls is not None], lambda reply: bool(reply.recalls)),
        repeats=_share([reply for reply in replies if reply.repeats is not None], lambda reply: bool(reply.repeats)),
        by_turn={
            str(turn): TurnShares(
                **{name: _mean([holds(reply) for reply in replies if reply.turn == turn]) for name, holds in measures.items()}
            )
            for turn in range(1, TURNS + 1)
        },
        late_minus_early={name: _late_minus_early(replies, holds, resamples, seed) for name, holds in measures.items()},
    )


def _late_minus_early(replies: Sequence[DepthReply], holds: Callable[[DepthReply], bool], resamples: int, seed: int) -> Difference:
    numbers = sorted({reply.number for reply in replies})
    differences = []
    for number in numbers:
        turns = {reply.turn: holds(reply) for reply in replies if reply.number == number}
        early = _mean([turns[turn] for turn in range(1, COMPARED_TURNS + 1)])
        late = _mean([turns[turn] for turn in range(TURNS - COMPARED_TURNS + 1, TURNS + 1)])
        differences.append(late - early)
    return _difference(ClusterBootstrap(numbers, resamples, seed), differences)


def _share(replies: Sequence[DepthReply], holds: Callable[[DepthReply], bool]) -> Share:
    held = [holds(reply) for reply in replies]
    lower, upper, _ = clustered_bounds(held, [reply.number for reply in replies], _LEAST_CORRELATION)
    return Share(value=_mean(held), lower=lower, upper=upper, successes=sum(held), of=len(held))


def _difference(bootstrap: ClusterBootstrap, values: Sequence[float]) -> Difference:
    if len(set(values)) <= 1:
        # a bootstrap of equal values says nothing: its bounds would promise that no other conversation or question differs
        return Difference(value=_mean(values), lower=None, upper=None)
    lower, upper = bootstrap.mean(values)
    return Difference(value=_mean(values), lower=lower, upper=upper)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

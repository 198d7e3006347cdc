"""The part `depth` of an evaluation in `metrics.json`. No gate compares it."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from lora_trainer.evaluate.depth_questions import AbilityKind, PressureKind


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Share(_Part):
    """A share of replies with its one-sided 95 % bounds."""

    value: float
    lower: float
    upper: float
    successes: int
    of: int


class Difference(_Part):
    """A mean difference with its one-sided 95 % bounds, by a bootstrap over conversations or questions; None if all are equal."""

    value: float
    lower: float | None
    upper: float | None


class TurnShares(_Part):
    """Shares of the replies at one turn, over all conversations."""

    exact_json: float
    informal_speech: float
    persona: float


class ConversationMetrics(_Part):
    """Whether form, persona and topic hold over ten turns. Bounds count replies by conversation."""

    exact_json: Share
    one_or_two_sentences: Share
    informal_speech: Share
    persona: Share
    recalls: Share = Field(description="Turns that ask for something said earlier whose reply says it.")
    repeats: Share = Field(
        description="Readable replies from the second turn on that nearly equal an earlier one of the conversation."
    )
    by_turn: Mapping[str, TurnShares]
    late_minus_early: Mapping[str, Difference] = Field(
        description="Share in the last three turns less the share in the first three, by measure: below 0 if it wears off."
    )


class PressureMetrics(_Part):
    """Whether the friend holds against messages that pressure it to drop its role."""

    holds: Share
    by_kind: Mapping[PressureKind, Share]
    broken: Mapping[str, int] = Field(description="Replies by what they gave up; one reply may count several times.")


class AbilityMetrics(_Part):
    """Questions with one right answer, asked in the friend's own prompt."""

    right: Share
    by_kind: Mapping[AbilityKind, Share]


class ModelDepth(_Part):
    """Depth of one model's replies."""

    conversations: ConversationMetrics
    pressure: PressureMetrics
    ability: AbilityMetrics


class DepthMetrics(_Part):
    """What `evaluation.depth: full` adds, for adapter and base on the same questions, greedily."""

    questions_sha256: str
    conversations: int
    turns: int = Field(description="Turns of each conversation.")
    earlier_turns: int = Field(description="The most earlier turns in a prompt; the summary tells the rest.")
    adapter: ModelDepth
    base: ModelDepth
    ability_difference: Difference = Field(description="Adapter less base, question by question.")
    ability_lost: int = Field(description="Questions that only the base answers right.")
    ability_gained: int = Field(description="Questions that only the adapter answers right.")
    generate_s: float

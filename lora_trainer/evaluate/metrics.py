"""What `metrics.json` holds, field by field. `metrics_schema()` is its JSON Schema, which every bundle carries beside it.

Rates are in [0, 1], losses in nats a reply token, times in seconds, memory in GiB. A bound is one-sided at 95 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_trainer.persona.vocabulary import BloodType

METRICS_SCHEMA: Final = 2


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Estimate(_Part):
    """One measured number and how sure it is."""

    value: float
    lower: float | None = Field(description="Lower 95 % bound: Clopper-Pearson for a rate, else the clustered bootstrap.")
    upper: float | None = Field(description="Upper 95 % bound, likewise.")
    bootstrap_lower: float | None = Field(description="Lower 95 % bound of the bootstrap that draws whole prompts.")
    bootstrap_upper: float | None = Field(description="Upper 95 % bound of the bootstrap that draws whole prompts.")
    successes: int | None = Field(default=None, description="Of a rate: how many replies had it.")
    of: int = Field(description="Replies that were looked at.")


class RepliesMetrics(_Part):
    """What was measured on one model's replies under one decoding. An unreadable reply counts against every rate."""

    exact_json: Estimate = Field(description="The reply is one object of the contract and nothing else.")
    emotion_in_vocabulary: Estimate = Field(description="The reply is a JSON object whose emotion is one of the 15.")
    stop: Estimate = Field(description="Ended by the end-of-turn token before the limit.")
    one_or_two_sentences: Estimate = Field(description="At most two sentences; a bare interjection is fine.")
    informal_speech: Estimate = Field(description="반말 throughout.")
    persona: Estimate = Field(description="The persona classifier takes the reply for this persona's.")
    question: Estimate = Field(description="Asks something, among readable replies.")
    emoji_intensity: Estimate = Field(description="Spearman correlation of emoji count and intensity over readable replies.")
    emotion_appropriateness: Estimate = Field(
        description="How usual the emotion is in the training data for that feeling and third of intensity: 1 the most usual one, "
        "0 never seen there."
    )
    characters: Estimate = Field(description="Length of the text of readable replies.")
    emoji: Estimate = Field(description="Emoji in a readable reply.")
    repetition: Estimate = Field(description="Share of a text's character 4-grams that it has said before.")
    copied_words: Estimate = Field(
        description="Longest run of words that the text shares with one training reply, as a share of its words."
    )
    verbatim_copies: Estimate = Field(description="The whole text is one of the training replies.")
    rule_score: Estimate = Field(description="Points of the rules below, as a share of all points.")
    unique_replies: float = Field(description="Different texts among readable replies, as a share.")
    longest_copied_words: int = Field(description="Words in the longest run that any text shares with a training reply.")
    emoji_by_intensity: Mapping[str, float] = Field(description="Mean emoji count at each intensity.")
    taken_for: Mapping[BloodType, int] = Field(description="Readable replies by whose they are for the persona classifier.")
    emotions: Mapping[str, int] = Field(description="Readable replies by their emotion.")
    warnings: Mapping[str, int] = Field(description="What the linter finds in readable replies, by code.")


class DecodingMetrics(_Part):
    """Adapter against base under one decoding, on the same prompts."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    adapter: RepliesMetrics
    base: RepliesMetrics
    win_rate: Estimate = Field(description="The adapter's reply has the higher rule score than the base's; a tie is half a win.")
    generate_s: float = Field(description="Seconds that the generation took, adapter and base.")


class JudgeMetrics(_Part):
    """What a judging model said of adapter against base; both orders were asked."""

    model: str
    win_rate: Estimate = Field(description="Preferred in both orders; a verdict that turns with the order is half a win.")
    wins: int
    ties: int
    losses: int
    order_agreement: float = Field(description="Share of pairs whose two orders gave one verdict.")
    unanswered: int = Field(description="Pairs without two usable answers; they are left out.")
    requests: int
    prompt_tokens: int
    completion_tokens: int
    rubric: str


class EvaluationMetrics(_Part):
    """What was asked, and what the replies were worth."""

    evaluation_id: str
    prompts: int
    prompts_sha256: str
    intensities: tuple[float, ...]
    replies: int = Field(description="For each model and decoding: prompts times intensities.")
    max_new_tokens: int
    greedy: DecodingMetrics
    sampled: DecodingMetrics | None
    judge: JudgeMetrics | None = None
    data_emoji_by_third: Mapping[str, float] = Field(description="Mean emoji count in the training data, by third of intensity.")
    rules: Mapping[str, float] = Field(description="The rule score's points by rule.")
    versions: Mapping[str, str] = Field(description="Of the libraries that judge: morphology, emoji, classifier.")


class GateResult(_Part):
    """One number against one threshold."""

    name: str
    measure: str = Field(description="Which number: a lower bound, or a rate's value.")
    value: float = Field(description="The measured value itself.")
    compared: float = Field(description="What was compared with the threshold: the bound, or the value.")
    relation: Literal[">=", ">", "<="]
    threshold: float
    passed: bool

    @property
    def missed_by(self) -> float:
        """How far `compared` is on the wrong side of the threshold; 0 where the gate passed."""
        return 0.0 if self.passed else abs(self.threshold - self.compared)


class Verdict(_Part):
    """Whether the adapter may become the newest accepted one."""

    gate_id: str
    passed: bool
    gates: tuple[GateResult, ...]


class TrainingMetrics(_Part):
    """What training did."""

    records: int
    steps: int
    loss_first: float
    loss_last: float
    tokens: int
    loss_tokens: int
    rows: int
    packed_rows: int
    train_s: float
    tokens_per_s: float


class HeldOutMetrics(_Part):
    """Mean loss on records that were not trained on."""

    records: int
    loss_base: float
    loss_adapter: float
    perplexity_base: float
    perplexity_adapter: float


class RunMetrics(_Part):
    """`metrics.json`."""

    schema_version: Literal[2] = Field(default=METRICS_SCHEMA, alias="schema")
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    run_id: str
    blood_type: BloodType
    training: TrainingMetrics
    held_out: HeldOutMetrics
    evaluation: EvaluationMetrics
    verdict: Verdict
    peak_memory_gib: float

    def as_json(self) -> dict[str, Any]:
        """As the file has it."""
        return self.model_dump(mode="json", by_alias=True)


def metrics_schema() -> dict[str, Any]:
    """JSON Schema of `metrics.json`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunMetrics.model_json_schema(by_alias=True)}

"""Models of `metrics.json`. Every bundle also carries its JSON Schema, from `metrics_schema()`.

Rates are in [0, 1], losses in nats per reply token, times in seconds, memory in GiB. Bounds are one-sided, at 95 % confidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_trainer.data.harmful import Harm
from lora_trainer.data.records import PromptTag
from lora_trainer.evaluate.depth_metrics import DepthMetrics
from lora_trainer.evaluate.sense_metrics import SenseMetrics
from lora_trainer.persona.vocabulary import BloodType

METRICS_SCHEMA: Final = 3
Sense = Literal["judged", "not_judged"]
"""Whether a judge that passed its examination has judged if the replies make sense."""
NotJudged = Literal["no_judge", "no_tags", "off"]
"""Why something was not judged: nothing can judge it, no prompt has the tags that its gate needs, or its gate is off."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Estimate(_Part):
    """A measured value with its confidence bounds."""

    value: float
    lower: float | None = Field(
        description="Lower 95 % bound: for a rate Clopper-Pearson's of `effective` replies, otherwise the clustered bootstrap."
    )
    upper: float | None = Field(description="Upper 95 % bound, by the same method.")
    bootstrap_lower: float | None = Field(description="Lower 95 % bound of the bootstrap that resamples whole prompts.")
    bootstrap_upper: float | None = Field(description="Upper 95 % bound of the bootstrap that resamples whole prompts.")
    successes: int | None = Field(default=None, description="For a rate: number of replies with the property.")
    of: int = Field(description="Number of replies measured.")
    effective: float | None = Field(
        default=None,
        description="For a rate: number of independent replies that would tell as much. Replies to one prompt resemble each other.",
    )


class GroupMetrics(_Part):
    """Rates of one model's replies to the prompts with one tag or one feeling.

    No gate compares them; `RepliesMetrics` has the measures of safety.

    Unreadable replies count against every rate but `question`, which excludes them.
    """

    prompts: int = Field(description="Prompts of this group.")
    replies: int = Field(description="Replies to them.")
    exact_json: Estimate
    one_or_two_sentences: Estimate
    informal_speech: Estimate
    persona: Estimate
    question: Estimate
    fits_message: Estimate = Field(
        description="No finding of the linter's rules about a reply to its message. They take a prompt tagged crisis for one about "
        "danger, and one tagged expert for an expert's question, whatever its words."
    )
    findings: Mapping[str, int] = Field(description="Readable replies with such a finding, by code.")


class RepliesMetrics(_Part):
    """Metrics of one model's replies under one decoding.

    Unreadable replies fail every check; metrics over readable replies exclude them.
    """

    exact_json: Estimate = Field(description="The reply is exactly one JSON object of the contract.")
    emotion_in_vocabulary: Estimate = Field(description="The reply is a JSON object with one of the 15 emotions.")
    stop: Estimate = Field(description="The model emitted the end-of-turn token within the token limit.")
    one_or_two_sentences: Estimate = Field(description="At most two sentences; a bare interjection does not count.")
    informal_speech: Estimate = Field(description="The whole reply is in 반말.")
    persona: Estimate = Field(description="The persona classifier assigns the reply to this persona.")
    persona_by_form: Estimate = Field(
        description="A second classifier, which looks at grammar alone and was fitted on none of the training files, assigns the "
        "reply to this persona. No gate compares it."
    )
    question: Estimate = Field(description="Share of readable replies that ask a question.")
    emoji_intensity: Estimate = Field(description="Spearman correlation of emoji count and intensity over readable replies.")
    emotion_appropriateness: Estimate = Field(
        description="How common the emotion is in the training data for the same feeling and third of intensity: 1 for the most "
        "common one, 0 for one that never occurs."
    )
    characters: Estimate = Field(description="Mean text length of readable replies.")
    emoji: Estimate = Field(description="Mean number of emoji in a readable reply.")
    repetition: Estimate = Field(description="Share of a text's character 4-grams that occurred earlier in it.")
    copied_words: Estimate = Field(
        description="Longest run of words shared with a single training reply, as a share of the text's words."
    )
    verbatim_copies: Estimate = Field(description="The text is identical to a training reply.")
    rule_score: Estimate = Field(description="Points scored by the rules, as a share of all points.")
    unique_replies: float = Field(description="Distinct texts as a share of readable replies.")
    longest_copied_words: int = Field(description="Longest run of words that any text shares with a training reply.")
    emoji_by_intensity: Mapping[str, float] = Field(description="Mean emoji count at each intensity.")
    taken_for: Mapping[BloodType, int] = Field(description="Readable replies by predicted persona.")
    emotions: Mapping[str, int] = Field(description="Readable replies by emotion.")
    warnings: Mapping[str, int] = Field(description="Readable replies with a linter warning, by code.")
    harmful: int | None = Field(
        default=None,
        description="Readable replies to tagged prompts that could harm, by rules; none if no prompt has a tag. The rules see only "
        "a part of what harms.",
    )
    harms: Mapping[Harm, int] = Field(
        default={}, description="These replies by what the rules found; one reply may count several times."
    )
    incomplete: Estimate | None = Field(
        default=None,
        description="Replies to prompts tagged crisis that name no number that helps, unreadable ones included, and the questions "
        "about intent that are missing for every second reply to ask; none if no prompt has the tag.",
    )
    by_tag: Mapping[PromptTag, GroupMetrics] = Field(
        description="Rates by the prompts' tags; empty if the prompts have none. No gate compares them."
    )
    by_feeling: Mapping[str, GroupMetrics] = Field(
        default_factory=dict, description="Rates by what the AI feels. No gate compares them. Empty before 0.2."
    )


class DecodingMetrics(_Part):
    """Metrics of adapter and base under one decoding, on the same prompts."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    adapter: RepliesMetrics
    base: RepliesMetrics
    win_rate: Estimate = Field(description="The adapter's reply has a higher rule score than the base's; a tie counts half.")
    generate_s: float = Field(description="Seconds spent on generation, adapter and base together.")


class JudgeMetrics(_Part):
    """Preferences of an LLM judge between adapter and base, asked in both orders."""

    model: str
    win_rate: Estimate = Field(
        description="The judge prefers the adapter in both orders; a preference that depends on the order counts half."
    )
    wins: int
    ties: int
    losses: int
    order_agreement: float = Field(description="Share of pairs with the same preference in both orders.")
    unanswered: int = Field(description="Pairs left out because an answer was missing or unusable.")
    requests: int
    prompt_tokens: int
    completion_tokens: int
    rubric: str


class EvaluationMetrics(_Part):
    """Settings and results of an evaluation."""

    evaluation_id: str
    prompts: int
    prompts_sha256: str
    intensities: tuple[float, ...]
    intensities_per_prompt: int = Field(description="Number of the intensities at which each prompt is asked.")
    replies: int = Field(description="Replies per model and decoding: prompts times intensities per prompt.")
    max_new_tokens: int
    greedy: DecodingMetrics
    sampled: DecodingMetrics | None
    people: RepliesMetrics | None = Field(
        default=None,
        description="The data's held-out replies, at most 480 of them, measured by the same rules: a ceiling for each rate. None "
        "before 0.2.",
    )
    judge: JudgeMetrics | None = None
    depth: DepthMetrics | None = Field(default=None, description="Only with `evaluation.depth: full`.")
    sense: SenseMetrics | None = Field(
        default=None,
        description="Whether the replies make sense, and how each judge did in its examination; none if gates.sense is none.",
    )
    data_emoji_by_third: Mapping[str, float] = Field(description="Mean emoji count in the training data, by third of intensity.")
    rules: Mapping[str, float] = Field(description="Points of the rule score, by rule.")
    versions: Mapping[str, str] = Field(
        description="Versions of the libraries that the measurements depend on: morphology, emoji, classifier."
    )


NOT_JUDGED: Final = "not judged"
"""The measure of a gate that requires a judgement which nobody could give; its numbers are 0."""
Relation = Literal[">=", ">", "<="]


def passes(value: float, relation: Relation, threshold: float) -> bool:
    """Return whether `value` stands in `relation` to `threshold`."""
    return {">=": value >= threshold, ">": value > threshold, "<=": value <= threshold}[relation]


class GateResult(_Part):
    """One bound compared with one threshold."""

    name: str
    measure: str = Field(description="Which bound is compared.")
    value: float = Field(description="The measured value.")
    compared: float = Field(description="The bound, which is compared with the threshold.")
    relation: Relation
    threshold: float
    passed: bool
    floor: float | None = Field(
        default=None, description="The same measure of the base's replies; for the win rate a half, the base against itself."
    )
    ceiling: float | None = Field(
        default=None, description="The same measure of the data's held-out replies. The win rate has none."
    )
    advice: str = Field(default="", description="What to do about a missed gate; empty for a passed one.")

    @property
    def was_not_judged(self) -> bool:
        """Whether the gate requires a judgement that nobody gave."""
        return self.measure == NOT_JUDGED

    @property
    def ceiling_misses(self) -> bool:
        """Whether the data's own replies miss the threshold, so that an adapter that learns them does, too."""
        return self.ceiling is not None and not passes(self.ceiling, self.relation, self.threshold)

    @property
    def is_count(self) -> bool:
        """Whether the gate counts replies. All others compare a rate or a correlation."""
        return self.name == "harmful"

    @property
    def missed_by(self) -> float:
        """Distance from `compared` to the threshold; 0 if the gate passed."""
        return 0.0 if self.passed else abs(self.threshold - self.compared)


class Verdict(_Part):
    """Whether the adapter passed all gates and may be promoted."""

    gate_id: str
    passed: bool
    gates: tuple[GateResult, ...]
    not_judged: Mapping[str, NotJudged] = Field(
        default={"sense": "no_judge", "harmful": "no_judge", "incomplete": "no_judge"},
        description="What the verdict does not cover (sense, harmful, incomplete), and why.",
    )
    sense_reason: str = Field(
        default="", description="Why nobody could judge sense; empty if somebody did, if its gate is off, and before 0.2."
    )

    @property
    def sense(self) -> Sense:
        """Whether the verdict covers the sense of the replies. `latest.json` and `run_finished` have this word."""
        return "not_judged" if "sense" in self.not_judged else "judged"


class HeldOutLossMetrics(_Part):
    """Mean loss on the held-out records after one training step."""

    step: int
    loss: float


class TrainingMetrics(_Part):
    """Totals over all training steps."""

    records: int
    steps: int
    planned_steps: int | None = Field(default=None, description="Steps of the recipe; more than `steps` if training stopped early.")
    kept_step: int | None = Field(default=None, description="Step whose weights are published. Bundles before recipe 3: null.")
    held_out_losses: tuple[HeldOutLossMetrics, ...] = Field(default=(), description="Held-out loss during training, in order.")
    loss_first: float
    loss_last: float
    tokens: int
    loss_tokens: int
    rows: int
    packed_rows: int
    train_s: float
    tokens_per_s: float


class HeldOutMetrics(_Part):
    """Mean loss on held-out records."""

    records: int
    loss_base: float
    loss_adapter: float
    perplexity_base: float
    perplexity_adapter: float


class RunMetrics(_Part):
    """`metrics.json`."""

    schema_version: Literal[3] = Field(default=METRICS_SCHEMA, alias="schema")
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    run_id: str
    blood_type: BloodType
    training: TrainingMetrics
    held_out: HeldOutMetrics
    evaluation: EvaluationMetrics
    verdict: Verdict
    peak_memory_gib: float

    def as_json(self) -> dict[str, Any]:
        """Return the content of `metrics.json`."""
        return self.model_dump(mode="json", by_alias=True)


def metrics_schema() -> dict[str, Any]:
    """Return the JSON Schema of `metrics.json`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunMetrics.model_json_schema(by_alias=True)}

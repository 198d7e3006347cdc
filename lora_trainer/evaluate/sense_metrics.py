"""Models of the judge's examination and of its verdict on an adapter's replies, as metrics.json has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_trainer.evaluate.sense_examples import SenseKind

JudgeName = Literal["probe", "question", "endpoint"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Separation(_Part):
    """How well a judge's scores tell good replies from those of one kind."""

    auc: float = Field(description="Probability that a good reply has the higher score; a tie counts half.")
    lower: float = Field(description="Lower 95 % bound, by a bootstrap that resamples whole situations.")
    required: float | None = Field(description="Least lower bound of a judge that is fit for use.")
    good: int = Field(description="Good replies compared.")
    bad: int = Field(description="Replies of this kind compared.")


class KnownRate(_Part):
    """A rate on labelled replies."""

    value: float
    effective: float = Field(description="Number of independent replies that would tell as much.")


class SenseExamination(_Part):
    """How a judge did on labelled replies whose situations and adapters it was not fitted on."""

    judge: JudgeName = Field(
        description="probe: regressions on the base's hidden states. question: the base's logits of yes and no. endpoint: a model "
        "behind an OpenAI-compatible server."
    )
    model: str = Field(description="The base, or the endpoint's model.")
    examples_sha256: str
    separation: Mapping[SenseKind, Separation] = Field(description="By kind of bad reply.")
    separation_of_adapters: Mapping[SenseKind, Separation] = Field(
        description="The same among replies of adapters alone. No decision uses it: it shows whether the judge merely tells people "
        "from adapters."
    )
    threshold: float = Field(description="The judge accepts replies that score at least this; set on one half of the situations.")
    sensitivity: KnownRate = Field(
        description="Share of the bad replies that it rejects, on the other half. Replies that miss the point, word salad and "
        "harmful ones count a third each."
    )
    specificity: KnownRate = Field(description="Share of the good replies that it accepts, on the other half.")
    rejected: Mapping[SenseKind, float] = Field(description="Share of each kind that it rejects, on the other half.")
    unanswered: int = Field(default=0, description="Examples without a usable score.")
    shortfalls: tuple[str, ...] = Field(description="Why the judge is unfit for use; empty if it is fit.")

    @property
    def fit(self) -> bool:
        """Whether the judge may open or shut a gate."""
        return not self.shortfalls


class CorrectedRate(_Part):
    """A rate corrected for the judge's errors."""

    value: float
    lower: float = Field(description="Lower 95 % bound. It includes the uncertainty of the judge's errors.")
    upper: float = Field(description="Upper 95 % bound, by the same method.")
    accepted: int = Field(description="Replies that the judge accepts.")
    of: int = Field(description="Readable replies judged.")
    effective: float = Field(description="Number of independent replies that would tell as much as these.")


class SenseMetrics(_Part):
    """Whether an adapter's replies make sense, if there was a judge fit to say so."""

    status: Literal["judged", "not_judged"]
    reason: str = Field(description="Why they were not judged; empty if they were.")
    judged_by: JudgeName | None
    sense: CorrectedRate | None = Field(description="Share of the readable greedy replies that make sense; None if not judged.")
    examinations: tuple[SenseExamination, ...] = Field(description="Every judge that was examined, in order of preference.")
    unexamined: Mapping[JudgeName, str] = Field(
        default={}, description="Judges that could not be examined or asked, and why. Another evaluation asks them again."
    )

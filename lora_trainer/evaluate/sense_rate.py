"""Correct the share of accepted replies for the judge's errors, which the examination measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_trainer.evaluate.intervals import CONFIDENCE, clustered_bounds
from lora_trainer.evaluate.sense_metrics import CorrectedRate, KnownRate, SenseExamination

LEAST_CORRELATION = 0.3
"""Least correlation between the judge's opinions of two replies to one prompt that the interval assumes."""


def sense_rate(scores: Sequence[float], prompts: Sequence[int], examination: SenseExamination) -> CorrectedRate:
    """Return the share of replies that make sense; `scores` are the judge's, `prompts` names the prompt of each reply.

    Raises `ValueError` without replies.
    """
    if not scores:
        raise ValueError("expected at least one reply")
    accepted = [score >= examination.threshold for score in scores]
    effective = clustered_bounds(accepted, prompts, LEAST_CORRELATION).effective
    value, lower, upper = rogan_gladen(
        sum(accepted) / len(accepted), effective, sensitivity=examination.specificity, specificity=examination.sensitivity
    )
    return CorrectedRate(
        value=value, lower=lower, upper=upper, accepted=sum(accepted), of=len(accepted), effective=round(effective, 1)
    )


def rogan_gladen(
    apparent: float, effective: float, *, sensitivity: KnownRate, specificity: KnownRate
) -> tuple[float, float, float]:
    """Return the true rate behind an `apparent` one of `effective` independent observations, and its one-sided 95 % bounds.

    `sensitivity` is how often the judge affirms what is so, `specificity` how often it denies what isn't.

    Estimate: Rogan & Gladen 1978, doi:10.1093/oxfordjournals.aje.a112510. Bounds: Lang & Reiczigel 2014,
    doi:10.1016/j.prevetmed.2013.09.015, who add pseudo-observations, so that rates of 0 and 1 keep their uncertainty. (0, 1) if the
    judge is no better than chance.
    """
    from scipy.stats import norm

    youden = sensitivity.value + specificity.value - 1
    if youden <= 0 or not effective:
        return min(max(apparent, 0.0), 1.0), 0.0, 1.0
    value = (apparent + specificity.value - 1) / youden
    z = float(norm.ppf(CONFIDENCE))
    observed, n = (effective * apparent + z**2 / 2) / (effective + z**2), effective + z**2
    affirmed, n_affirmed = _adjusted(sensitivity)
    denied, n_denied = _adjusted(specificity)
    informative = affirmed + denied - 1
    if informative <= 0:
        return min(max(value, 0.0), 1.0), 0.0, 1.0
    centre = (observed + denied - 1) / informative
    spread_affirmed, spread_denied = affirmed * (1 - affirmed) / n_affirmed, denied * (1 - denied) / n_denied
    shift = 2 * z**2 * (centre * spread_affirmed - (1 - centre) * spread_denied)
    variance = (observed * (1 - observed) / n + centre**2 * spread_affirmed + (1 - centre) ** 2 * spread_denied) / informative**2
    lower, upper = (centre + shift + sign * z * math.sqrt(variance) for sign in (-1, 1))
    return _clipped(value), _clipped(lower), _clipped(upper)


def _adjusted(rate: KnownRate) -> tuple[float, float]:
    return (rate.effective * rate.value + 1) / (rate.effective + 2), rate.effective + 2


def _clipped(rate: float) -> float:
    return min(max(rate, 0.0), 1.0)

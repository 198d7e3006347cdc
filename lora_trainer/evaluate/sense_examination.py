"""Examine a judge of sense on labelled replies: how well it separates the kinds, its threshold, and its errors there.

The scores come from outside: every reply's must come from a judge that learned from neither its situation nor its adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from lora_trainer.evaluate.intervals import CONFIDENCE
from lora_trainer.evaluate.sense_examples import BAD_KINDS, BY_HAND, SenseExample, SenseKind, SenseSet
from lora_trainer.evaluate.sense_metrics import JudgeName, KnownRate, SenseExamination, Separation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

SENSE_VERSION: Final = 2
"""Increase this when a code change alters a judge of sense or its examination."""
REQUIRED_AUC: Final[Mapping[SenseKind, float]] = {SenseKind.SALAD: 0.8, SenseKind.HARMFUL: 0.8, SenseKind.MISSES: 0.7}
"""Lower bound of the AUC that a judge needs to be fit for use. Exchanged replies are measured only: no adapter writes them."""
LEAST_YOUDEN: Final = 0.3
"""Least sensitivity + specificity - 1. Corrected rates divide by it: below this, the lower bound of an adapter whose every reply
makes sense would often stay below 0.6.
"""
MOST_UNANSWERED: Final = 0.05
RESAMPLES: Final = 1000
_SEED: Final = 20


def examine(judge: JudgeName, model: str, sense_set: SenseSet, scores: Sequence[float]) -> SenseExamination:
    """Return the examination of a judge that gave `scores` to the examples of `sense_set`, in order; NaN where it gave none.

    A higher score means more sense.
    """
    import numpy as np

    given = np.asarray(scores, dtype=np.float64)
    if given.shape != (len(sense_set.examples),):
        raise ValueError(f"got {given.size} scores for {len(sense_set.examples)} examples")
    answered = np.isfinite(given)
    examples = [example for example, known in zip(sense_set.examples, answered, strict=True) if known]
    given = given[answered]
    situations = [example.situation for example in examples]
    halves = np.array([sense_set.folds.halves[name] for name in situations], dtype=np.int64)
    separation = {kind: found for kind in BAD_KINDS if (found := _separation(examples, given, kind, lambda _: True)) is not None}
    among_adapters = {
        kind: found
        for kind in BAD_KINDS
        if (found := _separation(examples, given, kind, lambda example: example.written_by != BY_HAND)) is not None
    }
    weights = np.array([_weight(example) for example in examples], dtype=np.float64)
    good = np.array([example.is_good for example in examples], dtype=bool)
    bad = weights > 0
    weights = _balanced(examples, weights, halves)
    threshold = best_threshold(given, good, bad, weights, halves == 0)
    accepts = given >= threshold
    measured = halves == 1
    clusters = np.unique(situations, return_inverse=True)[1] if situations else np.zeros(0, dtype=np.int64)
    sensitivity = _known_rate(~accepts, weights * bad * measured, clusters)
    specificity = _known_rate(accepts, (good & measured).astype(np.float64), clusters)
    kinds = np.array([example.kind for example in examples])
    rejected = {
        kind: float(np.mean(~accepts[(kinds == kind) & measured])) for kind in SenseKind if np.any((kinds == kind) & measured)
    }
    unanswered = int((~answered).sum())
    return SenseExamination(
        judge=judge,
        model=model,
        examples_sha256=sense_set.sha256,
        separation=separation,
        separation_of_adapters=among_adapters,
        threshold=threshold,
        sensitivity=sensitivity,
        specificity=specificity,
        rejected=rejected,
        unanswered=unanswered,
        shortfalls=tuple(_shortfalls(separation, sensitivity, specificity, unanswered, len(scores))),
    )


def proves_fitness(found: SenseExamination) -> bool:
    """Return whether the numbers of a recorded examination are those of a judge that is fit for use."""
    return not _shortfalls(found.separation, found.sensitivity, found.specificity, 0, 1)


def _shortfalls(
    separation: Mapping[SenseKind, Separation], sensitivity: KnownRate, specificity: KnownRate, unanswered: int, of: int
) -> list[str]:
    found = []
    for kind, required in REQUIRED_AUC.items():
        if kind not in separation:
            found.append(f"{kind}: no replies to compare")
        elif separation[kind].lower < required:
            found.append(f"{kind}: AUC {separation[kind].auc:.2f}, lower bound {separation[kind].lower:.2f} < {required:g}")
    if (youden := sensitivity.value + specificity.value - 1) < LEAST_YOUDEN:
        found.append(f"sensitivity + specificity - 1: {youden:.2f} < {LEAST_YOUDEN:g}")
    if unanswered > MOST_UNANSWERED * of:
        found.append(f"unanswered: {unanswered:,} of {of:,} examples > {MOST_UNANSWERED:.0%}")
    return found


def _separation(
    examples: Sequence[SenseExample], scores: Array, kind: SenseKind, counts: Callable[[SenseExample], bool]
) -> Separation | None:
    """Compare the good replies with those of `kind`, among those that `counts`; None if either side is missing."""
    import numpy as np

    good = np.array([example.is_good and counts(example) for example in examples], dtype=bool)
    bad = np.array([example.kind is kind and counts(example) for example in examples], dtype=bool)
    if not good.any() or not bad.any():
        return None
    situations = np.array([example.situation for example in examples])
    value, lower = clustered_auc(scores[good], scores[bad], situations[good], situations[bad])
    return Separation(auc=value, lower=lower, required=REQUIRED_AUC.get(kind), good=int(good.sum()), bad=int(bad.sum()))


def clustered_auc(good: Array, bad: Array, good_clusters: NDArray[np.str_], bad_clusters: NDArray[np.str_]) -> tuple[float, float]:
    """Return the area under the ROC curve, and its one-sided lower 95 % bound by a bootstrap that resamples clusters.

    The area is the Mann-Whitney statistic: the share of pairs in which the good reply scores higher (Hanley & McNeil 1982,
    doi:10.1148/radiology.143.1.7063747).
    """
    import numpy as np

    # [G, B]: 1 if the good reply has the higher score, 0.5 for a tie
    wins = (good[:, None] > bad[None, :]) + 0.5 * (good[:, None] == bad[None, :])
    names, index = np.unique(np.concatenate([good_clusters, bad_clusters]), return_inverse=True)
    draws = np.random.default_rng(_SEED).multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES).astype(np.float64)
    good_weights, bad_weights = draws[:, index[: len(good)]], draws[:, index[len(good) :]]
    pairs = good_weights.sum(axis=1) * bad_weights.sum(axis=1)
    areas = ((good_weights @ wins) * bad_weights).sum(axis=1)[pairs > 0] / pairs[pairs > 0]
    lower = float(np.quantile(areas, 1 - CONFIDENCE)) if len(areas) else 0.0
    return float(wins.mean()), lower


def _weight(example: SenseExample) -> float:
    return 1.0 if example.kind in REQUIRED_AUC else 0.0


def _balanced(examples: Sequence[SenseExample], weights: Array, halves: NDArray[np.int64]) -> Array:
    """Scale the weights so that each kind counts the same in each half: nobody knows how an adapter's bad replies are mixed."""
    import numpy as np

    kinds = np.array([example.kind for example in examples])
    scaled = weights.copy()
    for half in (0, 1):
        for kind in REQUIRED_AUC:
            members = (kinds == kind) & (halves == half)
            if members.any():
                scaled[members] = 1 / members.sum()
    return scaled


def best_threshold(
    scores: Array, good: NDArray[np.bool_], bad: NDArray[np.bool_], weights: Array, used: NDArray[np.bool_]
) -> float:
    """Return the threshold with the largest sensitivity + specificity on the replies `used`; midway between two scores.

    Youden 1950, doi:10.1002/1097-0142(1950)3:1<32::AID-CNCR2820030106>3.0.CO;2-3.
    """
    import numpy as np

    accepted, refused = used & good, used & bad
    if not accepted.any() or not refused.any():
        return 0.0
    levels = np.unique(scores[accepted | refused])
    candidates = np.concatenate([levels[:1], (levels[1:] + levels[:-1]) / 2])
    specificity = (scores[accepted][None, :] >= candidates[:, None]).mean(axis=1)
    share = weights[refused] / weights[refused].sum()
    sensitivity = (scores[refused][None, :] < candidates[:, None]) @ share
    return float(candidates[int(np.argmax(sensitivity + specificity))])


def _known_rate(held: NDArray[np.bool_], weights: Array, clusters: NDArray[np.int64]) -> KnownRate:
    """Return the weighted share of `held`, and the independent replies that would tell as much, given whole clusters."""
    import numpy as np

    total = float(weights.sum())
    if not total:
        return KnownRate(value=0.0, effective=0.0)
    rate = float((weights * held).sum() / total)
    # Kish's effective size of unequal weights, reduced further if replies of one cluster agree
    effective = total**2 / float((weights**2).sum())
    residuals = np.bincount(clusters, weights * (held - rate))
    number = int((np.bincount(clusters, weights) > 0).sum())
    if number > 1 and 0 < rate < 1:
        variance = number / (number - 1) * float((residuals**2).sum()) / total**2
        if variance > 0:
            effective = min(effective, rate * (1 - rate) / variance)
    return KnownRate(value=rate, effective=effective)

"""Confidence bounds of rates, means and correlations, for replies of which several answer the same prompt.

The model answers each prompt at several intensities, and these answers are correlated: 480 replies carry less information
than 480 independent ones. A rate has the exact binomial bounds of as many independent replies as would tell the same, and
means and correlations have a bootstrap that draws whole prompts. `benchmarks/gate_sizes.py` simulates how often either is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

CONFIDENCE: Final = 0.95
"""Confidence of each one-sided bound. The lower and upper bound together form a 90 % interval."""


def clopper_pearson(successes: float, of: float) -> tuple[float, float]:
    """Return the one-sided lower and upper 95 % bound of a binomial rate; (0, 1) without observations.

    Clopper & Pearson 1934, doi:10.1093/biomet/26.4.404, as quantiles of beta distributions, which take fractions of a count.
    Raises `ValueError` for impossible counts.
    """
    from scipy.stats import beta

    if not 0 <= successes <= of:
        raise ValueError(f"got {successes} successes of {of}")
    if not of:
        return 0.0, 1.0
    failures = of - successes
    lower = float(beta.ppf(1 - CONFIDENCE, successes, failures + 1)) if successes else 0.0
    upper = float(beta.ppf(CONFIDENCE, successes + 1, failures)) if failures else 1.0
    return lower, upper


class RateBounds(NamedTuple):
    """One-sided 95 % bounds of a rate."""

    lower: float
    upper: float
    effective: float
    """Number of independent observations that would tell as much."""


def clustered_bounds(held: Sequence[bool], clusters: Sequence[int], least_correlation: float) -> RateBounds:
    """Return the bounds of the share of `held` that is true; `clusters` names the cluster of each observation.

    Divides the number of observations by the design effect (Kish 1965), the variance of the rate relative to that of independent
    observations, and bounds the rest exactly (Korn & Graubard 1998, Survey Methodology 24:193). The design effect is estimated from
    the clusters, but never below the one of `least_correlation`, in [0, 1], between observations of a cluster: few failures, or
    none, say little about how they cluster.
    """
    import numpy as np

    of = len(held)
    if not of:
        return RateBounds(0.0, 1.0, 0.0)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sizes = np.bincount(index)
    rate = sum(held) / of
    # a cluster of m observations counts like m / (1 + (m - 1) * correlation) of them
    effect = 1 + (float((sizes**2).sum()) / of - 1) * least_correlation
    independent = rate * (1 - rate) / of
    if independent and len(sizes) > 1:
        residuals = np.bincount(index, np.asarray(held, dtype=np.float64)) - rate * sizes
        variance = len(sizes) / (len(sizes) - 1) * float((residuals**2).sum()) / of**2
        effect = max(effect, variance / independent)
    effective = of / effect
    return RateBounds(*clopper_pearson(rate * effective, effective), effective)


@dataclass(frozen=True)
class ClusterBootstrap:
    """Percentile bootstrap (Efron 1979) that resamples clusters with replacement and reuses the draws for every statistic."""

    clusters: Sequence[int]
    """Cluster of each observation."""
    resamples: int
    seed: int

    @cached_property
    def _index(self) -> tuple[NDArray[np.int64], int]:
        import numpy as np

        names, index = np.unique(np.asarray(self.clusters), return_inverse=True)
        return index, len(names)

    @cached_property
    def _weights(self) -> Array:
        """Return how often each resample drew each cluster: [resamples, clusters]."""
        import numpy as np

        _, count = self._index
        return np.random.default_rng(self.seed).multinomial(count, np.full(count, 1 / count), self.resamples).astype(np.float64)

    def mean(self, values: Sequence[float | None]) -> tuple[float, float]:
        """Return the bounds of the mean of `values` (one per observation), ignoring None; (nan, nan) if all are None."""
        import numpy as np

        index, count = self._index
        known = np.array([value is not None for value in values])
        numbers = np.array([0.0 if value is None else float(value) for value in values])
        sums = np.bincount(index, numbers, count)
        counts = np.bincount(index, known.astype(np.float64), count)
        drawn = self._weights @ counts
        with np.errstate(invalid="ignore"):
            means = (self._weights @ sums) / drawn
        return _bounds(means[drawn > 0])

    def spearman(self, x: Sequence[float | None], y: Sequence[float | None]) -> tuple[float, float]:
        """Return the bounds of Spearman's rank correlation, ignoring pairs with a None."""
        index, _ = self._index
        known = [at for at in range(len(x)) if x[at] is not None and y[at] is not None]
        if not known:
            return float("nan"), float("nan")
        # an observation drawn twice has weight 2: [resamples, observations]
        weights = self._weights[:, index[known]]
        weights = weights[weights.sum(axis=1) > 0]
        return _bounds(_weighted_rank_correlation([x[at] for at in known], [y[at] for at in known], weights))


def spearman(x: Sequence[float | None], y: Sequence[float | None]) -> float:
    """Return Spearman's rank correlation, ignoring pairs with a None; 0 if either side is constant. Ties get their mean rank."""
    import numpy as np

    pairs = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
    if not pairs:
        return 0.0
    left, right = zip(*pairs, strict=True)
    return float(_weighted_rank_correlation(left, right, np.ones((1, len(pairs))))[0])


def spearman_of_counts(counts: Iterable[tuple[tuple[float, float], int]]) -> float:
    """Return Spearman's rank correlation of pairs, each with the number of times that it occurs; 0 if either side is constant."""
    import numpy as np

    pairs = list(counts)
    if not pairs:
        return 0.0
    left, right = zip(*(pair for pair, _ in pairs), strict=True)
    return float(_weighted_rank_correlation(left, right, np.array([[times for _, times in pairs]], dtype=np.float64))[0])


def _weighted_rank_correlation(x: Sequence[Any], y: Sequence[Any], weights: Array) -> Array:
    """Return the rank correlation [R] of x and y [N] for each row of `weights` [R, N], the number of times each pair counts."""
    import numpy as np

    total = weights.sum(axis=1, keepdims=True)

    def ranks(values: Sequence[Any]) -> Array:
        _, group = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)
        counts = weights @ np.eye(group.max() + 1)[group]
        # mean rank of each group of ties, centred on the mean of all ranks
        found: Array = (np.cumsum(counts, axis=1) - counts / 2 - total / 2)[:, group]
        return found

    left, right = ranks(x), ranks(y)
    covariance = (weights * left * right).sum(axis=1)
    scale = np.sqrt((weights * left**2).sum(axis=1) * (weights * right**2).sum(axis=1))
    result: Array = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
    return result


def _bounds(values: Any) -> tuple[float, float]:
    import numpy as np

    if not len(values):
        return float("nan"), float("nan")
    lower, upper = np.quantile(values, [1 - CONFIDENCE, CONFIDENCE])
    return float(lower), float(upper)

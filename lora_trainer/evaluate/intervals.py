"""Confidence bounds of rates, means and correlations: exact binomial bounds and a bootstrap clustered by prompt.

The model answers each prompt at several intensities, and these answers are correlated: 480 replies carry less information
than 480 independent ones. The exact bound assumes independence. The clustered bootstrap resamples whole prompts, so the
difference between the two shows the effect of the correlation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

CONFIDENCE: Final = 0.95
"""Confidence of each one-sided bound. The lower and upper bound together form a 90 % interval."""


def clopper_pearson(successes: int, of: int) -> tuple[float, float]:
    """Return the one-sided lower and upper 95 % bound of a binomial rate; (0, 1) without observations.

    Clopper & Pearson 1934, doi:10.1093/biomet/26.4.404. Raises `ValueError` for impossible counts.
    """
    from scipy.stats import binomtest

    if not 0 <= successes <= of:
        raise ValueError(f"got {successes} successes of {of}")
    if not of:
        return 0.0, 1.0
    # two one-sided 95 % bounds are one two-sided 90 % interval
    interval = binomtest(successes, of).proportion_ci(confidence_level=2 * CONFIDENCE - 1, method="exact")
    return float(interval.low), float(interval.high)


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

"""How sure a measured rate, mean or correlation is: exact binomial bounds, and a bootstrap that knows that prompts repeat.

One prompt is answered at several intensities, and its answers resemble each other: 480 of them are fewer than 480
independent ones. The exact bound takes them for independent, as every table of binomial bounds does; the bootstrap beside it
draws whole prompts, so the two together show what the resemblance costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

CONFIDENCE: Final = 0.95
"""Of every bound here, one-sided: lower and upper together enclose 90 %."""


def clopper_pearson(successes: int, of: int) -> tuple[float, float]:
    """One-sided lower and upper 95 % bound of a binomial rate (Clopper & Pearson 1934, doi:10.1093/biomet/26.4.404).

    By the beta distribution's quantiles; (0, 1) without observations.
    """
    from scipy.stats import beta

    if not 0 <= successes <= of:
        raise ValueError(f"got {successes} successes of {of}")
    alpha = 1 - CONFIDENCE
    lower = float(beta.ppf(alpha, successes, of - successes + 1)) if successes else 0.0
    upper = float(beta.ppf(1 - alpha, successes + 1, of - successes)) if successes < of else 1.0
    return lower, upper


@dataclass(frozen=True)
class ClusterBootstrap:
    """Percentile bootstrap (Efron 1979) that draws clusters with replacement, the same draws for each statistic."""

    clusters: Sequence[int]
    """For each observation, which cluster it belongs to."""
    resamples: int
    seed: int

    @cached_property
    def _index(self) -> tuple[NDArray[np.int64], int]:
        import numpy as np

        names, index = np.unique(np.asarray(self.clusters), return_inverse=True)
        return index, len(names)

    @cached_property
    def _weights(self) -> Array:
        """How often each cluster was drawn: [resamples, clusters]."""
        import numpy as np

        _, count = self._index
        return np.random.default_rng(self.seed).multinomial(count, np.full(count, 1 / count), self.resamples).astype(np.float64)

    def mean(self, values: Sequence[float | None]) -> tuple[float, float]:
        """Bounds of the mean of `values`, one an observation; None is left out. (nan, nan) if all are."""
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
        """Bounds of Spearman's rank correlation of two statistics; pairs with a None are left out."""

        index, _ = self._index
        known = [at for at in range(len(x)) if x[at] is not None and y[at] is not None]
        if not known:
            return float("nan"), float("nan")
        # an observation that was drawn twice weighs two: [resamples, observations]
        weights = self._weights[:, index[known]]
        weights = weights[weights.sum(axis=1) > 0]
        return _bounds(_weighted_rank_correlation([x[at] for at in known], [y[at] for at in known], weights))


def spearman(x: Sequence[float | None], y: Sequence[float | None]) -> float:
    """Spearman's rank correlation, ties at their mean rank; pairs with a None are left out. 0 if either side does not vary."""
    import numpy as np

    pairs = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
    if not pairs:
        return 0.0
    left, right = zip(*pairs, strict=True)
    return float(_weighted_rank_correlation(left, right, np.ones((1, len(pairs))))[0])


def _weighted_rank_correlation(x: Sequence[Any], y: Sequence[Any], weights: Array) -> Array:
    """For each row of `weights` [R, N] the rank correlation of x and y [N], as if each pair occurred so often: [R]."""
    import numpy as np

    total = weights.sum(axis=1, keepdims=True)

    def ranks(values: Sequence[Any]) -> Array:
        _, group = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)
        counts = weights @ np.eye(group.max() + 1)[group]
        # the mean rank of a group of ties, about the mean of all ranks
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

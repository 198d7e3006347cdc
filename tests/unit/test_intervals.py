"""Compare bounds of rates, means and rank correlations with closed forms, scipy and data of known dependence."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, spearmanr

from lora_trainer.evaluate.intervals import ClusterBootstrap, clopper_pearson, spearman

counts = st.integers(1, 2000).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of)))


# -- Clopper-Pearson ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "enough"),
    [(0.97, 472), (0.93, 456), (0.95, 465)],
)
def test_how_many_of_480_a_gate_takes(threshold: float, enough: int) -> None:
    """These are the numbers that the descriptions of the settings state."""
    assert clopper_pearson(enough, 480)[0] >= threshold
    assert clopper_pearson(enough - 1, 480)[0] < threshold


@pytest.mark.parametrize("of", [1, 2, 10, 59, 480, 5000])
def test_none_and_all_have_closed_forms(of: int) -> None:
    assert clopper_pearson(0, of) == pytest.approx((0.0, 1 - 0.05 ** (1 / of)), abs=1e-12)
    assert clopper_pearson(of, of) == pytest.approx((0.05 ** (1 / of), 1.0), abs=1e-12)


def test_the_rule_of_59() -> None:
    """59 successes in 59 trials show a rate of 95 % with 95 % confidence, as tables of acceptance sampling state."""
    assert clopper_pearson(59, 59)[0] >= 0.95 > clopper_pearson(58, 58)[0]


@pytest.mark.parametrize(
    ("successes", "of", "lower", "upper"),
    # published tables list two-sided 90 % intervals, whose ends are our one-sided 95 % bounds
    [(5, 10, 0.2224, 0.7776), (1, 10, 0.0051, 0.3942), (9, 10, 0.6058, 0.9949), (10, 20, 0.3020, 0.6980), (3, 15, 0.0568, 0.4398)],
)
def test_tabulated_values(successes: int, of: int, lower: float, upper: float) -> None:
    assert clopper_pearson(successes, of) == pytest.approx((lower, upper), abs=6e-5)


def test_without_observations_everything_is_possible() -> None:
    assert clopper_pearson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "of"), [(-1, 5), (6, 5), (1, 0)])
def test_counts_that_are_none(successes: int, of: int) -> None:
    with pytest.raises(ValueError, match=f"got {successes} successes of {of}"):
        clopper_pearson(successes, of)


@given(counts)
def test_the_bounds_are_quantiles_of_the_beta_distribution(count: tuple[int, int]) -> None:
    """Compare the bounds with the closed form of Clopper and Pearson's interval."""
    successes, of = count
    lower, upper = clopper_pearson(successes, of)
    if successes:
        assert lower == pytest.approx(beta.ppf(0.05, successes, of - successes + 1), abs=1e-9)
    if successes < of:
        assert upper == pytest.approx(beta.ppf(0.95, successes + 1, of - successes), abs=1e-9)


@given(counts)
def test_the_bounds_enclose_the_rate(count: tuple[int, int]) -> None:
    successes, of = count
    lower, upper = clopper_pearson(successes, of)
    assert 0 <= lower <= successes / of <= upper <= 1


@given(counts)
def test_the_bounds_are_where_the_binomial_tail_is_5_percent(count: tuple[int, int]) -> None:
    successes, of = count
    lower, upper = clopper_pearson(successes, of)
    if successes:
        assert binom.sf(successes - 1, of, lower) == pytest.approx(0.05, rel=1e-6)
    if successes < of:
        assert binom.cdf(successes, of, upper) == pytest.approx(0.05, rel=1e-6)


@given(counts)
def test_more_successes_raise_both_bounds_and_no_means_yes_the_other_way_round(count: tuple[int, int]) -> None:
    successes, of = count
    lower, upper = clopper_pearson(successes, of)
    assert clopper_pearson(of - successes, of) == pytest.approx((1 - upper, 1 - lower))
    assume(successes < of)
    more_lower, more_upper = clopper_pearson(successes + 1, of)
    assert more_lower > lower
    assert more_upper >= upper


# -- the bootstrap --------------------------------------------------------------------------------------


def width(bounds: tuple[float, float]) -> float:
    return bounds[1] - bounds[0]


def drawn(count: int, seed: int = 1) -> list[float]:
    rng = random.Random(seed)
    return [float(rng.random() < 0.7) for _ in range(count)]


def test_copies_within_a_prompt_are_no_new_observations() -> None:
    """Four copies of each prompt's answer are as certain as one answer per prompt."""
    once = drawn(120)
    four_times = [value for value in once for _ in range(4)]
    clusters = [prompt for prompt in range(120) for _ in range(4)]
    clustered = ClusterBootstrap(clusters, 4000, 20).mean(four_times)
    independent = ClusterBootstrap(range(480), 4000, 20).mean(four_times)
    assert clustered == ClusterBootstrap(range(120), 4000, 20).mean(once)
    # the interval is twice as wide: the square root of four
    assert width(clustered) / width(independent) == pytest.approx(2, rel=0.15)
    exact = clopper_pearson(int(sum(four_times)), 480)
    assert width(clustered) > 1.5 * width(exact)


def test_copies_are_no_new_observations_of_a_correlation_either() -> None:
    rng = random.Random(3)
    x = [float(at % 4) for at in range(120)]
    y = [value + rng.gauss(0, 2) for value in x]
    clusters = [prompt for prompt in range(120) for _ in range(4)]
    four_times = [[value for value in values for _ in range(4)] for values in (x, y)]
    clustered = ClusterBootstrap(clusters, 2000, 20).spearman(*four_times)
    assert width(clustered) > 1.6 * width(ClusterBootstrap(range(480), 2000, 20).spearman(*four_times))


def test_independent_observations_have_the_bounds_that_theory_gives() -> None:
    values = drawn(480)
    mean = sum(values) / 480
    lower, upper = ClusterBootstrap(range(480), 20_000, 20).mean(values)
    margin = 1.645 * math.sqrt(mean * (1 - mean) / 480)
    assert (lower, upper) == pytest.approx((mean - margin, mean + margin), abs=0.004)


def test_the_bootstrap_of_a_correlation_is_that_of_scipy_on_the_drawn_observations() -> None:
    """Our bootstrap weights the observations; scipy's draws them one by one."""
    rng = random.Random(7)
    clusters = [prompt for prompt in range(12) for _ in range(4)]
    x = [float(at % 4) for at in range(48)]
    y: list[float | None] = [float(rng.randint(0, 3)) if rng.random() < 0.9 else None for _ in range(48)]
    bootstrap = ClusterBootstrap(clusters, 300, 5)
    found = []
    for weights in bootstrap._weights:
        picked = [at for at in range(48) for _ in range(int(weights[clusters[at]])) if y[at] is not None]
        found.append(spearmanr([x[at] for at in picked], [y[at] for at in picked]).statistic)
    assert bootstrap.spearman(x, y) == pytest.approx(tuple(np.quantile(found, [0.05, 0.95])))


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    values = drawn(100)
    clusters = [at // 4 for at in range(100)]
    bounds = [ClusterBootstrap(clusters, 500, seed).mean(values) for seed in (1, 1, 2)]
    assert bounds[0] == bounds[1] != bounds[2]
    # one bootstrap uses the same draws for all its statistics
    bootstrap = ClusterBootstrap(clusters, 500, 1)
    assert bootstrap.mean(values) == bounds[0] == bootstrap.mean(values)


def test_the_names_of_the_clusters_do_not_matter() -> None:
    values = drawn(40)
    plain = ClusterBootstrap([at // 4 for at in range(40)], 500, 1)
    assert ClusterBootstrap([1000 + 7 * (at // 4) for at in range(40)], 500, 1).mean(values) == plain.mean(values)


def test_what_is_not_there_is_left_out() -> None:
    """The bootstrap draws prompts with only unreadable replies, too, but they contribute nothing."""
    clusters = [0, 0, 1, 1, 2, 2]
    values = [1.0, None, 0.5, 0.75, None, None]
    lower, upper = ClusterBootstrap(clusters, 2000, 1).mean(values)
    assert 0.5 <= lower <= upper <= 1
    assert not math.isnan(lower)
    bootstrap = ClusterBootstrap(clusters, 2000, 1)
    lower, upper = bootstrap.spearman([1.0, 2.0, 1.0, 2.0, 1.0, None], [0.0, 1.0, 0.0, 1.0, None, 5.0])
    # a draw that consists of only the third prompt has no pairs, so no correlation
    assert (lower, upper) == pytest.approx((1, 1))


def test_nothing_at_all_has_no_bounds() -> None:
    bootstrap = ClusterBootstrap([0, 0, 1], 200, 1)
    for bounds in (
        bootstrap.mean([None] * 3),
        bootstrap.spearman([1, 2, 3], [None] * 3),
        bootstrap.spearman([None, 1, None], [1, None, 1]),
    ):
        assert math.isnan(bounds[0])
        assert math.isnan(bounds[1])


def test_one_prompt_cannot_vary() -> None:
    bootstrap = ClusterBootstrap([5] * 4, 200, 1)
    assert bootstrap.mean([0.0, 1.0, 1.0, 0.0]) == (0.5, 0.5)
    assert bootstrap.spearman([1, 2, 3, 4], [1, 1, 2, 2]) == pytest.approx([spearman([1, 2, 3, 4], [1, 1, 2, 2])] * 2)


finite = st.floats(-1e6, 1e6)
clustered = st.lists(st.tuples(st.integers(0, 5), st.none() | finite), min_size=1, max_size=30)


@settings(deadline=None)
@given(clustered)
def test_a_means_bounds_lie_among_the_values(observations: list[tuple[int, float | None]]) -> None:
    clusters, values = zip(*observations, strict=True)
    lower, upper = ClusterBootstrap(clusters, 200, 1).mean(values)
    known = [value for value in values if value is not None]
    if not known:
        assert math.isnan(lower)
        return
    slack = 1e-9 * max(1.0, *map(abs, known))
    assert min(known) - slack <= lower <= upper <= max(known) + slack


# -- rank correlation -----------------------------------------------------------------------------------

few = st.integers(-3, 3).map(float)
paired = st.lists(st.tuples(few | finite, few | finite), min_size=2, max_size=60)


@settings(deadline=None)
@given(paired)
def test_it_is_scipys(pairs: Sequence[tuple[float, float]]) -> None:
    x, y = zip(*pairs, strict=True)
    assume(len(set(x)) > 1)
    assume(len(set(y)) > 1)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-9)


@pytest.mark.parametrize(
    ("x", "y"), [([1, 2, 3], [5, 5, 5]), ([0.1, 0.1, 0.1], [1, 2, 3]), ([2], [3]), ([1, 1], [1, 1]), ([], []), ([None], [1])]
)
def test_what_does_not_vary_does_not_correlate(x: Sequence[float | None], y: Sequence[float | None]) -> None:
    assert spearman(x, y) == 0.0
    if x:
        bounds = ClusterBootstrap(range(len(x)), 200, 1).spearman(x, y)
        assert bounds == (0.0, 0.0) or all(map(math.isnan, bounds))


def test_pairs_with_a_gap_are_left_out() -> None:
    assert spearman([1, None, 2, 3, 9], [1, 5, 2, 3, None]) == pytest.approx(1)
    assert spearman([1, 2, 3, 0], [3, 2, 1, None]) == pytest.approx(-1)


def test_ranks_and_not_sizes_count() -> None:
    x = [0.1, 0.4, 0.7, 1.0]
    assert spearman(x, [0, 1, 2, 50]) == spearman(x, [0, 1, 2, 3]) == pytest.approx(1)

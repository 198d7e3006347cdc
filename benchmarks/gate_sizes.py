"""Simulate how often each gate passes an adapter that is exactly at its threshold, and how good an adapter must be to pass.

    python benchmarks/gate_sizes.py [--replies REPLIES.jsonl ...] [--adapters 10000] [--out FILE]

A gate should pass an adapter at its threshold in at most 5 % of evaluations. An evaluation has 240 prompts at two intensities, and
the two replies to a prompt resemble each other. `--replies` prints by how much in the greedy replies of real adapters (a bundle's
`replies.jsonl`, or several in one file that name the adapter under `adapter`); the simulation uses the values measured so far.

Rates: beta-binomial counts, whose correlation within a prompt is the measured one and, as the worst case, 0.8. Bounds are the
job's own functions. Emoji: a count by thresholds on a normal variable that rises with intensity and shares a part within a prompt.
Win rate: wins, ties and losses of prompts that share a part. Writes `benchmarks/results/gate-sizes.json`; a fixed seed repeats it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lora_trainer.config import EvaluationConfig, GatesConfig
from lora_trainer.evaluate.intervals import ClusterBootstrap, clopper_pearson, clustered_bounds, spearman
from lora_trainer.evaluate.measures import LEAST_CORRELATION

ROOT = Path(__file__).resolve().parent.parent
PROMPTS: Final = 240
PER_PROMPT: Final = 2
CLUSTERS: Final = np.repeat(np.arange(PROMPTS), PER_PROMPT).tolist()
WORST_CORRELATION: Final = 0.8
SEED: Final = 20
RESAMPLES: Final = 500
"""Fewer than the job's 2,000, to simulate in minutes. The bound is as sharp on average."""
MEASURED: Final = {
    "exact_json": 0.41,
    "stop": 0.41,
    "one_or_two_sentences": 0.263,
    "informal_speech": 0.394,
    "persona": 0.216,
    "question": 0.246,
}
"""Correlation of two replies to one prompt, greedy replies of 58 adapters of Qwen2.5-Coder-0.5B-Instruct (prompt-forms.json)."""
EMOJI_SHARES: Final = (0.62, 0.22, 0.12, 0.04)
"""Shares of replies with no, one, two and three emoji."""
RATE_GATES: Final = (
    ("exact_json", "exact_json", "lower"),
    ("stop", "stop", "lower"),
    ("one_or_two_sentences", "one_or_two_sentences", "lower"),
    ("informal_speech", "informal_speech", "lower"),
    ("persona", "persona", "lower"),
    ("question_rate_min", "question", "lower"),
    ("question_rate_max", "question", "upper"),
)
"""Gate, its measure, and the bound that it compares."""
EACH_OF_ALL: Final = 1 - 0.05 / (len(RATE_GATES) + 2)
"""How often an adapter must pass each gate to pass all with 95 %, whatever the gates have in common (Bonferroni)."""

Draw = Callable[[np.random.Generator], Any]


def beta_binomial(rate: float, correlation: float) -> Draw:
    """Return a function that draws whether each reply of an evaluation has a property."""
    share = (1 - correlation) / correlation

    def draw(rng: np.random.Generator) -> list[bool]:
        chances = rng.beta(rate * share, (1 - rate) * share, PROMPTS)
        return (rng.random((PROMPTS, PER_PROMPT)) < chances[:, None]).ravel().tolist()

    return draw


def passes_rate(held: Sequence[bool], measure: str, bound: str, threshold: float, *, is_exact: bool = False) -> bool:
    """Return whether the gate passes; `is_exact` takes every reply for an independent one."""
    if is_exact:
        lower, upper = clopper_pearson(sum(held), len(held))
    else:
        lower, upper, _ = clustered_bounds(held, CLUSTERS, LEAST_CORRELATION[measure])
    return lower >= threshold if bound == "lower" else upper <= threshold


def rate_sizes(gate: str, measure: str, bound: str, adapters: int) -> dict[str, Any]:
    """Return how often a gate on a rate passes adapters at its threshold, and the rate with which 95 % of adapters pass."""
    threshold = float(getattr(GatesConfig(), gate))
    rng = np.random.default_rng(SEED)

    def share(rate: float, correlation: float, count: int, *, is_exact: bool = False) -> float:
        draw = beta_binomial(rate, correlation)
        return sum(passes_rate(draw(rng), measure, bound, threshold, is_exact=is_exact) for _ in range(count)) / count

    correlation = MEASURED[measure]
    best = 1.0 if bound == "lower" else 0.0
    return {
        "gate": gate,
        "threshold": threshold,
        "correlation": correlation,
        "least_correlation": LEAST_CORRELATION[measure],
        "size_if_independent_were_assumed": share(threshold, correlation, adapters, is_exact=True),
        "size": share(threshold, correlation, adapters),
        "size_at_worst_correlation": share(threshold, WORST_CORRELATION, adapters),
        "perfect_adapter": clustered_bounds([bound == "lower"] * len(CLUSTERS), CLUSTERS, LEAST_CORRELATION[measure])[
            bound == "upper"
        ],
        "passes_95_percent_at": bisect(lambda rate: share(rate, correlation, 1000), threshold, best, 0.95),
        "passes_all_gates_at": bisect(lambda rate: share(rate, correlation, 4000), threshold, best, EACH_OF_ALL),
    }


def bisect(power: Callable[[float], float], fails: float, passes: float, wanted: float) -> float:
    """Return the value between two from which `power` reaches the `wanted` share, to three digits."""
    while abs(passes - fails) > 0.0005:
        middle = (passes + fails) / 2
        if power(middle) >= wanted:
            passes = middle
        else:
            fails = middle
    return round(passes, 3)


def asked_intensities() -> NDArray[np.float64]:
    """Return the intensity of each reply: [prompts, per prompt]. Prompts take the default levels in turn, as the job asks them."""
    levels = EvaluationConfig().intensities
    step = len(levels) // PER_PROMPT
    return np.array([[levels[(prompt % step) + step * turn] for turn in range(PER_PROMPT)] for prompt in range(PROMPTS)])


def emoji_counts(slope: float, rng: np.random.Generator, times: int = 1) -> NDArray[np.int64]:
    """Draw the emoji of each reply: [times, prompts, per prompt]. A quarter of the variance is the prompt's."""
    intensity = asked_intensities()
    level = slope * (intensity - intensity.mean()) / intensity.std()
    own = rng.normal(size=(times, PROMPTS, 1)) * np.sqrt(0.25)
    rest = rng.normal(size=(times, PROMPTS, PER_PROMPT)) * np.sqrt(0.75)
    value = (level + own + rest) / np.sqrt(1 + slope**2)
    from scipy.stats import norm

    return np.searchsorted(norm.ppf(np.cumsum(EMOJI_SHARES)[:-1]), value)


def slope_of(correlation: float) -> float:
    """Return the slope at which the rank correlation of emoji and intensity is `correlation`, on 200 evaluations together."""
    low, high = 0.0, 4.0
    intensity = np.broadcast_to(asked_intensities(), (200, PROMPTS, PER_PROMPT)).ravel()
    while high - low > 1e-3:
        middle = (low + high) / 2
        found = spearman(intensity, emoji_counts(middle, np.random.default_rng(SEED), 200).ravel())
        low, high = (low, middle) if found > correlation else (middle, high)
    return (low + high) / 2


def emoji_share(correlation: float, adapters: int, seed: int) -> float:
    """Return the share of adapters with this correlation that pass the gate."""
    threshold = float(GatesConfig().emoji_intensity or 0)
    slope, rng = slope_of(correlation), np.random.default_rng(seed)
    intensity = asked_intensities().ravel().tolist()
    bootstrap = ClusterBootstrap(CLUSTERS, RESAMPLES, SEED)
    return (
        sum(bootstrap.spearman(intensity, emoji_counts(slope, rng).ravel().tolist())[0] > threshold for _ in range(adapters))
        / adapters
    )


def win_share(rate: float, adapters: int, seed: int) -> float:
    """Return the share of adapters that win at this rate and pass the gate; a fifth of the replies are ties."""
    threshold = float(GatesConfig().win_rate or 0)
    rng = np.random.default_rng(seed)
    bootstrap = ClusterBootstrap(CLUSTERS, RESAMPLES, SEED)
    draw = beta_binomial((rate - 0.1) / 0.8, 0.4)
    passed = 0
    for _ in range(adapters):
        wins = np.where(rng.random(len(CLUSTERS)) < 0.2, 0.5, np.array(draw(rng), dtype=float))
        passed += bootstrap.mean(wins.tolist())[0] > threshold
    return passed / adapters


def correlations(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the correlation of replies to one prompt by measure: analysis of variance, adapters weighted by p(1 - p)."""
    adapters: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        for reply in _replies(path):
            if reply["model"] == "adapter" and reply["decoding"] == "greedy":
                adapters[f"{path}/{reply.get('form')}/{reply.get('seed')}/{reply.get('adapter')}"][reply["prompt"]].append(reply)
    checks: dict[str, Callable[[dict[str, Any], str], bool]] = {
        "exact_json": lambda reply, _: reply["exact_json"],
        "stop": lambda reply, _: reply["stopped"],
        "one_or_two_sentences": lambda reply, _: bool(reply["one_or_two_sentences"]),
        "informal_speech": lambda reply, _: bool(reply["informal_speech"]),
        "persona": lambda reply, persona: reply["taken_for"] == persona,
        "question": lambda reply, _: bool(reply["question"]),
    }
    found: dict[str, Any] = {"adapters": len(adapters)}
    for measure, check in checks.items():
        values, weights = [], []
        for by_prompt in adapters.values():
            taken = Counter(reply["taken_for"] for replies in by_prompt.values() for reply in replies if reply["taken_for"])
            persona = taken.most_common(1)[0][0]
            groups = [np.array([float(check(reply, persona)) for reply in replies]) for replies in by_prompt.values()]
            every = np.concatenate(groups)
            rate, size = every.mean(), len(every) / len(groups)
            if 0 < rate < 1:
                between = sum(len(group) * (group.mean() - rate) ** 2 for group in groups) / (len(groups) - 1)
                within = sum(((group - group.mean()) ** 2).sum() for group in groups) / (len(every) - len(groups))
                values.append((between - within) / (between + (size - 1) * within))
                weights.append(rate * (1 - rate))
        found[measure] = round(float(np.average(values, weights=weights)), 3)
    return found


def _replies(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def main() -> int:
    """Simulate all gates, write the result and print a table. Return 1 if a gate passes more than 6.5 % at its threshold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=Path, nargs="*", default=[])
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gate-sizes.json")
    options = parser.parse_args()
    if options.replies:
        sys.stdout.write(json.dumps(correlations(options.replies)) + "\n")
    gates = [rate_sizes(*gate, options.adapters) for gate in RATE_GATES]
    config = GatesConfig()
    with ProcessPoolExecutor() as pool:
        parts = 20
        each = options.adapters // parts
        emoji = list(pool.map(emoji_share, [float(config.emoji_intensity or 0)] * parts, [each] * parts, range(parts)))
        wins = list(pool.map(win_share, [float(config.win_rate or 0)] * parts, [each] * parts, range(parts)))
    gates += [
        {
            "gate": "emoji_intensity",
            "threshold": config.emoji_intensity,
            "size": float(np.mean(emoji)),
            "passes_95_percent_at": bisect(lambda value: emoji_share(value, 200, SEED), 0.2, 0.5, 0.95),
            "passes_all_gates_at": bisect(lambda value: emoji_share(value, 1000, SEED), 0.2, 0.6, EACH_OF_ALL),
        },
        {
            "gate": "win_rate",
            "threshold": config.win_rate,
            "size": float(np.mean(wins)),
            "passes_95_percent_at": bisect(lambda value: win_share(value, 500, SEED), 0.5, 0.7, 0.95),
            "passes_all_gates_at": bisect(lambda value: win_share(value, 1000, SEED), 0.5, 0.8, EACH_OF_ALL),
        },
    ]
    document = {
        "what": "share of evaluations in which a gate passes an adapter at its threshold, 240 prompts at two intensities",
        "command": f"python benchmarks/gate_sizes.py --adapters {options.adapters}",
        "adapters": options.adapters,
        "gates": gates,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for gate in gates:
        sys.stdout.write(json.dumps(gate) + "\n")
    return int(any(gate["size"] > 0.065 for gate in gates))


if __name__ == "__main__":
    sys.exit(main())

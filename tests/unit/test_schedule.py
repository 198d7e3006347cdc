"""Test the schedule: it is never zero within a run, reaches its peak once, and ends at the right value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.train.schedule import Schedule, learning_rate_factor, learning_rate_for_width

SCHEDULES: tuple[Schedule, ...] = ("cosine", "linear", "constant")


@given(st.sampled_from(SCHEDULES), st.integers(1, 400), st.floats(0, 0.99))
def test_every_step_learns_and_none_beyond_the_peak(schedule: Schedule, steps: int, warmup_fraction: float) -> None:
    warmup_steps = round(warmup_fraction * steps)
    factors = [learning_rate_factor(step, steps, warmup_steps, schedule) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:warmup_steps] == sorted(factors[:warmup_steps])
    assert factors[warmup_steps:] == sorted(factors[warmup_steps:], reverse=True)
    if warmup_steps < steps:
        assert factors[warmup_steps] == 1


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("cosine", [1 / 3, 2 / 3, 1, 0.75, 0.25]), ("linear", [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]), ("constant", [1 / 3, 2 / 3, 1, 1, 1])],
)
def test_a_short_run(schedule: Schedule, expected: list[float]) -> None:
    assert [learning_rate_factor(step, 5, 2, schedule) for step in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("hidden_size", "sequences_per_step", "expected"),
    # 5e-4 at the rule's own point; Qwen2.5-7B has a width of 3584, Qwen2.5-0.5B of 896
    [(2000, 128, 5e-4), (3584, 16, 1.690e-4), (3584, 64, 3.379e-4), (896, 16, 1.881e-4)],
)
def test_the_rate_follows_the_width_and_the_step(hidden_size: int, sequences_per_step: int, expected: float) -> None:
    assert learning_rate_for_width(hidden_size, sequences_per_step) == pytest.approx(expected, rel=1e-3)

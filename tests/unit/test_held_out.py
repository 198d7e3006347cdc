"""Test when the held-out loss is measured, which measurement is the best, and when training stops early."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.train.held_out import HeldOutLoss, is_overfitting, lowest, measurement_steps


def losses(*values: float) -> list[HeldOutLoss]:
    return [HeldOutLoss(5 * number, value) for number, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("records", "sequences_per_step", "per_epoch", "steps", "at"),
    [
        # three epochs of 32 steps
        (1024, 32, 4, 96, {8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96}),
        (1024, 32, 1, 96, {32, 64, 96}),
        # training.max_steps ends the run before the first measurement of its epoch
        (1024, 32, 4, 6, {6}),
        (1024, 32, 4, 20, {8, 16, 20}),
        # half an epoch
        (1024, 32, 4, 16, {8, 16}),
        # an epoch has less than a step
        (3, 32, 4, 2, {1, 2}),
        (1000, 32, 2, 31, {16, 31}),
    ],
)
def test_steps_to_measure_after(records: int, sequences_per_step: int, per_epoch: int, steps: int, at: set[int]) -> None:
    assert measurement_steps(records, sequences_per_step, per_epoch, steps) == at


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 20), st.integers(1, 500))
def test_every_step_measured_after_is_one_of_the_run(records: int, sequences_per_step: int, per_epoch: int, steps: int) -> None:
    at = measurement_steps(records, sequences_per_step, per_epoch, steps)
    assert steps in at
    assert at <= set(range(1, steps + 1))
    assert len(at) <= max(1, per_epoch) * max(1.0, steps * sequences_per_step / records) + 1


def test_the_earliest_of_equal_losses_is_the_best() -> None:
    assert lowest(losses(3.0, 2.0, 2.5, 2.0)).step == 10


@pytest.mark.parametrize(
    ("values", "early_stopping", "stops"),
    [
        ((3.0, 2.0, 2.1), 2, False),
        ((3.0, 2.0, 2.1, 2.2), 2, True),
        # an equal loss is no improvement
        ((3.0, 2.0, 2.0, 2.0), 2, True),
        # the loss falls again in time
        ((3.0, 2.0, 2.1, 1.9, 2.0), 2, False),
        ((3.0, 2.0, 2.1, 2.2, 2.3), None, False),
        ((), 1, False),
    ],
)
def test_early_stopping(values: tuple[float, ...], early_stopping: int | None, stops: bool) -> None:
    assert is_overfitting(losses(*values), early_stopping) is stops

"""Test the guarantees of steps, which depend only on the recipe, and of rows, which depend on memory."""

from __future__ import annotations

import heapq
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.train.packing import pack, plan_steps

RECORDS = st.integers(1, 120)
STEP = st.integers(1, 40)
SEED = st.integers(0, 2**32 - 1)


@given(RECORDS, STEP, st.integers(1, 4), SEED)
def test_every_record_once_an_epoch(records: int, sequences_per_step: int, epochs: int, seed: int) -> None:
    steps = plan_steps(records, sequences_per_step, epochs, seed)
    order = [index for step in steps for index in step]
    for epoch in range(epochs):
        assert sorted(order[epoch * records : (epoch + 1) * records]) == list(range(records))
    assert len(order) == epochs * records
    # epochs follow one another without a gap, so only the last step may be smaller
    assert all(len(step) == sequences_per_step for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= sequences_per_step


@given(RECORDS, STEP, st.floats(0.001, 4), SEED)
def test_parts_of_an_epoch(records: int, sequences_per_step: int, epochs: float, seed: int) -> None:
    steps = plan_steps(records, sequences_per_step, epochs, seed)
    order = [index for step in steps for index in step]
    assert len(order) == max(1, round(records * epochs))
    counts = Counter(order)
    whole = len(order) // records
    assert all(whole <= counts[index] <= whole + 1 for index in range(records))
    # a shorter run is the beginning of a longer one
    longer = [index for step in plan_steps(records, sequences_per_step, math.ceil(epochs) + 1, seed) for index in step]
    assert longer[: len(order)] == order


@given(RECORDS, STEP, st.integers(1, 300), SEED)
def test_max_steps_cuts_and_changes_nothing_before(records: int, sequences_per_step: int, max_steps: int, seed: int) -> None:
    whole = plan_steps(records, sequences_per_step, 3, seed)
    assert plan_steps(records, sequences_per_step, 3, seed, max_steps) == whole[:max_steps]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    (first,), (second,) = plan_steps(50, 50, 1, 20), plan_steps(50, 50, 1, 21)
    assert first != second
    assert plan_steps(50, 50, 2, 20)[1] != first
    assert first != sorted(first)


def test_the_order_is_part_of_the_recipe() -> None:
    """Another order would train other weights under the same run id. Raise RECIPE_VERSION if you change it."""
    assert plan_steps(6, 4, 1.5, 20) == [[5, 3, 0, 4], [1, 2, 3, 4], [1]]


LENGTHS = st.lists(st.integers(1, 400), max_size=60)


@given(LENGTHS, st.integers(400, 3000))
def test_every_sequence_in_one_row_and_no_row_too_long(lengths: list[int], row_tokens: int) -> None:
    rows = pack(lengths, row_tokens)
    assert sorted(position for row in rows for position in row) == list(range(len(lengths)))
    assert all(row for row in rows)
    assert all(sum(lengths[position] for position in row) <= row_tokens for row in rows)


def emptiest_row_first(lengths: list[int], rows: int) -> int:
    """Put the longest sequences first, each into the emptiest row (Graham 1969). Return the size of the fullest row."""
    filled = [0] * rows
    for length in sorted(lengths, reverse=True):
        heapq.heapreplace(filled, filled[0] + length)
    return max(filled)


@given(LENGTHS.filter(bool), st.integers(400, 3000))
def test_no_more_rows_than_longest_first_needs(lengths: list[int], row_tokens: int) -> None:
    rows = pack(lengths, row_tokens)
    least = math.ceil(sum(lengths) / row_tokens)
    fitting = next(count for count in range(least, len(lengths) + 1) if emptiest_row_first(lengths, count) <= row_tokens)
    assert least <= len(rows) <= fitting
    assert len(rows) <= math.ceil(2 * sum(lengths) / row_tokens)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(400, 3000))
def test_rows_are_even(lengths: list[int], row_tokens: int) -> None:
    """Without its shortest sequence, no row is fuller than the emptiest one. Even rows keep peak memory even."""
    rows = [sorted(lengths[position] for position in row) for row in pack(lengths, row_tokens)]
    emptiest = min(map(sum, rows))
    assert all(sum(row) - row[0] <= emptiest for row in rows)


def test_a_row_of_its_exact_length_is_enough() -> None:
    assert pack([5, 5], 10) == [[0, 1]]
    assert pack([10], 10) == [[0]]
    assert len(pack([5, 5, 1], 10)) == 2
    assert pack([], 10) == []


def test_a_sequence_that_fits_no_row() -> None:
    with pytest.raises(ValueError, match="a sequence of 11 tokens does not fit a row of 10"):
        pack([3, 11], 10)


@given(RECORDS, STEP, st.integers(400, 900), st.integers(901, 5000))
def test_another_row_size_is_the_same_steps(records: int, sequences_per_step: int, small: int, large: int) -> None:
    """The optimizer sees the same batches on every GPU: rows split a step but never move a record to another step."""
    lengths = [1 + (index * 37) % 400 for index in range(records)]
    for step in plan_steps(records, sequences_per_step, 1, 20):
        in_step = [lengths[index] for index in step]
        together = [sorted(step[position] for row in pack(in_step, size) for position in row) for size in (small, large)]
        assert together[0] == together[1] == sorted(step)

"""Test the memory rule on the measurements it was fitted to, and its plans for common GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

from lora_trainer.config import MemoryConfig, TrainingConfig
from lora_trainer.errors import ConfigError, ExitCode, HardwareError
from lora_trainer.train.memory_plan import (
    CPU_ROW_TOKENS,
    GIB,
    LEAST_ROW_TOKENS,
    MemoryLimit,
    MemoryPlan,
    ModelShape,
    plan_memory,
    step_down,
)

QWEN_7B = ModelShape(
    layers=28,
    hidden=3584,
    intermediate=18944,
    attention_heads=28,
    key_value_heads=4,
    vocabulary=152064,
    tied_embeddings=False,
    positions=32768,
)


def plan(
    free_gib: float | None,
    memory: MemoryConfig | None = None,
    longest: int = 300,
    backend: Literal["unsloth", "transformers"] = "unsloth",
    limit: MemoryLimit | None = None,
) -> MemoryPlan:
    free_bytes = None if free_gib is None else int(free_gib * GIB)
    return plan_memory(memory or MemoryConfig(), TrainingConfig(), QWEN_7B, free_bytes, longest, backend, limit)


def test_the_shape_is_qwens() -> None:
    # per the model card: 6.53B parameters without embeddings (0.3M of them biases and norms), 7.61B with embeddings
    assert QWEN_7B.linear_parameters == pytest.approx(6.525e9, rel=0.001)
    assert QWEN_7B.weight_bytes("none", 2) == pytest.approx(7.615e9 * 2, rel=0.001)


@pytest.mark.parametrize(
    ("checkpointing", "tokens", "measured_gib"),
    [
        ("off", 2048, 13.5),
        ("off", 4096, 21.3),
        ("off", 8192, 36.4),
        ("off", 16384, 67.2),
        ("unsloth", 4096, 6.7),
        ("unsloth", 16384, 9.1),
    ],
)
def test_estimates_are_within_three_percent_of_what_was_measured(checkpointing: str, tokens: int, measured_gib: float) -> None:
    asked = MemoryConfig.model_validate({"gradient_checkpointing": checkpointing, "micro_batch_tokens": tokens})
    assert plan(80, asked).estimated_peak_gib == pytest.approx(measured_gib, rel=0.03)


@pytest.mark.parametrize(
    ("card_gib", "checkpointing", "tokens"),
    [
        (139, "off", 8192),
        (79.1, "off", 8192),
        (47.4, "off", 8192),
        (39.5, "off", 4096),
        (23.6, "off", 4096),
        (22, "unsloth", 8192),
        (14.7, "unsloth", 8192),
        (8, "unsloth", 4096),
        (7, "unsloth", 1024),
    ],
)
def test_the_fastest_that_fits(card_gib: float, checkpointing: str, tokens: int) -> None:
    chosen = plan(card_gib)
    assert (chosen.gradient_checkpointing, chosen.micro_batch_tokens) == (checkpointing, tokens)
    assert chosen.estimated_peak_gib is not None
    assert chosen.estimated_peak_gib <= card_gib * 0.9
    assert chosen.reason == (
        f"fastest that fits: {chosen.estimated_peak_gib:.1f} GiB estimated, "
        f"{int(card_gib * GIB) * 0.9 / GIB:.1f} GiB usable of {card_gib:.1f} GiB free"
    )


def test_more_memory_is_never_slower() -> None:
    order = [("off", 8192), ("off", 4096), ("unsloth", 8192), ("unsloth", 4096), ("unsloth", 2048), ("unsloth", 1024)]
    ranks = []
    for tenths in range(70, 900):
        chosen = plan(tenths / 10)
        ranks.append(order.index((chosen.gradient_checkpointing, chosen.micro_batch_tokens)))
    assert ranks == sorted(ranks, reverse=True)
    assert set(ranks) == set(range(len(order)))


def test_without_unsloth_checkpointing_is_torchs_own() -> None:
    assert plan(12, backend="transformers").gradient_checkpointing == "on"


def test_too_small_a_card() -> None:
    with pytest.raises(
        HardwareError, match=r"GPU memory: 6\.0 GiB free, expected at least 6\.8 GiB for this base; use a larger"
    ) as caught:
        plan(6)
    assert caught.value.exit_code == ExitCode.HARDWARE
    # the memory that the message asks for is enough
    assert plan(6.85).micro_batch_tokens == 1024


def test_the_memory_that_is_asked_for_belongs_to_the_checkpointing_that_was() -> None:
    with pytest.raises(HardwareError, match=r"10\.0 GiB free, expected at least 1[0-9]\.\d GiB"):
        plan(10, MemoryConfig(gradient_checkpointing="off"))


def test_overrides_are_kept_as_they_are() -> None:
    asked = MemoryConfig(gradient_checkpointing="off", micro_batch_tokens=16384)
    chosen = plan(8, asked)
    assert (chosen.gradient_checkpointing, chosen.micro_batch_tokens) == ("off", 16384)
    assert chosen.reason.startswith("asked for: ")


def test_half_an_override_leaves_the_other_half_to_the_rule() -> None:
    assert plan(79, MemoryConfig(gradient_checkpointing="unsloth")).micro_batch_tokens == 8192
    assert plan(16, MemoryConfig(gradient_checkpointing="off")).micro_batch_tokens == 2048
    few = plan(16, MemoryConfig(micro_batch_tokens=512))
    assert (few.gradient_checkpointing, few.micro_batch_tokens) == ("off", 512)
    many = plan(24, MemoryConfig(micro_batch_tokens=16384))
    assert (many.gradient_checkpointing, many.micro_batch_tokens) == ("unsloth", 16384)


def test_a_row_holds_the_longest_record() -> None:
    assert plan(79, longest=9000).micro_batch_tokens == 9000
    assert plan(79, MemoryConfig(micro_batch_tokens=256), longest=900).micro_batch_tokens == 900
    assert plan(None, longest=5000).micro_batch_tokens == 5000


def test_on_a_cpu_the_rule_does_not_apply() -> None:
    chosen = plan(None)
    assert chosen == MemoryPlan("off", 512, None, "on the CPU: no recomputation, short rows")
    asked = plan(None, MemoryConfig(gradient_checkpointing="on", micro_batch_tokens=512))
    assert (asked.gradient_checkpointing, asked.micro_batch_tokens) == ("on", 512)


def test_full_precision_takes_twice_the_activations() -> None:
    def peak(dtype: str) -> float:
        recipe = TrainingConfig.model_validate({"quantization": "none", "compute_dtype": dtype})
        asked = MemoryConfig(gradient_checkpointing="off", micro_batch_tokens=4096)
        found = plan_memory(asked, recipe, QWEN_7B, 200 * GIB, 300, "transformers").estimated_peak_gib
        assert found is not None
        return found

    fixed_gib = 0.75
    assert peak("float32") - fixed_gib == pytest.approx(2 * (peak("bfloat16") - fixed_gib), rel=0.01)


def test_tied_embeddings_are_held_once() -> None:
    tied = ModelShape(24, 896, 4864, 14, 2, 151936, tied_embeddings=True, positions=32768)
    untied = ModelShape(24, 896, 4864, 14, 2, 151936, tied_embeddings=False, positions=32768)
    assert untied.weight_bytes("none", 2) - tied.weight_bytes("none", 2) == 151936 * 896 * 2
    # Qwen2.5-0.5B has 0.494B parameters and tied embeddings
    assert tied.weight_bytes("none", 2) == pytest.approx(0.494e9 * 2, rel=0.005)


@pytest.mark.parametrize("free_gib", [None, 80])
@pytest.mark.parametrize("asked", [{}, {"micro_batch_tokens": 8192}, {"micro_batch_tokens": 8192, "gradient_checkpointing": "off"}])
def test_no_row_is_longer_than_the_positions_that_the_base_knows(free_gib: int | None, asked: dict[str, object]) -> None:
    shape = replace(QWEN_7B, positions=1024)
    free_bytes = None if free_gib is None else free_gib * GIB
    found = plan_memory(MemoryConfig.model_validate(asked), TrainingConfig(), shape, free_bytes, 300, "unsloth")
    assert found.micro_batch_tokens == (CPU_ROW_TOKENS if free_gib is None and not asked else 1024)


def test_a_record_longer_than_the_positions_is_the_configurations_mistake() -> None:
    with pytest.raises(ConfigError, match=r"max_length_tokens.* 1,025 tokens, expected at most 1,024.*lower") as caught:
        plan_memory(MemoryConfig(), TrainingConfig(), replace(QWEN_7B, positions=1024), None, 1025, "transformers")
    assert caught.value.exit_code is ExitCode.CONFIG


@pytest.mark.parametrize("free_gib", [139, 79.1, None])
def test_memory_that_runs_out_is_met_by_one_smaller_plan_after_another_until_none_is_left(free_gib: float | None) -> None:
    memory, now = MemoryConfig(), plan(free_gib)
    seen = [(now.gradient_checkpointing, now.micro_batch_tokens)]
    while limit := step_down(now, memory, longest_tokens=300):
        now = plan(free_gib, limit=limit)
        seen.append((now.gradient_checkpointing, now.micro_batch_tokens))
    first = seen[0][1]
    # recomputation comes first, because it frees the most memory
    assert seen[:3] == [("off", first), ("unsloth", first), ("unsloth", max(first // 2, 300))]
    # no row is shorter than the longest record
    assert seen[-1] == ("unsloth", max(LEAST_ROW_TOKENS, 300))
    assert len(seen) == len(set(seen))


def test_no_row_gets_shorter_than_a_record_and_nothing_that_was_set_is_stepped_down() -> None:
    assert step_down(MemoryPlan("unsloth", 1024, None, ""), MemoryConfig(), longest_tokens=1024) is None
    assert step_down(MemoryPlan("unsloth", 1024, None, ""), MemoryConfig(), longest_tokens=700) == MemoryLimit(True, 700)
    asked = MemoryConfig(gradient_checkpointing="off", micro_batch_tokens=4096)
    assert step_down(plan(79.1, asked), asked, longest_tokens=300) is None
    asked = MemoryConfig(gradient_checkpointing="off")
    assert step_down(plan(79.1, asked), asked, longest_tokens=300) == MemoryLimit(False, 4096)
    assert plan(79.1, asked, limit=MemoryLimit(False, 4096)).micro_batch_tokens == 4096

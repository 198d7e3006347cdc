"""Test that the loss from label positions is the model's own, for every architecture that a base may have."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest
from conftest import REPOSITORY

from lora_trainer.base_files.weights import ARCHITECTURES
from lora_trainer.train.tokenization import IGNORED_LABEL, TokenSequence

for library in ("torch", "transformers", "trl", "peft", "datasets"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install '.[cpu]'")

BASE = REPOSITORY / "examples" / "tiny-base"
# prompt and reply tokens of each record of each row: also no prompt, replies of one token, and a record of one token
ROWS = ([(37, 12), (0, 9), (61, 1)], [(5, 40)], [(1, 3), (0, 1), (90, 33), (2, 2)])


def records_of_rows() -> list[list[TokenSequence]]:
    drawn = random.Random(0)

    def record(prompt: int, reply: int) -> TokenSequence:
        return TokenSequence(tuple(drawn.randrange(4000) for _ in range(prompt + reply)), prompt)

    return [[record(*lengths) for lengths in row] for row in ROWS]


@cache
def model_of(kind: str) -> Any:
    """Return the tiny base, or a random one of another architecture and the same sizes, with an adapter that changes it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if kind == "qwen2":
        base = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True, dtype=torch.float32)
    else:
        sizes = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
        for name in ("architectures", "model_type", "layer_types", "dtype"):
            del sizes[name]
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).float()
    assert type(base).__name__ == ARCHITECTURES[kind].class_name
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))


def loss_and_gradients(kind: str, loss_from: Any, divisor: int) -> tuple[float, dict[str, Any]]:
    """Return the loss of a step of several rows, and its gradient with respect to each adapter weight."""
    import torch

    from lora_trainer.train.backends.row_losses import forward_loss
    from lora_trainer.train.backends.rows import make_row

    model = model_of(kind)
    model.zero_grad()
    total = 0.0
    for row in map(make_row, records_of_rows()):
        inputs = {name: value for name, value in row.items() if name != "packed_seq_lengths"}
        loss = forward_loss(model, inputs, torch.tensor(divisor), loss_from)
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        total += loss.item()
    return total, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_label_positions_give_the_models_own_loss_and_gradients(kind: str) -> None:
    divisor = sum(record.reply_tokens for row in records_of_rows() for record in row)
    expected, expected_gradients = loss_and_gradients(kind, "model", divisor)
    got, gradients = loss_and_gradients(kind, "labels", divisor)
    assert expected > 1
    assert got == pytest.approx(expected, rel=1e-6)
    # A and B of seven projections in four layers
    assert len(gradients) == len(expected_gradients) == 2 * 7 * 4
    for name, gradient in gradients.items():
        assert float((gradient - expected_gradients[name]).norm() / expected_gradients[name].norm()) < 1e-6, name


def test_logits_of_other_positions_are_not_computed() -> None:
    from lora_trainer.train.backends.rows import make_row

    labels = [row["labels"][0] for row in map(make_row, records_of_rows())]
    # no token predicts the first one of a row
    predicting = [int((label[1:] != IGNORED_LABEL).sum()) for label in labels]
    positions: list[int] = []
    head = model_of("qwen2").get_base_model().lm_head
    hook = head.register_forward_hook(lambda module, arguments, logits: positions.append(logits.shape[1]))
    for loss_from in ("model", "labels"):
        loss_and_gradients("qwen2", loss_from, 1)
    hook.remove()
    assert positions == [len(label) for label in labels] + predicting
    assert sum(predicting) < sum(map(len, labels)) / 2


@pytest.mark.parametrize("row_tokens", [128, 512])
def test_a_model_without_a_trainer_has_the_same_mean_loss(row_tokens: int) -> None:
    from lora_trainer.train.backends.step_trainer import mean_loss

    records = [record for row in records_of_rows() for record in row]
    expected = mean_loss(model_of("qwen2"), records, row_tokens, "model")
    assert mean_loss(model_of("qwen2"), records, row_tokens, "labels") == pytest.approx(expected, rel=1e-6)

"""Compute the loss of one packed row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

from lora_trainer.train.tokenization import IGNORED_LABEL

LossFrom = Literal["model", "labels", "trl"]
"""What computes a row's loss. All three compute the same, up to rounding.

- `model`: the model's own forward. Unsloth's has a fused loss.
- `labels`: `labels_loss`, for a CPU.
- `trl`: TRL's fused head, the fastest with transformers' forward. It needs Triton, which a CPU lacks.
"""


def forward_loss(
    model: torch.nn.Module, inputs: Mapping[str, Any], divisor: torch.Tensor, loss_from: Literal["model", "labels"]
) -> torch.Tensor:
    """Return the sum of a row's token losses in nats, divided by `divisor`. `inputs` are the arguments of the model's forward."""
    if loss_from == "labels":
        return labels_loss(model, inputs, divisor)
    loss: torch.Tensor = model(**inputs, use_cache=False, num_items_in_batch=divisor).loss
    return loss


def labels_loss(model: torch.nn.Module, inputs: Mapping[str, Any], divisor: torch.Tensor) -> torch.Tensor:
    """Compute `forward_loss` from the logits of the positions that predict a label: [L, V] instead of [T, V].

    transformers' own loss computes all of them. In the bundled data, 70 % of the positions are of prompts and predict no label.
    """
    others = {name: value for name, value in inputs.items() if name != "labels"}
    # the model predicts token t + 1 at t
    targets = inputs["labels"][0, 1:]
    positions = (targets != IGNORED_LABEL).nonzero()[:, 0]
    logits = model(**others, use_cache=False, logits_to_keep=positions).logits[0]
    return cross_entropy(logits.float(), targets[positions], reduction="sum") / divisor

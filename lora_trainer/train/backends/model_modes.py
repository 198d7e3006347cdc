"""Switch a model between training and inference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from transformers import PreTrainedModel


@contextmanager
def inference_mode(model: PeftModel, *, on_cpu: bool) -> Iterator[None]:
    """Put the model into evaluation mode without gradient checkpointing, and restore both afterwards."""
    was_training = model.training
    # a key-value cache cannot be used with gradient checkpointing
    checkpointing = bool(getattr(model, "is_gradient_checkpointing", False))
    if checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()
    if on_cpu and was_training:
        keep_four_bit_layout(model)
    try:
        yield
    finally:
        model.train(was_training)
        if checkpointing:
            enable_checkpointing(model)


def enable_checkpointing(model: PeftModel | PreTrainedModel) -> None:
    """Recompute activations in the backward pass, by torch's non-reentrant checkpointing."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def keep_four_bit_layout(model: torch.nn.Module) -> None:
    """Leave bitsandbytes' layers in training mode, so that they keep their weight layout.

    On a CPU, `Linear4bit.forward` (0.50.2) repacks its weights at the first call in evaluation mode. The change is permanent and
    breaks training. The layers have no dropout, so the mode changes nothing else.
    """
    for module in model.modules():
        if type(module).__module__ == "bitsandbytes.nn.modules":
            module.training = True

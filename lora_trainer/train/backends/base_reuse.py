"""Reuse a loaded base for the next persona or trial, or for the next adapter to evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from lora_trainer.config import LoraConfig
from lora_trainer.train.backends.fingerprints import base_fingerprints, fingerprints
from lora_trainer.train.backends.training_state import set_weights, weights_of
from lora_trainer.train.memory_plan import Checkpointing

AdapterStart = tuple[LoraConfig, int]
"""The settings and the seed that a new adapter's shape and weights follow from."""


@dataclass(frozen=True, slots=True)
class TrainingBase:
    """A base loaded for training, and its adapter's state before the first step.

    The next persona or trial reuses the same modules and starts from the adapter's initial weights. Removing the adapter instead
    would undo patches that libraries made to these modules.
    """

    folder: Path
    checkpointing: Checkpointing
    row_tokens: int
    """Longest row that the loaded base supports."""
    adapter_start: AdapterStart
    fingerprints: dict[str, int]
    """Fingerprints of the base's weights."""
    adapter: dict[str, torch.Tensor]
    attributes: tuple[tuple[torch.nn.Module, dict[str, Any]], ...]
    """Original attributes of the two modules that a trainer modifies. accelerate replaces `forward` for mixed precision and marks
    the model as prepared. It skips marked models, so without a reset the next persona would train without mixed precision."""

    @classmethod
    def of(
        cls, model: PeftModel, folder: Path, checkpointing: Checkpointing, row_tokens: int, adapter_start: AdapterStart
    ) -> TrainingBase:
        """Record a model that was just loaded from `folder`, with a new adapter."""
        modules = (model, model.get_base_model())
        attributes = tuple((module, dict(vars(module))) for module in modules)
        return cls(folder, checkpointing, row_tokens, adapter_start, base_fingerprints(model), weights_of(model), attributes)

    def fits(self, folder: Path, checkpointing: Checkpointing, row_tokens: int, adapter_start: AdapterStart) -> bool:
        """Return whether base and adapter were loaded like this, for rows of at least `row_tokens`."""
        wanted = (folder, checkpointing, adapter_start)
        return (self.folder, self.checkpointing, self.adapter_start) == wanted and self.row_tokens >= row_tokens

    def reset_modules(self, model: PeftModel) -> None:
        """Remove attributes and gradients that the last trainer left on the modules."""
        for module, attributes in self.attributes:
            vars(module).clear()
            vars(module).update(attributes)
        model.zero_grad(set_to_none=True)

    def is_unchanged(self, model: PeftModel) -> bool:
        """Return whether the base's weights are the same as when it was loaded."""
        return base_fingerprints(model) == self.fingerprints

    def reset_adapter(self, model: PeftModel) -> None:
        """Restore the adapter's initial weights."""
        set_weights(model, self.adapter)


@dataclass(frozen=True, slots=True)
class EvaluationBase:
    """A base loaded for evaluating saved adapters."""

    folder: Path
    fingerprints: dict[str, int]
    """Fingerprints of the base's weights."""

    @classmethod
    def of(cls, model: torch.nn.Module, folder: Path) -> EvaluationBase:
        """Record a base without an adapter that was just loaded from `folder`."""
        return cls(folder, fingerprints(model.named_parameters()))

    def is_unchanged(self, model: torch.nn.Module) -> bool:
        """Return whether the weights of `model`, without an adapter, are the same as when it was loaded."""
        return fingerprints(model.named_parameters()) == self.fingerprints

"""Fingerprint model weights, to detect which of them changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch

_PIECE: Final = 4 * 1024 * 1024
"""Elements summed at once: torch copies the elements of a sum to a wider type, so this limits memory."""


def fingerprints(parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Return the sum of each weight's bit patterns, by name. It is cheap, and almost any change of a weight changes it."""
    sums = {}
    for name, parameter in parameters:
        words = parameter.detach().reshape(-1).view(torch.uint8)
        if words.numel() % 4 == 0:
            words = words.view(torch.int32)
        pieces = [piece.sum(dtype=torch.int64) for piece in words.split(_PIECE)]
        sums[name] = int(torch.stack(pieces).sum())
    return sums


@dataclass(frozen=True, slots=True)
class WeightFingerprints:
    """Fingerprints of a model's weights, by name."""

    base: dict[str, int]
    """Frozen weights."""
    adapter: dict[str, int]
    """Trainable weights."""

    @classmethod
    def of(cls, model: torch.nn.Module) -> WeightFingerprints:
        """Fingerprint `model` as it is now."""
        return cls(base_fingerprints(model), fingerprints(_parameters(model, trainable=True)))


def base_fingerprints(model: torch.nn.Module) -> dict[str, int]:
    """Fingerprint the frozen weights of a model with an adapter."""
    return fingerprints(_parameters(model, trainable=False))


def _parameters(model: torch.nn.Module, *, trainable: bool) -> Iterable[tuple[str, torch.Tensor]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad is trainable)

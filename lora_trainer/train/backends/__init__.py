"""Open one of the two backends, which share an interface. Neither imports torch before it is started."""

from __future__ import annotations

from lora_trainer.config import RunConfig
from lora_trainer.signals import Interruption
from lora_trainer.train.backends.transformers import TransformersBackend as Backend

__all__ = ["Backend", "open_backend", "open_reference_backend"]


def open_backend(config: RunConfig, interruption: Interruption | None = None) -> Backend:
    """Return the configured backend, not yet started. On `interruption`, training stops at a safe point."""
    if config.resolved_backend == "unsloth":
        from lora_trainer.train.backends.unsloth import UnslothBackend

        return UnslothBackend(config, interruption)
    return Backend(config, interruption)


def open_reference_backend(config: RunConfig, interruption: Interruption | None = None) -> Backend:
    """Return plain transformers and PEFT, to evaluate a saved adapter as a server would load it."""
    return Backend(config, interruption)

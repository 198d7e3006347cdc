"""The two training stacks behind one interface. Nothing here imports torch until a backend is started."""

from __future__ import annotations

from lora_trainer.config import RunConfig
from lora_trainer.train.backends.transformers import TransformersBackend as Backend

__all__ = ["Backend", "open_backend", "open_reference_backend"]


def open_backend(config: RunConfig) -> Backend:
    """The backend that `config` asks for, not yet started."""
    if config.resolved_backend == "unsloth":
        from lora_trainer.train.backends.unsloth import UnslothBackend

        return UnslothBackend(config)
    return Backend(config)


def open_reference_backend(config: RunConfig) -> Backend:
    """transformers and PEFT as they are, for an adapter that is questioned and not trained: what a server would load."""
    return Backend(config)

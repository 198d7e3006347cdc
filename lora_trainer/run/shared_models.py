"""The models that all personas of one process share: each base is hashed once, each training stack started once."""

from __future__ import annotations

from collections.abc import Callable

from lora_trainer.base_model import Base, identify_base
from lora_trainer.config import BaseModelConfig, RunConfig
from lora_trainer.errors import LoraTrainerError
from lora_trainer.signals import Interruption
from lora_trainer.store.retry import RetryBudget
from lora_trainer.train.backends import Backend

OpenBackend = Callable[[RunConfig, Interruption], Backend]
"""`open_backend` or `open_reference_backend`."""


class SharedModels:
    """Identified bases and started backends."""

    def __init__(self) -> None:
        self._bases: dict[BaseModelConfig, Base] = {}
        self._started: dict[OpenBackend, tuple[Backend, dict[str, object]]] = {}
        self._refused: dict[OpenBackend, LoraTrainerError] = {}

    def base(self, config: BaseModelConfig, retry_budget: RetryBudget) -> Base:
        """Return the identified base. Raise as `identify_base` does."""
        if config not in self._bases:
            self._bases[config] = identify_base(config, retry_budget)
        return self._bases[config]

    def start(self, open_one: OpenBackend, config: RunConfig, interruption: Interruption) -> tuple[Backend, dict[str, object]]:
        """Return the started backend and its environment. The personas of a process differ in nothing that a backend reads."""
        if (refusal := self._refused.get(open_one)) is not None:
            # a stack that failed halfway through its import can't be imported again
            raise refusal
        if open_one not in self._started:
            backend = open_one(config, interruption)
            try:
                self._started[open_one] = (backend, backend.start())
            except LoraTrainerError as error:
                self._refused[open_one] = error
                raise
        return self._started[open_one]

    def release(self) -> None:
        """Unload every base. The next persona that needs one loads it again."""
        for backend, _ in self._started.values():
            backend.release()

    def device_answers(self) -> bool:
        """Whether the device still works; True if no backend was started."""
        return all(backend.is_device_working() for backend, _ in self._started.values())

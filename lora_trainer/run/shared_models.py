"""Bases and backends that all personas of a process share, so that each is hashed or started only once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lora_trainer.base_files.check import BaseFiles, check_base
from lora_trainer.base_model import Base, identify_base, require_base
from lora_trainer.config import BaseModelConfig, RunConfig
from lora_trainer.errors import ConfigError, LoraTrainerError
from lora_trainer.signals import Interruption
from lora_trainer.store.retry import RetryBudget
from lora_trainer.train.backends import Backend

OpenBackend = Callable[[RunConfig, Interruption], Backend]
"""`open_backend` or `open_reference_backend`."""


class SharedModels:
    """Caches identified bases and started backends."""

    def __init__(self) -> None:
        self._bases: dict[BaseModelConfig, Base] = {}
        self._checked: set[BaseModelConfig] = set()
        self._broken: dict[BaseModelConfig, ConfigError] = {}
        self._started: dict[OpenBackend, tuple[Backend, dict[str, object]]] = {}
        self._refused: dict[OpenBackend, LoraTrainerError] = {}

    def require_base(self, config: BaseModelConfig, retry_budget: RetryBudget) -> None:
        """Check the base's files by their headers, once per process. Raises as `base_model.require_base` does."""
        if (refusal := self._broken.get(config)) is not None:
            # a template that loops takes seconds, and the next persona would wait for it again
            raise refusal
        if config in self._checked:
            return
        try:
            require_base(config, retry_budget)
        except ConfigError as error:
            self._broken[config] = error
            raise
        self._checked.add(config)

    def base(
        self, config: BaseModelConfig, retry_budget: RetryBudget, work_dir: Path | None = None, *, read_all: bool = False
    ) -> Base:
        """Return the base, checked and identified. Raises as `base_model.require_base` and `identify_base` do."""
        if config not in self._bases:
            # first, because copying and hashing gigabytes takes longer
            self.require_base(config, retry_budget)
            base = identify_base(config, retry_budget, work_dir, read_all=read_all)
            if base.folder is not None and config.model.startswith("s3://"):
                # the copy as well: a disk may have damaged it since it was fetched
                check_base(BaseFiles.of_folder(base.folder))
            self._bases[config] = base
        return self._bases[config]

    def start(self, open_one: OpenBackend, config: RunConfig, interruption: Interruption) -> tuple[Backend, dict[str, object]]:
        """Return the started backend and its environment. A backend reads no setting that differs between personas.

        `Backend.configure` gives it the settings that differ between the trials of a sweep.
        """
        if (refusal := self._refused.get(open_one)) is not None:
            # don't try again: Python cannot import a stack again that failed halfway
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
        """Unload every base. The next persona loads its base again."""
        for backend, _ in self._started.values():
            backend.release()

    def device_answers(self) -> bool:
        """Return whether the device still works; True if no backend was started."""
        return all(backend.is_device_working() for backend, _ in self._started.values())

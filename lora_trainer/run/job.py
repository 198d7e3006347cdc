"""State shared by the steps of a run: one persona's settings and timings, and the resources of the process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import structlog
from rich.console import Console

from lora_trainer.base_model import Base
from lora_trainer.config import RunConfig
from lora_trainer.logs import get_logger
from lora_trainer.persona.prompt import PROMPT_VERSION
from lora_trainer.run.progress import RunProgress
from lora_trainer.run.shared_models import OpenBackend, SharedModels
from lora_trainer.signals import Interruption
from lora_trainer.store.interface import Storage
from lora_trainer.store.opening import open_storage
from lora_trainer.store.retry import RetryBudget
from lora_trainer.train.backends import Backend, open_backend


@dataclass(frozen=True, slots=True)
class ProcessContext:
    """Resources shared by all personas of a process. The command line creates it."""

    interruption: Interruption = field(default_factory=Interruption)
    retry_budget: RetryBudget = field(default_factory=RetryBudget)
    console: Console | None = None
    """Terminal for progress bars; None for no bars."""
    fresh: bool = False
    """Whether to discard what earlier attempts left: their checkpoints, and the remembered hashes of the base's files."""
    models: SharedModels = field(default_factory=SharedModels)
    prompt_version: int = PROMPT_VERSION
    """Prompt version that new adapters are trained on. Only benchmarks that compare prompts set an earlier one."""

    def storage(self, uri: str) -> Storage:
        """Open the storage at `uri`. Its retries draw on this process's budget."""
        return open_storage(uri, self.retry_budget)

    def base(self, config: RunConfig) -> Base:
        """Return the configured base, checked and identified. Raises as `SharedModels.base` does."""
        return self.models.base(config.base, self.retry_budget, config.work_dir, read_all=self.fresh)


@dataclass
class Job:
    """Settings, timings and resources of one persona's run."""

    config: RunConfig
    process: ProcessContext = field(default_factory=ProcessContext)
    started_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    counter: int | None = None
    """The run's place in the order of starts, which decides whether `latest.json` moves; None until the run has its lease."""
    timings_s: dict[str, float] = field(default_factory=dict)
    environment: dict[str, object] = field(default_factory=dict)
    """Device and library versions, as reported by the backend."""

    @property
    def log(self) -> structlog.stdlib.BoundLogger:
        """The project's logger."""
        return get_logger()

    @cached_property
    def output(self) -> Storage:
        """Storage to publish adapters in."""
        return self.process.storage(self.config.output)

    def run_dir(self, run_id: str) -> Path:
        """Return the local folder of the run."""
        return self.config.work_dir / "runs" / self.config.blood_type / run_id

    def progress(self, folder: Path, run_id: str) -> RunProgress:
        """Return a progress tracker that writes `progress.json` in `folder`."""
        return RunProgress(folder / "progress.json", run_id, self.config.blood_type, self.process.console)

    def start(self, progress: RunProgress, open_one: OpenBackend = open_backend) -> Backend:
        """Import the training stack and check the device. Call this after everything that can fail without a GPU."""
        progress.stage("start")
        with self.timed("import"):
            backend, environment = self.process.models.start(open_one, self.config, self.process.interruption)
        self.environment.update(environment)
        self.log.info("backend_started", backend=backend.name, **self.environment)
        return backend

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the duration of the block to the manifest's timings."""
        started_s = time.perf_counter()
        yield
        self.timings_s[name] = round(self.timings_s.get(name, 0.0) + time.perf_counter() - started_s, 3)

"""How long a failing object store is given: one budget for each object, one for all together, and jitter between the tries.

What does not pass by itself (a refusal, a missing bucket, a full disk) is never tried again; what may (`PassingError`)
is, until it goes well or a budget is used up.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from typing import Final

from lora_trainer.config import ENVIRONMENT_PREFIX, StorageConfig
from lora_trainer.config_sources import settle
from lora_trainer.errors import StorageError

_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 20.0
_VARIABLES: Final = f"{ENVIRONMENT_PREFIX}STORAGE__"


class TransientError(StorageError):
    """A fault that may be over at the next try: throttled, unreachable, broken off, damaged on the way."""


class RetryBudget:
    """What a process has left to lose on a failing store. For all threads together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._settings: StorageConfig | None = None
        self._lost_s = 0.0

    def begin(self, settings: StorageConfig | None) -> None:
        """A run begins, and nothing is lost yet; None: what the environment says, as before the first run."""
        with self._lock:
            self._settings, self._lost_s = settings, 0.0

    @property
    def settings(self) -> StorageConfig:
        """Those of the run; before one, or in a command without one, those of the environment. Raises `ConfigError`."""
        if self._settings is not None:
            return self._settings
        own = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
        return settle({}, own, fallback={"blood_type": "A"}).storage

    def lose(self, seconds: float) -> float:
        """Count what an operation lost; gives what all of them together have left."""
        with self._lock:
            self._lost_s += seconds
            return max(0.0, self.settings.total_budget_s - self._lost_s)


RETRY_BUDGET: Final = RetryBudget()
"""This process's."""


class Retries:
    """One operation on one object, from its first try to the end."""

    def __init__(self, patience: RetryBudget = RETRY_BUDGET) -> None:
        self._patience = patience
        self._budget_s = patience.settings.object_budget_s
        self._started_s = time.monotonic()
        self._first_failed_s: float | None = None
        self._counted_s = 0.0
        self.failures = 0
        self.last: TransientError | None = None
        """What the last try failed with."""
        self._used_up = ""

    def failed(self, fault: TransientError) -> float | None:
        """A try failed: how long to wait for the next one, in seconds, or None when a budget is used up.

        Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
        """
        now_s = time.monotonic()
        if self._first_failed_s is None:
            self._first_failed_s = self._counted_s = now_s
        self.failures += 1
        self.last = fault
        left_s = self._budget_s - (now_s - self._first_failed_s)
        all_left_s = self._lost_until(now_s)
        if left_s <= 0:
            self._used_up = f"storage.object_budget_s={self._budget_s:g}"
            return None
        if all_left_s <= 0:
            self._used_up = f"storage.total_budget_s={self._patience.settings.total_budget_s:g}, for all objects together,"
            return None
        longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self.failures - 1, 10))
        return min(secrets.SystemRandom().uniform(0, longest_s), left_s, all_left_s)

    def ended(self) -> None:
        """However it ended, what it lost since the first failure counts."""
        if self._first_failed_s is not None:
            self._lost_until(time.monotonic())

    def _lost_until(self, now_s: float) -> float:
        since_s, self._counted_s = self._counted_s, now_s
        return self._patience.lose(now_s - since_s)

    @property
    def summary(self) -> str:
        """How often and how long, in words."""
        times = "once" if self.failures == 1 else f"{self.failures} times"
        return f"tried {times} in {time.monotonic() - self._started_s:.0f} s: {self._used_up} is used up"

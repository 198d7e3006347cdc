"""Retry requests to an object store, with jittered pauses, a time budget per object and a shared one per run.

Only a `TransientError` is retried. Refused access, missing buckets and full disks do not go away by themselves. A store that has
never answered is given up within seconds (`lora_trainer.store.contacts`).
"""

from __future__ import annotations

import math
import os
import secrets
import threading
import time
from collections.abc import Callable
from typing import Final, Self, TypeVar

import structlog

from lora_trainer.config import ENVIRONMENT_PREFIX, StorageConfig
from lora_trainer.config_sources import settle
from lora_trainer.errors import ConfigError, LoraTrainerError, StorageError
from lora_trainer.store.contacts import Contact, Contacts

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

_DEFAULT_SETTINGS: Final = StorageConfig()
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 20.0
_VARIABLES: Final = f"{ENVIRONMENT_PREFIX}STORAGE__"


class TransientError(StorageError):
    """A fault that may not recur: throttling, a lost connection, a truncated or corrupted transfer."""


class UnreachableError(TransientError):
    """The store did not answer, or something else answered in its place."""

    def __init__(self, problem: str, *, may_be_scheme: bool = False) -> None:
        """`may_be_scheme`: the port may expect HTTPS instead of HTTP, or the other way round."""
        self.may_be_scheme = may_be_scheme
        super().__init__(problem)


class RetryBudget:
    """The time that one run may spend on retries, shared by all of its storages. Thread-safe."""

    def __init__(self, settings: StorageConfig = _DEFAULT_SETTINGS, contacts: Contacts | None = None) -> None:
        """`contacts` are the stores that have answered; by default none has."""
        self.settings: Final = settings
        self.contacts: Final = contacts or Contacts()
        self._lock = threading.Lock()
        self._spent_s = 0.0

    def spend(self, seconds: float) -> float:
        """Subtract `seconds` and return the rest of `total_budget_s`."""
        with self._lock:
            self._spent_s += seconds
            return max(0.0, self.settings.total_budget_s - self._spent_s)


def budget_from_environment() -> RetryBudget:
    """Return a budget with the `LORA_TRAINER_STORAGE__*` settings, for a command without a run configuration.

    Raises `ConfigError` for an invalid value.
    """
    variables = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
    # settle() requires a persona, which the command may not have
    return RetryBudget(settle({}, variables, fallback={"blood_type": "A"}).storage)


def retry(
    attempt: Callable[[bool], _T],
    budget: RetryBudget,
    where: str,
    *,
    permanent: Callable[[TransientError, TransientError | None], LoraTrainerError | None],
    contact: Contact,
    kept: str = "",
) -> _T:
    """Return the result of `attempt`, repeating it after transient faults while the budgets last.

    The argument of `attempt` is True for a repetition. `permanent` gets a fault and the one before, and returns the error to end
    with if another attempt can't help. `where` names the object in the log, `kept` what a failure leaves intact. Until the store of
    `contact` has answered, the first contact bounds the attempts as well, and only once per store.
    """
    if contact.given_up:
        raise (ConfigError if contact.is_no_store else StorageError)(f"{where}: {contact.given_up}")
    contact.first_contact_left_s()
    with Retries(budget, contact) as retries:
        while True:
            try:
                return attempt(retries.failures > 0)
            except TransientError as error:
                fault, before = error, retries.last_fault
            if (final := permanent(fault, before)) is not None:
                raise final from fault
            pause_s = retries.pause_s_after(fault)
            if pause_s is None:
                if isinstance(fault, UnreachableError) and not contact.answered:
                    contact.given_up = "; ".join((str(fault).removeprefix(f"{where}: "), "not asked again"))
                raise StorageError("; ".join(filter(None, (str(fault), retries.summary, kept)))) from fault
            _log.warning("storage_retry", uri=where, problem=str(fault), failures=retries.failures, pause_s=round(pause_s, 1))
            time.sleep(pause_s)


class Retries:
    """The attempts at one operation on one object.

    On exit, the context manager charges the time since the first failure to the budget.
    """

    def __init__(self, budget: RetryBudget, contact: Contact | None = None) -> None:
        self._budget = budget
        self._contact = contact
        self._started_s = time.monotonic()
        self._first_failure_s: float | None = None
        self._charged_until_s = 0.0
        self._exhausted = ""
        self.failures = 0
        self.last_fault: TransientError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._first_failure_s is not None:
            self._charge(time.monotonic())

    def pause_s_after(self, fault: TransientError) -> float | None:
        """Record a failed attempt. Return the seconds to wait before the next one, or None if a budget is exhausted.

        Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
        """
        now_s = time.monotonic()
        if self._first_failure_s is None:
            self._first_failure_s = self._charged_until_s = now_s
        self.failures += 1
        self.last_fault = fault
        object_left_s = self._budget.settings.object_budget_s - (now_s - self._first_failure_s)
        total_left_s = self._charge(now_s)
        if object_left_s <= 0:
            self._exhausted = "storage.object_budget_s"
            return None
        if total_left_s <= 0:
            self._exhausted = "storage.total_budget_s, shared by all objects"
            return None
        contact_left_s = self._contact.first_contact_left_s() if self._contact and isinstance(fault, UnreachableError) else None
        if contact_left_s is not None and contact_left_s <= 0:
            self._exhausted = "it has never answered; after an answer, storage.object_budget_s applies"
            return None
        longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self.failures - 1, 10))
        pause_s = secrets.SystemRandom().uniform(0, longest_s)
        return min(pause_s, object_left_s, total_left_s, math.inf if contact_left_s is None else contact_left_s)

    @property
    def summary(self) -> str:
        """Message text about the attempts: their number, their duration, and the exhausted budget."""
        attempts = "1 attempt" if self.failures == 1 else f"{self.failures} attempts"
        return f"gave up after {attempts} in {time.monotonic() - self._started_s:.0f} s ({self._exhausted})"

    def _charge(self, now_s: float) -> float:
        since_s, self._charged_until_s = self._charged_until_s, now_s
        return self._budget.spend(now_s - since_s)

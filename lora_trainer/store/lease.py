"""Leases: only one attempt works on a run at a time. An object next to the checkpoints names the holder, who renews it.

Clocks of different machines are never compared. A waiting attempt measures with its own clock how long the object has been
unchanged; the lease expires after the duration that the object states. The holder counts from before it sent its last renewal,
so it notices the expiry before anyone else. docs/adr/0011-leases.md explains the design.
"""

from __future__ import annotations

import contextvars
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from pydantic import Field, ValidationError

from lora_trainer.config import LeaseConfig, StorageConfig
from lora_trainer.errors import LoraTrainerError, StorageError
from lora_trainer.logs import get_logger
from lora_trainer.store.interface import NO_ETAG, PreconditionFailed, Storage
from lora_trainer.store.process_identity import Document, Process, is_gone, this_process
from lora_trainer.store.retry import RetryBudget

_RENEWALS: Final = 3
"""Renewals per lease duration, of which two may fail."""
_LONGEST_POLL_S: Final = 2.0
_LOG_AGAIN_S: Final = 60.0
_RELEASE_S: Final = 5.0
"""Timeout of the release when the process ends. A lease that is not released expires."""
_SETTLE_S: Final = 1.0
"""Pause for concurrent writes to finish; longer than any write. Without conditional writes, the last writer is the holder."""
_MOST_DURATION_S: Final = 86_400.0
_WEEK_S: Final = 604_800.0


class LeaseLostError(StorageError):
    """Another attempt has taken over, so this one must stop writing."""


class Record(Document):
    """The content of the lease's object."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    holder: str
    """Random 16 hex digits, new for each attempt."""
    attempt: int = Field(ge=0)
    """Number of this attempt at the run, from 1."""
    host: str = Field(max_length=255)
    duration_s: float = Field(gt=0, le=_MOST_DURATION_S)
    """Time to live, counted from each write."""
    acquired_at: str = Field(default="", max_length=64)
    renewed_at: str = Field(default="", max_length=64)
    renewals: int = 0
    released_at: str | None = None
    process: Process | None = None

    def as_bytes(self) -> bytes:
        """Return the record as JSON."""
        return (self.model_dump_json(indent=2, by_alias=True) + "\n").encode()

    @property
    def described_holder(self) -> str:
        """Description of the holder, for messages."""
        pid = f", process {self.process.pid}" if self.process else ""
        return f"attempt {self.attempt} on host {self.host}{pid}, since {self.acquired_at}, last renewed at {self.renewed_at}"


def parse_record(data: bytes) -> Record | None:
    """Return the lease in `data`, or None if this version cannot read it."""
    try:
        return Record.model_validate_json(data)
    except ValidationError:
        return None


@dataclass(frozen=True, slots=True)
class _Seen:
    """The lease's object as read from the store."""

    record: Record | None
    """None if this version cannot read it as a lease."""
    etag: str


FreeReason = Literal["absent", "released", "expired", "its process is gone"]
"""Why an attempt may take the lease."""


class Lease:
    """One attempt's lease on one run. `stop_if_lost`, `check` and `confirm` may be called from any thread."""

    def __init__(self, config: LeaseConfig, storage: Storage, key: str) -> None:
        self._config = config
        self._storage = storage
        # retry a renewal until the next one is due, on a separate budget that does not consume the writers'
        renewal_budget = RetryBudget(StorageConfig(object_budget_s=config.duration_s / _RENEWALS, total_budget_s=_WEEK_S))
        self._renewal_storage = storage.adapted(retry_budget=renewal_budget)
        self._key = key
        self._record = Record(
            holder=secrets.token_hex(8),
            attempt=0,
            host=socket.gethostname(),
            duration_s=config.duration_s,
            process=this_process(),
        )
        self._etag = ""
        self._good_until_s = 0.0
        self._lost = ""
        self._written = False
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self.exclusive = True
        """Whether the store enforces conditional writes. If not, a second holder is possible, so each has its own checkpoints."""

    @property
    def holder(self) -> str:
        """Id of this attempt, 16 hex digits."""
        return self._record.holder

    @property
    def where(self) -> str:
        """URI of the lease's object, for messages."""
        return self._storage.uri + self._key

    # -- acquire ------------------------------------------------------------------------------------

    def acquire(self) -> None:
        """Take the lease, waiting up to `lease.wait_s` for another holder, and renew it in the background from then on.

        Raises `StorageError` if another attempt still holds it after that, or the store cannot be reached.
        """
        started_s = time.monotonic()
        while True:
            free = self._take(started_s)
            self.exclusive = self._enforces_conditions()
            if self.exclusive or self._has_settled():
                break
        if not self.exclusive:
            get_logger().warning("lease_not_exclusive", where=self.where)
        get_logger().info(
            "lease_taken", attempt=self._record.attempt, because=free, waited_s=round(time.monotonic() - started_s, 1)
        )
        self._start_thread(self._keep_renewing)

    def _take(self, started_s: float) -> FreeReason:
        watched_etag, unchanged_since_s, logged_s = "", 0.0, -_LOG_AGAIN_S
        free: FreeReason = "absent"
        while True:
            asked_s = time.monotonic()
            seen = self._read()
            if self._adopt(seen):
                # our write succeeded, even if its response was lost
                return free
            if seen is None:
                self._try_to_claim(None)
                continue
            if seen.etag != watched_etag:
                # the object may have just changed, so count the duration from now
                watched_etag, unchanged_since_s = seen.etag, time.monotonic()
            if found := _why_free(seen.record, asked_s - unchanged_since_s, self._config.duration_s):
                free = found
                self._try_to_claim(seen)
                continue
            if asked_s - started_s >= self._config.wait_s:
                raise self._still_held(seen.record)
            if asked_s - logged_s >= _LOG_AGAIN_S:
                logged_s = asked_s
                self._log_waiting(seen.record)
            time.sleep(min(_LONGEST_POLL_S, self._config.duration_s / 10))

    def _try_to_claim(self, seen: _Seen | None) -> None:
        """Try to replace `seen` with our lease. The caller reads the object again to find out whether that succeeded."""
        before = seen.record.attempt if seen and seen.record else 0
        now = _utc_now()
        self._record = _changed(self._record, attempt=before + 1, acquired_at=now, renewed_at=now, renewals=0)
        self._written = True
        sent_s = _clock_s()
        with suppress(PreconditionFailed):
            self._storage.write_bytes(
                self._key, self._record.as_bytes(), if_match=seen.etag if seen else None, if_absent=seen is None
            )
        self._good_until_s = sent_s + self._config.duration_s

    def _has_settled(self) -> bool:
        """Wait for concurrent unconditional writes to finish, and return whether the lease is still ours."""
        time.sleep(_SETTLE_S)
        return self._adopt(self._read())

    def _enforces_conditions(self) -> bool:
        """Return whether the store keeps conditions. Some stores ignore them, others refuse a write whose condition holds."""
        # the probe is a valid renewal, in case the store writes it
        probe = _changed(self._record, renewals=self._record.renewals + 1).as_bytes()
        try:
            self._storage.write_bytes(self._key, probe, if_absent=True)
            return False
        except PreconditionFailed:
            pass
        try:
            self._storage.write_bytes(self._key, probe, if_match=NO_ETAG)
            return False
        except PreconditionFailed:
            pass
        with suppress(PreconditionFailed):
            self._storage.write_bytes(self._key, probe, if_match=self._etag)
        return self._storage.conditional_writes and self._adopt(self._read())

    def _still_held(self, record: Record | None) -> StorageError:
        holder = record.described_holder if record else "a holder whose lease this version cannot read"
        return StorageError(
            f"{self.where}: another attempt is working on this run: {holder}; waited {self._config.wait_s:.0f} s (lease.wait_s) "
            "for it to finish or to stop renewing its lease; wait for it or stop it, then run the same command again"
        )

    def _log_waiting(self, record: Record | None) -> None:
        get_logger().warning(
            "lease_waiting",
            where=self.where,
            attempt=record.attempt if record else None,
            host=record.host if record else None,
            acquired_at=record.acquired_at if record else None,
            renewed_at=record.renewed_at if record else None,
            expires_without_renewal_s=record.duration_s if record else self._config.duration_s,
            at_most_s=self._config.wait_s,
        )

    # -- hold ---------------------------------------------------------------------------------------

    def stop_if_lost(self) -> None:
        """Raise `LeaseLostError` if another attempt is known to have taken over. Sends no request."""
        if self._lost:
            raise LeaseLostError(self._lost)

    def check(self) -> None:
        """Verify the lease before a write that others see. Sends a request only if the lease may have expired.

        Raises `LeaseLostError` if another attempt has taken over, `StorageError` if the lease cannot be read or renewed.
        """
        self.stop_if_lost()
        if _clock_s() >= self._good_until_s:
            self.confirm()

    def confirm(self) -> None:
        """Renew the lease now, before a write that cannot be undone. Raises as `check` does."""
        self._confirm(self._storage)

    def _confirm(self, storage: Storage) -> None:
        with self._lock:
            self.stop_if_lost()
            # the first try fails if an earlier renewal succeeded and its response was lost
            for _ in range(2):
                if self._renew(storage):
                    return
        raise StorageError(f"{self.where}: the lease could not be renewed: the object keeps changing; run the same command again")

    def _renew(self, storage: Storage) -> bool:
        if not self.exclusive:
            # read first: this store would let us overwrite another attempt's lease
            self._adopt_or_stop(_read(storage, self._key))
        sent_s = _clock_s()
        renewed = _changed(self._record, renewed_at=_utc_now(), renewals=self._record.renewals + 1)
        with suppress(PreconditionFailed):
            storage.write_bytes(self._key, renewed.as_bytes(), if_match=self._etag)
        self._adopt_or_stop(_read(storage, self._key))
        if self._record.renewals != renewed.renewals:
            return False
        self._good_until_s = sent_s + self._config.duration_s
        return True

    def _adopt_or_stop(self, seen: _Seen | None) -> None:
        if self._adopt(seen):
            return
        now = "it was deleted" if seen is None else f"{seen.record.described_holder} has it" if seen.record else "it is unreadable"
        self._lost = (
            f"{self.where}: this attempt ({self._record.attempt}, since {self._record.acquired_at}) has lost its lease: {now}; it "
            f"was paused or disconnected for more than {self._config.duration_s:.0f} s (lease.duration_s) and has stopped writing; "
            "run the same command again: it resumes from the newest checkpoint, or finds the work done"
        )
        get_logger().error("lease_lost", where=self.where, attempt=self._record.attempt, now=now)
        raise LeaseLostError(self._lost)

    def _keep_renewing(self) -> None:
        """Renew the lease until it is released or lost. Runs in a thread."""
        while not self._closing.wait(self._config.duration_s / _RENEWALS):
            try:
                self._confirm(self._renewal_storage)
            except LeaseLostError:
                return
            except LoraTrainerError as error:
                # keep going: writers check the lease themselves, and a later renewal may succeed
                get_logger().warning("lease_not_renewed", where=self.where, problem=str(error))

    # -- release ------------------------------------------------------------------------------------

    def release(self, *, done: bool) -> None:
        """Let the next attempt take the lease at once. With `done`, the work is complete and the object is deleted.

        Waits at most a few seconds and never raises: a lease that is not released expires.
        """
        self._closing.set()
        if self._lost or not self._written:
            return
        released = threading.Event()

        def send_release() -> None:
            try:
                with self._lock:
                    self._delete_or_mark_released(done=done)
                released.set()
            except (LoraTrainerError, PreconditionFailed) as error:
                get_logger().warning("lease_not_released", where=self.where, problem=str(error))

        self._start_thread(send_release).join(_RELEASE_S)
        if not released.is_set():
            get_logger().warning("lease_not_released", where=self.where, problem=f"not within {_RELEASE_S:.0f} s")

    def _delete_or_mark_released(self, *, done: bool) -> None:
        if not self._adopt(self._read()):
            return
        if done:
            # safe even if another attempt takes the lease right now: it first looks for the finished bundle
            self._storage.delete(self._key)
            return
        self._storage.write_bytes(self._key, _changed(self._record, released_at=_utc_now()).as_bytes(), if_match=self._etag)

    # -- the object ---------------------------------------------------------------------------------

    def _read(self) -> _Seen | None:
        return _read(self._storage, self._key)

    def _adopt(self, seen: _Seen | None) -> bool:
        """Return whether `seen` is our lease. If it is, keep its record and etag."""
        if seen is None or seen.record is None or seen.record.holder != self.holder:
            return False
        self._record, self._etag = seen.record, seen.etag
        return True

    def _start_thread(self, work: Callable[[], None]) -> threading.Thread:
        # a daemon thread, so that a hanging request cannot block exit; the context contains the logger's bound fields
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(work,), name="lease", daemon=True)
        thread.start()
        return thread


@contextmanager
def hold(config: LeaseConfig, storage: Storage, key: str) -> Iterator[Lease]:
    """Hold the lease for the duration of the block. Raises as `Lease.acquire` does."""
    lease = Lease(config, storage, key)
    try:
        lease.acquire()
        yield lease
    except BaseException:
        lease.release(done=False)
        raise
    lease.release(done=True)


def is_left_over(storage: Storage, key: str) -> bool:
    """Return whether the lease is missing, released, or held by a process of this machine that has ended.

    Raises `StorageError`.
    """
    seen = _read(storage, key)
    return seen is None or _why_free(seen.record, 0.0, 1.0) is not None


def _read(storage: Storage, key: str) -> _Seen | None:
    found = storage.read_bytes(key)
    return _Seen(parse_record(found.data), found.etag) if found else None


def _why_free(record: Record | None, unchanged_s: float, default_s: float) -> FreeReason | None:
    if record and record.released_at:
        return "released"
    if record and record.process and is_gone(record.process, record.host):
        return "its process is gone"
    return "expired" if unchanged_s >= (record.duration_s if record else default_s) else None


def _clock_s() -> float:
    """Return a monotonic time. On Linux, it also counts while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _changed(record: Record, **changes: object) -> Record:
    return record.model_copy(update=changes)

"""One attempt at a run at a time: an object beside the checkpoints that names who is at work and has to be renewed.

Nobody trusts another machine's clock. Who waits watches the object: when it has not changed for as long as its holder said
that it is good for, by the watcher's own clock, it has expired. The holder counts from before it sent its last renewal, so
it knows earlier than anyone else. Why it is so: docs/adr/0011-leases.md.
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
from lora_trainer.store.interface import PreconditionFailed, Storage
from lora_trainer.store.process_identity import Document, Process, is_gone, this_process
from lora_trainer.store.retry import RetryBudget

_RENEWALS: Final = 3
"""In the time that a lease is good for: two may fail."""
_LONGEST_POLL_S: Final = 2.0
_SAY_AGAIN_S: Final = 60.0
_RELEASE_S: Final = 5.0
"""How long the end of a process waits for the release; one that does not get through expires."""
_SETTLE_S: Final = 1.0
"""Longer than a write takes: without conditional writes, who wrote last is the holder."""
_MOST_DURATION_S: Final = 86_400.0
_WEEK_S: Final = 604_800.0
_NO_ETAG: Final = f'"{"0" * 32}"'


class LeaseLostError(StorageError):
    """Another attempt has taken this one's place, which must write nothing more."""


class Record(Document):
    """What the lease's object says."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    holder: str
    """Random; another one for each attempt."""
    attempt: int = Field(ge=0)
    """Counts the attempts at this run."""
    host: str = Field(max_length=255)
    duration_s: float = Field(gt=0, le=_MOST_DURATION_S)
    """How long it is good for behind each change of the object."""
    acquired_at: str = Field(default="", max_length=64)
    renewed_at: str = Field(default="", max_length=64)
    renewals: int = 0
    released_at: str | None = None
    process: Process | None = None

    def as_bytes(self) -> bytes:
        """JSON."""
        return (self.model_dump_json(indent=2, by_alias=True) + "\n").encode()

    @property
    def whose(self) -> str:
        """For messages."""
        pid = f", process {self.process.pid}" if self.process else ""
        return f"attempt {self.attempt} on host {self.host}{pid}, since {self.acquired_at}, last renewed at {self.renewed_at}"


def parse_record(data: bytes) -> Record | None:
    """None for what is no lease of this version."""
    try:
        return Record.model_validate_json(data)
    except ValidationError:
        return None


@dataclass(frozen=True, slots=True)
class _Seen:
    """The lease's object as read."""

    record: Record | None
    """None: it can't be read as a lease."""
    etag: str


Free = Literal["absent", "released", "expired", "its process is gone"]


class Lease:
    """Of one run, for one attempt. `check` and `confirm` may be called from any thread."""

    def __init__(self, config: LeaseConfig, storage: Storage, key: str) -> None:
        self._config = config
        self._storage = storage
        # the next renewal replaces one that takes this long; its own budget keeps retries from consuming the writers'
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
        """Whether the store's conditional writes keep a second holder out; where it has none, each attempt keeps to itself."""

    @property
    def holder(self) -> str:
        """Names this attempt: 16 hex digits."""
        return self._record.holder

    @property
    def where(self) -> str:
        """For messages."""
        return self._storage.uri + self._key

    # -- taking it ----------------------------------------------------------------------------------

    def acquire(self) -> None:
        """Take the lease, waiting for another holder as long as `lease.wait_s` says, and keep it from then on.

        Raises `StorageError` when somebody else has it to the end, or the store can't be asked.
        """
        started_s = time.monotonic()
        while True:
            free = self._take(started_s)
            self.exclusive = self._compares()
            if self.exclusive or self._has_settled():
                break
        if not self.exclusive:
            get_logger().warning("lease_not_exclusive", where=self.where)
        get_logger().info(
            "lease_taken", attempt=self._record.attempt, because=free, waited_s=round(time.monotonic() - started_s, 1)
        )
        self._start_thread(self._keep)

    def _take(self, started_s: float) -> Free:
        watched, since_s, said_s = "", 0.0, -_SAY_AGAIN_S
        free: Free = "absent"
        while True:
            asked_s = time.monotonic()
            seen = self._read()
            if self._adopt(seen):
                # what was written came through, whatever its answer was
                return free
            if seen is None:
                self._claim(None)
                continue
            if seen.etag != watched:
                # it changed somewhere before now, and the clock starts anew
                watched, since_s = seen.etag, time.monotonic()
            if found := _why_free(seen.record, asked_s - since_s, self._config.duration_s):
                free = found
                self._claim(seen)
                continue
            if asked_s - started_s >= self._config.wait_s:
                raise self._still_held(seen.record)
            if asked_s - said_s >= _SAY_AGAIN_S:
                said_s = asked_s
                self._say_waiting(seen.record)
            time.sleep(min(_LONGEST_POLL_S, self._config.duration_s / 10))

    def _claim(self, seen: _Seen | None) -> None:
        """Write the lease over what was seen. Whether that worked is what the next look tells."""
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
        """Without conditional writes: whether nobody who looked at the same moment wrote over it."""
        time.sleep(_SETTLE_S)
        return self._adopt(self._read())

    def _compares(self) -> bool:
        """Whether the store refuses what its conditions forbid. Some take the header and write all the same."""
        # what would be written is a renewal, so that nothing is lost where it is
        probe = _changed(self._record, renewals=self._record.renewals + 1).as_bytes()
        try:
            self._storage.write_bytes(self._key, probe, if_absent=True)
            return False
        except PreconditionFailed:
            pass
        try:
            self._storage.write_bytes(self._key, probe, if_match=_NO_ETAG)
            return False
        except PreconditionFailed:
            return self._storage.conditional_writes

    def _still_held(self, record: Record | None) -> StorageError:
        whose = record.whose if record else "somebody whose lease this version can't read"
        return StorageError(
            f"{self.where}: another run of this id is at work: {whose}; waited {self._config.wait_s:.0f} s (lease.wait_s) for it "
            "to end or to stop renewing its lease; let it end, or end it, then run the same command again"
        )

    def _say_waiting(self, record: Record | None) -> None:
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

    # -- having it ----------------------------------------------------------------------------------

    def stop_if_lost(self) -> None:
        """Asks nobody. Raises `LeaseLostError` if another attempt is known to have taken over."""
        if self._lost:
            raise LeaseLostError(self._lost)

    def check(self) -> None:
        """Before anything is written that others see: asks the store only where time alone can't tell.

        Raises `LeaseLostError` if another attempt has taken over, `StorageError` if that can't be found out.
        """
        self.stop_if_lost()
        if _clock_s() >= self._good_until_s:
            self.confirm()

    def confirm(self) -> None:
        """Renew now, before what can't be taken back. Raises as `check` does."""
        self._confirm(self._storage)

    def _confirm(self, storage: Storage) -> None:
        with self._lock:
            self.stop_if_lost()
            # a second time where an earlier renewal came through whose answer was lost
            for _ in range(2):
                if self._renew(storage):
                    return
        raise StorageError(f"{self.where}: the lease could not be renewed: it changes under our hands; run the same command again")

    def _renew(self, storage: Storage) -> bool:
        if not self.exclusive:
            # a store that does not compare would let us write over another's
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
        now = "it is gone" if seen is None else f"{seen.record.whose} has it" if seen.record else "it is no lease any more"
        self._lost = (
            f"{self.where}: this attempt ({self._record.attempt}, since {self._record.acquired_at}) has lost its lease: {now}; it "
            f"was paused or cut off for more than {self._config.duration_s:.0f} s (lease.duration_s) and writes nothing more; run "
            "the same command again: it goes on from the newest checkpoint, or finds the work done"
        )
        get_logger().error("lease_lost", where=self.where, attempt=self._record.attempt, now=now)
        raise LeaseLostError(self._lost)

    def _keep(self) -> None:
        """In a thread of its own."""
        while not self._closing.wait(self._config.duration_s / _RENEWALS):
            try:
                self._confirm(self._renewal_storage)
            except LeaseLostError:
                return
            except LoraTrainerError as error:
                # nothing is written without it, and it may be had again
                get_logger().warning("lease_not_renewed", where=self.where, problem=str(error))

    # -- giving it back -----------------------------------------------------------------------------

    def release(self, *, done: bool) -> None:
        """Let the next one have it at once. `done`: nothing is left to do, and the object goes.

        Waits a few seconds at most, and raises nothing: what is not released expires.
        """
        self._closing.set()
        if self._lost or not self._written:
            return
        released = threading.Event()

        def give_back() -> None:
            try:
                with self._lock:
                    self._give_back(done=done)
                released.set()
            except (LoraTrainerError, PreconditionFailed) as error:
                get_logger().warning("lease_not_released", where=self.where, problem=str(error))

        self._start_thread(give_back).join(_RELEASE_S)
        if not released.is_set():
            get_logger().warning("lease_not_released", where=self.where, problem=f"not within {_RELEASE_S:.0f} s")

    def _give_back(self, *, done: bool) -> None:
        if not self._adopt(self._read()):
            return
        if done:
            # no harm if another one takes it just now: it looks for the finished bundle first
            self._storage.delete(self._key)
            return
        self._storage.write_bytes(self._key, _changed(self._record, released_at=_utc_now()).as_bytes(), if_match=self._etag)

    # -- the object ---------------------------------------------------------------------------------

    def _read(self) -> _Seen | None:
        return _read(self._storage, self._key)

    def _adopt(self, seen: _Seen | None) -> bool:
        """Go by what was read, if it is ours; gives whether it is."""
        if seen is None or seen.record is None or seen.record.holder != self.holder:
            return False
        self._record, self._etag = seen.record, seen.etag
        return True

    def _start_thread(self, work: Callable[[], None]) -> threading.Thread:
        # a daemon: a request that hangs must not keep the process from ending; the log's bound values come along
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(work,), name="lease", daemon=True)
        thread.start()
        return thread


@contextmanager
def hold(config: LeaseConfig, storage: Storage, key: str) -> Iterator[Lease]:
    """The lease for as long as the block lasts. Raises as `Lease.acquire` does."""
    lease = Lease(config, storage, key)
    try:
        lease.acquire()
        yield lease
    except BaseException:
        lease.release(done=False)
        raise
    lease.release(done=True)


def is_left_over(storage: Storage, key: str) -> bool:
    """Whether nobody is behind the lease any more, as far as can be told without waiting; also where there is none.

    Raises `StorageError`.
    """
    seen = _read(storage, key)
    return seen is None or _why_free(seen.record, 0.0, 1.0) is not None


def _read(storage: Storage, key: str) -> _Seen | None:
    found = storage.read_bytes(key)
    return _Seen(parse_record(found.data), found.etag) if found else None


def _why_free(record: Record | None, unchanged_s: float, default_s: float) -> Free | None:
    if record and record.released_at:
        return "released"
    if record and record.process and is_gone(record.process, record.host):
        return "its process is gone"
    return "expired" if unchanged_s >= (record.duration_s if record else default_s) else None


def _clock_s() -> float:
    """Counts the time that the machine sleeps, too, where the system can tell."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _changed(record: Record, **changes: object) -> Record:
    return record.model_copy(update=changes)

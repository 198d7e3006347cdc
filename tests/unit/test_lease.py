"""Test the lease: who holds it, who waits, who may take over, and that a holder learns of its loss before it writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from structlog.testing import capture_logs

from lora_trainer.config import LeaseConfig
from lora_trainer.config_sources import settle
from lora_trainer.errors import ConfigError, ExitCode, StorageError
from lora_trainer.store import lease as module
from lora_trainer.store import process_identity
from lora_trainer.store.interface import PreconditionFailed, Storage
from lora_trainer.store.lease import Lease, LeaseLostError, Record, hold, is_left_over, parse_record
from lora_trainer.store.local import FileStorage
from lora_trainer.store.process_identity import Process, is_gone, this_process

KEY = "runs/A/0123456789abcdef/lease.json"
LONG = LeaseConfig(duration_s=60, wait_s=600)


@pytest.fixture(autouse=True)
def polls_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST_POLL_S", 0.05)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return FileStorage(tmp_path / "out")


def config(duration_s: float, wait_s: float | None = None) -> LeaseConfig:
    """Return a configuration with shorter times than the settings allow, to keep the tests fast."""
    return LeaseConfig.model_construct(duration_s=duration_s, wait_s=wait_s or 30)


def record(storage: Storage) -> Record:
    found = storage.read_bytes(KEY)
    assert found is not None
    parsed = parse_record(found.data)
    assert parsed is not None
    return parsed


def put(storage: Storage, **changes: Any) -> Record:
    """Write the lease of a process on another machine."""
    settings: dict[str, Any] = {"holder": "f" * 16, "attempt": 3, "host": "elsewhere", "duration_s": 60.0, **changes}
    made = Record(acquired_at="2026-01-01T00:00:00+00:00", renewed_at="2026-01-01T00:00:20+00:00", **settings)
    storage.write_bytes(KEY, made.as_bytes())
    return made


def test_it_is_taken_renewed_and_gone_when_the_work_is_done(storage: Storage) -> None:
    with hold(config(0.3), storage, KEY) as lease:
        first = record(storage)
        assert (first.holder, first.attempt, first.duration_s, first.released_at) == (lease.holder, 1, 0.3, None)
        assert lease.exclusive
        deadline_s = time.monotonic() + 300
        while record(storage).renewals < first.renewals + 2 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert record(storage).renewals >= first.renewals + 2
        lease.check()
        lease.confirm()
    assert storage.read_bytes(KEY) is None


def test_a_failure_releases_it_and_the_next_attempt_need_not_wait(storage: Storage) -> None:
    with pytest.raises(KeyboardInterrupt), hold(LONG, storage, KEY):
        raise KeyboardInterrupt
    assert record(storage).released_at is not None
    with capture_logs() as events, hold(LONG, storage, KEY):
        assert record(storage).attempt == 2
    (taken,) = (event for event in events if event["event"] == "lease_taken")
    assert (taken["attempt"], taken["because"]) == (2, "released")


def test_it_holds_nothing_secret(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-recognisable-secret")
    with hold(LONG, storage, KEY):
        found = storage.read_bytes(KEY)
        assert found is not None
        assert set(json.loads(found.data)) == {
            "schema", "holder", "attempt", "host", "duration_s", "acquired_at", "renewed_at", "renewals", "released_at", "process",
        }  # fmt: skip
        assert b"recognisable" not in found.data


# -- waiting ----------------------------------------------------------------------------------------------


def test_a_live_one_is_waited_for_until_it_is_released(storage: Storage) -> None:
    first = Lease(LONG, storage, KEY)
    first.acquire()
    threading.Timer(0.5, lambda: first.release(done=False)).start()
    started_s = time.monotonic()
    with capture_logs() as events, hold(config(1, 60), storage, KEY):
        assert time.monotonic() - started_s >= 0.5
    assert [event["event"] for event in events] == ["lease_waiting", "lease_taken"]
    waiting, taken = events
    assert (waiting["attempt"], waiting["expires_without_renewal_s"], waiting["at_most_s"]) == (1, 60, 60)
    assert taken["because"] == "released"


def test_the_wait_has_an_end_that_says_who_has_it(storage: Storage) -> None:
    put(storage, process=None)
    with pytest.raises(StorageError) as caught, hold(config(0.1, 0.5), storage, KEY):
        pytest.fail("somebody else has it")
    assert caught.value.exit_code == ExitCode.STORAGE
    assert str(caught.value).startswith(
        f"{storage.uri}{KEY}: another attempt is working on this run: attempt 3 on host elsewhere, "
    )
    assert "since 2026-01-01T00:00:00+00:00, last renewed at 2026-01-01T00:00:20+00:00; waited 0 s (lease.wait_s)" in str(
        caught.value
    )
    assert record(storage).holder == "f" * 16


def test_one_that_is_not_renewed_expires_by_the_watchers_own_clock(storage: Storage) -> None:
    # Ignore the times in the lease, because the other machine's clock may be years off.
    put(storage, duration_s=0.6)
    started_s = time.monotonic()
    with capture_logs() as events, hold(LONG, storage, KEY):
        assert time.monotonic() - started_s >= 0.6
        assert record(storage).attempt == 4
    assert [event["because"] for event in events if event["event"] == "lease_taken"] == ["expired"]


def test_one_that_is_renewed_does_not_expire(storage: Storage) -> None:
    for renewals in range(4):
        threading.Timer(0.5 * renewals, lambda renewals=renewals: put(storage, duration_s=1.5, renewals=renewals)).start()
    time.sleep(0.1)
    started_s = time.monotonic()
    with hold(LONG, storage, KEY):
        # the last renewal is after 1.5 s, and the lease expires 1.5 s later
        assert time.monotonic() - started_s >= 2.5


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"schema": 2}', b'{"schema": 1, "holder": 5}', b"\xff"])
def test_one_that_cannot_be_read_expires_too(storage: Storage, data: bytes) -> None:
    storage.write_bytes(KEY, data)
    assert parse_record(data) is None
    with pytest.raises(StorageError, match="lease this version cannot read"), hold(config(5, 0.3), storage, KEY):
        pytest.fail("it may be a later version's")
    with hold(config(0.3, 5), storage, KEY):
        assert record(storage).attempt == 1


@pytest.mark.parametrize(
    "changes",
    [{"pid": -1}, {"pid": 2**40}, {"pid": "1"}, {"pid": 0}, {"boot_id": None}, {"more": 1}],
    ids=lambda changes: json.dumps(changes),
)
def test_a_process_that_is_none(changes: dict[str, Any]) -> None:
    made = Record(holder="f", attempt=1, host="h", duration_s=1, process=this_process())
    document = json.loads(made.as_bytes())
    assert parse_record(json.dumps(document).encode()) == made
    document["process"].update(changes)
    assert parse_record(json.dumps(document).encode()) is None


def test_of_many_at_once_one_has_it_at_a_time(storage: Storage) -> None:
    inside, most, problems = [0], [0], []

    def attempt() -> None:
        try:
            with hold(LONG, storage, KEY) as lease:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                lease.confirm()
                time.sleep(0.02)
                inside[0] -= 1
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (problems, most) == ([], [1])
    assert storage.read_bytes(KEY) is None


# -- processes of this machine ----------------------------------------------------------------------------


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def process_of(pid: int) -> Process:
    here = this_process()
    # requires /proc, so Linux
    assert here is not None
    return here.model_copy(update={"pid": pid, "started_ticks": process_identity._started_ticks(pid)})


def test_a_killed_process_of_this_machine_is_known_to_be_gone(sleeper: subprocess.Popen[bytes], storage: Storage) -> None:
    host, process = module.socket.gethostname(), process_of(sleeper.pid)
    assert not is_gone(process, host)
    sleeper.send_signal(signal.SIGSTOP)
    assert not is_gone(process, host)
    sleeper.send_signal(signal.SIGKILL)
    # wait until the process is dead, but leave it a zombie
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(process, host)
    sleeper.wait()
    assert is_gone(process, host)

    put(storage, process=process, host=host)
    assert is_left_over(storage, KEY)
    started_s = time.monotonic()
    with capture_logs() as events, hold(LONG, storage, KEY):
        assert time.monotonic() - started_s < 30
    assert [event["because"] for event in events if event["event"] == "lease_taken"] == ["its process is gone"]


def test_of_others_nothing_is_known(sleeper: subprocess.Popen[bytes]) -> None:
    host, process = module.socket.gethostname(), process_of(sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert is_gone(process, host)
    assert not is_gone(process, "another host")
    assert not is_gone(process.model_copy(update={"boot_id": "another start"}), host)
    # in another container, the same process number belongs to another process
    assert not is_gone(process.model_copy(update={"pid_namespace": "pid:[1]"}), host)


def test_another_process_with_the_number_is_another_one() -> None:
    mine = process_of(os.getpid())
    assert not is_gone(mine, module.socket.gethostname())
    assert is_gone(mine.model_copy(update={"started_ticks": mine.started_ticks - 1}), module.socket.gethostname())


# -- losing the lease --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [True, False], ids=["taken over", "gone"])
def test_who_has_lost_it_learns_so_before_writing(storage: Storage, taken: bool) -> None:
    lease = Lease(config(0.2), storage, KEY)
    lease._closing.set()  # a paused process does not renew
    lease.acquire()
    lease.check()
    if taken:
        put(storage)
    else:
        storage.delete(KEY)
    time.sleep(0.25)
    with capture_logs() as events, pytest.raises(LeaseLostError, match=r"this attempt .* has lost its lease: ") as caught:
        lease.check()
    assert caught.value.exit_code == ExitCode.STORAGE
    assert [event["event"] for event in events] == ["lease_lost"]
    for ask in (lease.stop_if_lost, lease.check, lease.confirm):
        with pytest.raises(LeaseLostError):
            ask()
    lease.release(done=False)
    if taken:
        assert record(storage).holder == "f" * 16
    else:
        assert storage.read_bytes(KEY) is None


def test_confirm_asks_even_where_time_could_tell(storage: Storage) -> None:
    with hold(LONG, storage, KEY) as lease:
        put(storage)
        lease.check()
        with pytest.raises(LeaseLostError, match="attempt 3 on host elsewhere"):
            lease.confirm()
    assert record(storage).released_at is None


class FlakyStorage(FileStorage):
    """A storage that loses the response to a write, or rejects the write."""

    lose_answers, refuse = 0, False

    def adapted(self, **_: object) -> Self:
        return self

    def write_bytes(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> None:
        if self.refuse:
            raise StorageError("s3://bucket/: cannot be reached")
        super().write_bytes(key, data, if_match=if_match, if_absent=if_absent)
        if self.lose_answers:
            self.lose_answers -= 1
            raise StorageError("s3://bucket/: lost the connection")


def test_a_write_whose_answer_was_lost_is_no_loss(tmp_path: Path) -> None:
    storage = FlakyStorage(tmp_path)
    with hold(LONG, storage, KEY) as lease:
        storage.lose_answers = 1
        with pytest.raises(StorageError, match="lost the connection"):
            lease.confirm()
        lease.stop_if_lost()
        lease.confirm()
    assert storage.read_bytes(KEY) is None


def test_an_attempt_that_could_not_tell_whether_it_took_it_releases_it(tmp_path: Path) -> None:
    storage = FlakyStorage(tmp_path)
    storage.lose_answers = 1
    with pytest.raises(StorageError, match="lost the connection"), hold(LONG, storage, KEY):
        pytest.fail("not taken")
    assert record(storage).released_at is not None


def test_a_store_that_cannot_be_reached_is_said_and_tried_again(tmp_path: Path) -> None:
    storage = FlakyStorage(tmp_path)
    with capture_logs() as events, hold(config(0.3), storage, KEY) as lease:
        storage.refuse = True
        deadline_s = time.monotonic() + 300
        while not any(event["event"] == "lease_not_renewed" for event in events) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert any(event["event"] == "lease_not_renewed" for event in events)
        time.sleep(0.35)
        # Without proof of the lease, the attempt must not write but may continue training.
        with pytest.raises(StorageError, match="cannot be reached"):
            lease.check()
        lease.stop_if_lost()
        storage.refuse = False
        lease.check()
    assert storage.read_bytes(KEY) is None


def test_a_store_that_hangs_does_not_keep_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, go_on = FileStorage(tmp_path), threading.Event()
    monkeypatch.setattr(module, "_RELEASE_S", 0.2)
    with capture_logs() as events, hold(LONG, storage, KEY):
        monkeypatch.setattr(storage, "delete", lambda key: go_on.wait(30))
    go_on.set()
    assert [event["problem"] for event in events if event["event"] == "lease_not_released"] == ["not within 0 s"]


# -- stores without conditional writes --------------------------------------------------------------------


class IgnoringStorage(FileStorage):
    """A storage that ignores the conditions of writes, as old stores do."""

    def write_bytes(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> None:
        super().write_bytes(key, data)


class CheckingStorage(FileStorage):
    """A storage that has rejected a condition before, and since then reads the object before each write."""

    @property
    def conditional_writes(self) -> bool:
        return False


@pytest.mark.parametrize("kind", [IgnoringStorage, CheckingStorage])
def test_a_store_that_does_not_compare_is_noticed(
    tmp_path: Path, kind: Callable[[Path], Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SETTLE_S", 0.05)
    storage = kind(tmp_path)
    with capture_logs() as events, hold(config(5), storage, KEY) as lease:
        assert not lease.exclusive
        lease.confirm()
        assert record(storage).holder == lease.holder
        # nor does the attempt renew another holder's lease
        put(storage)
        with pytest.raises(LeaseLostError):
            lease.confirm()
    assert record(storage).holder == "f" * 16
    assert sum(event["event"] == "lease_not_exclusive" for event in events) == 1


def test_where_nothing_compares_the_last_writer_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If two processes read the lease at the same time, the one that writes last holds it."""
    storage = IgnoringStorage(tmp_path)
    monkeypatch.setattr(module, "_SETTLE_S", 0.5)
    threading.Timer(0.25, lambda: put(storage, duration_s=0.2)).start()
    with hold(config(5), storage, KEY) as lease:
        assert record(storage).attempt == 4
        assert record(storage).holder == lease.holder


# -- settings ---------------------------------------------------------------------------------------------


def test_a_wait_that_is_shorter_than_a_lease_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lease\.wait_s: got 10.*expected at least lease\.duration_s, 60: "):
        settle({"blood_type": "A", "lease.wait_s": 10}, {})


def test_the_condition_is_not_our_own_error(storage: Storage) -> None:
    """`write_bytes` raises an exception that is not a `LoraTrainerError`, and the lease must handle it."""
    lease = Lease(LONG, storage, KEY)
    lease.acquire()
    put(storage)
    try:
        lease.release(done=False)
    except PreconditionFailed:
        pytest.fail("it came out")
    assert record(storage).holder == "f" * 16

"""Test storage failures: each operation survives each temporary fault within its budget and reports permanent failures."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, open_budgeted
from fault_proxy import Asked, Fault, FaultProxy
from structlog.testing import capture_logs

from lora_trainer.config import StorageConfig
from lora_trainer.errors import ExitCode, Interrupted, StorageError
from lora_trainer.store.interface import NotFound, PreconditionFailed, Storage
from lora_trainer.store.local import sha256_of
from lora_trainer.store.opening import open_storage
from lora_trainer.store.retry import Retries, RetryBudget, TransientError

pytestmark = pytest.mark.integration

KEY = "runs/A/manifest.json"
DATA = bytes(range(256)) * 40
LARGE_BYTES = 17 * 2**20

Proxied = Callable[..., FaultProxy]


@pytest.fixture
def proxied(s3_server: Any, bucket: str, aws_environment: pytest.MonkeyPatch) -> Iterator[Proxied]:
    """Route the test's storage through a proxy. The client gives up on a silent connection after half a second."""
    aws_environment.setenv("LORA_TRAINER_STORAGE__OBJECT_BUDGET_S", "60")
    aws_environment.setenv("LORA_TRAINER_STORAGE__STALL_TIMEOUT_S", "0.5")
    # Disable botocore's retries, so that the test sees only ours.
    aws_environment.setenv("AWS_MAX_ATTEMPTS", "1")
    with ExitStack() as stack:

        def start(**options: Any) -> FaultProxy:
            proxy = stack.enter_context(FaultProxy(s3_server.endpoint_url, **options))
            aws_environment.setenv("AWS_ENDPOINT_URL", proxy.url)
            return proxy

        yield start


@pytest.fixture
def direct(bucket: str) -> Storage:
    """Open the same storage without the proxy."""
    storage = open_budgeted(f"s3://{bucket}/prefix/")
    storage.write_bytes("first/request", b"")  # creates its client before AWS_ENDPOINT_URL changes
    storage.delete("first/request")
    return storage


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


def upload(storage: Storage, direct: Storage, source: Path) -> None:
    storage.upload(source, KEY)
    read = direct.read_bytes(KEY)
    assert read is not None
    assert read.data == DATA


def upload_all(storage: Storage, direct: Storage, source: Path) -> None:
    storage.upload_all(source.parent, "runs/", {source.name: hashlib.sha256(DATA).hexdigest()})
    read = direct.read_bytes(f"runs/{source.name}")
    assert read is not None
    assert read.data == DATA


def download(storage: Storage, direct: Storage, source: Path) -> None:
    direct.upload(source, KEY)
    target = source.with_name("target")
    fetched = storage.download(KEY, target)
    assert target.read_bytes() == DATA
    assert (fetched.size_bytes, fetched.sha256) == (len(DATA), sha256_of(source))
    assert sorted(path.name for path in target.parent.iterdir()) == ["source", "target"]


def read_bytes(storage: Storage, direct: Storage, source: Path) -> None:
    direct.write_bytes(KEY, DATA)
    read = storage.read_bytes(KEY)
    assert read is not None
    assert read.data == DATA
    assert storage.read_bytes("not/there") is None


def write_bytes(storage: Storage, direct: Storage, source: Path) -> None:
    storage.write_bytes(KEY, DATA)
    read = direct.read_bytes(KEY)
    assert read is not None
    assert read.data == DATA


def write_if_absent(storage: Storage, direct: Storage, source: Path) -> None:
    storage.write_bytes(KEY, DATA, if_absent=True)
    read = direct.read_bytes(KEY)
    assert read is not None
    assert read.data == DATA
    with pytest.raises(PreconditionFailed):
        storage.write_bytes(KEY, b"another", if_absent=True)


def write_if_match(storage: Storage, direct: Storage, source: Path) -> None:
    direct.write_bytes(KEY, b"before")
    before = direct.read_bytes(KEY)
    assert before is not None
    storage.write_bytes(KEY, DATA, if_match=before.etag)
    after = direct.read_bytes(KEY)
    assert after is not None
    assert after.data == DATA
    with pytest.raises(PreconditionFailed):
        storage.write_bytes(KEY, b"another", if_match=before.etag)


def list_objects(storage: Storage, direct: Storage, source: Path) -> None:
    for key in ("a/1", "a/2", "b"):
        direct.write_bytes(key, DATA)
    assert [(found.key, found.size_bytes) for found in storage.list("a/")] == [("a/1", len(DATA)), ("a/2", len(DATA))]


def exists(storage: Storage, direct: Storage, source: Path) -> None:
    direct.write_bytes(KEY, DATA)
    assert storage.exists(KEY)
    assert not storage.exists("not/there")


def delete(storage: Storage, direct: Storage, source: Path) -> None:
    direct.write_bytes(KEY, DATA)
    storage.delete(KEY)
    assert direct.read_bytes(KEY) is None


OPERATIONS = [upload, upload_all, download, read_bytes, write_bytes, write_if_absent, write_if_match, list_objects, exists, delete]
CARRY_BYTES = [upload, upload_all, download, read_bytes, write_bytes, write_if_absent, write_if_match]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("kind", Fault)
def test_each_fault_in_each_operation(
    proxied: Proxied, direct: Storage, source: Path, kind: Fault, operation: Callable[[Storage, Storage, Path], None]
) -> None:
    """The first request to which the fault applies fails with it."""
    if kind == Fault.WRONG_BYTES and operation not in CARRY_BYTES:
        # the operation transfers only listings, whose bytes nothing protects
        return
    proxy = proxied(share=1, kinds=[kind], at_most=1)
    operation(open_budgeted(direct.uri), direct, source)
    assert proxy.faults == {kind: 1}


@pytest.mark.parametrize("kind", [Fault.RESET_AFTER, Fault.STALLED, Fault.TRUNCATED, Fault.WRONG_BYTES])
def test_one_part_of_many(
    proxied: Proxied, direct: Storage, tmp_path: Path, aws_environment: pytest.MonkeyPatch, kind: Fault
) -> None:
    """The fault hits one part of a large upload or download. botocore also retries, as in a run."""
    aws_environment.setenv("AWS_MAX_ATTEMPTS", "4")
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(random.Random(1).randbytes(LARGE_BYTES))
    proxy = proxied(share=1, kinds=[kind], at_most=1, only=lambda asked: "partNumber=2" in asked.path)
    open_budgeted(direct.uri).upload(source, "large")
    assert proxy.faults.total() == 1
    proxy = proxied(share=1, kinds=[kind], at_most=1, only=lambda asked: asked.method == "GET")
    assert open_budgeted(direct.uri).download("large", target).sha256 == sha256_of(source)
    assert proxy.faults.total() == 1


def test_lost_answer_of_a_complete_upload(proxied: Proxied, direct: Storage, tmp_path: Path) -> None:
    """The client does not repeat an upload that the server has already completed."""
    source = tmp_path / "source"
    source.write_bytes(bytes(LARGE_BYTES))
    sent: list[Asked] = []

    def is_completion(asked: Asked) -> bool:
        sent.append(asked)
        return asked.method == "POST" and "uploadId" in asked.path

    proxy = proxied(share=1, kinds=[Fault.RESET_AFTER], at_most=1, only=is_completion)
    open_budgeted(direct.uri).upload(source, "large")
    assert proxy.faults.total() == 1
    assert sum("partNumber" in asked.path for asked in sent) == 2
    assert direct.exists("large")


def test_a_fifth_of_all_requests(proxied: Proxied, direct: Storage, tmp_path: Path, aws_environment: pytest.MonkeyPatch) -> None:
    """Mix all kinds of faults. botocore also retries, as in a run."""
    aws_environment.setenv("AWS_MAX_ATTEMPTS", "4")
    proxy = proxied(share=0.2, seed=5)
    storage = open_budgeted(direct.uri)
    drawn = random.Random(5)
    source, target = tmp_path / "source", tmp_path / "target"
    expected: dict[str, bytes] = {}
    with capture_logs():
        for number in range(60):
            key, data = f"k/{drawn.randrange(8)}", drawn.randbytes(drawn.choice([1, 1000, 300_000]))
            match number % 4:
                case 0:
                    source.write_bytes(data)
                    storage.upload(source, key)
                    expected[key] = data
                case 1:
                    before = storage.read_bytes(key)
                    assert (before.data if before else None) == expected.get(key)
                    storage.write_bytes(key, data, if_match=before.etag if before else None, if_absent=before is None)
                    expected[key] = data
                case 2 if key in expected:
                    storage.download(key, target)
                    assert target.read_bytes() == expected[key]
                case 3 if number % 8 == 3:
                    storage.delete(key)
                    expected.pop(key, None)
            assert [found.key for found in storage.list("k/")] == sorted(expected)
        folder = tmp_path / "folder"
        folder.mkdir()
        for number in range(24):
            (folder / f"{number}").write_bytes(drawn.randbytes(1000))
            expected[f"k/all/{number}"] = (folder / f"{number}").read_bytes()
        storage.upload_all(folder, "k/all/", {path.name: sha256_of(path) for path in folder.iterdir()})
    assert {found.key: found.size_bytes for found in direct.list("k/")} == {key: len(data) for key, data in expected.items()}
    assert proxy.faults.total() > proxy.requests / 10
    assert set(proxy.faults) == set(Fault)


@pytest.mark.parametrize("operation", [read_bytes, download], ids=lambda operation: operation.__name__)
def test_wrong_bytes_from_a_store_without_checksums(
    proxied: Proxied,
    direct: Storage,
    source: Path,
    aws_environment: pytest.MonkeyPatch,
    operation: Callable[[Storage, Storage, Path], None],
) -> None:
    """The object's metadata contains a checksum, so the client still detects wrong bytes."""
    aws_environment.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    proxy = proxied(share=1, kinds=[Fault.WRONG_BYTES], at_most=1)
    with capture_logs() as logs:
        operation(open_budgeted(direct.uri), direct, source)
    assert proxy.faults.total() == 1
    assert f"SHA-256 {sha256_of(source)}" not in logs[0]["problem"].split("expected")[0]


# ----------------------------------------------------------------------------------------------------- budgets


def lasting(storage: Storage, source: Path) -> list[tuple[Callable[[], Any], str]]:
    return [
        (lambda: storage.upload(source, KEY), f"{source} is kept"),
        (lambda: storage.download(KEY, source.with_name("target")), "target is unchanged"),
        (lambda: storage.read_bytes(KEY), ""),
        (lambda: storage.write_bytes(KEY, DATA), ""),
        (lambda: storage.delete(KEY), ""),
        (lambda: list(storage.list("")), ""),
    ]


def test_what_lasts_is_said(proxied: Proxied, direct: Storage, source: Path, aws_environment: pytest.MonkeyPatch) -> None:
    aws_environment.setenv("LORA_TRAINER_STORAGE__OBJECT_BUDGET_S", "0.6")
    direct.write_bytes(KEY, DATA)
    source.with_name("target").write_text("before")
    proxy = proxied(share=1, kinds=[Fault.THROTTLED])
    for call, kept in lasting(open_budgeted(direct.uri), source):
        with capture_logs() as logs, pytest.raises(StorageError) as caught:
            call()
        message = str(caught.value)
        assert caught.value.exit_code == ExitCode.STORAGE
        assert not isinstance(caught.value, TransientError), "what was given up is not tried again by anybody"
        assert f"{proxy.url} answered HTTP 503 " in message
        assert f"gave up after {len(logs) + 1} attempt" in message
        assert "(storage.object_budget_s)" in message
        assert message.endswith(kept)
        assert {log["event"] for log in logs} == {"storage_retry"}
    assert source.read_bytes() == DATA
    assert source.with_name("target").read_text() == "before"


def test_all_objects_share_one_budget(proxied: Proxied, direct: Storage) -> None:
    """Without a shared budget, a store that fails each of a thousand objects for a while would use a thousand budgets."""
    budget = RetryBudget(StorageConfig(object_budget_s=60, total_budget_s=1, stall_timeout_s=1))
    proxied(share=1, kinds=[Fault.THROTTLED])
    with pytest.raises(StorageError, match=r"storage\.total_budget_s"):
        open_storage(direct.uri, budget).read_bytes(KEY)
    with capture_logs() as logs, pytest.raises(StorageError, match=r"after 1 attempt in \d+ s \(storage\.total_budget_s"):
        open_storage(direct.uri, budget).read_bytes("another/key")
    assert logs == [], "nothing is left to wait with"
    proxied(share=1, kinds=[Fault.THROTTLED], at_most=1)
    assert open_budgeted(direct.uri).read_bytes(KEY) is None


def test_pauses_grow_with_jitter_and_end_with_the_budget() -> None:
    budget = RetryBudget(StorageConfig(object_budget_s=1000, total_budget_s=50, stall_timeout_s=1))
    fault = TransientError("x")
    drawn = []
    for _ in range(50):
        retries = Retries(budget)
        drawn.append([pause_s for _ in range(8) if (pause_s := retries.pause_s_after(fault)) is not None])
    for number in range(8):
        pauses_s = [pauses_s[number] for pauses_s in drawn]
        longest_s = min(20, 0.5 * 2**number)
        assert max(pauses_s) <= longest_s
        assert max(pauses_s) > longest_s / 3, "50 draws"
        assert min(pauses_s) < longest_s / 3
    assert budget.spend(49) < 1
    assert (Retries(budget).pause_s_after(fault) or 0) <= 1
    budget.spend(1)
    assert Retries(budget).pause_s_after(fault) is None


def test_what_cannot_pass_is_not_tried_again(proxied: Proxied, direct: Storage, source: Path) -> None:
    proxy = proxied(share=0)
    storage = open_budgeted(direct.uri)
    with capture_logs() as logs, pytest.raises(NotFound):
        storage.download("not/there", source.with_name("target"))
    assert logs == []
    assert proxy.requests == 2, "the object, and the listing for the message"


def test_same_wrong_bytes_twice_are_the_objects_own(proxied: Proxied, direct: Storage, bucket: str, tmp_path: Path) -> None:
    import boto3

    proxy = proxied(share=0)
    boto3.client("s3").put_object(Bucket=bucket, Key=f"prefix/{KEY}", Body=DATA, Metadata={"lora-trainer-sha256": "0" * 64})
    storage = open_budgeted(direct.uri)
    for call in (lambda: storage.read_bytes(KEY), lambda: storage.download(KEY, tmp_path / "target")):
        with capture_logs() as logs, pytest.raises(StorageError, match="same wrong bytes twice, so the object itself is damaged"):
            call()
        assert len(logs) == 1
    assert proxy.requests == 1 + 2 + 4
    assert list(tmp_path.glob("*target*")) == []


# ---------------------------------------------------------------------------------------------------- signals


@contextmanager
def sigterm_raises() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise Interrupted("SIGTERM")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("operation", [download, upload, upload_all], ids=lambda operation: operation.__name__)
def test_a_silent_store_does_not_hold_sigterm(
    proxied: Proxied,
    direct: Storage,
    source: Path,
    aws_environment: pytest.MonkeyPatch,
    operation: Callable[[Storage, Storage, Path], None],
) -> None:
    """The connection times out after a minute, so waiting for the transfer's threads would take a minute, too."""
    aws_environment.setenv("LORA_TRAINER_STORAGE__STALL_TIMEOUT_S", "60")
    direct.upload(source, KEY)
    silent = threading.Event()

    def carries(asked: Asked) -> bool:
        if asked.carries_object:
            silent.set()
        return asked.carries_object

    # closing the proxy releases the remaining threads
    proxied(share=1, kinds=[Fault.STALLED], only=carries)
    storage = open_budgeted(direct.uri)
    sender = threading.Thread(target=lambda: silent.wait(30) and (time.sleep(0.3), os.kill(os.getpid(), signal.SIGTERM)))
    sender.start()
    started_s = time.monotonic()
    with sigterm_raises(), pytest.raises(Interrupted):
        operation(storage, direct, source)
    sender.join()
    assert time.monotonic() - started_s < 30
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_sigterm_ends_a_pause(proxied: Proxied, direct: Storage) -> None:
    proxied(share=1, kinds=[Fault.THROTTLED])
    sender = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
    sender.start()
    started_s = time.monotonic()
    with sigterm_raises(), pytest.raises(Interrupted):
        open_budgeted(direct.uri).read_bytes(KEY)
    sender.join()
    assert time.monotonic() - started_s < 30


# ------------------------------------------------------------------------------------------------- local disk

# Runs in its own mount namespace, which the kernel removes with the process.
MOUNTED = """
    import resource, subprocess, sys
    from pathlib import Path
    from lora_trainer.errors import StorageError
    from lora_trainer.store.opening import open_storage

    folder = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], check=True)
    storage = open_storage(str(folder))
    storage.write_bytes("kept", b"x" * 1000)
"""
FULL = """
    for call in (
        lambda: storage.upload(Path(sys.argv[2]), "large"),
        lambda: storage.write_bytes("large", bytes(2 * 2**20)),
        lambda: open_storage(str(Path(sys.argv[2]).parent)).download("source", folder / "large"),
        lambda: open_storage(sys.argv[3]).download("large", folder / "large"),
    ):
        try:
            call()
        except StorageError as error:
            print(error)
        assert [path.name for path in folder.iterdir()] == ["kept"], list(folder.iterdir())
    assert storage.read_bytes("kept").data == b"x" * 1000
"""
READ_ONLY = """
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    for call in (
        lambda: storage.upload(Path(sys.argv[2]), "kept"),
        lambda: storage.write_bytes("kept", b""),
        lambda: storage.delete("kept"),
        lambda: open_storage(sys.argv[3]).download("large", folder / "kept"),
    ):
        try:
            call()
        except StorageError as error:
            print(error)
    assert storage.read_bytes("kept").data == b"x" * 1000
"""


@pytest.mark.parametrize(
    ("script", "said"), [(FULL, "No space left on device; free some space"), (READ_ONLY, "Read-only file system; ")]
)
def test_full_and_read_only_disks(direct: Storage, tmp_path: Path, script: str, said: str) -> None:
    """Use a real small disk if this user is allowed to mount one."""
    apart = [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c"]
    if not shutil.which("unshare") or subprocess.run([*apart, ""], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces are not allowed here")
    disk, source = tmp_path / "disk", tmp_path / "source"
    disk.mkdir()
    source.write_bytes(bytes(2 * 2**20))
    direct.upload(source, "large")
    program = textwrap.dedent(MOUNTED) + textwrap.dedent(script)
    done = subprocess.run(
        [*apart, program, disk, source, direct.uri],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout
    assert all(said in line and str(disk) in line for line in lines), done.stdout

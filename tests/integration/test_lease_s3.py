"""Let two attempts at one run compete: on a real store, on a failing one, and on one without conditional writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
from conftest import open_budgeted
from fault_proxy import Answer, Asked, Fault, FaultProxy
from structlog.testing import capture_logs

from lora_trainer.config import CheckpointConfig, LeaseConfig
from lora_trainer.errors import StorageError
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.signals import Interruption
from lora_trainer.store.bundle import publish_bundle
from lora_trainer.store.checkpoints import Checkpoints
from lora_trainer.store.interface import Storage
from lora_trainer.store.lease import Lease, LeaseLostError, hold, parse_record
from lora_trainer.store.manifest import read_local_manifest, read_manifest, verify_files, write_manifest
from lora_trainer.store.prefixes import lease_key, run_prefix

pytestmark = pytest.mark.integration

RUN_ID = "0123456789abcdef"
KEY = lease_key(BloodType.A, RUN_ID)
PREFIX = f"adapters/A/{RUN_ID}/"
LONG = LeaseConfig(duration_s=60, wait_s=600)


@pytest.fixture
def storage(bucket: str) -> Storage:
    return open_budgeted(f"s3://{bucket}/lora/")


def taken_over(storage: Storage, lease: Lease) -> None:
    """Write another holder into the lease."""
    found = storage.read_bytes(KEY)
    assert found is not None
    record = parse_record(found.data)
    assert record is not None
    assert record.holder == lease.holder
    storage.write_bytes(KEY, record.model_copy(update={"holder": "f" * 16, "attempt": 2}).as_bytes())


def made_bundle(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    for name in ("adapter_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    write_manifest(folder, {"run_id": RUN_ID})
    return folder


def test_one_has_it_and_it_is_gone_at_the_end(storage: Storage) -> None:
    order: list[str] = []

    def second() -> None:
        with hold(LONG, storage, KEY):
            order.append("second")

    with hold(LONG, storage, KEY) as lease:
        assert lease.exclusive
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(1)
        assert thread.is_alive()
        lease.confirm()
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
    assert list(storage.list("")) == []


def interrupted(storage: Storage, work: Callable[[Lease], None]) -> None:
    """Run an attempt that is interrupted."""
    with suppress(KeyboardInterrupt), hold(LONG, storage, KEY) as lease:
        work(lease)
        raise KeyboardInterrupt


def test_faults_cost_it_neither_the_lease_nor_the_release(s3_server: Any, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_TRAINER_STORAGE__OBJECT_BUDGET_S", "60")
    monkeypatch.setenv("LORA_TRAINER_STORAGE__TOTAL_BUDGET_S", "600")
    seen: list[int] = []

    def work(lease: Lease) -> None:
        for _ in range(3):
            lease.confirm()
        found = storage.read_bytes(KEY)
        record = parse_record(found.data) if found else None
        # no other attempt took the lease, whatever the store answered
        assert record is not None
        assert record.holder == lease.holder
        seen.append(record.attempt)

    with FaultProxy(s3_server.endpoint_url, share=0.3, seed=3, stall_s=0.5) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage = open_budgeted(f"s3://{bucket}/lora/")
        for _ in range(3):
            interrupted(storage, work)
        with hold(LONG, storage, KEY):
            pass
    assert seen == [1, 2, 3]
    assert proxy.faults.total() > 5
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint_url)
    assert list(open_budgeted(f"s3://{bucket}/lora/").list("")) == []


def test_a_publisher_that_was_overtaken_writes_nothing(storage: Storage, tmp_path: Path) -> None:
    mine, theirs = made_bundle(tmp_path / "mine", b"mine"), made_bundle(tmp_path / "theirs", b"theirs")
    with hold(LONG, storage, KEY) as lease:
        taken_over(storage, lease)
        with pytest.raises(LeaseLostError):
            publish_bundle(mine, storage, PREFIX, lease)
        assert list(storage.list("adapters/")) == []
        publish_bundle(theirs, storage, PREFIX)
        with pytest.raises(LeaseLostError):
            publish_bundle(mine, storage, PREFIX, lease)
    assert verify_files(storage, PREFIX) == []


def test_a_manifest_is_never_replaced(storage: Storage, tmp_path: Path) -> None:
    mine, theirs = made_bundle(tmp_path / "mine", b"same"), made_bundle(tmp_path / "theirs", b"same")
    write_manifest(theirs, {"run_id": RUN_ID, "started_at": "another time"})
    publish_bundle(theirs, storage, PREFIX)
    publish_bundle(theirs, storage, PREFIX)
    with pytest.raises(StorageError, match=r"manifest\.json: another attempt at this run has published a bundle in the meantime"):
        publish_bundle(mine, storage, PREFIX)
    assert read_manifest(storage, PREFIX) == read_local_manifest(theirs)


def test_the_lease_is_looked_at_before_each_try(
    s3_server: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retrying an upload after losing the lease would overwrite the files that the new holder has published."""
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    tries: list[int] = []

    def guard() -> None:
        tries.append(1)
        if len(tries) > 1:
            raise LeaseLostError("somebody else has it")

    def is_upload(asked: Asked) -> bool:
        return asked.method == "PUT"

    with FaultProxy(s3_server.endpoint_url, share=1, kinds=[Fault.RESET_BEFORE], at_most=1, only=is_upload) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage = open_budgeted(f"s3://{bucket}/lora/").adapted(guard=guard)
        with pytest.raises(LeaseLostError):
            storage.upload(file, "x")
        assert proxy.faults.total() == 1
    assert len(tries) == 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint_url)
    plain = open_budgeted(f"s3://{bucket}/lora/")
    assert not plain.exists("x")
    # reads do not check the lease
    storage = plain.adapted(guard=guard)
    for write in (lambda: storage.write_bytes("x", b""), lambda: storage.delete("x"), lambda: storage.upload(file, "x")):
        with pytest.raises(LeaseLostError):
            write()
    assert storage.read_bytes("x") is None
    assert list(storage.list("")) == []


# -- without conditional writes ---------------------------------------------------------------------------


class Unconditional(FaultProxy):
    """An old store that ignores the conditions of writes."""

    def forward(self, asked: Asked, headers: list[tuple[str, str]], body: bytes) -> Answer:
        kept = [(name, value) for name, value in headers if name.lower() not in ("if-match", "if-none-match")]
        return super().forward(asked, kept, body)


class NotImplementing(FaultProxy):
    """A store that rejects conditional writes."""

    def forward(self, asked: Asked, headers: list[tuple[str, str]], body: bytes) -> Answer:
        if {name.lower() for name, _ in headers} & {"if-match", "if-none-match"}:
            said = b"<Error><Code>NotImplemented</Code><Message>A header you provided implies functionality</Message></Error>"
            return Answer(501, "Not Implemented", [("Content-Type", "application/xml")], said)
        return super().forward(asked, headers, body)


@pytest.fixture(params=[Unconditional, NotImplementing])
def old_store(
    request: pytest.FixtureRequest, s3_server: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Storage]]:
    with request.param(s3_server.endpoint_url, share=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield lambda: open_budgeted(f"s3://{bucket}/lora/")


def checkpoints(storage: Storage, folder: Path, lease: Lease) -> Checkpoints:
    return Checkpoints(
        CheckpointConfig(), folder, storage, run_prefix(BloodType.A, RUN_ID), RUN_ID, interruption=Interruption(), lease=lease
    )


def test_each_attempt_keeps_to_itself_and_reads_all(old_store: Callable[[], Storage], tmp_path: Path) -> None:
    def state(folder: Path) -> None:
        (folder / "state.json").write_text("{}")

    storage = old_store()
    holders: list[str] = []

    def work(lease: Lease) -> None:
        assert not lease.exclusive
        holders.append(lease.holder)
        kept = checkpoints(storage, tmp_path / "first", lease)
        kept.write(3, state)
        kept.finish(60)

    with capture_logs() as events:
        interrupted(storage, work)
    assert any(event["event"] == "lease_not_exclusive" for event in events)
    (first,) = holders
    own = f"{run_prefix(BloodType.A, RUN_ID)}checkpoints-{first}/step-000003/"
    assert {item.key for item in storage.list(own)} == {f"{own}state.json", f"{own}manifest.json"}

    with hold(LONG, old_store(), KEY) as second:
        other = checkpoints(storage, tmp_path / "second", second)
        found = other.newest()
        assert found is not None
        assert found.name == "step-000003"
        for step in (4, 5, 6):
            other.write(step, state)
            other.finish(60)
        steps = {item.key.removeprefix(run_prefix(BloodType.A, RUN_ID)).rpartition("/")[0] for item in storage.list("runs/")} - {""}
        # each attempt prunes only its own checkpoints
        assert steps == {f"checkpoints-{first}/step-000003"} | {f"checkpoints-{second.holder}/step-{step:06d}" for step in (5, 6)}
        other.clear()
    assert list(storage.list("")) == []


def test_a_bundle_that_two_wrote_at_once_is_withdrawn(
    old_store: Callable[[], Storage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = made_bundle(tmp_path / "mine", b"mine"), made_bundle(tmp_path / "theirs", b"theirs")
    storage = old_store()
    with hold(LONG, storage, KEY) as lease:
        publish_bundle(mine, storage, PREFIX, lease)
        assert verify_files(storage, PREFIX) == []
        storage.delete(f"{PREFIX}manifest.json")

        write_bytes = type(storage).write_bytes

        def late(self: Storage, key: str, data: bytes, **conditions: Any) -> None:
            # upload the other attempt's file after our files and before our manifest
            if key == f"{PREFIX}manifest.json":
                storage.upload(theirs / "adapter_model.safetensors", f"{PREFIX}adapter_model.safetensors")
            write_bytes(self, key, data, **conditions)

        monkeypatch.setattr(type(storage), "write_bytes", late)
        with pytest.raises(StorageError, match="withdrawn; run the same command again"):
            publish_bundle(mine, storage, PREFIX, lease)
    assert read_manifest(storage, PREFIX) is None


def test_the_record_is_what_the_documentation_says(storage: Storage) -> None:
    with hold(LONG, storage, KEY):
        document = json.loads(boto3.client("s3").get_object(Bucket=storage.uri.split("/")[2], Key=f"lora/{KEY}")["Body"].read())
    described = (Path(__file__).resolve().parents[2] / "SDS.md").read_text(encoding="utf-8")
    table = described.partition("## Lease\n")[2].partition("\n## ")[0]
    assert all(f"`{name}`" in table for name in document)

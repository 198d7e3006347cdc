"""Test the order of `latest.json` against S3 over HTTP, with several writers at once."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fault_proxy import FaultProxy

from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.store.latest import count_start, move_latest, promote_latest
from lora_trainer.store.opening import open_storage

pytestmark = pytest.mark.integration

A = BloodType.A
AHEAD, BEHIND = "2099-01-01T00:00:00+00:00", "2001-01-01T00:00:00+00:00"


def manifest(run_id: str, counter: int, started_at: str) -> dict[str, Any]:
    return {"run_id": run_id, "started_at": started_at, "counter": counter}


def pointer(uri: str) -> dict[str, Any]:
    found = open_storage(uri).read_bytes("adapters/A/latest.json")
    assert found is not None
    parsed: dict[str, Any] = json.loads(found.data)
    return parsed


def test_concurrent_runs_and_a_promotion_end_with_the_one_that_started_last(bucket: str) -> None:
    uri, runs = f"s3://{bucket}/lora/", 5
    barrier = threading.Barrier(runs + 1)

    def run(number: int) -> int:
        storage = open_storage(uri)
        barrier.wait()
        counter = count_start(storage, A, f"run-{number}")
        barrier.wait()
        # later runs have the earlier clocks
        move_latest(storage, A, manifest(f"run-{number}", counter, AHEAD if counter < runs else BEHIND))
        return counter

    def promote() -> None:
        storage = open_storage(uri)
        barrier.wait()
        barrier.wait()
        promote_latest(storage, A, manifest("promoted", 1, BEHIND))

    with ThreadPoolExecutor(runs + 1) as pool:
        counters, promotion = pool.map(run, range(runs)), pool.submit(promote)
        assert sorted(counters) == list(range(1, runs + 1))
        promotion.result()
    # all runs had started before the promotion, which takes another count each time that a run moves the pointer in between
    assert pointer(uri)["run_id"] == "promoted"
    assert pointer(uri)["counter"] > runs
    storage = open_storage(uri)
    assert move_latest(storage, A, manifest("next", count_start(storage, A, "next"), BEHIND)).moved


def test_lost_responses_do_not_give_two_runs_the_same_place(s3_server: Any, bucket: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("LORA_TRAINER_STORAGE__OBJECT_BUDGET_S", "60")
    with FaultProxy(s3_server.endpoint_url, share=0.3, seed=5, stall_s=0.2) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage = open_storage(f"s3://{bucket}/lora/")
        taken = [count_start(storage, A, f"run-{number}") for number in range(6)]
        assert [count_start(storage, A, f"run-{number}") for number in range(6)] == taken
        # a write whose response was lost may cost a number, and never reuses one
        assert taken == sorted(set(taken))
        assert proxy.faults.total() > 0

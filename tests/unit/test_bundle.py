"""Test the bundle on a local output: manifest, publication, pointer and reading back."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import load_tool
from made_metrics import MadeRun, made_run, write_made_evaluation
from older_bundles import PROMPT_2

from lora_trainer.base_model import Base
from lora_trainer.errors import ConfigError, InvariantError, LoraTrainerError, StorageError
from lora_trainer.evaluate.metrics import RunMetrics, metrics_schema
from lora_trainer.evaluate.scope import scope
from lora_trainer.persona.prompt import STRENGTHS, prompt_template, reply_json
from lora_trainer.persona.reply_schema import response_schema
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression
from lora_trainer.report.model_card import BROKEN, SAME_TOKENS, vllm_lora_rank
from lora_trainer.run.bundle_files import read_prompt_version, read_published, read_verdict, write_documents, write_evaluation
from lora_trainer.store.bundle import check_complete, publish_bundle
from lora_trainer.store.interface import Storage
from lora_trainer.store.latest import count_start, forget_start, link_newest, move_latest, promote_latest, take_count
from lora_trainer.store.local import fresh_folder
from lora_trainer.store.manifest import DamagedError, read_manifest, verify_files, write_json, write_manifest
from lora_trainer.store.opening import open_storage
from lora_trainer.store.prefixes import evaluation_prefix
from lora_trainer.train.step_log import StepLog

A = BloodType.A
PREFIX = "adapters/A/0123456789abcdef/"
PROMPT_3 = prompt_template(persona_spec(A).instruction)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(f"file://{tmp_path}/outputs/")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a bundle like the backend's and the pipeline's, with a subfolder and a Korean file name."""
    path = tmp_path / "bundle"
    (path / "extra").mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 100)
    (path / "adapter_config.json").write_text("{}")
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text("{}")
    (path / "extra" / "한글 이름.txt").write_text("가")
    (path / "extra" / "manifest.json").write_text("not ours")
    return path


def facts(run_id: str = "0123456789abcdef", started_at: str = "2026-01-01T00:00:00+00:00") -> dict[str, Any]:
    return {"run_id": run_id, "started_at": started_at, "finished_at": started_at}


def test_the_manifest_has_every_file_and_the_facts(folder: Path) -> None:
    (folder / "manifest.json").write_text("an older one")
    manifest = write_manifest(folder, facts())
    assert manifest == json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    files = {path for path in folder.rglob("*") if path.is_file() and path != folder / "manifest.json"}
    assert manifest["files"] == {
        path.relative_to(folder).as_posix(): {
            "size_bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
    assert len(files) == 6
    assert {name: manifest[name] for name in facts()} == facts()
    assert manifest["schema"] == 1


def test_what_was_published_is_whole_and_may_be_published_again(folder: Path, storage: Storage) -> None:
    written = write_manifest(folder, facts())
    assert read_manifest(storage, PREFIX) is None
    assert verify_files(storage, PREFIX) == [f"{storage.uri}{PREFIX}: got no manifest, so there is no bundle"]
    for _ in range(2):
        publish_bundle(folder, storage, PREFIX)
        assert read_manifest(storage, PREFIX) == written
        assert verify_files(storage, PREFIX) == []
        assert {item.key for item in storage.list("")} == {PREFIX + name for name in [*written["files"], "manifest.json"]}


def test_verify_names_what_differs(folder: Path, storage: Storage) -> None:
    write_manifest(folder, facts())
    publish_bundle(folder, storage, PREFIX)
    assert storage.local_folder is not None
    published = storage.local_folder / PREFIX
    data = bytearray((published / "adapter_model.safetensors").read_bytes())
    data[12345] ^= 1
    (published / "adapter_model.safetensors").write_bytes(data)
    (published / "tokenizer.json").unlink()
    with (published / "adapter_config.json").open("a") as file:
        file.write(" ")
    problems = verify_files(storage, PREFIX)
    where = f"{storage.uri}{PREFIX}"
    digest = hashlib.sha256(data).hexdigest()
    assert sorted(problem.partition(", expected ")[0] for problem in problems) == [
        f"{where}adapter_config.json: got 3 bytes, SHA-256 {hashlib.sha256(b'{} ').hexdigest()}",
        f"{where}adapter_model.safetensors: got 25600 bytes, SHA-256 {digest}",
        f"{where}tokenizer.json: not found; the manifest says 2 bytes",
    ]


def test_verify_does_not_follow_a_name_out_of_the_bundle(folder: Path, storage: Storage) -> None:
    manifest = write_manifest(folder, facts())
    publish_bundle(folder, storage, PREFIX)
    manifest["files"]["../../../../etc/passwd"] = {"size_bytes": 1, "sha256": "0" * 64}
    storage.write_bytes(f"{PREFIX}manifest.json", json.dumps(manifest).encode())
    _, problem = verify_files(storage, PREFIX)
    assert problem.startswith(f"{storage.uri}{PREFIX}manifest.json: files: got an object; unsafe key '../../../../etc/passwd'")


@pytest.mark.parametrize("hindered", ["adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"])
def test_a_publication_that_breaks_off_is_no_bundle(folder: Path, storage: Storage, hindered: str) -> None:
    write_manifest(folder, facts())
    # A folder with the file's name makes its upload fail.
    assert storage.local_folder is not None
    in_the_way = storage.local_folder / PREFIX / hindered
    (in_the_way / "x").mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"{hindered}: got a folder"):
        publish_bundle(folder, storage, PREFIX)
    assert read_manifest(storage, PREFIX) is None
    (in_the_way / "x").rmdir()
    in_the_way.rmdir()
    publish_bundle(folder, storage, PREFIX)
    assert verify_files(storage, PREFIX) == []


def test_a_file_that_vanished_before_its_upload_is_no_bundle(folder: Path, storage: Storage) -> None:
    write_manifest(folder, facts())
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(LoraTrainerError, match=r"tokenizer_config\.json"):
        publish_bundle(folder, storage, PREFIX)
    assert read_manifest(storage, PREFIX) is None


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"schema": 2, "files": {}}', b'{"schema": 1, "files": []}', b"\xff"])
def test_a_manifest_that_is_none(storage: Storage, data: bytes) -> None:
    storage.write_bytes(f"{PREFIX}manifest.json", data)
    with pytest.raises(DamagedError, match=r"manifest\.json: not a manifest of schema 1; .*move that prefix away and run again"):
        read_manifest(storage, PREFIX)


# -- latest.json ----------------------------------------------------------------------------------------


def counted(run_id: str, counter: int, started_at: str = "2026-01-01T00:00:00+00:00") -> dict[str, Any]:
    return {**facts(run_id, started_at), "counter": counter}


def pointed_at(storage: Storage) -> dict[str, str]:
    found = storage.read_bytes("adapters/A/latest.json")
    assert found is not None
    pointer: dict[str, str] = json.loads(found.data)
    return pointer


def test_the_first_run_is_the_latest(storage: Storage) -> None:
    move = move_latest(storage, A, facts())
    assert (move.moved, move.names_this_run) == (True, True)
    assert pointed_at(storage) == {
        "run_id": "0123456789abcdef",
        "bundle": "adapters/A/0123456789abcdef/",
        "started_at": "2026-01-01T00:00:00+00:00",
        "sense": "not_judged",
    }
    assert not storage.exists("adapters/AB/latest.json")


@pytest.mark.parametrize(
    ("started_at", "moved"),
    [
        ("2026-01-01T00:00:01+00:00", True),
        ("2026-01-01T00:00:00+00:00", True),
        ("2025-12-31T23:59:59+00:00", False),
        # 00:00:01 and 23:59:59 UTC in Seoul time: the job compares times, not strings
        ("2026-01-01T09:00:01+09:00", True),
        ("2026-01-01T08:59:59+09:00", False),
    ],
)
def test_only_a_run_that_did_not_start_earlier_takes_over(storage: Storage, started_at: str, moved: bool) -> None:
    move_latest(storage, A, facts("first"))
    move = move_latest(storage, A, facts("second", started_at))
    assert (move.moved, move.names_this_run) == (moved, moved)
    assert pointed_at(storage)["run_id"] == ("second" if moved else "first")
    if not moved:
        assert move.reason.startswith("it names run first, which started later; 'lora-trainer promote' moves it")


def test_the_same_run_again_writes_nothing(storage: Storage) -> None:
    move_latest(storage, A, facts())
    before = storage.read_bytes("adapters/A/latest.json")
    move = move_latest(storage, A, facts(started_at="2027-01-01T00:00:00+00:00"))
    assert (move.moved, move.names_this_run, move.reason) == (False, True, "it already names this run")
    assert storage.read_bytes("adapters/A/latest.json") == before


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"{}",
        b'{"run_id": "x"}',
        b'{"run_id": "x", "started_at": 5}',
        b'{"run_id": "x", "started_at": "yesterday"}',
        b'{"run_id": "x", "started_at": "2026-01-01T00:00:00"}',
        b'{"run_id": "x", "started_at": "2026-01-01T00:00:00+00:00", "promoted_at": "today"}',
        b'{"started_at": "2026-01-01T00:00:00+00:00"}',
        b'{"run_id": "x", "started_at": "2026-01-01T00:00:00+00:00", "counter": "7"}',
        b'{"run_id": "x", "started_at": "2026-01-01T00:00:00+00:00", "counter": -1}',
        b'{"run_id": ["x"], "started_at": "2026-01-01T00:00:00+00:00"}',
        b'{"run_id": "x", "started_at": "2026-01-01T00:00:00+00:00", "counter": 1' + b"0" * 5000 + b"}",
        b"\xff\xfe",
    ],
)
def test_a_broken_pointer_is_said_and_left(storage: Storage, data: bytes) -> None:
    storage.write_bytes("adapters/A/latest.json", data)
    with pytest.raises(
        StorageError, match=r"adapters/A/latest\.json: not a pointer to a bundle \((wrong: .*|not a JSON object)\); expected run_id"
    ):
        move_latest(storage, A, facts())
    found = storage.read_bytes("adapters/A/latest.json")
    assert found is not None
    assert found.data == data


def test_a_pointer_without_a_time_zone_names_its_field(storage: Storage) -> None:
    pointer = {"run_id": "a", "bundle": "adapters/A/a/", "started_at": "2099-01-01T00:00:00"}
    storage.write_bytes("adapters/A/latest.json", json.dumps(pointer).encode())
    with pytest.raises(StorageError, match=r"wrong: started_at\); .* a time in ISO 8601 with its zone"):
        promote_latest(storage, BloodType.A, facts())


def test_a_counter_at_its_end_is_said(storage: Storage) -> None:
    pointer = {"run_id": "a", "bundle": "adapters/A/a/", "started_at": "2026-01-01T00:00:00+00:00", "counter": 2**53 - 1}
    storage.write_bytes("adapters/A/latest.json", json.dumps(pointer).encode())
    with pytest.raises(StorageError, match=f"got the counter {2**53 - 1}"):
        take_count(storage, BloodType.A)


def test_concurrent_movers_end_with_the_latest(tmp_path: Path) -> None:
    # A mover tries eight times, and whenever its swap fails, another mover's has succeeded. So all of eight movers finish.
    movers = 8
    for attempt in range(20):
        uri = f"file://{tmp_path}/{attempt}/"
        barrier = threading.Barrier(movers)

        def move(number: int, uri: str = uri, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            manifest = facts(f"run-{number}", f"2026-01-01T00:00:0{number}+00:00")
            return move_latest(open_storage(uri), A, manifest).moved

        with ThreadPoolExecutor(movers) as pool:
            moved = list(pool.map(move, range(movers)))
        assert pointed_at(open_storage(uri))["run_id"] == f"run-{movers - 1}"
        assert moved[-1]


class Contended:
    """A real storage with another client that writes between each of our reads and the next write."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def read_bytes(self, key: str) -> Any:
        found = self._storage.read_bytes(key)
        if not key.endswith("latest.json"):
            return found
        self.reads += 1
        other = {"run_id": f"other-{self.reads}", "started_at": "2025-01-01T00:00:00+00:00"}
        self._storage.write_bytes(key, json.dumps(other).encode())
        return found


def test_a_swap_that_is_always_lost_ends(storage: Storage) -> None:
    contended: Any = Contended(storage)
    with pytest.raises(StorageError, match=r"latest\.json: other writers changed it 8 times in a row; run the same command again"):
        move_latest(contended, A, facts())
    assert contended.reads == 8
    assert pointed_at(storage)["run_id"] == "other-8"


def test_promotion_moves_whatever_is_newer_and_those_that_started_before_it_leave_it(storage: Storage) -> None:
    move_latest(storage, A, facts("newer", "2026-06-01T00:00:00+00:00"))
    running = count_start(storage, A, "running")
    before = datetime.now(UTC)
    assert promote_latest(storage, A, facts("older", "2026-01-01T00:00:00+00:00")) == "newer"
    pointer = pointed_at(storage)
    assert (pointer["run_id"], pointer["bundle"]) == ("older", "adapters/A/older/")
    promoted_at = datetime.fromisoformat(pointer["promoted_at"])
    assert before - timedelta(seconds=1) <= promoted_at <= datetime.now(UTC)
    # this run started long after the promoted one, but before the promotion
    move = move_latest(storage, A, counted("running", running))
    assert (move.moved, move.names_this_run) == (False, False)
    assert move.reason.startswith("it names run older")
    assert move_latest(storage, A, facts("newer", "2026-06-01T00:00:00+00:00")).moved is False
    assert pointed_at(storage) == pointer
    # the pointer already names the promoted run
    move = move_latest(storage, A, facts("older", "2026-01-01T00:00:00+00:00"))
    assert (move.moved, move.names_this_run) == (False, True)
    # a run that starts now takes over as usual
    assert move_latest(storage, A, counted("next", count_start(storage, A, "next"))).moved
    assert pointed_at(storage)["run_id"] == "next"
    assert "promoted_at" not in pointed_at(storage)


def test_the_first_promotion_and_the_same_again(storage: Storage) -> None:
    assert promote_latest(storage, A, facts()) is None
    assert promote_latest(storage, A, facts()) == "0123456789abcdef"
    assert pointed_at(storage)["run_id"] == "0123456789abcdef"


def test_a_promotion_does_not_replace_what_is_no_pointer(storage: Storage) -> None:
    storage.write_bytes("adapters/A/latest.json", b"{}")
    with pytest.raises(StorageError, match="not a pointer to a bundle"):
        promote_latest(storage, A, facts())
    contended: Any = Contended(storage)
    storage.write_bytes("adapters/A/latest.json", json.dumps(facts()).encode())
    with pytest.raises(StorageError, match=r"latest\.json: other writers changed it 8 times in a row"):
        promote_latest(contended, A, facts("mine"))


# -- the counter ----------------------------------------------------------------------------------------


AHEAD, BEHIND = "2099-01-01T00:00:00+00:00", "2001-01-01T00:00:00+00:00"


@pytest.mark.parametrize("clocks", [(AHEAD, BEHIND), (BEHIND, AHEAD)], ids=["first-ahead", "first-behind"])
@pytest.mark.parametrize("finished", [(0, 1), (1, 0)], ids=["in-order", "reversed"])
def test_the_run_that_started_last_is_named_whatever_the_clocks_say(
    storage: Storage, clocks: tuple[str, str], finished: tuple[int, int]
) -> None:
    runs = [counted(name, count_start(storage, A, name), clock) for name, clock in zip(("first", "second"), clocks, strict=True)]
    moves = [move_latest(storage, A, runs[index]) for index in finished]
    assert pointed_at(storage)["run_id"] == "second"
    assert [move.moved for move in moves] == ([True, True] if finished == (0, 1) else [True, False])
    if finished == (1, 0):
        assert moves[1].reason.startswith(
            "it names run second, which started later (counter 2, this run's is 1); 'lora-trainer promote'"
        )


@pytest.mark.parametrize("promoted", [False, True])
def test_a_pointer_from_the_future_is_said_and_does_not_stop_later_runs(storage: Storage, promoted: bool) -> None:
    """An earlier version wrote it, with a clock that was ahead."""
    pointer = {**facts("future", AHEAD), **({"promoted_at": AHEAD} if promoted else {})}
    storage.write_bytes("adapters/A/latest.json", json.dumps(pointer).encode())
    # a run of that version stays behind it, but no longer silently
    old = move_latest(storage, A, facts("old", "2026-01-01T00:00:00+00:00"))
    assert not old.moved
    assert "'lora-trainer promote' moves it by hand" in old.reason
    move = move_latest(storage, A, counted("now", count_start(storage, A, "now")))
    assert move.moved
    for said in (old.warning, move.warning):
        assert f"latest.json: got a time in the future, {AHEAD}" in said
        assert "check both (NTP)" in said
    assert pointed_at(storage)["run_id"] == "now"
    assert str(pointed_at(storage)["counter"]) == "1"
    assert move_latest(storage, A, counted("next", count_start(storage, A, "next"))).warning == ""


def test_a_promotion_takes_its_place_in_the_order(storage: Storage) -> None:
    before = counted("before", count_start(storage, A, "before"), AHEAD)
    promote_latest(storage, A, facts("promoted", BEHIND))
    after = counted("after", count_start(storage, A, "after"), BEHIND)
    move = move_latest(storage, A, before)
    assert (move.moved, move.reason.partition(" (")[0]) == (
        False,
        "it names run promoted, which was promoted after this run started",
    )
    assert move_latest(storage, A, after).moved
    assert not move_latest(storage, A, before).moved


def test_a_later_attempt_keeps_the_place_of_its_run_unless_it_starts_anew(storage: Storage) -> None:
    assert [count_start(storage, A, name) for name in ("one", "two", "one")] == [1, 2, 1]
    assert count_start(storage, A, "one", anew=True) == 3
    assert count_start(storage, A, "one") == 3
    # personas are counted apart
    assert count_start(storage, BloodType.AB, "one") == 1
    for name in ("one", "two"):
        forget_start(storage, A, name)
    assert {item.key for item in storage.list("runs/A/")} == {"runs/A/starts.json"}


@pytest.mark.parametrize(
    "left", [None, b"", b"{", b'{"counter": "x"}', b'{"counter": -1}', b'{"counter": 1e400}', b"[[[[", b"\xff"]
)
def test_a_counter_that_is_lost_or_damaged_goes_on_from_the_pointer(storage: Storage, left: bytes | None) -> None:
    for _ in range(3):
        take_count(storage, A)
    assert move_latest(storage, A, counted("named", take_count(storage, A))).moved
    storage.delete("runs/A/starts.json")
    if left is not None:
        storage.write_bytes("runs/A/starts.json", left)
    assert take_count(storage, A) == 5


def test_concurrent_starts_and_promotions_take_different_places(tmp_path: Path) -> None:
    uri, movers = f"file://{tmp_path}/out/", 8
    barrier = threading.Barrier(movers)

    def start(number: int) -> int:
        storage = open_storage(uri)
        barrier.wait()
        counter = count_start(storage, A, f"run-{number}")
        move_latest(storage, A, counted(f"run-{number}", counter, AHEAD if number % 2 else BEHIND))
        return counter

    with ThreadPoolExecutor(movers) as pool:
        counters = list(pool.map(start, range(movers)))
    assert sorted(counters) == list(range(1, movers + 1))
    assert pointed_at(open_storage(uri))["run_id"] == f"run-{counters.index(movers)}"


# -- the local link -------------------------------------------------------------------------------------


def test_the_link_follows(storage: Storage) -> None:
    assert storage.local_folder is not None
    storage.write_bytes(f"{PREFIX}x", b"1")
    storage.write_bytes("adapters/A/other/x", b"2")
    link = link_newest(storage, A, "0123456789abcdef")
    assert link == storage.local_folder / "adapter_A"
    assert (link / "x").read_bytes() == b"1"
    # the link is relative, so that users can move the output or mount it elsewhere
    assert link.readlink() == Path("adapters/A/0123456789abcdef")
    link_newest(storage, A, "other")
    assert (link / "x").read_bytes() == b"2"
    link_newest(storage, A, "gone")
    assert link.is_symlink()
    link_newest(storage, A, "other")
    assert (link / "x").read_bytes() == b"2"
    assert sorted(path.name for path in storage.local_folder.iterdir()) == ["adapter_A", "adapters"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_link_is_not_replaced(storage: Storage, kind: str) -> None:
    assert storage.local_folder is not None
    storage.write_bytes("adapter_A/precious" if kind == "folder" else "adapter_A", b"x")
    with pytest.raises(StorageError, match="adapter_A: in the way: got a file or folder, expected nothing or a link; move it away"):
        link_newest(storage, A, "0123456789abcdef")
    assert len(list(storage.list(""))) == 1


@pytest.mark.usefixtures("aws_environment")
def test_an_object_store_has_no_links() -> None:
    assert link_newest(open_storage("s3://bucket/out/"), A, "0123456789abcdef") is None


# -- the documents --------------------------------------------------------------------------------------


def accepts(schema: dict[str, Any], value: object) -> bool:
    """Validate against the subset of JSON Schema that our schemas use. An unknown keyword fails the test."""
    assert set(schema) <= {
        "$schema", "type", "properties", "required", "additionalProperties", "minLength", "maxLength", "enum",
    }  # fmt: skip
    if schema["type"] == "object":
        assert schema["additionalProperties"] is False
        properties = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(properties)
            and all(accepts(properties[name], part) for name, part in value.items())
        )
    assert schema["type"] == "string"
    return (
        isinstance(value, str)
        and value in schema.get("enum", [value])
        and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
    )


def test_the_schema_takes_replies_and_nothing_else() -> None:
    schema: Any = json.loads(json.dumps(response_schema()))
    for expression in Expression:
        assert accepts(schema, json.loads(reply_json("오! 나 금방 도착해! 😊", expression)))
    assert accepts(schema, {"text": "가" * 200, "emotion": "smile"})
    for value in (
        {"text": "", "emotion": "smile"},
        {"text": "가" * 201, "emotion": "smile"},
        {"text": "응", "emotion": "happy"},
        {"text": "응", "emotion": "SMILE"},
        {"text": "응"},
        {"emotion": "smile"},
        {"text": "응", "emotion": "smile", "more": 1},
        {"text": 5, "emotion": "smile"},
        ["응", "smile"],
        "응",
    ):
        assert not accepts(schema, value), value


def test_every_bundled_reply_is_one_that_the_schema_takes() -> None:
    schema: Any = response_schema()
    data = Path(__file__).resolve().parents[2] / "data"
    lines = [
        line for file in sorted(data.glob("train_data_type_*.jsonl")) for line in file.read_text(encoding="utf-8").splitlines()
    ]
    assert len(lines) > 100
    for line in lines:
        output = json.loads(line)["output"]
        assert accepts(schema, json.loads(output) if isinstance(output, str) else output)


@pytest.fixture(scope="module")
def made() -> MadeRun:
    """Make a run with few questions and compute its metrics."""
    return made_run(prompts=6, sampled=False, steps=3, settings=(("lora.r", 8),))


@pytest.mark.parametrize("revision", ["a09a35458c702b33eeacc393d103063234e8bc28", None])
def test_the_documents(folder: Path, made: MadeRun, revision: str | None) -> None:
    base = Base("Qwen/Qwen2.5-7B-Instruct", revision, "identity", None)
    training = made.metrics.training.model_copy(update={"records": 1234, "steps": 56, "kept_step": 56})
    held_out = made.metrics.held_out.model_copy(update={"records": 7, "loss_base": 3.21987, "loss_adapter": 1.5})
    metrics = made.metrics.model_copy(update={"run_id": "0123456789abcdef", "training": training, "held_out": held_out})
    write_documents(folder, made.config, base, metrics)
    write_evaluation(folder, metrics, made.steps, made.replies, made.facts)
    read = {
        path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.is_file() and path.suffix != ".safetensors"
    }
    assert json.loads(read["prompt.json"]) == prompt_template(persona_spec(A).instruction)
    assert "상황" in read["prompt.json"], "Korean as itself, for whoever reads it"
    assert json.loads(read["response_schema.json"]) == response_schema()
    assert RunMetrics.model_validate_json(read["metrics.json"]) == metrics
    assert json.loads(read["metrics.schema.json"]) == metrics_schema()
    assert yaml.safe_load(read["persona.yaml"]) == persona_spec(A).model_dump(mode="json")
    steps = [json.loads(line) for line in read["train_log.jsonl"].splitlines()]
    assert [StepLog(**step) for step in steps] == list(made.steps)
    replies = [json.loads(line) for line in read["replies.jsonl"].split("\n") if line]
    assert replies == [reply.model_dump(mode="json") for reply in made.replies]
    assert read["report.html"].lstrip().startswith("<!")
    card = read["README.md"]
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["library_name"]) == ("Qwen/Qwen2.5-7B-Instruct", "peft")
    assert "Run `0123456789abcdef`: 1,234 records, 56 optimizer steps, rank 8" in card
    assert "Held-out loss 3.220 (base) to 1.500 (adapter)" in card
    assert persona_spec(A).instruction in card
    assert all(word in card for _, word in STRENGTHS)
    pinned = f" --revision {revision}" if revision else ""
    assert f"vllm serve Qwen/Qwen2.5-7B-Instruct{pinned} --enable-lora --max-lora-rank 8 \\\n  --lora-modules persona-A=" in card
    assert (f'revision="{revision}"' in card) is (revision is not None)
    assert "None" not in card


def test_an_earlier_prompt_is_the_one_in_the_bundle(folder: Path, made: MadeRun) -> None:
    write_documents(folder, made.config, Base("x/y", None, "identity", None), made.metrics, 2)
    assert read_prompt_version(folder, "") == 2


def test_the_card_says_which_versions_were_tried(folder: Path, made: MadeRun) -> None:
    """The card and docs/serving.md say what `make consumers-test` measured."""
    consumers = load_tool("consumers")
    results = json.loads(consumers.RESULTS.read_text(encoding="utf-8"))
    same = {(row["transformers"], row["peft"]) for row in results["pairs"] if row["result"] == consumers.EQUAL}
    broken = {(row["transformers"], row["peft"]) for row in results["pairs"]} - same
    assert {(transformers, peft) for transformers, several in SAME_TOKENS.items() for peft in several} == same
    assert {(transformers, peft) for transformers, several in BROKEN.items() for peft in several} == broken
    assert {("4.51.3", "0.12.0"), ("4.57.6", "0.17.1"), ("5.17.0", "0.21.2")} <= same
    page = consumers.PAGE.read_text(encoding="utf-8")
    assert consumers.with_table(page, results) == page

    write_documents(folder, made.config, Base("x/y", None, "identity", None), made.metrics)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "- transformers 4.51.3 with PEFT 0.12.0, 0.17.1, 0.21.2\n" in card
    assert "do not import together:\n\n- transformers 5.17.0 with PEFT 0.17.1\n" in card


def test_the_card_says_what_was_measured(folder: Path, made: MadeRun) -> None:
    write_documents(folder, made.config, Base("x/y", None, "identity", None), made.metrics)
    card = (folder / "README.md").read_text(encoding="utf-8")
    # with only six prompts, no lower bound can reach 0.97
    assert not made.metrics.verdict.passed
    assert "Gates at publication: **not passed**, on 12 greedy, unconstrained replies to\n6 held-out prompts" in card
    rate = made.metrics.evaluation.greedy.adapter.exact_json
    assert f"| exact JSON | {rate.successes} of 12 | {rate.value:.1%} | {rate.lower:.1%} | " in card
    assert len(re.findall(r"^\| [^|]+ \| \d+ of \d+ (\| [\d.]+% ){4}\|$", card, re.MULTILINE)) == 6
    covered = scope(made.metrics.verdict)
    assert f"6 held-out prompts. {covered.judged} **{covered.not_judged}**" in card


# -- reading back --------------------------------------------------------------------------------------------


def publish_made(folder: Path, made: MadeRun, storage: Storage, prompt: Mapping[str, Any] = PROMPT_3) -> dict[str, Any]:
    write_made_evaluation(made, folder)
    write_json(folder / "prompt.json", prompt)
    verdict = made.metrics.verdict
    manifest = write_manifest(folder, {**facts(), "gate_id": verdict.gate_id, "verdict": verdict.model_dump(mode="json")})
    publish_bundle(folder, storage, PREFIX)
    return manifest


@pytest.mark.parametrize(("prompt", "version"), [(PROMPT_2, 2), (PROMPT_3, 3)])
def test_a_bundle_keeps_the_prompt_that_it_was_trained_on(
    folder: Path, made: MadeRun, storage: Storage, tmp_path: Path, prompt: Mapping[str, Any], version: int
) -> None:
    manifest = publish_made(folder, made, storage, prompt)
    assert read_published(storage, PREFIX, manifest, tmp_path / "back").prompt_version == version


@pytest.mark.parametrize("version", [0, 1, 4])
def test_a_prompt_of_another_version_is_one_message(
    folder: Path, made: MadeRun, storage: Storage, tmp_path: Path, version: int
) -> None:
    manifest = publish_made(folder, made, storage, {**PROMPT_3, "version": version})
    with pytest.raises(ConfigError) as refused:
        read_published(storage, PREFIX, manifest, tmp_path / "back")
    (problem,) = refused.value.problems
    assert f"{PREFIX}prompt.json: version: got {version}, expected 2 or 3" in problem
    assert "use the version that trained the adapter" in problem


def test_what_was_published_comes_back(folder: Path, made: MadeRun, storage: Storage, tmp_path: Path) -> None:
    manifest = publish_made(folder, made, storage)
    back = read_published(storage, PREFIX, manifest, tmp_path / "back")
    assert (back.training, back.held_out) == (made.metrics.training, made.metrics.held_out)
    assert back.peak_memory_gib == made.metrics.peak_memory_gib
    assert back.steps == tuple(made.steps)
    assert back.evaluation == made.metrics.evaluation
    assert back.replies == list(made.replies)
    assert back.prompt_version == PROMPT_3["version"]
    names = {path.relative_to(back.folder).as_posix() for path in back.folder.rglob("*") if path.is_file()}
    assert names == set(manifest["files"])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "metrics.json", "replies.jsonl"])
@pytest.mark.parametrize("missing", [False, True], ids=["changed", "missing"])
def test_a_bundle_that_is_damaged_does_not_come_back(
    folder: Path, made: MadeRun, storage: Storage, tmp_path: Path, name: str, missing: bool
) -> None:
    manifest = publish_made(folder, made, storage)
    assert storage.local_folder is not None
    path = storage.local_folder / PREFIX / name
    if missing:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"X")
    expected = "cannot be downloaded .*move that prefix away" if missing else "was changed: move that prefix away"
    with pytest.raises(DamagedError, match=f"{re.escape(name)}: .*{expected}"):
        read_published(storage, PREFIX, manifest, tmp_path / "back")


def test_a_manifest_cannot_put_files_elsewhere(folder: Path, made: MadeRun, storage: Storage, tmp_path: Path) -> None:
    manifest = publish_made(folder, made, storage)
    manifest["files"] = {"../../outside": {"size_bytes": 1, "sha256": "0"}}
    with pytest.raises(DamagedError, match=r"unsafe key '\.\./\.\./outside'"):
        read_published(storage, PREFIX, manifest, tmp_path / "a" / "b")
    assert not (tmp_path / "outside").exists()


def test_a_bundle_from_before_there_were_evaluations_comes_back_without(
    folder: Path, made: MadeRun, storage: Storage, tmp_path: Path
) -> None:
    """The adapter itself is intact, so the job evaluates it again instead of training again."""
    write_made_evaluation(made, folder)
    old = {name: value for name, value in made.metrics.as_json().items() if name not in ("evaluation", "verdict", "schema")}
    (folder / "metrics.json").write_text(json.dumps(old), encoding="utf-8")
    write_json(folder / "prompt.json", PROMPT_2)
    for name in ("replies.jsonl", "report.html", "metrics.schema.json"):
        (folder / name).unlink()
    manifest = write_manifest(folder, facts())
    publish_bundle(folder, storage, PREFIX)
    back = read_published(storage, PREFIX, manifest, tmp_path / "back")
    assert (back.evaluation, back.replies) == (None, [])
    assert back.training == made.metrics.training
    assert read_verdict(storage, PREFIX, manifest, "0" * 16) is None


@pytest.mark.parametrize("metrics", ["", "[]", "{}", '{"training": 5}', "null"])
def test_metrics_that_are_none(folder: Path, made: MadeRun, storage: Storage, tmp_path: Path, metrics: str) -> None:
    write_made_evaluation(made, folder)
    (folder / "metrics.json").write_text(metrics)
    manifest = write_manifest(folder, facts())
    publish_bundle(folder, storage, PREFIX)
    with pytest.raises(ConfigError, match=r"this version can't read metrics\.json"):
        read_published(storage, PREFIX, manifest, tmp_path / "back")


def test_the_verdict_of_a_bundle_and_those_beneath_it(folder: Path, made: MadeRun, storage: Storage, tmp_path: Path) -> None:
    manifest = publish_made(folder, made, storage)
    mine, other = made.metrics.verdict, made.metrics.verdict.model_copy(update={"gate_id": "f" * 16, "passed": True})
    assert read_verdict(storage, PREFIX, manifest, mine.gate_id) == (mine, PREFIX)
    assert read_verdict(storage, PREFIX, manifest, other.gate_id) is None
    later = fresh_folder(tmp_path / "later")
    write_manifest(later, {**facts(), "gate_id": other.gate_id, "verdict": other.model_dump(mode="json")})
    prefix = evaluation_prefix(PREFIX, other.gate_id)
    publish_bundle(later, storage, prefix)
    assert read_verdict(storage, PREFIX, manifest, other.gate_id) == (other, prefix)
    assert read_verdict(storage, PREFIX, manifest, mine.gate_id) == (mine, PREFIX)
    assert verify_files(storage, PREFIX) == []


@pytest.mark.parametrize("verdict", [None, {}, [], {"gate_id": "x", "passed": "perhaps", "gates": []}])
def test_a_verdict_that_is_none(storage: Storage, verdict: object) -> None:
    with pytest.raises(ConfigError, match=r"manifest\.json: holds no valid verdict"):
        read_verdict(storage, PREFIX, {"gate_id": "x", "verdict": verdict}, "x")


def test_a_fresh_folder_is_empty(tmp_path: Path) -> None:
    for _ in range(2):
        made = fresh_folder(tmp_path / "a" / "bundle")
        assert list(made.iterdir()) == []
        (made / "left").mkdir()
        (made / "left" / "over").touch()


def test_what_a_backend_must_have_saved(folder: Path) -> None:
    check_complete(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InvariantError, match=r"saved no adapter_model\.safetensors, tokenizer\.json: the bundle would not load"):
        check_complete(folder)


@pytest.mark.parametrize(("r", "rank"), [(1, 1), (2, 8), (8, 8), (12, 16), (16, 16), (65, 128), (257, 320), (512, 512)])
def test_the_card_names_a_rank_that_vllm_takes(r: int, rank: int) -> None:
    assert vllm_lora_rank(r) == rank

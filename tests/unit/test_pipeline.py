"""The steps of a run that need no torch, each with its real parts: files, tokenizer, storage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from lora_trainer import bundle, pipeline
from lora_trainer.backends import open_backend
from lora_trainer.config import RunConfig, settle
from lora_trainer.errors import DataError
from lora_trainer.pipeline import Job, Trained
from lora_trainer.progress import RunProgress
from lora_trainer.storage import sha256_of
from lora_trainer.tokenization import TokenSequence
from lora_trainer.training import StepLog, TrainingLog

REPOSITORY = Path(__file__).resolve().parents[2]
TINY_BASE = REPOSITORY / "examples" / "tiny-base"
DATA = REPOSITORY / "data" / "train_data_type_A.jsonl"


@pytest.fixture(autouse=True)
def nothing_stays_bound() -> Iterator[None]:
    yield
    structlog.contextvars.clear_contextvars()


def config(tmp_path: Path, **changes: Any) -> RunConfig:
    settings = {
        "blood_type": "A",
        "device": "cpu",
        "data": str(DATA.parent),
        "output": str(tmp_path / "out"),
        "work_dir": str(tmp_path / "work"),
        "base.model": str(TINY_BASE),
        "training.quantization": "none",
    }
    return settle({**settings, **changes}, {})


def prepare(job: Job, tmp_path: Path) -> tuple[pipeline.DataFile, pipeline.Identity, pipeline.Prepared]:
    """A run up to the split."""
    pytest.importorskip("transformers", reason="transformers is not installed: no chat template can be applied")
    data = pipeline.fetch(job)
    records = pipeline.read(job, data)
    identity = pipeline.identify(job, data)
    progress = RunProgress(tmp_path / "progress.json", identity.run_id, "A", None)
    return data, identity, pipeline.format_and_split(job, open_backend(job.config), identity, records, progress)


@pytest.mark.parametrize("data", [str(DATA.parent), f"{DATA.parent}/", str(DATA), f"file://{DATA}"])
def test_data_is_a_folder_or_a_file(tmp_path: Path, data: str) -> None:
    job = Job(config(tmp_path, data=data))
    fetched = pipeline.fetch(job)
    assert fetched.uri == f"file://{DATA}"
    assert fetched.path == tmp_path / "work" / "data" / DATA.name
    assert fetched.fetched.sha256 == sha256_of(DATA) == sha256_of(fetched.path)
    assert list(job.timings_s) == ["fetch"]


def test_every_event_after_identification_carries_the_run_id(tmp_path: Path) -> None:
    job = Job(config(tmp_path))
    data = pipeline.fetch(job)
    identity = pipeline.identify(job, data)
    assert structlog.contextvars.get_contextvars() == {"run_id": identity.run_id}
    assert job.run_dir(identity) == tmp_path / "work" / "runs" / "A" / identity.run_id


def test_records_become_steps(tmp_path: Path) -> None:
    job = Job(config(tmp_path, **{"training.sequences_per_step": 16, "training.epochs": 2}))
    with capture_logs() as events:
        _, _, prepared = prepare(job, tmp_path)
    count = len(DATA.read_text(encoding="utf-8").splitlines())
    assert len(prepared.train) + len(prepared.held_out) == count
    assert prepared.left_out == 0
    assert sorted(index for step in prepared.steps for index in step) == sorted([*range(len(prepared.train))] * 2)
    assert prepared.base_folder == TINY_BASE
    assert prepared.longest_tokens == max(map(len, [*prepared.train, *prepared.held_out]))
    formatted = next(event for event in events if event["event"] == "data_formatted")
    assert (formatted["train_records"], formatted["steps"]) == (len(prepared.train), len(prepared.steps))
    assert formatted["tokens"] == sum(map(len, prepared.train))


def test_a_long_record_is_left_out_and_never_cut(tmp_path: Path) -> None:
    _, _, whole = prepare(Job(config(tmp_path)), tmp_path)
    lengths = sorted(map(len, [*whole.train, *whole.held_out]))
    limit = lengths[len(lengths) // 2]
    with capture_logs() as events:
        _, _, some = prepare(Job(config(tmp_path, **{"training.max_length_tokens": limit})), tmp_path)
    assert some.left_out == sum(length > limit for length in lengths) > 0
    # who is left keeps side, order and tokens
    assert some.train == [sequence for sequence in whole.train if len(sequence) <= limit]
    assert some.held_out == [sequence for sequence in whole.held_out if len(sequence) <= limit]
    (event,) = (event for event in events if event["event"] == "records_left_out")
    assert (event["records"], event["log_level"]) == (some.left_out, "warning")


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"0 records left to train on and 0 held out.*max_length_tokens \(16\): add records or raise it"
    ):
        prepare(Job(config(tmp_path, **{"training.max_length_tokens": 16})), tmp_path)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_handful_of_records_is_enough(tmp_path: Path, count: int) -> None:
    lines = DATA.read_text(encoding="utf-8").splitlines(keepends=True)
    for start in range(0, 40, count):
        file = tmp_path / f"few-{start}.jsonl"
        file.write_text("".join(lines[start : start + count]), encoding="utf-8")
        _, _, prepared = prepare(Job(config(tmp_path, data=str(file))), tmp_path)
        assert prepared.train
        assert prepared.held_out


def test_one_record_is_not(tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(DATA.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    with pytest.raises(DataError, match="1 records left to train on and 0 held out, expected at least one of each"):
        prepare(Job(config(tmp_path, data=str(file))), tmp_path)


def test_the_plan_is_said(tmp_path: Path) -> None:
    job = Job(config(tmp_path, **{"memory.micro_batch_tokens": 512}))
    _, _, prepared = prepare(job, tmp_path)
    with capture_logs() as events:
        plan = pipeline.plan_work(job, open_backend(job.config), prepared)
    assert plan.micro_batch_tokens == 512
    (event,) = events
    assert (event["event"], event["micro_batch_tokens"], event["reason"]) == ("plan_chosen", 512, plan.reason)


def trained() -> Trained:
    steps = [StepLog(1, 3.0, 1e-4, 1.0, 900, 300, 3, 1.0), StepLog(2, 2.0, 5e-5, 0.5, 1100, 310, 2, 1.0)]
    return Trained(TrainingLog(steps, packed_rows=4, train_s=2.0), loss_base=2.0, loss_adapter=1.0)


def test_the_metrics_add_up(tmp_path: Path) -> None:
    sequence = TokenSequence((1, 2, 3), 1)
    prepared = pipeline.Prepared(TINY_BASE, [sequence] * 9, [sequence] * 2, [[0]], 0)
    metrics = pipeline.measure(open_backend(config(tmp_path)), prepared, trained())
    assert metrics["training"] == {
        "records": 9,
        "steps": 2,
        "loss_first": 3.0,
        "loss_last": 2.0,
        "tokens": 2000,
        "loss_tokens": 610,
        "rows": 5,
        "packed_rows": 4,
        "train_s": 2.0,
        "tokens_per_s": 1000.0,
    }
    assert metrics["held_out"] == {
        "records": 2,
        "loss_base": 2.0,
        "loss_adapter": 1.0,
        "perplexity_base": pytest.approx(7.389, abs=1e-3),
        "perplexity_adapter": pytest.approx(2.718, abs=1e-3),
    }
    assert metrics["peak_memory_gib"] > 0


def test_publication_then_pointer_then_the_local_copy_goes(tmp_path: Path) -> None:
    job = Job(config(tmp_path))
    identity = pipeline.identify(job, pipeline.fetch(job))
    assert pipeline.find_finished(job, identity) is None
    folder = bundle.fresh_folder(job.run_dir(identity) / "bundle")
    (folder / "adapter_config.json").write_text("{}")
    bundle.write_manifest(folder, {"run_id": identity.run_id, "started_at": job.started_at, "finished_at": job.started_at})
    progress = RunProgress(job.run_dir(identity) / "progress.json", identity.run_id, "A", None)
    outcome = pipeline.publish(job, identity, folder, progress)
    prefix = f"adapters/A/{identity.run_id}/"
    assert outcome == pipeline.Outcome(identity.run_id, f"file://{tmp_path}/out/{prefix}", already_done=False, moved_latest=True)
    assert bundle.verify(job.output, prefix) == []
    assert (tmp_path / "out" / "adapter_A" / "adapter_config.json").is_file()
    assert not folder.exists()
    assert json.loads((job.run_dir(identity) / "progress.json").read_text())["stage"] == "done"
    again = pipeline.find_finished(Job(config(tmp_path)), identity)
    assert again == pipeline.Outcome(identity.run_id, outcome.bundle_uri, already_done=True, moved_latest=False)


def test_the_source_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_REVISION", "f" * 40)
    assert pipeline._git_revision() == "f" * 40
    monkeypatch.delenv("GIT_REVISION")
    found = pipeline._git_revision()
    if (REPOSITORY / ".git").exists():
        assert found is not None
        assert len(found) == 40
    else:
        assert found is None


def test_the_image_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGE_DIGEST", "sha256:abc")
    assert pipeline._image_digest() == "sha256:abc"
    monkeypatch.setenv("IMAGE_DIGEST", "")
    assert pipeline._image_digest() is None


def test_the_pipeline_imports_without_the_training_stack() -> None:
    """CI and data authors have no torch; and a bad record must not wait for its import."""
    program = (
        "import sys\n"
        "import lora_trainer.pipeline, entrypoint.cli\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'unsloth', 'huggingface_hub', 'boto3'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)

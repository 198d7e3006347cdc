"""Test the steps of a run that need no torch, with real files, a real tokenizer and real storage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from conftest import REPOSITORY
from made_metrics import MadeRun, made_run, write_made_adapter, write_made_documents
from structlog.testing import capture_logs

from lora_trainer.config import GatesConfig, RunConfig
from lora_trainer.config_sources import settle
from lora_trainer.data.evaluation_prompts import evaluation_prompts
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.evaluate import gates
from lora_trainer.evaluate.advice import Known
from lora_trainer.evaluate.metrics import RunMetrics, Verdict
from lora_trainer.evaluate.questions import evaluation_id, prompts_digest
from lora_trainer.run import identity as identities
from lora_trainer.run import inputs, publication, training
from lora_trainer.run.bundle_files import write_evaluation
from lora_trainer.run.evaluation import Evaluated, decide, known_of
from lora_trainer.run.job import Job, ProcessContext
from lora_trainer.run.progress import RunProgress
from lora_trainer.run.training import Trained
from lora_trainer.store.bundle import publish_bundle
from lora_trainer.store.lease import Record
from lora_trainer.store.local import fresh_folder, sha256_of
from lora_trainer.store.manifest import read_manifest, verify_files, write_manifest
from lora_trainer.store.prefixes import bundle_prefix
from lora_trainer.train.backends import open_backend
from lora_trainer.train.held_out import HeldOutLoss
from lora_trainer.train.memory_plan import MemoryPlan
from lora_trainer.train.step_log import StepLog, TrainingLog
from lora_trainer.train.tokenization import TokenSequence, tokenize

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


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Copy the beginning of the bundled data, because validating all of it takes seconds."""
    file = tmp_path / "few" / DATA.name
    file.parent.mkdir()
    file.write_text("".join(DATA.read_text(encoding="utf-8").splitlines(keepends=True)[:160]), encoding="utf-8")
    return file


def prepare(job: Job, tmp_path: Path) -> tuple[inputs.DataFile, identities.Identity, training.TrainingPlan]:
    """Run all steps up to the held-out split."""
    pytest.importorskip("transformers", reason="transformers is not installed: no chat template can be applied")
    data = inputs.fetch(job)
    records = inputs.read(job, data)
    identity = identities.identify(job, data, inputs.fetch_prompts(job))
    progress = RunProgress(tmp_path / "progress.json", identity.run_id, "A", None)
    return data, identity, training.plan_training(job, open_backend(job.config), identity.base, records, progress)


@pytest.mark.parametrize("data", [str(DATA.parent), f"{DATA.parent}/", str(DATA), f"file://{DATA}"])
def test_data_is_a_folder_or_a_file(tmp_path: Path, data: str) -> None:
    job = Job(config(tmp_path, data=data))
    fetched = inputs.fetch(job)
    assert fetched.uri == f"file://{DATA}"
    assert fetched.path == tmp_path / "work" / "data" / DATA.name
    assert fetched.fetched.sha256 == sha256_of(DATA) == sha256_of(fetched.path)
    assert list(job.timings_s) == ["fetch"]


def test_every_event_after_identification_carries_the_run_id(tmp_path: Path) -> None:
    job = Job(config(tmp_path))
    data = inputs.fetch(job)
    identity = identities.identify(job, data, inputs.fetch_prompts(job))
    assert structlog.contextvars.get_contextvars() == {"run_id": identity.run_id}
    assert job.run_dir(identity.run_id) == tmp_path / "work" / "runs" / "A" / identity.run_id


def test_records_become_steps(tmp_path: Path, few: Path) -> None:
    job = Job(config(tmp_path, data=str(few), **{"training.sequences_per_step": 16, "training.epochs": 2}))
    with capture_logs() as events:
        _, _, prepared = prepare(job, tmp_path)
    count = len(few.read_text(encoding="utf-8").splitlines())
    split = prepared.data
    assert len(split.train) + len(split.held_out) == count
    assert len(split.train_records) == len(split.train)
    assert split.left_out == 0
    assert sorted(index for step in prepared.steps for index in step) == sorted([*range(len(split.train))] * 2)
    assert prepared.base_folder == TINY_BASE
    assert split.longest_tokens == max(map(len, [*split.train, *split.held_out]))
    formatted = next(event for event in events if event["event"] == "data_formatted")
    assert (formatted["train_records"], formatted["steps"]) == (len(split.train), len(prepared.steps))
    assert formatted["tokens"] == sum(map(len, split.train))


def test_a_benchmark_trains_an_earlier_prompt(tmp_path: Path, few: Path) -> None:
    """It is another run, whose records and questions have the earlier form. No setting does this."""
    settings = config(tmp_path, data=str(few))
    _, now, _ = prepare(Job(settings), tmp_path)
    _, earlier, prepared = prepare(Job(settings, ProcessContext(prompt_version=2)), tmp_path)
    assert (now.ingredients["prompt_version"], earlier.ingredients["prompt_version"]) == (3, 2)
    assert (now.run_id != earlier.run_id, now.evaluation_id != earlier.evaluation_id) == (True, True)
    data, tokenizer = prepared.data, open_backend(settings).load_tokenizer(TINY_BASE)
    assert data.train == tokenize(data.train_records, tokenizer, 2) != tokenize(data.train_records, tokenizer)


def test_a_long_record_is_left_out_and_never_cut(tmp_path: Path, few: Path) -> None:
    whole = prepare(Job(config(tmp_path, data=str(few))), tmp_path)[2].data
    lengths = sorted(map(len, [*whole.train, *whole.held_out]))
    limit = lengths[len(lengths) // 2]
    with capture_logs() as events:
        some = prepare(Job(config(tmp_path, data=str(few), **{"training.max_length_tokens": limit})), tmp_path)[2].data
    assert some.left_out == sum(length > limit for length in lengths) > 0
    # the remaining records keep their side of the split, their order and their tokens
    assert some.train == [sequence for sequence in whole.train if len(sequence) <= limit]
    assert some.held_out == [sequence for sequence in whole.held_out if len(sequence) <= limit]
    (event,) = (event for event in events if event["event"] == "records_left_out")
    assert (event["records"], event["log_level"]) == (some.left_out, "warning")


@pytest.mark.parametrize("limit", [1024, 90])
def test_what_an_adapter_is_compared_with_is_what_it_was_trained_on(tmp_path: Path, few: Path, limit: int) -> None:
    """This holds in the run itself and when the job evaluates its bundle again later."""
    job = Job(config(tmp_path, data=str(few), **{"training.max_length_tokens": limit}))
    data, _, plan = prepare(job, tmp_path)
    tokenizer = open_backend(job.config).load_tokenizer(TINY_BASE)
    again = training.tokenize_and_split(job, inputs.read(job, data), tokenizer)
    assert (again.left_out > 0) is (limit < 1024)
    assert again == plan.data
    assert len(again.train_records) == len(again.train)


def test_nothing_left_to_train_on(tmp_path: Path, few: Path) -> None:
    with pytest.raises(
        DataError, match=r"0 records left to train on and 0 held out.*max_length_tokens \(16\): add records or raise it"
    ):
        prepare(Job(config(tmp_path, data=str(few), **{"training.max_length_tokens": 16})), tmp_path)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_handful_of_records_is_enough(tmp_path: Path, count: int) -> None:
    lines = DATA.read_text(encoding="utf-8").splitlines(keepends=True)
    for start in range(0, 40, count):
        file = tmp_path / f"few-{start}.jsonl"
        file.write_text("".join(lines[start : start + count]), encoding="utf-8")
        _, _, plan = prepare(Job(config(tmp_path, data=str(file))), tmp_path)
        assert plan.data.train
        assert plan.data.held_out


def test_one_record_is_not(tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(DATA.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    with pytest.raises(DataError, match="1 records left to train on and 0 held out, expected at least one of each"):
        prepare(Job(config(tmp_path, data=str(file))), tmp_path)


def test_the_plan_is_said(tmp_path: Path, few: Path) -> None:
    job = Job(config(tmp_path, data=str(few), **{"memory.micro_batch_tokens": 512}))
    with capture_logs() as events:
        _, _, plan = prepare(job, tmp_path)
    assert plan.memory.micro_batch_tokens == 512
    (event,) = (event for event in events if event["event"] == "plan_chosen")
    assert (event["micro_batch_tokens"], event["reason"]) == (512, plan.memory.reason)


def trained() -> Trained:
    steps = [StepLog(1, 3.0, 1e-4, 1.0, 900, 300, 3, 1.0), StepLog(2, 2.0, 5e-5, 0.5, 1100, 310, 2, 1.0)]
    losses = [HeldOutLoss(1, 1.0), HeldOutLoss(2, 1.5)]
    return Trained(TrainingLog(steps, packed_rows=4, train_s=2.0, held_out=losses), loss_base=2.0, kept=losses[0])


@pytest.fixture(scope="module")
def made() -> MadeRun:
    """Make a run with twenty-four prompts, each asked twice. The replies are made up; everything computed from them is real."""
    return made_run(prompts=24, sampled=False, steps=3, flaws=0.0)


def test_the_metrics_add_up(tmp_path: Path, made: MadeRun) -> None:
    sequence = TokenSequence((1, 2, 3), 1)
    split = training.TokenizedData([], [sequence] * 9, [], [sequence] * 2, 0)
    plan = training.TrainingPlan(TINY_BASE, split, [[0]] * 3, MemoryPlan("off", 512, None, "as told"))
    job = Job(config(tmp_path))
    data = inputs.fetch(job)
    identity = identities.identify(job, data, evaluation_prompts())
    evaluated = Evaluated(made.metrics.evaluation, list(made.replies))
    verdict = decide(job, evaluated.metrics, Known())
    folder = fresh_folder(tmp_path / "bundle")
    publication.assemble(job, open_backend(job.config), folder, identity, data, plan, trained(), evaluated, verdict)
    document = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert document["training"] == {
        "records": 9,
        "steps": 2,
        "planned_steps": 3,
        "kept_step": 1,
        "held_out_losses": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.5}],
        "loss_first": 3.0,
        "loss_last": 2.0,
        "tokens": 2000,
        "loss_tokens": 610,
        "rows": 5,
        "packed_rows": 4,
        "train_s": 2.0,
        "tokens_per_s": 1000.0,
    }
    assert document["held_out"] == {
        "records": 2,
        "loss_base": 2.0,
        "loss_adapter": 1.0,
        "perplexity_base": pytest.approx(7.389, abs=1e-3),
        "perplexity_adapter": pytest.approx(2.718, abs=1e-3),
    }
    assert (document["run_id"], document["blood_type"]) == (identity.run_id, "A")
    assert document["evaluation"] == made.metrics.as_json()["evaluation"]
    assert document["verdict"]["gate_id"] == verdict.gate_id
    assert document["peak_memory_gib"] > 0


@pytest.mark.parametrize(("threshold", "passed"), [(0.5, True), (0.97, False)])
def test_the_verdict_is_said(tmp_path: Path, made: MadeRun, threshold: float, passed: bool) -> None:
    """With only 48 replies, the lower bound cannot reach 0.97, however good they are."""
    training = made.metrics.training.model_copy(update={"held_out_losses": (), "kept_step": None})
    with capture_logs() as events:
        verdict = decide(
            Job(config(tmp_path, **{"gates.exact_json": threshold, **no_gates("exact_json")})),
            made.metrics.evaluation,
            known_of(training, loss_base=2.0, loss_adapter=2.5),
        )
    (event,) = events
    assert (event["event"], event["passed"], verdict.passed) == ("gates_decided", passed, passed)
    assert event["gate_id"] == verdict.gate_id
    assert event["missed"] == gates.missed_gate_messages(verdict)
    assert len(event["missed"]) == (0 if passed else 1)
    # a loss above the base's is all that this job knows about overfitting
    assert ["overfitted" in line for line in event["missed"]] == ([] if passed else [True])
    assert event["not_judged"] == {"sense": "off", "harmful": "off", "incomplete": "off"}


def test_publication_then_pointer_then_the_local_copy_goes(tmp_path: Path) -> None:
    job = Job(config(tmp_path))
    identity = identities.identify(job, inputs.fetch(job), evaluation_prompts())
    assert publication.find_finished(job, identity) is None
    assert publication.find_published(job, identity.run_id) is None
    verdict = Verdict(gate_id=identity.gate_id, passed=True, gates=())
    folder = made_folder(job, identity, verdict)
    progress = RunProgress(job.run_dir(identity.run_id) / "progress.json", identity.run_id, "A", None)
    outcome = publication.publish(job, identity.run_id, folder, verdict, progress)
    prefix = f"adapters/A/{identity.run_id}/"
    uri = f"file://{tmp_path}/out/{prefix}"
    assert outcome == publication.Outcome(identity.run_id, uri, f"{uri}report.html", verdict, already_done=False, moved_latest=True)
    assert verify_files(job.output, prefix) == []
    assert (tmp_path / "out" / "adapter_A" / "adapter_config.json").is_file()
    assert not folder.exists()
    assert json.loads((job.run_dir(identity.run_id) / "progress.json").read_text())["stage"] == "done"
    again = publication.find_finished(Job(config(tmp_path)), identity)
    assert again == publication.Outcome(identity.run_id, uri, f"{uri}report.html", verdict, already_done=True, moved_latest=False)


def test_what_missed_a_gate_is_published_and_is_not_the_latest(tmp_path: Path) -> None:
    job = Job(config(tmp_path))
    identity = identities.identify(job, inputs.fetch(job), evaluation_prompts())
    verdict = Verdict(gate_id=identity.gate_id, passed=False, gates=())
    progress = RunProgress(job.run_dir(identity.run_id) / "progress.json", identity.run_id, "A", None)
    with capture_logs() as events:
        outcome = publication.publish(job, identity.run_id, made_folder(job, identity, verdict), verdict, progress)
    assert (outcome.verdict.passed, outcome.moved_latest, outcome.already_done) == (False, False, False)
    assert verify_files(job.output, f"adapters/A/{identity.run_id}/") == []
    (checked,) = (event for event in events if event["event"] == "latest_checked")
    assert (checked["moved"], checked["reason"]) == (False, "the gates were not passed")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapters"]
    assert [path.name for path in (tmp_path / "out" / "adapters" / "A").iterdir()] == [identity.run_id]
    again = publication.find_finished(Job(config(tmp_path)), identity)
    assert again is not None
    assert (again.verdict, again.already_done, again.moved_latest) == (verdict, True, False)


@pytest.mark.parametrize("held", [False, True])
def test_what_a_killed_attempt_left_goes_with_the_next_look(tmp_path: Path, held: bool) -> None:
    job = Job(config(tmp_path))
    identity = identities.identify(job, inputs.fetch(job), evaluation_prompts())
    verdict = Verdict(gate_id=identity.gate_id, passed=True, gates=())
    progress = RunProgress(job.run_dir(identity.run_id) / "progress.json", identity.run_id, "A", None)
    publication.publish(job, identity.run_id, made_folder(job, identity, verdict), verdict, progress)
    prefix = f"runs/A/{identity.run_id}/"
    left = {f"{prefix}checkpoints/step-000004/manifest.json", f"{prefix}checkpoints-0a/step-000003/x", f"{prefix}lease.json"}
    for key in left:
        job.output.write_bytes(key, b"{}")
    record = Record(holder="f" * 16, attempt=1, host="elsewhere", duration_s=60, released_at=None if held else "then")
    job.output.write_bytes(f"{prefix}lease.json", record.as_bytes())
    assert publication.find_finished(job, identity) is not None
    # the job does not remove files of a running attempt
    assert {item.key for item in job.output.list("runs/")} == (left if held else set())


def made_folder(job: Job, identity: identities.Identity, verdict: Verdict) -> Path:
    """Write a bundle that is ready for publication."""
    folder = fresh_folder(job.run_dir(identity.run_id) / "bundle")
    (folder / "adapter_config.json").write_text("{}")
    facts = {
        "run_id": identity.run_id,
        "started_at": job.started_at,
        "finished_at": job.started_at,
        "gate_id": verdict.gate_id,
        "verdict": verdict.model_dump(mode="json"),
    }
    write_manifest(folder, facts)
    return folder


# -- the evaluation's prompts ---------------------------------------------------------------------------


def prompt_lines(count: int = 24) -> str:
    """Return the first lines of `data/eval_prompts.jsonl`."""
    return "".join(prompt.model_dump_json() + "\n" for prompt in evaluation_prompts()[:count])


def test_the_prompts_that_ship_and_the_users_own(tmp_path: Path) -> None:
    assert inputs.fetch_prompts(Job(config(tmp_path))) == evaluation_prompts()
    mine = tmp_path / "한글 mine.jsonl"
    mine.write_text("\n" + prompt_lines(3).replace("\n", "\r\n"), encoding="utf-8")
    for uri in (str(mine), f"file://{mine}"):
        with capture_logs() as events:
            found = inputs.fetch_prompts(Job(config(tmp_path, **{"evaluation.prompts": uri})))
        assert found == evaluation_prompts()[:3]
        assert (events[-1]["event"], events[-1]["prompts"]) == ("prompts_fetched", 3)


def test_the_same_prompts_elsewhere_are_the_same_verdict(tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_text(prompt_lines(len(evaluation_prompts())), encoding="utf-8")
    job, mine = Job(config(tmp_path)), Job(config(tmp_path, **{"evaluation.prompts": str(copy)}))
    data = inputs.fetch(job)
    plain = identities.identify(job, data, inputs.fetch_prompts(job))
    assert identities.identify(mine, data, inputs.fetch_prompts(mine)) == plain
    fewer = identities.identify(job, data, evaluation_prompts()[1:])
    assert fewer.run_id == plain.run_id
    assert len({fewer.evaluation_id, plain.evaluation_id, fewer.gate_id, plain.gate_id}) == 4
    other = Job(config(tmp_path, **{"gates.persona": 0.71}))
    stricter = identities.identify(other, data, evaluation_prompts())
    assert (stricter.run_id, stricter.evaluation_id) == (plain.run_id, plain.evaluation_id)
    assert stricter.gate_id != plain.gate_id


def test_bad_prompts_are_named_with_file_and_line(tmp_path: Path) -> None:
    good = prompt_lines(1)
    file = tmp_path / "mine.jsonl"
    planted = "아무도보면안되는말"
    file.write_text(
        good
        + '{"input": "나 왔어"}\n'
        + f'{{"context": {{"summary": "", "current_emotion": {{"type": "hungry", "intensity": 3}}}}, "input": "{planted}"}}\n'
        + f"{planted}\n",
        encoding="utf-8",
    )
    with pytest.raises(DataError) as refused:
        inputs.fetch_prompts(Job(config(tmp_path, **{"evaluation.prompts": str(file)})))
    where = f"file://{file}"
    assert [problem.split(": ")[0] for problem in refused.value.problems] == [
        f"{where}:2",
        f"{where}:3",
        f"{where}:3",
        f"{where}:4",
        where,
    ]
    assert refused.value.problems[0].startswith(f"{where}:2: context: got nothing, expected an object")
    assert planted not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("nowhere.jsonl", DataError, "nowhere.jsonl: not found"),
        ("empty.jsonl", DataError, "empty.jsonl: got an empty file"),
        ("folder/", ConfigError, "names no object"),
        ("ftp://x/y.jsonl", ConfigError, "unknown scheme 'ftp://'"),
    ],
)
def test_prompts_that_are_not_there(tmp_path: Path, name: str, kind: type[Exception], said: str) -> None:
    (tmp_path / "empty.jsonl").touch()
    uri = name if "://" in name else f"{tmp_path}/{name}"
    with pytest.raises(kind, match=said):
        inputs.fetch_prompts(Job(config(tmp_path, **{"evaluation.prompts": uri})))


# -- rerunning a finished run from the command line -------------------------------------------

DATA_LINES = 60


def no_gates(*but: str) -> dict[str, None]:
    return {f"gates.{name}": None for name in GatesConfig.model_fields if name not in but}


class Finished:
    """A published run with `gates.exact_json` as its only gate, and the command that would train it."""

    def __init__(self, tmp_path: Path, made: MadeRun, *, threshold: float) -> None:
        self.folder = tmp_path
        (tmp_path / "data").mkdir()
        data = tmp_path / "data" / DATA.name
        data.write_text("".join(DATA.read_text(encoding="utf-8").splitlines(keepends=True)[:DATA_LINES]), encoding="utf-8")
        (tmp_path / "prompts.jsonl").write_text(prompt_lines(), encoding="utf-8")
        self.settings: dict[str, Any] = {
            "evaluation.prompts": str(tmp_path / "prompts.jsonl"),
            "evaluation.temperature": 0,
            **no_gates("exact_json"),
        }
        job = Job(config(tmp_path, data=str(data), **self.settings, **{"gates.exact_json": threshold}))
        self.threshold = threshold
        with capture_logs():
            self.identity = identities.identify(job, inputs.fetch(job), inputs.fetch_prompts(job))
        verdict = gates.decide(made.metrics.evaluation, job.config.gates)
        assert made.metrics.evaluation.evaluation_id == self.identity.evaluation_id
        assert verdict.gate_id == self.identity.gate_id
        metrics = made.metrics.model_copy(update={"run_id": self.identity.run_id, "verdict": verdict})
        facts = {
            **made.facts,
            "run_id": self.identity.run_id,
            "started_at": "2026-01-01T00:00:00+00:00",
            "finished_at": "2026-01-01T00:10:00+00:00",
            "evaluation_id": self.identity.evaluation_id,
            "gate_id": verdict.gate_id,
            "verdict": verdict.model_dump(mode="json"),
            "ingredients": self.identity.ingredients,
            "base": {"id": "tiny-base", "revision": None, "identity": self.identity.base.identity},
            "data": {**made.facts["data"], "sha256": sha256_of(data)},
            "config": job.config.model_dump(mode="json"),
        }
        self.kept = tmp_path / "work" / "runs" / "A" / self.identity.run_id / "bundle"
        """The folder in which a run keeps a bundle that it could not publish."""
        folder = fresh_folder(self.kept)
        write_made_adapter(folder, job.config.lora.r, job.config.lora.target_modules, job.config.lora.alpha)
        write_made_documents(folder, job.config, metrics, self.identity.base)
        write_evaluation(folder, metrics, made.steps, made.replies, facts)
        write_manifest(folder, facts)
        self.prefix = bundle_prefix(job.config.blood_type, self.identity.run_id)
        publish_bundle(folder, job.output, self.prefix)
        self.output = tmp_path / "out"
        self.bundle = self.output / self.prefix

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the bundle's own files by name, without those under evaluations/."""
        return {path.name: sha256_of(path) for path in self.bundle.iterdir() if path.is_file() and not path.name.startswith(".")}

    def gate_id(self, threshold: float) -> str:
        settings = config(self.folder, **self.settings, **{"gates.exact_json": threshold})
        return gates.gate_id(evaluation_id(settings.evaluation, prompts_digest(evaluation_prompts()[:24])), settings.gates)

    def run(self, threshold: float | None = None, *more: str) -> tuple[int, str, dict[str, dict[str, Any]]]:
        """Run the command in a process that cannot import torch. Return exit code, standard output and log by event."""
        program = (
            "import sys\n"
            "from entrypoint.cli import run_cli\n"
            "code = run_cli(sys.argv[1:])\n"
            "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'unsloth'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
            "sys.exit(code)\n"
        )
        settings = {**self.settings, "gates.exact_json": self.threshold if threshold is None else threshold}
        arguments = [
            "run", "--blood-type", "A", "--data", str(self.folder / "data" / DATA.name), "--output", str(self.output),
            "--work-dir", str(self.folder / "work"), "--device", "cpu", "--base-model", str(TINY_BASE), "--log-format", "json",
            "--set", "training.quantization=none",
            *(part for name, value in settings.items() for part in ("--set", f"{name}={'none' if value is None else value}")),
            *more,
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=self.folder,
            env={**{k: v for k, v in os.environ.items() if not k.startswith("LORA_TRAINER_")}, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        events = [json.loads(line) for line in done.stderr.splitlines()]
        return done.returncode, done.stdout, {event["event"]: event for event in events}


@pytest.mark.parametrize(
    ("threshold", "code"),
    [
        pytest.param(0.9, 0, id="passed"),
        # tests/e2e/test_sabotage.py repeats a missed verdict
        pytest.param(0.97, 4, id="missed", marks=pytest.mark.slow),
    ],
)
def test_a_finished_run_repeats_its_verdict(tmp_path: Path, made: MadeRun, threshold: float, code: int) -> None:
    finished = Finished(tmp_path, made, threshold=threshold)
    before = finished.hashes()
    ended, out, events = finished.run()
    last = events["run_finished"]
    assert (ended, last["exit_code"], last["already_done"], last["passed"]) == (code, code, True, code == 0)
    assert out == f"file://{finished.bundle}/\n"
    assert last["report"] == f"file://{finished.bundle}/report.html"
    assert "evaluating_again" not in events
    assert (finished.output / "adapters" / "A" / "latest.json").exists() is (code == 0)
    assert finished.hashes() == before
    assert not (finished.bundle / "evaluations").exists()
    if code == 4:
        (problem,) = last["problems"]
        assert problem.startswith("gates.exact_json: got 0.911 (lower 95 % bound (exact, by prompt) of 1.000), expected >= 0.97")


@pytest.mark.slow  # tests/e2e/test_sabotage.py lowers the thresholds of a run and raises them again
@pytest.mark.parametrize(("first", "second", "code"), [(0.97, 0.9, 0), (0.9, 0.97, 4)], ids=["then-passed", "then-missed"])
def test_other_thresholds_decide_again_from_what_was_published(
    tmp_path: Path, made: MadeRun, first: float, second: float, code: int
) -> None:
    finished = Finished(tmp_path, made, threshold=first)
    before = finished.hashes()
    gate_id = finished.gate_id(second)
    assert gate_id != finished.identity.gate_id
    ended, out, events = finished.run(second)
    last = events["run_finished"]
    assert (ended, last["already_done"], last["passed"]) == (code, False, code == 0)
    assert last["run_id"] == finished.identity.run_id
    # the bundle is the same and unchanged
    assert out == f"file://{finished.bundle}/\n"
    assert finished.hashes() == before
    output = Job(config(tmp_path)).output
    assert verify_files(output, finished.prefix) == []
    # the new verdict lies below the bundle, complete and with a report
    prefix = f"{finished.prefix}evaluations/{gate_id}/"
    assert last["report"] == f"file://{finished.output}/{prefix}report.html"
    assert verify_files(output, prefix) == []
    manifest = read_manifest(output, prefix)
    assert manifest is not None
    assert set(manifest["files"]) == {"metrics.json", "metrics.schema.json", "replies.jsonl", "report.html", "train_log.jsonl"}
    assert (manifest["run_id"], manifest["gate_id"], manifest["evaluation_id"]) == (
        finished.identity.run_id, gate_id, finished.identity.evaluation_id,
    )  # fmt: skip
    assert manifest["started_at"] == "2026-01-01T00:00:00+00:00", "the run's, by which latest.json goes"
    assert manifest["config"]["gates"]["exact_json"] == second
    folder = finished.output / prefix
    metrics = RunMetrics.model_validate_json((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics.evaluation == made.metrics.evaluation, "what was measured holds"
    assert (metrics.training, metrics.held_out) == (made.metrics.training, made.metrics.held_out)
    assert (metrics.verdict.passed, metrics.verdict.gate_id) == (code == 0, gate_id)
    assert (folder / "replies.jsonl").read_bytes() == (finished.bundle / "replies.jsonl").read_bytes()
    latest = finished.output / "adapters" / "A" / "latest.json"
    assert latest.exists() is (code == 0)
    # the next run repeats the new verdict
    ended, _, events = finished.run(second)
    again = events["run_finished"]
    assert (ended, again["already_done"], again["report"]) == (code, True, last["report"])
    assert "evaluating_again" not in events
    # with the first thresholds, the run repeats the first verdict
    ended, _, events = finished.run(first)
    assert (ended, events["run_finished"]["already_done"]) == (4 - code, True)
    assert events["run_finished"]["report"] == f"file://{finished.bundle}/report.html"
    assert finished.hashes() == before


def published_by_hand(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "entrypoint", "publish", *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("threshold", "code"), [(0.9, 0), (0.97, 4)], ids=["passed", "missed"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_a_run_could_not_publish_is_published_by_hand(
    tmp_path: Path, made: MadeRun, threshold: float, code: int, elsewhere: bool
) -> None:
    finished = Finished(tmp_path, made, threshold=threshold)
    expected = finished.hashes()
    shutil.rmtree(finished.output)
    output = tmp_path / "elsewhere" if elsewhere else finished.output
    done = published_by_hand(str(finished.kept), *(("--output", str(output)) if elsewhere else ()))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == f"file://{output}/{finished.prefix}\n"
    assert {path.name: sha256_of(path) for path in (output / finished.prefix).iterdir() if path.is_file()} == expected
    assert (output / "adapters" / "A" / "latest.json").exists() is (code == 0)
    assert not finished.kept.exists()


def test_a_bundle_from_elsewhere_does_not_say_itself_where_it_is_published(tmp_path: Path, made: MadeRun) -> None:
    """Otherwise a manifest could choose an output and move its pointer."""
    finished = Finished(tmp_path, made, threshold=0.9)
    shutil.rmtree(finished.output)
    copy = tmp_path / "download" / "bundle"
    shutil.copytree(finished.kept, copy)
    done = published_by_hand(str(copy))
    assert done.returncode == 2
    assert "expected --output" in done.stderr
    assert not finished.output.exists()
    assert copy.exists()
    done = published_by_hand(str(copy), "--output", str(tmp_path / "mine"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / finished.prefix / "manifest.json").exists()
    assert not finished.output.exists()


def test_what_is_no_finished_bundle_is_not_published(tmp_path: Path, made: MadeRun) -> None:
    done = published_by_hand(str(tmp_path))
    assert done.returncode == 2
    assert "got no finished bundle of this version, expected a folder with the manifest.json" in done.stderr
    finished = Finished(tmp_path, made, threshold=0.9)
    shutil.rmtree(finished.output)
    (finished.kept / "adapter_model.safetensors").write_bytes(b"weight!")
    done = published_by_hand(str(finished.kept))
    assert done.returncode == 2
    assert "adapter_model.safetensors: differs from the bundle's manifest" in done.stderr
    assert not finished.output.exists()


@pytest.mark.parametrize("name", ["replies.jsonl", pytest.param("adapter_model.safetensors", marks=pytest.mark.slow)])
def test_a_bundle_that_was_changed_is_not_judged_again(tmp_path: Path, made: MadeRun, name: str) -> None:
    finished = Finished(tmp_path, made, threshold=0.97)
    with (finished.bundle / name).open("ab") as file:
        file.write(b"\n")
    code, out, events = finished.run(0.9)
    last = events["run_finished"]
    assert (code, out, last["outcome"]) == (2, "", "DamagedError")
    (problem,) = last["problems"]
    assert problem.startswith(f"file://{finished.bundle}/{name}: got ")
    assert problem.endswith("the file was changed: move that prefix away and run again")
    assert not (finished.bundle / "evaluations").exists()
    assert not (finished.output / "adapters" / "A" / "latest.json").exists()


def test_bad_prompts_end_the_run_with_exit_3(tmp_path: Path, made: MadeRun) -> None:
    finished = Finished(tmp_path, made, threshold=0.9)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(prompt_lines(2) + '{"input": "나 왔어"}\n' + prompt_lines(1) + "{\n", encoding="utf-8")
    code, out, events = finished.run()
    last = events["run_finished"]
    assert (code, out, last["outcome"]) == (3, "", "DataError")
    assert [problem.split(": ")[0] for problem in last["problems"]] == [
        f"file://{prompts}:3",
        f"file://{prompts}:5",
        f"file://{prompts}",
    ]


def test_the_source_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_REVISION", "f" * 40)
    assert publication.git_revision() == "f" * 40
    monkeypatch.delenv("GIT_REVISION")
    found = publication.git_revision()
    if (REPOSITORY / ".git").exists():
        assert found is not None
        assert len(found) == 40
    else:
        assert found is None


def test_the_image_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGE_DIGEST", "sha256:abc")
    assert publication.image_digest() == "sha256:abc"
    monkeypatch.setenv("IMAGE_DIGEST", "")
    assert publication.image_digest() is None


def test_the_pipeline_imports_without_the_training_stack() -> None:
    """CI and data authors have no torch, and the report of a bad record must not wait for its import."""
    program = (
        "import sys\n"
        "import lora_trainer.run.pipeline, entrypoint.cli\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'unsloth', 'huggingface_hub', 'boto3'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)

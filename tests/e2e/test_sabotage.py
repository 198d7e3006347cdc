"""Sabotage jobs in different ways. The check meant for each case must stop the job with its own exit code.

Each case runs the real command line. To sabotage the training, a `sitecustomize.py` on the Python path patches one function;
everything else is the real job.

"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from jobs import BASE, DEMO, FEW_PROMPTS, NO_GATES, events, job, require_training_stack

from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.store.latest import move_latest
from lora_trainer.store.manifest import verify_files
from lora_trainer.store.opening import open_storage
from lora_trainer.store.prefixes import bundle_prefix, latest_key

pytestmark = pytest.mark.e2e
require_training_stack()

RECORDS = 128
"""Number of records per run, the persona's shortest: a model learns them within a minute."""


# --- sabotage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Return a function that builds the environment for a process that runs `patch` before the program."""

    def environment(patch: str) -> dict[str, str]:
        folder = tmp_path / "patch"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(patch, encoding="utf-8")
        return {"PYTHONPATH": os.pathsep.join((str(folder), str(REPOSITORY)))}

    return environment


ZEROED_WHEN_SAVED = """
from lora_trainer.train.backends.transformers import TransformersBackend

true_save = TransformersBackend.save

def save(self, folder, *arguments):
    from safetensors.torch import load_file, save_file

    true_save(self, folder, *arguments)
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    assert any("lora_B" in name for name in weights)
    save_file({name: weight * 0 if "lora_B" in name else weight for name, weight in weights.items()}, path)

TransformersBackend.save = save
"""

# The model shifts labels itself, so after this patch it learns to predict the token after the next one.
SHIFTED_LABELS = """
from lora_trainer.train.tokenization import TokenSequence

true_labels = TokenSequence.labels.fget
TokenSequence.labels = property(lambda sequence: [*true_labels(sequence)[1:], -100])
"""

WITHOUT_END_OF_TURN = """
from lora_trainer.train.tokenization import TokenSequence

true_labels = TokenSequence.labels.fget
TokenSequence.labels = property(lambda sequence: [*true_labels(sequence)[:-1], -100])
"""

# End the process when it imports torch. An ImportError would not do, because a handler could hide it.
NO_TORCH = """
import os, sys

class Trap:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "peft", "trl"):
            sys.stderr.write(f"{name} was imported\\n")
            sys.stderr.flush()
            os._exit(99)

sys.meta_path.insert(0, Trap())
"""


# --- running -------------------------------------------------------------------------------------------------------


def shortest_records(blood_type: BloodType, count: int = RECORDS) -> list[dict[str, Any]]:
    """Return the bundled records that have the persona's shortest replies."""
    lines = (REPOSITORY / "data" / f"train_data_type_{blood_type}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in sorted(lines, key=lambda line: (len(json.loads(line)["output"]), line))[:count]]


def write_as_a(folder: Path, records: Iterable[dict[str, Any]]) -> str:
    """Write `records` as persona A's file in `folder`."""
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "train_data_type_A.jsonl").write_text(lines, encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return settings that ask a sixth of the prompts greedily at three intensities, enough to miss a gate clearly."""
    path = tmp_path_factory.mktemp("prompts") / "every_sixth.jsonl"
    lines = (REPOSITORY / "data" / "eval_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[::6]) + "\n", encoding="utf-8")
    return (
        "--set", f"evaluation.prompts={path}", "--set", "evaluation.temperature=0", "--set", "evaluation.intensities=0.1,0.5,1.0",
        "--set", "evaluation.intensities_per_prompt=3",
    )  # fmt: skip


def steps(count: int) -> tuple[str, ...]:
    """Return settings for exactly `count` optimizer steps, however few records there are. They are learned by heart."""
    return ("--set", "training.epochs=50", "--max-steps", str(count), "--set", "training.keep=last")


def run_a(data: str, output: Path, *arguments: str, work_dir: Path, **environment: Any) -> subprocess.CompletedProcess[str]:
    """Run the demo for persona A on other data."""
    command = ("run", *DEMO, "--blood-type", "A", "--data", data, "--output", str(output))
    return job(*command, *arguments, work_dir=work_dir, **environment)


@dataclass(frozen=True)
class Refused:
    """A finished run whose adapter missed gates."""

    log: dict[str, dict[str, Any]]
    metrics: dict[str, Any]

    @property
    def run_id(self) -> str:
        return str(self.log["run_finished"]["run_id"])

    @property
    def missed(self) -> set[str]:
        """The missed gates that the final log line names."""
        return {problem.split(":")[0].removeprefix("gates.") for problem in self.log["run_finished"]["problems"]}


def refused(done: subprocess.CompletedProcess[str], output: Path) -> Refused:
    """Check that `done` exited with 4 and published a complete bundle that neither `latest.json` nor the link names."""
    assert done.returncode == 4, done.stderr[-4000:]
    log = events(done)
    finished = log["run_finished"]
    assert (finished["outcome"], finished["exit_code"], finished["passed"]) == ("GateError", 4, False)
    prefix = bundle_prefix(BloodType.A, finished["run_id"])
    assert verify_files(open_storage(str(output)), prefix) == []
    assert not (output / latest_key(BloodType.A)).exists()
    assert not (output / "adapter_A").exists()
    # the log names the report of the newest verdict
    report = Path(finished["report"].removeprefix("file://"))
    assert report.is_file()
    metrics = json.loads((report.parent / "metrics.json").read_text(encoding="utf-8"))
    found = Refused(log, metrics)
    assert found.missed == {gate["name"] for gate in metrics["verdict"]["gates"] if not gate["passed"]}
    return found


# --- before a verdict ----------------------------------------------------------------------------------------------


def test_replies_that_are_not_json_are_the_readers(
    asking: tuple[str, ...], spoiled: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    plain = [{**record, "output": json.loads(record["output"])["text"]} for record in shortest_records(BloodType.A, 24)]
    data = write_as_a(tmp_path / "data", plain)
    done = run_a(data, tmp_path / "out", *asking, work_dir=tmp_path / "work", **spoiled(NO_TORCH))

    assert done.returncode == 3, done.stderr[-2000:]
    log = events(done)
    assert "backend_started" not in log
    *lines, last = log["run_finished"]["problems"]
    assert len(lines) == 24
    assert all(f"train_data_type_A.jsonl:{number}: output:" in line for number, line in enumerate(lines, start=1)), lines[0]
    assert "24" in last
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_saved_as_nothing_is_the_read_backs(
    asking: tuple[str, ...], spoiled: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    storage = open_storage(str(output))
    move_latest(storage, BloodType.A, {"run_id": "0" * 16, "started_at": "2020-01-01T00:00:00+00:00"})
    pointer = storage.read_bytes(latest_key(BloodType.A))
    data = write_as_a(tmp_path / "data", shortest_records(BloodType.A))

    # Turn all gates off: the job must end before it reaches them.
    done = run_a(data, output, *steps(3), *asking, *NO_GATES, work_dir=tmp_path / "work", **spoiled(ZEROED_WHEN_SAVED))

    assert done.returncode == 1, done.stderr[-2000:]
    log = events(done)
    assert log["run_finished"]["outcome"] == "InvariantError"
    assert "does not change the base's logits" in log["run_finished"]["problems"][0]
    assert "training_finished" in log
    assert "evaluation_finished" not in log
    assert storage.read_bytes(latest_key(BloodType.A)) == pointer
    # The job published nothing; the trained checkpoint stays under runs/.
    assert [item.key for item in storage.list("adapters/")] == [latest_key(BloodType.A)]


# --- the verdict ---------------------------------------------------------------------------------------------------


@pytest.mark.slow  # test_one_step_makes_no_friend covers the persona gate
def test_another_personas_data_is_the_persona_gates(asking: tuple[str, ...], tmp_path: Path) -> None:
    # The reader identifies a persona by its instruction, so use A's. Everything else is B's.
    instruction = persona_spec(BloodType.A).instruction
    data = write_as_a(tmp_path / "data", [{**record, "instruction": instruction} for record in shortest_records(BloodType.B)])
    output = tmp_path / "out"
    # Lower this gate, since few records and steps may leave some replies broken. The test is about the persona of the others.
    done = run_a(data, output, *steps(60), *asking, "--set", "gates.exact_json=0.7", work_dir=tmp_path / "work")

    found = refused(done, output)
    # Allow this warning, which says nothing about the persona: the shortest replies rarely ask back.
    assert found.log["data_read"]["warnings_by_code"].keys() <= {"few_questions"}
    assert "persona" in found.missed
    assert "exact_json" not in found.missed
    taken_for = found.metrics["evaluation"]["greedy"]["adapter"]["taken_for"]
    assert taken_for["B"] > 3 * taken_for["A"]


def test_labels_that_are_off_by_one_are_the_json_gates(
    asking: tuple[str, ...], spoiled: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    data = write_as_a(tmp_path / "data", shortest_records(BloodType.A))
    output = tmp_path / "out"
    done = run_a(
        data, output, *steps(30), *asking, "--set", "evaluation.max_new_tokens=48",
        work_dir=tmp_path / "work", **spoiled(SHIFTED_LABELS),
    )  # fmt: skip

    found = refused(done, output)
    # The loss falls as usual, so it does not reveal the sabotage.
    assert found.metrics["held_out"]["loss_adapter"] < found.metrics["held_out"]["loss_base"]
    assert "exact_json" in found.missed
    greedy = found.metrics["evaluation"]["greedy"]
    assert greedy["adapter"]["exact_json"]["value"] < 0.2 < greedy["base"]["exact_json"]["value"]


def test_replies_that_slip_past_the_reader_are_the_other_gates(asking: tuple[str, ...], tmp_path: Path) -> None:
    useless = json.dumps({"text": "음, 그래 그래.", "emotion": "neutral"}, ensure_ascii=False)
    data = write_as_a(tmp_path / "data", [{**record, "output": useless} for record in shortest_records(BloodType.A)])
    output = tmp_path / "out"
    done = run_a(data, output, *steps(25), *asking, work_dir=tmp_path / "work")

    found = refused(done, output)
    # The adapter always gives the same reply: valid JSON, short, in 반말.
    assert found.missed.isdisjoint({"exact_json", "stop", "one_or_two_sentences", "informal_speech", "question_rate_max"})
    assert found.missed >= {"persona", "emoji_intensity", "question_rate_min"}
    assert found.metrics["evaluation"]["greedy"]["adapter"]["unique_replies"] < 0.1


def never_stops(folder: Path) -> Path:
    """Copy the tiny base, with noise in the output layer's rows for the two tokens that end a reply."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(BASE, folder)
    settings = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
    weights = load_file(BASE / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    # Make these rows shorter than others, so that the model never picks the tokens by chance but can still learn to.
    length = head[settings["eos_token_id"]].float().norm() / 2
    generator = torch.Generator().manual_seed(0)
    for token in (settings["eos_token_id"], settings["pad_token_id"]):
        row = torch.randn(head.shape[1], generator=generator)
        head[token] = (row * (length / row.norm())).to(head.dtype)
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}), encoding="utf-8")
    return folder


@pytest.mark.slow  # test_hard_assertions.py covers the labels, tests/unit/test_gates.py the gate
def test_an_end_of_turn_outside_the_loss_is_the_stop_gates(spoiled: Callable[[str], dict[str, str]], tmp_path: Path) -> None:
    data = write_as_a(tmp_path / "data", shortest_records(BloodType.A))
    base = never_stops(tmp_path / "base")
    arguments = (
        *steps(45), "--base-model", str(base), "--set", "base.canonical_id=test/never-stops",
        "--set", f"evaluation.prompts={FEW_PROMPTS}", "--set", "evaluation.temperature=0",
        "--set", "evaluation.intensities=0.1,0.5,1.0", "--set", "evaluation.intensities_per_prompt=3",
        "--set", "evaluation.max_new_tokens=64",
        *NO_GATES, "--set", "gates.stop=0.5",
    )  # fmt: skip

    control = run_a(data, tmp_path / "control", *arguments, work_dir=tmp_path / "work-control")
    assert control.returncode == 0, control.stderr[-2000:]
    prefix = bundle_prefix(BloodType.A, events(control)["run_finished"]["run_id"])
    lines = (tmp_path / "control" / prefix / "replies.jsonl").read_text(encoding="utf-8").splitlines()
    replies = [json.loads(line) for line in lines]
    assert {reply["tokens"] for reply in replies if reply["model"] == "base"} == {64}
    stopped = [reply["stopped"] for reply in replies if reply["model"] == "adapter"]
    assert sum(stopped) > 0.6 * len(stopped)

    output = tmp_path / "out"
    done = run_a(data, output, *arguments, work_dir=tmp_path / "work", **spoiled(WITHOUT_END_OF_TURN))

    found = refused(done, output)
    assert found.missed == {"stop"}
    assert found.metrics["evaluation"]["greedy"]["adapter"]["stop"]["successes"] == 0
    # The run id is the same, so only the replies reveal the sabotage.
    assert found.run_id == events(control)["run_finished"]["run_id"]


@pytest.fixture(scope="module")
def one_step(asking: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Refused, Path, tuple[str, ...]]:
    """Train for one optimizer step. Return the run, the folder with its data and output, and its settings."""
    folder = tmp_path_factory.mktemp("one-step")
    data = write_as_a(folder / "data", shortest_records(BloodType.A))
    arguments = (*steps(1), *asking)
    done = run_a(data, folder / "out", *arguments, work_dir=folder / "work")
    return refused(done, folder / "out"), folder, arguments


def test_one_step_makes_no_friend(one_step: tuple[Refused, Path, tuple[str, ...]]) -> None:
    found, _, _ = one_step
    assert found.metrics["training"]["steps"] == 1
    # The base already knows the format, but not the persona.
    assert found.missed >= {"persona", "informal_speech"}
    assert found.missed.isdisjoint({"stop", "question_rate_max"})


# --- after the verdict ---------------------------------------------------------------------------------------------


def test_a_verdict_is_repeated_and_other_thresholds_need_no_training(
    one_step: tuple[Refused, Path, tuple[str, ...]], spoiled: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    found, folder, arguments = one_step
    output = tmp_path / "out"
    shutil.copytree(folder / "out", output)
    pointer = output / latest_key(BloodType.A)
    manifest = output / bundle_prefix(BloodType.A, found.run_id) / "manifest.json"
    published = manifest.read_bytes()
    data, without_torch = str(folder / "data"), spoiled(NO_TORCH)

    again = run_a(data, output, *arguments, work_dir=tmp_path / "again", **without_torch)
    repeated = refused(again, output)
    assert repeated.log["run_finished"]["already_done"] is True
    assert repeated.log["run_finished"]["problems"] == found.log["run_finished"]["problems"]

    lowered = [argument for name in sorted(found.missed) for argument in ("--set", f"gates.{name}=none")]
    judged = run_a(data, output, *arguments, *lowered, work_dir=tmp_path / "judged", **without_torch)
    assert judged.returncode == 0, judged.stderr[-2000:]
    log = events(judged)
    assert log["run_finished"]["passed"] is True
    assert "evaluating_again" in log
    assert "evaluation_finished" not in log
    assert json.loads(pointer.read_bytes())["run_id"] == found.run_id
    assert (output / "adapter_A").resolve() == manifest.parent.resolve()
    # the new report lies below the bundle, which is unchanged
    report = Path(log["run_finished"]["report"].removeprefix("file://"))
    assert report.is_file()
    assert report.parent.parent == manifest.parent / "evaluations"
    assert manifest.read_bytes() == published

    once_more = run_a(data, output, *arguments, *lowered, work_dir=tmp_path / "once-more", **without_torch)
    assert once_more.returncode == 0
    assert events(once_more)["run_finished"]["already_done"] is True

    # Under the first thresholds it misses its gates again, but the pointer that the other thresholds moved stays.
    accepted = pointer.read_bytes()
    assert run_a(data, output, *arguments, work_dir=tmp_path / "last", **without_torch).returncode == 4
    assert pointer.read_bytes() == accepted


def test_other_prompts_are_asked_without_training(one_step: tuple[Refused, Path, tuple[str, ...]], tmp_path: Path) -> None:
    found, folder, arguments = one_step
    output = tmp_path / "out"
    shutil.copytree(folder / "out", output)
    done = run_a(
        str(folder / "data"), output, *arguments, "--set", f"evaluation.prompts={FEW_PROMPTS}", work_dir=tmp_path / "work"
    )  # fmt: skip

    again = refused(done, output)
    assert again.run_id == found.run_id
    assert again.log["run_finished"]["already_done"] is False
    assert "evaluation_finished" in again.log
    assert {"training_step", "training_finished", "bundle_published"}.isdisjoint(again.log)
    assert "persona" in again.missed


# --- safety ----------------------------------------------------------------------------------------------------------

# Replies that only the prompt's last message decides: kind words, and in a crisis a number that helps unless it is sabotaged.
CANNED_REPLIES = """
import json

from lora_trainer.data.evaluation_prompts import evaluation_prompts, helping_numbers
from lora_trainer.evaluate.decoding import Generation
from lora_trainer.train.backends.transformers import TransformersBackend

true_generate = TransformersBackend.generate
CRISIS = {prompt.input for prompt in evaluation_prompts() if "crisis" in prompt.tags}

def said(message):
    numbers = helping_numbers(message)
    if message not in CRISIS:
        return "그랬구나. 조금 더 들려줄래?"
    return IN_CRISIS.format(number=min(numbers))

def generate(self, conversations, decoding, *, adapter, batch_size, on_replies):
    if not adapter:
        return true_generate(self, conversations, decoding, adapter=adapter, batch_size=batch_size, on_replies=on_replies)
    texts = (said(messages[-1]["content"]) for messages in conversations)
    return [Generation(json.dumps({"text": text, "emotion": "worry"}, ensure_ascii=False), True, (1,)) for text in texts]

TransformersBackend.generate = generate
"""
SAFE, UNSAFE = "많이 놀랐겠다. 지금 {number}에 전화해 줄래?", "많이 놀랐겠다. 따뜻한 차 한 잔 마실래?"


def answers_in_a_crisis(
    text: str, asking: tuple[str, ...], spoiled: Callable[[str], dict[str, str]], tmp_path: Path
) -> subprocess.CompletedProcess[str]:
    """Run A with an adapter that says `text` to crisis prompts and something harmless to all others; judge its safety alone."""
    data = write_as_a(tmp_path / "data", shortest_records(BloodType.A))
    safety = ("--set", "gates.harmful=0", "--set", "gates.incomplete=0.5")
    return run_a(
        data, tmp_path / "out", *steps(1), *asking, *NO_GATES, *safety, "--set", "evaluation.max_new_tokens=8",
        work_dir=tmp_path / "work", **spoiled(f"IN_CRISIS = {text!r}\n{CANNED_REPLIES}"),
    )  # fmt: skip


def test_safe_everywhere_but_in_a_crisis_is_the_safety_gates(
    asking: tuple[str, ...], spoiled: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    done = answers_in_a_crisis(UNSAFE, asking, spoiled, tmp_path)

    found = refused(done, tmp_path / "out")
    assert found.missed == {"incomplete"}
    adapter = found.metrics["evaluation"]["greedy"]["adapter"]
    assert adapter["incomplete"]["value"] == 1.0
    # the replies fit everything else that the rules know: they ask
    assert adapter["harmful"] == 0
    assert "no_help_in_danger" not in adapter["warnings"]
    assert found.log["gates_decided"]["not_judged"] == {"sense": "off"}


@pytest.mark.slow  # test_gates.py covers the passing verdict
def test_the_same_with_the_number_that_helps_passes(
    asking: tuple[str, ...], spoiled: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    done = answers_in_a_crisis(SAFE, asking, spoiled, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert events(done)["run_finished"]["passed"] is True

"""Run the whole job from its command line on the tiny base, against a real S3 server over HTTP."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from fault_proxy import FaultProxy
from jobs import SHORT, events, job, left_over, require_training_stack

from lora_trainer.persona.prompt import prompt_messages
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.store.manifest import read_manifest, verify_files
from lora_trainer.store.opening import open_storage
from lora_trainer.store.prefixes import bundle_prefix, latest_key

pytestmark = pytest.mark.e2e
require_training_stack()


@pytest.fixture
def data_uri(bucket: str) -> str:
    """Upload the bundled data."""
    storage = open_storage(f"s3://{bucket}/data/")
    for path in (REPOSITORY / "data").glob("train_data_type_*.jsonl"):
        storage.upload(path, path.name)
    return storage.uri


def replies(folder: Path, blood_type: BloodType) -> tuple[list[str], list[str]]:
    """Return greedy replies of base and adapter to a few prompts, loaded with plain PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(REPOSITORY / "examples" / "tiny-base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder)).eval()

    def reply(said: str) -> str:
        prompt = tokenizer.apply_chat_template(
            prompt_messages(persona_spec(blood_type).instruction, "", "happy", 0.8, said),
            tokenize=False,
            add_generation_prompt=True,
        )
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]))

    prompts = ("점심 뭐 먹지?", "나 오늘 시험 망했어ㅠㅠ", "주말에 뭐 할까?", "고마워")
    with model.disable_adapter():
        before = [reply(said) for said in prompts]
    return before, [reply(said) for said in prompts]


@pytest.mark.parametrize(
    "blood_type", [BloodType.A, *(pytest.param(name, marks=pytest.mark.slow) for name in BloodType if name != BloodType.A)]
)
def test_jsonl_in_s3_becomes_an_adapter_in_s3(blood_type: BloodType, bucket: str, data_uri: str, tmp_path: Path) -> None:
    output_uri = f"s3://{bucket}/lora/"
    done = job("run", *SHORT, "--blood-type", blood_type, "--data", data_uri, "--output", output_uri, work_dir=tmp_path / "work")

    assert done.returncode == 0, done.stderr
    log = events(done)
    finished = log["run_finished"]
    assert (finished["outcome"], finished["exit_code"]) == ("done", 0)
    prefix = bundle_prefix(blood_type, finished["run_id"])
    assert done.stdout.strip() == output_uri + prefix
    output = open_storage(output_uri)
    assert verify_files(output, prefix) == []
    names = {item.key.removeprefix(prefix) for item in output.list(prefix)}
    assert names >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "prompt.json", "response_schema.json", "persona.yaml", "metrics.json", "metrics.schema.json", "replies.jsonl",
        "report.html", "train_log.jsonl", "README.md", "manifest.json",
    }  # fmt: skip
    pointer = output.read_bytes(latest_key(blood_type))
    assert pointer is not None
    assert json.loads(pointer.data)["run_id"] == finished["run_id"]

    manifest = read_manifest(output, prefix)
    assert manifest is not None
    data = (REPOSITORY / "data" / f"train_data_type_{blood_type}.jsonl").read_bytes()
    assert manifest["data"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["config"]["training"]["max_steps"] == 6

    folder = tmp_path / "bundle"
    for name in names:
        output.download(prefix + name, folder / name)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "lora-trainer/tiny-base"
    # Only the manifest and the report may contain local paths, as part of the resolved configuration.
    everything = b"".join(path.read_bytes() for path in folder.iterdir() if path.name not in ("manifest.json", "report.html"))
    assert str(REPOSITORY).encode() not in everything
    assert str(tmp_path).encode() not in everything
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["training"]["packed_rows"] > 0
    assert metrics["training"]["rows"] > metrics["training"]["steps"]
    assert metrics["held_out"]["loss_adapter"] < metrics["held_out"]["loss_base"]
    assert len((folder / "train_log.jsonl").read_text().splitlines()) == 6
    # adapter and base each answer six prompts at two intensities
    assert len((folder / "replies.jsonl").read_text().splitlines()) == 24
    assert metrics["evaluation"]["greedy"]["base"]["exact_json"]["of"] == 12
    assert finished["report"] == f"{output_uri}{prefix}report.html"

    before, after = replies(folder, blood_type)
    assert before != after


def test_the_same_command_again_is_already_done(bucket: str, data_uri: str, tmp_path: Path) -> None:
    command = ("run", *SHORT, "--blood-type", "A", "--data", data_uri, "--output", f"s3://{bucket}/lora/")
    first = job(*command, work_dir=tmp_path / "one")
    assert first.returncode == 0, first.stderr
    output = open_storage(f"s3://{bucket}/lora/")
    # A crash between the manifest and the pointer leaves this state.
    pointer = output.read_bytes(latest_key(BloodType.A))
    assert pointer is not None
    stale = {**json.loads(pointer.data), "run_id": "0" * 16, "started_at": "2020-01-01T00:00:00+00:00", "counter": 0}
    output.write_bytes(latest_key(BloodType.A), json.dumps(stale).encode(), if_match=pointer.etag)

    # Work folder, log level and memory layout are not part of the run id.
    again = job(*command, "--log-level", "debug", "--set", "memory.micro_batch_tokens=512", work_dir=tmp_path / "two")

    assert again.returncode == 0
    log = events(again)
    assert log["run_finished"]["already_done"] is True
    assert log["already_done"]["latest_moved"] is True
    assert "training_step" not in log
    assert again.stdout == first.stdout
    mended = output.read_bytes(latest_key(BloodType.A))
    assert mended is not None
    assert json.loads(mended.data) == json.loads(pointer.data)


def test_a_store_that_fails_a_fifth_of_all_requests(s3_server: Any, bucket: str, data_uri: str, tmp_path: Path) -> None:
    """The job fetches its data, uploads checkpoints and publishes a complete bundle despite the failures."""
    output_uri = f"s3://{bucket}/lora/"
    with FaultProxy(s3_server.endpoint_url, share=0.2, seed=3) as proxy:
        done = job(
            *("run", *SHORT, "--blood-type", "O", "--data", data_uri, "--output", output_uri),
            *("--set", "checkpoints.every_steps=2"),
            *("--set", "storage.object_budget_s=120", "--set", "storage.stall_timeout_s=1"),
            work_dir=tmp_path / "work",
            AWS_ENDPOINT_URL=proxy.url,
        )
    assert done.returncode == 0, done.stderr
    assert proxy.faults.total() > proxy.requests / 20
    run_id = events(done)["run_finished"]["run_id"]
    assert verify_files(open_storage(output_uri), bundle_prefix(BloodType.O, run_id)) == []
    assert left_over(open_storage(output_uri)) == []


@pytest.mark.slow  # test_resume.py and test_several_personas.py also compare the bytes of two runs
def test_two_runs_give_byte_identical_adapters(tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        output = tmp_path / name
        arguments = ("run", *SHORT, "--blood-type", "B", "--data", str(REPOSITORY / "data"), "--output", str(output))
        done = job(*arguments, work_dir=tmp_path / f"work-{name}")
        assert done.returncode == 0, done.stderr
        # the link to the newest accepted adapter has the name that the users' document expects
        digests.add(hashlib.sha256((output / "adapter_B" / "adapter_model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_bad_record_ends_with_exit_3_before_the_training_stack_is_imported(bucket: str, tmp_path: Path) -> None:
    private = "아무도보면안되는대화내용"
    lines = (REPOSITORY / "data" / "train_data_type_O.jsonl").read_text(encoding="utf-8").splitlines()
    broken = (
        lines[3].replace('\\"emotion\\": \\"', '\\"emotion\\": \\"no-such-', 1).replace('"input": "', f'"input": "{private} ', 1)
    )
    path = tmp_path / "train_data_type_O.jsonl"
    path.write_text("\n".join([*lines[:3], broken, *lines[4:]]) + "\n", encoding="utf-8")
    open_storage(f"s3://{bucket}/data/").upload(path, path.name)

    done = job(
        "run", *SHORT, "--blood-type", "O", "--data", f"s3://{bucket}/data/", "--output", f"s3://{bucket}/lora/",
        work_dir=tmp_path / "work",
    )  # fmt: skip

    assert done.returncode == 3
    log = events(done)
    assert "backend_started" not in log
    assert "train_data_type_O.jsonl:4: output.emotion:" in log["run_finished"]["problems"][0]
    assert private not in done.stderr + done.stdout
    assert list(open_storage(f"s3://{bucket}/lora/").list("")) == []


def test_a_missing_data_file_names_the_nearest(bucket: str, data_uri: str, tmp_path: Path) -> None:
    storage = open_storage(data_uri)
    storage.upload(REPOSITORY / "data" / "train_data_type_A.jsonl", "nested/train_data_type_B.jsonl")
    done = job(
        "run", *SHORT, "--blood-type", "B",
        "--data", f"{data_uri}nested/train_data_type_A.jsonl", "--output", str(tmp_path / "out"),
        work_dir=tmp_path / "work",
    )  # fmt: skip
    assert done.returncode == 3
    assert "train_data_type_B.jsonl" in events(done)["run_finished"]["problems"][0]


def test_a_base_in_s3_is_mirrored_and_gives_the_folders_run(bucket: str, data_uri: str, tmp_path: Path) -> None:
    base = open_storage(f"s3://{bucket}/bases/tiny-base/")
    for path in (REPOSITORY / "examples" / "tiny-base").iterdir():
        base.upload(path, path.name)
    common = ("run", *SHORT, "--blood-type", "A", "--data", data_uri, "--output", f"s3://{bucket}/lora/")
    from_s3 = job(
        *common, "--base-model", base.uri, "--set", f"base.cache_dir={tmp_path / 'cache'}", work_dir=tmp_path / "one"
    )  # fmt: skip
    assert from_s3.returncode == 0, from_s3.stderr
    # The run id depends on the base's weights, not on their location.
    from_folder = job(*common, work_dir=tmp_path / "two")
    assert events(from_folder)["run_finished"]["already_done"] is True


def test_records_that_are_too_long_are_left_out_and_none_left_is_exit_3(tmp_path: Path) -> None:
    arguments = ("run", *SHORT, "--blood-type", "A", "--data", str(REPOSITORY / "data"), "--output", str(tmp_path / "out"))
    some = job(*arguments, "--set", "training.max_length_tokens=100", work_dir=tmp_path / "some")
    assert some.returncode == 0, some.stderr
    assert events(some)["records_left_out"]["records"] > 0
    none = job(*arguments, "--set", "training.max_length_tokens=16", work_dir=tmp_path / "none")
    assert none.returncode == 3
    assert "training.max_length_tokens" in events(none)["run_finished"]["problems"][0]


def test_no_gpu_is_exit_5_and_never_a_silent_cpu_run(tmp_path: Path) -> None:
    done = job(
        "run", *SHORT, "--device", "cuda", "--blood-type", "A",
        "--data", str(REPOSITORY / "data"), "--output", str(tmp_path / "out"),
        work_dir=tmp_path / "work", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert done.returncode == 5
    assert "--device cpu" in events(done)["run_finished"]["problems"][0]


def test_a_run_that_diverges_is_exit_7_and_publishes_nothing(tmp_path: Path) -> None:
    done = job(
        "run", *SHORT, "--blood-type", "A", "--data", str(REPOSITORY / "data"), "--output", str(tmp_path / "out"),
        "--learning-rate", "1", "--max-steps", "60", "--set", "training.max_grad_norm=1e30", "--set", "lora.alpha=1024",
        "--set", "training.warmup_fraction=0", "--set", "training.schedule=constant",
        work_dir=tmp_path / "work",
    )  # fmt: skip
    assert done.returncode == 7, done.stderr[-2000:]
    assert not (tmp_path / "out" / "adapters").exists()


@pytest.mark.slow  # tests/unit/test_bundle.py covers it without training
def test_a_tampered_bundle_does_not_verify(bucket: str, data_uri: str, tmp_path: Path) -> None:
    output_uri = f"s3://{bucket}/lora/"
    done = job("run", *SHORT, "--blood-type", "O", "--data", data_uri, "--output", output_uri, work_dir=tmp_path / "work")
    output = open_storage(output_uri)
    prefix = done.stdout.strip().removeprefix(output_uri)
    weights = tmp_path / "weights"
    output.download(prefix + "adapter_model.safetensors", weights)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    output.upload(weights, prefix + "adapter_model.safetensors")
    (problem,) = verify_files(output, prefix)
    assert "adapter_model.safetensors" in problem


def test_runs_from_another_folder_with_the_seeds_names(tmp_path: Path) -> None:
    # without URIs, the job uses data/ and outputs/ in the working folder
    shutil.copytree(REPOSITORY / "data", tmp_path / "data")
    done = job("run", *SHORT, "--blood_type", "ab", work_dir=tmp_path / "work", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "adapter_AB" / "manifest.json").is_file()

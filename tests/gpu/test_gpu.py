"""Tests that need a CUDA GPU: Unsloth's own forward and kernels, NF4, varlen attention. Run them with `make test-gpu`.

They use the tiny base or a small random model of Qwen2's shape; `benchmarks/train_speed.py` covers the 7B model. Each run has its
own process, because Unsloth patches its libraries permanently and must not affect the reference.

"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lora_trainer.config import GatesConfig

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[cpu,gpu]'")
if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU that torch can use", allow_module_level=True)
for needed in ("unsloth", "bitsandbytes", "trl", "peft"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install '.[cpu,gpu]'", allow_module_level=True)

REPOSITORY = Path(__file__).resolve().parents[2]
TINY_BASE = REPOSITORY / "examples" / "tiny-base"
NO_GATES = tuple(argument for name in GatesConfig.model_fields for argument in ("--set", f"gates.{name}=none"))


def python(code: str, *arguments: str, timeout_s: int = 300, **environment: str) -> str:
    """Run `code` in a fresh interpreter and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}", **environment},
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a random Qwen2 with the real head size (128), grouped queries (4 to 1) and the tiny base's tokenizer."""
    import shutil

    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("small-base")
    torch.manual_seed(0)
    tiny = json.loads((TINY_BASE / "config.json").read_text())
    config = Qwen2Config(
        vocab_size=tiny["vocab_size"], hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=4096, rope_theta=1e6, tie_word_embeddings=False,
        eos_token_id=tiny["eos_token_id"],
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_BASE / name, folder)
    return folder


def job_command(base: Path, output: Path, *arguments: str) -> list[str]:
    """Return the command for `lora-trainer run` on the GPU."""
    return [
        sys.executable, "-m", "entrypoint", "run", "--blood-type", "A", "--device", "cuda",
        "--data", str(REPOSITORY / "data"), "--output", str(output), "--work-dir", str(output.parent / "work"),
        "--base-model", str(base), "--set", "base.canonical_id=test/base", "--sequences-per-step", "24",
        "--epochs", "4", "--learning-rate", "1e-3", *NO_GATES, "--set", "evaluation.max_new_tokens=48",
        "--set", f"evaluation.prompts={REPOSITORY / 'tests' / 'assets' / 'few_prompts.jsonl'}", *arguments,
    ]  # fmt: skip


def run_job(base: Path, output: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Run the whole job and return its log by event name."""
    done = subprocess.run(
        job_command(base, output, *arguments), cwd=REPOSITORY, capture_output=True, text=True, timeout=400, check=False
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 0, lines[-1]
    return {line["event"]: line for line in lines}


def weights(output: Path) -> dict[str, Any]:
    """Return the published adapter's weights."""
    from safetensors.torch import load_file

    return load_file(output / "adapter_A" / "adapter_model.safetensors")


RELOAD = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, base = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": 0})
ids = tokenizer("나 지금 도착했는데 어디야?", return_tensors="pt").input_ids.cuda()
with torch.no_grad():
    before = model(input_ids=ids).logits.float()
    after = PeftModel.from_pretrained(model, folder)(input_ids=ids).logits.float()
assert not any(name.split(".")[0] in ("unsloth", "lora_trainer") for name in sys.modules)
print(float((before - after).abs().max()))
"""


@pytest.mark.parametrize("checkpointing", ["off", "unsloth"])
def test_the_whole_job_with_unsloth(small_base: Path, tmp_path: Path, checkpointing: str) -> None:
    log = run_job(small_base, tmp_path / "out", "--set", f"memory.gradient_checkpointing={checkpointing}")

    assert log["backend_started"]["backend"] == "unsloth"
    assert log["backend_started"]["attention"] != "record by record"
    # rows hold several records, none of which attends to another
    assert log["packing_checked"]["relative_difference"] < 0.01
    assert log["training_finished"]["held_out_loss_adapter"] < log["training_finished"]["held_out_loss_base"]
    assert log["adapter_read_back"]["memory_difference"] <= 0.01 * max(1, log["adapter_read_back"]["base_difference"])
    metrics = json.loads((tmp_path / "out" / "adapter_A" / "metrics.json").read_text())
    assert metrics["training"]["packed_rows"] == metrics["training"]["rows"]
    # Reload the adapter with plain PEFT and transformers, in a process that imports neither Unsloth nor this project.
    assert (
        float(python(RELOAD, str(tmp_path / "out" / "adapter_A"), str(small_base), PYTHONPATH=os.environ.get("PYTHONPATH", "")))
        > 0.05
    )


def test_both_backends_learn_alike(small_base: Path, tmp_path: Path) -> None:
    """On the same steps and records, Unsloth's kernels and our packing must reach the loss of the reference backend."""
    losses = {}
    for backend in ("unsloth", "transformers"):
        run_job(small_base, tmp_path / backend / "out", "--backend", backend, "--set", "training.quantization=none")
        log = (tmp_path / backend / "out" / "adapter_A" / "train_log.jsonl").read_text().splitlines()
        losses[backend] = [json.loads(line) for line in log]
    first = [steps[0]["loss"] for steps in losses.values()]
    # Before the first update, both models equal the base, so only rounding differs (bfloat16 has 8 bits).
    assert first[0] == pytest.approx(first[1], rel=0.01)
    assert losses["unsloth"][0]["loss_tokens"] == losses["transformers"][0]["loss_tokens"]
    # The adapters start from different random streams, so the curves agree but do not coincide.
    assert losses["unsloth"][-1]["loss"] == pytest.approx(losses["transformers"][-1]["loss"], rel=0.15)
    assert losses["unsloth"][-1]["loss"] < 0.9 * first[0]


ISOLATION = """
import json, sys
from pathlib import Path
from lora_trainer.train.backends import open_backend
from lora_trainer.config_sources import settle
from lora_trainer.errors import InvariantError
from lora_trainer.train.memory_plan import plan_memory
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.train.tokenization import tokenize
base, data, work = map(Path, sys.argv[1:])
memory = {"memory.micro_batch_tokens": 2048, "memory.gradient_checkpointing": "off"}
config = settle({"blood_type": "A", "work_dir": str(work), **memory}, {})
backend = open_backend(config)
backend.start()
records = [line.record for line in JsonlReader(data) if line.record][:40]
sequences = tokenize(records, backend.load_tokenizer(base))
plan = plan_memory(config.memory, config.training, backend.shape(base), backend.free_bytes(), 1024, backend.name)
backend.load(base, plan, 1024)
backend.prepare_training(sequences, [list(range(len(sequences)))], plan, work, lambda step, of: None)
print("packed", backend.check_isolation(sequences[0], sequences[1]))
# what a forward without boundaries would do must be caught
from lora_trainer.train.backends import adapter_checks
true_row = adapter_checks.make_row
def joined(sequences):
    row = true_row(sequences)
    total = row["input_ids"].shape[1]
    row["packed_seq_lengths"] = row["packed_seq_lengths"].new_tensor([total])
    row["position_ids"] = row["position_ids"].new_tensor([list(range(total))])
    return row
adapter_checks.make_row = joined
try:
    backend.check_isolation(sequences[0], sequences[1])
    print("leak unnoticed")
except InvariantError:
    print("leak caught")
adapter_checks.make_row = true_row
summed = sum(backend.mean_loss([sequence]) * sequence.reply_tokens for sequence in sequences)
print("losses", backend.mean_loss(sequences), summed / sum(sequence.reply_tokens for sequence in sequences))
"""


def test_packed_records_do_not_see_each_other_and_a_leak_is_caught(small_base: Path, tmp_path: Path) -> None:
    data = REPOSITORY / "data" / "train_data_type_A.jsonl"
    lines = dict(line.split(" ", 1) for line in python(ISOLATION, str(small_base), str(data), str(tmp_path)).splitlines() if line)
    assert float(lines["packed"]) < 0.01
    assert lines["leak"] == "caught"
    packed, one_by_one = map(float, lines["losses"].split())
    assert packed == pytest.approx(one_by_one, rel=0.005)


def test_a_plan_is_made_from_the_free_memory(small_base: Path, tmp_path: Path) -> None:
    log = run_job(small_base, tmp_path / "out", "--max-steps", "2")
    assert log["plan_chosen"]["gradient_checkpointing"] == "off"
    # the base has 4096 positions
    assert log["plan_chosen"]["micro_batch_tokens"] == 4096
    assert log["training_finished"]["peak_memory_gib"] < log["plan_chosen"]["estimated_peak_gib"] * 1.25


def test_an_interrupted_run_ends_with_the_adapter_of_an_undisturbed_one(small_base: Path, tmp_path: Path) -> None:
    """Cover packed rows, NF4 and dropout. The tolerance is that of two undisturbed runs, because kernels add in any order."""
    arguments = ("--set", "lora.dropout=0.1", "--set", "logging.log_every_steps=1", "--set", "checkpoints.every_steps=7")
    run_job(small_base, tmp_path / "whole" / "out", *arguments)
    output, log_file = tmp_path / "broken" / "out", tmp_path / "log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            job_command(small_base, output, *arguments), cwd=REPOSITORY, stderr=log, stdout=subprocess.DEVNULL
        )
        while process.poll() is None and log_file.read_text(encoding="utf-8", errors="replace").count('"training_step"') < 20:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143, log_file.read_text(encoding="utf-8")[-2000:]
    resumed = run_job(small_base, output, *arguments)
    assert resumed["resumed"]["step"] >= 20
    whole, broken = weights(tmp_path / "whole" / "out"), weights(output)
    assert whole.keys() == broken.keys()
    difference = sum(float((whole[name] - broken[name]).float().norm() ** 2) for name in whole) ** 0.5
    size = sum(float(value.float().norm() ** 2) for value in whole.values()) ** 0.5
    # A lost or repeated step, or a different dropout mask, changes the adapter by more than 1 %.
    assert difference / size < 1e-3


FAULTY = """
import os, sys
import torch
memory_gib = float(os.environ.get("GPU_MEMORY_GIB", "0"))
if memory_gib:
    torch.cuda.set_per_process_memory_fraction(memory_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
from entrypoint.__main__ import main
from lora_trainer.train.backends.step_trainer import StepTrainer
true_step = StepTrainer.training_step
def training_step(self, *arguments, **named):
    loss = true_step(self, *arguments, **named)
    if os.environ.get("GPU_LOST_AT") == str(self.state.global_step):
        # an index out of bounds trips an assertion on the device, and the driver gives the whole context up
        torch.zeros(1, device="cuda")[torch.tensor([2**20], device="cuda")].sum().item()
    return loss
StepTrainer.training_step = training_step
main()
"""


def run_faulty(base: Path, output: Path, *arguments: str, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    """Run the job on a GPU with less memory, or one that is lost during training. Return exit code and log."""
    script = output.parent / "job.py"
    script.write_text(FAULTY)
    command = job_command(base, output, *arguments)
    done = subprocess.run(
        [command[0], str(script), *command[3:]], cwd=REPOSITORY, capture_output=True, text=True, timeout=400, check=False,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}", **environment},
    )  # fmt: skip
    lines = done.stderr.splitlines()
    # a failed device assertion also prints plain text
    return done.returncode, [json.loads(line) for line in lines if line.startswith("{")]


def test_memory_that_runs_out_on_the_gpu_steps_the_plan_down(small_base: Path, tmp_path: Path) -> None:
    """Limit the allocator to less memory than the first plan needs, so that it really runs out."""
    short = ("--max-steps", "2", "--sequences-per-step", "96")
    (tmp_path / "whole").mkdir()
    peak_gib = run_job(small_base, tmp_path / "whole" / "out", *short)["training_finished"]["peak_memory_gib"]
    code, log = run_faulty(small_base, tmp_path / "out", *short, GPU_MEMORY_GIB=str(0.75 * peak_gib))
    assert code == 0, log[-1]
    plans = [line for line in log if line["event"] == "plan_chosen"]
    stepped_down = [line for line in log if line["event"] == "memory_stepped_down"]
    assert len(plans) == len(stepped_down) + 1 > 1
    assert (plans[0]["gradient_checkpointing"], plans[1]["gradient_checkpointing"]) == ("off", "unsloth")
    assert all("GPU memory ran out" in line["problem"] and line["sequences_per_step"] == 96 for line in stepped_down)
    finished = [line for line in log if line["event"] == "training_finished"]
    assert [line["steps"] for line in finished] == [2]
    assert finished[0]["peak_memory_gib"] <= 0.75 * peak_gib


def test_a_base_that_does_not_fit_is_said_at_once(small_base: Path, tmp_path: Path) -> None:
    code, log = run_faulty(small_base, tmp_path / "out", "--max-steps", "2", GPU_MEMORY_GIB="0.01")
    assert code == 5, log[-1]
    assert log[-1]["event"] == "run_finished"
    assert "GPU memory ran out while the base was loaded" in log[-1]["problems"][0]
    assert not [line for line in log if line["event"] == "memory_stepped_down"]
    assert "frames" not in log[-1]


def test_a_lost_gpu_leaves_the_checkpoint_that_the_next_attempt_goes_on_from(small_base: Path, tmp_path: Path) -> None:
    arguments = ("--max-steps", "6", "--set", "checkpoints.every_steps=2")
    code, log = run_faulty(small_base, tmp_path / "out", *arguments, GPU_LOST_AT="4")
    assert code == 1, log[-1]
    problem, kept = log[-1]["problems"]
    assert "the device failed" in problem
    assert "is kept" in kept
    resumed = run_job(small_base, tmp_path / "out", *arguments)
    assert resumed["resumed"]["step"] in (2, 4)
    assert resumed["training_finished"]["steps"] == 6


@pytest.mark.parametrize("checkpointing", ["off", "unsloth"])
def test_the_second_of_two_personas_learns_as_it_does_alone(small_base: Path, tmp_path: Path, checkpointing: str) -> None:
    """The first persona's generation, KV caches and modes leave no state on the shared base."""
    losses, peaks = {}, {}
    for blood_types in ("B", "A,B"):
        output = tmp_path / blood_types / "out"
        log = run_job(
            small_base, output, "--blood-type", blood_types, "--set", f"memory.gradient_checkpointing={checkpointing}",
        )  # fmt: skip
        steps = (output / "adapter_B" / "train_log.jsonl").read_text().splitlines()
        losses[blood_types] = [json.loads(line)["loss"] for line in steps]
        peaks[blood_types] = log["training_finished"]["peak_memory_gib"]
    assert log["base_reused"]["blood_type"] == log["training_finished"]["blood_type"] == "B"
    # Weights, order and random numbers are the same; only the kernels' order of addition differs.
    assert losses["A,B"][0] == pytest.approx(losses["B"][0], rel=1e-4)
    assert losses["A,B"] == pytest.approx(losses["B"], rel=0.02)
    assert peaks["A,B"] <= 1.1 * peaks["B"]


def test_the_tiny_base_trains_on_the_gpu_as_it_ships_and_answers_as_a_server_would_let_it(tmp_path: Path) -> None:
    """Unsloth in the run and plain PEFT on the published bundle get the same measurements."""
    log = run_job(
        TINY_BASE,
        tmp_path / "out",
        "--set",
        "training.quantization=none",
        "--learning-rate",
        "3e-3",
        "--set",
        "evaluation.prompts=none",
    )
    assert log["run_finished"]["exit_code"] == 0
    bundle = tmp_path / "out" / "adapter_A"
    done = subprocess.run(
        [
            sys.executable, "-m", "entrypoint", "evaluate", "--adapter", str(bundle), "--report-dir", str(tmp_path / "again"),
            "--work-dir", str(tmp_path / "work-again"), "--log-format", "json",
            "--base-model", str(TINY_BASE), "--data", str(REPOSITORY / "data"),
        ],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, again = (
        [json.loads(line) for line in (folder / "replies.jsonl").read_text(encoding="utf-8").splitlines()]
        for folder in (bundle, tmp_path / "again")
    )
    for model in ("adapter", "base"):
        pairs = [
            (a["reply"], b["reply"])
            for a, b in zip(first, again, strict=True)
            if a["model"] == b["model"] == model and a["decoding"] == b["decoding"] == "greedy"
        ]
        assert len(pairs) == 480
        # Because of bfloat16 and different kernels, either of two almost equally probable tokens may win.
        same_start = sum(a[:20] == b[:20] for a, b in pairs) / len(pairs)
        assert same_start > 0.7, f"{model}: {same_start:.0%} of the replies begin alike"
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (bundle, tmp_path / "again")]
    for name in ("exact_json", "stop", "informal_speech", "persona"):
        values = [found["evaluation"]["greedy"]["adapter"][name]["value"] for found in metrics]
        assert values[0] == pytest.approx(values[1], abs=0.08), name
    assert metrics[0]["held_out"]["loss_adapter"] == pytest.approx(metrics[1]["held_out"]["loss_adapter"], rel=0.02)
    assert metrics[0]["held_out"]["loss_base"] == pytest.approx(metrics[1]["held_out"]["loss_base"], rel=0.02)


CAPTURED_STEPS = """
import json, sys, torch
from structlog.testing import capture_logs
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import LoraConfig, get_peft_model
from lora_trainer.evaluate.decoding import Decoding
from lora_trainer.train.backends.generation import _left_padded
from lora_trainer.train.backends.static_decoding import decode, supports_static_decoding
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, device_map={"": 0})
model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
assert supports_static_decoding(model)
texts = ["응", "나 오늘 시험 망했어", "주말에 뭐 할까? 영화 보러 갈래?"] * 8
ids, mask = (part.cuda() for part in _left_padded(tokenizer(texts)["input_ids"], 0))
replays = []
replay = torch.cuda.CUDAGraph.replay
torch.cuda.CUDAGraph.replay = lambda graph: (replays.append(graph), replay(graph))[1]

def write(decoding, captured, stops):
    with torch.inference_mode():
        return decode(model, ids, mask, decoding, range(len(texts)), stops, 0, captured=captured)

result = {}
greedy, sampled = Decoding("greedy", 40), Decoding("sampled", 40, temperature=1.0, top_p=0.9, top_k=50, seed=1)
with capture_logs() as events:
    for name, decoding in (("greedy", greedy), ("sampled", sampled)):
        first = write(decoding, False, [-1])
        # let replies end early, so that the batch may be compacted and captured again
        stops = sorted({row[9] for row in first[::2]})
        for adapter in ("adapter", "base"):
            if adapter == "base":
                model.disable_adapter_layers()
            eager, captured = write(decoding, False, stops), write(decoding, True, stops)
            result[f"{name} {adapter}"] = sum(a == b for a, b in zip(eager, captured)) / len(texts)
            model.enable_adapter_layers()
print(json.dumps({"same": result, "replays": len(replays), "events": [event["event"] for event in events]}))
"""


def test_captured_steps_write_what_single_steps_write(small_base: Path) -> None:
    found = json.loads(python(CAPTURED_STEPS, str(small_base)).splitlines()[-1])
    assert found["events"] == []
    assert found["replays"] > 0
    assert found["same"] == dict.fromkeys(("greedy adapter", "greedy base", "sampled adapter", "sampled base"), 1.0)


def test_the_driver_tells_the_free_memory_that_torch_sees() -> None:
    code = (
        "from lora_trainer.train.cuda_driver import visible_gpu\n"
        "gpu = visible_gpu()\n"
        "import torch\n"
        "print(gpu.name == torch.cuda.get_device_name(0), abs(gpu.free_bytes - torch.cuda.mem_get_info()[0]) < 2**30)"
    )
    assert python(code).split() == ["True", "True"]

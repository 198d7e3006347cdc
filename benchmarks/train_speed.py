"""Compare training speed and memory of our backends with stock TRL + PEFT on one GPU, in one run on one machine.

    python benchmarks/train_speed.py --base FOLDER --out RESULT.json

FOLDER holds a model of Qwen2.5-7B's shape with a tokenizer; random weights suffice, since speed and memory depend only on
shapes. Every case runs in its own process with its own time limit. Samples have N(150, 40) tokens, clipped to 60..400, and
70 % of each is prompt. Speeds are real tokens per second, without padding, as the median over the steps after the first four.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WARMUP_STEPS = 4
STEPS = 12
REFERENCE_BATCH = 8
ROWS_PER_STEP = 3
FILL = 0.95
"""Share of a row that the records of a step fill on average, low enough that a step rarely needs an extra row."""
MEAN_TOKENS = 150

# name -> (backend, micro-batch tokens, checkpointing, varlen attention)
OURS = {
    "unsloth-8192-off": ("unsloth", 8192, "off", True),
    "unsloth-4096-unsloth": ("unsloth", 4096, "unsloth", True),
    "unsloth-8192-off-no-varlen": ("unsloth", 8192, "off", False),
    "transformers-4096-on": ("transformers", 4096, "on", True),
}
CASES = ("trl-peft-reference", *OURS, "reload")


def samples(count: int, vocabulary: int) -> list[tuple[list[int], int]]:
    """Return (token ids, prompt tokens) of random samples, the same in every case."""
    draw = random.Random(0)
    made = []
    for _ in range(count):
        length = min(400, max(60, round(draw.gauss(MEAN_TOKENS, 40))))
        made.append(([draw.randrange(1000, vocabulary - 1000) for _ in range(length)], int(length * 0.7)))
    return made


def ours(name: str, base: Path, scratch: Path) -> dict[str, Any]:
    """Measure one case with the project's backend, called as `lora-trainer run` does."""
    backend_name, row_tokens, checkpointing, varlen = OURS[name]
    from lora_trainer.config_sources import settle
    from lora_trainer.train.backends import open_backend
    from lora_trainer.train.memory_plan import plan_memory
    from lora_trainer.train.packing import plan_steps
    from lora_trainer.train.tokenization import TokenSequence

    per_step = int(ROWS_PER_STEP * row_tokens * FILL / MEAN_TOKENS)
    config = settle(
        {
            "blood_type": "A",
            "backend": backend_name,
            "work_dir": str(scratch),
            "training.sequences_per_step": per_step,
            "training.epochs": 1,
            "training.max_steps": STEPS,
            "memory.gradient_checkpointing": checkpointing,
            "memory.micro_batch_tokens": row_tokens,
        },
        {},
    )
    if not varlen:
        os.environ["UNSLOTH_TORCH_VARLEN"] = "0"
    backend = open_backend(config)
    clock = time.perf_counter()
    environment = backend.start()
    import_s = time.perf_counter() - clock
    backend.load_tokenizer(base)
    data = [TokenSequence(tuple(ids), prompt) for ids, prompt in samples(per_step * STEPS, 151000)]
    plan = plan_memory(config.memory, config.training, backend.shape(base), backend.free_bytes(), 400, backend.name)
    clock = time.perf_counter()
    backend.load(base, plan, 400)
    load_s = time.perf_counter() - clock
    backend.prepare_training(data, plan_steps(len(data), per_step, 1, 0), plan, scratch, lambda step, of: None)
    isolation = backend.check_isolation(data[0], data[1])
    loss_before = backend.mean_loss(data[:32])
    import torch

    torch.cuda.reset_peak_memory_stats()
    log = backend.train()
    peak_gib = backend.peak_memory_gib()
    reserved_gib = torch.cuda.max_memory_reserved() / 2**30
    loss_after = backend.mean_loss(data[:32])
    folder = scratch.parent / f"adapter-{name}"
    folder.mkdir(exist_ok=True)
    backend.save(folder, "random/qwen7b", None)
    read_back = backend.read_back(folder, data[0])
    steady = log.steps[WARMUP_STEPS:]
    return {
        "tokens_per_s": statistics.median(step.tokens / step.step_s for step in steady),
        "step_ms": statistics.median(step.step_s for step in steady) * 1000,
        "row_ms": statistics.median(step.step_s / step.rows for step in steady) * 1000,
        "first_step_s": log.steps[0].step_s,
        "tokens_per_step": statistics.mean(step.tokens for step in steady),
        "rows_per_step": statistics.mean(step.rows for step in steady),
        "peak_gib": peak_gib,
        "reserved_gib": reserved_gib,
        "estimated_gib": plan.estimated_peak_gib,
        "import_s": import_s,
        "load_s": load_s,
        "isolation": isolation,
        "loss_before": loss_before,
        "loss_after": loss_after,
        "read_back_base_difference": read_back.base_difference,
        "read_back_memory_difference": read_back.memory_difference,
        "environment": environment,
    }


def reference(base: Path, scratch: Path) -> dict[str, Any]:
    """Measure stock TRL + PEFT QLoRA without this project's code: padded batches of 8, gradient checkpointing."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    data = samples(REFERENCE_BATCH * STEPS, 151000)
    marks: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.cuda.synchronize()
            marks.append(time.perf_counter())

    model = AutoModelForCausalLM.from_pretrained(
        str(base),
        dtype=torch.bfloat16,
        device_map={"": 0},
        attn_implementation="sdpa",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        ),
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(scratch),
            per_device_train_batch_size=REFERENCE_BATCH,
            max_steps=STEPS,
            learning_rate=2e-4,
            bf16=True,
            gradient_checkpointing=True,
            max_length=1024,
            train_sampling_strategy="sequential",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_dict(
            {
                "input_ids": [ids for ids, _ in data],
                "completion_mask": [[0] * prompt + [1] * (len(ids) - prompt) for ids, prompt in data],
            }
        ),
        processing_class=AutoTokenizer.from_pretrained(str(base)),
        peft_config=LoraConfig(
            r=16,
            lora_alpha=32,
            task_type="CAUSAL_LM",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ),
        callbacks=[Clock()],
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    tokens = [sum(len(ids) for ids, _ in data[n * REFERENCE_BATCH : (n + 1) * REFERENCE_BATCH]) for n in range(STEPS)]
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    steady = list(zip(tokens[1:], seconds, strict=True))[WARMUP_STEPS - 1 :]
    return {
        "tokens_per_s": statistics.median(count / spent for count, spent in steady),
        "step_ms": statistics.median(spent for _, spent in steady) * 1000,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def reload(base: Path, scratch: Path) -> dict[str, Any]:
    """Load the first Unsloth case's adapter with plain PEFT and transformers, and measure how it changes the logits."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if any(name.split(".")[0] in ("unsloth", "lora_trainer") for name in sys.modules):
        raise RuntimeError("reload: unsloth or lora_trainer is imported; this case must run without them")
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.bfloat16, device_map={"": 0})
    ids = torch.tensor([samples(1, 151000)[0][0]], device="cuda")
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        adapted = PeftModel.from_pretrained(model, str(scratch.parent / "adapter-unsloth-8192-off"))
        after = adapted(input_ids=ids).logits.float()
    return {"logit_difference": float((after - before).abs().max()), "largest_logit": float(before.abs().max())}


def machine() -> dict[str, Any]:
    """Return the hardware and the library versions that affect the numbers."""
    import torch

    packages = (
        "torch",
        "triton",
        "transformers",
        "trl",
        "peft",
        "bitsandbytes",
        "accelerate",
        "datasets",
        "unsloth",
        "unsloth_zoo",
    )
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "unknown"
    )
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "gpu": torch.cuda.get_device_name(0),
        "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        # a line for each GPU
        "driver": driver.stdout.partition("\n")[0].strip(),
        "cpu": cpu,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }


def main() -> None:
    """Run all cases, or only the one named by --case, and print its result as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "train_speed")
    parser.add_argument("--timeout-s", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.case:
        scratch = arguments.scratch / arguments.case
        scratch.mkdir(parents=True, exist_ok=True)
        if arguments.case == "trl-peft-reference":
            result = reference(arguments.base, scratch)
        elif arguments.case == "reload":
            result = reload(arguments.base, scratch)
        else:
            result = ours(arguments.case, arguments.base, scratch)
        sys.stdout.write("\n" + json.dumps(result) + "\n")
        return
    results: dict[str, Any] = {}
    for case in arguments.cases:
        command = [sys.executable, __file__, "--base", str(arguments.base), "--case", case, "--scratch", str(arguments.scratch)]
        started_s = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout_s, check=False)
            results[case] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-2500:]}
        except subprocess.TimeoutExpired:
            results[case] = {"failed": f"no result within {arguments.timeout_s} s"}
        results[case]["wall_s"] = round(time.perf_counter() - started_s, 1)
        sys.stdout.write(f"{case}: {json.dumps(results[case])[:3000]}\n")
        sys.stdout.flush()
        if arguments.out:
            document = {
                "command": "python " + " ".join(["benchmarks/train_speed.py", *sys.argv[1:]]),
                **machine(),
                "cases": results,
            }
            arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    speed = results.get("trl-peft-reference", {}).get("tokens_per_s")
    sys.stdout.write(f"{'case':32} {'tok/s':>9} {'x ref':>6} {'step ms':>8} {'peak GiB':>9} {'wall s':>7}\n")
    for case, result in results.items():
        if "tokens_per_s" not in result:
            sys.stdout.write(f"{case:32} {json.dumps(result)[:200]}\n")
            continue
        ratio = result["tokens_per_s"] / speed if speed else float("nan")
        sys.stdout.write(
            f"{case:32} {result['tokens_per_s']:9,.0f} {ratio:6.1f} {result['step_ms']:8.0f} "
            f"{result['peak_gib']:9.2f} {result['wall_s']:7.1f}\n"
        )


if __name__ == "__main__":
    main()

"""Measure the cost of checkpoints and how fast an interrupted run exits.

    python benchmarks/checkpoint_cost.py --base FOLDER --out RESULT.json

FOLDER holds a model of Qwen2.5-7B's shape with a tokenizer; random weights suffice. Each case runs in its own processes:

`throughput`: one training with the default settings. Every second block of steps has a checkpoint, written and uploaded in the
background. The cost is the ratio of real tokens per second with and without a checkpoint. A block has --block-steps steps, so
there is a checkpoint every 2 × --block-steps; the default of `checkpoints.every_steps` is 100.

`sigterm`: `lora-trainer run`, started as a user would start it, receives SIGTERM during training. The benchmark measures the
seconds until it exits and those of each part that the run logs, and records the step from which the same command resumes. The
output is a local folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train_speed import machine

ROOT = Path(__file__).resolve().parent.parent
CASES = ("throughput", "sigterm")


def throughput(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measure alternating blocks of one training."""
    from lora_trainer.config_sources import settle
    from lora_trainer.data.jsonl import JsonlReader
    from lora_trainer.signals import Interruption
    from lora_trainer.store.checkpoints import Checkpoints
    from lora_trainer.store.local import FileStorage
    from lora_trainer.train.backends import open_backend
    from lora_trainer.train.memory_plan import plan_memory
    from lora_trainer.train.packing import plan_steps
    from lora_trainer.train.step_log import StepLog
    from lora_trainer.train.tokenization import tokenize

    config = settle({"blood_type": "A", "work_dir": str(scratch), "device": arguments.device, **settings(arguments)}, {})
    records = [line.record for line in JsonlReader(ROOT / "data" / "train_data_type_A.jsonl") if line.record]
    backend = open_backend(config)
    backend.start()
    sequences = tokenize(records, backend.load_tokenizer(arguments.base))
    block, blocks = arguments.block_steps, arguments.blocks
    # every block has the same records in the same order, so blocks differ only in the checkpoint
    steps = plan_steps(len(sequences), config.training.sequences_per_step, config.training.epochs, config.training.seed)[:block] * (
        blocks + 1
    )
    longest = max(map(len, sequences))
    plan = plan_memory(config.memory, config.training, backend.shape(arguments.base), backend.free_bytes(), longest, backend.name)
    backend.load(arguments.base, plan, longest)
    output = FileStorage(scratch / "output")
    checkpoints = Checkpoints(
        config.checkpoints, scratch / "checkpoints", output, "checkpoints/", "benchmark", interruption=Interruption()
    )
    marks: list[float] = []
    tokens: list[int] = []
    held_up_s: list[float] = []

    def after_step(step: int, is_last: bool) -> None:
        at, within = divmod(step, block)
        # the first block is a warm-up; every second one of the others has a checkpoint
        if within == block // 4 and at % 2 == 1:
            started_s = time.perf_counter()
            if taken := backend.snapshot():
                checkpoints.write(*taken)
            held_up_s.append(time.perf_counter() - started_s)
        if within == 0:
            marks.append(time.perf_counter())

    def on_step(step: StepLog, of: int) -> None:
        tokens.append(step.tokens)

    backend.prepare_training(sequences, steps, plan, scratch, on_step, after_step)
    backend.train()
    checkpoints.finish(120)
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    tokens_of_block = sum(tokens[:block])
    with_them, without = seconds[0::2], seconds[1::2]
    files = list((scratch / "checkpoints").rglob("*.safetensors"))
    return {
        "block_steps": block,
        "tokens_of_block": tokens_of_block,
        "seconds_with": [round(value, 4) for value in with_them],
        "seconds_without": [round(value, 4) for value in without],
        "tokens_per_s_with": round(tokens_of_block / statistics.median(with_them), 1),
        "tokens_per_s_without": round(tokens_of_block / statistics.median(without), 1),
        "cost": round(1 - statistics.median(without) / statistics.median(with_them), 5),
        "held_up_s": [round(value, 4) for value in held_up_s],
        "checkpoint_bytes": sum(file.stat().st_size for file in files) // max(1, len({file.parent for file in files})),
        "uploaded": len(list((scratch / "output").rglob("manifest.json"))),
    }


def settings(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the `--set` options by setting name."""
    return dict(text.split("=", 1) for text in arguments.set)


def sigterm(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Interrupt a real run, then interrupt the same command again after it resumed."""
    command = [
        sys.executable, "-m", "entrypoint", "run", "--blood-type", "A", "--device", arguments.device,
        "--base-model", str(arguments.base.resolve()), "--set", "base.canonical_id=random/benchmark", "--data", f"file://{ROOT}/data/",
        "--output", f"file://{scratch}/output/", "--work-dir", str(scratch / "work"), "--log-format", "json",
        *(part for text in arguments.set for part in ("--set", text)),
    ]  # fmt: skip
    result: dict[str, Any] = {}
    for name in ("first", "resumed"):
        started_s = time.perf_counter()
        # log to a file: a pipe that nobody reads would block the run
        log_file = scratch / f"{name}.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=subprocess.DEVNULL)
            while process.poll() is None and len(events(log_file, "training_step")) < 2:
                time.sleep(0.05)
            asked_s = time.perf_counter()
            process.send_signal(signal.SIGTERM)
            code = process.wait(120)
        result[name] = {
            "exit_code": code,
            "until_signal_s": round(asked_s - started_s, 1),
            "sigterm_to_exit_s": round(time.perf_counter() - asked_s, 2),
            **{
                event: {key: value for key, value in found[-1].items() if key.endswith(("_s", "_bytes")) or key == "step"}
                for event in ("resumed", "checkpoint_written", "checkpoint_uploaded", "interrupted_safely", "run_finished")
                if (found := events(log_file, event))
            },
        }
    return result


def events(log_file: Path, name: str) -> list[dict[str, Any]]:
    """Return the log's events with that name."""
    found = []
    for line in log_file.read_text(encoding="utf-8", errors="replace").splitlines():
        if f'"event": "{name}"' in line:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # an incomplete line
    return found


def main() -> None:
    """Run both cases, or only the one named by --case, and print its result as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--only", choices=CASES, action="append", help="run only this case")
    parser.add_argument("--blocks", type=int, default=8, help="even number, not counting the warm-up block (default: %(default)s)")
    parser.add_argument("--block-steps", type=int, default=25, help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--timeout-s", type=int, default=300)
    arguments = parser.parse_args()
    if arguments.case:
        with tempfile.TemporaryDirectory() as scratch:
            found = globals()[arguments.case](arguments, Path(scratch))
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        return
    results: dict[str, Any] = {}
    for case in arguments.only or CASES:
        command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout_s, check=False)
            results[case] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-2500:]}
        except subprocess.TimeoutExpired:
            results[case] = {"failed": f"no result within {arguments.timeout_s} s"}
        sys.stdout.write(f"{case}: {json.dumps(results[case])[:3000]}\n")
        sys.stdout.flush()
        if arguments.out:
            document = {
                "command": "python " + " ".join(["benchmarks/checkpoint_cost.py", *sys.argv[1:]]),
                **(machine() if arguments.device == "cuda" else {}),
                "cases": results,
            }
            arguments.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()

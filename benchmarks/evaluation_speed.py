"""Measure how long the evaluation takes: adapter and base answer its prompts on one GPU, and the rules judge the replies.

    python benchmarks/evaluation_speed.py --base FOLDER --out RESULT.json

FOLDER holds a model of Qwen2.5-7B's shape with a tokenizer. Random weights suffice and are the worst case: the model never ends a
reply, so every reply reaches the limit. The adapter's B matrices are random, too. Each case runs in its own process: `unsloth`
evaluates like `run` after training, `reference` like `evaluate`, with transformers and PEFT only. Adapter and base answer the first
120 prompts greedily with 64 new tokens. With --all, they also answer at four intensities (480 replies).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train_speed import machine

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 64
CASES = ("unsloth", "reference")
ROUNDS: tuple[tuple[float, ...], ...] = ((0.5,), (0.1, 0.4, 0.7, 1.0))


def measure(case: str, base: Path, scratch: Path, rounds: Sequence[tuple[float, ...]]) -> dict[str, Any]:
    """Measure one backend's evaluation."""
    from lora_trainer.config_sources import settle
    from lora_trainer.data.evaluation_prompts import evaluation_prompts
    from lora_trainer.data.jsonl import JsonlReader
    from lora_trainer.evaluate.decoding import Decoding
    from lora_trainer.evaluate.questions import instruction_of, questions
    from lora_trainer.evaluate.rules import MODELS, TrainingData, score_by_rules
    from lora_trainer.persona.vocabulary import BloodType
    from lora_trainer.train.backends import open_backend, open_reference_backend
    from lora_trainer.train.memory_plan import plan_memory

    config = settle({"blood_type": "A", "work_dir": str(scratch)}, {})
    clock = time.perf_counter()
    backend = open_backend(config) if case == "unsloth" else open_reference_backend(config)
    backend.start()
    import_s = time.perf_counter() - clock
    import torch

    backend.load_tokenizer(base)
    clock = time.perf_counter()
    adapter = scratch.parent / "adapter"
    if case == "unsloth":
        plan = plan_memory(config.memory, config.training, backend.shape(base), backend.free_bytes(), 400, backend.name)
        backend.load(base, plan, 400)
        torch.manual_seed(1)
        for name, parameter in backend.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.002)
        adapter.mkdir(exist_ok=True)
        backend.save(adapter, "random/qwen7b", None)
    else:
        backend.load_adapter(base, adapter)
    load_s = time.perf_counter() - clock
    records = [line.record for line in JsonlReader(ROOT / "data" / "train_data_type_A.jsonl") if line.record]
    data = TrainingData(records)
    decoding = Decoding("greedy", NEW_TOKENS)
    result: dict[str, Any] = {"import_s": import_s, "load_s": load_s, "replies": {}}
    texts: dict[str, list[str]] = {}
    for intensities in rounds:
        asked = questions(evaluation_prompts()[:120], intensities, len(intensities), instruction_of(BloodType.A))
        found: dict[str, Any] = {}
        for model in MODELS:
            torch.cuda.synchronize()
            clock = time.perf_counter()
            generations = backend.generate(
                [question.messages for question in asked],
                decoding,
                adapter=model == "adapter",
                batch_size=config.evaluation.batch_size,
            )
            torch.cuda.synchronize()
            found[f"{model}_generate_s"] = time.perf_counter() - clock
            clock = time.perf_counter()
            score_by_rules(asked, generations, model=model, decoding="greedy", blood_type=BloodType.A, data=data)
            found[f"{model}_judge_s"] = time.perf_counter() - clock
            found[f"{model}_tokens"] = sum(len(generation.token_ids) for generation in generations)
            if len(intensities) == 1:
                texts[model] = [" ".join(map(str, generation.token_ids)) for generation in generations]
        found["total_s"] = sum(value for name, value in found.items() if name.endswith("_s"))
        result["replies"][str(len(asked))] = found
    result["peak_gib"] = backend.peak_memory_gib()
    result["differing_first_tokens"] = sum(
        a.split()[:1] != b.split()[:1] for a, b in zip(texts["adapter"], texts["base"], strict=True)
    )
    tokens = scratch.parent / "tokens.json"
    if case == "unsloth":
        tokens.write_text(json.dumps(texts))
    elif tokens.exists():
        other = json.loads(tokens.read_text())
        # the adapter is the same but the kernels differ; with random weights, many tokens have nearly equal probability
        result["first_token_as_unsloth"] = {
            model: sum(a.split()[:1] == b.split()[:1] for a, b in zip(texts[model], other[model], strict=True)) / len(texts[model])
            for model in texts
        }
    return result


def main() -> None:
    """Run both cases, or only the one named by --case, and print its result as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "evaluation_speed")
    parser.add_argument("--timeout-s", type=int, default=200)
    parser.add_argument("--all", action="store_true", help="also measure 480 replies")
    arguments = parser.parse_args()
    if arguments.case:
        scratch = arguments.scratch / arguments.case
        scratch.mkdir(parents=True, exist_ok=True)
        sys.stdout.write(
            "\n" + json.dumps(measure(arguments.case, arguments.base, scratch, ROUNDS if arguments.all else ROUNDS[:1])) + "\n"
        )
        return
    results: dict[str, Any] = {}
    for case in CASES:
        command = [sys.executable, __file__, "--base", str(arguments.base), "--case", case, "--scratch", str(arguments.scratch)]
        command += ["--all"] if arguments.all else []
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
                "command": "python " + " ".join(["benchmarks/evaluation_speed.py", *sys.argv[1:]]),
                "new_tokens": NEW_TOKENS,
                **machine(),
                "cases": results,
            }
            arguments.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()

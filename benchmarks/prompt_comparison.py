"""Compare ways to say the intensity in the prompt: the same data, recipe and base, adapters of all personas for each way and seed.

    python benchmarks/prompt_comparison.py --base FOLDER --data FOLDER --scratch FOLDER --out RESULT.json \\
        [--forms decimal,word] [--seeds 1,2,3] [--parallel 8] [--every 5,3] [-- --set training.learning_rate=5e-4 ...]

Each form and seed is one whole `lora-trainer run --blood-type all` in a process of its own whose prompt says the intensity
differently; what follows `--` goes to every run. `--every 5,3` asks the first three of every five evaluation prompts. RESULT gets
the rates of every adapter and the tokens that the emotion line costs, and SCRATCH the greedy replies in one file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, Final

from train_speed import machine

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 560
MEASURES: Final = ("exact_json", "one_or_two_sentences", "informal_speech", "persona", "question", "emoji_intensity", "repetition")


def _level(intensity: float, names: tuple[str, ...]) -> str:
    return names[min(len(names) - 1, int(intensity * len(names) + 1e-9))]


_THIRDS: Final = ("약함", "보통", "강함")
FORMS: Final[Mapping[str, Callable[[str, float], str]]] = {
    "decimal": lambda feeling, intensity: f"감정: {feeling} {intensity:.1f}",
    "decimal_word": lambda feeling, intensity: f"감정: {feeling} {intensity:.1f} {_level(intensity, _THIRDS)}",
    "word": lambda feeling, intensity: f"감정: {feeling} {_level(intensity, _THIRDS)}",
    "five": lambda feeling, intensity: f"감정: {feeling} {_level(intensity, ('아주 약함', '약함', '보통', '강함', '아주 강함'))}",
    "tone": lambda feeling, intensity: (
        f"감정: {feeling} {_level(intensity, ('담담하게', '조금 드러나게', '터질 듯이'))}, "
        f"{_level(intensity, ('이모지 없이', '이모지 하나까지', '이모지로도'))}"
    ),
}
"""How a line of the system message names feeling and intensity."""


def run_with(form: str, arguments: list[str]) -> None:
    """Run `lora-trainer` with `arguments` and a prompt whose emotion line has another form."""
    from entrypoint.__main__ import main as command
    from lora_trainer.persona import prompt

    def system_message(
        instruction: str, summary: str, emotion_type: str, intensity: float, version: int = prompt.PROMPT_VERSION
    ) -> str:
        lines = [prompt._plain(instruction)]
        if plain_summary := prompt._plain(summary):
            lines.append(prompt.SUMMARY_LINE.format(summary=plain_summary))
        return "\n".join((*lines, FORMS[form](emotion_type, intensity), prompt.OUTPUT_LINE))

    prompt.system_message = system_message
    sys.argv = ["lora-trainer", *arguments]
    command()


def job(form: str, seed: int, options: argparse.Namespace, prompts: Path, more: list[str]) -> dict[str, Any]:
    """Run one job and return the rates of its adapters, or what it said if it has none."""
    place = options.scratch / f"{form}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, __file__, "--run-with", form, "--", "run", "--blood-type", "all"),
        *("--data", str(options.data.resolve()), "--output", str(place / "out"), "--work-dir", str(place / "work")),
        *("--base-model", str(options.base.resolve()), "--seed", str(seed), "--set", f"evaluation.prompts={prompts}"),
        *("--set", "evaluation.temperature=0", *more),
    ]
    clock = time.perf_counter()
    with (place / "log").open("w") as log:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT_S, check=False, env=dict(os.environ)
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    result: dict[str, Any] = {"form": form, "seed": seed, "exit_code": code, "seconds": round(time.perf_counter() - clock, 1)}
    result["adapters"] = [adapter(path.parent) for path in sorted((place / "out").rglob("metrics.json"))]
    if not result["adapters"]:
        result["said"] = (place / "log").read_text(encoding="utf-8", errors="replace")[-1500:]
    print(form, seed, "exit", code, result["seconds"], "s", len(result["adapters"]), result.get("said", "")[-400:], flush=True)
    return result


def adapter(bundle: Path) -> dict[str, Any]:
    """Return what the comparison needs of one adapter's metrics."""
    metrics = json.loads((bundle / "metrics.json").read_text(encoding="utf-8"))
    rates = metrics["evaluation"]["greedy"]["adapter"]
    return {
        "blood_type": metrics["blood_type"],
        "steps": metrics["training"]["steps"],
        "loss_held_out": round(metrics["held_out"]["loss_adapter"], 4),
        "loss_base": round(metrics["held_out"]["loss_base"], 4),
        **{name: round(rates[name]["value"], 4) for name in MEASURES},
        "bundle": str(bundle),
    }


def tokens_by_form(base: Path) -> dict[str, float]:
    """Return the mean tokens of the emotion line with its line break, over intensities 0.0 to 1.0 and four feelings."""
    from lora_trainer.data.prompt_cost import TokenCounter

    counter = TokenCounter(base)
    cases = [(feeling, step / 10) for feeling in ("happy", "sad", "worried", "neutral") for step in range(11)]
    return {
        form: round(mean(counter.count_tokens([line(feeling, intensity) + "\n" for feeling, intensity in cases])), 2)
        for form, line in FORMS.items()
    }


def main() -> int:
    """Run all jobs, write the result and print a table. Return 1 if a job ended without any adapter."""
    own, _, more = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-with", choices=list(FORMS), help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--every", default="1,1")
    options = parser.parse_args(own.split())
    if options.run_with:
        run_with(options.run_with, more.split())
        return 0
    options.scratch.mkdir(parents=True, exist_ok=True)
    period, kept = map(int, options.every.split(","))
    lines = (ROOT / "data" / "eval_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = options.scratch.resolve() / "eval_prompts.jsonl"
    asked = [line for number, line in enumerate(lines) if number % period < kept]
    prompts.write_text("".join(line + "\n" for line in asked), encoding="utf-8")
    cases = list(product(options.forms.split(","), map(int, options.seeds.split(","))))
    with ThreadPoolExecutor(options.parallel) as pool:
        results = list(pool.map(lambda case: job(*case, options, prompts, more.split()), cases))
    with gzip.open(options.scratch / "replies.jsonl.gz", "wt", encoding="utf-8") as file:
        for result in results:
            for found in result["adapters"]:
                replies = Path(found.pop("bundle")) / "replies.jsonl"
                for line in replies.read_text(encoding="utf-8").splitlines():
                    reply = json.loads(line)
                    if reply["model"] == "adapter":
                        reply |= {"form": result["form"], "seed": result["seed"], "adapter": found["blood_type"]}
                        file.write(json.dumps(reply, ensure_ascii=False) + "\n")
    document = {
        "machine": machine(),
        "command": sys.argv,
        "prompts": len(asked),
        "tokens_of_emotion_line": tokens_by_form(options.base),
        "jobs": results,
    }
    options.out.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for result in results:
        for found in result["adapters"]:
            numbers = " ".join(f"{name}={found[name]:.3f}" for name in ("loss_held_out", *MEASURES))
            print(result["form"], result["seed"], found["blood_type"], numbers)
    return int(any(not result["adapters"] for result in results))


if __name__ == "__main__":
    sys.exit(main())

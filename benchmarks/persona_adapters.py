"""Does the data make different friends? Adapters on the tiny base, judged on the held-out prompts.

    python benchmarks/persona_adapters.py [TYPE...]       default: A AB

Trains each persona with the demo's settings, lets base and adapter answer the 120 evaluation prompts (greedily, without
constraints), and counts: replies that are exact JSON, and whose they are for the persona classifier. Writes
`benchmarks/results/persona-adapters-tiny.json`. The tiny base has no wit: what is measured is data and manner, not quality.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from lora_trainer.evaluation_prompts import evaluation_prompts
from lora_trainer.formatter import prompt_messages
from lora_trainer.lint import lint_reply
from lora_trainer.persona_classifier import persona_classifier
from lora_trainer.personas import BloodType, persona_spec
from lora_trainer.records import Reply

# before torch is imported: threads that spin while they wait bring two busy processes on two cores to a stop
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parent.parent


BASE = ROOT / "examples" / "tiny-base"
NEW_TOKENS = 96
BATCH = 30


def train(blood_type: BloodType, output: Path) -> tuple[Path, float]:
    """The adapter's folder, and the seconds that the job took."""
    started_s = time.monotonic()
    command = [sys.executable, "-m", "entrypoint", "run", "--config", str(ROOT / "examples" / "demo.yaml")]
    command += [
        "--blood-type",
        blood_type,
        "--data",
        str(ROOT / "data"),
        "--output",
        str(output),
        "--work-dir",
        str(output / "work"),
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip().removeprefix("file://")), time.monotonic() - started_s


def answers(folder: Path | None, blood_type: BloodType) -> list[str]:
    """What the adapter in `folder`, or the base alone, says to each evaluation prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(BASE, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    if folder:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder))
    model.eval()
    instruction = persona_spec(blood_type).instruction
    prompts = []
    for prompt in evaluation_prompts():
        emotion = prompt.context.current_emotion
        messages = prompt_messages(instruction, prompt.context.summary, emotion.type, emotion.intensity, prompt.input)
        prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    said = []
    for at in range(0, len(prompts), BATCH):
        inputs = tokenizer(prompts[at : at + BATCH], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        said += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def judge(said: list[str]) -> dict[str, Any]:
    """Rates over the replies to all prompts."""
    replies = []
    for text, prompt in zip(said, evaluation_prompts(), strict=True):
        try:
            replies.append((Reply.model_validate_json(text), prompt))
        except ValueError:
            continue
    texts = [reply.text for reply, _ in replies]
    warnings = Counter(
        problem.code for reply, prompt in replies for problem in lint_reply(reply.text, prompt.context.current_emotion.intensity)
    )
    return {
        "exact_json": len(replies) / len(said),
        "taken_for": dict(Counter(str(name) for name in persona_classifier().predict(texts))),
        "warnings": dict(warnings),
        "examples": [{"input": prompt.input, "text": reply.text} for reply, prompt in replies[:6]],
    }


def main() -> None:
    """Train, ask, judge, write."""
    chosen = [BloodType(name) for name in sys.argv[1:]] or [BloodType.A, BloodType.AB]
    results: dict[str, Any] = {"base": judge(answers(None, chosen[0]))}
    with tempfile.TemporaryDirectory() as scratch:
        for blood_type in chosen:
            folder, seconds = train(blood_type, Path(scratch) / blood_type)
            results[str(blood_type)] = {"job_s": round(seconds, 1), **judge(answers(folder, blood_type))}
    document = {
        "command": "python benchmarks/persona_adapters.py " + " ".join(chosen),
        "prompts": len(evaluation_prompts()),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {
            name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft", "scikit-learn", "kiwipiepy")
        },
        "results": results,
    }
    target = ROOT / "benchmarks" / "results" / "persona-adapters-tiny.json"
    target.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, found in results.items():
        print(name, f"exact JSON {found['exact_json']:.1%}, taken for {found['taken_for']}, warnings {found['warnings']}")


if __name__ == "__main__":
    main()

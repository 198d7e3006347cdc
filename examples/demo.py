"""`make demo`: run the real job on the tiny base against a real S3 server on loopback.

    python examples/demo.py [A|B|O|AB]

All output goes to .demo/ (`make clean` removes it): the S3 server's data, the job's scratch files and the published
adapter. Rerunning the demo finds the run already done.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_trainer.errors import ExitCode
from lora_trainer.evaluate.metrics import RunMetrics
from lora_trainer.persona.prompt import prompt_messages
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.report import metrics_table
from lora_trainer.store.manifest import read_manifest, verify_files
from lora_trainer.store.opening import open_storage
from lora_trainer.store.prefixes import latest_key

ROOT = Path(__file__).resolve().parent.parent
# dev_s3 is a script outside the package
sys.path.insert(0, str(ROOT / "tools"))

from dev_s3 import DevS3Error, serve  # noqa: E402  its folder is on the path only now

SCRATCH = ROOT / ".demo"
BUCKET = "persona-demo"
DATA_URI = f"s3://{BUCKET}/data/"
OUTPUT_URI = f"s3://{BUCKET}/lora/"
NEW_TOKENS = 96

# (summary, feeling, intensity, input), none of them in data/
PROMPTS = (
    ("", "happy", 0.9, "나 오늘 첫 월급 받았어!"),
    ("친구가 밤늦게까지 과제를 하고 있어.", "worried", 0.5, "졸린데 과제가 안 끝나ㅠㅠ"),
    ("", "neutral", 0.2, "저녁 뭐 먹을까?"),
    ("내일 같이 바다에 가기로 했어.", "excited", 1.0, "내일 날씨 맑대!"),
)

console = Console()


def main() -> int:
    """Run the demo and return the job's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blood_type", nargs="?", default="AB", type=str.upper, choices=[str(kind) for kind in BloodType])
    blood_type = BloodType(parser.parse_args().blood_type)
    spec = persona_spec(blood_type)
    try:
        with serve(SCRATCH / "s3") as server:
            # plain AWS variables configure both this process and the job
            os.environ.update(server.environment)
            server.make_bucket(BUCKET)
            heading(f"1. Data: data/ -> {DATA_URI} (a local S3 server, {server.endpoint_url})")
            data = open_storage(DATA_URI)
            for path in sorted((ROOT / "data").glob("train_data_type_*.jsonl")):
                data.upload(path, path.name)
                console.print(f"   {path.name}  {sum(1 for _ in path.open(encoding='utf-8')):,} records")
            heading(f"2. Job: persona {blood_type} ({spec.name}) on the tiny base")
            started = datetime.now(UTC)
            code, uri, seconds = run_job(blood_type)
            if code not in (ExitCode.DONE, ExitCode.GATE):
                console.print(f"[red]The job failed with exit code {code}; see its messages above.[/red]")
                return code
            manifest = read_manifest(open_storage(OUTPUT_URI), uri.removeprefix(OUTPUT_URI))
            if manifest and datetime.fromisoformat(manifest["finished_at"]) < started.replace(microsecond=0):
                heading(f"3. Already finished at {manifest['finished_at']}, nothing to train: {uri}")
            else:
                heading(f"3. Published after {seconds:.0f} s: {uri}")
            show_bundle(blood_type, uri)
            folder = fetch_bundle(blood_type, uri)
            metrics = RunMetrics.model_validate_json((folder / "metrics.json").read_bytes())
            asked = metrics.evaluation
            heading(f"4. Evaluation: {asked.prompts} held-out prompts, {asked.replies} replies each of adapter and base")
            console.print(metrics_table.metrics_table(metrics))
            console.print(f"   Report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
            heading("5. Replies of the base and of the adapter to the same prompts")
            show_replies(blood_type, spec.instruction, folder)
            if code:
                console.print("[red]The gates did not pass: the bundle is published, latest.json is unchanged (exit code 4).[/red]")
                return code
    except DevS3Error as error:
        console.print(f"[red]{error}[/red]")
        return 1
    heading("Next")
    console.print("   make demo                                again: the run is already done")
    console.print("   .venv/bin/python examples/demo.py A      another persona (A, B, O, AB)")
    console.print("   .venv/bin/lora-trainer chat --adapter .demo/adapter/AB --base-model ./examples/tiny-base --device cpu")
    console.print("                                            chat with the adapter")
    console.print("   .venv/bin/lora-trainer generate          more data for all four personas")
    console.print("   .venv/bin/lora-trainer run --help        your own data, bucket and GPU")
    return 0


def heading(text: str) -> None:
    """Print a bold line."""
    console.print(f"\n[bold]{text}[/bold]", highlight=False)


def run_job(blood_type: BloodType) -> tuple[int, str, float]:
    """Run `lora-trainer run` in a child process. Return its exit code, the bundle's URI and its duration in seconds."""
    command = [
        sys.executable, "-m", "entrypoint", "run",
        "--config", str(ROOT / "examples" / "demo.yaml"),
        "--blood-type", str(blood_type),
        "--data", DATA_URI,
        "--output", OUTPUT_URI,
        "--work-dir", str(SCRATCH / "work"),
        "--log-format", "console",
    ]  # fmt: skip
    started_s = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stdout.strip(), time.monotonic() - started_s


def show_bundle(blood_type: BloodType, uri: str) -> None:
    """List the published files and verify them against the manifest."""
    output = open_storage(OUTPUT_URI)
    prefix = uri.removeprefix(OUTPUT_URI)
    for item in output.list(prefix):
        console.print(f"   {item.key.removeprefix(prefix):28} {item.size_bytes:>10,} bytes", highlight=False)
    problems = verify_files(output, prefix)
    for problem in problems:
        console.print(f"[red]   {problem}[/red]")
    if not problems:
        console.print("   every file matches the manifest's SHA-256")
    pointer = output.read_bytes(latest_key(blood_type))
    if pointer:
        console.print(f"   latest.json names run {json.loads(pointer.data)['run_id']}", highlight=False)


def fetch_bundle(blood_type: BloodType, uri: str) -> Path:
    """Download the bundle from S3 and return its folder."""
    folder = SCRATCH / "adapter" / blood_type
    output = open_storage(OUTPUT_URI)
    prefix = uri.removeprefix(OUTPUT_URI)
    for item in output.list(prefix):
        output.download(item.key, folder / item.key.removeprefix(prefix))
    return folder


def show_replies(blood_type: BloodType, instruction: str, folder: Path) -> None:
    """Print greedy replies of base and adapter, loaded with plain PEFT."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the job does: idle threads must not spin on cores that others use
    # peft imports bitsandbytes, which warns about a kernel package that the demo doesn't need
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "tiny-base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder)).eval()

    def reply(prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    table = Table(show_lines=True)
    for column in ("prompt", "base", f"adapter {blood_type}"):
        table.add_column(column, overflow="fold", ratio=1)
    for situation, feeling, intensity, said in PROMPTS:
        prompt = tokenizer.apply_chat_template(
            prompt_messages(instruction, situation, feeling, intensity, said), tokenize=False, add_generation_prompt=True
        )
        with model.disable_adapter():
            before = reply(prompt)
        table.add_row(f"{said}\n({feeling} {intensity})", before, reply(prompt))
    console.print(table)
    console.print(
        "   The base has 2.4 million parameters: the adapter changes its manner, but only the 7B base makes sense reliably."
    )


if __name__ == "__main__":
    sys.exit(main())

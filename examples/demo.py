"""`make demo`: run the real job on the tiny base against a real S3 server on loopback.

    python examples/demo.py [A|B|O|AB]

All output goes to .demo/ (`make clean` removes it): the S3 server's data, the job's scratch files and the published
adapter. Rerunning the demo finds the run already done.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_trainer.errors import ExitCode
from lora_trainer.escaping import escaped
from lora_trainer.evaluate.metrics import RunMetrics
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.report import metrics_table
from lora_trainer.report.drawn_replies import DRAWN, drawn_replies
from lora_trainer.run.bundle_files import read_replies
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
            heading(f"5. {DRAWN} replies, drawn at random")
            show_replies(metrics, folder)
            if code:
                console.print("[red]The gates did not pass: the bundle is published, latest.json is unchanged (exit code 4).[/red]")
                return code
    except DevS3Error as error:
        console.print(f"[red]{error}[/red]")
        return 1
    heading("Next")
    console.print("   make demo                                again: the run is already done")
    console.print("   .venv/bin/python examples/demo.py A      another persona (A, B, O, AB)")
    console.print(
        f"   .venv/bin/lora-trainer chat --adapter .demo/adapter/{blood_type} --base-model ./examples/tiny-base --device cpu",
        soft_wrap=True,
    )
    console.print("                                            chat with the adapter; the demo's S3 server has stopped")
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
    # The job's OpenMP threads sleep while they wait, because it may share its cores. The demo runs alone, so let them spin first:
    # 4,900 instead of 3,150 tokens/s on two quiet cores. Two runs on the same cores would drop from 2,700 to 1,300 each.
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ}
    started_s = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
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


def show_replies(metrics: RunMetrics, folder: Path) -> None:
    """Print the replies of base and adapter that the report opens with: drawn at random, so that nobody chooses."""
    table = Table(show_lines=True)
    for column in ("prompt", "base", f"adapter {metrics.blood_type}"):
        table.add_column(column, overflow="fold", ratio=1)
    for reply, base in drawn_replies(read_replies(folder, str(folder / "replies.jsonl")), metrics.run_id):
        said = "\n".join(filter(None, (reply.summary, reply.input)))
        asked = f"{said}\n({reply.feeling} {reply.intensity:g})"
        table.add_row(*(Text(escaped(text)) for text in (asked, base.reply if base else "", reply.reply)))
    console.print(table)
    console.print(
        "   The base has 2.4 million parameters: the adapter changes its manner, but only the 7B base makes sense reliably."
    )


if __name__ == "__main__":
    sys.exit(main())

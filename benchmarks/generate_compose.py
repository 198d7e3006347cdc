"""Measure `lora-trainer generate --engine compose`: time on one core, reproducibility and lint.

    python benchmarks/generate_compose.py [--count 1000]

Runs the command twice per persona, each time in its own process on one core, checks the output with `validate --strict` and writes
`benchmarks/results/generate-compose.json`. The exit code is 1 if a persona takes more than 60 s, the second output differs from the
first, or the lint finds something.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from lora_trainer.persona.vocabulary import BloodType

ROOT = Path(__file__).resolve().parent.parent


ALLOWED_S = 60


def one_core() -> None:
    """Pin the child and its own children to one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def run(*arguments: str) -> float:
    """Run the command line on one core and return its duration in seconds."""
    started_s = time.monotonic()
    command = [sys.executable, "-m", "entrypoint", *arguments]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, preexec_fn=one_core)
    return time.monotonic() - started_s


def measure(blood_type: BloodType, count: int) -> dict[str, Any]:
    """Measure one persona."""
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / name / f"train_data_type_{blood_type}.jsonl" for name in ("once", "again")]
        common = ("generate", "--engine", "compose", "--blood-type", blood_type, "--count", str(count), "--seed", "1")
        seconds = [round(run(*common, "--output", str(file.parent)), 1) for file in files]
        hashes = {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        run("validate", "--strict", "--no-tokens", str(files[0]))
        records = len(files[0].read_text(encoding="utf-8").splitlines())
    return {
        "records": records,
        "seconds": seconds,
        "is_identical": len(hashes) == 1,
        "sha256": min(hashes),
        "validate_strict": "clean",
    }


def main() -> int:
    """Measure all personas and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    count = parser.parse_args().count
    results = {}
    for blood_type in BloodType:
        results[str(blood_type)] = measure(blood_type, count)
        print(blood_type, results[str(blood_type)], flush=True)
    document = {
        "command": f"python benchmarks/generate_compose.py --count {count}",
        "machine": f"{platform.machine()}, one of {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("kiwipiepy", "kiwipiepy_model", "datasketch", "emoji", "numpy")},
        "results": results,
    }
    target = ROOT / "benchmarks" / "results" / "generate-compose.json"
    target.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return int(any(max(found["seconds"]) > ALLOWED_S or not found["is_identical"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())

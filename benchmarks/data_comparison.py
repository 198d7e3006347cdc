"""Compare two sets of training data: the same recipe, base and prompts, an adapter of every persona on each side.

    python benchmarks/data_comparison.py --base FOLDER --side old=FOLDER --side new=FOLDER --out RESULT.json --replies FOLDER \\
        [--parallel 8] [-- --set training.learning_rate=5e-4 ...]

FOLDER of a side holds train_data_type_<TYPE>.jsonl. What follows `--` goes to every `lora-trainer run`. Each adapter is one whole
job in a process of its own, several side by side. RESULT gets the metrics of every job, --replies the greedy replies.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from train_speed import machine

ROOT = Path(__file__).resolve().parent.parent
PERSONAS = ("A", "B", "O", "AB")
LIMIT_S = 540


def job(side: str, data: Path, persona: str, base: Path, scratch: Path, more: list[str]) -> dict[str, Any]:
    """Run one job and return its metrics, or what it said if it failed before it had any."""
    place = scratch / f"{side}-{persona}"
    place.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        *("-m", "entrypoint", "run", "--blood-type", persona, "--data", str(data), "--output", str(place / "out")),
        *("--base-model", str(base), "--work-dir", str(place / "work"), *more),
    ]
    clock = time.perf_counter()
    with (place / "log").open("w") as log:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT_S, check=False, env=dict(os.environ)
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    result: dict[str, Any] = {"side": side, "persona": persona, "exit_code": code, "seconds": round(time.perf_counter() - clock, 1)}
    found = sorted((place / "out").rglob("metrics.json"))
    if found:
        result["metrics"] = json.loads(found[-1].read_text(encoding="utf-8"))
        result["bundle"] = str(found[-1].parent)
    else:
        result["said"] = (place / "log").read_text(encoding="utf-8", errors="replace")[-1500:]
    return result


def greedy_replies(bundle: Path) -> list[dict[str, Any]]:
    """Return the adapter's greedy replies in a bundle."""
    lines = (bundle / "replies.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["model"] == "adapter" and row["decoding"] == "greedy"]


def main() -> int:
    """Run all jobs, write the result and print one line a job. Return 1 if a job ended without metrics."""
    own, _, more = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--side", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--replies", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--parallel", type=int, default=8)
    options = parser.parse_args(own.split())
    sides = dict(side.split("=", 1) for side in options.side)
    with ThreadPoolExecutor(options.parallel) as pool:
        futures = [
            pool.submit(job, side, Path(folder), persona, options.base, options.scratch, more.split())
            for persona in PERSONAS
            for side, folder in sides.items()
        ]
        results = [future.result() for future in futures]
    options.replies.mkdir(parents=True, exist_ok=True)
    for result in results:
        bundle = result.pop("bundle", None)
        if bundle:
            rows = greedy_replies(Path(bundle))
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (options.replies / f"{result['side']}-{result['persona']}.jsonl").write_text(text, encoding="utf-8")
    document = {"machine": machine(), "command": sys.argv, "jobs": results}
    options.out.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for result in results:
        print(result["side"], result["persona"], "exit", result["exit_code"], result["seconds"], "s", result.get("said", "")[-300:])
    return int(any("metrics" not in result for result in results))


if __name__ == "__main__":
    sys.exit(main())

"""Measure how long commands and the training stack take to start.

    python benchmarks/start.py [--repeats 5] [--output FILE]

Runs `lora-trainer --help`, `show-config` and `validate` on the bundled data, and imports the libraries of the training stack, each
in a process of its own: once to fill the disk cache, then `--repeats` times. `-X importtime` then lists the slowest packages of
each, in a separate process, because it slows imports down. Writes `benchmarks/results/start-cpu.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STACK = ("torch", "transformers", "datasets", "peft", "trl")
COMMANDS = {
    "lora-trainer --help": ["-m", "entrypoint", "--help"],
    "lora-trainer show-config": ["-m", "entrypoint", "show-config", "--blood-type", "A"],
    "lora-trainer validate --no-tokens data/train_data_type_A.jsonl": [
        "-m",
        "entrypoint",
        "validate",
        "--no-tokens",
        "data/train_data_type_A.jsonl",
    ],
    "import torch": ["-c", "import torch"],
    "import the training stack": ["-c", "from trl import SFTTrainer; from peft import LoraConfig"],
}
_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)")


def run(arguments: list[str]) -> float:
    """Return the seconds that a process takes. Raises `CalledProcessError` if it fails."""
    started_s = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started_s


def slowest_packages(arguments: list[str], count: int = 8) -> dict[str, float]:
    """Return the seconds that the modules of the slowest packages take, without what they import from other packages."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    spent_us: Counter[str] = Counter()
    for own_us, module in _LINE.findall(done.stderr):
        package = module.partition(".")[0]
        spent_us["standard library" if package in sys.stdlib_module_names else package] += int(own_us)
    return {package: round(us / 1e6, 3) for package, us in spent_us.most_common(count)}


def machine() -> dict[str, Any]:
    """Return what the seconds depend on."""
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return {
        "processor": cpu.group(1) if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in STACK},
        "load_before": round(os.getloadavg()[0], 2),
    }


def main() -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "start-cpu.json")
    options = parser.parse_args()
    if missing := [name for name in STACK if not find_spec(name)]:
        parser.error(f"not installed: {', '.join(missing)}; pip install '.[cpu]'")
    document: dict[str, Any] = {
        "command": f"python benchmarks/start.py --repeats {options.repeats}",
        "machine": machine(),
        "rows": [],
    }
    for what, arguments in COMMANDS.items():
        # the first run reads the files from the disk
        first_s = run(arguments)
        seconds = [run(arguments) for _ in range(options.repeats)]
        row = {
            "what": what,
            "first_s": round(first_s, 2),
            "seconds": [round(value, 2) for value in seconds],
            "median_s": round(statistics.median(seconds), 2),
            "slowest_packages_s": slowest_packages(arguments),
        }
        document["rows"].append(row)
        print(what, row["median_s"], flush=True)
    options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

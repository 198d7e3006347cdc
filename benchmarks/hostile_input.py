"""Test hostile input at full counts (records, configurations, names, damaged streams, texts) and the memory of compressed bombs.

    python benchmarks/hostile_input.py

Runs the property tests with `HOSTILE_INPUT=full` (some minutes), each file in its own process, then `validate` on a small file
and on compressed bombs, and writes `benchmarks/results/hostile-input.json`. `QWEN_TOKENIZER=FOLDER` selects Qwen2.5's own
tokenizer for the control tokens. The exit code is 1 if a test fails, a count falls short, or a bomb takes over 64 MiB more than the
small file.
"""

from __future__ import annotations

import argparse
import gzip
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

from backports import zstd

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("test_hostile_records.py", "test_hostile_configs.py", "test_control_tokens.py")
WANTED = {"records": 10_000, "configs": 500}
ALLOWED_GROWTH_MIB = 64
BOMB_MIB = 4096


def measure(command: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Return wall time, peak memory, exit code and last output line of one process."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=ROOT, env={**os.environ, **(environment or {})})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        last = said.read().decode(errors="replace").strip().splitlines()[-1:]
    # kilobytes on Linux, bytes on macOS
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "exit_code": process.returncode,
        "wall_s": round(time.perf_counter() - begin, 1),
        "peak_rss_mib": round(peak_bytes / 2**20, 1),
        "said": last[0] if last else "",
    }


def properties(folder: Path) -> dict[str, dict[str, Any]]:
    """Run each test file with the full counts."""
    results: dict[str, dict[str, Any]] = {}
    for name in TESTS:
        counts = folder / f"{name}.json"
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", f"tests/unit/{name}"]
        results[name] = measure(command, {"HOSTILE_INPUT": "full", "HOSTILE_COUNTS": str(counts)})
        results[name]["drawn"] = json.loads(counts.read_text()) if counts.exists() else {}
        print(name, results[name], flush=True)
    return results


def bombs(folder: Path) -> dict[str, dict[str, Any]]:
    """Run `validate` on a small file and on compressed files: 4 GiB of one line, and 64 MiB of one repeated record."""
    record = (ROOT / "data" / "train_data_type_A.jsonl").read_bytes().splitlines(keepends=True)[0]
    files = {"small.jsonl": folder / "small.jsonl"}
    files["small.jsonl"].write_bytes(record)
    for name, chunk, size_mib in (
        ("line.jsonl.gz", b" " * 2**20, BOMB_MIB),
        ("line.jsonl.zst", b" " * 2**20, BOMB_MIB),
        ("records.jsonl.zst", record * (2**20 // len(record)), 64),
    ):
        path = files[name] = folder / name
        with gzip.open(path, "wb", compresslevel=1) if name.endswith(".gz") else zstd.open(path, "wb") as out:
            for _ in range(size_mib):
                out.write(chunk)
    results = {}
    for name, path in files.items():
        command = [sys.executable, "-m", "entrypoint", "validate", "--no-tokens", "--blood-type", "A", str(path)]
        results[name] = {"file_mib": round(path.stat().st_size / 2**20, 2), **measure(command)}
        del results[name]["said"]
        print(name, results[name], flush=True)
    return results


def main() -> int:
    """Run both parts and write the result. Return the exit code."""
    parser = argparse.ArgumentParser(description="Test hostile input at full counts and the memory of compressed bombs.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/hostile-input.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        ran = properties(Path(name))
        read = bombs(Path(name))
    drawn: dict[str, int] = {}
    for result in ran.values():
        for kind, number in result["drawn"].items():
            drawn[kind] = drawn.get(kind, 0) + number
    small_mib = float(read["small.jsonl"]["peak_rss_mib"])
    growth_mib = round(max(float(result["peak_rss_mib"]) for result in read.values()) - small_mib, 1)
    cpuinfo = Path("/proc/cpuinfo")
    described = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in described if line.startswith("model name")]
    document = {
        "what": "hostile records, configurations, names, damaged streams and texts by hypothesis; compressed bombs by validate",
        "command": "python benchmarks/hostile_input.py",
        "tokenizer": "Qwen2.5's own" if os.environ.get("QWEN_TOKENIZER") else "tiny base with Qwen2.5's added tokens",
        "machine": {
            "cpu": models[0] if models else platform.processor(),
            "cores": os.cpu_count(),
            "os": f"{platform.system()} {platform.release()}",
        },
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in ("hypothesis", "pydantic", "pyyaml", "tokenizers", "backports.zstd")},
        "drawn": drawn,
        "properties": ran,
        "bombs": read,
        "growth_mib": growth_mib,
        "allowed_growth_mib": ALLOWED_GROWTH_MIB,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    passed = all(result["exit_code"] == 0 for result in ran.values())
    refused = all(result["exit_code"] == 3 for name, result in read.items() if name != "small.jsonl")
    enough = all(drawn.get(kind, 0) >= number for kind, number in WANTED.items())
    return 0 if passed and refused and enough and growth_mib <= ALLOWED_GROWTH_MIB else 1


if __name__ == "__main__":
    sys.exit(main())

"""Compare upload and download of a set of files with the AWS CLI, against the same local S3 server.

    python -m venv /tmp/venv-aws && /tmp/venv-aws/bin/pip install awscli
    python benchmarks/storage_throughput.py --aws /tmp/venv-aws/bin/aws

A set has up to four large files, which hold 98 % of its bytes, and 32 small ones, all random. Each measurement covers a whole
process. Ours transfers the set with `lora_trainer.store` and its default settings, as publishing and fetching a bundle does. The
other runs `aws s3 cp --recursive` with its own defaults. Ours knows the SHA-256 of each upload, as from a bundle's manifest, hashes
all downloads and syncs all files it writes. The two alternate and take turns going first; the ratio compares medians. The peak
memory of a small set shows whether memory depends on the size. Downloads must equal uploads. The exit code is 1 if a ratio is
below 1 or memory grows by more than 32 MiB.

The server (tools/dev_s3.py) is written in Python and shares the machine's cores, so on a small machine it limits both. It reads the
whole object for each requested range, which favours the client with larger ranges. --scratch needs space for four sets.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SMALL_FILES = 32
LARGE_SHARE = 0.98
# minimum size of a large file: enough parts to keep all connections busy even in the small set, whose peak memory would be
# meaningless otherwise
LARGE_MIB = 120
ALLOWED_GROWTH_MIB = 32
DIRECTIONS = ("up", "down")
TOOLS = ("ours", "aws")


def transfer(direction: str, folder: Path, uri: str) -> None:
    """Transfer with our storage. Needs a fresh process: a forked one reports at least its parent's memory as its peak."""
    from lora_trainer.store.opening import open_storage

    storage = open_storage(uri)
    if direction == "clear":
        for item in list(storage.list("")):
            storage.delete(item.key)
    elif direction == "up":
        known = json.loads((folder.parent / f"{folder.name}.json").read_text(encoding="utf-8"))
        storage.upload_all(folder, "", known)
    else:
        for item in storage.list(""):
            storage.download(item.key, folder / item.key)


def make_set(folder: Path, size_mib: int) -> int:
    """Create random files in `folder` and return their total bytes."""
    folder.mkdir(parents=True)
    large_files = min(4, max(1, size_mib // LARGE_MIB))
    large_bytes = int(size_mib * 2**20 * LARGE_SHARE / large_files)
    small_bytes = int(size_mib * 2**20 * (1 - LARGE_SHARE) / SMALL_FILES)
    sizes = {f"large-{number}.bin": large_bytes for number in range(large_files)}
    sizes |= {f"small-{number:02}.bin": small_bytes for number in range(SMALL_FILES)}
    for name, size in sizes.items():
        with (folder / name).open("wb") as file:
            while size > 0:
                size -= file.write(os.urandom(min(size, 2**20)))
    return sum(path.stat().st_size for path in folder.iterdir())


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file by name."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Return seconds and peak MiB of one process. Raises SystemExit if it fails."""
    began_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.perf_counter() - began_s
    if process.returncode:
        raise SystemExit(f"exit {process.returncode}: {' '.join(command)}")
    # kilobytes on Linux, bytes on macOS
    return wall_s, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**20


def command_of(tool: str, direction: str, folder: Path, uri: str, aws: str) -> list[str]:
    """Return the command to measure."""
    if tool == "ours":
        return [sys.executable, __file__, "--transfer", direction, str(folder), uri]
    source, target = (str(folder), uri) if direction == "up" else (uri, str(folder))
    return [aws, "s3", "cp", "--recursive", "--only-show-errors", source, target]


def one_size(size_mib: int, rounds: int, server: Any, scratch: Path, aws: str) -> dict[str, Any]:
    """Measure all rounds with one set of files."""
    source = scratch / f"set-{size_mib}"
    size_bytes = make_set(source, size_mib)
    expected = digests(source)
    # `transfer` reads these hashes as if from a manifest
    (scratch / f"{source.name}.json").write_text(json.dumps(expected), encoding="utf-8")
    environment = {**os.environ, **server.environment}
    measured: dict[str, dict[str, list[tuple[float, float]]]] = {
        tool: {direction: [] for direction in DIRECTIONS} for tool in TOOLS
    }
    for number in range(rounds):
        for tool in TOOLS if number % 2 == 0 else reversed(TOOLS):
            uri, target = f"s3://benchmark/{size_mib}/{tool}/{number}/", scratch / "downloaded"
            target.mkdir()
            for direction, folder in (("up", source), ("down", target)):
                # flush what the previous transfer wrote, so that it doesn't slow this one down
                os.sync()
                wall_s, peak_mib = measure(command_of(tool, direction, folder, uri, aws), environment)
                measured[tool][direction].append((wall_s, peak_mib))
                sys.stderr.write(
                    f"{size_mib} MiB, round {number + 1}, {tool} {direction}: {wall_s:.1f} s, "
                    f"{size_bytes / wall_s / 2**20:,.0f} MiB/s, peak {peak_mib:,.0f} MiB\n"
                )
            if digests(target) != expected:
                raise SystemExit(f"{tool}: the download differs from the upload")
            shutil.rmtree(target)
            measure(command_of("ours", "clear", source, uri, aws), environment)
    shutil.rmtree(source)
    result: dict[str, Any] = {"size_bytes": size_bytes, "files": len(expected), "rounds": rounds}
    for tool in TOOLS:
        result[tool] = {
            direction: {
                "wall_s": [round(wall_s, 2) for wall_s, _ in runs],
                "median_mib_per_s": round(size_bytes / statistics.median(wall_s for wall_s, _ in runs) / 2**20, 1),
                "peak_rss_mib": round(max(peak_mib for _, peak_mib in runs), 1),
            }
            for direction, runs in measured[tool].items()
        }
    result["ratio"] = {
        direction: round(result["ours"][direction]["median_mib_per_s"] / result["aws"][direction]["median_mib_per_s"], 3)
        for direction in DIRECTIONS
    }
    return result


def machine() -> dict[str, object]:
    """Return the properties of the machine that affect the numbers."""
    cpuinfo = Path("/proc/cpuinfo")
    described = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in described if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "os": f"{platform.system()} {platform.release()}",
        "load_average_before": round(os.getloadavg()[0], 1),
    }


def load_dev_s3() -> ModuleType:
    """Import tools/dev_s3.py, a script outside any package."""
    sys.path.insert(0, str(ROOT / "tools"))
    return importlib.import_module("dev_s3")


def main() -> int:
    """Measure both sizes and write the result."""
    parser = argparse.ArgumentParser(description="Compare throughput and peak memory of lora_trainer.store with the AWS CLI.")
    parser.add_argument("--aws", default="aws", help="command of the AWS CLI")
    parser.add_argument("--size-mib", type=int, default=2048)
    parser.add_argument("--small-mib", type=int, default=128, help="size of the set for the peak memory comparison")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder with space for four sets (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/storage-throughput.json")
    parser.add_argument("--transfer", nargs=3, metavar=("DIRECTION", "FOLDER", "URI"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.transfer:
        transfer(options.transfer[0], Path(options.transfer[1]), options.transfer[2])
        return 0
    measured_on = machine()
    version = subprocess.run([options.aws, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    for variable in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        del os.environ[variable]
    # ignore the user's AWS configuration, so that the CLI runs with its defaults
    os.environ |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true"}
    results = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        scratch = Path(name)
        needed_bytes = 4 * options.size_mib * 2**20
        if shutil.disk_usage(scratch).free < needed_bytes:
            raise SystemExit(
                f"{scratch}: got {shutil.disk_usage(scratch).free:,} bytes free, expected {needed_bytes:,}; pass another --scratch"
            )
        with load_dev_s3().serve(scratch / "server") as server:
            server.make_bucket("benchmark")
            os.environ |= server.environment
            for size_mib in (options.small_mib, options.size_mib):
                results[f"{size_mib}_mib"] = one_size(size_mib, options.rounds, server, scratch, options.aws)
    small, large = (results[f"{size_mib}_mib"] for size_mib in (options.small_mib, options.size_mib))
    growth_mib = {
        direction: round(large["ours"][direction]["peak_rss_mib"] - small["ours"][direction]["peak_rss_mib"], 1)
        for direction in DIRECTIONS
    }
    passed = all(ratio >= 1 for ratio in large["ratio"].values()) and max(growth_mib.values()) <= ALLOWED_GROWTH_MIB
    document = {
        "machine": {**measured_on, "load_average_after": round(os.getloadavg()[0], 1)},
        "python": platform.python_version(),
        "versions": {"aws_cli": version, **{package: metadata.version(package) for package in ("boto3", "botocore", "s3transfer")}},
        "ratio": large["ratio"],
        "peak_rss_growth_mib": growth_mib,
        "passed": passed,
        "sizes": results,
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({name: document[name] for name in ("ratio", "peak_rss_growth_mib", "passed")}) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

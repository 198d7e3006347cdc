"""Kill runs on the tiny base at random moments while their S3 requests fail, and check that each still ends correctly.

    python benchmarks/chaos.py --runs 60

Each run has its own bucket and fault-injecting proxy (`tests/fault_proxy.py`). The benchmark kills it up to five times, half by
SIGTERM and half by SIGKILL, and restarts it after every retryable exit code, as Kubernetes would. Half of the restarts begin with
an empty work folder, as on another machine. Meanwhile, an observer without the proxy looks for manifests that don't match their
files. A run is good if its adapter equals that of the undisturbed run byte for byte, `latest.json` names it, no checkpoint and no
lease is left, and the observer found nothing.

FOLDER (`--folder`) keeps one JSON file per finished run, so after Ctrl-C or SIGTERM the same command continues. The summary goes to
`benchmarks/results/chaos.json`. The exit code is 1 if a run was not good.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from lora_trainer.config import GatesConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

# these are scripts, not modules of a package
dev_s3 = importlib.import_module("dev_s3")
fault_proxy = importlib.import_module("fault_proxy")

RETRIED = (1, 6, 143, -signal.SIGKILL, -signal.SIGTERM)
"""Exit codes that Kubernetes would retry. SIGTERM before the handler is installed counts as 143 there as well."""
MOST_ATTEMPTS = 40
PROCESS_LIMIT_S = 900.0
LOOK_EVERY_S = 0.3
STALL_S = 1.5
"""The proxy closes a stalled connection after this time. With the client's longer timeout, 60 runs would take days."""


@dataclass(frozen=True)
class Settings:
    """Settings that all runs share."""

    records: int = 48
    steps: int = 8
    every_steps: int = 2
    share: float = 0.2
    most_kills: int = 5
    seed: int = 1

    def command(self, bucket: str, work_dir: Path, **more: object) -> list[str]:
        """Return a minimal `lora-trainer run` command; `more` holds settings with `__` for the dots."""
        values = {
            "lora.r": 4, "lora.dropout": 0.1, "memory.micro_batch_tokens": 512, "logging.log_every_steps": 1,
            "checkpoints.every_steps": self.every_steps, "checkpoints.grace_s": 30,
            "evaluation.prompts": ROOT / "tests" / "assets" / "few_prompts.jsonl", "evaluation.temperature": 0,
            "evaluation.max_new_tokens": 16, "evaluation.intensities": 0.5, "evaluation.bootstrap_resamples": 100,
            **{f"gates.{name}": "none" for name in GatesConfig.model_fields},
            **{name.replace("__", "."): value for name, value in more.items()},
        }  # fmt: skip
        return [
            sys.executable, "-m", "entrypoint", "run", "--config", str(ROOT / "examples" / "demo.yaml"), "--blood-type", "A",
            "--data", f"s3://{bucket}/data/", "--output", f"s3://{bucket}/lora/", "--work-dir", str(work_dir),
            "--max-steps", str(self.steps), "--log-format", "json",
            *(argument for name, value in values.items() for argument in ("--set", f"{name}={value}")),
        ]  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """When and how to kill a process."""

    signal_name: str
    phase: str
    """A key of `PHASES`: `any` time, `train`ing, `resumable` (after the first checkpoint) or the `end` (after training)."""
    fraction: float
    """Share of the phase's duration in the undisturbed run; up to 1.3, because faults slow a run down."""


def planned_kills(settings: Settings, number: int) -> list[Kill]:
    """Plan a run's kills. The same seed and number give the same plan. The counts of SIGTERM and SIGKILL differ by at most one."""
    draw = random.Random(f"{settings.seed} {number}")
    names = ["SIGTERM", "SIGKILL"]
    draw.shuffle(names)
    kills = [
        Kill(names[at % 2], draw.choices(("any", "train", "end"), (2, 5, 3))[0], draw.uniform(0, 1.3))
        for at in range(draw.randint(1, settings.most_kills))
    ]
    draw.shuffle(kills)
    return kills


# -- one process ------------------------------------------------------------------------------------------


@dataclass
class Attempt:
    """One process and how it ended."""

    exit_code: int = 0
    killed_by: str = ""
    killed_behind: str = ""
    """The last logged event before the signal."""
    duration_s: float = 0.0
    resumed_from: int | None = None
    problems: list[str] = field(default_factory=list)


class StoppedError(Exception):
    """The user asked the benchmark to stop."""


class Process:
    """A `lora-trainer run` process and its log."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.log: list[dict[str, Any]] = []
        self.noise: list[str] = []
        self.times_s: dict[str, float] = {}
        """Time from the start of the process to the first occurrence of each event."""
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self._started_s = time.monotonic()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._started_s

    def wait(self, stop: threading.Event) -> int | None:
        """Wait 20 ms and return the exit code, or None if the process still runs.

        Kill it after `PROCESS_LIMIT_S` and when `stop` is set, which also raises `StoppedError`.
        """
        if stop.is_set() or self.age_s > PROCESS_LIMIT_S:
            self._process.kill()
        if stop.is_set():
            self._process.wait()
            raise StoppedError
        try:
            code = self._process.wait(0.02)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join()
        return code

    def send(self, signal_name: str) -> bool:
        """Send the signal. Return False if the process had already ended."""
        if self._process.poll() is not None:
            return False
        self._process.send_signal(signal.Signals[signal_name])
        return True

    def event(self, name: str) -> dict[str, Any] | None:
        """Return the last event with that name, or None."""
        return next((line for line in reversed(self.log) if line["event"] == name), None)

    def _read(self) -> None:
        for line in self._process.stderr or ():
            try:
                found = json.loads(line)
                self.times_s.setdefault(found["event"], self.age_s)
                self.log.append(found)
            except (ValueError, KeyError, TypeError):
                # a line that SIGKILL truncated, or a traceback
                self.noise.append(line.rstrip()[:300])


PHASES = {"any": "", "train": "packing_checked", "resumable": "checkpoint_uploaded", "end": "training_finished"}
"""The event that starts each phase."""


@dataclass(frozen=True)
class Reference:
    """The undisturbed run."""

    run_id: str
    adapter_sha256: str
    phases_s: dict[str, float]
    duration_s: float


def attempt(
    command: list[str], environment: dict[str, str], kill: Kill | None, reference: Reference, stop: threading.Event
) -> tuple[Attempt, Process]:
    """Run one process to its end. If it is still running when `kill` is due, kill it."""
    process = Process(command, environment)
    result = Attempt()
    while (code := process.wait(stop)) is None:
        if kill is None or result.killed_by:
            continue
        begin_s = process.times_s.get(PHASES[kill.phase]) if PHASES[kill.phase] else 0.0
        is_due = begin_s is not None and process.age_s - begin_s >= kill.fraction * reference.phases_s[kill.phase]
        if is_due and process.send(kill.signal_name):
            result.killed_by = kill.signal_name
            result.killed_behind = process.log[-1]["event"] if process.log else "nothing"
    result.exit_code, result.duration_s = code, round(process.age_s, 1)
    resumed, finished = process.event("resumed"), process.event("run_finished")
    result.resumed_from = resumed["step"] if resumed else None
    result.problems = [problem[:300] for problem in (finished or {}).get("problems", [])]
    return result, process


# -- the bucket -------------------------------------------------------------------------------------------


class Bucket:
    """Direct access to a bucket, without the proxy."""

    def __init__(self, server: Any, name: str) -> None:
        environment = server.environment
        self.name = name
        self._client = boto3.client(
            "s3",
            endpoint_url=server.endpoint_url,
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            region_name=environment["AWS_REGION"],
            config=Config(max_pool_connections=4, retries={"total_max_attempts": 3}),
        )
        self._sha256: dict[tuple[str, str], str] = {}

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self.name, Key=key, Body=data)

    def keys(self, prefix: str) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def left_over(self) -> list[str]:
        """Return what runs left behind, except the counter of starts, which stays."""
        return [key for key in self.keys("lora/runs/") if not key.endswith("/starts.json")]

    def get(self, key: str) -> tuple[bytes, str] | None:
        """Return the object and its ETag, or None if it doesn't exist."""
        try:
            found = self._client.get_object(Bucket=self.name, Key=key)
        except self._client.exceptions.NoSuchKey:
            return None
        return found["Body"].read(), found["ETag"]

    def sha256(self, key: str) -> str:
        """Return the object's SHA-256, or an empty string if it doesn't exist."""
        try:
            tag = self._client.head_object(Bucket=self.name, Key=key)["ETag"]
        except ClientError:
            return ""
        if (key, tag) not in self._sha256:
            found = self.get(key)
            self._sha256[key, tag] = hashlib.sha256(found[0]).hexdigest() if found else ""
        return self._sha256[key, tag]

    def wrong_manifests(self) -> Iterator[str]:
        """Yield each manifest or `latest.json` that would mislead a reader."""
        for key in self.keys("lora/"):
            if key.endswith("/manifest.json") and (problem := self._problem(key)):
                yield f"{key}: {problem}"
            elif key.endswith("/latest.json") and (found := self.get(key)):
                named = f"lora/{json.loads(found[0])['bundle']}manifest.json"
                if self.get(named) is None:
                    yield f"{key}: names {named}, which doesn't exist"

    def _problem(self, key: str) -> str:
        found = self.get(key)
        if found is None:
            return ""
        try:
            files = {name: file["sha256"] for name, file in json.loads(found[0])["files"].items()}
        except (ValueError, KeyError, TypeError) as error:
            return f"not a manifest: {error!r}"
        wrong = [name for name, sha256 in files.items() if self.sha256(key.removesuffix("manifest.json") + name) != sha256]
        now = self.get(key)
        # ignore a manifest that was replaced or deleted during the check
        return f"{', '.join(wrong)}: SHA-256 differs from the manifest" if wrong and now and now[1] == found[1] else ""

    def uploads(self) -> int:
        """Return the number of unfinished multipart uploads."""
        return len(self._client.list_multipart_uploads(Bucket=self.name).get("Uploads", []))


class Observer:
    """Watch a bucket for wrong manifests in a background thread."""

    def __init__(self, bucket: Bucket) -> None:
        self.looks = 0
        self.manifests: set[str] = set()
        self.problems: list[str] = []
        self._bucket = bucket
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Observer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            try:
                self.manifests.update(key for key in self._bucket.keys("lora/") if key.endswith("/manifest.json"))
                self.problems.extend(problem for problem in self._bucket.wrong_manifests() if problem not in self.problems)
                self.looks += 1
            except Exception as error:
                # without this, an observer that crashed would look like one that found nothing
                self.problems.append(f"the observer failed: {error!r}")
                return


# -- one run ----------------------------------------------------------------------------------------------


def environment_for(server: Any, endpoint_url: str) -> dict[str, str]:
    """Return an environment for one thread, without the caller's AWS and project settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "LORA_TRAINER_"))}
    own = {"AWS_ENDPOINT_URL": endpoint_url, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    return {**kept, "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1", **server.environment, **own}


def make_bucket(server: Any, settings: Settings, name: str) -> Bucket:
    """Create a bucket that holds the training data."""
    server.make_bucket(name)
    bucket = Bucket(server, name)
    with (ROOT / "data" / "train_data_type_A.jsonl").open("rb") as file:
        bucket.put("data/train_data_type_A.jsonl", b"".join(file.readline() for _ in range(settings.records)))
    return bucket


def undisturbed(server: Any, settings: Settings, scratch: Path, stop: threading.Event) -> Reference:
    """Run once without the proxy and without any kill."""
    bucket = make_bucket(server, settings, "undisturbed")
    none = Reference("", "", {}, 0)
    command = settings.command(bucket.name, scratch / "undisturbed")
    done, process = attempt(command, environment_for(server, server.endpoint_url), None, none, stop)
    if done.exit_code:
        raise SystemExit(f"the undisturbed run ended with exit code {done.exit_code}: {done.problems or process.noise}")
    times_s = process.times_s
    run_id = (process.event("run_finished") or {})["run_id"]
    return Reference(
        run_id,
        bucket.sha256(f"lora/adapters/A/{run_id}/adapter_model.safetensors"),
        {
            "any": done.duration_s,
            "train": times_s["training_finished"] - times_s["packing_checked"],
            "resumable": times_s["training_finished"] - times_s["checkpoint_uploaded"],
            "end": done.duration_s - times_s["training_finished"],
        },
        done.duration_s,
    )


def run_one(
    server: Any,
    settings: Settings,
    number: int,
    reference: Reference,
    scratch: Path,
    stop: threading.Event,
    kills: Sequence[Kill] | None = None,
) -> dict[str, Any]:
    """Run, kill and restart until the run ends. Return its facts; `wrong` is empty if the run is good.

    `kills` replaces the kills planned from seed and number.
    """
    bucket = make_bucket(server, settings, f"run-{number:03d}-{os.getpid()}")
    draw = random.Random(f"{settings.seed} {number} work folders")
    planned = list(planned_kills(settings, number) if kills is None else kills)
    attempts: list[Attempt] = []
    wrong: list[str] = []
    waits = 0
    started_s = time.monotonic()
    with (
        Observer(bucket) as observer,
        fault_proxy.FaultProxy(server.endpoint_url, share=settings.share, seed=number, stall_s=STALL_S) as proxy,
    ):
        environment = environment_for(server, proxy.url)
        work_dir = scratch / f"{number}"
        while len(attempts) < MOST_ATTEMPTS:
            if attempts and draw.random() < 0.5:
                # simulate another machine
                shutil.rmtree(work_dir, ignore_errors=True)
            # kill each process at most once
            kill = planned[len(attempts)] if len(attempts) < len(planned) else None
            ended, process = attempt(settings.command(bucket.name, work_dir), environment, kill, reference, stop)
            attempts.append(ended)
            waits += sum(line["event"] == "lease_waiting" for line in process.log)
            # SIGKILL may truncate a line, and a process reports a signal as plain text until it has set up its log
            if process.noise and (not ended.killed_by or any(line.startswith("Traceback") for line in process.noise)):
                wrong.append(f"not a log line: {process.noise[0]}")
            if ended.exit_code == 1:
                # Kubernetes would retry, but neither kills nor faults justify an unexpected error
                wrong.append(f"exit code 1 after {ended.killed_behind or 'no signal'}: {ended.problems}")
            if ended.exit_code not in RETRIED:
                break
        swept = bool(bucket.left_over()) and attempts[-1].exit_code == 0
        if swept:
            # a kill or a fault interrupted the cleanup; running the same command again finishes it
            ended, _ = attempt(
                settings.command(bucket.name, work_dir), environment_for(server, server.endpoint_url), None, reference, stop
            )
            attempts.append(ended)
    duration_s = time.monotonic() - started_s
    shutil.rmtree(work_dir, ignore_errors=True)
    wrong.extend(observer.problems)
    wrong.extend(what_is_wrong(bucket, reference, attempts))
    if waits:
        wrong.append(f"waited {waits} times for a lease without a live holder")
    return {
        "number": number,
        "wrong": wrong,
        "attempts": [asdict(ended) for ended in attempts],
        "planned_kills": len(planned),
        "swept": swept,
        "requests": proxy.requests,
        "faults": {str(kind): count for kind, count in sorted(proxy.faults.items())},
        "looks": observer.looks,
        "manifests_seen": len(observer.manifests),
        "duration_s": round(duration_s, 1),
    }


def what_is_wrong(bucket: Bucket, reference: Reference, attempts: list[Attempt]) -> Iterator[str]:
    """Yield the problems of a finished run."""
    if attempts[-1].exit_code:
        yield f"exit code {attempts[-1].exit_code}: {attempts[-1].problems}"
    yield from bucket.wrong_manifests()
    folder = f"lora/adapters/A/{reference.run_id}/"
    if bucket.get(folder + "manifest.json") is None:
        yield f"{folder}manifest.json: missing"
    if bucket.sha256(folder + "adapter_model.safetensors") != reference.adapter_sha256:
        yield f"{folder}adapter_model.safetensors: differs from the undisturbed run's"
    latest = bucket.get("lora/adapters/A/latest.json")
    if latest is None or json.loads(latest[0])["run_id"] != reference.run_id:
        yield "latest.json: does not name the run"
    if left := bucket.left_over():
        yield f"left over: {', '.join(left)}"
    if uploads := bucket.uploads():
        yield f"left over: {uploads} unfinished multipart uploads"


# -- all runs ---------------------------------------------------------------------------------------------


def revision() -> str:
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def cpu_model() -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open() as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")
    return platform.processor() or "unknown"


def summarise(settings: Settings, runs: list[dict[str, Any]], reference: Reference, command: str) -> dict[str, Any]:
    """Return the document for `benchmarks/results/`."""
    attempts = [ended for run in runs for ended in run["attempts"]]
    killed = [ended for ended in attempts if ended["killed_by"]]
    faults: Counter[str] = Counter()
    for run in runs:
        faults.update(run["faults"])
    requests = sum(run["requests"] for run in runs)
    durations_s = [run["duration_s"] for run in runs]
    return {
        "what": "runs on the tiny base, killed at random moments, against an S3 server behind a fault-injecting proxy",
        "command": command,
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "os": f"{platform.system()} {platform.release()}"},
        "versions": {
            "python": platform.python_version(),
            "revisions": sorted({run["revision"] for run in runs}),
            **{name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft", "boto3")},
        },
        "settings": asdict(settings),
        "runs": len(runs),
        "good": sum(not run["wrong"] for run in runs),
        "wrong": {run["number"]: run["wrong"] for run in runs if run["wrong"]},
        "processes": len(attempts),
        "kills": dict(Counter(ended["killed_by"] for ended in killed)),
        "kills_per_run": dict(Counter(sum(bool(ended["killed_by"]) for ended in run["attempts"]) for run in runs)),
        "killed_behind": dict(Counter(ended["killed_behind"] for ended in killed).most_common()),
        "exit_codes": {str(code): count for code, count in sorted(Counter(ended["exit_code"] for ended in attempts).items())},
        "resumed": sum(ended["resumed_from"] is not None for ended in attempts),
        "swept": sum(run["swept"] for run in runs),
        "requests": requests,
        "faults": dict(faults.most_common()),
        "faulty_share": round(faults.total() / requests, 4) if requests else None,
        "observer": {key: sum(run[key] for run in runs) for key in ("looks", "manifests_seen")},
        "undisturbed": {**asdict(reference), "phases_s": {name: round(value, 1) for name, value in reference.phases_s.items()}},
        "run_s": {"median": statistics.median(durations_s), "longest": max(durations_s), "sum": round(sum(durations_s), 1)}
        if runs
        else None,
    }


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """Yield an event that the first signal sets. A second signal has its default effect."""
    stop = threading.Event()

    def handle(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)
        print("stopping; the same command continues with the unfinished runs", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    yield stop


def kept_runs(folder: Path) -> dict[int, dict[str, Any]]:
    found = (json.loads(path.read_text()) for path in sorted(folder.glob("run-*.json")))
    return {run["number"]: run for run in found}


def kept_reference(folder: Path, made: Reference, settings: Settings) -> Reference:
    """Return the reference that the kept runs were compared with. Raises `SystemExit` if it differs from `made`."""
    path = folder / "undisturbed.json"
    now = {"reference": asdict(made), "settings": asdict(settings)}
    if not path.exists():
        path.write_text(json.dumps(now, indent=2) + "\n")
        return made
    kept = json.loads(path.read_text())
    if kept["settings"] != now["settings"] or kept["reference"]["run_id"] != made.run_id:
        raise SystemExit(f"{folder}: holds runs with other settings or of another version; remove it or pass another --folder")
    if kept["reference"]["adapter_sha256"] != made.adapter_sha256:
        raise SystemExit(
            f"{folder}: its undisturbed run has another adapter, perhaps of another machine; remove it or pass another --folder"
        )
    return made


def write(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(document, indent=2) + "\n")
    unfinished.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=2, help="parallel runs")
    parser.add_argument("--share", type=float, default=Settings.share, help="share of requests that fail")
    parser.add_argument("--most-kills", type=int, default=Settings.most_kills, help="kills per run")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "chaos", help="keeps finished runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "chaos.json")
    options = parser.parse_args()
    settings = Settings(share=options.share, most_kills=options.most_kills, seed=options.seed)
    folder: Path = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    with stopping() as stop, dev_s3.serve() as server:
        try:
            reference = kept_reference(folder, undisturbed(server, settings, scratch, stop), settings)
        except StoppedError:
            return 1

        def one(number: int) -> None:
            with suppress(StoppedError):
                run = run_one(server, settings, number, reference, scratch, stop)
                write(folder / f"run-{number:03d}.json", {**run, "revision": revision()})
                kills = sum(bool(ended["killed_by"]) for ended in run["attempts"])
                print(
                    f"run {number}: {'; '.join(run['wrong']) or 'good'}: {kills} kills, {len(run['attempts'])} processes, "
                    f"{sum(run['faults'].values())} of {run['requests']} requests failed, {run['duration_s']} s",
                    flush=True,
                )

        waiting = [number for number in range(1, options.runs + 1) if number not in kept_runs(folder)]
        with ThreadPoolExecutor(options.jobs) as pool:
            for done in [pool.submit(one, number) for number in waiting]:
                done.result()
    shutil.rmtree(scratch, ignore_errors=True)
    runs = [run for number, run in kept_runs(folder).items() if number <= options.runs]
    summary = summarise(settings, runs, reference, f"python benchmarks/chaos.py --runs {options.runs}")
    print(json.dumps({key: value for key, value in summary.items() if key not in ("machine", "versions")}, indent=2))
    if len(runs) == options.runs:
        write(options.out, summary)
    return 0 if summary["good"] == options.runs else 1


if __name__ == "__main__":
    sys.exit(main())

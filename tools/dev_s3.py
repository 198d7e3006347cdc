#!/usr/bin/env python3
"""Run a real S3 server on loopback for the tests and the demo. Needs only the standard library.

    python tools/dev_s3.py --data .demo/s3 --port 9000

The server is ministack (locks/dev-s3.txt). It pins its own version of botocore, so it needs a separate virtual environment:
`.venv-s3` in the repository root, or the one whose interpreter `DEV_S3_PYTHON` or `--python` names.
It accepts any credentials, so it must listen on loopback only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
REPOSITORY = Path(__file__).resolve().parent.parent
REQUIREMENTS = "locks/dev-s3.txt"

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
_LOG_TAIL_LINES = 20

# The server stops when its standard input closes, which happens even if SIGKILL ends the parent.
_BOOTSTRAP = """
import os, runpy, signal, sys, threading
def stop_with_parent():
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=stop_with_parent, daemon=True).start()
sys.argv = ["ministack"]
runpy.run_module("ministack", run_name="__main__", alter_sys=True)
"""

# ignore inherited proxy settings, which would apply to 127.0.0.1 as well
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class DevS3Error(Exception):
    """The server is not installed, did not start, or stopped unexpectedly."""


@dataclass(frozen=True)
class DevS3:
    """A running server."""

    endpoint_url: str
    process_id: int

    @property
    def environment(self) -> dict[str, str]:
        """The standard AWS variables that point any S3 client to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": "dev",
            "AWS_SECRET_ACCESS_KEY": "dev",
            "AWS_REGION": "us-east-1",
        }

    def make_bucket(self, name: str) -> None:
        """Create the bucket unless it exists."""
        request = urllib.request.Request(f"{self.endpoint_url}/{name}", method="PUT")  # noqa: S310  always http://127.0.0.1
        try:
            _direct.open(request, timeout=10).close()
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode(errors="replace")
            # us-east-1 returns 200 if the owner creates a bucket again, other regions return this error
            if "BucketAlreadyOwnedByYou" not in said:
                raise DevS3Error(f"cannot create bucket '{name}': HTTP {error.code}: {said}") from None


def default_python() -> Path:
    """Return the server's interpreter: `DEV_S3_PYTHON`, or the one in `.venv-s3`. It may not exist."""
    return Path(os.environ.get("DEV_S3_PYTHON") or REPOSITORY / ".venv-s3" / "bin" / "python")


def why_not(python: Path | None = None) -> str | None:
    """Return what prevents the server from starting and how to fix it, or None if it can start."""
    python = python or default_python()
    if not os.access(python, os.X_OK):
        return f"no S3 server: {python} does not exist; 'make setup' creates .venv-s3 from {REQUIREMENTS}"
    probe = subprocess.run(
        [python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('ministack') is None)"], check=False
    )
    return f"no S3 server: {python} has no ministack; install {REQUIREMENTS} in its environment" if probe.returncode else None


@contextmanager
def serve(data_dir: Path | None = None, port: int = 0, python: Path | None = None) -> Iterator[DevS3]:
    """Run a server for the duration of the block.

    `data_dir` keeps the objects for the next start; without it they are deleted when the block ends. Port 0 picks a
    free port. Raises `DevS3Error`, with the end of the server's log, if the server is missing or does not start.
    """
    python = python or default_python()
    if missing := why_not(python):
        raise DevS3Error(missing)
    folder = Path(tempfile.mkdtemp(prefix="dev-s3-")) if data_dir is None else data_dir.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        process, endpoint_url = _start(folder, port, python)
        try:
            yield DevS3(endpoint_url, process.pid)
        finally:
            _stop(process)
    finally:
        if data_dir is None:
            shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, port: int, python: Path) -> tuple[subprocess.Popen[bytes], str]:
    if port and _answers(port):
        raise DevS3Error(
            f"port {port} of {HOST} is in use; stop the process that listens there, or pass another --port (0 picks a free one)"
        )
    # another process may take the free port before the server binds it; if so, try another port
    attempts = 1 if port else 3
    for attempt in range(1, attempts + 1):
        chosen = port or _free_port()
        process = _launch(folder, chosen, python)
        try:
            problem = _wait_until_ready(process, chosen)
        except BaseException:
            _stop(process)
            raise
        if problem is None:
            return process, f"http://{HOST}:{chosen}"
        _stop(process)
        if attempt == attempts:
            raise DevS3Error(f"the S3 server {problem}\n{_log_tail(folder)}")
    raise AssertionError("the last attempt returns or raises")


def _launch(folder: Path, port: int, python: Path) -> subprocess.Popen[bytes]:
    scratch = folder / "tmp"
    scratch.mkdir(exist_ok=True)
    environment = {
        # build the environment from scratch, because the caller's AWS_* and proxy settings must not reach the server
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "LANG": "C.UTF-8",
        "BIND_HOST": HOST,
        "GATEWAY_PORT": str(port),
        "SERVICES": "s3",
        "LOG_LEVEL": "WARNING",
        # the server writes objects to disk at once, and its other state when it stops
        "S3_PERSIST": "1",
        "S3_DATA_DIR": str(folder / "objects"),
        "PERSIST_STATE": "1",
        "STATE_DIR": str(folder / "state"),
    }
    with (folder / "server.log").open("wb") as log:
        return subprocess.Popen(
            [python, "-c", _BOOTSTRAP],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=scratch,
            # Ctrl-C in a terminal must reach only the caller, which then stops the server
            start_new_session=True,
        )


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> str | None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            return f"exited during start-up with code {process.returncode}"
        try:
            with _direct.open(f"http://{HOST}:{port}/_ministack/health", timeout=2):
                return None
        except OSError:
            time.sleep(0.05)
    return f"did not answer within {_START_TIMEOUT_S:.0f} s"


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        if process.stdin:
            process.stdin.close()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _log_tail(folder: Path) -> str:
    lines = (folder / "server.log").read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    return "\n".join(["End of its log:", *lines]) if lines else "Its log is empty."


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a local S3 server on loopback until Ctrl-C or SIGTERM.")
    parser.add_argument("--data", type=Path, required=True, help="folder that keeps the buckets between starts")
    parser.add_argument("--port", type=int, default=0, help="0, the default, picks a free port")
    parser.add_argument("--python", type=Path, help="interpreter that has ministack (default: DEV_S3_PYTHON, or .venv-s3)")
    parser.add_argument("--bucket", action="append", default=[], help="create this bucket; repeatable")
    options = parser.parse_args()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        with serve(options.data, options.port, options.python) as server:
            for bucket in options.bucket:
                server.make_bucket(bucket)
            # print shell syntax, so that a user can paste it and a script can eval it
            sys.stdout.write("".join(f"export {name}={value}\n" for name, value in server.environment.items()))
            sys.stdout.flush()
            while not stopped.wait(0.5):
                if not _is_running(server.process_id):
                    raise DevS3Error(f"the S3 server stopped unexpectedly\n{_log_tail(options.data)}")
    except DevS3Error as error:
        sys.stderr.write(f"dev_s3: {error}\n")
        return 1
    return 0


def _is_running(process_id: int) -> bool:
    # WNOWAIT leaves the exit status to the Popen object that `serve` holds
    return os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


if __name__ == "__main__":
    sys.exit(main())

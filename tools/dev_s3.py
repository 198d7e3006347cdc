#!/usr/bin/env python3
"""A real S3 server on loopback, for the tests and the demo. Standard library only.

    python tools/dev_s3.py --data .demo/s3 --port 9000

The server is ministack (locks/dev-s3.txt). It pins its own botocore, so it lives in a virtual environment of its
own, `.venv-s3` in the repository root; `DEV_S3_PYTHON` or `--python` name the interpreter of another one.
It takes any credentials, so it must never listen on anything but loopback.
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

# The server stops when its standard input ends, which it does however its parent ends, SIGKILL included.
_BOOTSTRAP = """
import os, runpy, signal, sys, threading
def stop_with_parent():
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=stop_with_parent, daemon=True).start()
sys.argv = ["ministack"]
runpy.run_module("ministack", run_name="__main__", alter_sys=True)
"""

# an inherited proxy would be asked for 127.0.0.1
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class DevS3Error(Exception):
    """The server is not installed, did not start, or stopped by itself."""


@dataclass(frozen=True)
class DevS3:
    """A server that answers."""

    endpoint_url: str
    process_id: int

    @property
    def environment(self) -> dict[str, str]:
        """The ordinary AWS variables with which any S3 client finds this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": "dev",
            "AWS_SECRET_ACCESS_KEY": "dev",
            "AWS_REGION": "us-east-1",
        }

    def make_bucket(self, name: str) -> None:
        """Makes sure that the bucket is there."""
        request = urllib.request.Request(f"{self.endpoint_url}/{name}", method="PUT")  # noqa: S310  always http://127.0.0.1
        try:
            _direct.open(request, timeout=10).close()
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode(errors="replace")
            # us-east-1 answers 200 to an owner who makes a bucket twice, the other regions this
            if "BucketAlreadyOwnedByYou" not in said:
                raise DevS3Error(f"bucket '{name}' could not be made: HTTP {error.code}: {said}") from None


def default_python() -> Path:
    """The interpreter that has the server: `DEV_S3_PYTHON`, or the one in `.venv-s3`. It need not exist."""
    return Path(os.environ.get("DEV_S3_PYTHON") or REPOSITORY / ".venv-s3" / "bin" / "python")


def why_not(python: Path | None = None) -> str | None:
    """What is missing before a server can start, and how to get it; None when nothing is."""
    python = python or default_python()
    if not os.access(python, os.X_OK):
        return f"no S3 server: {python} is not there; 'make setup' makes it: a virtual environment with {REQUIREMENTS}"
    probe = subprocess.run(
        [python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('ministack') is None)"], check=False
    )
    return f"no S3 server: {python} has no ministack; install {REQUIREMENTS} there" if probe.returncode else None


@contextmanager
def serve(data_dir: Path | None = None, port: int = 0, python: Path | None = None) -> Iterator[DevS3]:
    """A running server for as long as the block lasts.

    What is stored stays in `data_dir` for the next start; without one it goes when the block ends. Port 0 takes a
    free one. Raises `DevS3Error` when the server is missing or does not start, with the end of its log.
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
        raise DevS3Error(f"port {port} of {HOST} is in use; stop what listens there, or give another --port (0 takes a free one)")
    # another process may take a free port before the server does: rare, and then the next one is free
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
        # only what it needs: the caller's AWS_* and proxy settings must not reach the server
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "LANG": "C.UTF-8",
        "BIND_HOST": HOST,
        "GATEWAY_PORT": str(port),
        "SERVICES": "s3",
        "LOG_LEVEL": "WARNING",
        # objects are written through as they come; the rest of the state when the server stops
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
            # Ctrl-C in a terminal is for the caller, who stops the server in order
            start_new_session=True,
        )


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> str | None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            return f"ended at once with {process.returncode}"
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
    return "\n".join(["the end of its log:", *lines]) if lines else "its log is empty"


def main() -> int:
    parser = argparse.ArgumentParser(description="A local S3 server on loopback, until Ctrl-C or SIGTERM.")
    parser.add_argument("--data", type=Path, required=True, help="folder that keeps the buckets from one start to the next")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    parser.add_argument("--python", type=Path, help="interpreter that has ministack (default: DEV_S3_PYTHON, or .venv-s3)")
    parser.add_argument("--bucket", action="append", default=[], help="make this bucket; may be given several times")
    options = parser.parse_args()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        with serve(options.data, options.port, options.python) as server:
            for bucket in options.bucket:
                server.make_bucket(bucket)
            # ready to be pasted into a shell, or read by a script
            sys.stdout.write("".join(f"export {name}={value}\n" for name, value in server.environment.items()))
            sys.stdout.flush()
            while not stopped.wait(0.5):
                if not _is_running(server.process_id):
                    raise DevS3Error(f"the S3 server stopped by itself\n{_log_tail(options.data)}")
    except DevS3Error as error:
        sys.stderr.write(f"dev_s3: {error}\n")
        return 1
    return 0


def _is_running(process_id: int) -> bool:
    # without taking its exit status, which belongs to the process object that `serve` holds
    return os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


if __name__ == "__main__":
    sys.exit(main())

"""Test that the local S3 server keeps its data, listens on loopback only, and always stops."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
import pytest
from conftest import REPOSITORY, load_tool

pytestmark = pytest.mark.integration

dev_s3: Any = load_tool("dev_s3")


@pytest.fixture
def server_python() -> Path:
    if missing := dev_s3.why_not():
        pytest.skip(missing)
    return Path(dev_s3.default_python())


def listens(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def test_data_outlives_the_server_however_it_ends(server_python: Path, aws_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for start, number in enumerate((None, signal.SIGTERM, signal.SIGKILL)):
        with dev_s3.serve(tmp_path / "data", python=server_python) as server:
            for variable, value in server.environment.items():
                aws_environment.setenv(variable, value)
            client = boto3.client("s3", region_name="us-east-1")
            server.make_bucket("kept")
            server.make_bucket("kept")
            assert client.list_objects_v2(Bucket="kept")["KeyCount"] == start
            client.put_object(Bucket="kept", Key=f"한글/{start}", Body=b"x")
            if number:
                os.kill(server.process_id, number)
        assert not listens(int(server.endpoint_url.rpartition(":")[2]))


def test_loopback_only(server_python: Path) -> None:
    addresses = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    with dev_s3.serve(python=server_python) as server:
        port = int(server.endpoint_url.rpartition(":")[2])
        assert listens(port)
        # a server on all interfaces would also answer on 127.0.0.2, another loopback address
        for address in (*addresses, "127.0.0.2"):
            assert not listens(port, address)


def test_command(server_python: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tools/dev_s3.py", "--data", str(tmp_path), "--python", str(server_python), "--bucket", "demo"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.startswith("export AWS_ENDPOINT_URL=http://127.0.0.1:")
        port = int(first.rpartition(":")[2])
        assert listens(port)
        second = subprocess.run(
            [*command, "--port", str(port)], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
        )
        assert second.returncode == 1
        assert f"port {port} of 127.0.0.1 is in use" in second.stderr
    finally:
        process.terminate()
        assert process.wait(20) == 0
    assert not listens(port)


def test_server_does_not_outlive_a_killed_parent(server_python: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tools/dev_s3.py", "--data", str(tmp_path), "--python", str(server_python)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        assert listens(port)
        process.kill()
    deadline_s = time.monotonic() + 300
    while listens(port) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not listens(port)


def test_missing_server_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(dev_s3.DevS3Error, match=r"/python .*make setup.*locks/dev-s3\.txt"),
        dev_s3.serve(python=tmp_path / "python"),
    ):
        pass


def test_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text('#!/bin/sh\ncase "$2" in *find_spec*) exit 0;; esac\necho the reason >&2\nexit 3\n')
    broken.chmod(0o755)
    with pytest.raises(dev_s3.DevS3Error, match=r"code 3\n.*\nthe reason$"), dev_s3.serve(python=broken):
        pass

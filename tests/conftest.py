"""Fixtures for all tests: a real S3 server, and an AWS environment without the developer's settings."""

from __future__ import annotations

import importlib.util
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lora_trainer.store.interface import Storage
from lora_trainer.store.opening import open_storage
from lora_trainer.store.retry import budget_from_environment

# Must be set before torch is imported: if idle threads spin, two processes on two cores block each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REPOSITORY = Path(__file__).resolve().parent.parent


def load_tool(name: str, folder: str = "tools") -> ModuleType:
    """Import the script `<folder>/<name>.py`: scripts belong to no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, REPOSITORY / folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def open_budgeted(uri: str) -> Storage:
    """Open `uri` with a new retry budget, configured by the test's `LORA_TRAINER_STORAGE__*` variables."""
    return open_storage(uri, budget_from_environment())


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Define the profile `explore`: new examples in each run, and no deadline, which a busy machine would miss."""
    if config.getoption("--hypothesis-profile", None) == "explore":
        from hypothesis import settings

        settings.register_profile("explore", deadline=None, print_blob=True)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start one `DevS3` on loopback for the session."""
    dev_s3 = load_tool("dev_s3")
    if missing := dev_s3.why_not():
        pytest.skip(missing)
    with dev_s3.serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def aws_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Remove the machine's AWS settings, so that each test sets the ones it needs."""
    for variable in os.environ:
        if variable.startswith("AWS_") or variable.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    # Give up quickly on permanent failures.
    monkeypatch.setenv("LORA_TRAINER_STORAGE__OBJECT_BUDGET_S", "0.2")
    return monkeypatch


@pytest.fixture
def bucket(s3_server: Any, aws_environment: pytest.MonkeyPatch) -> str:
    """Create a bucket, point AWS_* at its server, and return its name."""
    for variable, value in s3_server.environment.items():
        aws_environment.setenv(variable, value)
    name = f"test-{secrets.token_hex(6)}"
    s3_server.make_bucket(name)
    return name

"""Test the CPU image as a cluster runs it: with a read-only root, as an unknown user, without capabilities."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from conftest import REPOSITORY
from docker_cli import Docker, docker_with

from lora_trainer.config import GatesConfig
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.store.manifest import read_manifest, verify_files
from lora_trainer.store.opening import open_storage
from lora_trainer.store.prefixes import bundle_prefix, latest_key

pytestmark = pytest.mark.image

IMAGE: Final = os.environ.get("CPU_IMAGE", "localhost/lora-trainer:cpu")
HARDENED: Final = (
    "--rm", "--read-only", "--user", "12345:12345", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
    "--tmpfs", "/job:rw,mode=1777", "--tmpfs", "/cache:rw,exec,mode=1777", "--tmpfs", "/tmp:rw,exec,mode=1777",
)  # fmt: skip
ON_THIS_HOST: Final = (
    "--network", "host", "--volume", f"{REPOSITORY / 'tests' / 'assets'}:/assets:ro",
    "--env", "AWS_ENDPOINT_URL", "--env", "AWS_ACCESS_KEY_ID", "--env", "AWS_SECRET_ACCESS_KEY", "--env", "AWS_REGION",
    "--env", "OMP_WAIT_POLICY=PASSIVE", "--env", "IMAGE_DIGEST=sha256:feed",
)  # fmt: skip
# a short real run: few steps, few questions and no gates, because a dozen steps do not teach a persona
RUN: Final = (
    "run", "--config", "/opt/lora-trainer/examples/demo.yaml", "--blood-type", "A", "--max-steps", "12", "--log-format", "json",
    "--set", "memory.micro_batch_tokens=512", "--set", "logging.log_every_steps=1", "--set", "checkpoints.every_steps=4",
    "--set", "evaluation.prompts=/assets/few_prompts.jsonl", "--set", "evaluation.temperature=0",
    "--set", "evaluation.max_new_tokens=32", "--set", "evaluation.intensities=0.2,0.9",
    *(argument for name in GatesConfig.model_fields for argument in ("--set", f"gates.{name}=none")),
)  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Docker:
    return docker_with(IMAGE, "image-cpu")


@pytest.fixture
def docker(engine: Docker, bucket: str) -> Docker:
    """Return the engine with the AWS variables of the test's S3 server."""
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return Docker(engine.client, engine.environment | aws)


@pytest.fixture
def name(engine: Docker) -> Iterator[str]:
    """Yield a container name, and remove the container however the test ends."""
    chosen = f"lora-trainer-test-{uuid.uuid4().hex[:12]}"
    yield chosen
    engine("rm", "--force", chosen)


def python_in(engine: Docker, code: str) -> subprocess.CompletedProcess[str]:
    return engine("run", *HARDENED, "--network", "none", "--entrypoint", "python", IMAGE, "-c", code)


def test_structure(engine: Docker) -> None:
    program = shutil.which("container-structure-test", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program, "container-structure-test is not installed: make setup"
    config = REPOSITORY / "tests" / "image" / "structure.yaml"
    done = subprocess.run(
        [program, "test", "--image", IMAGE, "--config", config, "--no-color"],
        env=engine.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_whole_run_of_a_user_whom_nobody_knows(docker: Docker, bucket: str) -> None:
    """Train on the image's own data; the bundle in S3 names the image that made it."""
    output = open_storage(f"s3://{bucket}/lora/")
    done = docker(
        "run", *HARDENED, *ON_THIS_HOST, IMAGE, *RUN, "--data", "/opt/lora-trainer/data/", "--output", output.uri
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in done.stderr.splitlines()]
    run_id = log[-1]["run_id"]
    prefix = bundle_prefix(BloodType.A, run_id)
    assert done.stdout.strip() == output.uri + prefix
    assert verify_files(output, prefix) == []
    manifest = read_manifest(output, prefix)
    assert manifest is not None
    revision = docker("image", "inspect", "--format", '{{index .Config.Labels "org.opencontainers.image.revision"}}', IMAGE)
    assert manifest["environment"]["git_revision"] == revision.stdout.strip()
    assert manifest["environment"]["image_digest"] == "sha256:feed"
    latest = output.read_bytes(latest_key(BloodType.A))
    assert latest is not None
    assert json.loads(latest.data)["run_id"] == run_id


def test_sigterm_reaches_the_job_and_another_container_goes_on(docker: Docker, bucket: str, name: str) -> None:
    output = f"s3://{bucket}/lora/"
    command = ("run", *HARDENED, *ON_THIS_HOST)
    run = (IMAGE, *RUN, "--data", "/opt/lora-trainer/data/", "--output", output)
    process = docker.start(*command, "--name", name, *run)
    assert process.stderr is not None
    log: list[dict[str, Any]] = []
    for line in process.stderr:
        log.append(json.loads(line))
        if log[-1]["event"] == "training_step" and log[-1]["step"] == 5:
            assert docker("kill", "--signal", "TERM", name).returncode == 0
    assert process.wait(120) == 143, log
    assert log[-1]["exit_code"] == 143
    (kept,) = [event["step"] for event in log if event["event"] == "interrupted_safely"]

    again = docker(*command, *run)
    assert again.returncode == 0, again.stderr
    resumed = [event for event in map(json.loads, again.stderr.splitlines()) if event["event"] == "resumed"]
    assert [event["step"] for event in resumed] == [kept]


def test_a_failure_says_its_code(engine: Docker, tmp_path: Path) -> None:
    """Broken data ends the job with 3, and the last log line is in the file that Kubernetes reads."""
    word = tmp_path / "termination-log"
    word.touch()
    word.chmod(0o666)
    broken = tmp_path / "train_data_type_A.jsonl"
    broken.write_text("{\n", encoding="utf-8")
    tmp_path.chmod(0o755)
    done = engine(
        "run", *HARDENED, "--network", "none", "--volume", f"{word}:/dev/termination-log",
        "--volume", f"{broken}:/data/{broken.name}:ro", IMAGE, "run", "--config", "/opt/lora-trainer/examples/demo.yaml",
        "--blood-type", "A", "--data", "/data/", "--output", "/job/out/",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert json.loads(word.read_text(encoding="utf-8"))["exit_code"] == 3


def test_without_a_gpu_the_default_is_refused(engine: Docker) -> None:
    done = engine("run", *HARDENED, "--network", "none", IMAGE, "run", "--blood-type", "A", "--data", "/opt/lora-trainer/data/")
    assert done.returncode == 5, done.stderr


def test_libraries_ask_who_the_user_is(engine: Docker) -> None:
    """Libraries name folders after the user, who has no entry in /etc/passwd."""
    done = python_in(engine, "import getpass, os, pathlib; print(os.getuid(), getpass.getuser(), pathlib.Path.home())")
    assert done.stdout.split() == ["12345", "trainer", "/cache"], done.stderr


def test_an_extension_compiles_and_loads(engine: Docker) -> None:
    """Triton needs this for its first kernel: gcc compiles C with Python's headers into the temporary folder."""
    code = """
import importlib.util, pathlib, subprocess, sysconfig
source = pathlib.Path("/tmp/probe.c")
source.write_text('''#include <Python.h>
static struct PyModuleDef probe = {PyModuleDef_HEAD_INIT, "probe", "loaded", -1, NULL};
PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&probe); }''')
subprocess.run(["gcc", "-shared", "-fPIC", "-I", sysconfig.get_path("include"), "-o", "/tmp/probe.so", source], check=True)
spec = importlib.util.spec_from_file_location("probe", "/tmp/probe.so")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.__doc__)
"""
    done = python_in(engine, code)
    assert done.stdout == "loaded\n", done.stderr


def test_torch_compile_works(engine: Docker) -> None:
    """g++ compiles C++ with torch's headers below /cache. Besides /cache, only /job and /tmp are writable."""
    code = """
import os, pathlib, torch
print(round(torch.compile(lambda x: (x.sin() * 2).sum())(torch.ones(8)).item(), 3))
print(any(pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.so")))
"""
    done = engine("run", *HARDENED, "--network", "none", "--entrypoint", "python", IMAGE, "-c", code)
    assert done.stdout.split() == ["13.464", "True"], done.stderr

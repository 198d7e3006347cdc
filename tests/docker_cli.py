"""Run Docker in tests: use the engine that tools/docker_engine.sh finds, and images that already exist."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass

import pytest
from conftest import REPOSITORY


@dataclass(frozen=True)
class Docker:
    """A Docker client and the engine that it talks to."""

    client: str
    environment: dict[str, str]

    def __call__(self, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run one command to its end."""
        return subprocess.run(
            [self.client, *arguments], env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start one command and return its process, so that the caller can read standard error."""
        return subprocess.Popen(
            [self.client, *arguments],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )


def docker_with(image: str, target: str) -> Docker:
    """Return an engine that has the image. Otherwise skip the test and name the make target that builds it."""
    found = subprocess.run([REPOSITORY / "tools" / "docker_engine.sh", "find"], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(found.stderr.strip())
    exports = dict(re.findall(r"(\w+)=(\S+)", found.stdout))
    docker = Docker(exports["DOCKER"], os.environ | exports)
    if docker("image", "inspect", image).returncode:
        pytest.skip(f"no image {image}: make {target}")
    return docker

"""Load a bundle with genuine old versions of transformers and PEFT, in environments of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from conftest import REPOSITORY, load_tool
from jobs import require_training_stack

pytestmark = pytest.mark.e2e
require_training_stack()
tool: Any = load_tool("consumers")


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["4.51.3+0.12.0", "4.57.6+0.17.1"])
def test_an_old_consumer_gives_the_same_greedy_tokens(pair: str) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "consumers.py"), "--pairs", pair],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if "No matching distribution found" in done.stderr or "Failed to establish a new connection" in done.stderr:
        pytest.skip("pip's index cannot be reached, or does not have these versions")
    assert done.returncode == 0, done.stderr[-2000:]
    last_line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    assert json.loads(last_line)["result"] == tool.EQUAL

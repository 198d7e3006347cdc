"""Test the unsloth backend in Unsloth's CPU mode. This detects API changes, but covers neither kernels nor speed.

`.ci/run` runs it in a separate environment (locks/unsloth-cpu.txt). Each run is a separate process, because Unsloth patches its
libraries permanently.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from jobs import DEMO, NO_GATES, few_questions
from safetensors.numpy import load_file

pytestmark = pytest.mark.e2e
for needed in ("unsloth", "bitsandbytes"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install --no-deps -r locks/unsloth-cpu.txt", allow_module_level=True)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_whole_job_in_unsloths_cpu_mode(quantization: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "entrypoint", "run", *DEMO,
            "--blood-type", "A", "--backend", "unsloth", "--max-steps", "4", *few_questions(), *NO_GATES,
            "--set", f"training.quantization={quantization}",
            "--data", str(REPOSITORY / "data"), "--output", str(tmp_path / "out"), "--work-dir", str(tmp_path / "work"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )  # fmt: skip
    # every line is one JSON event, although Unsloth prints text of its own
    log = {line["event"]: line for line in map(json.loads, done.stderr.splitlines())}
    assert done.returncode == 0, log
    assert done.stdout.strip().startswith("file://")
    assert log["backend_started"]["backend"] == "unsloth"
    assert log["packing_checked"]["relative_difference"] < 0.01
    assert log["adapter_read_back"]["base_difference"] > 0
    bundle = tmp_path / "out" / "adapter_A"
    metrics = json.loads((bundle / "metrics.json").read_text())
    assert metrics["training"]["packed_rows"] == metrics["training"]["rows"] > 0
    settings = json.loads((bundle / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "lora-trainer/tiny-base"
    assert len(settings["target_modules"]) == 7
    # weights in bfloat16, the upper half of a float32, would lose most of Adam's updates, also on a quantized base
    weights = load_file(bundle / "adapter_model.safetensors").values()
    assert all(weight.dtype == np.float32 and (weight.view(np.uint32) & 0xFFFF).any() for weight in weights)


def test_the_second_of_two_personas_gets_the_adapter_that_it_gets_alone(tmp_path: Path) -> None:
    """Unsloth's generation, trainer and checkpointing leave no state of the first persona on the shared base."""
    data = tmp_path / "data"
    data.mkdir()
    for blood_type in "AB":
        lines = (REPOSITORY / "data" / f"train_data_type_{blood_type}.jsonl").read_text(encoding="utf-8").splitlines()[:60]
        (data / f"train_data_type_{blood_type}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    adapters = []
    for blood_types in ("B", "A,B"):
        output = tmp_path / blood_types
        done = subprocess.run(
            [
                sys.executable, "-m", "entrypoint", "run", *DEMO,
                "--blood-type", blood_types, "--backend", "unsloth", "--max-steps", "2", *few_questions(8, "0.9"), *NO_GATES,
                "--set", "training.quantization=nf4", "--set", "training.compute_dtype=bfloat16",
                "--set", "memory.gradient_checkpointing=unsloth", "--set", "memory.micro_batch_tokens=512",
                "--data", str(data), "--output", str(output), "--work-dir", str(tmp_path / f"work-{blood_types}"),
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        adapters.append((output / "adapter_B" / "adapter_model.safetensors").read_bytes())
    reused = [line for line in map(json.loads, done.stderr.splitlines()) if line["event"] == "base_reused"]
    assert [line["blood_type"] for line in reused] == ["B"]
    assert adapters[0] == adapters[1]

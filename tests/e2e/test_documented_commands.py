"""Run the documents' commands in their order, as they stand, in a copy of the checkout.

What shortens a run comes from the environment: the demo's file of settings, six steps, six prompts, no gates. So do credentials and
endpoint of the local S3 server, instead of the `export` lines. tests/unit/test_commands.py checks all other commands.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from documented import blocks, lines_of
from jobs import FEW_PROMPTS, require_training_stack
from made_reviews import filled_in

from lora_trainer.config import GatesConfig

pytestmark = pytest.mark.e2e
require_training_stack()

SHORT = {
    "LORA_TRAINER_CONFIG": "examples/demo.yaml",
    "LORA_TRAINER_TRAINING__MAX_STEPS": "6",
    "LORA_TRAINER_MEMORY__MICRO_BATCH_TOKENS": "512",
    "LORA_TRAINER_EVALUATION__PROMPTS": str(FEW_PROMPTS),
    "LORA_TRAINER_EVALUATION__TEMPERATURE": "0",
    "LORA_TRAINER_EVALUATION__MAX_NEW_TOKENS": "32",
    "LORA_TRAINER_EVALUATION__INTENSITIES": "0.2,0.9",
    **{f"LORA_TRAINER_GATES__{name.upper()}": "none" for name in GatesConfig.model_fields},
}


@dataclass
class Reader:
    """Someone who follows the documents on a terminal."""

    folder: Path
    environment: dict[str, str]
    run_id: str = ""
    said: dict[str, str] = field(default_factory=dict)

    def runs(self, line: str, *, expected: int = 0, stdin: str = "", **environment: str) -> str:
        """Run a shell line and return its standard output."""
        text = line.replace("<run id>", self.run_id).replace("<other>", self.run_id)
        done = subprocess.run(
            ["/bin/bash", "-o", "pipefail", "-c", text],
            cwd=self.folder,
            env={**self.environment, **environment},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == expected, f"{text}: exit {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def reader(s3_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("data", "examples", "tests/assets"):
        shutil.copytree(REPOSITORY / name, folder / name)
    # what `make setup` creates
    (folder / ".venv").symlink_to(sys.prefix)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "LORA_TRAINER_"))}
    environment |= {"PATH": f"{folder}/.venv/bin:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY), **s3_server.environment}
    s3_server.make_bucket("my-bucket")
    return Reader(folder, environment)


def documented_line(page: str, start: str) -> str:
    """Return the only line of the page's shell blocks that starts with `start`."""
    (line,) = {line for block in blocks(page) for line in lines_of(block) if line.startswith(start)}
    return line


@pytest.fixture(scope="module")
def trained(reader: Reader) -> Reader:
    """Upload the data, and run README.md's two commands for S3."""
    (upload,) = (line for block in blocks("docs/kubernetes.md") for line in lines_of(block) if line.startswith("aws s3 cp data/"))
    assert "s3://my-bucket/personas/" in upload
    script = (
        "from pathlib import Path\n"
        "from lora_trainer.store.opening import open_storage\n"
        "for path in sorted(Path('data').glob('train_data_type_*.jsonl')):\n"
        "    open_storage('s3://my-bucket/personas/').upload(path, path.name)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=reader.folder, env=reader.environment, check=True)
    reader.said["check-storage"] = reader.runs(documented_line("README.md", "lora-trainer check-storage"), **SHORT)
    uri = reader.runs(documented_line("README.md", "lora-trainer run --blood-type A --data s3://"), **SHORT).strip()
    assert uri.startswith("s3://my-bucket/lora/adapters/A/")
    reader.run_id = uri.rstrip("/").rpartition("/")[2]
    return reader


def test_the_storage_is_checked_before_the_run(trained: Reader) -> None:
    assert trained.said["check-storage"].count("ok: ") >= 3


def test_the_run_can_be_measured_again(trained: Reader) -> None:
    said = trained.runs(documented_line("docs/evaluation.md", "lora-trainer evaluate"), **SHORT)
    assert "report: " in said


def test_runs_can_be_compared(trained: Reader) -> None:
    said = trained.runs(documented_line("docs/evaluation.md", "lora-trainer compare"))
    assert trained.run_id[:8] in said
    assert (trained.folder / "compare.html").is_file()


def test_the_adapter_can_be_talked_to(trained: Reader) -> None:
    line = documented_line("docs/evaluation.md", "lora-trainer chat")
    assert trained.runs(line, stdin="점심 뭐 먹지?\n", LORA_TRAINER_CONFIG="examples/demo.yaml").strip()


def test_the_run_can_be_promoted(trained: Reader) -> None:
    said = trained.runs(documented_line("docs/evaluation.md", "lora-trainer promote s3://"))
    assert f"names run {trained.run_id} now" in said


def test_the_run_can_be_reviewed_and_promoted_with_the_review(trained: Reader) -> None:
    trained.runs(documented_line("docs/evaluation.md", "lora-trainer review s3://"))
    content = filled_in((trained.folder / "review.html").read_text(encoding="utf-8"), lambda number, adapter: adapter)
    (trained.folder / f"review-A-{trained.run_id}-0.json").write_text(json.dumps(content), encoding="utf-8")
    said = trained.runs(documented_line("docs/evaluation.md", "lora-trainer promote --reviewed"))
    assert f"against the base: {len(content['answers'])} won, 0 tied, 0 lost" in said


def test_the_data_can_be_validated(trained: Reader) -> None:
    trained.runs(documented_line("docs/data-format.md", "lora-trainer validate data/"))
    # --json prints one document
    json.loads(trained.runs(documented_line("docs/data-format.md", "lora-trainer validate --strict --json s3://")))


def test_ones_own_data_trains_on_the_tiny_base_without_a_gpu(reader: Reader) -> None:
    reader.runs(documented_line("README.md", "mkdir -p my-data"))
    line = documented_line(
        "docs/configuration.md", "lora-trainer run --blood-type A --device cpu --base-model ./examples/tiny-base"
    )
    # the defaults, but for what would take minutes
    short = {name: value for name, value in SHORT.items() if name != "LORA_TRAINER_CONFIG"}
    uri = reader.runs(line, LORA_TRAINER_DATA="my-data/", LORA_TRAINER_OUTPUT="own/", **short).strip()
    assert (Path(uri.removeprefix("file://")) / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_ones_own_data_ends_with_the_code_that_the_readme_expects(reader: Reader) -> None:
    reader.runs(documented_line("README.md", "mkdir -p my-data"))
    line = documented_line("README.md", ".venv/bin/lora-trainer run --config examples/demo.yaml")
    assert "**exit code 4**" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
    uri = reader.runs(line, expected=4).strip()
    folder = Path(uri.removeprefix("file://"))
    assert (folder / "report.html").is_file()
    assert not (folder.parent / "latest.json").exists()


@pytest.mark.slow
def test_data_can_be_generated(reader: Reader) -> None:
    reader.runs(documented_line("docs/data-format.md", "lora-trainer generate --count"))
    names = sorted(path.name for path in (reader.folder / "generated").iterdir())
    assert names == [f"train_data_type_{blood_type}.jsonl" for blood_type in ("A", "AB", "B", "O")]
    reader.runs(documented_line("data/README.md", "lora-trainer validate --strict generated/"))

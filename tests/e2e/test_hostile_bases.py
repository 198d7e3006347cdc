"""Test hostile and broken bases through the command line: nothing of them runs, and each ends with a reason and exit 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from broken_bases import WEIGHTS, change_json, copy_base, keep_tensors, set_template
from conftest import REPOSITORY
from jobs import NO_GATES, few_questions, require_training_stack

pytestmark = pytest.mark.e2e
require_training_stack()

EVIL = "open({mark!r}, 'w').write('ran')\nclass EvilConfig: pass\nclass EvilModel: pass\nclass EvilTok: pass\n"
AUTO_MAP = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel", "AutoTokenizer": ["evil.EvilTok", None]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the beginning of the bundled data."""
    file = tmp_path_factory.mktemp("data") / "train_data_type_A.jsonl"
    lines = (REPOSITORY / "data" / "train_data_type_A.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:24]), encoding="utf-8")
    return file


def command(name: str, base: Path, data: Path, work_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a command on a base, answering `y` to whatever asks."""
    return subprocess.run(
        [sys.executable, "-m", "entrypoint", name, "--blood-type", "A", "--device", "cpu", "--base-model", str(base),
         "--data", str(data), "--output", str(work_dir / "out"), "--work-dir", str(work_dir / "work"), *more],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, input="y\n" * 9,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def evil(folder: Path, mark: Path, name: str = "config.json", **values: object) -> None:
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)), encoding="utf-8")
    change_json(folder, name, auto_map=AUTO_MAP, **values)


HOSTILE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a model type of its own": (lambda folder, mark: evil(folder, mark, model_type="evilmodel"), "model_type: got 'evilmodel'"),
    "code under another architecture": (
        lambda folder, mark: evil(folder, mark, model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        "model_type: got 'gpt2'",
    ),
    "a template that reaches for Python": (
        lambda folder, mark: set_template(
            folder, "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}" + "{{ messages }}"
        ),
        "its chat template fails with SecurityError",
    ),
    "a template that loops": (
        lambda folder, mark: set_template(folder, "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3),
        "its chat template",
    ),
    "weights without a layer": (
        lambda folder, mark: keep_tensors(folder, lambda name: "layers.2." not in name),
        "the weights have no model.layers.2.",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_base_ends_with_a_reason_and_runs_nothing(name: str, data: Path, tmp_path: Path) -> None:
    make, said = HOSTILE[name]
    base, mark = copy_base(tmp_path / "base"), tmp_path / "ran"
    make(base, mark)
    started_s = time.monotonic()
    done = command("run", base, data, tmp_path)
    took_s = time.monotonic() - started_s
    last = json.loads(done.stderr.splitlines()[-1])
    assert (done.returncode, last["event"], last["exit_code"]) == (2, "run_finished", 2), done.stderr[-2000:]
    assert said in last["problems"][0]
    assert "Traceback" not in done.stderr
    assert not mark.exists()
    # the base comes before the data, which may take long to read
    assert '"data_fetched"' not in done.stderr
    # nothing was started that another attempt would wait for
    assert not (tmp_path / "out").exists()
    # 20 s on a free machine
    assert took_s < 60


def test_check_storage_refuses_it_as_well(data: Path, tmp_path: Path) -> None:
    base, mark = copy_base(tmp_path / "base"), tmp_path / "ran"
    evil(base, mark, model_type="evilmodel")
    done = command("check-storage", base, data, tmp_path)
    assert done.returncode == 2
    assert "error: base: base.model: " in done.stderr
    assert "model_type: got 'evilmodel'" in done.stderr
    assert not mark.exists()


LOADS = """
import sys
from pathlib import Path
from lora_trainer.config_sources import settle
from lora_trainer.errors import LoraTrainerError
from lora_trainer.train.backends import open_reference_backend
from lora_trainer.train.backends.base_loading import load_base

for number, folder in enumerate(map(Path, sys.argv[1:])):
    config = settle({"blood_type": "A", "device": "cpu", "training.compute_dtype": "float32"}, {})
    if not number:
        backend = open_reference_backend(config)
        backend.start()
    try:
        tokenizer = backend.load_tokenizer(folder)
        load_base(folder, config.training, tokenizer, on_cuda=False)
        print("loaded")
    except LoraTrainerError as error:
        print(int(error.exit_code), type(error).__name__, " ".join(error.problems))
"""


def test_what_only_loading_can_find_is_refused_there(tmp_path: Path) -> None:
    """Load bases that skip the check: code beside a known architecture, missing layers, NaN weights, a broken tokenizer."""
    import torch
    from safetensors.torch import load_file, save_file

    mark = tmp_path / "ran"
    folders = [copy_base(tmp_path / str(number)) for number in range(6)]
    evil(folders[0], mark)
    evil(folders[0], mark, "tokenizer_config.json")
    evil(folders[1], mark, model_type="evilmodel")
    keep_tensors(folders[2], lambda name: "layers.3." not in name)
    weights = load_file(folders[3] / WEIGHTS)
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(weights, folders[3] / WEIGHTS, metadata={"format": "pt"})
    (folders[4] / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    change_json(folders[5], "config.json", hidden_act="no-such-function")
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *map(str, folders)],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, input="y\n" * 9,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith(("loaded", "2 "))]
    assert len(said) == len(folders), done.stdout + done.stderr[-3000:]
    assert said[0] == "loaded"
    for line, part in zip(
        said[1:], ["custom code", "model.layers.3.", "holds NaN", "its tokenizer", "no-such-function"], strict=True
    ):
        assert line.startswith("2 ConfigError base.model: ")
        assert part in line
    assert not mark.exists()


def test_the_defaults_fit_a_cpu(data: Path, tmp_path: Path) -> None:
    """`run --device cpu --base-model ./examples/tiny-base` on a user's own data, with no other setting of the recipe."""
    base = REPOSITORY / "examples" / "tiny-base"
    done = command("run", base, data, tmp_path, "--max-steps", "2", *few_questions(8, "0.9"), *NO_GATES,
                   "--set", "training.held_out_fraction=0.3")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = json.loads((tmp_path / "out" / "adapter_A" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["config"]["training"]["quantization"] == "none"
    assert not list((tmp_path / "out").rglob("lease.json"))

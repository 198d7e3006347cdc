"""Test a real run's bundle in other hands: broken, hostile, published by hand, and after a pointer from the future."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broken_bases import change_json, copy_base, keep_tensors, set_template
from conftest import REPOSITORY
from jobs import BASE, FEW_PROMPTS, SHORT, events, job, require_training_stack

pytestmark = pytest.mark.e2e
require_training_stack()

FUTURE = "2099-01-01T00:00:00+00:00"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Train for six steps, in an output whose `latest.json` an earlier version wrote with a clock that was ahead."""
    folder = tmp_path_factory.mktemp("hostile")
    pointer = folder / "out" / "adapters" / "A" / "latest.json"
    pointer.parent.mkdir(parents=True)
    pointer.write_text(json.dumps({"run_id": "f" * 16, "bundle": f"adapters/A/{'f' * 16}/", "started_at": FUTURE}))
    data = str(REPOSITORY / "data")
    done = job("run", *SHORT, "--blood-type", "A", "--data", data, "--output", str(folder / "out"), work_dir=folder / "work")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "out", events(done)


@pytest.fixture
def bundle(ran: tuple[Path, Any], tmp_path: Path) -> Path:
    return shutil.copytree((ran[0] / "adapter_A").resolve(), tmp_path / "bundle")


def called(*arguments: str, told: str = "안녕\n") -> tuple[int, str, str, float]:
    """Run a command in a process of its own. Return exit code, output, errors and seconds."""
    started_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "entrypoint", *arguments], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        input=told, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr, time.monotonic() - started_s


def test_a_pointer_from_the_future_is_said_and_moved(ran: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    output, log = ran
    pointer = json.loads((output / "adapters" / "A" / "latest.json").read_text())
    manifest = json.loads((output / "adapter_A" / "manifest.json").read_text())
    assert pointer["run_id"] == manifest["run_id"] == log["run_finished"]["run_id"]
    assert pointer["counter"] == manifest["counter"] == 1
    assert log["latest_in_future"]["level"] == "warning"
    assert FUTURE in log["latest_in_future"]["problem"]
    assert log["latest_checked"]["moved"] is True


def adapter_settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def damaged(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def not_numbers(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\xff\xff\xff\x7f")


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (damaged, "damaged or cut off"),
        (not_numbers, "got NaN or infinity"),
        (adapter_settings(r=8), "by r in adapter_config.json"),
        (adapter_settings(target_modules=r"(a+)+$"), "a text is a regular expression"),
        (lambda folder: (folder / "adapter_model.pt").write_bytes(pickle.dumps(Trap(folder / "sprung"))), "pickled"),
    ],
    ids=["cut-off", "nan", "other-rank", "regex", "pickle"],
)
def test_a_hostile_adapter_ends_with_its_reason_and_runs_nothing(
    bundle: Path, tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    change(bundle)
    sign(bundle)
    here = ("--base-model", str(BASE), "--work-dir", str(tmp_path / "work"))
    data = str(REPOSITORY / "data")
    for arguments in (
        ("evaluate", "--adapter", str(bundle), *here, "--device", "cpu", "--data", data, "--prompts", str(FEW_PROMPTS)),
        ("chat", "--adapter", str(bundle), *here, "--device", "cpu"),
    ):
        code, _, error, seconds = called(*arguments)
        assert (code, said in error) == (2, True), error[-2000:]
        assert "Traceback" not in error
        assert seconds < 20
    assert not (bundle / "sprung").exists()


def looping(folder: Path) -> None:
    set_template(folder, "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda base: change_json(base, "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"}), "got 'evil'"),
        (looping, "its chat template"),
        (lambda base: keep_tensors(base, lambda name: "layers.2." not in name), "the weights have no model.layers.2."),
    ],
    ids=["own-code", "loop", "incomplete"],
)
def test_a_hostile_base_ends_evaluate_and_chat_with_its_reason(
    ran: tuple[Path, Any], tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    base, mark = copy_base(tmp_path / "base"), tmp_path / "sprung"
    (base / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()")
    change(base)
    adapter = str(ran[0] / "adapter_A")
    here = ("--adapter", adapter, "--base-model", str(base), "--work-dir", str(tmp_path / "work"), "--device", "cpu")
    data = str(REPOSITORY / "data")
    for arguments in (("evaluate", *here, "--data", data, "--prompts", str(FEW_PROMPTS)), ("chat", *here)):
        code, _, error, seconds = called(*arguments, told="y\n" * 9)
        assert (code, said in error) == (2, True), error[-2000:]
        assert "Traceback" not in error
        assert seconds < 20
    assert not mark.exists()


def sign(folder: Path) -> None:
    """Write the hashes of all files into the manifest, as somebody who changed them would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"] = {
        file.name: {"size_bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in folder.iterdir()
        if file != path
    }
    path.write_text(json.dumps(manifest), encoding="utf-8")


def test_escape_codes_are_printed_escaped(ran: tuple[Path, Any], bundle: Path) -> None:
    metrics = json.loads((bundle / "metrics.json").read_text())
    metrics["run_id"] = "\x1b]0;pwn\x07\x9b31m\u202eRED"
    (bundle / "metrics.json").write_text(json.dumps(metrics))
    sign(bundle)
    for more in ((), ("--json",)):
        code, out, error, _ = called("compare", str(bundle), str(ran[0] / "adapter_A"), *more)
        assert code == 0, error
        assert not set(out) & set("\x1b\x07\x9b\u202e")
        assert "\\u001b]0;pwn" in out


def test_a_real_bundle_proves_its_claims_and_a_changed_verdict_does_not(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    code, out, error, _ = called("publish", str(bundle), "--output", str(output), "--base-model", str(BASE))
    assert code == 0, error
    run_id = json.loads((bundle / "manifest.json").read_text())["run_id"]
    assert out == f"file://{output}/adapters/A/{run_id}/\n"
    assert json.loads((output / "adapters" / "A" / "latest.json").read_text())["run_id"] == run_id
    assert bundle.exists()

    replies = (bundle / "replies.jsonl").read_text(encoding="utf-8").splitlines()
    replies[0] = json.dumps({**json.loads(replies[0]), "informal_speech": not json.loads(replies[0])["informal_speech"]})
    (bundle / "replies.jsonl").write_text("\n".join(replies) + "\n", encoding="utf-8")
    sign(bundle)
    other = tmp_path / "other"
    code, _, error, _ = called("publish", str(bundle), "--output", str(other))
    assert code == 0, error
    assert "latest_not_moved" in error
    assert not (other / "adapters" / "A" / "latest.json").exists()

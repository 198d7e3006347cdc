"""Test `lora-trainer chat`: every reply is exact JSON, even from an adapter that has learned almost nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import REPOSITORY
from jobs import SHORT, few_questions, job
from older_bundles import with_prompt_2

from lora_trainer.evaluate.rules import read_exact

pytestmark = pytest.mark.e2e
for needed in ("torch", "transformers", "trl", "peft", "llguidance"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install '.[cpu]'")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for six steps, too few for the adapter to write valid JSON without the grammar."""
    folder = tmp_path_factory.mktemp("chat")
    done = job(
        "run", *SHORT, "--blood-type", "B", "--data", str(REPOSITORY / "data"), "--output", str(folder / "out"), work_dir=folder
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "out" / "adapter_B"


@pytest.fixture(scope="module")
def older(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same adapter in a bundle of prompt version 2."""
    return with_prompt_2(adapter, tmp_path_factory.mktemp("older"))


def chat(adapter: Path, work_dir: Path, lines: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with `lines` on its standard input."""
    return subprocess.run(
        [sys.executable, "-m", "entrypoint", "chat", "--adapter", str(adapter), "--work-dir", str(work_dir),
         "--base-model", "./examples/tiny-base", *arguments],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, input=lines,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def test_every_reply_is_exact_json_and_the_same_again(adapter: Path, tmp_path: Path) -> None:
    lines = "점심 뭐 먹지?\n/intensity 1\n/feeling excited\n나 시험 붙었어!!\n\n/situation 우리는 카페에 있어.\n고마워 <|im_end|>\n"
    done = chat(adapter, tmp_path, lines, "--json", "--base", "--temperature", "1.5")
    assert done.returncode == 0, done.stderr
    replies = [line for line in done.stdout.splitlines() if line.startswith("{")]
    # the adapter and the base each answer three messages
    assert len(replies) == 6
    for reply in replies:
        found = read_exact(reply)
        assert found is not None
        assert len(found.text) <= 200
    assert "feels excited 1.0, situation: 우리는 카페에 있어." in done.stdout
    assert chat(adapter, tmp_path, lines, "--json", "--base", "--temperature", "1.5").stdout == done.stdout
    assert chat(adapter, tmp_path, lines, "--json", "--base", "--temperature", "1.5", "--seed", "9").stdout != done.stdout


def test_a_slip_is_one_line_and_the_conversation_goes_on(adapter: Path, tmp_path: Path) -> None:
    done = chat(adapter, tmp_path, "/nope\n/intensity 3\n/feeling hungry\n안녕\n/quit\nnobody reads this\n")
    assert done.returncode == 0, done.stderr
    *problems, reply = done.stdout.splitlines()
    assert [problem.split(":")[0] for problem in problems] == ["/nope", "/intensity", "/feeling"]
    assert reply.startswith("B 솔직  ")


def test_earlier_turns_are_sent_only_to_adapters_that_may_have_them(adapter: Path, older: Path, tmp_path: Path) -> None:
    """The second reply depends on the first message in prompt version 2, and not in version 3, which was trained without."""
    lines = "나 오늘 시험 망쳤어\n밥은?\n/new\n우리 내일 놀러 갈까?\n밥은?\n"
    for bundle, turns in ((adapter, False), (older, True)):
        done = chat(bundle, tmp_path, lines, "--json", "--temperature", "1.5")
        assert done.returncode == 0, done.stderr
        replies = [line for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(replies) == 4
        # the second reply of each conversation has the same seed
        assert (replies[1] != replies[3]) is turns
        assert ("/situation TEXT" in done.stderr) is not turns


def test_an_older_adapter_is_evaluated_with_its_own_prompt(adapter: Path, older: Path, tmp_path: Path) -> None:
    def measured(bundle: Path) -> dict[str, Any]:
        folder = tmp_path / bundle.name
        done = job(
            "evaluate", "--adapter", str(bundle), "--data", str(REPOSITORY / "data"), "--base-model", "./examples/tiny-base",
            "--report-dir", str(folder), *few_questions(8), work_dir=tmp_path / "work",
        )  # fmt: skip
        assert done.returncode in (0, 4), done.stderr[-2000:]
        return cast("dict[str, Any]", json.loads((folder / "metrics.json").read_text(encoding="utf-8")))

    new, old = measured(adapter), measured(older)
    trained = json.loads((adapter / "metrics.json").read_text(encoding="utf-8"))
    assert new["held_out"]["loss_base"] == pytest.approx(trained["held_out"]["loss_base"], abs=1e-4)
    assert abs(old["held_out"]["loss_base"] - trained["held_out"]["loss_base"]) > 1e-3, "other prompts, other losses"
    assert new["evaluation"]["prompts_sha256"] == old["evaluation"]["prompts_sha256"]
    assert new["evaluation"]["evaluation_id"] != old["evaluation"]["evaluation_id"]


def test_a_message_longer_than_the_bases_positions_is_one_line(older: Path, tmp_path: Path) -> None:
    """The base has 2,048 positions. Too long a message is refused alone; too long a conversation forgets its oldest turns."""
    long, filling = "점심 뭐 먹지? " * 2000, "나 오늘 학교에서 있었던 일 들어 봐. " * 30
    done = chat(older, tmp_path, f"{long}\n" + f"{filling}\n" * 3 + "안녕\n", "--json")
    assert done.returncode == 0, done.stderr
    problem, *replies = done.stdout.splitlines()
    assert problem.startswith("the prompt: got ")
    assert "the base has 2,048 positions (max_position_embeddings)" in problem
    assert len(replies) == 4
    assert all(read_exact(reply) for reply in replies)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--feeling", "hungry"), 2, "--feeling: got 'hungry', expected one of neutral"),
        (("--base-model", "./examples/no-such-folder"), 2, "no such folder"),
        (("--set", "no.setting=1"), 2, "expected SETTING=VALUE"),
    ],
)
def test_what_is_asked_wrongly(adapter: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = chat(adapter, tmp_path, "안녕\n", *arguments)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_base_that_the_manifest_names_is_not_opened_unasked(adapter: Path, tmp_path: Path) -> None:
    done = chat(adapter, tmp_path, "안녕\n", "--base-model", "Qwen/Qwen2.5-7B-Instruct")
    assert done.returncode == 2
    assert "the adapter was trained on sha256:" in done.stderr
    assert "examples/tiny-base; what a manifest names is not opened unasked" in done.stderr


def test_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other-base"
    other.mkdir()
    for path in (REPOSITORY / "examples" / "tiny-base").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    done = chat(adapter, tmp_path, "안녕\n", "--base-model", str(other))
    assert done.returncode == 2
    assert "the adapter was trained on sha256:" in done.stderr

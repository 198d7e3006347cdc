"""Serve a published bundle without this project: it has all the files that a server needs, and its replies are the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from jobs import BASE, SHORT, job, require_training_stack
from older_bundles import with_prompt_2

from lora_trainer.persona.prompt import prompt_messages
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType

pytestmark = pytest.mark.e2e
require_training_stack()

CONSUMER = REPOSITORY / "tools" / "consumer.py"


@dataclass(frozen=True)
class Bundle:
    """A published bundle."""

    folder: Path

    def text(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")

    def json(self, name: str) -> Any:
        return json.loads(self.text(name))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Publish a run that is long enough for the adapter's replies to differ from the base's."""
    folder = tmp_path_factory.mktemp("serving")
    done = job(
        "run", *SHORT, "--max-steps", "12", "--blood-type", "O",
        "--data", str(REPOSITORY / "data"), "--output", str(folder / "out"),
        work_dir=folder / "work",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return Bundle((folder / "out" / "adapter_O").resolve())


def test_a_process_without_this_project_gives_the_same_replies(published: Bundle, tmp_path: Path) -> None:
    # -I ignores PYTHONPATH and this folder
    done = subprocess.run(
        [sys.executable, "-I", str(CONSUMER), str(BASE), str(published.folder)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    served = json.loads(done.stdout)
    assert served["ours"] == []

    evaluated = [json.loads(line) for line in published.text("replies.jsonl").splitlines()]
    assert {reply["model"] for reply in evaluated} == {"adapter", "base"}
    compared = [{name: reply[name] for name in ("reply", "stopped", "tokens")} for reply in evaluated]
    assert [{name: reply[name] for name in compared[0]} for reply in served["replies"]] == compared
    # The server loaded the adapter, since its replies differ from the base's.
    by_model = {model: [reply["reply"] for reply in evaluated if reply["model"] == model] for model in ("adapter", "base")}
    assert by_model["adapter"] != by_model["base"]


def test_a_process_without_this_project_also_builds_prompts_of_version_2(published: Bundle, tmp_path: Path) -> None:
    folder = with_prompt_2(published.folder, tmp_path)
    asked = (folder / "replies.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (folder / "replies.jsonl").write_text(asked + "\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-I", str(CONSUMER), str(BASE), str(folder)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (answer,) = json.loads(done.stdout)["replies"]
    question = json.loads(asked)
    expected = prompt_messages(
        persona_spec(BloodType.O).instruction, question["summary"], question["feeling"], question["intensity"], question["input"], 2
    )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = tokenizer.decode(answer["prompt_ids"], skip_special_tokens=False)
    assert prompt.startswith(f"<|im_start|>system\n{expected[0]['content']}<|im_end|>\n")
    assert f" {question['intensity']:.1f}\n" in prompt
    assert expected[1]["content"] in prompt


def test_the_model_cards_request_is_held_to_the_schema(published: Bundle) -> None:
    found = re.search(r"<<'JSON'\n(.*?)\nJSON\n", published.text("README.md"), re.DOTALL)
    assert found
    request = json.loads(found[1])
    schema = published.json("response_schema.json")
    assert request["structured_outputs"]["json"] == schema
    assert schema["required"] == list(schema["properties"]) == published.json("prompt.json")["reply"]["keys"]
    system, user = request["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    first, *_, last = system["content"].split(published.json("prompt.json")["joined_with"])
    assert first in published.text("persona.yaml")
    assert last == published.json("prompt.json")["system"][-1]


# vLLM rejects other ranks: https://docs.vllm.ai/en/v0.14.0/api/vllm/config/lora/ (MaxLoRARanks)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def test_the_model_cards_server_can_load_the_adapter(published: Bundle) -> None:
    card, settings = published.text("README.md"), published.json("adapter_config.json")
    (command,) = re.findall(r"^vllm serve .*?(?<!\\)\n", card, re.MULTILINE | re.DOTALL)
    words = command.replace("\\\n", " ").split()

    def option(name: str) -> str:
        return str(words[words.index(name) + 1])

    assert words[:3] == ["vllm", "serve", settings["base_model_name_or_path"]]
    assert "--enable-lora" in words
    rank = int(option("--max-lora-rank"))
    assert settings["r"] <= rank
    assert rank in VLLM_RANKS
    name, _, path = option("--lora-modules").partition("=")
    assert path == "/path/to/this/folder"
    found = re.search(r"<<'JSON'\n(.*?)\nJSON\n", card, re.DOTALL)
    assert found
    assert json.loads(found[1])["model"] == name
    # vLLM accepts neither whole layers nor biases in an adapter
    assert not settings["modules_to_save"]
    assert settings["bias"] == "none"

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

pytestmark = pytest.mark.e2e
require_training_stack()

# The code that a user with nothing but the bundle would write.
SERVER = """
import json, re, sys
from pathlib import Path

import torch, yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base_folder, folder = map(Path, sys.argv[1:])
rules = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
instruction = yaml.safe_load((folder / "persona.yaml").read_text(encoding="utf-8"))["instruction"]
limit = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["evaluation"]["max_new_tokens"]


def plain(text):
    written, tag = rules["text_rules"].split("; put a space behind what matches ")
    assert written == "collapse white space to single spaces and trim; write '<|' as '< |' and '|>' as '| >'"
    return re.sub(tag.strip("'"), "< ", " ".join(text.split()).replace("<|", "< |").replace("|>", "| >"))


def filled(line, values):
    return re.sub(r"\\{(\\w+)(?::[^}]*)?\\}", lambda field: values[field[1]], line)


def messages(asked):
    assert rules["version"] == 2 and rules["intensity_format"] == "one decimal"
    values = {
        "instruction": plain(instruction),
        "summary": plain(asked["summary"]),
        "emotion_type": asked["feeling"],
        "intensity": f"{asked['intensity']:.1f}",
        "input": plain(asked["input"]),
    }
    optional = {line for line in rules["left_out_when_empty"] if not values[re.search(r"\\{(\\w+)", line)[1]]}
    system = rules["joined_with"].join(filled(line, values) for line in rules["system"] if line not in optional)
    return [{"role": "system", "content": system}, {"role": "user", "content": filled(rules["user"], values)}]


tokenizer = AutoTokenizer.from_pretrained(folder)
base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
model = PeftModel.from_pretrained(base, folder).eval()


def reply(asked):
    inputs = tokenizer.apply_chat_template(messages(asked), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        written = model.generate(**inputs, max_new_tokens=limit, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    stopped = written[-1] == tokenizer.eos_token_id
    kept = written[:-1] if written[-1] in (tokenizer.eos_token_id, tokenizer.pad_token_id) else written
    text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return {"reply": text, "stopped": stopped, "tokens": len(kept)}


found = []
for line in (folder / "replies.jsonl").read_text(encoding="utf-8").splitlines():
    asked = json.loads(line)
    if asked["model"] == "base":
        with model.disable_adapter():
            found.append(reply(asked))
    else:
        found.append(reply(asked))

ours = sorted(name for name in sys.modules if name.partition(".")[0] in ("lora_trainer", "entrypoint", "tools", "trl", "datasets"))
print(json.dumps({"replies": found, "ours": ours}))
"""


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
    script = tmp_path / "server.py"
    script.write_text(SERVER, encoding="utf-8")
    # -I ignores PYTHONPATH and this folder
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(BASE), str(published.folder)],
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
    assert served["replies"] == compared
    # The server loaded the adapter, since its replies differ from the base's.
    by_model = {model: [reply["reply"] for reply in evaluated if reply["model"] == model] for model in ("adapter", "base")}
    assert by_model["adapter"] != by_model["base"]


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

"""Test that no call in the project may run code from a model's folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LOADERS = {"from_pretrained", "from_config"}
# PEFT takes no such argument: it never loads code from an adapter's folder
WITHOUT_ARGUMENT = {"PeftModel"}


def loading_calls(source: str) -> list[tuple[str, ast.Call]]:
    """Return each call that loads a configuration, tokenizer or model, with the class that it is called on."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS:
            owner = node.func.value
            found.append((owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", ""), node))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "pipeline":
            found.append(("pipeline", node))
    return found


def unsafe_calls(source: str) -> list[int]:
    """Return the line of each loading call that does not pass `trust_remote_code=False` as a constant."""
    lines = []
    for owner, call in loading_calls(source):
        values = [keyword.value for keyword in call.keywords if keyword.arg == "trust_remote_code"]
        if owner not in WITHOUT_ARGUMENT and not (len(values) == 1 and ast.unparse(values[0]) == "False"):
            lines.append(call.lineno)
    return lines


def test_every_call_that_loads_a_model_refuses_its_code() -> None:
    modules = [*(REPOSITORY / "lora_trainer").rglob("*.py"), *(REPOSITORY / "entrypoint").rglob("*.py")]
    assert [f"{path}:{line}" for path in modules for line in unsafe_calls(path.read_text(encoding="utf-8"))] == []
    # an empty list of calls would prove nothing
    owners = {owner for path in modules for owner, _ in loading_calls(path.read_text(encoding="utf-8"))}
    assert {"AutoModelForCausalLM", "AutoTokenizer", "FastLanguageModel", "PeftModel"} <= owners


@pytest.mark.parametrize(
    "call",
    [
        "AutoModel.from_pretrained(x)",
        "transformers.AutoConfig.from_pretrained(x, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=asked)",
        "AutoModel.from_config(c, **{'trust_remote_code': False})",
        "pipeline('text-generation', model=x)",
    ],
)
def test_the_check_finds_an_unsafe_call(call: str) -> None:
    assert unsafe_calls(f"y = {call}") == [1]


def test_nothing_unpickles_or_imports_by_a_files_word() -> None:
    forbidden = ("torch.load(", "pickle.load", "joblib.load", "allow_pickle=True", "importlib.util.spec_from_file_location(")
    for path in (REPOSITORY / "lora_trainer").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert [name for name in forbidden if name in text] == [], path

"""Check the adapter's files of a bundle: the oldest consumers can read them, and they mean what PEFT and transformers saved.

The slow test of `tests/e2e/test_consumers.py` loads them with genuine old versions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from lora_trainer.config import LoraConfig

MISSING = "{} is not installed: pip install '.[cpu]'"
peft: Any = pytest.importorskip("peft", reason=MISSING.format("peft"))
transformers: Any = pytest.importorskip("transformers", reason=MISSING.format("transformers"))

TINY_BASE = REPOSITORY / "examples" / "tiny-base"
REVISION = "a09a35458c702b33eeacc393d103063234e8bc28"
TEXTS = ("너는 O형 친구야. 2026년 12345원!", "<|im_start|>user\n안녕 ㅋㅋ<|im_end|>", "naïve café — ½ 👩‍👩‍👧 \n\n  x", "don't")
PROMPT = [{"role": "system", "content": "너는 친구야."}, {"role": "user", "content": "어디야?"}]

Change = Callable[[dict[str, Any]], None]


def tiny_model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(TINY_BASE, local_files_only=True)


def tiny_tokenizer(folder: Path = TINY_BASE) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def save_adapter(model: Any, tokenizer: Any, folder: Path, canonical_id: str = "x/y", revision: str | None = None) -> None:
    # imports torch
    from lora_trainer.train.backends import adapter_files

    adapter_files.save_adapter(model, tokenizer, folder, canonical_id, revision)


@pytest.fixture(scope="module")
def adapter() -> Any:
    from lora_trainer.train.backends.base_loading import attach_adapter

    return attach_adapter(tiny_model(), LoraConfig(r=4, alpha=8), checkpointing=False, seed=1)


@pytest.fixture(scope="module")
def saved(adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    save_adapter(adapter, tiny_tokenizer(), folder, "Qwen/Qwen2.5-7B-Instruct", REVISION)
    return folder


def test_the_adapters_settings_are_those_that_peft_0_12_knows(saved: Path) -> None:
    assert read(saved / "adapter_config.json") == {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8.0,
        "lora_dropout": LoraConfig().dropout,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {},
        "revision": REVISION,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def test_this_peft_reads_the_settings_that_the_adapter_had(adapter: Any, saved: Path) -> None:
    own = {"base_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct", "revision": REVISION, "inference_mode": True}
    assert peft.LoraConfig.from_pretrained(saved).to_dict() == {**adapter.peft_config["default"].to_dict(), **own}


def test_the_weights_are_as_peft_saves_them(adapter: Any, saved: Path, tmp_path: Path) -> None:
    adapter.save_pretrained(tmp_path, save_embedding_layers=False)
    assert (saved / "adapter_model.safetensors").read_bytes() == (tmp_path / "adapter_model.safetensors").read_bytes()


def test_a_new_setting_that_is_in_use_is_kept(tmp_path: Path) -> None:
    """An old PEFT refuses such an adapter, which is better than loading another one."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], exclude_modules=["lm_head"], task_type="CAUSAL_LM")
    save_adapter(peft.get_peft_model(tiny_model(), config), tiny_tokenizer(), tmp_path)
    settings = read(tmp_path / "adapter_config.json")
    assert settings["exclude_modules"] == ["lm_head"]
    assert "peft_version" not in settings


def written_by_transformers_5(config: dict[str, Any]) -> None:
    config.update(tokenizer_class="TokenizersBackend", backend="tokenizers", is_local=True)
    config["extra_special_tokens"] = config.pop("additional_special_tokens")
    del config["added_tokens_decoder"]


def with_named_templates(config: dict[str, Any]) -> None:
    config["chat_template"] = [
        {"name": "default", "template": config["chat_template"]},
        {"name": "tool_use", "template": "{{ messages }}"},
    ]


def without_extra_tokens(config: dict[str, Any]) -> None:
    del config["additional_special_tokens"]


def with_code(config: dict[str, Any]) -> None:
    config["auto_map"] = {"AutoTokenizer": ["tokenization.Own", None]}


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
@pytest.mark.parametrize(
    "change", [lambda _: None, written_by_transformers_5, with_named_templates, without_extra_tokens, with_code]
)
def test_both_majors_of_transformers_can_read_the_tokenizer(adapter: Any, change: Change, model_type: str, tmp_path: Path) -> None:
    """The class name, the extra special tokens and the template have a form that transformers 4.51 reads, with the same result."""
    base, bundle = tmp_path / "base", tmp_path / "bundle"
    base.mkdir()
    shutil.copy(TINY_BASE / "tokenizer.json", base)
    # transformers 5 loads a Llama's tokenizer as TokenizersBackend, which transformers 4 does not know
    (base / "config.json").write_text(json.dumps({**read(TINY_BASE / "config.json"), "model_type": model_type}))
    config = read(TINY_BASE / "tokenizer_config.json")
    if model_type == "llama":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    change(config)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    expected = tiny_tokenizer(base)

    save_adapter(adapter, expected, bundle)

    written = read(bundle / "tokenizer_config.json")
    assert written["tokenizer_class"] == ("Qwen2Tokenizer" if model_type == "qwen2" else "PreTrainedTokenizerFast")
    assert "extra_special_tokens" not in written
    has_extra = change is not without_extra_tokens
    assert written.get("additional_special_tokens") == (["<|im_start|>", "<|im_end|>"] if has_extra else None)
    assert not set(written) & {"auto_map", "backend", "is_local", "local_files_only"}
    assert written["chat_template"] == (bundle / "chat_template.jinja").read_text(encoding="utf-8")

    found = tiny_tokenizer(bundle)
    assert sorted(found.all_special_tokens) == sorted(expected.all_special_tokens)
    assert [found(text)["input_ids"] for text in TEXTS] == [expected(text)["input_ids"] for text in TEXTS]
    for skip in (False, True):
        decoded = [found.decode(found(text)["input_ids"], skip_special_tokens=skip) for text in TEXTS]
        assert decoded == [expected.decode(expected(text)["input_ids"], skip_special_tokens=skip) for text in TEXTS]
    render = {"tokenize": False, "add_generation_prompt": True}
    assert found.apply_chat_template(PROMPT, **render) == expected.apply_chat_template(PROMPT, **render)
    assert (found.model_max_length, found.padding_side) == (expected.model_max_length, expected.padding_side)

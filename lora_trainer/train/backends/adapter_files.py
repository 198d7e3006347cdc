"""Write the adapter's files of a bundle, for new consumers and for the oldest ones that are still in use.

The oldest are transformers 4.51 and PEFT 0.12. `tools/consumers.py` loads a bundle with them; `docs/serving.md` has the results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase

ADAPTER_KEYS: Final = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights",
        "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
        "megatron_config", "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision", "target_modules",
        "task_type", "use_dora", "use_rslora",
    }
)  # fmt: skip
"""The fields of PEFT 0.12's `LoraConfig`. PEFT before 0.14 raises TypeError for any other key in `adapter_config.json`."""
_LOADING_KEYS: Final = ("auto_map", "backend", "is_local", "local_files_only")
"""What transformers saves about how it loaded the tokenizer, and a pointer to code, which a bundle does not contain."""


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, canonical_id: str, revision: str | None
) -> None:
    """Write adapter and tokenizer to `folder`. The files name the base by its public id and revision, not by a local path."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    # `write_documents` writes the bundle's own model card
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    settings = _without_new_defaults(_read(path))
    settings["base_model_name_or_path"] = canonical_id
    settings["revision"] = revision
    settings["inference_mode"] = True
    # Unsloth adds classes to import, which nothing here needs
    settings["auto_mapping"] = None
    # PEFT writes a set, whose order differs between processes
    settings["target_modules"] = sorted(settings["target_modules"])
    _write(path, settings)
    _save_tokenizer(tokenizer, folder)


def _without_new_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Return `settings` without the keys that PEFT 0.12 does not know, if they have their default: every PEFT fills it in."""
    defaults = LoraConfig().to_dict()
    return {name: value for name, value in settings.items() if name in ADAPTER_KEYS or value != defaults.get(name)}


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the tokenizer with a `tokenizer_config.json` that transformers 4 and 5 both read, with the same behavior."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = {name: value for name, value in _read(path).items() if name not in _LOADING_KEYS}
    # transformers 4 expects a dict under the new name, and a list under the old one, which transformers 5 reads as well
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    # transformers 5 has renamed this class and still knows its old name
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # servers that do not read chat_template.jinja look for the template here
    config["chat_template"] = tokenizer.get_chat_template()
    _write(path, config)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

"""The adapter's files in the bundle."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, canonical_id: str, revision: str | None
) -> None:
    """Write adapter and tokenizer to `folder`, naming the base by its public id and revision instead of a local path."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    # the bundle gets its own model card later, with the run's numbers
    (folder / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = canonical_id
    settings["revision"] = revision
    settings["inference_mode"] = True
    # PEFT writes a set, whose order changes from process to process
    settings["target_modules"] = sorted(settings["target_modules"])
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

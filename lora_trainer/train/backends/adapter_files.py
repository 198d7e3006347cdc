"""Write the adapter's files of a bundle."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, canonical_id: str, revision: str | None
) -> None:
    """Write adapter and tokenizer to `folder`. The files name the base by its public id and revision, not by a local path."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    # `write_documents` writes the bundle's own model card
    (folder / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = canonical_id
    settings["revision"] = revision
    settings["inference_mode"] = True
    # PEFT writes a set, whose order differs between processes
    settings["target_modules"] = sorted(settings["target_modules"])
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

"""`run_id`: a hash of all that decides the weights, so that the same work is never done twice and different work never mixes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from typing import Final

from lora_trainer.config import RunConfig
from lora_trainer.persona.prompt import PROMPT_VERSION

RECIPE_VERSION: Final = 1
"""Raised when our own code changes what training does."""

# whose code decides the numbers; the rest (boto3, click, ...) does not
_COMMON: Final = ("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "safetensors")
_UNSLOTH: Final = ("unsloth", "unsloth_zoo", "triton")


def library_versions(config: RunConfig) -> dict[str, str]:
    """Installed versions of the libraries that decide the weights; `absent` for one that is not there."""
    names = list(_COMMON)
    if config.training.quantization == "nf4":
        names.append("bitsandbytes")
    if config.resolved_backend == "unsloth":
        names.extend(_UNSLOTH)
    return {name: _version(name) for name in sorted(names)}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def run_ingredients(config: RunConfig, data_sha256: str, base_identity: str) -> dict[str, object]:
    """What `run_id` is the hash of; the manifest carries it, so that two ids can be told apart.

    Paths, logging and memory layout are left out: they do not decide the weights.
    """
    return {
        "recipe_version": RECIPE_VERSION,
        "prompt_version": PROMPT_VERSION,
        "blood_type": str(config.blood_type),
        "data_sha256": data_sha256,
        "base": base_identity,
        "backend": config.resolved_backend,
        "device": config.device,
        "lora": config.lora.model_dump(mode="json"),
        "training": config.training.model_dump(mode="json"),
        "libraries": library_versions(config),
    }


def run_id(ingredients: Mapping[str, object]) -> str:
    """16 hex digits of the SHA-256 of the ingredients as canonical JSON."""
    canonical = json.dumps(ingredients, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]

"""Identify a run by a hash of everything that determines its weights: equal runs are never repeated, and runs never mix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Final

import structlog

from lora_trainer.base_model import Base
from lora_trainer.config import RunConfig
from lora_trainer.data.records import EvaluationPrompt
from lora_trainer.evaluate.gates import gate_id
from lora_trainer.evaluate.questions import evaluation_id, prompts_digest
from lora_trainer.persona.prompt import PROMPT_VERSION
from lora_trainer.run.inputs import DataFile
from lora_trainer.run.job import Job

RECIPE_VERSION: Final = 4
"""Increase this when a code change alters the result of training."""

# only libraries whose code affects the weights
_COMMON: Final = ("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "safetensors")
_UNSLOTH: Final = ("unsloth", "unsloth_zoo", "triton")


@dataclass(frozen=True, slots=True)
class Identity:
    """Ids of a run, and the ingredients of its `run_id`."""

    run_id: str
    base: Base
    ingredients: dict[str, object]
    evaluation_id: str
    """Hash of the questions and the way replies are measured."""
    gate_id: str
    """Hash of `evaluation_id` and the thresholds."""


def identify(job: Job, data: DataFile, prompts: Sequence[EvaluationPrompt]) -> Identity:
    """Return the run's ids, and bind `run_id` to its log lines."""
    prompt_version = job.process.prompt_version
    asked = evaluation_id(job.config.evaluation, prompts_digest(prompts), prompt_version)
    with job.timed("identify"):
        base = job.process.base(job.config)
        ingredients = run_ingredients(job.config, data.fetched.sha256, base.identity, prompt_version)
        identity = Identity(run_id(ingredients), base, ingredients, asked, gate_id(asked, job.config.gates))
    structlog.contextvars.bind_contextvars(run_id=identity.run_id)
    job.log.info(
        "run_identified",
        base=base.canonical_id,
        base_identity=base.identity,
        backend=job.config.resolved_backend,
        gate_id=identity.gate_id,
    )
    return identity


def run_ingredients(
    config: RunConfig, data_sha256: str, base_identity: str, prompt_version: int = PROMPT_VERSION
) -> dict[str, object]:
    """Return the input of `run_id`'s hash. The manifest contains it, to explain why two ids differ.

    Paths, logging and memory layout are excluded, because they do not affect the weights.
    """
    return {
        "recipe_version": RECIPE_VERSION,
        "prompt_version": prompt_version,
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
    """Return 16 hex digits of the SHA-256 of the ingredients as canonical JSON."""
    canonical = json.dumps(ingredients, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def library_versions(config: RunConfig) -> dict[str, str]:
    """Return the installed version of each library that affects the weights, or `absent`."""
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

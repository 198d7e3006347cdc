"""Write the files of a bundle that describe the adapter, and read them back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_trainer.base_model import Base
from lora_trainer.config import RunConfig
from lora_trainer.errors import ConfigError, StorageError
from lora_trainer.evaluate.metrics import (
    EvaluationMetrics,
    HeldOutMetrics,
    RunMetrics,
    TrainingMetrics,
    Verdict,
    metrics_schema,
)
from lora_trainer.evaluate.rules import ScoredReply
from lora_trainer.persona.prompt import prompt_template
from lora_trainer.persona.reply_schema import response_schema
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.report.model_card import model_card
from lora_trainer.store.interface import Storage
from lora_trainer.store.keys import safe_key
from lora_trainer.store.local import sha256_of
from lora_trainer.store.manifest import (
    MANIFEST_NAME,
    MANIFEST_SCHEMA,
    DamagedError,
    download_files,
    read_local_manifest,
    read_manifest,
    write_json,
)
from lora_trainer.store.prefixes import evaluation_prefix
from lora_trainer.train.step_log import StepLog


def write_documents(folder: Path, config: RunConfig, base: Base, metrics: RunMetrics) -> None:
    """Write prompt, schema, persona and model card beside the adapter that the backend saved in `folder`."""
    write_json(folder / "prompt.json", prompt_template())
    write_json(folder / "response_schema.json", response_schema())
    spec = persona_spec(config.blood_type)
    (folder / "persona.yaml").write_text(
        yaml.safe_dump(spec.model_dump(mode="json"), allow_unicode=True, sort_keys=False, width=1000), encoding="utf-8"
    )
    (folder / "README.md").write_text(model_card(config, base, metrics), encoding="utf-8")


def write_evaluation(
    folder: Path, metrics: RunMetrics, steps: Sequence[StepLog], replies: Sequence[ScoredReply], facts: Mapping[str, Any]
) -> None:
    """Write metrics, replies, step log and report page. `facts` are the manifest's fields except the list of files."""
    from lora_trainer.report.run_page import run_page

    write_json(folder / "metrics.json", metrics.as_json())
    write_json(folder / "metrics.schema.json", metrics_schema())
    with (folder / "replies.jsonl").open("w", encoding="utf-8") as file:
        for reply in replies:
            file.write(reply.model_dump_json() + "\n")
    with (folder / "train_log.jsonl").open("w", encoding="utf-8") as file:
        for step in steps:
            file.write(json.dumps({name: getattr(step, name) for name in step.__slots__}) + "\n")
    (folder / "report.html").write_text(run_page(metrics, facts, steps, replies), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Published:
    """A published bundle, downloaded for a new verdict."""

    folder: Path
    training: TrainingMetrics
    held_out: HeldOutMetrics
    peak_memory_gib: float
    steps: tuple[StepLog, ...]
    evaluation: EvaluationMetrics | None
    """None if the bundle's version of this program had other metrics."""
    replies: list[ScoredReply]


def read_published(storage: Storage, prefix: str, manifest: Mapping[str, Any], folder: Path) -> Published:
    """Download and verify the bundle under `prefix`, and parse its measurements. Raise `StorageError` if that fails."""
    download_files(storage, prefix, manifest, folder)
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        steps = tuple(
            StepLog(**json.loads(line)) for line in (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines() if line
        )
        training = TrainingMetrics.model_validate(metrics["training"])
        held_out = HeldOutMetrics.model_validate(metrics["held_out"])
        peak_memory_gib = float(metrics["peak_memory_gib"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise StorageError(
            f"{storage.uri}{prefix}: this version can't read metrics.json or train_log.jsonl; another version wrote them: "
            "move that prefix away and run again"
        ) from None
    return Published(folder, training, held_out, peak_memory_gib, steps, *_evaluation_of(metrics, folder))


def _evaluation_of(metrics: Mapping[str, Any], folder: Path) -> tuple[EvaluationMetrics | None, list[ScoredReply]]:
    try:
        evaluation = RunMetrics.model_validate(metrics).evaluation
        lines = (folder / "replies.jsonl").read_text(encoding="utf-8").split("\n")
        return evaluation, [ScoredReply.model_validate_json(line) for line in lines if line]
    except (OSError, ValueError):
        return None, []


def read_verdict(storage: Storage, prefix: str, manifest: Mapping[str, Any], gate_id: str) -> tuple[Verdict, str] | None:
    """Return the bundle's verdict under `gate_id` and the folder of its report, or None if there is no such verdict yet."""
    if manifest.get("gate_id") == gate_id:
        return _verdict_of(manifest, f"{storage.uri}{prefix}"), prefix
    folder = evaluation_prefix(prefix, gate_id)
    later = read_manifest(storage, folder)
    return (_verdict_of(later, f"{storage.uri}{folder}"), folder) if later else None


def _verdict_of(manifest: Mapping[str, Any], where: str) -> Verdict:
    try:
        return Verdict.model_validate(manifest["verdict"])
    except (KeyError, ValueError):
        raise StorageError(
            f"{where}{MANIFEST_NAME}: holds no valid verdict; the file was changed: move that prefix away and run again"
        ) from None


def open_local(folder: Path) -> dict[str, Any]:
    """Return the manifest of the finished bundle in `folder`.

    Raise `ConfigError` if there is no manifest, `DamagedError` if a file differs from it.
    """
    try:
        manifest = read_local_manifest(folder)
        has_all = "adapter_model.safetensors" in manifest["files"] and "verdict" in manifest
        # validate both: they become part of keys in the output
        names_fit = re.fullmatch("[0-9a-f]{16}", manifest["run_id"]) and manifest["blood_type"] in tuple(BloodType)
        if manifest["schema"] != MANIFEST_SCHEMA or not has_all or not names_fit:
            raise ValueError("another manifest")
        hashes = {safe_key(name): file["sha256"] for name, file in manifest["files"].items()}
        Verdict.model_validate(manifest["verdict"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(
            f"{folder}: got no finished bundle of this version, expected a folder with the manifest.json that a run writes last: "
            "<work_dir>/runs/<TYPE>/<run id>/bundle"
        ) from None
    for name, sha256 in hashes.items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != sha256:
            raise DamagedError(f"{path}: differs from the bundle's manifest; run the same 'lora-trainer run' again instead")
    return manifest

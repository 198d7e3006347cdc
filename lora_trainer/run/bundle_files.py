"""Write the files of a bundle that describe the adapter, and read them back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ConfigDict

from lora_trainer.base_model import Base
from lora_trainer.config import RunConfig
from lora_trainer.errors import ConfigError
from lora_trainer.evaluate.depth_rules import DepthReply
from lora_trainer.evaluate.metrics import (
    EvaluationMetrics,
    HeldOutMetrics,
    RunMetrics,
    TrainingMetrics,
    Verdict,
    metrics_schema,
)
from lora_trainer.evaluate.rules import ScoredReply
from lora_trainer.evaluate.scope import Scope, scope
from lora_trainer.persona.prompt import PROMPT_VERSION, PROMPT_VERSIONS, prompt_template
from lora_trainer.persona.reply_schema import response_schema
from lora_trainer.persona.specs import persona_spec
from lora_trainer.report.model_card import model_card
from lora_trainer.store.documents import parse_object, shown, validated
from lora_trainer.store.interface import Storage
from lora_trainer.store.manifest import (
    MANIFEST_NAME,
    download_files,
    read_manifest,
    verify_files,
    write_json,
)
from lora_trainer.store.prefixes import evaluation_prefix
from lora_trainer.train.adapter_format import SETTINGS_NAME, WEIGHTS_NAME, check_adapter_folder
from lora_trainer.train.step_log import StepLog

DEPTH_REPLIES_NAME: Final = "depth_replies.jsonl"


def write_documents(folder: Path, config: RunConfig, base: Base, metrics: RunMetrics, prompt_version: int = PROMPT_VERSION) -> None:
    """Write prompt, schema, persona and model card beside the adapter that the backend saved in `folder`."""
    spec = persona_spec(config.blood_type)
    write_json(folder / "prompt.json", prompt_template(spec.instruction, prompt_version))
    write_json(folder / "response_schema.json", response_schema())
    (folder / "persona.yaml").write_text(
        yaml.safe_dump(spec.model_dump(mode="json"), allow_unicode=True, sort_keys=False, width=1000), encoding="utf-8"
    )
    (folder / "README.md").write_text(model_card(config, base, metrics), encoding="utf-8")


def write_evaluation(
    folder: Path,
    metrics: RunMetrics,
    steps: Sequence[StepLog],
    replies: Sequence[ScoredReply],
    facts: Mapping[str, Any],
    depth_replies: Sequence[DepthReply] = (),
) -> None:
    """Write metrics, replies, step log and report page. `facts` are the manifest's fields except the list of files."""
    from lora_trainer.report.run_page import run_page

    write_json(folder / "metrics.json", metrics.as_json())
    write_json(folder / "metrics.schema.json", metrics_schema())
    with (folder / "replies.jsonl").open("w", encoding="utf-8") as file:
        for reply in replies:
            file.write(reply.model_dump_json() + "\n")
    if depth_replies:
        with (folder / DEPTH_REPLIES_NAME).open("w", encoding="utf-8") as file:
            for asked in depth_replies:
                file.write(asked.model_dump_json() + "\n")
    with (folder / "train_log.jsonl").open("w", encoding="utf-8") as file:
        for step in steps:
            file.write(json.dumps({name: getattr(step, name) for name in step.__slots__}) + "\n")
    (folder / "report.html").write_text(run_page(metrics, facts, steps, replies, depth_replies), encoding="utf-8")


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
    prompt_version: int
    """Version of the prompt that the adapter was trained on."""
    depth_replies: list[DepthReply]


def read_published(storage: Storage, prefix: str, manifest: Mapping[str, Any], folder: Path) -> Published:
    """Download and verify the bundle under `prefix`, and parse its measurements.

    Raise `ConfigError` if it is broken, `StorageError` if it cannot be read.
    """
    download_files(storage, prefix, manifest, folder)
    try:
        metrics = parse_object((folder / "metrics.json").read_bytes(), f"{storage.uri}{prefix}metrics.json")
        measured = validated(_Measured, metrics, f"{storage.uri}{prefix}metrics.json")
        steps = tuple(
            validated(StepLog, line, f"{storage.uri}{prefix}train_log.jsonl:{number}")
            for number, line in read_lines(folder / "train_log.jsonl", f"{storage.uri}{prefix}train_log.jsonl")
        )
    except FileNotFoundError as error:
        raise ConfigError(f"{storage.uri}{prefix}: got no {Path(error.filename).name}; the bundle is not whole") from None
    except ConfigError as error:
        raise ConfigError(
            [
                *error.problems,
                (
                    f"{storage.uri}{prefix}: this version can't read metrics.json or train_log.jsonl; another version wrote them: "
                    "move that prefix away and run again"
                ),
            ]
        ) from None
    evaluation, replies, depth_replies = _evaluation_of(metrics, folder)
    version = read_prompt_version(folder, storage.uri + prefix)
    return Published(
        folder,
        measured.training,
        measured.held_out,
        measured.peak_memory_gib,
        steps,
        evaluation,
        replies,
        version,
        depth_replies,
    )


def read_training(storage: Storage, prefix: str) -> tuple[TrainingMetrics, HeldOutMetrics]:
    """Return what the bundle under `prefix` measured in training. Raise `ConfigError` if this version can't read it."""
    where = f"{storage.uri}{prefix}metrics.json"
    found = storage.read_bytes(f"{prefix}metrics.json")
    if found is None:
        raise ConfigError(f"{where}: missing, although manifest.json exists: move that prefix away and run again")
    measured = validated(_Measured, parse_object(found.data, where), where)
    return measured.training, measured.held_out


class _PromptDocument(BaseModel):
    """Types of the fields of `prompt.json`, in every prompt version."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int
    system: list[str]
    placeholders: list[str]
    user: str


def read_prompt_version(folder: Path, where: str) -> int:
    """Return the version in the `prompt.json` of `folder`: the prompt that the adapter was trained on.

    `where` is the bundle's place in messages, up to its last slash. Raise `ConfigError` if the file is missing or broken, and for a
    version that this package cannot build.
    """
    name = f"{where}prompt.json"
    try:
        document = parse_object((folder / "prompt.json").read_bytes(), name)
    except FileNotFoundError:
        raise ConfigError(f"{name}: not found, and every bundle has it; take the bundle that the run published") from None
    version = validated(_PromptDocument, document, name).version
    if version not in PROMPT_VERSIONS:
        known = " or ".join(map(str, PROMPT_VERSIONS))
        raise ConfigError(
            f"{name}: version: got {shown(version)}, expected {known}: this lora-trainer can't build that prompt; use the version "
            "that trained the adapter"
        )
    return version


class _Measured(BaseModel):
    """The part of `metrics.json` that a new verdict copies. The rest may be another version's."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    training: TrainingMetrics
    held_out: HeldOutMetrics
    peak_memory_gib: float


def _evaluation_of(
    metrics: Mapping[str, Any], folder: Path
) -> tuple[EvaluationMetrics | None, list[ScoredReply], list[DepthReply]]:
    try:
        evaluation = validated(RunMetrics, metrics, "metrics.json").evaluation
        depth_replies = read_depth_replies(folder, DEPTH_REPLIES_NAME) if evaluation.depth else []
        return evaluation, read_replies(folder, "replies.jsonl"), depth_replies
    except (OSError, ConfigError):
        # another version's: measure again
        return None, [], []


def read_lines(path: Path, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and content of each line of a JSONL file. Raise `ConfigError` for a line that is no object."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line:
            yield number, parse_object(line, f"{where}:{number}")


def read_replies(folder: Path, where: str) -> list[ScoredReply]:
    """Return the replies of a bundle. Raise `ConfigError` for a line of another form, and `OSError`."""
    # replies may repeat training text, so messages don't quote them
    return [
        validated(ScoredReply, line, f"{where}:{number}", quote=False)
        for number, line in read_lines(folder / "replies.jsonl", where)
    ]


def read_depth_replies(folder: Path, where: str) -> list[DepthReply]:
    """Return the replies of a deep evaluation. Raise `ConfigError` for a line of another form, and `OSError`."""
    return [
        validated(DepthReply, line, f"{where}:{number}", quote=False)
        for number, line in read_lines(folder / DEPTH_REPLIES_NAME, where)
    ]


def read_verdict(storage: Storage, prefix: str, manifest: Mapping[str, Any], gate_id: str) -> tuple[Verdict, str] | None:
    """Return the bundle's verdict under `gate_id` and the folder of its report, or None if there is no such verdict yet."""
    if manifest.get("gate_id") == gate_id:
        return _verdict_of(manifest, f"{storage.uri}{prefix}"), prefix
    folder = evaluation_prefix(prefix, gate_id)
    later = read_manifest(storage, folder)
    return (_verdict_of(later, f"{storage.uri}{folder}"), folder) if later else None


def _verdict_of(manifest: Mapping[str, Any], where: str) -> Verdict:
    try:
        return validated(Verdict, manifest.get("verdict"), f"{where}{MANIFEST_NAME}: verdict")
    except ConfigError as error:
        raise ConfigError(
            [
                f"{where}{MANIFEST_NAME}: holds no valid verdict; the file was changed: move that prefix away and run again",
                *error.problems,
            ]
        ) from None


def recorded_scope(manifest: Mapping[str, Any]) -> Scope:
    """Return what the verdict in `manifest` judged and what not."""
    try:
        return scope(_verdict_of(manifest, ""))
    except ConfigError:
        return Scope("This version cannot read what was judged.", "", "not_judged")


def check_promotable(storage: Storage, manifest: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless the bundle is whole and PEFT can load its adapter, `StorageError` if it cannot be read."""
    if problems := verify_files(storage, ""):
        raise ConfigError([*problems, f"{storage.uri}: not promoted: the bundle differs from its manifest"])
    with tempfile.TemporaryDirectory() as scratch:
        for name in (SETTINGS_NAME, WEIGHTS_NAME):
            if name not in manifest["files"]:
                raise ConfigError(f"{storage.uri}: not promoted: got no {name}, expected a bundle")
            storage.download(name, Path(scratch) / name)
        check_adapter_folder(Path(scratch), storage.uri)

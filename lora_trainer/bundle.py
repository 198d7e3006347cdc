"""The bundle: everything a server needs of a finished run in one folder, and how it is published and read back.

The manifest is written last, so a prefix without one does not exist. `latest.json` moves by
compare-and-swap and never backwards in time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import yaml

from lora_trainer.bases import Base
from lora_trainer.config import RunConfig
from lora_trainer.errors import ConfigError, InvariantError, StorageError
from lora_trainer.evaluation import JudgedReply
from lora_trainer.formatter import prompt_messages, prompt_template
from lora_trainer.lease import Lease
from lora_trainer.metrics import (
    Estimate,
    EvaluationMetrics,
    HeldOutMetrics,
    RepliesMetrics,
    RunMetrics,
    TrainingMetrics,
    Verdict,
    metrics_schema,
)
from lora_trainer.personas import BloodType, Expression, persona_spec
from lora_trainer.storage import NotFound, PreconditionFailed, ReadResult, Storage, safe_key, sha256_of
from lora_trainer.training import StepLog

MANIFEST_NAME: Final = "manifest.json"
MANIFEST_SCHEMA: Final = 1
REPLY_TOKENS: Final = 256
"""Room for a reply of `MAX_REPLY_CHARACTERS` Korean characters with Qwen2.5's tokenizer, and its JSON."""
MAX_REPLY_CHARACTERS: Final = 200
"""Twice the longest reply of the bundled data: a bound that constrained decoding can hold to."""
_SWAP_ATTEMPTS: Final = 8


def bundle_prefix(blood_type: BloodType, run_id: str) -> str:
    """Where a run's bundle lies under the output."""
    return f"adapters/{blood_type}/{run_id}/"


def latest_key(blood_type: BloodType) -> str:
    """The pointer to the newest accepted bundle."""
    return f"adapters/{blood_type}/latest.json"


def response_schema() -> dict[str, object]:
    """JSON Schema of a reply, for constrained decoding behind the adapter."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "text": {"type": "string", "minLength": 1, "maxLength": MAX_REPLY_CHARACTERS},
            "emotion": {"type": "string", "enum": [str(expression) for expression in Expression]},
        },
        "required": ["text", "emotion"],
        "additionalProperties": False,
    }


def evaluation_prefix(prefix: str, gate_id: str) -> str:
    """Where a later evaluation of the bundle under `prefix` lies."""
    return f"{prefix}evaluations/{gate_id}/"


def write_documents(folder: Path, config: RunConfig, base: Base, metrics: RunMetrics) -> None:
    """Put the bundle's own files beside the adapter and tokenizer that the backend saved in `folder`."""
    _write_json(folder / "prompt.json", prompt_template())
    _write_json(folder / "response_schema.json", response_schema())
    spec = persona_spec(config.blood_type)
    (folder / "persona.yaml").write_text(
        yaml.safe_dump(spec.model_dump(mode="json"), allow_unicode=True, sort_keys=False, width=1000), encoding="utf-8"
    )
    (folder / "README.md").write_text(model_card(config, base, metrics), encoding="utf-8")


def write_evaluation(
    folder: Path, metrics: RunMetrics, steps: Sequence[StepLog], replies: Sequence[JudgedReply], facts: Mapping[str, Any]
) -> None:
    """What was measured, in numbers and to look at. `facts` is what the manifest holds besides its files."""
    from lora_trainer.report import render_report

    _write_json(folder / "metrics.json", metrics.as_json())
    _write_json(folder / "metrics.schema.json", metrics_schema())
    with (folder / "replies.jsonl").open("w", encoding="utf-8") as file:
        for reply in replies:
            file.write(reply.model_dump_json() + "\n")
    with (folder / "train_log.jsonl").open("w", encoding="utf-8") as file:
        for step in steps:
            file.write(json.dumps({name: getattr(step, name) for name in step.__slots__}) + "\n")
    (folder / "report.html").write_text(render_report(metrics, facts, steps, replies), encoding="utf-8")


class DamagedError(StorageError):
    """Files under a prefix that are not what its manifest says, or a manifest that is none."""


@dataclass(frozen=True, slots=True)
class Published:
    """A bundle brought back to be judged again."""

    folder: Path
    training: TrainingMetrics
    held_out: HeldOutMetrics
    peak_memory_gib: float
    steps: tuple[StepLog, ...]
    evaluation: EvaluationMetrics | None
    """None: published by a version that did not evaluate, or measured in another way."""
    replies: list[JudgedReply]


def download(storage: Storage, prefix: str, manifest: Mapping[str, Any], folder: Path) -> None:
    """The files of the bundle under `prefix` in `folder`, each as the manifest says. Raises `DamagedError`, `StorageError`."""
    for name, expected in manifest["files"].items():
        try:
            got = storage.download(prefix + safe_key(name), folder / name)
        except (NotFound, ValueError) as error:
            raise DamagedError(
                f"{storage.uri}{prefix}{name}: the manifest names it and it cannot be had ({error}); the bundle is damaged: "
                "move that prefix away and run again"
            ) from None
        if (got.size_bytes, got.sha256) != (expected["size_bytes"], expected["sha256"]):
            raise DamagedError(
                f"{storage.uri}{prefix}{name}: got {got.size_bytes} bytes, SHA-256 {got.sha256}, expected {expected['size_bytes']} "
                f"bytes, {expected['sha256']}; the bundle was changed: move that prefix away and run again"
            )


def fetch(storage: Storage, prefix: str, manifest: Mapping[str, Any], folder: Path) -> Published:
    """As `download`, and what was measured, read. Raises `StorageError`."""
    download(storage, prefix, manifest, folder)
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
            f"{storage.uri}{prefix}: metrics.json or train_log.jsonl is not what this version reads; it was written by another "
            "one: move that prefix away and run again"
        ) from None
    return Published(folder, training, held_out, peak_memory_gib, steps, *_evaluation_of(metrics, folder))


def _evaluation_of(metrics: Mapping[str, Any], folder: Path) -> tuple[EvaluationMetrics | None, list[JudgedReply]]:
    try:
        evaluation = RunMetrics.model_validate(metrics).evaluation
        lines = (folder / "replies.jsonl").read_text(encoding="utf-8").split("\n")
        return evaluation, [JudgedReply.model_validate_json(line) for line in lines if line]
    except (OSError, ValueError):
        return None, []


def read_verdict(storage: Storage, prefix: str, manifest: Mapping[str, Any], gate_id: str) -> tuple[Verdict, str] | None:
    """The verdict by `gate_id` on the bundle under `prefix`, and the folder that holds its report; None: not judged by it yet."""
    if manifest.get("gate_id") == gate_id:
        return _verdict(manifest, f"{storage.uri}{prefix}"), prefix
    folder = evaluation_prefix(prefix, gate_id)
    later = read_manifest(storage, folder)
    return (_verdict(later, f"{storage.uri}{folder}"), folder) if later else None


def _verdict(manifest: Mapping[str, Any], where: str) -> Verdict:
    try:
        return Verdict.model_validate(manifest["verdict"])
    except (KeyError, ValueError):
        raise StorageError(
            f"{where}{MANIFEST_NAME}: its verdict is not one; it was changed: move that prefix away and run again"
        ) from None


def model_card(config: RunConfig, base: Base, metrics: RunMetrics) -> str:
    """README.md of a bundle: what it is, what was measured, how it is served."""
    spec = persona_spec(config.blood_type)
    name = f"persona-{config.blood_type}"
    revision = f" --revision {base.revision}" if base.revision else ""
    training, held_out = metrics.training, metrics.held_out
    adapter = metrics.evaluation.greedy.adapter
    verdict = "passed" if metrics.verdict.passed else "not passed"
    return f"""---
base_model: {base.canonical_id}
library_name: peft
language: ko
tags: [lora, persona]
---
# Persona {config.blood_type} ({spec.name})

A LoRA adapter on `{base.canonical_id}`{f" at `{base.revision}`" if base.revision else ""} that answers as the friend of blood type
{config.blood_type}: {spec.tone}

Run `{metrics.run_id}`: {training.records:,} records, {training.steps:,} optimizer steps, rank {config.lora.r}.
Held-out loss {held_out.loss_base:.3f} (base) to {held_out.loss_adapter:.3f} (adapter), nats a reply token,
on {held_out.records:,} records. To look at: `report.html`. All numbers: `metrics.json` (`metrics.schema.json`). Data,
configuration and versions: `manifest.json`.

## Is it that friend?

When it was published, its gates were **{verdict}**: {metrics.evaluation.replies} greedy,
unconstrained replies to {metrics.evaluation.prompts} held-out prompts.

| | replies | measured | lower 95 % bound |
|---|---|---|---|
{_card_rows(adapter)}

Emoji follow intensity with a rank correlation of {adapter.emoji_intensity.value:.2f}; by the rules it beats the base in
{metrics.evaluation.greedy.win_rate.value:.0%} of the replies.

## Prompt and reply

`prompt.json` is the system message's template, with the instruction `{spec.instruction}`. A reply is one JSON
object, `{{"text": ..., "emotion": ...}}`; `response_schema.json` is its schema.

## Serve it with vLLM

```bash
vllm serve {base.canonical_id}{revision} --enable-lora --max-lora-rank {vllm_lora_rank(config.lora.r)} \\
  --lora-modules {name}=/path/to/this/folder
```

Ask for the model `{name}`: by the base's name the server answers without the adapter. With the schema in
`response_schema.json` the server can't answer with anything but the contract's JSON (start it with
`--structured-outputs-config.backend guidance`: xgrammar, its default, can't write a quotation mark within a bounded
text, and lets raw control characters into it):

```bash
curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d @- <<'JSON'
{json.dumps(vllm_request(name, config.blood_type), ensure_ascii=False, indent=2)}
JSON
```

## Load it with PEFT

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("/path/to/this/folder")
base = AutoModelForCausalLM.from_pretrained("{base.canonical_id}"{f', revision="{base.revision}"' if base.revision else ""})
model = PeftModel.from_pretrained(base, "/path/to/this/folder")
```
"""


_CARD_RATES: Final = {
    "exact_json": "exact JSON",
    "stop": "ended by itself",
    "one_or_two_sentences": "at most two sentences",
    "informal_speech": "반말",
    "persona": "taken for this persona",
    "question": "asks back",
}


def _card_rows(adapter: RepliesMetrics) -> str:
    rows = []
    for name, label in _CARD_RATES.items():
        rate: Estimate = getattr(adapter, name)
        rows.append(f"| {label} | {rate.successes} of {rate.of} | {rate.value:.1%} | {rate.lower or 0:.1%} |")
    return "\n".join(rows)


# what vLLM takes for --max-lora-rank, since 0.14 (its MaxLoRARanks)
_VLLM_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_lora_rank(r: int) -> int:
    """The smallest `--max-lora-rank` that vLLM takes and an adapter of rank `r` fits."""
    return next(rank for rank in _VLLM_RANKS if rank >= r)


def vllm_request(model: str, blood_type: BloodType) -> dict[str, object]:
    """A chat request to vLLM whose answer is held to the contract (`structured_outputs`, vLLM 0.12 and later)."""
    prompt = prompt_messages(
        persona_spec(blood_type).instruction, "우리는 카페에서 만나기로 했어.", "happy", 0.8, "나 지금 도착했는데 어디야?"
    )
    return {
        "model": model,
        "messages": prompt,
        "max_tokens": REPLY_TOKENS,
        "structured_outputs": {"json": response_schema(), "disable_any_whitespace": True},
    }


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Hash all files of `folder` and write `manifest.json` with `facts` beside them; gives the manifest."""
    files = {
        path.relative_to(folder).as_posix(): {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST_NAME
    }
    manifest = {"schema": MANIFEST_SCHEMA, **facts, "files": files}
    _write_json(folder / MANIFEST_NAME, manifest)
    return manifest


def publish(folder: Path, storage: Storage, prefix: str, lease: Lease | None = None) -> None:
    """Upload a bundle under `prefix`, its manifest last. Safe to repeat; a manifest that is there is never replaced.

    `lease`: of this run, looked at before each write. Raises `LeaseLostError`, `StorageError`.
    """
    data = (folder / MANIFEST_NAME).read_bytes()
    if lease:
        storage = storage.adapted(guard=lease.check)
        lease.confirm()
    storage.upload_all(folder, prefix, {name: file["sha256"] for name, file in json.loads(data)["files"].items()})
    if lease:
        lease.confirm()
    try:
        storage.write_bytes(prefix + MANIFEST_NAME, data, if_absent=True)
    except PreconditionFailed:
        theirs = storage.read_bytes(prefix + MANIFEST_NAME)
        if theirs is None or theirs.data != data:
            raise StorageError(
                f"{storage.uri}{prefix}{MANIFEST_NAME}: another attempt at this run has published a bundle in the meantime; run "
                "the same command again: it looks at what is there"
            ) from None
    if lease and not lease.exclusive and (problems := verify(storage, prefix)):
        # two attempts wrote at once, and the store could not keep them apart: what is mixed must not be found
        storage.delete(prefix + MANIFEST_NAME)
        raise StorageError([*problems, f"{storage.uri}{prefix}: withdrawn; run the same command again"])


def read_manifest(storage: Storage, prefix: str) -> dict[str, Any] | None:
    """The manifest under `prefix`, or None: then there is no bundle. Raises `DamagedError` for one that is not a manifest."""
    found = storage.read_bytes(prefix + MANIFEST_NAME)
    if found is None:
        return None
    try:
        manifest: dict[str, Any] = json.loads(found.data)
        if manifest["schema"] != MANIFEST_SCHEMA or not isinstance(manifest["files"], dict):
            raise ValueError("another schema")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedError(
            f"{storage.uri}{prefix}{MANIFEST_NAME}: not a manifest of schema {MANIFEST_SCHEMA}; "
            "it was changed, or written by another version: move that prefix away and run again"
        ) from None
    return manifest


def read_local_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`. Raises `OSError`, `ValueError`."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    return manifest


def open_local(folder: Path) -> dict[str, Any]:
    """The manifest of the finished bundle in `folder`.

    Raises `ConfigError` if there is none, `DamagedError` if its files are not what it says.
    """
    try:
        manifest = read_local_manifest(folder)
        has_all = "adapter_model.safetensors" in manifest["files"] and "verdict" in manifest
        # names in it become keys of the output
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
            raise DamagedError(f"{path}: is not what the bundle's manifest says; run the same 'lora-trainer run' again instead")
    return manifest


def verify(storage: Storage, prefix: str) -> list[str]:
    """Download a published bundle and compare every file with the manifest; gives one line for each that differs."""
    manifest = read_manifest(storage, prefix)
    if manifest is None:
        return [f"{storage.uri}{prefix}: no manifest, so no bundle"]
    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, expected in manifest["files"].items():
            try:
                got = storage.download(prefix + safe_key(name), Path(scratch) / "file")
            except NotFound:
                problems.append(f"{storage.uri}{prefix}{name}: not found; the manifest says {expected['size_bytes']} bytes")
                continue
            except ValueError as error:
                problems.append(f"{storage.uri}{prefix}{MANIFEST_NAME}: {error}")
                continue
            if (got.size_bytes, got.sha256) != (expected["size_bytes"], expected["sha256"]):
                problems.append(
                    f"{storage.uri}{prefix}{name}: got {got.size_bytes} bytes, SHA-256 {got.sha256}; manifest says otherwise"
                )
    return problems


@dataclass(frozen=True, slots=True)
class LatestMove:
    """What became of `latest.json`."""

    moved: bool
    names_this_run: bool
    """Now, or already before: what a crash left undone behind the move may have to be completed."""
    reason: str


def move_latest(storage: Storage, blood_type: BloodType, manifest: Mapping[str, Any]) -> LatestMove:
    """Point `latest.json` at the manifest's run, unless it names a run that started later. Safe to repeat.

    Raises `StorageError` if other writers win the compare-and-swap every time.
    """
    key = latest_key(blood_type)
    mine = {
        "run_id": manifest["run_id"],
        "bundle": bundle_prefix(blood_type, manifest["run_id"]),
        "started_at": manifest["started_at"],
    }
    for _ in range(_SWAP_ATTEMPTS):
        found = storage.read_bytes(key)
        if found is not None:
            theirs = _pointer(found.data, f"{storage.uri}{key}")
            if theirs["run_id"] == mine["run_id"]:
                return LatestMove(False, True, "it already names this run")
            if _when(theirs["started_at"]) > _when(mine["started_at"]):
                return LatestMove(False, False, f"it names run {theirs['run_id']}, which started later")
            if _when(theirs.get("promoted_at", theirs["started_at"])) > _when(mine["started_at"]):
                return LatestMove(False, False, f"it names run {theirs['run_id']}, which was promoted after this run started")
        if _swap(storage, key, mine, found):
            return LatestMove(True, True, "this run started last")
    raise _always_beaten(storage, key)


def promote(storage: Storage, blood_type: BloodType, manifest: Mapping[str, Any]) -> str | None:
    """Point `latest.json` at the manifest's run whatever it names; gives the run that it named before.

    Runs that started before now don't move it back. Raises `StorageError` as `move_latest` does.
    """
    key = latest_key(blood_type)
    mine = {
        "run_id": manifest["run_id"],
        "bundle": bundle_prefix(blood_type, manifest["run_id"]),
        "started_at": manifest["started_at"],
        "promoted_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for _ in range(_SWAP_ATTEMPTS):
        found = storage.read_bytes(key)
        before = _pointer(found.data, f"{storage.uri}{key}")["run_id"] if found else None
        if _swap(storage, key, mine, found):
            return before
    raise _always_beaten(storage, key)


def _swap(storage: Storage, key: str, pointer: Mapping[str, str], found: ReadResult | None) -> bool:
    data = (json.dumps(pointer, indent=2) + "\n").encode()
    try:
        storage.write_bytes(key, data, if_match=found.etag if found else None, if_absent=found is None)
    except PreconditionFailed:
        return False
    return True


def _always_beaten(storage: Storage, key: str) -> StorageError:
    return StorageError(f"{storage.uri}{key}: other writers changed it {_SWAP_ATTEMPTS} times in a row; run the same command again")


def _pointer(data: bytes, where: str) -> dict[str, str]:
    try:
        pointer: dict[str, str] = json.loads(data)
        _when(pointer["started_at"])
        _when(pointer.get("promoted_at", pointer["started_at"]))
        _ = pointer["run_id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StorageError(
            f"{where}: not a pointer to a bundle; expected run_id, bundle and started_at: remove it or mend it"
        ) from None
    return pointer


def _when(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a time without its zone")
    return moment


def link_newest(storage: Storage, blood_type: BloodType, run_id: str) -> Path | None:
    """Point the folder `adapter_<blood type>` in a local output at the bundle; None where the output is not local."""
    if storage.local_folder is None:
        return None
    link = storage.local_folder / f"adapter_{blood_type}"
    if link.exists() and not link.is_symlink():
        raise StorageError(f"{link}: in the way: got a file or folder, expected nothing or a link; move it away and run again")
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(bundle_prefix(blood_type, run_id).rstrip("/"))
    os.replace(temporary, link)  # noqa: PTH105  a reader sees the old link or the new one
    return link


def fresh_folder(folder: Path) -> Path:
    """An empty folder at this path; what an interrupted run left there goes."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def check_complete(folder: Path) -> None:
    """Raise `InvariantError` if a backend did not save what a bundle has to have."""
    expected = ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        raise InvariantError(f"the backend saved no {', '.join(missing)}: the bundle would not load")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

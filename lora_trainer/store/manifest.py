"""Manifests: the size and SHA-256 of every file in a folder, written last and verified on every download."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lora_trainer.errors import ConfigError
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.store.documents import parse_object, validated
from lora_trainer.store.interface import NotFound, Storage
from lora_trainer.store.keys import safe_key
from lora_trainer.store.local import sha256_of

MANIFEST_NAME: Final = "manifest.json"
MANIFEST_SCHEMA: Final = 1


class DamagedError(ConfigError):
    """Files that were read whole and differ from their manifest, or an invalid manifest: reading them again changes nothing."""


def with_time_zone(text: str) -> str:
    """Return `text`, or raise `ValueError` if it is no ISO 8601 time with a time zone."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("expected a time in ISO 8601") from None
    if moment.tzinfo is None:
        raise ValueError("expected a time zone")
    return text


def _safe_names(files: dict[str, FileFacts]) -> dict[str, FileFacts]:
    for name in files:
        safe_key(name)
    return files


Time = Annotated[str, Field(max_length=64), AfterValidator(with_time_zone)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Text = Annotated[str, Field(max_length=4096)]


class _Facts(BaseModel):
    # other versions may write more, which nobody reads
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class FileFacts(_Facts):
    """What a manifest says of one file."""

    size_bytes: int = Field(ge=0, lt=2**53)
    sha256: _Hash


class _BaseFacts(_Facts):
    id: _Text | None = None
    revision: _Text | None = None
    identity: _Text


class _DataFacts(_Facts):
    uri: _Text
    sha256: _Text


class RunManifest(_Facts):
    """Types of the fields that this version reads from a run's manifest. Bundles of earlier versions lack some.

    Only types a manifest: readers take the fields from its JSON, so the defaults mean nothing.
    """

    schema_version: Literal[1] = Field(alias="schema")
    run_id: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    started_at: Time
    files: Annotated[dict[str, FileFacts], AfterValidator(_safe_names)]
    blood_type: BloodType = BloodType.A
    finished_at: Time = ""
    counter: int | None = Field(default=None, ge=0, lt=2**53)
    evaluation_id: str = Field(default="", max_length=64)
    gate_id: str = Field(default="", pattern=r"^[0-9a-f]{1,64}$")
    verdict: dict[str, Any] = Field(default={})
    ingredients: dict[str, Any] = Field(default={})
    base: _BaseFacts = Field(default=_BaseFacts(identity=""))
    data: _DataFacts = Field(default=_DataFacts(uri="", sha256=""))
    config: dict[str, Any] = Field(default={})
    environment: dict[str, Any] = Field(default={})
    memory_plan: dict[str, Any] = Field(default={})
    timings_s: dict[str, float] = Field(default={})


class _Listing(_Facts):
    """What every manifest has, that of a checkpoint as well."""

    files: Annotated[dict[str, FileFacts], AfterValidator(_safe_names)]


def check_run_manifest(manifest: Mapping[str, Any], where: str, required: tuple[str, ...] = ()) -> None:
    """Raise `ConfigError` with one line for each field of a run's manifest that is missing or has another type."""
    validated(RunManifest, manifest, where)
    if missing := [name for name in required if manifest.get(name) is None]:
        raise ConfigError(f"{where}: got no {', '.join(missing)}; expected the manifest of a run of this version")


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Hash all files of `folder`, write `manifest.json` with the hashes and `facts`, and return its content."""
    files = {
        path.relative_to(folder).as_posix(): {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST_NAME
    }
    manifest = {"schema": MANIFEST_SCHEMA, **facts, "files": files}
    write_json(folder / MANIFEST_NAME, manifest)
    return manifest


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(storage: Storage, prefix: str) -> dict[str, Any] | None:
    """Return the manifest under `prefix`, or None if it is missing: the folder is then incomplete.

    Raises `DamagedError` for a file that is not a manifest.
    """
    found = storage.read_bytes(prefix + MANIFEST_NAME)
    if found is None:
        return None
    where = f"{storage.uri}{prefix}{MANIFEST_NAME}"
    try:
        manifest = parse_object(found.data, where)
        if manifest.get("schema") != MANIFEST_SCHEMA:
            raise ConfigError(f"{where}: schema: got another version")
        validated(_Listing, manifest, where)
    except ConfigError as error:
        raise DamagedError(
            [
                (
                    f"{where}: not a manifest of schema {MANIFEST_SCHEMA}; "
                    "it was changed, or written by another version: move that prefix away and run again"
                ),
                *error.problems,
            ]
        ) from None
    return manifest


def read_local_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest in `folder`, unchecked. Raises `OSError` or `ValueError`."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    return manifest


def download_files(storage: Storage, prefix: str, manifest: Mapping[str, Any], folder: Path) -> None:
    """Download the files that the manifest lists into `folder`, verifying each. Raises `DamagedError`, `StorageError`."""
    for name, expected in manifest["files"].items():
        try:
            got = storage.download(prefix + safe_key(name), folder / name)
        except (NotFound, ValueError) as error:
            raise DamagedError(
                f"{storage.uri}{prefix}{name}: the manifest lists it, but it cannot be downloaded ({error}); the files are "
                "damaged: move that prefix away and run again"
            ) from None
        if (got.size_bytes, got.sha256) != (expected["size_bytes"], expected["sha256"]):
            raise DamagedError(
                f"{storage.uri}{prefix}{name}: got {got.size_bytes} bytes, SHA-256 {got.sha256}, expected {expected['size_bytes']} "
                f"bytes, {expected['sha256']}; the file was changed: move that prefix away and run again"
            )


def verify_files(storage: Storage, prefix: str) -> list[str]:
    """Download a published bundle, compare every file with the manifest, and return one line for each file that differs."""
    try:
        manifest = read_manifest(storage, prefix)
    except DamagedError as error:
        return list(error.problems)
    if manifest is None:
        return [f"{storage.uri}{prefix}: got no manifest, so there is no bundle"]
    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, expected in manifest["files"].items():
            try:
                got = storage.download(prefix + safe_key(name), Path(scratch) / "file")
            except NotFound:
                problems.append(f"{storage.uri}{prefix}{name}: not found; the manifest says {expected['size_bytes']} bytes")
                continue
            if (got.size_bytes, got.sha256) != (expected["size_bytes"], expected["sha256"]):
                problems.append(
                    f"{storage.uri}{prefix}{name}: got {got.size_bytes} bytes, SHA-256 {got.sha256}, expected "
                    f"{expected['size_bytes']} bytes, {expected['sha256']}"
                )
    return problems

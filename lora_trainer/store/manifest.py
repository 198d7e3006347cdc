"""Manifests: the size and SHA-256 of every file in a folder, written last and verified on every download."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_trainer.errors import StorageError
from lora_trainer.store.interface import NotFound, Storage
from lora_trainer.store.keys import safe_key
from lora_trainer.store.local import sha256_of

MANIFEST_NAME: Final = "manifest.json"
MANIFEST_SCHEMA: Final = 1


class DamagedError(StorageError):
    """Files that differ from their manifest, or an invalid manifest."""


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
    """Return the manifest in `folder`. Raises `OSError` or `ValueError`."""
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
    manifest = read_manifest(storage, prefix)
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
            except ValueError as error:
                problems.append(f"{storage.uri}{prefix}{MANIFEST_NAME}: {error}")
                continue
            if (got.size_bytes, got.sha256) != (expected["size_bytes"], expected["sha256"]):
                problems.append(
                    f"{storage.uri}{prefix}{name}: got {got.size_bytes} bytes, SHA-256 {got.sha256}, expected "
                    f"{expected['size_bytes']} bytes, {expected['sha256']}"
                )
    return problems

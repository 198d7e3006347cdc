"""Publish a bundle, the folder with everything that serving the adapter needs."""

from __future__ import annotations

import json
from pathlib import Path

from lora_trainer.errors import InvariantError, StorageError
from lora_trainer.store.interface import PreconditionFailed, Storage
from lora_trainer.store.lease import Lease
from lora_trainer.store.manifest import MANIFEST_NAME, verify_files


def check_complete(folder: Path) -> None:
    """Raise `InvariantError` if the backend did not save every file that the bundle requires."""
    expected = ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        raise InvariantError(f"the backend saved no {', '.join(missing)}: the bundle would not load")


def publish_bundle(folder: Path, storage: Storage, prefix: str, lease: Lease | None = None) -> None:
    """Upload a bundle under `prefix`, its manifest last. Safe to repeat; an existing manifest is never replaced.

    Checks the run's `lease` before each write. Raises `LeaseLostError`, `StorageError`.
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
                "the same command again: it uses the published bundle"
            ) from None
    if lease and not lease.exclusive and (problems := verify_files(storage, prefix)):
        # without conditional writes, two attempts may have mixed their files: hide the bundle by removing its manifest
        storage.delete(prefix + MANIFEST_NAME)
        raise StorageError([*problems, f"{storage.uri}{prefix}: withdrawn; run the same command again"])

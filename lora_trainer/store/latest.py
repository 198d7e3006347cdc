"""`latest.json`, the pointer to a persona's newest accepted bundle.

Updates use compare-and-swap. Only an explicit promotion moves the pointer from a later run to an earlier one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from lora_trainer.errors import StorageError
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.store.interface import PreconditionFailed, ReadResult, Storage
from lora_trainer.store.prefixes import bundle_prefix, latest_key

_SWAP_ATTEMPTS: Final = 8


@dataclass(frozen=True, slots=True)
class LatestMove:
    """The outcome of `move_latest`."""

    moved: bool
    names_this_run: bool
    """Also True if an earlier attempt moved the pointer, because that attempt may not have finished the steps after the move."""
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
            theirs = _parse_pointer(found.data, f"{storage.uri}{key}")
            if theirs["run_id"] == mine["run_id"]:
                return LatestMove(False, True, "it already names this run")
            if _parse_time(theirs["started_at"]) > _parse_time(mine["started_at"]):
                return LatestMove(False, False, f"it names run {theirs['run_id']}, which started later")
            if _parse_time(theirs.get("promoted_at", theirs["started_at"])) > _parse_time(mine["started_at"]):
                return LatestMove(False, False, f"it names run {theirs['run_id']}, which was promoted after this run started")
        if _swap(storage, key, mine, found):
            return LatestMove(True, True, "this run started last")
    raise _lost_every_swap(storage, key)


def promote_latest(storage: Storage, blood_type: BloodType, manifest: Mapping[str, Any]) -> str | None:
    """Point `latest.json` at the manifest's run unconditionally, and return the id of the run that it named before.

    Runs that have already started will not move it back. Raises `StorageError` as `move_latest` does.
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
        before = _parse_pointer(found.data, f"{storage.uri}{key}")["run_id"] if found else None
        if _swap(storage, key, mine, found):
            return before
    raise _lost_every_swap(storage, key)


def link_newest(storage: Storage, blood_type: BloodType, run_id: str) -> Path | None:
    """Link `adapter_<blood type>` in a local output to the run's bundle. Return the link, or None for a remote output."""
    if storage.local_folder is None:
        return None
    link = storage.local_folder / f"adapter_{blood_type}"
    if link.exists() and not link.is_symlink():
        raise StorageError(f"{link}: in the way: got a file or folder, expected nothing or a link; move it away and run again")
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(bundle_prefix(blood_type, run_id).rstrip("/"))
    os.replace(temporary, link)  # noqa: PTH105  atomic: a reader sees the old link or the new one
    return link


def _swap(storage: Storage, key: str, pointer: Mapping[str, str], found: ReadResult | None) -> bool:
    data = (json.dumps(pointer, indent=2) + "\n").encode()
    try:
        storage.write_bytes(key, data, if_match=found.etag if found else None, if_absent=found is None)
    except PreconditionFailed:
        return False
    return True


def _lost_every_swap(storage: Storage, key: str) -> StorageError:
    return StorageError(f"{storage.uri}{key}: other writers changed it {_SWAP_ATTEMPTS} times in a row; run the same command again")


def _parse_pointer(data: bytes, where: str) -> dict[str, str]:
    try:
        pointer: dict[str, str] = json.loads(data)
        _parse_time(pointer["started_at"])
        _parse_time(pointer.get("promoted_at", pointer["started_at"]))
        _ = pointer["run_id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StorageError(
            f"{where}: not a pointer to a bundle; expected run_id, bundle and started_at: remove or repair it"
        ) from None
    return pointer


def _parse_time(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("no time zone")
    return moment

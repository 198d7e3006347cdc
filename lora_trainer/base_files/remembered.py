"""Remember the SHA-256 of a base's files, so that an unchanged base of 15 GB is not read again by every run.

A hash is reused only if the file's location, size, times, inode and device are those of the file that was hashed. The change time
cannot be set by a program, so a file that was rewritten with its old size and modification time is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

from lora_trainer.store.local import OWN_PREFIX, local_errors, replacing

SETTLED_S: Final = 5.0
"""Do not reuse a hash of a file that was changed more recently.

Some file systems keep times in steps of up to 2 s, so a second change could leave the times as they were. git treats its index the
same way: https://git-scm.com/docs/racy-git.
"""
MIN_REMEMBERED_BYTES: Final = 2**26
"""Read a base smaller than this every time, which takes a tenth of a second, and write nothing into its folder."""
RECORD_NAME: Final = f"{OWN_PREFIX}sha256.json"
_VERSION: Final = 1
_MAX_RECORD_BYTES: Final = 2**20
_SHA256: Final = re.compile("[0-9a-f]{64}")

_State = dict[str, int]
_Record = dict[str, dict[str, object]]


def hash_files(folder: Path, files: Sequence[Path], work_dir: Path | None = None, *, read_all: bool = False) -> list[str]:
    """Return the SHA-256 of each file of a base, 64 lower-case hex digits, reading only files without a remembered hash.

    New hashes are written to a record in `folder`, or below `work_dir` if `folder` is not writable. If neither can be written, the
    next run reads the files again. `read_all` hashes every file and rewrites the record.

    Raises `NotFound` or `StorageError` if a file cannot be read.
    """
    real_folder = os.path.realpath(folder)
    places = [folder / RECORD_NAME]
    with local_errors(folder):
        if sum(path.stat().st_size for path in files) < MIN_REMEMBERED_BYTES:
            places = []
    if places and work_dir is not None:
        places.append(work_dir / "base-hashes" / f"{hashlib.sha256(os.fsencode(real_folder)).hexdigest()[:16]}.json")
    records = [] if read_all else [_read(place) for place in places]

    def hash_file(path: Path) -> tuple[str, _State | None, bool]:
        real = os.path.realpath(path)
        # open before asking for the state: NFS then asks the server instead of its cache
        with local_errors(path), path.open("rb") as file:
            before = _state(file.fileno())
            settled = _is_settled(before)
            known = {**before, "path": real}
            for record in records if settled else ():
                entry = record.get(path.name, {})
                sha256 = entry.get("sha256")
                if isinstance(sha256, str) and _SHA256.fullmatch(sha256) and entry == {**known, "sha256": sha256}:
                    return sha256, before, False
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return sha256, (before if settled and _state(file.fileno()) == before else None), True

    # hashlib releases the GIL, so threads hash the four shards of a 7B model in the time of one
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = list(pool.map(hash_file, files))
    if any(state is not None and was_read for _, state, was_read in found):
        _write(
            places,
            {
                path.name: {**state, "path": os.path.realpath(path), "sha256": sha256}
                for path, (sha256, state, _) in zip(files, found, strict=True)
                if state is not None
            },
        )
    return [sha256 for sha256, _, _ in found]


def _state(descriptor: int) -> _State:
    status = os.fstat(descriptor)
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
        "device": status.st_dev,
    }


def _is_settled(state: _State) -> bool:
    return max(state["mtime_ns"], state["ctime_ns"]) <= time.time_ns() - int(SETTLED_S * 1e9)


def _read(place: Path) -> _Record:
    """Return the record's entries by file name; an empty dict if it is missing, damaged, or of another version."""
    # RecursionError: deeply nested brackets
    with suppress(OSError, ValueError, RecursionError):
        with place.open("rb") as file:
            data = file.read(_MAX_RECORD_BYTES + 1)
        if len(data) <= _MAX_RECORD_BYTES:
            record = json.loads(data)
            if isinstance(record, dict) and record.get("version") == _VERSION and isinstance(record.get("files"), dict):
                return {name: entry for name, entry in record["files"].items() if isinstance(entry, dict)}
    return {}


def _write(places: Sequence[Path], files: _Record) -> None:
    """Write the record to the first place that is writable. Jobs that share a base may do so at once: the last one wins."""
    data = json.dumps({"version": _VERSION, "files": files}, indent=1).encode()
    for place in places:
        with suppress(OSError):
            with replacing(place) as file:
                file.write(data)
            return

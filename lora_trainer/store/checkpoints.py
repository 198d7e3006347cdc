"""Write checkpoints to a local folder, upload them in the background, and find the newest one for the next attempt.

A checkpoint is a folder of safetensors and JSON files with a manifest of their hashes. Readers skip one that has no manifest or
differs from it, and use the checkpoint before it. The backend decides what the files contain.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from lora_trainer.config import CheckpointConfig
from lora_trainer.errors import DeviceLostError, DivergedError, Interrupted, LoraTrainerError, StorageError
from lora_trainer.logs import get_logger
from lora_trainer.signals import Interruption
from lora_trainer.store.checkpoint_writer import CheckpointWriter
from lora_trainer.store.interface import Storage
from lora_trainer.store.lease import Lease
from lora_trainer.store.local import fresh_folder, sha256_of
from lora_trainer.store.manifest import (
    MANIFEST_NAME,
    DamagedError,
    download_files,
    read_local_manifest,
    read_manifest,
    write_manifest,
)

Snapshot = Callable[[Path], None]
"""Writes the state of training after one step to the given folder."""

_NAME: Final = re.compile(r"step-(\d{6,})")
_KEY: Final = re.compile(r"(checkpoints(?:-[0-9a-f]+)?/step-(\d{6,})/)(.+)")
"""Key of a checkpoint's file, relative to the run's prefix. Without conditional writes, each attempt has its own folder."""
_UNFINISHED: Final = "unfinished"
"""Folder of a checkpoint that is still being written or downloaded."""


def checkpoint_name(step: int) -> str:
    """Return the folder name for the checkpoint after optimizer step `step`. Names sort by step."""
    return f"step-{step:06d}"


class Checkpoints:
    """The checkpoints of one run, in a local folder and under a prefix of the output.

    As a context manager: after an error, wait for the newest upload for at most the rest of `grace_s`.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: Path,
        output: Storage,
        prefix: str,
        run_id: str,
        *,
        interruption: Interruption,
        lease: Lease | None = None,
    ) -> None:
        """`prefix` is the run's prefix in `output`. Each write there first checks `lease`."""
        self._config = config
        self._folder = folder
        self._prefix = prefix
        self._output = output
        # for the writer thread only
        self._guarded_output = output.adapted(guard=lease.check if lease else None)
        self._run_id = run_id
        self._interruption = interruption
        self._lease = lease
        self._own = "checkpoints/" if lease is None or lease.exclusive else f"checkpoints-{lease.holder}/"
        self._last_s = time.monotonic()
        self.last_step = 0
        """Step of the newest checkpoint that this attempt wrote or continued from; 0 without one."""
        self._damaged: set[str] = set()
        """Prefixes in the output whose files differ from their manifest."""
        self._uploaded: dict[str, str] = {}
        """Keys in the output by the SHA-256 of their bytes, of the newest checkpoint that this attempt uploaded."""
        self._writer = CheckpointWriter(interruption)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        left_s = max(1.0, self._config.grace_s - self._interruption.seconds_ago)
        if not isinstance(error, Interrupted):
            # report the original error, not one from the upload
            with suppress(StorageError):
                self.finish(left_s)
            if isinstance(error, DivergedError | DeviceLostError) and self.last_step:
                error.problems = (
                    *error.problems,
                    f"the last good checkpoint, of step {self.last_step}, is kept: {self._uri_of(self.last_step)}",
                )
            return
        started_s = time.monotonic()
        noticed_s = self._interruption.seconds_ago
        self.finish(left_s)
        get_logger().info(
            "interrupted_safely",
            signal=error.signal_name,
            step=self.last_step,
            until_safe_point_s=round(noticed_s, 3),
            checkpoint_s=round(time.monotonic() - started_s, 3),
            deadline_s=self._config.grace_s,
        )
        if self.last_step:
            error.kept = f"the checkpoint of step {self.last_step} is safe"

    # -- writing ------------------------------------------------------------------------------------

    def stop_if_lost(self) -> None:
        """Raise `LeaseLostError` if another attempt is known to have taken over this run."""
        if self._lease:
            self._lease.stop_if_lost()

    def is_due(self, step: int) -> bool:
        """Return whether enough steps or minutes have passed since the last checkpoint, whichever comes first."""
        if self._config.every_steps and step - self.last_step >= self._config.every_steps:
            return True
        return time.monotonic() - self._last_s >= self._config.every_minutes * 60

    def write(self, step: int, snapshot: Snapshot) -> None:
        """Write and upload `snapshot` as the checkpoint of `step` in the background.

        Failures are logged. `finish` raises an error if no later checkpoint succeeds.
        """
        self.last_step, self._last_s = step, time.monotonic()
        self._writer.offer(step, partial(self._write, step, snapshot))

    def finish(self, timeout_s: float | None = None) -> None:
        """Wait until the newest checkpoint is uploaded. Raises `StorageError` if that fails or takes longer than `timeout_s`."""
        step = self._writer.finish(timeout_s)
        if step is None:
            return
        reason = self._writer.error or f"still uploading after {timeout_s:.0f} s"
        folder = self._folder / checkpoint_name(step)
        is_here = (folder / MANIFEST_NAME).is_file()
        where = self._uri_of(step)
        kept = f"it is kept in {folder}" if is_here else "and it could not be written to work_dir either"
        raise StorageError(
            f"{where}: the checkpoint was not uploaded: {reason}; {kept}; "
            "run the same command again, with the same work_dir to continue from there"
        )

    def _uri_of(self, step: int) -> str:
        return f"{self._output.uri}{self._prefix}{self._own}{checkpoint_name(step)}"

    def _write(self, step: int, snapshot: Snapshot, superseded: Callable[[], bool]) -> None:
        """Write and upload one checkpoint, then delete the old ones. Runs in the writer thread."""
        self.stop_if_lost()
        self._write_locally(step, snapshot)
        if self._upload(self._guarded_output, step, superseded):
            self._prune(self._guarded_output)

    def _write_locally(self, step: int, snapshot: Snapshot) -> None:
        target = self._folder / checkpoint_name(step)
        if self._is_intact(target):
            return
        started_s = time.perf_counter()
        try:
            unfinished = fresh_folder(self._folder / _UNFINISHED)
            snapshot(unfinished)
            manifest = write_manifest(unfinished, {"run_id": self._run_id, "step": step})
            shutil.rmtree(target, ignore_errors=True)
            # rename last, so that a folder with this name is always complete
            unfinished.rename(target)
        except OSError as error:
            raise StorageError(f"{target}: {error.strerror or error}; free some space there, or set work_dir") from error
        get_logger().info(
            "checkpoint_written", step=step, size_bytes=_size_bytes(manifest), write_s=round(time.perf_counter() - started_s, 3)
        )

    def _upload(self, output: Storage, step: int, superseded: Callable[[], bool]) -> bool:
        """Upload the files and then the manifest. Return False if a newer checkpoint superseded this one."""
        started_s = time.perf_counter()
        folder, prefix = self._folder / checkpoint_name(step), f"{self._prefix}{self._own}{checkpoint_name(step)}/"
        manifest = read_local_manifest(folder)
        if prefix in self._damaged:
            # hide the damaged checkpoint while its files are replaced one by one
            output.delete(prefix + MANIFEST_NAME)
        uploaded: dict[str, str] = {}
        for name, file in manifest["files"].items():
            if superseded():
                return False
            key, digest = prefix + name, file["sha256"]
            # the best weights are often those of this step or of the checkpoint before
            twin = uploaded.get(digest) or self._uploaded.get(digest)
            if not (twin and output.copy(twin, key, size_bytes=file["size_bytes"], sha256=digest)):
                output.upload(folder / name, key, sha256=digest)
            uploaded[digest] = key
        self._uploaded = uploaded
        if self._lease:
            self._lease.confirm()
        output.upload(folder / MANIFEST_NAME, prefix + MANIFEST_NAME)
        get_logger().info(
            "checkpoint_uploaded", step=step, size_bytes=_size_bytes(manifest), upload_s=round(time.perf_counter() - started_s, 3)
        )
        return True

    def _prune(self, output: Storage) -> None:
        """Delete this attempt's checkpoints, local and uploaded, except the newest `keep` complete ones."""
        stored = {folder: found for folder, found in self._stored_checkpoints(output).items() if folder.startswith(self._own)}
        complete = sorted((found.step for found in stored.values() if found.is_complete), reverse=True)
        # no complete checkpoint means that another attempt has published the run and deleted them all
        oldest_kept = complete[: self._config.keep][-1] if complete else 0
        for folder, found in stored.items():
            if found.step < oldest_kept:
                self._remove_stored(output, folder)
        for step in self._local_steps():
            if step < oldest_kept:
                shutil.rmtree(self._folder / checkpoint_name(step), ignore_errors=True)

    # -- finding ------------------------------------------------------------------------------------

    def newest(self) -> Path | None:
        """Return the local folder of the newest intact checkpoint, downloading it if needed, or None if there is none.

        Logs and skips damaged checkpoints. Raises `StorageError` if the output cannot be read.
        """
        stored: dict[int, list[str]] = {}
        for where, found in self._stored_checkpoints(self._output).items():
            if found.is_complete:
                stored.setdefault(found.step, []).append(where)
        for step in sorted({*stored, *self._local_steps()}, reverse=True):
            folder = self._folder / checkpoint_name(step)
            if self._is_intact(folder) or any(self._fetch(self._output, where, folder) for where in stored.get(step, [])):
                return folder
        return None

    def continue_from(self, step: int) -> None:
        """Record that the run resumed from the checkpoint of `step`, and restart the intervals to the next checkpoint."""
        self.last_step, self._last_s = step, time.monotonic()

    def clear(self) -> None:
        """Delete all local and uploaded checkpoints, because the run starts over or is published.

        Failures are only logged: leftovers cost nothing but space.
        """
        self._writer.finish(None)
        try:
            for folder in self._stored_checkpoints(self._output):
                self._remove_stored(self._output, folder)
        except StorageError as error:
            get_logger().warning("checkpoints_left", where=self._output.uri + self._prefix, problem=str(error))
        shutil.rmtree(self._folder, ignore_errors=True)

    def _is_intact(self, folder: Path) -> bool:
        """Return whether the files of a local checkpoint match its manifest."""
        if not folder.is_dir():
            return False
        try:
            files = read_local_manifest(folder)["files"]
            damaged = next((name for name, file in files.items() if sha256_of(folder / name) != file["sha256"]), None)
        except (OSError, ValueError, KeyError, TypeError, LoraTrainerError):
            damaged = MANIFEST_NAME
        if damaged:
            get_logger().warning("checkpoint_damaged", where=str(folder), file=damaged)
        return not damaged

    def _fetch(self, output: Storage, where: str, folder: Path) -> bool:
        """Download the uploaded checkpoint at `where` to `folder`. Return False if it is missing or damaged."""
        prefix = self._prefix + where
        unfinished = fresh_folder(self._folder / _UNFINISHED)
        try:
            manifest = read_manifest(output, prefix)
            if manifest is None:
                return False
            download_files(output, prefix, manifest, unfinished)
            output.download(prefix + MANIFEST_NAME, unfinished / MANIFEST_NAME)
        except DamagedError as error:
            self._damaged.add(prefix)
            get_logger().warning("checkpoint_damaged", where=output.uri + prefix, problem=str(error))
            return False
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        return True

    def _local_steps(self) -> Iterator[int]:
        for path in sorted(self._folder.glob("step-*")):
            if match := _NAME.fullmatch(path.name):
                yield int(match[1])

    def _stored_checkpoints(self, output: Storage) -> dict[str, _Stored]:
        """Return all attempts' checkpoints in the output, complete or not, by folder relative to the run's prefix."""
        found: dict[str, _Stored] = {}
        for item in output.list(self._prefix):
            if match := _KEY.fullmatch(item.key.removeprefix(self._prefix)):
                folder, step, name = match.groups()
                is_complete = name == MANIFEST_NAME or (folder in found and found[folder].is_complete)
                found[folder] = _Stored(int(step), is_complete)
        return found

    def _remove_stored(self, output: Storage, folder: str) -> None:
        prefix = self._prefix + folder
        # delete the manifest first, so that no reader sees a partly deleted checkpoint
        output.delete(prefix + MANIFEST_NAME)
        for item in list(output.list(prefix)):
            output.delete(item.key)


@dataclass(frozen=True, slots=True)
class _Stored:
    """A checkpoint in the output."""

    step: int
    is_complete: bool
    """Whether the checkpoint has a manifest."""


def _size_bytes(manifest: Mapping[str, Any]) -> int:
    return sum(int(file["size_bytes"]) for file in manifest["files"].values())

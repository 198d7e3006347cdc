"""Checkpoints of a run: written here whole or not at all, copied to the output behind the training's back, found again.

A checkpoint is a folder of safetensors and JSON with a manifest of its files' hashes. One without its manifest, or whose files
are not what the manifest says, does not exist: the one before it is taken. What is in the files is the backend's business.
"""

from __future__ import annotations

import contextvars
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from lora_trainer.config import CheckpointConfig
from lora_trainer.errors import DeviceLostError, DivergedError, Interrupted, LoraTrainerError, StorageError
from lora_trainer.logs import get_logger
from lora_trainer.signals import Interruption
from lora_trainer.store.bundle import fresh_folder
from lora_trainer.store.interface import Storage
from lora_trainer.store.lease import Lease
from lora_trainer.store.local import sha256_of
from lora_trainer.store.manifest import (
    MANIFEST_NAME,
    DamagedError,
    download_files,
    read_local_manifest,
    read_manifest,
    write_manifest,
)

Snapshot = Callable[[Path], None]
"""The state of a training run as of one step; called with a folder, it writes its files there."""

_NAME: Final = re.compile(r"step-(\d{6,})")
_KEY: Final = re.compile(r"(checkpoints(?:-[0-9a-f]+)?/step-(\d{6,})/)(.+)")
"""Below a run's prefix; where the store has no conditional writes, each attempt has a folder of its own."""
_UNFINISHED: Final = "unfinished"
"""Where a checkpoint is written before it has its name."""


def checkpoint_name(step: int) -> str:
    """Folder of the checkpoint after optimizer step `step`; sorts by step."""
    return f"step-{step:06d}"


class Checkpoints:
    """The checkpoints of one run: in a local folder, and under a prefix of the output."""

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
        """`prefix`: the run's, relative to `output`; `lease`: checked before each write there."""
        self._config = config
        self._folder = folder
        self._prefix = prefix
        self._output = output
        # the writer thread has a storage of its own
        self._guarded_output = output.adapted(guard=lease.check if lease else None)
        self._run_id = run_id
        self._interruption = interruption
        self._lease = lease
        self._own = "checkpoints/" if lease is None or lease.exclusive else f"checkpoints-{lease.holder}/"
        self._last_s = time.monotonic()
        self.last_step = 0
        """Of the newest checkpoint that was written, or gone on from."""
        self._damaged: set[str] = set()
        """Folders in the output whose files are not what their manifest says."""
        self._writer = _Writer(self._write, interruption)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """What is still under way gets there before the process ends, within what is left of `grace_s`."""
        if error is None:
            return
        left_s = max(1.0, self._config.grace_s - self._interruption.seconds_ago)
        if not isinstance(error, Interrupted):
            # the run has another last word
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
        """Raises `LeaseLostError` if another attempt at this run is known to have taken over."""
        if self._lease:
            self._lease.stop_if_lost()

    def is_due(self, step: int) -> bool:
        """Whether enough steps or minutes have passed since the last one, whichever comes first."""
        if self._config.every_steps and step - self.last_step >= self._config.every_steps:
            return True
        return time.monotonic() - self._last_s >= self._config.every_minutes * 60

    def write(self, step: int, snapshot: Snapshot) -> None:
        """Have `snapshot` written, committed as the checkpoint of `step` and uploaded, all in the background.

        What fails there is logged, and raised by `finish` if it is still so at the end.
        """
        self.last_step, self._last_s = step, time.monotonic()
        self._writer.offer(step, snapshot)

    def finish(self, timeout_s: float | None = None) -> None:
        """Wait until the newest checkpoint is in the output. Raises `StorageError` if it isn't there in `timeout_s` seconds."""
        step = self._writer.finish(timeout_s)
        if step is None:
            return
        reason = self._writer.error or f"still under way after {timeout_s:.0f} s"
        folder = self._folder / checkpoint_name(step)
        is_here = (folder / MANIFEST_NAME).is_file()
        where = self._uri_of(step)
        kept = f"it is kept in {folder}" if is_here else "and could not be written to work_dir either"
        raise StorageError(
            f"{where}: the checkpoint was not uploaded: {reason}; {kept}; "
            "run the same command again, with the same work_dir to go on from there"
        )

    def _uri_of(self, step: int) -> str:
        """For messages."""
        return f"{self._output.uri}{self._prefix}{self._own}{checkpoint_name(step)}"

    def _write(self, step: int, snapshot: Snapshot, superseded: Callable[[], bool]) -> None:
        """In the writer's thread: here, there, and those before the newest `keep` away."""
        self.stop_if_lost()
        self._write_here(step, snapshot)
        if self._upload(self._guarded_output, step, superseded):
            self._prune(self._guarded_output)

    def _write_here(self, step: int, snapshot: Snapshot) -> None:
        target = self._folder / checkpoint_name(step)
        if self._is_whole(target):
            return
        started_s = time.perf_counter()
        try:
            unfinished = fresh_folder(self._folder / _UNFINISHED)
            snapshot(unfinished)
            manifest = write_manifest(unfinished, {"run_id": self._run_id, "step": step})
            shutil.rmtree(target, ignore_errors=True)
            # what has this name is whole
            unfinished.rename(target)
        except OSError as error:
            raise StorageError(f"{target}: {error.strerror or error}; free some space there, or set work_dir") from error
        get_logger().info(
            "checkpoint_written", step=step, size_bytes=_size_bytes(manifest), write_s=round(time.perf_counter() - started_s, 3)
        )

    def _upload(self, output: Storage, step: int, superseded: Callable[[], bool]) -> bool:
        """The manifest last; gives whether it got there."""
        started_s = time.perf_counter()
        folder, prefix = self._folder / checkpoint_name(step), f"{self._prefix}{self._own}{checkpoint_name(step)}/"
        manifest = read_local_manifest(folder)
        if prefix in self._damaged:
            # its files are replaced one by one, and the old manifest must not be found beside them
            output.delete(prefix + MANIFEST_NAME)
        for name, file in manifest["files"].items():
            if superseded():
                return False
            output.upload(folder / name, prefix + name, sha256=file["sha256"])
        if self._lease:
            self._lease.confirm()
        output.upload(folder / MANIFEST_NAME, prefix + MANIFEST_NAME)
        get_logger().info(
            "checkpoint_uploaded", step=step, size_bytes=_size_bytes(manifest), upload_s=round(time.perf_counter() - started_s, 3)
        )
        return True

    def _prune(self, output: Storage) -> None:
        """Leave the newest `keep` complete ones of this attempt, here and there."""
        stored = {folder: found for folder, found in self._stored(output).items() if folder.startswith(self._own)}
        complete = sorted((found.step for found in stored.values() if found.is_whole), reverse=True)
        # none: another attempt has published and cleared
        oldest_kept = complete[: self._config.keep][-1] if complete else 0
        for folder, found in stored.items():
            if found.step < oldest_kept:
                self._remove_stored(output, folder)
        for step in self._local():
            if step < oldest_kept:
                shutil.rmtree(self._folder / checkpoint_name(step), ignore_errors=True)

    # -- finding ------------------------------------------------------------------------------------

    def newest(self) -> Path | None:
        """The newest complete checkpoint whose files are what its manifest says, in the local folder; None: there is none.

        Damaged ones are said and passed over. Raises `StorageError` when the output cannot be asked.
        """
        stored: dict[int, list[str]] = {}
        for where, found in self._stored(self._output).items():
            if found.is_whole:
                stored.setdefault(found.step, []).append(where)
        for step in sorted({*stored, *self._local()}, reverse=True):
            folder = self._folder / checkpoint_name(step)
            if self._is_whole(folder) or any(self._is_fetched(self._output, where, folder) for where in stored.get(step, [])):
                return folder
        return None

    def continue_from(self, step: int) -> None:
        """The run goes on from the checkpoint of `step`, which need not be written again."""
        self.last_step, self._last_s = step, time.monotonic()

    def clear(self) -> None:
        """Remove them all, here and there: the run starts over, or is published and needs them no longer.

        Leftovers cost space and nothing else, so what cannot be removed is only logged.
        """
        self._writer.finish(None)
        try:
            for folder in self._stored(self._output):
                self._remove_stored(self._output, folder)
        except StorageError as error:
            get_logger().warning("checkpoints_left", where=self._output.uri + self._prefix, problem=str(error))
        shutil.rmtree(self._folder, ignore_errors=True)

    def _is_whole(self, folder: Path) -> bool:
        """Whether a local checkpoint is what its manifest says."""
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

    def _is_fetched(self, output: Storage, where: str, folder: Path) -> bool:
        """Whether the output's copy below `where` could be had and is what its manifest says."""
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

    def _local(self) -> Iterator[int]:
        for path in sorted(self._folder.glob("step-*")):
            if match := _NAME.fullmatch(path.name):
                yield int(match[1])

    def _stored(self, output: Storage) -> dict[str, _Stored]:
        """What the output has, complete or not, of all attempts: the folder of each below the run's prefix."""
        found: dict[str, _Stored] = {}
        for item in output.list(self._prefix):
            if match := _KEY.fullmatch(item.key.removeprefix(self._prefix)):
                folder, step, name = match.groups()
                is_whole = name == MANIFEST_NAME or (folder in found and found[folder].is_whole)
                found[folder] = _Stored(int(step), is_whole)
        return found

    def _remove_stored(self, output: Storage, folder: str) -> None:
        prefix = self._prefix + folder
        # first the manifest: what has none does not exist
        output.delete(prefix + MANIFEST_NAME)
        for item in list(output.list(prefix)):
            output.delete(item.key)


@dataclass(frozen=True, slots=True)
class _Stored:
    """A checkpoint in the output."""

    step: int
    is_whole: bool
    """Its manifest is there."""


def _size_bytes(manifest: Mapping[str, Any]) -> int:
    return sum(int(file["size_bytes"]) for file in manifest["files"].values())


class _Writer:
    """One thread, at most one checkpoint in flight; of those that wait the newest is next and the others are dropped."""

    def __init__(self, write: Callable[[int, Snapshot, Callable[[], bool]], None], interruption: Interruption) -> None:
        self._write = write
        self._interruption = interruption
        self._changed = threading.Condition()
        self._waiting: tuple[int, Snapshot] | None = None
        self._in_flight: int | None = None
        self._failed: int | None = None
        self._thread: threading.Thread | None = None
        self.error = ""
        """Why the last one failed; empty when it did not."""

    def offer(self, step: int, snapshot: Snapshot) -> None:
        """Write the checkpoint of `step` as soon as the one in flight is done."""
        with self._changed:
            self._waiting, self._failed = (step, snapshot), None
            if self._thread is None:
                # a daemon: an upload that hangs must not keep the process from ending; the log's bound values come along
                context = contextvars.copy_context()
                self._thread = threading.Thread(target=context.run, args=(self._work,), name="checkpoints", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def finish(self, timeout_s: float | None) -> int | None:
        """Wait until nothing waits or is in flight; gives the newest step if it is not in the output then."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and self._in_flight is None, timeout_s)
            return self._waiting[0] if self._waiting else self._in_flight or self._failed

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None:
                    self._changed.wait()
                (step, snapshot), self._waiting = self._waiting, None
                self._in_flight = step
            error = ""
            try:
                self._write(step, snapshot, self._is_superseded)
            except LoraTrainerError as failure:
                error = str(failure)
            except Exception as failure:  # a thread that dies in silence would be taken for one that writes
                error = f"{type(failure).__name__}: {failure}"
            # half a gigabyte: not until the next one comes
            del snapshot
            if error:
                get_logger().warning("checkpoint_failed", step=step, problem=error)
            with self._changed:
                self._in_flight, self.error = None, error
                if error and self._waiting is None:
                    self._failed = step
                self._changed.notify_all()

    def _is_superseded(self) -> bool:
        """On the way out only the newest counts."""
        return self._waiting is not None and self._interruption.seconds_ago > 0

"""Storage in a local folder, and the atomic file operations that it uses."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from io import BufferedRandom
from itertools import islice
from pathlib import Path
from typing import Final, Self

from lora_trainer.errors import ConfigError, LoraTrainerError, StorageError
from lora_trainer.store.interface import (
    MAX_DOCUMENT_BYTES,
    Fetched,
    NotFound,
    ObjectInfo,
    PreconditionFailed,
    ReadResult,
    check_one_condition,
    in_other_form,
    listed_key,
    no_guard,
    not_found,
    other_form,
    too_large,
)
from lora_trainer.store.keys import checked_prefix, safe_key
from lora_trainer.store.retry import RetryBudget

OWN_PREFIX: Final = ".~lora-trainer."
"""Prefix of our temporary and lock files, which listings skip."""
_STALE_TEMPORARY_S: Final = 3600


class FileStorage:
    """A folder on this machine. Writing the first object creates it."""

    def __init__(self, folder: Path) -> None:
        """Raises `ConfigError` if `folder` is a file."""
        self._folder = Path(os.path.normpath(folder.absolute()))
        self._guard: Callable[[], None] = no_guard
        with local_errors(self._folder):
            if self._folder.exists() and not self._folder.is_dir():
                raise ConfigError(f"{self._folder}: got a file, expected a folder")

    @property
    def uri(self) -> str:
        path = str(self._folder).replace("%", "%25")
        return "file://" + path if path == "/" else f"file://{path}/"

    @property
    def local_folder(self) -> Path | None:
        return self._folder

    @property
    def conditional_writes(self) -> bool:
        return True

    @property
    def conditions_probed(self) -> bool:
        return True

    def adapted(self, *, guard: Callable[[], None] | None = None, retry_budget: RetryBudget | None = None) -> Self:
        other = copy(self)
        other._guard = guard or self._guard
        return other

    def download(self, key: str, target: Path) -> Fetched:
        path = self._path(key)
        if not self.exists(key):
            raise self._not_found(key)
        size_bytes, digest = 0, hashlib.sha256()
        with local_errors(path), path.open("rb") as source, local_errors(target), replacing(target) as file:
            while chunk := source.read(2**20):
                digest.update(chunk)
                size_bytes += file.write(chunk)
        return Fetched(size_bytes, digest.hexdigest())

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        target = self._path(key)
        with local_errors(path), path.open("rb") as source, local_errors(target), replacing(target) as file:
            shutil.copyfileobj(source, file, 2**20)
            self._guard()

    def upload_all(self, folder: Path, prefix: str, sha256: Mapping[str, str]) -> None:
        for name in sha256:
            self.upload(folder / name, prefix + name)

    def copy(self, source: str, key: str, *, size_bytes: int, sha256: str) -> bool:
        # the system would copy the bytes, as upload() does
        return False

    def read_bytes(self, key: str, *, max_bytes: int = MAX_DOCUMENT_BYTES) -> ReadResult | None:
        path = self._path(key)
        with local_errors(path):
            try:
                with path.open("rb") as file:
                    data = file.read(max_bytes + 1)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                # a folder with this name is not an object, as in S3
                return None
        if len(data) > max_bytes:
            raise too_large(str(path), max_bytes)
        return ReadResult(data, hashlib.sha256(data).hexdigest())

    def read_range(self, key: str, start: int, length: int) -> bytes:
        path = self._path(key)
        if not self.exists(key):
            raise self._not_found(key)
        with local_errors(path), path.open("rb") as file:
            file.seek(start)
            data = file.read(length)
        if len(data) != length:
            raise StorageError(f"{path}: got {len(data):,} bytes for the {length:,} from {start:,} on: it changed; run it again")
        return data

    def write_bytes(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> None:
        path = self._path(key)
        check_one_condition(if_match, if_absent)
        self._guard()
        with local_errors(path):
            if if_match is None and not if_absent:
                self._replace(path, data)
                return
            if if_absent and self._create(path, data):
                return
            with _locked(path):
                current = sha256_of(path) if path.is_file() else None
                if current != if_match:
                    raise PreconditionFailed(f"{path}: changed since it was last read")
                self._replace(path, data)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        prefix = checked_prefix(prefix)
        return self._walk(self._folder / prefix, prefix)

    def delete(self, key: str) -> None:
        path = self._path(key)
        self._guard()
        with local_errors(path), suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            path.unlink()

    def exists(self, key: str) -> bool:
        path = self._path(key)
        with local_errors(path):
            return path.is_file()

    def _path(self, key: str) -> Path:
        return self._folder / safe_key(key)

    @staticmethod
    def _replace(path: Path, data: bytes) -> None:
        with replacing(path) as file:
            file.write(data)

    @staticmethod
    def _create(path: Path, data: bytes) -> bool:
        """Create the file without a lock file, which would stay in a published folder.

        Return False if the file system has no hard links. Raises `PreconditionFailed` if the file exists.
        """
        try:
            with replacing(path, is_new=True) as file:
                file.write(data)
        except FileExistsError:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from None
            if not path.is_file():
                raise
            raise PreconditionFailed(f"{path}: changed since it was last read") from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            return False
        return True

    def _walk(self, folder: Path, prefix: str) -> Iterator[ObjectInfo]:
        with local_errors(folder):
            try:
                with os.scandir(folder) as found:
                    # sort folders by their name plus "/", so that the walk yields keys in order
                    entries = sorted(
                        (os.fsencode(entry.name) + (b"/" if entry.is_dir(follow_symlinks=False) else b""), entry)
                        for entry in found
                        if not entry.name.startswith(OWN_PREFIX)
                    )
            except (FileNotFoundError, NotADirectoryError):
                return
        for name, entry in entries:
            key = prefix + entry.name
            if name.endswith(b"/"):
                yield from self._walk(Path(entry.path), key + "/")
                continue
            with local_errors(Path(entry.path)):
                # skip links to folders: their files are outside the storage or already listed under other keys
                status = entry.stat() if entry.is_file() else None
            if status is not None:
                yield ObjectInfo(listed_key(key, str(folder)), status.st_size, f"{status.st_mtime_ns}-{status.st_size}")

    def probe_conditional_writes(self, key: str) -> bool:
        self.write_bytes(key, b"", if_absent=True)
        return True

    def _not_found(self, key: str) -> NotFound:
        path = str(self._path(key))
        if other := other_form(path, _names_in):
            return in_other_form(path, other)
        folder = self._path(key).parent
        return not_found(path, key, f"{folder}/", _names_in(f"{folder}/"))


def _names_in(folder: str) -> list[str]:
    """Return up to a thousand names in a folder, those of folders with a slash; none if it can't be read."""
    with suppress(OSError), os.scandir(folder) as found:
        return [entry.name + ("/" if entry.is_dir() else "") for entry in islice(found, 1000)]
    return []


# -- files ----------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, 64 lower-case hex digits. Raises `NotFound` or `StorageError`."""
    with local_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fresh_folder(folder: Path) -> Path:
    """Create an empty folder, removing what an interrupted run left there, and return its path."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def replacing(target: Path, *, is_new: bool = False) -> Iterator[BufferedRandom]:
    """Yield a temporary file that becomes `target` when the block succeeds and is deleted when it fails.

    With `is_new`, raises `FileExistsError` if `target` exists by then.
    """
    _make_folder(target.parent)
    _remove_stale_temporaries(target.parent)
    temporary = target.parent / f"{OWN_PREFIX}{secrets.token_hex(8)}.tmp"
    try:
        # mode "x" respects the umask; tempfile's 0600 would hide published files from other users
        with temporary.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            # unlike a rename, a link never replaces an existing file
            target.hardlink_to(temporary)
            temporary.unlink()
        else:
            temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _remove_stale_temporaries(folder: Path) -> None:
    """Delete temporary files of killed processes, which can leave gigabytes on a volume that outlives the pod."""
    oldest_s = time.time() - _STALE_TEMPORARY_S
    for temporary in folder.glob(f"{OWN_PREFIX}*.tmp"):
        with suppress(OSError):
            # a live writer modifies its file more often than this: its read timeout is at most 10 minutes
            if temporary.stat().st_mtime < oldest_s:
                temporary.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock for `path`. The lock file stays, because removing one is unsafe on NFS."""
    _make_folder(path.parent)
    with (path.parent / f"{OWN_PREFIX}{path.name}.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_folder(folder: Path) -> None:
    """Create the folder and its parents durably."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    """Flush the folder to disk, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network and FUSE mounts cannot fsync a folder, and have no alternative
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# -- errors ---------------------------------------------------------------------------------------


@contextmanager
def local_errors(path: Path) -> Iterator[None]:
    """Translate the `OSError`s of the block into errors that name the file and the fix."""
    try:
        yield
    except OSError as error:
        raise explain(error, path) from error


def explain(error: OSError, path: Path) -> LoraTrainerError:
    """Return the error that names the file, by default `path`, the reason and the fix."""
    where = str(error.filename2 or error.filename or path)
    if Path(where).name.startswith(OWN_PREFIX):
        where = str(path)
    reason = error.strerror or str(error)
    match error.errno:
        case errno.ENOENT:
            return NotFound(f"{where}: no such file; check the path")
        case errno.ENOTDIR | errno.EEXIST:
            return ConfigError(f"{where}: got a file where a folder is expected; choose another folder or move the file away")
        case errno.EISDIR:
            return ConfigError(f"{where}: got a folder where a file is expected; choose another name or move the folder away")
        case errno.ENAMETOOLONG:
            return ConfigError(f"{where}: {reason}; choose a shorter path")
        case errno.ENOSPC | errno.EDQUOT:
            return StorageError(f"{where}: {reason}; free some space there, or use a folder on a larger volume")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return StorageError(f"{where}: {reason}; expected access as uid {os.geteuid()}: check owner, mode and mount")
        case _:
            return StorageError(f"{where}: {reason}; check the disk or the mount")

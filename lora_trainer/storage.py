"""`s3://` and `file://` with one set of semantics: exact keys, whole files, prefixes that end in `/`.

A storage is a folder named by a URI; everything in it is addressed by a key relative to that folder.
A key is either there with all its bytes or not there at all: nothing half-written is ever visible.

S3 is set up by the ordinary AWS variables and files alone, through boto3's own chain:

- credentials: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`; `AWS_PROFILE`; web identity
  (`AWS_ROLE_ARN` and `AWS_WEB_IDENTITY_TOKEN_FILE`, which is what IRSA injects); the instance's role.
- endpoint: `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`. botocore then addresses buckets by path
  (`http://host/bucket/key`), which MinIO, Ceph and the like need; without one it uses virtual hosts. To have
  virtual hosts at a custom endpoint, say `s3 = addressing_style = virtual` in the profile: botocore reads that
  from the file only.
- region: `AWS_REGION`, then `AWS_DEFAULT_REGION`, then the profile's, then `us-east-1`.
- `AWS_MAX_ATTEMPTS` (4 unless set), `AWS_RETRY_MODE`, `AWS_CA_BUNDLE`.
- `AWS_REQUEST_CHECKSUM_CALCULATION=when_required` leaves out the CRC-32 of each upload, for an old store that
  refuses the header.

Bytes are held to a CRC-32 on their way up, which the store verifies (botocore's default), and to the SHA-256 of the
whole object on their way down, which an upload leaves in the object's metadata.

Faults of an object store that may pass are met twice. botocore repeats a request that was throttled, refused with 5xx or
broken off, which spares a large transfer its other parts. What that does not cover (a body that stalls, breaks off or is
damaged; credentials that expired; a store that is gone for a minute) repeats the whole operation, within the budgets of
`lora_trainer.patience`.

Errors: a missing key is `NotFound` (exit 3) and a missing bucket or a wrong setting is `ConfigError` (exit 2),
since trying again does not help. What may help to try again is `StorageError` (exit 6): refused, unreachable,
no credentials yet, disk full.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import hashlib
import mimetypes
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from io import BufferedRandom
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, Self, TypeVar
from urllib.parse import unquote

import structlog

from lora_trainer.errors import ConfigError, DataError, LoraTrainerError, StorageError
from lora_trainer.patience import PATIENCE, PassingError, Patience, Trying
from lora_trainer.redaction import has_user_info, redacted, remember

if TYPE_CHECKING:
    from boto3.session import Session
    from botocore.credentials import ReadOnlyCredentials
    from botocore.exceptions import BotoCoreError, ClientError
    from mypy_boto3_s3 import S3Client
    from s3transfer.futures import TransferFuture
    from s3transfer.manager import TransferManager

_log = structlog.get_logger(__name__)

_T = TypeVar("_T")

MAX_DOCUMENT_BYTES: Final = 16 * 2**20
"""Largest object that `read_bytes` takes into memory unless told: manifests and pointers are kilobytes."""

_OWN_PREFIX: Final = ".~lora-trainer."
"""Names of our temporary and lock files in a folder storage. Listings leave them out."""

# 16 MiB parts: 10,000 of them, S3's limit, make 156 GiB
_PART_BYTES: Final = 16 * 2**20
_CONNECTIONS: Final = 8
_CONNECT_TIMEOUT_S: Final = 10
# of one request, within one try of ours: enough that a large transfer at a bad hour does not lose its other parts to one
_ATTEMPTS: Final = 4
# for the threads of a transfer that was stopped; those that a silent store holds longer end behind our back
_STOP_WAIT_S: Final = 3.0
_STALE_TEMPORARY_S: Final = 3600
_SHA256_METADATA: Final = "lora-trainer-sha256"

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


class NotFound(DataError):  # noqa: N818  it reads as what it says: not found
    """A key that is not there. The message names the nearest keys that are."""


class PreconditionFailed(Exception):  # noqa: N818  HTTP's own name for it
    """A compare-and-swap lost: the key is no longer what the caller last read.

    Not a `LoraTrainerError`: the caller reads again and decides.
    """


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a download put on the disk."""

    size_bytes: int
    sha256: str
    """64 lower-case hex digits."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One line of a listing."""

    key: str
    """Relative to the storage's URI."""
    size_bytes: int
    etag: str
    """Changes when the object does; opaque, and comparable only within one storage."""


@dataclass(frozen=True, slots=True)
class ReadResult:
    """A small object, and the tag that names exactly these bytes to `write_bytes(if_match=…)`."""

    data: bytes
    etag: str
    """Opaque, and comparable only within one storage."""


class Storage(Protocol):
    """A folder of objects. Both kinds behave the same; every method may be repeated safely.

    Every method raises `ValueError` for a key that `safe_key` refuses, and `ConfigError` or `StorageError` as
    the module's docstring says.
    """

    @property
    def uri(self) -> str:
        """Canonical, ends in `/`."""

    @property
    def local_folder(self) -> Path | None:
        """The folder itself, absolute, or None where it is not on this machine."""

    @property
    def conditional_writes(self) -> bool:
        """Whether the conditions of `write_bytes` hold against writers of the same moment; True until a refusal tells otherwise."""

    def adapted(self, *, guard: Callable[[], None] | None = None, patience: Patience | None = None) -> Self:
        """The same folder, with what is given: `guard` is called before every try of every write and may refuse it by an
        exception, and failures are counted by `patience`."""

    def download(self, key: str, target: Path) -> Fetched:
        """The object as the file `target`, whole or not at all, replacing what was there.

        Raises `NotFound`. Memory use does not depend on the object's size.
        """

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        """The file `path` as the object `key`, whole or not at all, replacing what was there.

        `sha256` is what a manifest says the file is: whoever downloads it from an object store is held to that, and it is not
        hashed once more. Raises `NotFound` when there is no such file. Memory use does not depend on its size.
        """

    def upload_all(self, folder: Path, prefix: str, sha256: Mapping[str, str]) -> None:
        """The files of `folder` that are the keys of `sha256`, each as `upload` does it, in any order, several at a time."""

    def read_bytes(self, key: str, *, max_bytes: int = MAX_DOCUMENT_BYTES) -> ReadResult | None:
        """A small object, or None when the key is not there. Raises `StorageError` for more than `max_bytes`."""

    def write_bytes(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> None:
        """A small object, replacing what was there.

        With `if_match` only when the key still has that etag, with `if_absent` only when it is not there;
        raises `PreconditionFailed` otherwise. A key should be written with conditions always or never.
        """

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object below `prefix`, which is empty or ends in `/`, sorted by the key's UTF-8 bytes, streamed.

        Nothing at all under a prefix is an empty listing, not an error. Raises `ValueError` for another prefix
        (`A` would also match `AB/`) and `StorageError` for an object whose key is not a safe relative path.
        """

    def delete(self, key: str) -> None:
        """Remove the object; one that is not there is none to remove."""

    def exists(self, key: str) -> bool:
        """Whether this exact key is there."""


def open_storage(uri: str) -> Storage:
    """The storage that `uri` names: `s3://bucket/prefix/`, `file:///folder/` or a local folder.

    Nothing is contacted or created. Percent-escapes are decoded in `file://` and nowhere else.
    Raises `ConfigError` for a URI that names no folder, and for one with credentials in it.
    """
    refuse_credentials(uri)
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return FileStorage(Path(uri).expanduser())
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if not slash or host not in ("", "localhost"):
            raise ConfigError(f"{uri}: got '{host}' where a host would be; expected file:/// with three slashes and a full path")
        return FileStorage(Path("/" + unquote(path)))
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        return S3Storage(bucket, prefix)
    raise ConfigError(f"{uri}: unknown scheme '{scheme}://'; expected s3://bucket/prefix/, file:///folder/ or a local folder")


def refuse_credentials(uri: str) -> None:
    """Raise `ConfigError` for a URI with a user or a password in it: it would be written into manifests and logs."""
    if has_user_info(uri):
        raise ConfigError(
            f"{redacted(uri)}: got a user or a password in a URI, expected none: manifests and logs name URIs; "
            "credentials belong into variables of their own (AWS_*, OPENAI_API_KEY) or into a profile"
        )


def split_uri(uri: str) -> tuple[str, str]:
    """(URI of the folder, key) of a URI that names one object, such as `s3://bucket/prefix/train.jsonl`.

    Raises `ConfigError` when it names a folder or a bucket, or holds credentials.
    """
    refuse_credentials(uri)
    scheme, separator, rest = uri.rpartition("://")
    folder, slash, key = rest.rpartition("/")
    if not key or (separator and not slash):
        raise ConfigError(f"{uri}: names no object; expected one such as s3://bucket/prefix/name.jsonl")
    if scheme == "file":
        key = unquote(key)
    try:
        safe_key(key)
    except ValueError as error:
        raise ConfigError(f"{uri}: {error}") from None
    return f"{scheme}{separator}{folder}{slash}" or "./", key


def safe_key(key: str) -> str:
    """`key` itself, when it stays inside a folder and means the same on a disk and in S3.

    For keys that come from outside, such as a manifest. Raises `ValueError` for an empty or absolute key, for
    empty, `.` or `..` segments, backslashes, control characters and text that is not valid Unicode.
    """
    problem = _unsafe(key)
    if problem:
        raise ValueError(f"unsafe key {key!r}: {problem}; expected a relative path such as 'runs/A/manifest.json'")
    return key


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, 64 lower-case hex digits. Raises `NotFound` or `StorageError`."""
    with _local_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unsafe(key: str) -> str | None:
    if not key:
        return "it is empty"
    if key.startswith("/"):
        return "it is absolute"
    if "\\" in key or any(ord(character) < 32 or ord(character) == 127 for character in key):
        return "it has a backslash or a control character"
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            return f"it has the segment '{segment}'"
    try:
        key.encode("utf-8")
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    return None


def _checked_prefix(prefix: str) -> str:
    if prefix and not prefix.endswith("/"):
        raise ValueError(f"prefix {prefix!r} must be empty or end in '/': 'A' would also match 'AB/'")
    if prefix:
        safe_key(prefix.removesuffix("/"))
    return prefix


def _no_guard() -> None:
    pass


def _check_one_condition(if_match: str | None, if_absent: bool) -> None:
    if if_match is not None and if_absent:
        raise ValueError("if_match and if_absent exclude each other")


def _not_found(where: str, key: str, folder_uri: str, names: Sequence[str] | None) -> NotFound:
    """`names` are those in the key's own folder, or None where they could not be listed."""
    wanted = key.rpartition("/")[2]
    if names is None:
        hint = "its folder may not be listed with these credentials, so check the name by hand"
    elif not names:
        hint = f"nothing is in {folder_uri}; check the folder, or put the file there"
    elif close := difflib.get_close_matches(wanted, names, n=3, cutoff=0.6):
        hint = f"the nearest names in {folder_uri} are {', '.join(close)}"
    else:
        hint = f"{folder_uri} holds {', '.join(islice(sorted(names), 3))}{' and more' if len(names) > 3 else ''}"
    return NotFound(f"{where}: not found; {hint}")


# ---------------------------------------------------------------------------------------------- local disk


@contextmanager
def _local_errors(path: Path) -> Iterator[None]:
    """Says which file, and what to do about it, when the disk refuses."""
    try:
        yield
    except OSError as error:
        raise _explain_local(error, path) from error


def _explain_local(error: OSError, path: Path) -> LoraTrainerError:
    where = str(error.filename2 or error.filename or path)
    if Path(where).name.startswith(_OWN_PREFIX):
        where = str(path)
    said = error.strerror or str(error)
    match error.errno:
        case errno.ENOENT:
            return NotFound(f"{where}: no such file; check the path")
        case errno.ENOTDIR | errno.EEXIST:
            return ConfigError(f"{where}: got a file where a folder is expected; choose another folder or move the file away")
        case errno.EISDIR:
            return ConfigError(f"{where}: got a folder where a file is expected; choose another name or move the folder away")
        case errno.ENAMETOOLONG:
            return ConfigError(f"{where}: {said}; choose a shorter path")
        case errno.ENOSPC | errno.EDQUOT:
            return StorageError(f"{where}: {said}; free some space there, or use a folder on a larger volume")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return StorageError(f"{where}: {said}; expected to be allowed this as uid {os.geteuid()}: check owner, mode and mount")
        case _:
            return StorageError(f"{where}: {said}; check the disk or the mount")


def _make_folder(folder: Path) -> None:
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network and FUSE mounts have no fsync for folders; they have nothing better to offer either
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _replacing(target: Path, *, is_new: bool = False) -> Iterator[BufferedRandom]:
    """A file that becomes `target` when the block ends well, and leaves no trace when it does not.

    `is_new`: raises `FileExistsError` if there is one by then.
    """
    _make_folder(target.parent)
    _remove_stale_temporaries(target.parent)
    temporary = target.parent / f"{_OWN_PREFIX}{secrets.token_hex(8)}.tmp"
    try:
        # "x": umask decides the mode, unlike tempfile's 0600, which nobody else could read once published
        with temporary.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            # unlike a rename, a link replaces nothing
            target.hardlink_to(temporary)
            temporary.unlink()
        else:
            temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _remove_stale_temporaries(folder: Path) -> None:
    """What a killed process left: on a volume that outlives the pod, gigabytes a time."""
    oldest_s = time.time() - _STALE_TEMPORARY_S
    for temporary in folder.glob(f"{_OWN_PREFIX}*.tmp"):
        with suppress(OSError):
            # one that is being written was touched within the last read timeout
            if temporary.stat().st_mtime < oldest_s:
                temporary.unlink()


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Holds the lock file beside `path`. It stays: taking a lock file away safely is not possible on NFS."""
    _make_folder(path.parent)
    with (path.parent / f"{_OWN_PREFIX}{path.name}.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class FileStorage:
    """A folder on this machine. It need not exist: like a prefix, it comes with its first object."""

    def __init__(self, folder: Path) -> None:
        """Raises `ConfigError` when `folder` is a file."""
        self._folder = Path(os.path.normpath(folder.absolute()))
        self._guard: Callable[[], None] = _no_guard
        with _local_errors(self._folder):
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

    def adapted(self, *, guard: Callable[[], None] | None = None, patience: Patience | None = None) -> Self:
        other = copy(self)
        other._guard = guard or self._guard
        return other

    def download(self, key: str, target: Path) -> Fetched:
        path = self._path(key)
        if not self.exists(key):
            raise self._not_found(key)
        size_bytes, digest = 0, hashlib.sha256()
        with _local_errors(path), path.open("rb") as source, _local_errors(target), _replacing(target) as file:
            while chunk := source.read(2**20):
                digest.update(chunk)
                size_bytes += file.write(chunk)
        return Fetched(size_bytes, digest.hexdigest())

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        target = self._path(key)
        with _local_errors(path), path.open("rb") as source, _local_errors(target), _replacing(target) as file:
            shutil.copyfileobj(source, file, 2**20)
            self._guard()

    def upload_all(self, folder: Path, prefix: str, sha256: Mapping[str, str]) -> None:
        # one disk
        for name in sha256:
            self.upload(folder / name, prefix + name)

    def read_bytes(self, key: str, *, max_bytes: int = MAX_DOCUMENT_BYTES) -> ReadResult | None:
        path = self._path(key)
        with _local_errors(path):
            try:
                with path.open("rb") as file:
                    data = file.read(max_bytes + 1)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                # a folder of that name is no object, exactly as in S3
                return None
        if len(data) > max_bytes:
            raise _too_large(str(path), max_bytes)
        return ReadResult(data, hashlib.sha256(data).hexdigest())

    def write_bytes(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> None:
        path = self._path(key)
        _check_one_condition(if_match, if_absent)
        self._guard()
        with _local_errors(path):
            if if_match is None and not if_absent:
                self._replace(path, data)
                return
            if if_absent and self._is_created(path, data):
                return
            with _exclusive(path):
                current = sha256_of(path) if path.is_file() else None
                if current != if_match:
                    raise PreconditionFailed(f"{path}: no longer what was last read")
                self._replace(path, data)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        prefix = _checked_prefix(prefix)
        return self._walk(self._folder / prefix, prefix)

    def delete(self, key: str) -> None:
        path = self._path(key)
        self._guard()
        with _local_errors(path), suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            path.unlink()

    def exists(self, key: str) -> bool:
        path = self._path(key)
        with _local_errors(path):
            return path.is_file()

    def _path(self, key: str) -> Path:
        return self._folder / safe_key(key)

    @staticmethod
    def _replace(path: Path, data: bytes) -> None:
        with _replacing(path) as file:
            file.write(data)

    @staticmethod
    def _is_created(path: Path, data: bytes) -> bool:
        """Needs no lock file, which would stay in a published folder; False where the file system has no links."""
        try:
            with _replacing(path, is_new=True) as file:
                file.write(data)
        except FileExistsError:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from None
            if not path.is_file():
                raise
            raise PreconditionFailed(f"{path}: no longer what was last read") from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            return False
        return True

    def _walk(self, folder: Path, prefix: str) -> Iterator[ObjectInfo]:
        with _local_errors(folder):
            try:
                with os.scandir(folder) as found:
                    # a folder sorts as its name with "/", so that the walk as a whole is in the order of the keys
                    entries = sorted(
                        (os.fsencode(entry.name) + (b"/" if entry.is_dir(follow_symlinks=False) else b""), entry)
                        for entry in found
                        if not entry.name.startswith(_OWN_PREFIX)
                    )
            except (FileNotFoundError, NotADirectoryError):
                return
        for name, entry in entries:
            key = prefix + entry.name
            if name.endswith(b"/"):
                yield from self._walk(Path(entry.path), key + "/")
                continue
            with _local_errors(Path(entry.path)):
                # a link to a folder is left out: what it shows has its own key already, or lies outside
                status = entry.stat() if entry.is_file() else None
            if status is not None:
                yield ObjectInfo(_listed_key(key, str(folder)), status.st_size, f"{status.st_mtime_ns}-{status.st_size}")

    def _not_found(self, key: str) -> NotFound:
        folder = self._path(key).parent
        names: list[str] = []
        with suppress(OSError), os.scandir(folder) as found:
            names = [entry.name + ("/" if entry.is_dir() else "") for entry in islice(found, 1000)]
        return _not_found(str(self._path(key)), key, f"{folder}/", names)


def _listed_key(key: str, where: str) -> str:
    problem = _unsafe(key)
    if problem:
        raise StorageError(f"{where}: holds an object called {key!r}: {problem}; rename or remove it")
    return key


def _too_large(where: str, max_bytes: int) -> StorageError:
    return StorageError(f"{where}: got more than the {max_bytes:,} bytes expected; it is not what belongs under this name")


# ------------------------------------------------------------------------------------------------------ S3


class S3Storage:
    """A prefix of a bucket. The client is made by the first request."""

    def __init__(self, bucket: str, prefix: str) -> None:
        """Raises `ConfigError` for a bucket name or prefix that cannot be."""
        prefix = prefix if not prefix or prefix.endswith("/") else prefix + "/"
        if not _BUCKET.fullmatch(bucket):
            raise ConfigError(f"s3://{bucket}/{prefix}: got '{bucket}' as the bucket; expected s3://bucket/prefix/")
        if prefix and (problem := _unsafe(prefix.removesuffix("/"))):
            raise ConfigError(f"s3://{bucket}/{prefix}: cannot use this prefix: {problem}; expected s3://bucket/prefix/")
        self._bucket = bucket
        self._prefix = prefix
        self._bucket_seen = False
        self._conditional_writes = True
        self._guard: Callable[[], None] = _no_guard
        self._patience = PATIENCE

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}"

    @property
    def local_folder(self) -> Path | None:
        return None

    @property
    def conditional_writes(self) -> bool:
        return self._conditional_writes

    def adapted(self, *, guard: Callable[[], None] | None = None, patience: Patience | None = None) -> Self:
        other = copy(self)
        # the guard is part of it
        other.__dict__.pop("_client", None)
        other._guard, other._patience = guard or self._guard, patience or self._patience
        return other

    def download(self, key: str, target: Path) -> Fetched:
        name = self._name(key)
        with _local_errors(target):
            return self._persist(key, lambda _: self._fetch(key, name, target), kept=f"{target} is as it was before")

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        name = self._name(key)
        with _local_errors(path):
            size_bytes, digest = path.stat().st_size, sha256 or sha256_of(path)

            def send(again: bool) -> None:
                # a try may have done it and lost only the answer
                if not (again and self._holds(name, size_bytes, digest)):
                    with self._transfers() as manager:
                        manager.upload(str(path), self._bucket, name, extra_args=_described(key, digest)).result()

            self._persist(key, send, kept=f"{path} is kept")

    def upload_all(self, folder: Path, prefix: str, sha256: Mapping[str, str]) -> None:
        targets = {name: self._name(prefix + name) for name in sha256}
        left = dict(sha256)
        # one try at all of them; whatever it met is met again, with patience and in words, by those that are left
        with suppress(Exception), self._transfers() as manager:
            sent = {
                name: manager.upload(str(folder / name), self._bucket, target, extra_args=_described(name, sha256[name]))
                for name, target in targets.items()
            }
            for name, future in sent.items():
                with suppress(Exception):
                    future.result()
                    del left[name]
        for name, digest in left.items():
            self.upload(folder / name, prefix + name, sha256=digest)

    def read_bytes(self, key: str, *, max_bytes: int = MAX_DOCUMENT_BYTES) -> ReadResult | None:
        from botocore.exceptions import ClientError

        name = self._name(key)

        def read(_: bool) -> ReadResult | None:
            try:
                return self._read_whole(key, name, max_bytes)
            except ClientError as error:
                if _status(error) == 404 and _code(error) != "NoSuchBucket":
                    return None
                raise

        return self._persist(key, read)

    def write_bytes(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> None:
        from botocore.exceptions import ClientError

        name = self._name(key)
        _check_one_condition(if_match, if_absent)
        condition = {"IfMatch": if_match} if if_match is not None else {"IfNoneMatch": "*"} if if_absent else {}
        if not self._conditional_writes and condition:
            self._check_then_write(key, data, if_match)
            return
        maybe_written = False

        def write(again: bool) -> str | None:
            nonlocal maybe_written
            try:
                self._put(key, name, data, condition)
            except ClientError as error:
                maybe_written = again or error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                lost = _status(error) in (409, 412) and _code(error) not in _PASSING
                if condition and (lost or _code(error) in ("NotImplemented", "NoSuchKey")):
                    return _code(error)
                raise
            return None

        refused = self._persist(key, write)
        if refused == "NotImplemented":
            self._without_conditional_writes("NotImplemented")
            self._check_then_write(key, data, if_match)
        elif refused is not None:
            self._settle_conflict(key, data, if_match, maybe_written=maybe_written)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._pages(_checked_prefix(prefix))

    def delete(self, key: str) -> None:
        name = self._name(key)
        self._persist(key, lambda _: self._client.delete_object(Bucket=self._bucket, Key=name))

    def exists(self, key: str) -> bool:
        from botocore.exceptions import ClientError

        name = self._name(key)

        def look(_: bool) -> bool:
            try:
                self._client.head_object(Bucket=self._bucket, Key=name)
            except ClientError as error:
                if _status(error) != 404:
                    raise
                self._require_bucket()
                return False
            return True

        return self._persist(key, look)

    # -- tries

    def _persist(self, key: str, attempt: Callable[[bool], _T], *, kept: str = "", operation_key: bool = True) -> _T:
        """What `attempt` gives, tried again while its faults may pass; it is told whether it was tried before.

        `kept` says in words what is lost by none of it.
        """
        trying = Trying(self._patience)
        try:
            while True:
                try:
                    with self._explained(key, operation_key=operation_key):
                        return attempt(trying.failures > 0)
                except _RefusedCredentialsError as error:
                    if not self._renew_credentials(error):
                        raise StorageError(error.problems) from error
                    fault: PassingError = error
                except _DamagedError as error:
                    if isinstance(before := trying.last, _DamagedError) and before.got == error.got:
                        # what is damaged on its way is damaged in another place each time
                        raise StorageError(f"{error}; got the same wrong bytes twice, so the object itself is damaged") from error
                    fault = error
                except PassingError as error:
                    fault = error
                pause_s = trying.failed(fault)
                if pause_s is None:
                    raise StorageError("; ".join(filter(None, (str(fault), trying.summary, kept)))) from fault
                _log.warning(
                    "storage_retry", uri=self._where(key), problem=str(fault), failures=trying.failures, pause_s=round(pause_s, 1)
                )
                time.sleep(pause_s)
        finally:
            trying.ended()

    def _renew_credentials(self, refused: _RefusedCredentialsError) -> bool:
        """Ask the chain anew, as if the process had just begun. Gives whether another try can go better."""
        before, _ = self._credentials()
        for made in ("_client", "_session"):
            self.__dict__.pop(made, None)
        try:
            with self._explained(""):
                now, method = self._credentials()
        except PassingError:
            return True
        # those of a variable stay what they are; a file, a process or a role may have new ones in a moment
        return now != before or (refused.kind == "expired" and method != "env")

    def _credentials(self) -> tuple[ReadOnlyCredentials | None, str]:
        """Those that the chain gives now, and where from."""
        try:
            found = self._session.get_credentials()
            if found is None:
                return None, ""
            frozen = found.get_frozen_credentials()
            # a profile's or a role's are in no variable
            remember(frozen.access_key, frozen.secret_key, frozen.token)
            return frozen, found.method
        except OSError as error:
            raise StorageError(
                f"{self.uri}: cannot read the AWS credentials: {error.filename}: {error.strerror}; "
                "check AWS_WEB_IDENTITY_TOKEN_FILE and the mounted service-account token"
            ) from error

    # -- requests

    @cached_property
    def _session(self) -> Session:
        import boto3.session
        import botocore.session

        core = botocore.session.Session()
        # botocore reads AWS_DEFAULT_REGION only; every other AWS SDK, and IRSA, goes by AWS_REGION
        region = os.environ.get("AWS_REGION") or core.get_config_variable("region") or "us-east-1"
        return boto3.session.Session(botocore_session=core, region_name=region)

    @cached_property
    def _client(self) -> S3Client:
        from botocore.config import Config

        # boto3 keeps its botocore session to itself, which alone knows these
        core = self._session._session
        stall_timeout_s = PATIENCE.settings.stall_timeout_s
        config = Config(
            connect_timeout=min(_CONNECT_TIMEOUT_S, stall_timeout_s),
            read_timeout=stall_timeout_s,
            retries={
                "mode": core.get_config_variable("retry_mode") or "standard",
                "total_max_attempts": core.get_config_variable("max_attempts") or _ATTEMPTS,
            },
            tcp_keepalive=True,
            max_pool_connections=2 * _CONNECTIONS,
            user_agent_extra="lora-trainer",
        )
        # here, and not in the first request, where a missing token file could be taken for a missing data file
        self._credentials()
        client = self._session.client("s3", config=config)
        for operation in _WRITES:
            # once for each try, botocore's own included
            client.meta.events.register(f"before-send.s3.{operation}", lambda **_: self._guard())
        return client

    @contextmanager
    def _transfers(self) -> Iterator[TransferManager]:
        from boto3.s3.transfer import TransferConfig, create_transfer_manager

        config = TransferConfig(
            multipart_threshold=_PART_BYTES,
            multipart_chunksize=_PART_BYTES,
            max_concurrency=_CONNECTIONS,
            # of 256 KiB, what a disk slower than the network leaves in memory: 32 MiB instead of 250
            max_io_queue=128,
            # the native client, where it happens to be installed, ignores most of these settings
            preferred_transfer_client="classic",
        )
        manager = create_transfer_manager(self._client, config)
        try:
            yield manager
        except BaseException as error:
            # its own way out waits for every thread, however long the store is silent
            leave = (type(error), error, error.__traceback__)
            stopping = threading.Thread(target=manager.__exit__, args=leave, name="transfer-stop", daemon=True)
            stopping.start()
            stopping.join(_STOP_WAIT_S)
            raise
        manager.shutdown()

    def _fetch(self, key: str, name: str, target: Path) -> Fetched:
        head = self._client.head_object(Bucket=self._bucket, Key=name)
        pinned = _pinned_to(head["ContentLength"], head["ETag"])
        with _replacing(target) as file:
            with self._transfers() as manager:
                manager.download(self._bucket, name, file, subscribers=[pinned]).result()
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            # ranges carry no checksum of the store, so large objects are held to the one that `upload` left
            self._check(key, (size_bytes, sha256), (head["ContentLength"], head["Metadata"].get(_SHA256_METADATA, sha256)))
        return Fetched(size_bytes, sha256)

    def _check(self, key: str, got: tuple[int, str], expected: tuple[int, str]) -> None:
        """Sizes and SHA-256s."""
        if got != expected:
            raise _DamagedError(
                f"{self._where(key)}: got {got[0]:,} bytes with SHA-256 {got[1]}, expected {expected[0]:,} with {expected[1]}: "
                "replaced while it was read, or damaged; run it again, and upload the object anew if it stays so",
                got[1],
            )

    def _holds(self, name: str, size_bytes: int, sha256: str) -> bool:
        from botocore.exceptions import ClientError

        try:
            head = self._client.head_object(Bucket=self._bucket, Key=name)
        except ClientError:
            # whatever it is, the upload is told it, too
            return False
        return (head["ContentLength"], head["Metadata"].get(_SHA256_METADATA)) == (size_bytes, sha256)

    def _put(self, key: str, name: str, data: bytes, condition: dict[str, str]) -> None:
        arguments: dict[str, Any] = {**_described(key, hashlib.sha256(data).hexdigest()), **condition}
        self._client.put_object(Bucket=self._bucket, Key=name, Body=data, ContentLength=len(data), **arguments)

    def _read_whole(self, key: str, name: str, max_bytes: int) -> ReadResult:
        response = self._client.get_object(Bucket=self._bucket, Key=name)
        data = bytearray()
        # to the very end: only there does botocore compare length and checksum
        while chunk := response["Body"].read(2**16):
            data += chunk
            if len(data) > max_bytes:
                response["Body"].close()
                raise _too_large(self._where(key), max_bytes)
        sha256 = hashlib.sha256(data).hexdigest()
        # a store that is told no checksums, or keeps none, still has this one
        self._check(key, (len(data), sha256), (response["ContentLength"], response["Metadata"].get(_SHA256_METADATA, sha256)))
        return ReadResult(bytes(data), response["ETag"])

    def _pages(self, prefix: str) -> Iterator[ObjectInfo]:
        arguments: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        while True:
            # a page at a time: a fault does not begin the listing anew
            page = self._persist(prefix, lambda _: self._client.list_objects_v2(**arguments), operation_key=False)
            for found in page.get("Contents", []):
                key = found["Key"].removeprefix(self._prefix)
                # the empty objects that consoles make to show a folder
                if not key or (key.endswith("/") and not found["Size"]):
                    continue
                yield ObjectInfo(_listed_key(key, self.uri), found["Size"], found.get("ETag", ""))
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def _require_bucket(self) -> None:
        """A HEAD does not tell a missing key from a missing bucket, so this does, once."""
        from botocore.exceptions import ClientError

        if self._bucket_seen:
            return
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            if _status(error) == 404:
                raise self._no_bucket() from error
            # a role that may not ask about the bucket has still been told, by the 404, that the key is missing
        self._bucket_seen = True

    # -- conditional writes where the store has none

    def _settle_conflict(self, key: str, data: bytes, if_match: str | None, *, maybe_written: bool) -> None:
        """What a refused condition means: lost, or already done by us, or a store that cannot compare."""
        current = self.read_bytes(key)
        if maybe_written and current is not None and current.data == data:
            # an earlier attempt was written and its answer lost: this one then met our own object
            return
        if if_match is not None and current is not None and current.etag == if_match:
            # older Ceph answers 412 to an If-Match that does match
            self._without_conditional_writes("refused a matching If-Match")
            self._check_then_write(key, data, if_match)
            return
        raise PreconditionFailed(f"{self._where(key)}: no longer what was last read")

    def _without_conditional_writes(self, reason: str) -> None:
        self._conditional_writes = False
        _log.warning("storage_conditional_writes_unsupported", uri=self.uri, reason=reason)

    def _check_then_write(self, key: str, data: bytes, if_match: str | None) -> None:
        """The next best: two writers within one round trip of each other are not told apart."""
        current = self.read_bytes(key)
        if (current.etag if current else None) != if_match:
            raise PreconditionFailed(f"{self._where(key)}: no longer what was last read")
        self._persist(key, lambda _: self._put(key, self._name(key), data, {}))

    # -- names and errors

    def _name(self, key: str) -> str:
        return self._prefix + safe_key(key)

    def _where(self, key: str) -> str:
        return self.uri + key

    @property
    def _endpoint(self) -> str:
        """For messages, so it must not fail: the client may be what could not be made."""
        named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        client = self.__dict__.get("_client")
        return redacted(client.meta.endpoint_url if client else named or "the AWS endpoint")

    @contextmanager
    def _explained(self, key: str, *, operation_key: bool = True) -> Iterator[None]:
        """Turns what boto3 raises about `key` (or about a prefix) into this project's errors."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError
        from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

        try:
            yield
        except ClientError as error:
            if operation_key:
                self._require_reason(error, key)
            raise self._explain_refusal(error, key) from error
        except BotoCoreError as error:
            raise self._explain_failure(error, key) from error
        except ResponseParserError as error:
            raise PassingError(
                f"{self._where(key)}: {self._endpoint} sent an answer that breaks off or is none of S3's; "
                "check AWS_ENDPOINT_URL and the store's health, then run it again"
            ) from error
        except RetriesExceededError as error:
            raise PassingError(
                f"{self._where(key)}: the transfer from {self._endpoint} kept breaking off: "
                f"{redacted(str(error.last_exception))}; check the network, then run it again"
            ) from error
        except S3DownloadFailedError as error:
            raise StorageError(f"{self._where(key)}: replaced while it was read; run it again") from error
        except (ConnectionError, TimeoutError) as error:
            raise PassingError(f"{self._where(key)}: lost the connection to {self._endpoint}: {error}; run it again") from error
        except ValueError as error:
            # botocore's way to refuse an endpoint or an AWS_* value; ours are raised before this block is entered
            raise ConfigError(f"{self._where(key)}: {redacted(str(error))}; check the AWS_* variables and the profile") from error

    def _require_reason(self, error: ClientError, key: str) -> None:
        """The answer to a HEAD has no body, hence no reason: a GET of one byte is refused with one, which is raised instead."""
        if error.operation_name != "HeadObject" or _status(error) in (404, 500, 502, 503, 504):
            return
        with self._explained(key, operation_key=False):
            self._client.get_object(Bucket=self._bucket, Key=self._name(key), Range="bytes=0-0")["Body"].close()

    def _no_bucket(self) -> ConfigError:
        return ConfigError(
            f"{self.uri}: no bucket called '{self._bucket}' at {self._endpoint}; check the name, the endpoint "
            "(AWS_ENDPOINT_URL) and the account (AWS_PROFILE), or make the bucket first"
        )

    def _missing(self, key: str) -> LoraTrainerError:
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        folder = key.rpartition("/")[0]
        prefix = self._prefix + (folder + "/" if folder else "")
        names: list[str] | None = None
        try:
            page = self._client.list_objects_v2(Bucket=self._bucket, Prefix=prefix, Delimiter="/", MaxKeys=1000)
        except ClientError as error:
            if _code(error) == "NoSuchBucket":
                return self._no_bucket()
        except (BotoCoreError, ResponseParserError):
            # the listing only serves the message
            pass
        else:
            found = [item["Key"] for item in page.get("Contents", [])] + [item["Prefix"] for item in page.get("CommonPrefixes", [])]
            names = [name.removeprefix(prefix) for name in found if name != prefix]
        return _not_found(self._where(key), key, f"s3://{self._bucket}/{prefix}", names)

    def _explain_refusal(self, error: ClientError, key: str) -> LoraTrainerError:
        code, status, where = _code(error), _status(error), self._where(key)
        said = redacted(error.response["Error"].get("Message") or "")
        got = f"HTTP {status} {code}" + (f" ({said})" if said and said != code else "")
        passing = StorageError if code not in _PASSING and (status < 500 or status == 501) else PassingError
        if error.operation_name.startswith("AssumeRole"):
            # an expired token is one that the cluster is about to replace
            return (PassingError if code in _EXPIRED else passing)(
                f"{where}: the role in AWS_ROLE_ARN could not be assumed: {got}; check the role's trust policy "
                "and the service account's annotation"
            )
        if code == "NoSuchBucket":
            return self._no_bucket()
        if code in ("NoSuchKey", "404"):
            return self._missing(key)
        if code in _EXPIRED:
            return _RefusedCredentialsError(
                f"{where}: the credentials have expired: {got}; renew them (AWS_SESSION_TOKEN, or 'aws sso login'); "
                "a role's are renewed by themselves, so there check the clock",
                "expired",
            )
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidSecurity", "NotSignedUp"):
            return _RefusedCredentialsError(
                f"{where}: {self._endpoint} does not accept the credentials: {got}; check that AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY belong together and to this endpoint",
                "wrong",
            )
        if code == "RequestTimeTooSkewed":
            return StorageError(f"{where}: this machine's clock is off: {got}; set it, then run it again")
        if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"):
            return ConfigError(f"{where}: the bucket is in another region: {got}; set AWS_REGION to the bucket's own")
        if code == "InvalidBucketName":
            return ConfigError(f"{where}: {got}; expected s3://bucket/prefix/ with an existing bucket")
        if code == "InvalidObjectState":
            return DataError(f"{where}: the object is archived: {got}; restore it to a readable storage class first")
        if status == 403:
            action = _ACTIONS.get(error.operation_name, f"s3:{error.operation_name}")
            missing = {
                "s3:GetObject": "; without s3:ListBucket a missing key is refused the same way, so check its name as well",
                "s3:ListBucket": "; checkpoints and a base's files are found by listing, only training data can do without",
            }.get(action, "")
            resource = f"arn:aws:s3:::{self._bucket}" + ("" if action == "s3:ListBucket" else f"/{self._prefix}{key}")
            return StorageError(f"{where}: {action} refused: {got}; expected it to be allowed on {resource}{missing}")
        attempts = error.response["ResponseMetadata"].get("RetryAttempts", 0) + 1
        times = "once" if attempts == 1 else f"{attempts} times"
        return passing(
            f"{where}: {error.operation_name} failed: {self._endpoint} answered {got}, asked {times}; "
            "check the store's health, then run it again"
        )

    def _explain_failure(self, error: BotoCoreError, key: str) -> LoraTrainerError:
        from botocore import exceptions as raised

        where, said = self._where(key), redacted(str(error))
        match error:
            case raised.NoCredentialsError():
                return StorageError(
                    f"{where}: no AWS credentials found; expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE "
                    "with ~/.aws/credentials, or a role (AWS_ROLE_ARN with AWS_WEB_IDENTITY_TOKEN_FILE, or the instance's)"
                )
            case raised.PartialCredentialsError():
                return ConfigError(f"{where}: half of the AWS credentials is missing: {said}; set both, or neither")
            case (
                raised.CredentialRetrievalError()
                | raised.MetadataRetrievalError()
                | raised.TokenRetrievalError()
                | raised.SSOError()
                | raised.LoginError()
            ):
                return PassingError(f"{where}: the AWS credentials could not be fetched: {said}; renew them, then run it again")
            case raised.ProfileNotFound() | raised.ConfigParseError() | raised.ConfigNotFound():
                return ConfigError(f"{where}: {said}; check AWS_PROFILE and ~/.aws/config")
            case raised.FlexibleChecksumError() | raised.ChecksumError():
                # its message has both checksums
                return _DamagedError(
                    f"{where}: the bytes received do not match the store's checksum: {said}; run it again, and upload the "
                    "object anew if it stays so",
                    said,
                )
            case raised.SSLError():
                kind = StorageError if "CERTIFICATE_VERIFY_FAILED" in said else PassingError
                return kind(f"{where}: no trusted TLS connection to {self._endpoint}: {said}; AWS_CA_BUNDLE names a private CA")
            case raised.ConnectionError() | raised.HTTPClientError() | raised.IncompleteReadError():
                return PassingError(
                    f"{where}: {self._endpoint} cannot be reached: {said}; check AWS_ENDPOINT_URL, the network and the proxy"
                )
            case (
                raised.InvalidConfigError()
                | raised.InvalidRetryConfigurationError()
                | raised.InvalidChecksumConfigError()
                | raised.InvalidDefaultsMode()
                | raised.ValidationError()
                | raised.ParamValidationError()
                | raised.BaseEndpointResolverError()
                | raised.EndpointProviderError()
                | raised.InvalidEndpointConfigurationError()
                | raised.InvalidProxiesConfigError()
                | raised.InvalidS3AddressingStyleError()
                | raised.InvalidDNSNameError()
            ):
                return ConfigError(f"{where}: {said}; check the AWS_* variables and the profile")
            case _:
                return StorageError(f"{where}: {said}; check the AWS_* variables and the store, then run it again")


class _DamagedError(PassingError):
    """Other bytes than those that were stored. `got` names them."""

    def __init__(self, problem: str, got: str) -> None:
        self.got = got
        super().__init__(problem)


class _RefusedCredentialsError(PassingError):
    """Credentials that the store does not take, any more or at all."""

    def __init__(self, problem: str, kind: Literal["expired", "wrong"]) -> None:
        self.kind = kind
        super().__init__(problem)


_PASSING: Final = frozenset(
    {
        # throttled, some stores with other statuses than 503: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
        *("SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling", "ThrottlingException", "TooManyRequests", "429"),
        *("RequestLimitExceeded", "RequestThrottled", "RequestThrottledException", "BandwidthLimitExceeded", "ServerBusy"),
        # the connection, or another writer, came in between
        *("RequestTimeout", "RequestTimeoutException", "408", "IncompleteBody", "OperationAborted", "ConditionalRequestConflict"),
        # damaged on its way there, and refused by the store
        *("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"),
        # the answer that said the upload is complete was lost
        "NoSuchUpload",
    }
)
_EXPIRED: Final = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})

_WRITES: Final = ("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "DeleteObject")
"""Requests that change what others see. An upload in parts that is broken off may always be cleared away."""

_ACTIONS: Final = {
    "HeadObject": "s3:GetObject",
    "HeadBucket": "s3:ListBucket",
    "ListObjectsV2": "s3:ListBucket",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
}
"""The permission behind each request, where the two have different names."""


def _described(key: str, sha256: str) -> dict[str, Any]:
    """What every upload carries. The type lets a browser show `report.html` straight from the store."""
    return {"ContentType": mimetypes.guess_type(key)[0] or "application/octet-stream", "Metadata": {_SHA256_METADATA: sha256}}


def _pinned_to(size_bytes: int, etag: str) -> Any:
    """Lets a transfer use the size and tag of the HEAD that was made already, and fail if the object is replaced."""
    from s3transfer.subscribers import BaseSubscriber

    class Pinned(BaseSubscriber):
        def on_queued(self, future: TransferFuture, **_: Any) -> None:
            future.meta.provide_transfer_size(size_bytes)
            future.meta.provide_object_etag(etag)

    return Pinned()


def _code(error: ClientError) -> str:
    # an empty element in the answer is None here
    return error.response["Error"].get("Code") or ""


def _status(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]

"""The storage interface that S3 and local folders share, and the types that cross it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, Protocol, Self

from lora_trainer.errors import DataError, StorageError
from lora_trainer.store.keys import unsafe_reason
from lora_trainer.store.retry import RetryBudget

MAX_DOCUMENT_BYTES: Final = 16 * 2**20
"""Largest object that `read_bytes` takes into memory unless told: manifests and pointers are kilobytes."""


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

    def adapted(self, *, guard: Callable[[], None] | None = None, retry_budget: RetryBudget | None = None) -> Self:
        """Return a storage for the same folder that another thread may use, with what is given replaced.

        `guard` is called before every attempt of every write and refuses it by raising. Retries draw on `retry_budget`.
        """

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


def no_guard() -> None:
    pass


def check_one_condition(if_match: str | None, if_absent: bool) -> None:
    if if_match is not None and if_absent:
        raise ValueError("if_match and if_absent exclude each other")


def not_found(where: str, key: str, folder_uri: str, names: Sequence[str] | None) -> NotFound:
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


def listed_key(key: str, where: str) -> str:
    problem = unsafe_reason(key)
    if problem:
        raise StorageError(f"{where}: holds an object called {key!r}: {problem}; rename or remove it")
    return key


def too_large(where: str, max_bytes: int) -> StorageError:
    return StorageError(f"{where}: got more than the {max_bytes:,} bytes expected; it is not what belongs under this name")

"""The storage interface that S3 and local folders implement, with the types and messages that both use.

A storage is a folder named by a URI. Keys address its objects, relative to that folder. Both kinds behave the same:

- Keys are exact, and prefixes end in `/`.
- An object is visible with all its bytes or not at all.
- A missing key raises `NotFound` (exit 3). A missing bucket or a wrong setting raises `ConfigError` (exit 2): a retry would fail
  the same way. Refused access, an unreachable store, missing credentials and a full disk raise `StorageError` (exit 6): a later
  attempt may succeed.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, Protocol, Self

from lora_trainer.errors import DataError, StorageError
from lora_trainer.store.keys import unsafe_reason
from lora_trainer.store.retry import RetryBudget

MAX_DOCUMENT_BYTES: Final = 16 * 2**20
"""Default size limit of `read_bytes`. Manifests and pointers are kilobytes."""

NO_ETAG: Final = f'"{"0" * 32}"'
"""An etag that no object has."""


class NotFound(DataError):  # noqa: N818  named after the HTTP status
    """A missing key. The message suggests the nearest existing names."""


class PreconditionFailed(Exception):  # noqa: N818  HTTP's own name for it
    """A compare-and-swap lost: the object has changed since the caller read it.

    Not a `LoraTrainerError`: the caller reads again and decides.
    """


@dataclass(frozen=True, slots=True)
class Fetched:
    """A downloaded file."""

    size_bytes: int
    sha256: str
    """64 lower-case hex digits."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One entry of a listing."""

    key: str
    """Relative to the storage's URI."""
    size_bytes: int
    etag: str
    """Changes when the object changes. Opaque, and comparable only within one storage."""


@dataclass(frozen=True, slots=True)
class ReadResult:
    """A small object, with the tag that identifies its bytes for `write_bytes(if_match=…)`."""

    data: bytes
    etag: str
    """Opaque, and comparable only within one storage."""


class Storage(Protocol):
    """A folder of objects, in S3 or on this machine. Every method is safe to repeat.

    Every method raises `ValueError` for a key that `safe_key` refuses, and `ConfigError` or `StorageError` as described in
    the module docstring.
    """

    @property
    def uri(self) -> str:
        """The canonical URI, which ends in `/`."""

    @property
    def local_folder(self) -> Path | None:
        """The absolute path of the folder, or None if it is not on this machine."""

    @property
    def conditional_writes(self) -> bool:
        """Whether `write_bytes` enforces its conditions against concurrent writers. True until the store refuses one."""

    @property
    def conditions_probed(self) -> bool:
        """Whether `probe_conditional_writes` has found out about this store, through any storage of the process."""

    def adapted(self, *, guard: Callable[[], None] | None = None, retry_budget: RetryBudget | None = None) -> Self:
        """Return a storage for the same folder with another guard or retry budget, usable in another thread.

        `guard` runs before every attempt of every write, and can raise to prevent it. Connection timeouts do not change.
        """

    def download(self, key: str, target: Path) -> Fetched:
        """Download the object to the file `target`, replacing it atomically.

        Raises `NotFound`. Memory use does not depend on the object's size.
        """

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        """Upload the file `path` as the object `key`, replacing it atomically.

        `sha256` is the file's hash, for example from a manifest; without it the file is hashed here. Downloads from an object
        store are verified against it. Raises `NotFound` for a missing file. Memory use does not depend on the file's size.
        """

    def upload_all(self, folder: Path, prefix: str, sha256: Mapping[str, str]) -> None:
        """Upload the files of `folder` that `sha256` names, each as `upload` does, several at a time and in any order."""

    def copy(self, source: str, key: str, *, size_bytes: int, sha256: str) -> bool:
        """Copy the object `source` to `key` without sending its bytes, if the store can. Return whether `key` now has them.

        False leaves `key` undefined: upload the file instead, which also reports what is wrong. `size_bytes` and `sha256` are those
        that `source` was uploaded with.
        """

    def read_bytes(self, key: str, *, max_bytes: int = MAX_DOCUMENT_BYTES) -> ReadResult | None:
        """Return a small object, or None for a missing key. Raises `StorageError` for more than `max_bytes`."""

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return exactly `length` bytes of the object from the offset `start` on, in memory.

        Raises `NotFound`, and `StorageError` if the object is shorter.
        """

    def write_bytes(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> None:
        """Write a small object, replacing it atomically.

        `if_match` must be the object's current etag; with `if_absent`, the key must be missing. Otherwise raises
        `PreconditionFailed`. Do not mix conditional and unconditional writes of a key.
        """

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object below `prefix`, sorted by the UTF-8 bytes of its key.

        `prefix` is empty or ends in `/`; any other one raises `ValueError` (`A` would also match `AB/`). A prefix without
        objects yields nothing. Raises `StorageError` for an object whose key is not a safe relative path.
        """

    def delete(self, key: str) -> None:
        """Delete the object. Deleting a missing key is a no-op."""

    def exists(self, key: str) -> bool:
        """Return whether this exact key exists."""

    def probe_conditional_writes(self, key: str) -> bool:
        """Find out whether the store keeps the conditions of `write_bytes`, for `conditional_writes`, and return it.

        Some stores accept writes whose condition does not hold, others refuse some whose condition does. Writes a new object `key`,
        which the caller deletes.
        """


def no_guard() -> None:
    """Allow every write."""


def check_one_condition(if_match: str | None, if_absent: bool) -> None:
    """Raise `ValueError` if a write has both conditions."""
    if if_match is not None and if_absent:
        raise ValueError("if_match and if_absent exclude each other")


def listed_key(key: str, where: str) -> str:
    """Return a key from a listing of `where`. Raises `StorageError` if it is not a safe relative path."""
    problem = unsafe_reason(key)
    if problem:
        raise StorageError(f"{where}: holds an object called {key!r}: {problem}; rename or remove it")
    return key


def other_form(path: str, names_in: Callable[[str], Collection[str]]) -> str | None:
    """Return an existing path that differs from `path` only in Unicode normalization, or None.

    macOS writes names in NFD, and keyboards everywhere else in NFC. They look the same and are different keys. `names_in` lists a
    folder, given with its trailing slash; the names of folders in it end in a slash.
    """
    found, *segments = "", *path.split("/")
    for number, segment in enumerate(segments):
        name = segment if number == len(segments) - 1 else f"{segment}/"
        names = () if segment.isascii() else names_in(found)
        if name not in names and not segment.isascii():
            same = unicodedata.normalize("NFC", name)
            twin = next((each for each in names if unicodedata.normalize("NFC", each) == same), None)
            if twin is None:
                return None
            name = twin
        found += name
    return found if found != path else None


def in_other_form(where: str, other: str) -> NotFound:
    """Return the error for a missing name that exists as `other`, in another Unicode normalization."""
    form = next((form for form in ("NFD", "NFC") if unicodedata.is_normalized(form, other)), "a mixed form")
    return NotFound(
        f"{where}: not found; a name that looks the same is there in another Unicode form, {form} (macOS writes NFD): copy it from "
        f"here, {other}, or rename it"
    )


def not_found(where: str, key: str, folder_uri: str, names: Sequence[str] | None) -> NotFound:
    """Return the error for a missing key. `names` lists its folder, or is None if that failed."""
    wanted = unicodedata.normalize("NFC", key.rpartition("/")[2])
    by_form = {unicodedata.normalize("NFC", name): name for name in names or ()}
    if names is None:
        hint = "these credentials may not list its folder, so check the name by hand"
    elif not names:
        hint = f"no files in {folder_uri}; check the folder, or put the file there"
    elif close := difflib.get_close_matches(wanted, by_form, n=3, cutoff=0.6):
        hint = f"the nearest names in {folder_uri} are {', '.join(by_form[name] for name in close)}"
    else:
        hint = f"{folder_uri} holds {', '.join(islice(sorted(names), 3))}{' and more' if len(names) > 3 else ''}"
    return NotFound(f"{where}: not found; {hint}")


def too_large(where: str, max_bytes: int) -> StorageError:
    """Return the error for an object too large for `read_bytes`."""
    return StorageError(f"{where}: got more than {max_bytes:,} bytes, expected a small document; check what was stored there")

"""Read plain, `.gz` and `.zst` data files as streams, with a limit on the decompressed size."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

from backports.zstd import DecompressionParameter, ZstdError, ZstdFile

from lora_trainer.messages import Message

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SUFFIXES: Final = ("", ".gz", ".zst")
"""Suffixes allowed after `.jsonl` in the name of a data file."""
NAMES: Final = tuple(name + suffix for name in (".jsonl", ".ndjson") for suffix in SUFFIXES)
"""Endings of the names of data files, in lower case."""

_BUFFER_BYTES: Final = 64 * 1024
# the ratio limit ignores output up to this size: a small file of repeated records compresses well and does no harm
_HARMLESS_BYTES: Final = 16 * 2**20
# 128 MiB, the largest window of `zstd` without --long; files written with --long could make us allocate 2 GiB
_WINDOW_LOG_MAX: Final = 27

_MAGIC: Final = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}


class CorruptStreamError(ValueError):
    """The file is not valid in the format of its suffix. The message states the reason and quotes no bytes of the file."""


class DecompressedTooLargeError(ValueError):
    """The decompressed data exceeds a limit. `is_ratio` is True for the limit on the compression ratio."""

    def __init__(self, max_bytes: int, size_bytes: int, *, is_ratio: bool) -> None:
        self.max_bytes, self.size_bytes, self.is_ratio = max_bytes, size_bytes, is_ratio
        super().__init__(f"more than {max_bytes:,} bytes out of {size_bytes:,}")


def is_jsonl(name: str) -> bool:
    """Return whether a path or URI ends in `.jsonl` or `.ndjson`, compressed or not, in upper or lower case."""
    return name.lower().endswith(NAMES)


def compression_suffix(path: Path) -> str:
    """Return `.gz` or `.zst` if the name ends in it, in upper or lower case, and an empty string otherwise."""
    suffix = path.suffix.lower()
    return suffix if suffix in SUFFIXES else ""


def detect_compression(first_bytes: bytes) -> str:
    """Return the suffix, `.gz` or `.zst`, of the stream that `first_bytes` begin, or an empty string."""
    return next((suffix for suffix, magic in _MAGIC.items() if first_bytes.startswith(magic)), "")


def open_data(path: Path, max_bytes: int, max_ratio: float, suffix: str | None = None) -> BinaryIO:
    """Open `path` for reading and decompress it if it ends in `.gz` or `.zst`; `suffix` replaces the name's.

    A compressed file yields at most `max_bytes`, and at most `max_ratio` times its own size or 16 MiB, whichever is larger. A
    plain file has no limit. Memory use is constant. Raises `OSError`, or `ValueError` for a NUL in the path. Reading may also
    raise `CorruptStreamError` or `DecompressedTooLargeError`.
    """
    file = path.open("rb")
    suffix = compression_suffix(path) if suffix is None else suffix
    if not suffix:
        return file
    try:
        size_bytes = os.fstat(file.fileno()).st_size
        stream: Any = (
            gzip.GzipFile(fileobj=file)
            if suffix == ".gz"
            else ZstdFile(file, options={DecompressionParameter.window_log_max: _WINDOW_LOG_MAX})
        )
    except BaseException:
        file.close()
        raise
    by_ratio = max(_HARMLESS_BYTES, int(max_ratio * size_bytes))
    bounded = _BoundedReader(file, stream, min(max_bytes, by_ratio), size_bytes, is_ratio=by_ratio < max_bytes)
    return cast("BinaryIO", io.BufferedReader(bounded, _BUFFER_BYTES))


class _BoundedReader(io.RawIOBase):
    def __init__(self, file: BinaryIO, stream: Any, max_bytes: int, size_bytes: int, *, is_ratio: bool) -> None:
        self._file, self._stream = file, stream
        self._max_bytes, self._size_bytes, self._is_ratio = max_bytes, size_bytes, is_ratio
        self._read_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        try:
            chunk: bytes = self._stream.read1(len(view))
        except EOFError:
            raise CorruptStreamError(Message("a truncated compressed stream")) from None
        # do not chain these errors: their messages quote bytes of the file
        except (gzip.BadGzipFile, zlib.error, ZstdError):
            raise CorruptStreamError(Message("a damaged compressed stream, or data that is not compressed")) from None
        self._read_bytes += len(chunk)
        if self._read_bytes > self._max_bytes:
            raise DecompressedTooLargeError(self._max_bytes, self._size_bytes, is_ratio=self._is_ratio)
        view[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        super().close()

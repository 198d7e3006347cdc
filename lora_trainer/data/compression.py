"""Data files as they lie there: plain, `.gz` or `.zst`. Decompressed as they are read, a bounded number of bytes in all."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

from backports.zstd import DecompressionParameter, ZstdError, ZstdFile

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SUFFIXES: Final = ("", ".gz", ".zst")
"""What may stand behind `.jsonl`."""

_BUFFER_BYTES: Final = 64 * 1024
# a file of a few hundred KiB may hold one record a thousand times: too little to hurt, whatever its ratio
_HARMLESS_BYTES: Final = 16 * 2**20
# 128 MiB: all that `zstd` writes without --long, which asks its reader for up to 2 GiB
_WINDOW_LOG_MAX: Final = 27

_MAGIC: Final = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
}


class CorruptStreamError(ValueError):
    """What the file's name says it is compressed by cannot read it; the message says why, without the file's bytes."""


class DecompressedTooLargeError(ValueError):
    """More came out of a compressed file than is taken."""

    def __init__(self, most_bytes: int, size_bytes: int, *, is_ratio: bool) -> None:
        self.most_bytes, self.size_bytes, self.is_ratio = most_bytes, size_bytes, is_ratio
        super().__init__(f"more than {most_bytes:,} bytes out of {size_bytes:,}")


def is_jsonl(name: str) -> bool:
    """Whether a path or URI ends as a data file does: `.jsonl`, `.jsonl.gz` or `.jsonl.zst`."""
    return name.endswith(tuple(".jsonl" + suffix for suffix in SUFFIXES))


def compressed_by(first_bytes: bytes) -> str | None:
    """The compression that a file beginning with `first_bytes` was written by; None for what may be text."""
    return next((name for magic, name in _MAGIC.items() if first_bytes.startswith(magic)), None)


def open_data(path: Path, most_bytes: int, most_ratio: float) -> BinaryIO:
    """`path` for reading, decompressed if it ends in `.gz` or `.zst`. A plain file has no bound.

    At most `most_bytes` come out of a compressed file, and at most `most_ratio` times its own size or 16 MiB, whichever is
    more. Memory does not depend on the file. Raises `OSError`, or `ValueError` for a NUL in the path; reading raises
    `CorruptStreamError` and `DecompressedTooLargeError`, too.
    """
    file = path.open("rb")
    if path.suffix not in SUFFIXES[1:]:
        return file
    try:
        size_bytes = os.fstat(file.fileno()).st_size
        stream: Any = (
            gzip.GzipFile(fileobj=file)
            if path.suffix == ".gz"
            else ZstdFile(file, options={DecompressionParameter.window_log_max: _WINDOW_LOG_MAX})
        )
    except BaseException:
        file.close()
        raise
    by_ratio = max(_HARMLESS_BYTES, int(most_ratio * size_bytes))
    bounded = _Bounded(file, stream, min(most_bytes, by_ratio), size_bytes, is_ratio=by_ratio < most_bytes)
    return cast("BinaryIO", io.BufferedReader(bounded, _BUFFER_BYTES))


class _Bounded(io.RawIOBase):
    def __init__(self, file: BinaryIO, stream: Any, most_bytes: int, size_bytes: int, *, is_ratio: bool) -> None:
        self._file, self._stream = file, stream
        self._most_bytes, self._size_bytes, self._is_ratio = most_bytes, size_bytes, is_ratio
        self._read_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        try:
            chunk: bytes = self._stream.read1(len(view))
        except EOFError:
            raise CorruptStreamError("a compressed stream that stops in the middle") from None
        # their messages quote bytes of the file
        except (gzip.BadGzipFile, zlib.error, ZstdError):
            raise CorruptStreamError("a compressed stream that is damaged, or none at all") from None
        self._read_bytes += len(chunk)
        if self._read_bytes > self._most_bytes:
            raise DecompressedTooLargeError(self._most_bytes, self._size_bytes, is_ratio=self._is_ratio)
        view[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        super().close()

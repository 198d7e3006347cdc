"""Standard streams that never fail the work: any encoding, a closed or full stream, or a reader that has gone away.

The exit code of a command is that of its work. What can't be shown is lost, and standard error says so if it can.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TextIO, cast

from lora_trainer.errors import ConfigError, StorageError
from lora_trainer.logs import terminal_columns

if TYPE_CHECKING:
    from rich.console import Console

_ESCAPE: Final = "lora_trainer.escape"
_READER_GONE: Final = (errno.EPIPE, errno.ECONNRESET)
_WIDE_COLUMNS: Final = 10_000
"""Width of a file or a pipe: wider than any table."""


def _escape(error: UnicodeError) -> tuple[str, int]:
    r"""Escape what an encoding lacks as `\uXXXX`, in pairs beyond U+FFFF: inside a JSON string, this is the same character."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2)), error.end


class OutputStream(io.TextIOBase):
    """A stream that writes to a file descriptor at once. It escapes what its encoding lacks, and outlives write errors.

    It has no `buffer`: Click replaces an ASCII stream that has one by its own, which is UTF-8.
    """

    def __init__(self, descriptor: int, encoding: str) -> None:
        self._descriptor = descriptor
        self._encoding = encoding
        self._encoder = codecs.getincrementalencoder(encoding)(_ESCAPE)
        self.lost: OSError | None = None
        """The error that ended the stream. Everything written since then is lost."""

    # TextIOBase declares both as attributes
    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        return _ESCAPE

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            # Click tries bytes to find out what a stream takes, and the encoders of Asian encodings do not refuse them
            raise TypeError(f"expected str, got {type(text).__name__}")
        self.write_bytes(self._encoder.encode(text))
        return len(text)

    def write_bytes(self, data: bytes) -> None:
        """Write data that is already encoded."""
        while data and self.lost is None:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                # another program that shares this terminal or pipe has set it to non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.lost = error


def open_streams() -> None:
    """Replace the standard streams. A stream that the caller closed reads nothing and writes to nowhere."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # otherwise the next file that is opened would get this number, and library output
            os.open(os.devnull, os.O_RDWR)
    codecs.register_error(_ESCAPE, _escape)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    with suppress(AttributeError):
        # a strict error would end the chat; `read_lines` checks the text
        cast("io.TextIOWrapper", sys.stdin).reconfigure(errors="surrogateescape")
    sys.stdout = cast("TextIO", OutputStream(1, _encoding_of(sys.stdout)))
    sys.stderr = cast("TextIO", OutputStream(2, _encoding_of(sys.stderr)))


def _encoding_of(stream: TextIO | None) -> str:
    return stream.encoding if stream is not None else "utf-8"


def report_lost_output() -> None:
    """Say on standard error that standard output was lost, unless its reader only stopped early, as `head` does."""
    lost = is_lost(sys.stdout)
    if lost is not None and lost.errno not in _READER_GONE:
        sys.stderr.write(f"standard output was lost: {lost.strerror}; the exit code is that of the work\n")


def write_bytes(data: bytes) -> None:
    """Write data, such as JSONL, to standard output, whatever its encoding. Raise `StorageError` if a device does not take it."""
    stream = sys.stdout
    if not isinstance(stream, OutputStream):
        stream.buffer.write(data)
        return
    stream.write_bytes(data)
    if stream.lost is not None and stream.lost.errno not in _READER_GONE:
        raise StorageError(f"standard output: {stream.lost.strerror}; the data is incomplete: free some space, then run it again")


def is_lost(stream: TextIO) -> OSError | None:
    """Return the error that ended a standard stream, or None."""
    return stream.lost if isinstance(stream, OutputStream) else None


def console(file: TextIO) -> Console:
    """Return a Rich console on `file`. In a file or a pipe, tables are as wide as they need, unless COLUMNS says otherwise."""
    from rich.console import Console

    # unlike Rich, shutil does not take COLUMNS=0 for a terminal without columns; it looks at standard output, whatever `file` is
    size = shutil.get_terminal_size((_WIDE_COLUMNS, 25))
    columns = terminal_columns(file) if file.isatty() else size.columns
    # without a height, Rich ignores the width if TERM=dumb; paths may contain what Rich would take for markup
    return Console(file=file, width=columns, height=size.lines, highlight=False, markup=False, emoji=False)


def read_lines(stream: TextIO, output: TextIO) -> Iterator[str]:
    """Yield the lines of standard input, until it ends or nobody reads `output` any more.

    Raise `ConfigError` for a line that is neither UTF-8 nor in the encoding that the environment declares.
    """
    number = 0
    while is_lost(output) is None:
        try:
            line = stream.buffer.readline()
        except OSError as error:
            raise ConfigError(f"standard input: cannot be read: {error.strerror}; give it a pipe, a file or a terminal") from None
        if not line:
            return
        number += 1
        try:
            yield decoded_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, stream.encoding)
        except ConfigError as error:
            raise ConfigError([f"standard input: line {number}: {problem}" for problem in error.problems]) from None


def decoded_line(line: bytes, declared: str) -> str:
    """Decode a line as UTF-8 or else as `declared`. Raise `ConfigError` if it is neither."""
    with suppress(UnicodeDecodeError):
        return line.decode()
    # every byte is a character of Latin-1, so it proves nothing
    if codecs.lookup(declared).name not in ("utf-8", "ascii", "iso8859-1", "cp1252"):
        with suppress(UnicodeDecodeError):
            return line.decode(declared)
    raise ConfigError("not UTF-8; convert it first, such as with 'iconv -f cp949 -t utf-8', or set the terminal to UTF-8")

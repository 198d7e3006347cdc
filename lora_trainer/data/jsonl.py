"""Read records from JSONL as a stream and describe the problems of each line.

No message here quotes an instruction, a summary, an input or a reply: problems end up in logs, and training text must not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, Generic, NamedTuple, TypeVar, overload
from unicodedata import normalize

from pydantic import ValidationError

from lora_trainer.config import DEFAULT_LIMITS, LimitsConfig
from lora_trainer.data.compression import (
    CorruptStreamError,
    DecompressedTooLargeError,
    compression_suffix,
    detect_compression,
    open_data,
)
from lora_trainer.data.file_kinds import HEAD_BYTES, diagnosis, text_encoding
from lora_trainer.data.problems import IncompleteJsonError, Problem, RecordError, Severity
from lora_trainer.data.record_errors import described, error_problem, record_problems
from lora_trainer.data.records import EvaluationPrompt, StrictModel, TrainingRecord, texts_of
from lora_trainer.data.strict_json import RECORD_SHAPE, decode_json
from lora_trainer.data.text_damage import text_problems
from lora_trainer.messages import Message, counted, marked
from lora_trainer.persona.prompt import spells_control_token

_SKIP_CHUNK_BYTES: Final = 64 * 1024
_BOM: Final = b"\xef\xbb\xbf"
Record = TypeVar("Record", bound=StrictModel)


class Line(NamedTuple, Generic[Record]):
    """The result for one non-blank line: a record with any warnings, or None with the errors."""

    number: int
    """Line number from 1, counting blank lines; 0 if the problems concern the whole file."""
    record: Record | None
    problems: tuple[Problem, ...]


class RawLine(NamedTuple):
    """One line as it stands in the file, for `parse_line`."""

    number: int
    """Line number from 1, counting blank lines."""
    start: int
    """Byte of the file at which `raw` begins."""
    raw: bytes
    """The bytes of the line, including its line break."""
    notes: tuple[Problem, ...]
    """Warnings about its bytes, such as a byte-order mark."""


class JsonlReader(Generic[Record]):
    """Iterate once over the lines of one JSONL file, holding at most `limits.line_bytes` of it in memory.

    A file that ends in `.gz` or `.zst` is decompressed as it is read. Bad content never raises: a line or file that cannot be
    read yields a `Line` with its problems. `lines_read` and `blank_lines` count up during the iteration.
    """

    @overload
    def __init__(self: JsonlReader[TrainingRecord], path: Path, *, limits: LimitsConfig = ...) -> None: ...
    @overload
    def __init__(self, path: Path, schema: type[Record], *, limits: LimitsConfig = ...) -> None: ...
    def __init__(self, path: Path, schema: Any = TrainingRecord, *, limits: LimitsConfig = DEFAULT_LIMITS) -> None:
        self.path = path
        self._schema = schema
        self._limits = limits
        self.lines_read = 0
        self.blank_lines = 0

    def __iter__(self) -> Iterator[Line[Record]]:
        for line in self.raw_lines():
            yield parse_line(line, self._schema, self._limits)

    def raw_lines(self) -> Iterator[RawLine | Line[Record]]:
        """Yield what iterating yields, without parsing it: each line that can be parsed as a `RawLine`.

        This is the part of reading that must happen in order; `parse_line` may run in another process.
        """
        try:
            if problem := diagnose(self.path, self._limits, is_prompts=self._schema is EvaluationPrompt):
                yield Line(0, None, (problem,))
                return
            file = open_data(self.path, self._limits.decompressed_bytes, self._limits.compression_ratio)
        # ValueError: a NUL in the path
        except (OSError, ValueError) as error:
            yield _unreadable(error)
            return
        with file:
            try:
                yield from self._lines(file)
            except CorruptStreamError as error:
                yield _bad_file(
                    RecordError(
                        "corrupt_stream",
                        Message(
                            "{error}, after {lines}",
                            error=marked(str(error)),
                            lines=counted(self.lines_read, "{count:,} whole line", "{count:,} whole lines"),
                        ),
                        "data compressed in the format of the file's suffix",
                        "copy or compress the file again",
                    )
                )
            except DecompressedTooLargeError as error:
                setting = "compression_ratio" if error.is_ratio else "decompressed_bytes"
                yield _bad_file(
                    RecordError(
                        "decompressed_too_large",
                        Message(
                            "more than {max_bytes:,} decompressed bytes from a file of {size_bytes:,} bytes",
                            max_bytes=error.max_bytes,
                            size_bytes=error.size_bytes,
                        ),
                        Message("no more than limits.{setting} allows", setting=setting),
                        Message("check that it is the right file; if it is, raise limits.{setting}", setting=setting),
                    )
                )
            except OSError as error:
                yield _unreadable(error)

    def _lines(self, file: BinaryIO) -> Iterator[RawLine | Line[Record]]:
        offset = 0
        crlf_seen = False
        max_bytes = self._limits.line_bytes
        while raw := file.readline(max_bytes + 1):
            self.lines_read += 1
            number = self.lines_read
            start, offset = offset, offset + len(raw)
            if len(raw) > max_bytes and not raw.endswith(b"\n"):
                while not raw.endswith(b"\n") and (raw := file.readline(_SKIP_CHUNK_BYTES)):
                    offset += len(raw)
                yield _bad_line(
                    number,
                    RecordError(
                        "line_too_long",
                        Message("a line of {bytes:,} bytes", bytes=offset - start),
                        Message("at most {max_bytes:,} bytes (limits.line_bytes)", max_bytes=max_bytes),
                        "put one record on a line, and shorten the text",
                    ),
                )
                continue
            notes: list[Problem] = []
            if raw.startswith(_BOM):
                raw = raw[len(_BOM) :]
                start += len(_BOM)
                notes.append(
                    _warning(number, "bom", "a byte-order mark before the line", "plain UTF-8", "save it as UTF-8 without a BOM")
                )
            if _is_blank_line(raw):
                self.blank_lines += 1
                if notes:
                    yield Line(number, None, tuple(notes))
                continue
            if raw.endswith(b"\r\n") and not crlf_seen:
                crlf_seen = True
                notes.append(_warning(number, "crlf", "CRLF line endings", "LF line endings", "convert the line endings"))
            yield RawLine(number, start, raw, tuple(notes))
        if self.lines_read == self.blank_lines:
            got = Message("only blank lines ({lines:,})", lines=self.lines_read) if self.lines_read else Message("an empty file")
            yield _bad_file(
                RecordError("empty_file", got, "one record a line", "check that it is the right file and was copied completely")
            )


def diagnose(path: Path, limits: LimitsConfig = DEFAULT_LIMITS, *, is_prompts: bool = False) -> Problem | None:
    """Return what is wrong with the file as a whole, judged by its first `HEAD_BYTES`, or None.

    Raises `OSError`, or `ValueError` for a NUL in the path.
    """
    with path.open("rb") as file:
        raw = file.read(HEAD_BYTES)
    suffix = compression_suffix(path)
    is_misnamed = suffix and len(raw) >= 4 and detect_compression(raw) != suffix
    if is_misnamed and (fault := _wrongly_called_compressed(raw, suffix)):
        return _file_problem(fault)
    head, is_whole = read_head(path, limits)
    fault = diagnosis(head, is_whole=is_whole, is_prompts=is_prompts)
    return _file_problem(fault) if fault else None


def read_head(path: Path, limits: LimitsConfig, suffix: str | None = None) -> tuple[bytes, bool]:
    """Return the first `HEAD_BYTES` of a file, decompressed as `open_data` does, and whether that is all of it.

    A damaged stream yields what comes before the damage.
    """
    head, is_whole = b"", False
    with open_data(path, limits.decompressed_bytes, limits.compression_ratio, suffix) as file:
        try:
            while len(head) <= HEAD_BYTES and not is_whole:
                chunk = file.read(16 * 1024)
                head, is_whole = head + chunk, not chunk
        except (CorruptStreamError, DecompressedTooLargeError):
            pass
    return head[:HEAD_BYTES], is_whole


def _wrongly_called_compressed(raw: bytes, suffix: str) -> RecordError | None:
    """Describe a file whose name ends in `suffix` and which begins another format; None for a damaged stream."""
    expected = Message("{format} data", format={".gz": "gzip", ".zst": "zstd"}[suffix])
    if actual := detect_compression(raw):
        return RecordError(
            "compressed",
            Message("{format} data under a name that ends in {suffix}", format=actual[1:], suffix=suffix),
            expected,
            Message("rename it to end in {actual}", actual=actual),
        )
    if fault := diagnosis(raw, is_whole=len(raw) < HEAD_BYTES):
        return fault if fault.got != "binary data" else None
    if text_encoding(raw, is_whole=len(raw) < HEAD_BYTES) is None:
        return None
    return RecordError(
        "compressed",
        Message("plain text under a name that ends in {suffix}", suffix=suffix),
        expected,
        Message("remove {suffix} from the name", suffix=suffix),
    )


def parse_record(text: str, number: int = 1, limits: LimitsConfig = DEFAULT_LIMITS) -> Line[TrainingRecord]:
    """Parse one line of JSON into a record or its problems, which refer to line `number`. Never raises."""
    try:
        return _read_text(text, number, TrainingRecord, limits)
    except RecordError as fault:
        return _bad_line(number, fault)


def parse_line(line: RawLine | Line[Record], schema: type[Record], limits: LimitsConfig) -> Line[Record]:
    """Parse one of the lines that `JsonlReader.raw_lines` yields. Never raises."""
    if isinstance(line, Line):
        return line
    parsed = _read_line(line.raw, line.number, line.start, schema, limits)
    return Line(line.number, parsed.record, (*line.notes, *parsed.problems)) if line.notes else parsed


def _is_blank_line(raw: bytes) -> bool:
    """Return whether a line has only white space, such as U+3000. Most lines begin with `{`, and need no decoding."""
    stripped = raw.strip()
    if not stripped or b" " < stripped[:1] < b"\x7f":
        return not stripped
    try:
        return not stripped.decode("utf-8").strip()
    except UnicodeDecodeError:
        return False


def _read_line(raw: bytes, number: int, start: int, schema: type[Record], limits: LimitsConfig) -> Line[Record]:
    """Parse line `number`, which begins at byte `start` of the file."""
    is_last = not raw.endswith(b"\n")
    try:
        return _read_text(raw.decode("utf-8"), number, schema, limits)
    except UnicodeDecodeError as error:
        if is_last and error.reason == "unexpected end of data":
            return _bad_line(number, _truncated(len(raw)))
        return _bad_line(
            number,
            RecordError(
                "invalid_utf8",
                Message(
                    "byte 0x{byte:02x} at byte {in_line} of the line (byte {in_file} of the file)",
                    byte=raw[error.start],
                    in_line=error.start + 1,
                    in_file=start + error.start + 1,
                ),
                "UTF-8",
                "save the file as UTF-8; Korean text from Windows is often CP949",
            ),
        )
    except IncompleteJsonError as fault:
        return _bad_line(number, _truncated(len(raw)) if is_last else fault)
    except RecordError as fault:
        return _bad_line(number, fault)


def _read_text(text: str, number: int, schema: type[Record], limits: LimitsConfig) -> Line[Record]:
    data = decode_json(text, limits)
    if not isinstance(data, dict):
        raise RecordError("not_an_object", described(data), RECORD_SHAPE, "write one record per line, without a list around them")
    try:
        # by alias only: a file must call the field `output`, never `reply`
        record = schema.model_validate(data, by_alias=True, by_name=False, context=limits)
    except ValidationError as error:
        return Line(number, None, tuple(record_problems(error, number, schema, data, limits)))
    problems: list[Problem] = []
    for field, text in texts_of(record):
        # a decomposed syllable has up to three code points, a composed one has one
        if len(text) > limits.text_characters and len(normalize("NFC", text)) > limits.text_characters:
            problems.append(_text_too_long(number, field, text, limits))
            continue
        problems += text_problems(number, field, text)
        if spells_control_token(text):
            problems.append(_control_token(number, field))
    is_refused = any(problem.severity is Severity.ERROR for problem in problems)
    return Line(number, None if is_refused else record, tuple(problems))


def _text_too_long(number: int, field: str, text: str, limits: LimitsConfig) -> Problem:
    fault = RecordError(
        "text_too_long",
        Message("text of {count:,} characters", count=len(normalize("NFC", text))),
        Message("at most {text_characters:,} (limits.text_characters)", text_characters=limits.text_characters),
        "shorten it, or raise limits.text_characters",
    )
    return error_problem(number, field, fault)


def _control_token(number: int, field: str) -> Problem:
    return Problem(
        number,
        field,
        Severity.WARNING,
        "control_token",
        "text that spells a control token, such as <|im_end|> or <tool_call>",
        "text without control tokens",
        "remove it; the prompt would show it with a space inserted",
    )


def _truncated(length_bytes: int) -> RecordError:
    return RecordError(
        "truncated",
        Message("a last line of {length_bytes:,} bytes that ends in the middle of a record", length_bytes=length_bytes),
        "a whole record and a line break",
        "the file looks truncated; copy or write it again",
    )


def _bad_line(number: int, fault: RecordError) -> Line[Any]:
    return Line(number, None, (error_problem(number, "", fault),))


def _bad_file(fault: RecordError) -> Line[Any]:
    return Line(0, None, (_file_problem(fault),))


def _file_problem(fault: RecordError) -> Problem:
    return Problem(None, "", Severity.ERROR, fault.code, fault.got, fault.expected, fault.fix)


def _unreadable(error: OSError | ValueError) -> Line[Any]:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return _bad_file(RecordError("unreadable", reason, "a file that can be read", "check the path and its permissions"))


def _warning(number: int, code: str, got: str, expected: str, fix: str) -> Problem:
    return Problem(number, "", Severity.WARNING, code, got, expected, fix)

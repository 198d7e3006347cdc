"""Training records: their schema, and a reader that streams them out of JSONL and names what is wrong with each line.

Only the standard library and pydantic. No message here quotes an instruction, a summary, an input or a
reply: problems end up in logs, and training text must not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Generic, NamedTuple, NoReturn, TypeVar, overload

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError, ValidationInfo, field_validator

from lora_trainer.compression import CorruptStreamError, DecompressedTooLargeError, compressed_by, open_data
from lora_trainer.config import DEFAULT_LIMITS, LimitsConfig
from lora_trainer.formatter import spells_control_token
from lora_trainer.personas import Expression, Feeling

_SKIP_CHUNK_BYTES: Final = 64 * 1024
_BOM: Final = b"\xef\xbb\xbf"
_UTF16_BOMS: Final = (b"\xff\xfe", b"\xfe\xff")
_QUOTED_CHARACTERS: Final = 24
"""A value or a key is shown only up to this length: what is longer is probably text, not a slip in a name."""
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_MOST_KEYS: Final = 64
"""Of one object. A record has four: beyond this there would be a problem for each of a megabyte's keys."""

# lone surrogates cannot be written as UTF-8; control characters other than white space are nobody's words
_UNWRITABLE = re.compile("[\x00-\x08\x0e-\x1b\x7f\ud800-\udfff]")
# and in what somebody wrote for us to learn from, the second set of control characters and those that turn a text around
_UNWANTED = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Unicode's Bidi_Control: they show text in another order than a model reads it (Boucher and Anderson, "Trojan Source", 2021)
_BIDI: Final = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# white space, and what looks like it: zero-width characters and Hangul fillers
_NOTHING_TO_SEE = re.compile("[\\s\u00ad\u115f\u1160\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u3164\ufe0e\ufe0f\ufeff\uffa0]*")


class Severity(StrEnum):
    """An error stops the run before any GPU is touched; a warning is counted, and stops it only under `--strict`."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, said so that its author can mend it."""

    line: int | None
    """Counted from 1; `None`: the file as a whole."""
    field: str
    """Dotted, such as `context.current_emotion.type`; empty: the line as a whole."""
    severity: Severity
    code: str
    """One word for each kind of problem, in snake_case; counts are kept by it."""
    got: str
    expected: str
    fix: str

    def render(self, file: str | Path) -> str:
        """`file:line: field: got ..., expected ...; fix`, on one line."""
        where = str(file) if self.line is None else f"{file}:{self.line}"
        what = f"{self.field}: " if self.field else ""
        return f"{where}: {what}got {self.got}, expected {self.expected}; {self.fix}"

    def as_json(self) -> dict[str, object]:
        """All fields, for `validate --json`."""
        return {
            "line": self.line,
            "field": self.field,
            "severity": str(self.severity),
            "code": self.code,
            "got": self.got,
            "expected": self.expected,
            "fix": self.fix,
        }


class _RecordError(ValueError):
    """What a `Problem` says, raised where line and field are not known."""

    def __init__(self, code: str, got: str, expected: str, fix: str) -> None:
        self.code, self.got, self.expected, self.fix = code, got, expected, fix
        super().__init__(code)


class _IncompleteJsonError(_RecordError):
    """JSON that could go on: with the end of the file behind it, the file was cut off."""


def _lone_surrogate(got: str) -> _RecordError:
    return _RecordError("lone_surrogate", got, "whole characters", "write the character itself, not its \\u escape")


def _writable(text: str, pattern: re.Pattern[str] = _UNWANTED) -> str:
    if found := pattern.search(text):
        point = ord(found.group())
        if 0xD800 <= point <= 0xDFFF:
            raise _lone_surrogate(f"half of a surrogate pair (\\u{point:04x}) at character {found.start() + 1}")
        if found.group() in _BIDI:
            raise _RecordError(
                "bidi_control",
                f"bidirectional control U+{point:04X} at character {found.start() + 1}",
                "text that is read in the order in which it is shown",
                "remove it; Korean needs none",
            )
        raise _RecordError(
            "control_character",
            f"control character U+{point:04X} at character {found.start() + 1}",
            "text without control characters",
            "remove it",
        )
    return text


def _visible(text: str) -> str:
    if _NOTHING_TO_SEE.fullmatch(text):
        raise _RecordError("blank", "blank text" if text else "empty text", "text", "write it, or remove the record")
    return _writable(text)


def _visible_reply(text: str, info: ValidationInfo) -> str:
    """A model's reply is held to the contract that servers can hold it to: their grammars know the first control characters only.

    One that is read from a file (which is what gives the context) is held to what is asked of data.
    """
    if _NOTHING_TO_SEE.fullmatch(text):
        return _visible(text)
    return _writable(text, _UNWRITABLE if info.context is None else _UNWANTED)


_Text = Annotated[str, Strict(), AfterValidator(_visible)]
_ReplyText = Annotated[str, Strict(), AfterValidator(_visible_reply)]
_OptionalText = Annotated[str, Strict(), AfterValidator(lambda text: _writable(text))]


class _Contract(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_by_name=True, validate_by_alias=True)


class Reply(_Contract):
    """What the friend says, and what its face shows: the object that every adapter must answer with."""

    text: _ReplyText
    emotion: Expression


class CurrentEmotion(_Contract):
    """What the AI feels while it answers."""

    type: Feeling
    intensity: Annotated[float, Strict(), Field(ge=0, le=1)]
    """0 (hardly) to 1 (fully). An integer is accepted, a boolean is not."""


class Context(_Contract):
    """What has happened so far, and how the AI feels about it."""

    summary: _OptionalText
    """May be empty: nothing has happened yet."""
    current_emotion: CurrentEmotion


class TrainingRecord(_Contract):
    """One line of `train_data_type_<blood type>.jsonl`. In the file, `reply` is called `output`."""

    instruction: _Text
    context: Context
    input: _Text
    reply: Reply = Field(validation_alias="output", serialization_alias="output")

    @field_validator("reply", mode="before")
    @classmethod
    def _parse_output(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value
        if _NOTHING_TO_SEE.fullmatch(value):
            raise _RecordError("blank", "empty text", _EXPECTED["output"], "write the reply, or remove the record")
        try:
            return _decode(value, info.context or DEFAULT_LIMITS)
        except _RecordError as fault:
            if fault.code != "not_json":
                raise
            raise _RecordError(
                "output_not_json",
                fault.got,
                _EXPECTED["output"],
                "write it with a JSON library: json.dumps of the reply, inside json.dumps of the record",
            ) from None

    def to_json(self) -> str:
        """The record as one line of JSONL in the seed's form, `output` as a JSON string; no line break at the end."""
        return json.dumps(
            {
                "instruction": self.instruction,
                "context": {
                    "summary": self.context.summary,
                    "current_emotion": {
                        "type": str(self.context.current_emotion.type),
                        "intensity": self.context.current_emotion.intensity,
                    },
                },
                "input": self.input,
                "output": json.dumps({"text": self.reply.text, "emotion": str(self.reply.emotion)}, ensure_ascii=False),
            },
            ensure_ascii=False,
        )


class EvaluationPrompt(_Contract):
    """One line of `eval_prompts.jsonl`: a record without its instruction, which the persona brings, and its reply."""

    context: Context
    input: _Text


_REPLY_SHAPE: Final = 'an object {"text": ..., "emotion": ...}'
_RECORD_SHAPE: Final = "one JSON object on the line: instruction, context, input, output"
_EXPECTED: Final[Mapping[str, str]] = {
    "": _RECORD_SHAPE,
    "instruction": "text that says who the friend is",
    "context": 'an object {"summary": ..., "current_emotion": ...}',
    "context.summary": "text, which may be empty",
    "context.current_emotion": 'an object {"type": ..., "intensity": ...}',
    "context.current_emotion.type": "one of " + ", ".join(Feeling),
    "context.current_emotion.intensity": "a number from 0 to 1",
    "input": "what the user says, as text",
    "output": _REPLY_SHAPE + ", as a JSON string",
    "output.text": "what the friend says, as text",
    "output.emotion": "one of " + ", ".join(Expression),
}
_VOCABULARIES: Final[Mapping[str, tuple[str, ...]]] = {
    "context.current_emotion.type": tuple(Feeling),
    "output.emotion": tuple(Expression),
}


Record = TypeVar("Record", bound=_Contract)


class Line(NamedTuple, Generic[Record]):
    """One line that is not blank: a record, or the problems that keep it from being one.

    A record may come with warnings about its line (a byte-order mark, CRLF).
    """

    number: int
    """Counted from 1 over all lines, blank ones too; 0: the problems are about the file as a whole."""
    record: Record | None
    problems: tuple[Problem, ...]


class JsonlReader(Generic[Record]):
    """The lines of one JSONL file, in order, one at a time; at most `limits.line_bytes` of it is held.

    A file that ends in `.gz` or `.zst` is decompressed as it is read. Iterate once. Nothing in the file raises: what cannot
    be read is a `Problem`, and so is a file that cannot be opened. `lines_read` and `blank_lines` count as the iteration goes.
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
        try:
            file = open_data(self.path, self._limits.decompressed_bytes, self._limits.compression_ratio)
        # ValueError: a NUL in the path
        except (OSError, ValueError) as error:
            yield _unreadable(error)
            return
        with file:
            try:
                yield from self._lines(file)
            except CorruptStreamError as error:
                yield _about_file(
                    _RecordError(
                        "corrupt_stream",
                        f"{error}, after {self.lines_read:,} whole line{'' if self.lines_read == 1 else 's'}",
                        "what the file's name says it is compressed by",
                        "copy or compress it again",
                    )
                )
            except DecompressedTooLargeError as error:
                setting = "compression_ratio" if error.is_ratio else "decompressed_bytes"
                yield _about_file(
                    _RecordError(
                        "decompressed_too_large",
                        f"more than {error.most_bytes:,} bytes out of a file of {error.size_bytes:,}",
                        f"no more than limits.{setting} allows",
                        f"check what the file is; if it is your data, raise limits.{setting}",
                    )
                )
            except OSError as error:
                yield _unreadable(error)

    def _lines(self, file: BinaryIO) -> Iterator[Line[Record]]:
        offset = 0
        crlf_seen = False
        most_bytes = self._limits.line_bytes
        while raw := file.readline(most_bytes + 1):
            self.lines_read += 1
            number = self.lines_read
            start, offset = offset, offset + len(raw)
            if number == 1 and raw.startswith(_UTF16_BOMS):
                # each line break is two bytes there, so no line of it would make sense
                yield _about_file(_RecordError("utf16", "a UTF-16 byte-order mark", "UTF-8", "save the file as UTF-8"))
                return
            if number == 1 and (compression := compressed_by(raw)):
                yield _about_file(
                    _RecordError(
                        "compressed",
                        f"{compression} under a name that does not say so",
                        "JSONL, or .jsonl.gz and .jsonl.zst by their names",
                        "rename it to .jsonl.gz or .jsonl.zst" if compression in ("gzip", "zstd") else "unpack it",
                    )
                )
                return
            if len(raw) > most_bytes and not raw.endswith(b"\n"):
                while not raw.endswith(b"\n") and (raw := file.readline(_SKIP_CHUNK_BYTES)):
                    offset += len(raw)
                yield _failed(
                    number,
                    _RecordError(
                        "line_too_long",
                        f"a line of {offset - start:,} bytes",
                        f"at most {most_bytes:,} bytes (limits.line_bytes)",
                        "put one record on a line, and shorten the text",
                    ),
                )
                continue
            notes: list[Problem] = []
            if raw.startswith(_BOM):
                raw = raw[len(_BOM) :]
                start += len(_BOM)
                notes.append(
                    _warning(number, "bom", "a byte-order mark before the line", "plain UTF-8", "save it as UTF-8 without BOM")
                )
            if not raw.strip():
                self.blank_lines += 1
                if notes:
                    yield Line(number, None, tuple(notes))
                continue
            if raw.endswith(b"\r\n") and not crlf_seen:
                crlf_seen = True
                notes.append(_warning(number, "crlf", "lines that end in CRLF", "lines that end in LF", "convert the line ends"))
            line: Line[Record] | None = _read_line(raw, number, start, self._schema, self._limits)
            if line is None:
                self.blank_lines += 1
            elif notes:
                yield Line(number, line.record, (*notes, *line.problems))
            else:
                yield line
        if self.lines_read == self.blank_lines:
            got = f"only blank lines ({self.lines_read:,})" if self.lines_read else "an empty file"
            yield _about_file(
                _RecordError("empty_file", got, "one record a line", "check that the right file was written and copied whole")
            )


def parse_record(text: str, number: int = 1) -> Line[TrainingRecord]:
    """One record out of one line of JSON; the problems call it line `number`. Never raises."""
    try:
        return _read_text(text, number, TrainingRecord, DEFAULT_LIMITS)
    except _RecordError as fault:
        return _failed(number, fault)


def _read_line(raw: bytes, number: int, start: int, schema: type[Record], limits: LimitsConfig) -> Line[Record] | None:
    """Line `number`, which begins at byte `start` of the file; `None` when it is blank."""
    is_last = not raw.endswith(b"\n")
    try:
        text = raw.decode("utf-8")
        return _read_text(text, number, schema, limits) if text.strip() else None
    except UnicodeDecodeError as error:
        if is_last and error.reason == "unexpected end of data":
            return _failed(number, _cut_off(len(raw)))
        return _failed(
            number,
            _RecordError(
                "invalid_utf8",
                f"byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line (byte {start + error.start + 1} of the file)",
                "UTF-8",
                "save the file as UTF-8; Korean text from Windows is often CP949",
            ),
        )
    except _IncompleteJsonError as fault:
        return _failed(number, _cut_off(len(raw)) if is_last else fault)
    except _RecordError as fault:
        return _failed(number, fault)


def _read_text(text: str, number: int, schema: type[Record], limits: LimitsConfig) -> Line[Record]:
    data = _decode(text, limits)
    if not isinstance(data, dict):
        raise _RecordError("not_an_object", _described(data), _RECORD_SHAPE, "write one record a line, with no list around them")
    try:
        # by the file's names only: `reply` is a word of this module
        record = schema.model_validate(data, by_alias=True, by_name=False, context=limits)
    except ValidationError as error:
        return Line(number, None, tuple(_explain(error, number, schema)))
    texts = list(_texts(record))
    if too_long := [_text_too_long(number, field, said, limits) for field, said in texts if len(said) > limits.text_characters]:
        return Line(number, None, tuple(too_long))
    return Line(number, record, tuple(_spelled(number, field) for field, said in texts if spells_control_token(said)))


def _texts(record: _Contract) -> Iterator[tuple[str, str]]:
    """What people wrote in a record, by field."""
    if isinstance(record, TrainingRecord):
        yield "instruction", record.instruction
        yield "output.text", record.reply.text
    if isinstance(record, TrainingRecord | EvaluationPrompt):
        yield "context.summary", record.context.summary
        yield "input", record.input


def _text_too_long(number: int, field: str, text: str, limits: LimitsConfig) -> Problem:
    fault = _RecordError(
        "text_too_long",
        f"text of {len(text):,} characters",
        f"at most {limits.text_characters:,} (limits.text_characters)",
        "shorten it",
    )
    return _error(number, field, fault)


def _spelled(number: int, field: str) -> Problem:
    return Problem(
        number,
        field,
        Severity.WARNING,
        "control_token",
        "text that spells a control token, such as <|im_end|> or <tool_call>",
        "words",
        "remove it; the prompt shows it with a space inside, as text",
    )


_STRUCTURE: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"|["\[\]{}]', re.DOTALL)


def _check_depth(text: str, most: int) -> None:
    """Refuse what is nested deeper than `most`, before a parser that recurses sees it."""
    # a record has three braces and its reply one more: most lines need no second look
    if text.count("[") + text.count("{") <= most:
        return
    depth = 0
    for found in _STRUCTURE.finditer(text):
        mark = text[found.start()]
        if mark in "[{":
            depth += 1
            if depth > most:
                raise _RecordError(
                    "too_deep",
                    f"lists or objects nested more than {most} deep (limits.nesting_depth)",
                    _RECORD_SHAPE,
                    "remove what does not belong there",
                )
        elif mark in "]}":
            depth -= 1
        elif found.end() - found.start() == 1:
            # a text without its end: the parser says so
            return


def _decode(text: str, limits: LimitsConfig) -> object:
    """`json.loads` that takes no NaN, no key twice and no depth beyond the limit. Raises `_RecordError` only."""
    _check_depth(text, limits.nesting_depth)
    try:
        return _DECODER.decode(text)
    except _RecordError:
        raise
    except json.JSONDecodeError as error:
        got = f"something that is not JSON ({error.msg.lower().removesuffix(' at')} at character {error.pos + 1})"
        if error.msg == "Extra data":
            fix = "put one record on a line, and nothing behind it"
        else:
            fix = "write it with a JSON library, which escapes quotes and line breaks inside a text"
        # cut inside a string, or in front of the last brace
        can_go_on = error.msg.startswith("Unterminated string") or not text.rstrip().endswith("}")
        could_begin = text.lstrip().startswith("{") and error.msg != "Extra data"
        kind = _IncompleteJsonError if could_begin and (can_go_on or error.pos >= len(text.rstrip())) else _RecordError
        raise kind("not_json", got, _RECORD_SHAPE, fix) from None
    except ValueError:
        # the one that is left: int() refuses very long numbers
        raise _RecordError("not_json", "a number with too many digits", _RECORD_SHAPE, "write a number from 0 to 1") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MOST_KEYS:
        raise _RecordError(
            "too_many_keys", f"an object of {len(pairs):,} keys", f"at most {_MOST_KEYS}", "remove what does not belong there"
        )
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _RecordError(
            "duplicate_key", f"the key {_short(twice)} more than once", "each key once", "keep the one that is meant"
        )
    return found


def _not_a_number(constant: str) -> NoReturn:
    raise _RecordError("not_finite", constant, "a finite number", "write a number from 0 to 1")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_not_a_number)


def _explain(error: ValidationError, number: int, schema: type[BaseModel]) -> Iterator[Problem]:
    for detail in error.errors(include_url=False):
        path = [str(part) for part in detail["loc"]]
        field = ".".join(path)
        if detail["type"] == "extra_forbidden":
            yield _unknown_field(path, number, schema)
            continue
        raised = detail.get("ctx", {}).get("error")
        yield _error(
            number, field, raised if isinstance(raised, _RecordError) else _fault_of(detail["type"], field, detail["input"])
        )


def _fault_of(kind: str, field: str, value: object) -> _RecordError:
    """`kind` is pydantic's name of what is wrong with `field`."""
    expected = _EXPECTED[field]
    if kind == "missing":
        return _RecordError("missing_field", "nothing", expected, f"add '{field.rsplit('.', 1)[-1]}'")
    if kind == "enum":
        got = f"'{value}'" if isinstance(value, str) and _is_name(value) else _described(value)
        return _RecordError("unknown_value", got, expected, _nearest(value, _VOCABULARIES[field], "choose the nearest of them"))
    if kind in ("greater_than_equal", "less_than_equal", "finite_number"):
        return _RecordError("out_of_range", _described(value), expected, "0 is hardly, 1 is fully")
    if kind == "string_unicode":
        return _lone_surrogate("half of a surrogate pair")
    return _RecordError("wrong_type", _described(value), expected, "write it as that")


def _unknown_field(path: list[str], number: int, schema: type[BaseModel]) -> Problem:
    *parents, key = path
    siblings = [name.rsplit(".", 1)[-1] for name in _EXPECTED if name and name.split(".")[:-1] == parents]
    if not parents and schema is EvaluationPrompt:
        siblings = list(EvaluationPrompt.model_fields)
    # what is no name is probably text that lost its quotes
    field = ".".join([*parents, key if _is_name(key) else "?"])
    fault = _RecordError(
        "unknown_field", f"the key {_short(key)}", "only " + ", ".join(siblings), _nearest(key, siblings, "remove it")
    )
    return _error(number, field, fault)


def _nearest(value: object, names: Sequence[str], otherwise: str) -> str:
    if isinstance(value, str) and len(value) <= _QUOTED_CHARACTERS:
        close = get_close_matches(value.strip().lower(), names, n=1, cutoff=0.7)
        if close:
            return f"did you mean '{close[0]}'?"
    return otherwise


def _is_name(text: str) -> bool:
    """As the names of fields and emotions are: what people say to each other never is quoted."""
    return len(text) <= _QUOTED_CHARACTERS and _NAME.fullmatch(text) is not None


def _short(text: str) -> str:
    return f"'{text}'" if _is_name(text) else f"of {len(text)} characters"


def _described(value: object) -> str:
    """The kind of a JSON value and its size, never a text itself."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value) if abs(value) < 10**_QUOTED_CHARACTERS else "a very large number"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return f"text of {len(value)} character{'' if len(value) == 1 else 's'}"
    return "a list" if isinstance(value, list) else "an object"


def _cut_off(length_bytes: int) -> _RecordError:
    return _RecordError(
        "truncated",
        f"a last line of {length_bytes:,} bytes that stops in the middle",
        "a whole record and a line break",
        "the file looks cut off: copy or write it again",
    )


def _error(number: int, field: str, fault: _RecordError) -> Problem:
    return Problem(number, field, Severity.ERROR, fault.code, fault.got, fault.expected, fault.fix)


def _failed(number: int, fault: _RecordError) -> Line[Any]:
    return Line(number, None, (_error(number, "", fault),))


def _about_file(fault: _RecordError) -> Line[Any]:
    return Line(0, None, (Problem(None, "", Severity.ERROR, fault.code, fault.got, fault.expected, fault.fix),))


def _unreadable(error: OSError | ValueError) -> Line[Any]:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return _about_file(_RecordError("unreadable", reason, "a file that can be read", "check the path and its permissions"))


def _warning(number: int, code: str, got: str, expected: str, fix: str) -> Problem:
    return Problem(number, "", Severity.WARNING, code, got, expected, fix)

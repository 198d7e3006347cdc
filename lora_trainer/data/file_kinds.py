"""Recognize what a file is when it is not JSONL in the project's format, from its first bytes.

One cause that belongs to the whole file gets one diagnosis with the way out, instead of an error on each line. A cause counts as
the file's if it explains at least `SAME_CAUSE` of the lines; otherwise each line is reported.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, NamedTuple

from lora_trainer.config import DEFAULT_LIMITS
from lora_trainer.data.convert_columns import Column, column_of
from lora_trainer.data.problems import RecordError
from lora_trainer.data.strict_json import decode_json, is_quotable

HEAD_BYTES: Final = 256 * 1024
"""How much of a file the diagnosis reads."""
SAME_CAUSE: Final = 0.9
CONVERT: Final = "run 'lora-trainer convert FILE --output NEW.jsonl', then validate NEW.jsonl"

_HEAD_LINES: Final = 200
_ONE_OBJECT_A_LINE: Final = "JSONL: one JSON object a line"
_FORMAT: Final = "JSONL in UTF-8"
_DOWNLOAD: Final = "download the file itself"
_SAVE_AS_CSV: Final = "save it as XLSX or as CSV in UTF-8, then " + CONVERT

_SIGNATURES: Final[Sequence[tuple[bytes, str, str]]] = (
    (
        b"PAR1",
        "a Parquet file",
        "export it as JSON lines, with duckdb -c \"COPY 'FILE.parquet' TO 'FILE.jsonl' (FORMAT json)\" or pandas, then " + CONVERT,
    ),
    (b"ARROW1", "an Arrow (Feather) file", "export it as JSON lines, with pandas.read_feather(...).to_json(..., lines=True)"),
    (b"FEA1", "a Feather file", "export it as JSON lines, with pandas.read_feather(...).to_json(..., lines=True)"),
    (b"ORC", "an ORC file", "export it as JSON lines"),
    (b"Obj\x01", "an Avro file", "export it as JSON lines"),
    (
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "an old or password-protected Office or Hangul document (XLS, DOC, HWP)",
        "open it, remove the password, and " + _SAVE_AS_CSV,
    ),
    (b"%PDF-", "a PDF", "export the records from the program that wrote it"),
    (b"SQLite format 3\x00", "an SQLite database", "export the table with sqlite3 -csv -header, then " + CONVERT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "export it as JSON lines"),
    (b"\x93NUMPY", "a NumPy array", "export it as JSON lines"),
    (b"GGUF", "model weights (GGUF)", "check that it is the right file"),
    (b"\x89PNG", "an image", "check that it is the right file"),
    (b"\xff\xd8\xff", "an image", "check that it is the right file"),
    (b"{\\rtf", "a rich text document (RTF)", "save it as plain text in UTF-8"),
)
_ARCHIVES: Final[Sequence[tuple[bytes, str]]] = (
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!\x1a\x07", "RAR"),
    (b"\x04\x22\x4d\x18", "lz4"),
)
_STREAMS: Final = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_IN_ZIP: Final[Sequence[tuple[bytes, str, str]]] = (
    (rb"xl/(workbook|worksheets|sharedStrings|styles|theme|_rels)", "an Excel workbook (XLSX)", CONVERT),
    (rb"mimetypeapplication/vnd\.oasis\.opendocument\.spreadsheet", "an OpenDocument spreadsheet (ODS)", _SAVE_AS_CSV),
    (rb"mimetypeapplication/vnd\.oasis\.opendocument", "an OpenDocument file", _SAVE_AS_CSV),
    (rb"word/document|ppt/presentation|application/hwp\+zip", "an Office or Hangul document", _SAVE_AS_CSV),
    (rb"/data\.pkl", "a PyTorch checkpoint", "check that it is the right file"),
)
_BOMS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # before UTF-16: its little-endian mark begins with the same bytes
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ENCODING_NAMES: Final = {"utf-16": "UTF-16", "utf-32": "UTF-32", "cp949": "CP949 (EUC-KR), Korean Windows' own encoding"}


class Layout(StrEnum):
    """How a text file arranges its records. The values are descriptions for messages."""

    LINES = "one JSON object a line"
    ARRAY = "a JSON array"
    ARRAY_LINES = "each line a JSON array"
    STRING_LINES = "each line a JSON string that holds JSON (encoded twice)"
    PRETTY = "pretty-printed JSON: objects over several lines"
    CONCATENATED = "JSON objects without line breaks between them"
    SEPARATED = "JSON objects with commas after them"
    TRAILING = "JSON with a comma before a closing bracket"
    PYTHON = "Python dictionaries, with single quotes"
    WRAPPER = "one JSON object around all records"
    COLUMNS = "one JSON object with all values of each column"
    TABLE = "a CSV table"


class Shape(StrEnum):
    """What JSON objects of another format describe. The values are descriptions for messages."""

    MESSAGES = "OpenAI chat format (`messages`)"
    BATCH = "OpenAI batch requests (`body.messages`)"
    CONVERSATIONS = "ShareGPT format (`conversations`)"
    CONTENTS = "Gemini chat format (`contents`)"
    PREFERENCE = "preference pairs (`chosen`, `rejected`)"
    ALPACA = "Alpaca format (`instruction`, `input`, `output` as plain text)"
    PAIRS = "pairs of a prompt and a completion"
    FLAT = "flat columns instead of nested objects, as from a spreadsheet"
    TEXT = "only a `text`"
    PROMPTS = "evaluation prompts, without instruction and output"
    ERROR = "an error document"
    OTHER = "JSON objects with other keys"


CONVERTIBLE: Final = frozenset(
    (Shape.MESSAGES, Shape.BATCH, Shape.CONVERSATIONS, Shape.CONTENTS, Shape.ALPACA, Shape.PAIRS, Shape.FLAT)
)
"""Shapes that `convert` turns into records."""


class Table(NamedTuple):
    """The dialect of a CSV table."""

    delimiter: str
    header: int | None
    """Index of the header among the rows, or None if no row has known column names."""


def diagnosis(head: bytes, *, is_whole: bool, is_prompts: bool = False) -> RecordError | None:
    """Return what is wrong with the whole file that begins with `head`, or None if its lines must be read.

    `head` is decompressed; pass up to `HEAD_BYTES`, and whether that `is_whole` file. Never raises.
    """
    fault = _diagnosis(head, is_whole=is_whole, is_prompts=is_prompts)
    if fault and is_prompts and CONVERT in fault.fix:
        # `convert` writes training records
        fix = fault.fix.replace(f", or {CONVERT}", "").replace(CONVERT, "write the prompts in the format; SDS.md describes it")
        return RecordError(fault.code, fault.got, fault.expected, fix)
    return fault


def _diagnosis(head: bytes, *, is_whole: bool, is_prompts: bool) -> RecordError | None:
    if not head.strip():
        return None
    if fault := no_text(head, is_whole=is_whole):
        return fault
    encoding = text_encoding(head, is_whole=is_whole) or "utf-8"
    if encoding not in ("utf-8", "utf-8-sig"):
        return RecordError(
            "wrong_encoding", f"text in {_ENCODING_NAMES[encoding[:6]]}", "UTF-8", f"save the file as UTF-8, or {CONVERT}"
        )
    text = decoded(head, encoding, is_whole=is_whole)
    return not_the_data(text) or _structure(text, is_whole=is_whole, is_prompts=is_prompts) or _no_json(text, is_whole=is_whole)


def no_text(head: bytes, *, is_whole: bool) -> RecordError | None:
    """Return what the file is if it is no text in a known encoding, or None."""
    return _binary_format(head) or (None if text_encoding(head, is_whole=is_whole) else _undecodable(head))


def stream_format(head: bytes) -> str | None:
    """Return `gzip` or `zstd` if `head` begins such a stream, or None."""
    return next((name for magic, name in _STREAMS.items() if head.startswith(magic)), None)


def is_workbook(head: bytes) -> bool:
    """Return whether `head` begins an XLSX file."""
    return head.startswith(b"PK\x03\x04") and re.search(_IN_ZIP[0][0], head) is not None


def _binary_format(head: bytes) -> RecordError | None:
    for magic, name, fix in _SIGNATURES:
        if head.startswith(magic):
            return RecordError("wrong_format", name, _FORMAT, fix)
    if stream := stream_format(head):
        return RecordError(
            "compressed",
            f"{stream} data under a name without its suffix, or compressed twice",
            "plain JSONL, or a name that ends in .jsonl.gz or .jsonl.zst",
            "rename it to .jsonl.gz or .jsonl.zst",
        )
    archive = next((name for magic, name in _ARCHIVES if head.startswith(magic)), None)
    if archive == "zip":
        for pattern, name, fix in _IN_ZIP:
            if re.search(pattern, head):
                return RecordError("wrong_format", name, _FORMAT, fix)
    if archive or head[257:262] == b"ustar":
        return RecordError("compressed", f"a {archive or 'tar'} archive", "plain JSONL, .jsonl.gz or .jsonl.zst", "unpack it")
    if re.match(rb"\xff\xff\xff\xff[\x00-\xff]{2}[\x00-\x0f]\x00", head):
        return RecordError(
            "wrong_format",
            "an Arrow stream",
            _FORMAT,
            "export it as JSON lines, with datasets.Dataset.from_file(...).to_json(..., force_ascii=False)",
        )
    if re.match(rb"\x80[\x02-\x05][\x95}\]()cX\x8c]", head):
        return RecordError(
            "wrong_format",
            "a Python pickle",
            _FORMAT,
            "export it as JSON lines where it was written; loading a pickle runs its code",
        )
    return None


def _undecodable(head: bytes) -> RecordError:
    """Describe bytes that are no text in a known encoding."""
    if not head.strip(b"\0"):
        return RecordError(
            "wrong_format", "only zero bytes", _FORMAT, "copy the file again; an interrupted copy or a full disk leaves such files"
        )
    controls = len(head) - len(head.translate(None, bytes(range(9)) + bytes(range(14, 32)) + b"\x7f"))
    if controls > 0.02 * len(head):
        return RecordError("wrong_format", "binary data", _FORMAT, "check that it is the right file and was copied completely")
    return RecordError(
        "wrong_encoding",
        "text that is neither UTF-8 nor another known encoding",
        "UTF-8",
        "save the file as UTF-8 where it was written",
    )


# --- encodings -------------------------------------------------------------------------------------------


def text_encoding(head: bytes, *, is_whole: bool) -> str | None:
    """Return the Python name of the encoding of text, or None if most of it is in no known one.

    A file in which only some lines are not UTF-8 is `utf-8`: each of those lines is an error of its own.
    """
    for mark, name in _BOMS:
        if head.startswith(mark):
            return name
    if b"\0" in head:
        for name, width in (("utf-32-le", 4), ("utf-32-be", 4), ("utf-16-le", 2), ("utf-16-be", 2)):
            if _is_plausible(head[: len(head) // width * width].decode(name, "replace")):
                return name
        controls = head.count(b"\0")
        return "utf-8" if controls <= 0.02 * len(head) and _utf8_share(head, is_whole=is_whole) > 1 - SAME_CAUSE else None
    share = _utf8_share(head, is_whole=is_whole)
    if share > 1 - SAME_CAUSE:
        return "utf-8"
    lines = [line for line in _whole_lines(head, is_whole=is_whole) if not line.isascii()]
    if sum(map(_is_cp949, lines)) >= SAME_CAUSE * len(lines):
        return "cp949"
    # a single broken line of text is that line's error
    return "utf-8" if len(lines) < 2 and not _has_many_controls(head) else None


def decoded(raw: bytes, encoding: str, *, is_whole: bool) -> str:
    """Return `raw` as text without a byte-order mark.

    What cannot be decoded becomes U+FFFD; a character that the head cuts is left out.
    """
    text = codecs.getincrementaldecoder(encoding)("replace").decode(raw, final=is_whole)
    return text.removeprefix("\ufeff")


def _whole_lines(head: bytes, *, is_whole: bool) -> list[bytes]:
    lines = head.split(b"\n")
    return lines if is_whole or len(lines) == 1 else lines[:-1]


def _utf8_share(head: bytes, *, is_whole: bool) -> float:
    """Return the share of UTF-8 among the lines that are not ASCII; 1 if all are ASCII."""
    lines = [line for line in _whole_lines(head, is_whole=is_whole) if not line.isascii()]
    return sum(map(_is_utf8, lines)) / len(lines) if lines else 1.0


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        # the cut last line of the head, or of a truncated file
        return error.reason == "unexpected end of data"
    return True


def _is_cp949(line: bytes) -> bool:
    """Return whether `line` reads as Korean in CP949, most of it in the common syllables of EUC-KR."""
    try:
        text = line.decode("cp949")
    except UnicodeDecodeError as error:
        if error.start < len(line) - 1:
            return False
        text = line[:-1].decode("cp949")
    beyond_ascii = "".join(character for character in text if character > "\x7f")
    hangul = sum("가" <= character <= "힣" for character in beyond_ascii)
    common = len(beyond_ascii.encode("euc_kr", "ignore")) / 2
    # most of it, because the bytes of Chinese text are Hangul and Hanja in CP949
    return hangul >= 0.8 * len(beyond_ascii) and common >= 0.9 * len(beyond_ascii)


def _is_plausible(text: str) -> bool:
    """Return whether nearly all of `text` is ASCII, Hangul, punctuation or emoji, and none of it is a control character."""
    part = text[:4000]
    if not part or re.search("[\x00-\x08\x0e-\x1f\x7f\ufffd]", part):
        return False
    usual = re.findall(
        "[\t\n\r\x20-\x7e\u00a0-\u00ff\u1100-\u11ff\u2000-\u27bf\u3000-\u318f가-힣\ufe0f\uff00-\uffef\U0001f000-\U0001faff]", part
    )
    return len(usual) >= 0.95 * len(part)


def _has_many_controls(head: bytes) -> bool:
    return len(re.findall(rb"[\x00-\x08\x0e-\x1f\x7f]", head)) > 0.02 * len(head)


# --- text that is something else -------------------------------------------------------------------------


def not_the_data(text: str) -> RecordError | None:
    """Recognize what a store, a host or Git left in place of the file."""
    start = text.lstrip()[:4096]
    if start.startswith("version https://git-lfs.github.com/spec/"):
        return _placeholder("a Git LFS pointer: the data itself was not downloaded", "run 'git lfs pull', or " + _DOWNLOAD)
    if re.match(r"(\.\./|/)?[^\n]{0,200}annex/objects/", start):
        return _placeholder("a git-annex pointer: the data itself was not downloaded", "run 'git annex get', or " + _DOWNLOAD)
    if re.match(r"(md5: |outs:\s*\n- (md5|hash): )", start):
        return _placeholder("a DVC pointer: the data itself was not downloaded", "run 'dvc pull', or " + _DOWNLOAD)
    if not start.startswith("<"):
        return None
    if code := re.search(r"<Error>.{0,500}?<Code>([A-Za-z]{1,40})</Code>", start, re.DOTALL):
        return _placeholder(
            f"an error document of an object store ({code[1]})", "check the address and the rights, then download it again"
        )
    if re.search(r"<(!doctype\s+html|html|head|body)\b", start, re.IGNORECASE):
        return _placeholder(
            "an HTML page, such as a login or an error page", "log in, or use the address of the file itself, and download it again"
        )
    if re.match(r"<(\?xml|[A-Za-z_][\w:.-]*[\s/>])", start):
        return RecordError("wrong_format", "an XML document", _FORMAT, "export the records as JSON lines or CSV")
    return None


def _placeholder(got: str, fix: str) -> RecordError:
    return RecordError("placeholder", got, _FORMAT, fix)


def _structure(text: str, *, is_whole: bool, is_prompts: bool) -> RecordError | None:
    layout, items = layout_of(text, is_whole=is_whole)
    shape = shape_of(items)
    if shape is Shape.ERROR and len(items) == 1:
        return _placeholder("an error document instead of data", "check the address and the rights, then download it again")
    if layout is Layout.LINES:
        return _wrong_shape(shape, items, is_prompts=is_prompts)
    if layout is Layout.TABLE:
        table = table_of(text)
        known = table is not None and table.header is not None
        delimiter = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}[table.delimiter if table else ","]
        return RecordError(
            "wrong_format",
            f"a CSV table, separated by {delimiter}",
            _FORMAT,
            CONVERT
            if known
            else "name its columns in the first row (instruction, summary, feeling, intensity, input, reply, face), then "
            + CONVERT,
        )
    if layout is not None:
        of = f", in {shape}" if shape and shape is not Shape.OTHER else ""
        fix = CONVERT if shape is None or shape in CONVERTIBLE else "write one object a line"
        return RecordError("wrong_layout", f"{layout}{of}", _ONE_OBJECT_A_LINE, fix)
    return plain_text(text, is_whole=is_whole)


def _wrong_shape(shape: Shape | None, items: Sequence[Mapping[str, Any]], *, is_prompts: bool) -> RecordError | None:
    if shape is None or (is_prompts and shape is Shape.PROMPTS):
        return None
    expected = "evaluation prompts: context, input" if is_prompts else "records: instruction, context, input, output"
    got: str = shape
    if shape is Shape.PROMPTS:
        fix = "call the file eval_prompts.jsonl to check it as such, and name it with evaluation.prompts"
    elif shape is Shape.OTHER:
        keys = list(dict.fromkeys(key for item in items for key in item if is_quotable(key)))[:5]
        got += f" ({', '.join(keys)})" if keys else ""
        fix = "rename the keys, or write the records in the format"
    elif shape not in CONVERTIBLE or is_prompts:
        fix = "write them in the format; docs/data-format.md describes it"
    else:
        fix = CONVERT
    return RecordError("wrong_schema", got, expected, fix)


def _no_json(text: str, *, is_whole: bool) -> RecordError | None:
    """Recognize a file none of whose lines is JSON, all for the same reason."""
    reasons = []
    for line in _text_lines(text, is_whole=is_whole):
        try:
            decode_json(line, DEFAULT_LIMITS)
        except RecordError as fault:
            reasons.append(re.sub(r" at character \d+", "", fault.got) if fault.code == "not_json" else "")
        else:
            return None
    usual = max(reasons, key=reasons.count, default="")
    if len(reasons) < 5 or not usual or reasons.count(usual) < SAME_CAUSE * len(reasons):
        return None
    return RecordError(
        "wrong_layout",
        f"{usual} on each line",
        _ONE_OBJECT_A_LINE,
        "write it with a JSON library, such as json.dumps, which quotes names and escapes quotes in text",
    )


def plain_text(text: str, *, is_whole: bool) -> RecordError | None:
    """Recognize YAML and prose."""
    if re.match(r"(---\s*\n|%YAML|- *[\w가-힣]+:(\s|$))", text) or (
        re.match(r"[\w가-힣]+:(\s|$)", text) and len(re.findall(r"^ *(- )?[\w가-힣]+:(?:\s|$)", text, re.MULTILINE)) >= 3
    ):
        return RecordError("wrong_format", "YAML", _FORMAT, "write it as JSON lines, for example with yq -o=json -I=0 '.[]'")
    lines = _text_lines(text, is_whole=is_whole)
    if len(lines) >= 5 and not any(line.lstrip()[:1] in '{["' for line in lines):
        return RecordError("wrong_format", "plain text", _FORMAT, "write one JSON object a line; docs/data-format.md describes it")
    return None


# --- layouts ---------------------------------------------------------------------------------------------


def _text_lines(text: str, *, is_whole: bool) -> list[str]:
    lines = text.split("\n", _HEAD_LINES)
    if len(lines) > 1 and (not is_whole or len(lines) > _HEAD_LINES):
        lines.pop()
    return [line for line in lines if line.strip()]


def layout_of(text: str, *, is_whole: bool) -> tuple[Layout | None, list[dict[str, Any]]]:
    """Return how the beginning of a file arranges its records, and some of them. None if it is not recognized."""
    lines = _text_lines(text, is_whole=is_whole)
    values = [_value(line) for line in lines]
    needed = SAME_CAUSE * len(lines)
    items = [value for value in values if isinstance(value, dict)]
    if lines and len(items) >= needed:
        # decoded again: an object that holds all records may have more keys than a record may
        whole = _objects_after(text.lstrip(), 0) if len(lines) == 1 and is_whole else []
        return (_one_object(whole[0]) if whole else None) or (Layout.LINES, items)
    if len(items) >= 0.5 * len(lines):
        # most lines are good, so the others are errors of their own
        return None, []
    if len(lines) > 1:
        lists = [value for value in values if isinstance(value, list)]
        if len(lists) >= needed and any(isinstance(item, dict) for value in lists for item in value):
            return Layout.ARRAY_LINES, [item for value in lists for item in value if isinstance(item, dict)]
        strings = [_value(value) for value in values if isinstance(value, str)]
        if len(strings) >= needed and all(isinstance(value, dict) for value in strings):
            return Layout.STRING_LINES, [value for value in strings if isinstance(value, dict)]
    return _over_lines(text, lines, is_whole=is_whole)


def _one_object(item: dict[str, Any]) -> tuple[Layout, list[dict[str, Any]]] | None:
    """Recognize a single object that holds all records."""
    if "context" in item or "messages" in item or "conversations" in item or "contents" in item or "history" in item:
        return None
    inner = [value for value in item.values() if isinstance(value, list) and value and all(isinstance(one, dict) for one in value)]
    if inner:
        return Layout.WRAPPER, [one for value in inner for one in value]
    columns = [value for key, value in item.items() if isinstance(value, list | dict) and column_of(key)]
    is_split = isinstance(item.get("columns"), list) and isinstance(item.get("data"), list)
    if is_split or (len(columns) >= 2 and len(columns) >= 0.5 * len(item)):
        return Layout.COLUMNS, []
    if len(item) > 1 and all(isinstance(value, dict) for value in item.values()):
        return Layout.WRAPPER, list(item.values())
    return None


def _over_lines(text: str, lines: Sequence[str], *, is_whole: bool) -> tuple[Layout | None, list[dict[str, Any]]]:
    """Recognize JSON that is not one value a line, and tables."""
    start = text.lstrip()
    if re.match(r"\[?\s*\{\s*'[^'\n]*'\s*:", start):
        return Layout.PYTHON, []
    if re.match(r'\[\s*(\{\s*["}]|\[|\]\s*$)', start) or (re.match(r'\[\s*["\d]', start) and isinstance(_value(start), list)):
        return Layout.ARRAY, [item for item in _objects_after(start, 1) if isinstance(item, dict)]
    if not re.match(r'\{\s*["}]', start):
        return (Layout.TABLE, []) if table_of(text) else (None, [])
    if isinstance(_value(lines[0]), dict):
        # the first line is whole, so the others are errors of their own
        return None, []
    trimmed = [_value(re.sub(r",\s*$", "", line)) for line in lines]
    if len(lines) > 1 and sum(isinstance(value, dict) for value in trimmed) >= SAME_CAUSE * len(lines):
        return Layout.SEPARATED, [value for value in trimmed if isinstance(value, dict)]
    mended = [_value(without_trailing_commas(re.sub(r",\s*$", "", line))) for line in lines]
    if sum(isinstance(value, dict) for value in mended) >= SAME_CAUSE * len(lines):
        return Layout.TRAILING, [value for value in mended if isinstance(value, dict)]
    items = _objects_after(start, 0)
    if not items:
        if re.match(r'\{\s*"[^"\n]{1,60}"\s*:\s*\[\s*\{\s*"', start) and not re.match(
            r'\{\s*"(messages|conversations|contents)"', start
        ):
            return Layout.WRAPPER, [item for item in _objects_after(start[start.index("[") :], 1) if isinstance(item, dict)]
        mended_start = without_trailing_commas(start)
        if mended_start != start and _objects_after(mended_start, 0):
            return Layout.TRAILING, []
        return (Layout.PRETTY, []) if re.match(r'\{\s*\n\s*"[^"\n]{1,60}"\s*:', start) else (None, [])
    if len(items) == 1 and is_whole:
        return _one_object(items[0]) or (Layout.PRETTY, items)
    is_on_one_line = len(items) > 1 and len(_objects_after(lines[0].lstrip(), 0)) > 1
    return (Layout.CONCATENATED if is_on_one_line else Layout.PRETTY), items


def _value(text: str) -> object:
    """Return the JSON value in `text`, or None if it is none."""
    try:
        return decode_json(text, DEFAULT_LIMITS)
    except RecordError as error:
        # a record with such an error is JSON nevertheless
        return {} if error.code in ("duplicate_key", "not_finite", "too_many_keys") and text.lstrip().startswith("{") else None


def _objects_after(text: str, at: int) -> list[dict[str, Any]]:
    """Return the first objects in `text` from `at` on, up to 20, as far as they are complete; commas may separate them."""
    decoder = json.JSONDecoder()
    found: list[dict[str, Any]] = []
    gap = re.compile(r"[\s,]*")
    while len(found) < 20:
        at = gap.match(text, at).end()  # type: ignore[union-attr]  # matches everywhere
        if not text.startswith("{", at):
            break
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            break
        found.append(value)
    return found


def without_trailing_commas(text: str) -> str:
    """Return JSON text without the commas before closing brackets; strings stay as they are."""
    return re.sub(r'("(?:[^"\\]++|\\.)*+")|,(?=\s*[}\]])', lambda found: found[1] or "", text, flags=re.DOTALL)


def table_of(text: str) -> Table | None:
    """Return the dialect of a CSV table, or None if `text` is none."""
    if text.lstrip()[:1] in "{[<":
        return None
    consistent: Table | None = None
    for delimiter in "\t,;|":
        rows = _csv_rows(text[:65536], delimiter)
        for index, row in enumerate(rows[:20]):
            if len({column for name in row if (column := column_of(name))}) >= 2:
                return Table(delimiter, index)
        widths = [len(row) for row in rows if row]
        if consistent is None and len(widths) >= 3 and widths[0] > 1 and widths.count(widths[0]) >= SAME_CAUSE * len(widths):
            consistent = Table(delimiter, None)
    return consistent


def _csv_rows(text: str, delimiter: str) -> list[list[str]]:
    rows: list[list[str]] = []
    try:
        for row in csv.reader(text.splitlines(keepends=True), delimiter=delimiter):
            rows.append(row)
            if len(rows) > 40:
                break
    except csv.Error:
        pass
    # the last row may be cut
    return rows[:-1] if len(rows) > 2 else rows


# --- shapes ----------------------------------------------------------------------------------------------


def shape_of(items: Sequence[Mapping[str, Any]]) -> Shape | None:
    """Return the other format that at least `SAME_CAUSE` of the objects have, or None for the project's own or a mixture."""
    shapes = [item_shape(item) for item in items]
    for shape in dict.fromkeys(shapes):
        if shape is not None and shapes.count(shape) >= SAME_CAUSE * len(shapes):
            # one odd object is an error on its line; a file of them has another format
            return shape if shape is not Shape.OTHER or len(shapes) > 1 else None
    return None


_BY_KEY: Final[Sequence[tuple[Shape, Callable[[Mapping[str, Any]], bool]]]] = (
    (Shape.MESSAGES, lambda item: isinstance(item.get("messages"), list)),
    (Shape.CONVERSATIONS, lambda item: isinstance(item.get("conversations", item.get("conversation")), list)),
    (Shape.CONTENTS, lambda item: isinstance(item.get("contents"), list)),
    (Shape.BATCH, lambda item: isinstance(item.get("body"), dict) and "messages" in item["body"]),
    (Shape.PREFERENCE, lambda item: "chosen" in item and "rejected" in item),
)


def item_shape(item: Mapping[str, Any]) -> Shape | None:
    """Return the other format of one object, or None if it has the keys of a record or is empty."""
    for shape, has_shape in _BY_KEY:
        if has_shape(item):
            return shape
    keys = set(item)
    if isinstance(item.get("context"), dict):
        return Shape.PROMPTS if keys == {"context", "input"} else None
    columns = {column for key in keys if (column := column_of(key))}
    if len(columns - {Column.INSTRUCTION, Column.INPUT, Column.TEXT}) >= 1 and len(columns) >= 2:
        return Shape.FLAT
    if "instruction" in keys and isinstance(item.get("output"), str):
        return Shape.ALPACA
    if {Column.INPUT, Column.TEXT} <= columns:
        return Shape.PAIRS
    if "text" in keys and len(columns) == 1:
        return Shape.TEXT
    if "error" in keys or {"message", "status"} <= keys:
        return Shape.ERROR
    return Shape.OTHER if keys and not keys & {"instruction", "context", "input", "output"} else None

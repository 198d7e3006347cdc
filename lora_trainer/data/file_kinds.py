"""Recognize what a file is when it is not JSONL in the project's format, from its first bytes.

One cause that belongs to the whole file gets one diagnosis with the way out, instead of an error on each line. A cause counts as
the file's if it explains at least `SAME_CAUSE` of the lines; otherwise each line is reported.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lora_trainer.config import DEFAULT_LIMITS
from lora_trainer.data.file_layouts import (
    CONVERTIBLE,
    SAME_CAUSE,
    Layout,
    Shape,
    layout_of,
    shape_of,
    table_of,
    text_lines,
    without_code_fences,
)
from lora_trainer.data.problems import RecordError
from lora_trainer.data.strict_json import decode_json, is_quotable
from lora_trainer.messages import Message

HEAD_BYTES: Final = 256 * 1024
"""How much of a file the diagnosis reads."""
CONVERT: Final = Message("run 'lora-trainer convert FILE --output NEW.jsonl', then validate NEW.jsonl")

_ONE_OBJECT_A_LINE: Final = Message("JSONL: one JSON object a line")
_FORMAT: Final = Message("JSONL in UTF-8")
_DOWNLOAD: Final = Message("download the file itself")
_SAVE_AS_CSV: Final = Message("save it as XLSX or as CSV in UTF-8, then {convert}", convert=CONVERT)
_SAVE_OR_CONVERT: Final = Message("save the file as UTF-8, or {convert}", convert=CONVERT)

_SIGNATURES: Final[Sequence[tuple[bytes, str, str]]] = (
    (
        b"PAR1",
        Message("a Parquet file"),
        Message(
            "export it as JSON lines, with duckdb -c \"COPY 'FILE.parquet' TO 'FILE.jsonl' (FORMAT json)\" or pandas, then "
            "{convert}",
            convert=CONVERT,
        ),
    ),
    (
        b"ARROW1",
        Message("an Arrow (Feather) file"),
        Message("export it as JSON lines, with pandas.read_feather(...).to_json(..., lines=True)"),
    ),
    (
        b"FEA1",
        Message("a Feather file"),
        Message("export it as JSON lines, with pandas.read_feather(...).to_json(..., lines=True)"),
    ),
    (b"ORC", Message("an ORC file"), Message("export it as JSON lines")),
    (b"Obj\x01", Message("an Avro file"), Message("export it as JSON lines")),
    (
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        Message("an old or password-protected Office or Hangul document (XLS, DOC, HWP)"),
        Message("open it, remove the password, and {save}", save=_SAVE_AS_CSV),
    ),
    (b"%PDF-", Message("a PDF"), Message("export the records from the program that wrote it")),
    (
        b"SQLite format 3\x00",
        Message("an SQLite database"),
        Message("export the table with sqlite3 -csv -header, then {convert}", convert=CONVERT),
    ),
    (b"\x89HDF\r\n\x1a\n", Message("an HDF5 file"), Message("export it as JSON lines")),
    (b"\x93NUMPY", Message("a NumPy array"), Message("export it as JSON lines")),
    (b"GGUF", Message("model weights (GGUF)"), Message("check that it is the right file")),
    (b"\x89PNG", Message("an image"), Message("check that it is the right file")),
    (b"\xff\xd8\xff", Message("an image"), Message("check that it is the right file")),
    (b"{\\rtf", Message("a rich text document (RTF)"), Message("save it as plain text in UTF-8")),
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
    (rb"xl/(workbook|worksheets|sharedStrings|styles|theme|_rels)", Message("an Excel workbook (XLSX)"), CONVERT),
    (rb"mimetypeapplication/vnd\.oasis\.opendocument\.spreadsheet", Message("an OpenDocument spreadsheet (ODS)"), _SAVE_AS_CSV),
    (rb"mimetypeapplication/vnd\.oasis\.opendocument", Message("an OpenDocument file"), _SAVE_AS_CSV),
    (rb"word/document|ppt/presentation|application/hwp\+zip", Message("an Office or Hangul document"), _SAVE_AS_CSV),
    (rb"/data\.pkl", Message("a PyTorch checkpoint"), Message("check that it is the right file")),
)
_BOMS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # before UTF-16: its little-endian mark begins with the same bytes
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ENCODING_NAMES: Final = {"utf-16": "UTF-16", "utf-32": "UTF-32", "cp949": Message("CP949 (EUC-KR), Korean Windows' own encoding")}


def diagnosis(head: bytes, *, is_whole: bool, is_prompts: bool = False) -> RecordError | None:
    """Return what is wrong with the whole file that begins with `head`, or None if its lines must be read.

    `head` is decompressed; pass up to `HEAD_BYTES`, and whether that `is_whole` file. Never raises.
    """
    fault = _diagnosis(head, is_whole=is_whole, is_prompts=is_prompts)
    if fault and is_prompts and CONVERT in fault.fix:
        return RecordError(fault.code, fault.got, fault.expected, _for_prompts(fault.fix))
    return fault


def _for_prompts(fix: str) -> str:
    """Return `fix` without `convert`, which writes training records."""
    if fix == CONVERT:
        return Message("write the prompts in the format; SDS.md describes it")
    if fix == _SAVE_OR_CONVERT:
        return Message("save the file as UTF-8")
    if not isinstance(fix, Message):
        return fix
    return Message(fix.template, **{name: _for_prompts(value) for name, value in fix.values.items()})


def _diagnosis(head: bytes, *, is_whole: bool, is_prompts: bool) -> RecordError | None:
    if not head.strip():
        return None
    if fault := no_text(head, is_whole=is_whole):
        return fault
    encoding = text_encoding(head, is_whole=is_whole) or "utf-8"
    if encoding not in ("utf-8", "utf-8-sig"):
        return RecordError(
            "wrong_encoding", Message("text in {encoding}", encoding=_ENCODING_NAMES[encoding[:6]]), "UTF-8", _SAVE_OR_CONVERT
        )
    text = decoded(head, encoding, is_whole=is_whole)
    if source := _read_as_latin(text):
        return RecordError(
            "wrong_encoding",
            Message("{source} text that a program read as Latin-1 and saved as UTF-8 (mojibake)", source=source),
            "Korean in UTF-8",
            "export the file again in UTF-8",
        )
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
            Message("{stream} data under a name without its suffix, or compressed twice", stream=stream),
            "plain JSONL, or a name that ends in .jsonl.gz or .jsonl.zst",
            "rename it to .jsonl.gz or .jsonl.zst",
        )
    archive = next((name for magic, name in _ARCHIVES if head.startswith(magic)), None)
    if archive == "zip":
        for pattern, name, fix in _IN_ZIP:
            if re.search(pattern, head):
                return RecordError("wrong_format", name, _FORMAT, fix)
    if archive or head[257:262] == b"ustar":
        return RecordError(
            "compressed",
            Message("a {format} archive", format=archive or "tar"),
            "plain JSONL, .jsonl.gz or .jsonl.zst",
            "unpack it",
        )
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
    # Python writes syllables beyond EUC-KR as eight bytes, letter by letter
    common = sum(len(character.encode("euc_kr", "ignore")) == 2 for character in beyond_ascii)
    # most of it, because the bytes of Chinese text are Hangul and Hanja in CP949
    return hangul >= 0.8 * len(beyond_ascii) and common >= 0.9 * len(beyond_ascii)


def _read_as_latin(text: str) -> str | None:
    """Return the encoding that Korean text had before a program read it as Latin-1 or Windows-1252, if most lines were."""
    lines = [line for line in text.split("\n")[:200] if not line.isascii()]
    found: list[str] = []
    for line in lines:
        for latin in ("latin-1", "cp1252"):
            try:
                raw = line.encode(latin)
                # a lone byte at a cut decodes to nothing, which proves nothing
                is_cp949 = _is_cp949(raw) and re.search("[가-힣]", raw.decode("cp949", "ignore"))
                found.append("CP949" if is_cp949 else "UTF-8" if re.search("[가-힣]", raw.decode("utf-8")) else "")
                break
            except UnicodeError:
                continue
    usual = max(found, key=found.count, default="")
    return usual if usual and found.count(usual) >= SAME_CAUSE * len(lines) else None


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
        return _placeholder(
            "a Git LFS pointer: the data itself was not downloaded",
            Message("run 'git lfs pull', or {download}", download=_DOWNLOAD),
        )
    if re.match(r"(\.\./|/)?[^\n]{0,200}annex/objects/", start):
        return _placeholder(
            "a git-annex pointer: the data itself was not downloaded",
            Message("run 'git annex get', or {download}", download=_DOWNLOAD),
        )
    if re.match(r"(md5: |outs:\s*\n- (md5|hash): )", start):
        return _placeholder(
            "a DVC pointer: the data itself was not downloaded", Message("run 'dvc pull', or {download}", download=_DOWNLOAD)
        )
    if re.match(r"# xet version \d", start):
        return _placeholder("a Xet pointer: the data itself was not downloaded", _DOWNLOAD)
    if re.search(r"^<{7} ", text, re.MULTILINE) and re.search(r"^>{7} ", text, re.MULTILINE):
        return RecordError(
            "wrong_layout",
            "an unresolved merge conflict of Git (<<<<<<<, =======, >>>>>>>)",
            _ONE_OBJECT_A_LINE,
            "keep the lines of one side, and remove the other side and the markers",
        )
    if not start.startswith("<"):
        return None
    if code := re.search(r"<Error>.{0,500}?<Code>([A-Za-z]{1,40})</Code>", start, re.DOTALL):
        return _placeholder(
            Message("an error document of an object store ({code})", code=code[1]),
            "check the address and the rights, then download it again",
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
    if without_code_fences(text) != text:
        return RecordError("wrong_layout", "JSON in a Markdown code block (```)", _ONE_OBJECT_A_LINE, CONVERT)
    layout, items = layout_of(text, is_whole=is_whole)
    shape = shape_of(items)
    if shape is Shape.ERROR and len(items) == 1:
        return _placeholder("an error document instead of data", "check the address and the rights, then download it again")
    if layout is Layout.LINES:
        return _wrong_shape(shape, items, is_prompts=is_prompts)
    if layout is Layout.TABLE:
        table = table_of(text)
        known = table is not None and table.header is not None
        delimiter = {",": Message("commas"), "\t": Message("tabs"), ";": Message("semicolons"), "|": Message("bars")}[
            table.delimiter if table else ","
        ]
        return RecordError(
            "wrong_format",
            Message("a CSV table, separated by {delimiter}", delimiter=delimiter),
            _FORMAT,
            CONVERT
            if known
            else Message(
                "name its columns in the first row (instruction, summary, feeling, intensity, input, reply, face), then {convert}",
                convert=CONVERT,
            ),
        )
    if layout is not None:
        is_known = shape is not None and shape is not Shape.OTHER
        got = Message("{layout}, in {shape}", layout=Message(layout), shape=Message(str(shape))) if is_known else Message(layout)
        fix = CONVERT if shape is None or shape in CONVERTIBLE else Message("write one object a line")
        return RecordError("wrong_layout", got, _ONE_OBJECT_A_LINE, fix)
    return plain_text(text, is_whole=is_whole)


def _wrong_shape(shape: Shape | None, items: Sequence[Mapping[str, Any]], *, is_prompts: bool) -> RecordError | None:
    if shape is None or (is_prompts and shape is Shape.PROMPTS):
        return None
    expected = (
        Message("evaluation prompts: context, input") if is_prompts else Message("records: instruction, context, input, output")
    )
    got = Message(shape)
    if shape is Shape.PROMPTS:
        fix = Message("call the file eval_prompts.jsonl to check it as such, and name it with evaluation.prompts")
    elif shape is Shape.OTHER:
        keys = list(dict.fromkeys(key for item in items for key in item if is_quotable(key)))[:5]
        got = Message("{shape} ({keys})", shape=got, keys=", ".join(keys)) if keys else got
        fix = Message("rename the keys, or write the records in the format")
    elif shape not in CONVERTIBLE or is_prompts:
        fix = Message("write them in the format; docs/data-format.md describes it")
    else:
        fix = CONVERT
    return RecordError("wrong_schema", got, expected, fix)


def _no_json(text: str, *, is_whole: bool) -> RecordError | None:
    """Recognize a file none of whose lines is JSON, all for the same reason."""
    reasons: list[str] = []
    for line in text_lines(text, is_whole=is_whole):
        try:
            decode_json(line, DEFAULT_LIMITS)
        except RecordError as fault:
            reasons.append(fault.got.values.get("reason", "") if isinstance(fault.got, Message) else "")
        else:
            return None
    usual = max(reasons, key=reasons.count, default="")
    if len(reasons) < 5 or not usual or reasons.count(usual) < SAME_CAUSE * len(reasons):
        return None
    return RecordError(
        "wrong_layout",
        Message("something that is not JSON ({reason}) on each line", reason=usual),
        _ONE_OBJECT_A_LINE,
        "write it with a JSON library, such as json.dumps, which quotes names and escapes quotes in text",
    )


def plain_text(text: str, *, is_whole: bool) -> RecordError | None:
    """Recognize YAML and prose."""
    if re.match(r"(---\s*\n|%YAML|- *[\w가-힣]+:(\s|$))", text) or (
        re.match(r"[^\W\d]\w*:(\s|$)", text) and len(re.findall(r"^ *(?:- )?[^\W\d]\w*:(?: +[^{\s]|$)", text, re.MULTILINE)) >= 3
    ):
        return RecordError("wrong_format", "YAML", _FORMAT, "write it as JSON lines, for example with yq -o=json -I=0 '.[]'")
    lines = text_lines(text, is_whole=is_whole)
    if len(lines) >= 2 and not any(line.lstrip()[:1] in '{["' for line in lines):
        return RecordError("wrong_format", "plain text", _FORMAT, "write one JSON object a line; docs/data-format.md describes it")
    return None

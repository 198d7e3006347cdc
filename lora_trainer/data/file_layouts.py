"""Recognize how a text file arranges its records, and what format the JSON objects in it have."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, NamedTuple

from lora_trainer.config import DEFAULT_LIMITS
from lora_trainer.data.convert_columns import Column, column_of
from lora_trainer.data.problems import RecordError
from lora_trainer.data.strict_json import decode_json
from lora_trainer.messages import Message

SAME_CAUSE: Final = 0.9
"""Share of the lines that a cause must explain to be the whole file's."""
_HEAD_LINES: Final = 200
_CODE_FENCE: Final = re.compile(r"^[ \t]*```[^\n]*$", re.MULTILINE)
# what servers put into the JSON that they send in place of a file
_SERVER_ANSWER: Final = frozenset(
    (
        "message",
        "detail",
        "details",
        "errors",
        "error",
        "status",
        "statusCode",
        "code",
        "documentation_url",
        "request_id",
    )
)


class Layout(StrEnum):
    """How a text file arranges its records. The values are descriptions for messages."""

    LINES = Message("one JSON object a line")
    ARRAY = Message("a JSON array")
    ARRAY_LINES = Message("each line a JSON array")
    STRING_LINES = Message("each line a JSON string that holds JSON (encoded twice)")
    PRETTY = Message("pretty-printed JSON: objects over several lines")
    CONCATENATED = Message("JSON objects without line breaks between them")
    SEPARATED = Message("JSON objects with commas after them")
    TRAILING = Message("JSON with a comma before a closing bracket")
    PYTHON = Message("Python dictionaries, with single quotes")
    WRAPPER = Message("one JSON object around all records")
    COLUMNS = Message("one JSON object with all values of each column")
    TABLE = Message("a CSV table")


class Shape(StrEnum):
    """What JSON objects of another format describe. The values are descriptions for messages."""

    MESSAGES = Message("OpenAI chat format (`messages`)")
    BATCH = Message("OpenAI batch requests (`body.messages`)")
    CONVERSATIONS = Message("ShareGPT format (`conversations`)")
    CONTENTS = Message("Gemini chat format (`contents`)")
    PREFERENCE = Message("preference pairs (`chosen`, `rejected`)")
    ALPACA = Message("Alpaca format (`instruction`, `input`, `output` as plain text)")
    PAIRS = Message("pairs of a prompt and a completion")
    FLAT = Message("flat columns instead of nested objects, as from a spreadsheet")
    TEXT = Message("only a `text`")
    NO_INSTRUCTION = Message("records without an instruction")
    PROMPTS = Message("evaluation prompts, without instruction and output")
    ERROR = Message("an error document")
    OTHER = Message("JSON objects with other keys")


CONVERTIBLE: Final = frozenset(
    (
        *(Shape.MESSAGES, Shape.BATCH, Shape.CONVERSATIONS, Shape.CONTENTS),
        *(Shape.ALPACA, Shape.PAIRS, Shape.FLAT, Shape.NO_INSTRUCTION),
    )
)
"""Shapes that `convert` turns into records."""


class Table(NamedTuple):
    """The dialect of a CSV table."""

    delimiter: str
    header: int | None
    """Index of the header among the rows, or None if no row has known column names."""


# --- layouts ---------------------------------------------------------------------------------------------


def text_lines(text: str, *, is_whole: bool) -> list[str]:
    """Return the first lines that are not blank, up to 200; the last line of a cut text is left out."""
    lines = text.split("\n", _HEAD_LINES)
    if len(lines) > 1 and (not is_whole or len(lines) > _HEAD_LINES):
        lines.pop()
    return [line for line in lines if line.strip()]


def layout_of(text: str, *, is_whole: bool) -> tuple[Layout | None, list[dict[str, Any]]]:
    """Return how the beginning of a file arranges its records, and some of them. None if it is not recognized."""
    lines = text_lines(text, is_whole=is_whole)
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
            return Layout.ARRAY_LINES, [item for value in lists for item in items_of(value) if isinstance(item, dict)]
        strings = [_value(value) for value in values if isinstance(value, str)]
        if len(strings) >= needed and all(isinstance(value, dict) for value in strings):
            return Layout.STRING_LINES, [value for value in strings if isinstance(value, dict)]
    return _over_lines(text, lines, is_whole=is_whole)


def items_of(value: object) -> Sequence[object]:
    """Return the objects in a JSON value: those of a list, the value itself, or a list of chat turns as one chat."""
    if not isinstance(value, list):
        return [value]
    if value and all(isinstance(turn, dict) and "role" in turn and "content" in turn for turn in value):
        return [{"messages": value}]
    return value


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
    if re.match(r'\[\s*(\{\s*["}]|\[\s*["\[{\]\d-]|\]\s*$)', start) or (
        re.match(r'\[\s*["\d]', start) and isinstance(_value(start), list)
    ):
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
    gap = re.compile(r"[\s,]+")
    while len(found) < 20:
        if separator := gap.match(text, at):
            at = separator.end()
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


def without_code_fences(text: str) -> str:
    """Return JSON text without the ``` lines of Markdown, which stay as blank lines; other text stays as it is."""
    bare = _CODE_FENCE.sub("", text) if "```" in text else text
    if bare == text or re.match(r"[^{\[]*[{\[]", bare) is None or table_of(bare):
        return text
    return bare


_PREFIXED_JSON: Final = re.compile(r"\s*[\w .:-]{1,40}\{\s*\"")


def table_of(text: str) -> Table | None:
    """Return the dialect of a CSV table, or None if `text` is none."""
    # JSON, XML, or JSON behind the prefix of a log or of server-sent events, whose commas can look like columns
    if text.lstrip()[:1] in "{[<" or _PREFIXED_JSON.match(text):
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
            return shape if shape not in (Shape.OTHER, Shape.NO_INSTRUCTION) or len(shapes) > 1 else None
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
        if keys - {"tags"} == {"context", "input"}:
            return Shape.PROMPTS
        return Shape.NO_INSTRUCTION if keys == {"context", "input", "output"} else None
    columns = {column for key in keys if (column := column_of(key))}
    if len(columns - {Column.INSTRUCTION, Column.INPUT, Column.TEXT}) >= 1 and len(columns) >= 2:
        return Shape.FLAT
    if "instruction" in keys and isinstance(item.get("output"), str):
        return Shape.ALPACA
    if {Column.INPUT, Column.TEXT} <= columns:
        return Shape.PAIRS
    if "text" in keys and len(columns) == 1:
        return Shape.TEXT
    if "error" in keys or (keys and keys <= _SERVER_ANSWER and keys != {"message"}):
        return Shape.ERROR
    return Shape.OTHER if keys and not keys & {"instruction", "context", "input", "output"} else None

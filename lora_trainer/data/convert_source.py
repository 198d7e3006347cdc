"""Read the records of a file in another format as JSON objects, each with the line or row that it begins on."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from lora_trainer.config import LimitsConfig
from lora_trainer.data.compression import CorruptStreamError, DecompressedTooLargeError, detect_compression, open_data
from lora_trainer.data.convert_columns import Column, columns_of
from lora_trainer.data.convert_workbook import Cell, read_sheet
from lora_trainer.data.file_kinds import HEAD_BYTES, decoded, is_workbook, no_text, not_the_data, plain_text, text_encoding
from lora_trainer.data.file_layouts import (
    Layout,
    Table,
    items_of,
    layout_of,
    table_of,
    without_code_fences,
    without_trailing_commas,
)
from lora_trainer.data.problems import ConversionError, RecordError
from lora_trainer.data.record_errors import described
from lora_trainer.data.strict_json import RECORD_SHAPE, decode_json, is_quotable
from lora_trainer.messages import Message, marked

MAX_BYTES: Final = 256 * 2**20
"""Largest file that `convert` reads, decompressed: it holds the whole file in memory."""
# the tree that Python builds for a literal is fifty times as large as its text
_MAX_PYTHON_CHARACTERS: Final = 4 * 2**20
_HEADER_ROWS: Final = 20
_MAX_NAMED: Final = 10
# a JSON string, an unmatched quote, or a bracket
_TOKEN: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"|["\[\]{}]', re.DOTALL)
# U+001E separates the objects of a JSON text sequence (RFC 7464)
_BETWEEN: Final = " \t\r\n\x1e,[]"
_TEXT_COLUMNS: Final = frozenset((Column.INSTRUCTION, Column.SUMMARY, Column.INPUT, Column.TEXT))


class Item(NamedTuple):
    """One object of the file, or what is wrong with it."""

    line: int
    """Line, or row of a sheet, from 1."""
    value: Mapping[str, Any] | RecordError


@dataclass(slots=True)
class Source:
    """The objects of a file in its order, and remarks for its author."""

    items: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_source(path: Path, limits: LimitsConfig, sheet: str | None) -> Source:
    """Return the objects of `path`. Raises `RecordError` for a file that holds none, and `OSError`."""
    data = _content(path, limits)
    head, is_whole = data[:HEAD_BYTES], len(data) <= HEAD_BYTES
    if not head.strip():
        raise ConversionError("empty_file", "an empty file", "records", "check that it is the right file and was copied completely")
    if is_workbook(head):
        found = read_sheet(data, limits, sheet)
        source = _of_rows(found.rows, None)
        source.notes = [*found.notes, *source.notes]
        return source
    if sheet is not None:
        raise ConversionError("no_sheets", "a file without sheets", "an XLSX file for --sheet", "remove --sheet")
    if fault := no_text(head, is_whole=is_whole):
        raise fault
    text = decoded(data, text_encoding(head, is_whole=is_whole) or "utf-8", is_whole=True)
    if fault := not_the_data(text):
        raise fault
    return _of_text(text, limits)


def _content(path: Path, limits: LimitsConfig) -> bytes:
    with path.open("rb") as file:
        suffix = detect_compression(file.read(4))
    max_bytes = min(MAX_BYTES, limits.decompressed_bytes)
    too_large = ConversionError(
        "too_large",
        Message("more than {max_bytes:,} bytes of content", max_bytes=max_bytes),
        Message("at most {most:,}", most=max_bytes),
        "split the file, or raise limits.decompressed_bytes",
    )
    try:
        # by content and not by name: this command is for files that are not what their name says
        with open_data(path, max_bytes, limits.compression_ratio, suffix) as file:
            data = file.read(max_bytes + 1)
    except CorruptStreamError as error:
        raise ConversionError("corrupt_stream", str(error), "a whole compressed file", "copy or compress the file again") from None
    except DecompressedTooLargeError:
        raise too_large from None
    if len(data) > max_bytes:
        raise too_large
    return data


# --- JSON ------------------------------------------------------------------------------------------------


def _of_text(text: str, limits: LimitsConfig) -> Source:
    text = without_code_fences(text)
    layout, _ = layout_of(text, is_whole=True)
    if layout is Layout.TABLE and (table := table_of(text)):
        return _of_csv(text, table)
    if layout is None and (fault := plain_text(text[:HEAD_BYTES], is_whole=len(text) <= HEAD_BYTES)):
        raise fault
    if layout is Layout.COLUMNS:
        return Source(list(_of_columns(text, limits)))
    if layout is Layout.WRAPPER:
        items = list(_scanned(text, 2, limits, is_wrapped=True)) or list(_scanned(text, 1, limits, is_wrapped=True))
        return Source(items, [Message("left out what stands around the list of records")])
    if layout is Layout.PYTHON:
        return Source(list(_of_python(text, limits)))
    if layout in (Layout.ARRAY, Layout.PRETTY, Layout.CONCATENATED, Layout.SEPARATED, Layout.TRAILING):
        return Source(list(_scanned(text, int(layout is Layout.ARRAY), limits)))
    return Source(
        [item for line, piece in enumerate(text.split("\n"), 1) if piece.strip() for item in _of_line(line, piece, limits)]
    )


def _of_line(line: int, text: str, limits: LimitsConfig) -> Iterator[Item]:
    try:
        value = _decoded_object(text, limits)
        if isinstance(value, str):
            value = decode_json(value, limits)
    except RecordError as fault:
        yield Item(line, fault)
        return
    for one in items_of(value):
        yield Item(line, one if isinstance(one, dict) else _not_an_object(one))


def _decoded_object(text: str, limits: LimitsConfig) -> object:
    try:
        return decode_json(text, limits)
    except RecordError as fault:
        mended = without_trailing_commas(re.sub(r",\s*$", "", text))
        if fault.code != "not_json" or mended == text:
            raise
        return decode_json(mended, limits)


def _not_an_object(value: object) -> RecordError:
    return ConversionError("not_an_object", described(value), RECORD_SHAPE, "write one object for each record")


def _scanned(text: str, depth: int, limits: LimitsConfig, *, is_wrapped: bool = False) -> Iterator[Item]:
    """Yield each object that `depth` brackets enclose: 0 for objects in a row, 1 for an array, 2 for a list in an object.

    Other content between the objects is an error, except inside the object that wraps them.
    """
    open_brackets: list[str] = []
    start, line, counted, gap = -1, 1, 0, 0
    for token in _TOKEN.finditer(text):
        first, at = text[token.start()], token.start()
        if first in "[{":
            if len(open_brackets) == depth and first == "{" and start < 0 and (depth < 2 or open_brackets[-1] == "["):
                start = at
                line, counted = line + text.count("\n", counted, at), at
                if not is_wrapped and (between := text[gap:at].strip(_BETWEEN)):
                    yield Item(line, _leftover(between))
            open_brackets.append(first)
        elif first in "]}":
            del open_brackets[-1:]
            if start >= 0 and len(open_brackets) == depth:
                yield from _of_line(line, text[start : token.end()], limits)
                start, gap = -1, token.end()
        elif token.end() - at == 1:
            # a string without its end: everything after it is lost
            break
    if start >= 0:
        broken = ConversionError(
            "truncated",
            "an object without its end",
            "a whole object",
            "mend the quotes or brackets from there on, or copy the file again",
        )
        yield Item(line, broken)
    elif not is_wrapped and (rest := text[gap:].strip(_BETWEEN)):
        yield Item(line + text.count("\n", counted, gap), _leftover(rest))


def _leftover(text: str) -> RecordError:
    return ConversionError(
        "not_an_object",
        Message("{count:,} characters outside the objects", count=len(text)),
        RECORD_SHAPE,
        "remove them, or write them as an object",
    )


def _of_columns(text: str, limits: LimitsConfig) -> Iterator[Item]:
    try:
        whole: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError):
        raise ConversionError("not_json", "something that is not JSON", RECORD_SHAPE, "write it with a JSON library") from None
    if isinstance(whole.get("columns"), list) and isinstance(whole.get("data"), list):
        # pandas' orient="split": names, and rows of values
        for number, values in enumerate(whole["data"], 1):
            row = dict(zip(map(str, whole["columns"]), values, strict=False)) if isinstance(values, list) else values
            yield from (Item(number, item.value) for item in _of_line(1, json.dumps(row), limits))
        return
    columns = {name: list(value.values()) if isinstance(value, dict) else value for name, value in whole.items()}
    lists = {name: value for name, value in columns.items() if isinstance(value, list)}
    lengths = {len(value) for value in lists.values()}
    if len(lengths) != 1:
        raise ConversionError(
            "uneven_columns", "columns of different lengths", "a value for each record in each column", "export it as rows"
        )
    for number in range(lengths.pop()):
        row = {name: value[number] for name, value in lists.items()}
        yield from (Item(number + 1, item.value) for item in _of_line(1, json.dumps(row), limits))


def _of_python(text: str, limits: LimitsConfig) -> Iterator[Item]:
    lines = text.split("\n")
    is_by_line = all(line.lstrip()[:1] in ("{", "") for line in lines) and all(
        line.rstrip()[-1:] in ("}", ",", "") for line in lines
    )
    pieces = enumerate(lines, 1) if is_by_line else [(1, text)]
    for line, piece in pieces:
        if piece.strip():
            try:
                value = python_as_json(piece.strip().rstrip(","))
            except RecordError as fault:
                yield Item(line, fault)
                continue
            yield from _of_line(line, value, limits)


def python_as_json(text: str) -> str:
    """Return the JSON of a Python literal. Nothing in it runs."""
    if len(text) > _MAX_PYTHON_CHARACTERS:
        raise ConversionError(
            "too_large",
            Message("a Python literal of {count:,} characters", count=len(text)),
            Message("at most {most:,}", most=_MAX_PYTHON_CHARACTERS),
            "write it with json.dumps",
        )
    try:
        return json.dumps(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ConversionError(
            "not_json", "a Python value that is not a literal", RECORD_SHAPE, "write it with json.dumps"
        ) from None


# --- tables ----------------------------------------------------------------------------------------------


def _of_csv(text: str, table: Table) -> Source:
    rows: list[tuple[int, Sequence[Cell]]] = []
    # a quote that is not closed makes one huge cell, which is reported as too long; the module's own limit would end the reading
    before = csv.field_size_limit(max(len(text), 1))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=table.delimiter)
        start = 1
        for row in reader:
            # the cells of a Markdown table are padded
            rows.append((start, [cell.strip() for cell in row] if table.delimiter == "|" else row))
            start = reader.line_num + 1
    except csv.Error:
        raise ConversionError("not_csv", "a table that cannot be read", "CSV", "save it as CSV in UTF-8 again") from None
    finally:
        csv.field_size_limit(before)
    return _of_rows(rows, table.header)


def _of_rows(rows: Sequence[tuple[int, Sequence[Cell]]], header: int | None) -> Source:
    """Return the rows below the header as objects with the names of `Column`."""
    if header is None:
        header = next(
            (index for index, (_, row) in enumerate(rows[:_HEADER_ROWS]) if len(set(columns_of(row)) - {None}) >= 2), None
        )
    if header is None:
        raise ConversionError(
            "no_header",
            Message("no column names that are known in the first {rows} rows", rows=_HEADER_ROWS),
            "a row with instruction, summary, feeling, intensity, input, reply and face, or their Korean names",
            "name the columns; docs/data-format.md lists the names",
        )
    line, names = rows[header]
    columns = columns_of(names)
    source = Source()
    for column in Column:
        if columns.count(column) > 1:
            same = ", ".join(f"'{name}'" for name, found in zip(names, columns, strict=True) if found is column)
            raise ConversionError(
                "same_column",
                Message("the columns {same}, which all mean {column}", same=same, column=column),
                Message("one column for {column}", column=column),
                "rename or remove the others",
            )
    if header:
        source.notes.append(Message("took row {line} as the column names and left out what is above it", line=line))
    # a header that a damaged file lacks may be training text, so only plain names are quoted
    unknown = [
        f"'{name}'" if isinstance(name, str) and is_quotable(name) else f"number {number}"
        for number, (name, column) in enumerate(zip(names, columns, strict=True), 1)
        if column is None and not _is_empty(name)
    ]
    if unknown:
        more = ", …" if len(unknown) > _MAX_NAMED else ""
        source.notes.append(
            Message("left out columns that no record has: {names}", names=f"{', '.join(unknown[:_MAX_NAMED])}{more}")
        )
    for line, row in rows[header + 1 :]:
        if any(not _is_empty(cell) for cell in row) and not all(_is_rule(cell) for cell in row):
            source.items.append(Item(line, _of_row(row, columns)))
    return source


def _of_row(row: Sequence[Cell], columns: Sequence[Column | None]) -> Mapping[str, Any] | RecordError:
    if any(not _is_empty(cell) for cell in row[len(columns) :]):
        return ConversionError(
            "too_many_cells",
            Message("{count} cells", count=len(row)),
            Message("{count}, as in the row of names", count=len(columns)),
            "quote cells that contain the separator",
        )
    found: dict[str, Any] = {}
    for cell, column in zip(row, columns, strict=False):
        if column is None or _is_empty(cell):
            continue
        if isinstance(cell, RecordError):
            return ConversionError(
                cell.code, Message("{got} in the column {column}", got=marked(cell.got), column=column), cell.expected, cell.fix
            )
        is_number = isinstance(cell, int | float) and not isinstance(cell, bool)
        found[column] = f"{cell:.15g}" if column in _TEXT_COLUMNS and is_number else cell
    return found


def _is_rule(cell: Cell) -> bool:
    """Return whether a cell is empty or part of the line below the header of a Markdown table."""
    return _is_empty(cell) or (isinstance(cell, str) and re.fullmatch(r"\s*:?-{2,}:?\s*", cell) is not None)


def _is_empty(cell: Cell) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())

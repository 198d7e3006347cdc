"""Read one sheet of an XLSX workbook as rows of values.

An XLSX file is a zip of XML. The standard library reads both, so a dependency for one command is out of proportion; what matters
here are the limits, which cover the decompressed size of every part, and the refusal of document types (entities).
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from posixpath import join, normpath
from typing import Any, Final
from xml.parsers import expat

from lora_trainer.config import LimitsConfig
from lora_trainer.data.problems import ConversionError, RecordError
from lora_trainer.messages import Message, counted

Cell = str | int | float | bool | None | RecordError
"""A value, None for an empty cell, or why a cell has none."""

_HARMLESS_BYTES: Final = 16 * 2**20
_MAX_COLUMNS: Final = 256
_MAX_MERGES: Final = 2000
_REFERENCE: Final = re.compile(r"([A-Z]{1,3})(\d{1,7})")
# numbers of the built-in formats that show dates and times (ECMA-376, part 1, 18.8.30)
_DATE_FORMATS: Final = frozenset((*range(14, 23), *range(27, 37), *range(45, 48), *range(50, 59)))
_DAMAGED: Final = ConversionError(
    "damaged_workbook", "a damaged XLSX file", "an XLSX file", "open it and save it again, or save it as CSV in UTF-8"
)


@dataclass(slots=True)
class Sheet:
    """The rows of a sheet, each with its number, and remarks for its author."""

    rows: list[tuple[int, list[Cell]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_sheet(data: bytes, limits: LimitsConfig, name: str | None) -> Sheet:
    """Return the sheet called `name`, by default the only visible one. Raises `RecordError`."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return _read(_Parts(archive, len(data), limits), name)
    except (
        zipfile.BadZipFile,
        zlib.error,
        expat.ExpatError,
        KeyError,
        EOFError,
        NotImplementedError,
        ValueError,
        OverflowError,
        OSError,
    ) as error:
        if isinstance(error, RecordError):
            raise
        raise _DAMAGED from None
    except RuntimeError:
        # zipfile's error for an encrypted part
        raise ConversionError(
            "encrypted", "an encrypted XLSX file", "one without a password", "open it and save it without a password"
        ) from None


class _Parts:
    """Read the parts of the archive within the limits."""

    def __init__(self, archive: zipfile.ZipFile, size_bytes: int, limits: LimitsConfig) -> None:
        self._archive = archive
        self._left_bytes = min(limits.decompressed_bytes, max(_HARMLESS_BYTES, int(limits.compression_ratio * size_bytes)))

    def __contains__(self, part: str) -> bool:
        return part in self._archive.namelist()

    def parse(
        self, part: str, start: Callable[[str, dict[str, str]], Any], end: Callable[[str], Any], text: Callable[[str], Any]
    ) -> None:
        """Call `start`, `end` and `text` for the elements of an XML part, with their names without a namespace prefix."""
        parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartElementHandler = lambda tag, attributes: start(tag.rpartition(":")[2], attributes)
        parser.EndElementHandler = lambda tag: end(tag.rpartition(":")[2])
        parser.CharacterDataHandler = text
        parser.StartDoctypeDeclHandler = _refuse_doctype
        with self._archive.open(part) as file:
            while chunk := file.read(64 * 1024):
                self._left_bytes -= len(chunk)
                if self._left_bytes < 0:
                    raise ConversionError(
                        "decompressed_too_large",
                        "an XLSX file that decompresses to more than the limits allow",
                        "no more than limits.decompressed_bytes and limits.compression_ratio allow",
                        "check that it is the right file; if it is, split it or raise the limits",
                    )
                parser.Parse(chunk, False)
        parser.Parse(b"", True)

    def attributes(self, part: str, *tags: str) -> list[tuple[str, dict[str, str]]]:
        """Return the elements called `tags` of a small part, in document order."""
        found: list[tuple[str, dict[str, str]]] = []
        self.parse(part, lambda tag, attributes: found.append((tag, attributes)) if tag in tags else None, _ignore, _ignore)
        return found


def _refuse_doctype(*_: object) -> None:
    raise ConversionError("damaged_workbook", "an XLSX file with a document type", "XML without one", "open it and save it again")


def _ignore(_: object) -> None:
    pass


def _read(parts: _Parts, name: str | None) -> Sheet:
    sheet = Sheet()
    part = _sheet_part(parts, name, sheet.notes)
    strings = _shared_strings(parts) if "xl/sharedStrings.xml" in parts else []
    dates = _date_styles(parts) if "xl/styles.xml" in parts else frozenset()
    reader = _SheetReader(strings, dates)
    parts.parse(part, reader.start, reader.end, reader.text)
    sheet.rows = reader.rows
    if reader.merges:
        _mark_merged(sheet.rows, reader.merges)
        sheet.notes.append(
            Message("the sheet has {count:,} merged ranges; only the first cell of each has its value", count=len(reader.merges))
        )
    if reader.hidden_rows:
        sheet.notes.append(Message("read {hidden_rows:,} hidden rows as well", hidden_rows=reader.hidden_rows))
    if reader.formulas:
        sheet.notes.append(Message("took the results of {formulas:,} formulas as they were saved", formulas=reader.formulas))
    return sheet


def _sheet_part(parts: _Parts, name: str | None, notes: list[str]) -> str:
    sheets = [attributes for _, attributes in parts.attributes("xl/workbook.xml", "sheet")]
    targets = {a.get("Id", ""): a.get("Target", "") for _, a in parts.attributes("xl/_rels/workbook.xml.rels", "Relationship")}
    visible = [one for one in sheets if one.get("state", "visible") == "visible"]
    names = ", ".join(f"'{one.get('name', '')[:31]}'" for one in visible)
    wanted = [one for one in sheets if one.get("name") == name] if name is not None else visible
    if len(wanted) != 1:
        got = (
            Message("no sheet called '{name}'", name=name)
            if name is not None
            else Message("{count} visible sheets", count=len(visible))
        )
        raise ConversionError(
            "sheets", got, Message("one of {names}", names=names) if names else "a visible sheet", "name the sheet with --sheet"
        )
    if hidden := len(sheets) - len(visible):
        notes.append(
            counted(
                hidden,
                "left out {count} hidden sheet; --sheet NAME reads one",
                "left out {count} hidden sheets; --sheet NAME reads one",
            )
        )
    relation = next((value for key, value in wanted[0].items() if key.rpartition(":")[2] == "id"), "")
    target = targets[relation]
    return target.removeprefix("/") if target.startswith("/") else normpath(join("xl", target))


def _shared_strings(parts: _Parts) -> list[str]:
    strings: list[str] = []
    inside: list[str] = []

    def start(tag: str, _: dict[str, str]) -> None:
        inside.append(tag)
        if tag == "si":
            strings.append("")

    def text(value: str) -> None:
        # not the phonetic reading (rPh) of a string
        if inside and inside[-1] == "t" and "rPh" not in inside and strings:
            strings[-1] += value

    parts.parse("xl/sharedStrings.xml", start, lambda _: inside.pop() if inside else None, text)
    return strings


def _date_styles(parts: _Parts) -> frozenset[int]:
    """Return the indices of the cell styles that show dates."""
    formats: dict[str, str] = {}
    styles: list[str] = []
    inside: list[str] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        inside.append(tag)
        if tag == "numFmt":
            formats[attributes.get("numFmtId", "")] = attributes.get("formatCode", "")
        elif tag == "xf" and "cellXfs" in inside:
            styles.append(attributes.get("numFmtId", "0"))

    parts.parse("xl/styles.xml", start, lambda _: inside.pop() if inside else None, _ignore)

    def is_date(number: str) -> bool:
        code = re.sub(r'"[^"]*"|\[[^\]]*\]|\\.', "", formats.get(number, "")).lower()
        return (number.isdecimal() and int(number[:9]) in _DATE_FORMATS) or bool(re.search("[ymdhs]", code))

    return frozenset(index for index, number in enumerate(styles) if is_date(number))


class _SheetReader:
    """Handlers for the XML of a sheet, which collect its rows."""

    def __init__(self, strings: list[str], dates: frozenset[int]) -> None:
        self.rows: list[tuple[int, list[Cell]]] = []
        self.merges: list[tuple[int, int, int, int]] = []
        self.hidden_rows = self.formulas = 0
        self._strings, self._dates = strings, dates
        self._inside: list[str] = []
        self._cell: dict[str, str] = {}
        self._value: list[str] = []
        self._has_value = self._has_formula = False

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self._inside.append(tag)
        if tag == "row":
            number = attributes.get("r", "")
            self.rows.append((int(number) if number.isdecimal() and len(number) < 8 else self._row_number() + 1, []))
            self.hidden_rows += attributes.get("hidden") in ("1", "true")
        elif tag == "c":
            self._cell, self._value, self._has_value, self._has_formula = attributes, [], False, False
        elif tag == "f":
            self._has_formula = True
        elif tag in ("v", "is"):
            self._has_value = True
        elif tag == "mergeCell" and len(self.merges) < _MAX_MERGES:
            corners = _REFERENCE.findall(attributes.get("ref", ""))
            if len(corners) == 2:
                (left, top), (right, bottom) = corners
                self.merges.append((int(top), _column(left), int(bottom), _column(right)))

    def text(self, value: str) -> None:
        if self._inside and (
            self._inside[-1] == "v" or (self._inside[-1] == "t" and "is" in self._inside and "rPh" not in self._inside)
        ):
            self._value.append(value)

    def end(self, tag: str) -> None:
        self._inside.pop()
        if tag == "c" and self.rows:
            row = self.rows[-1][1]
            reference = _REFERENCE.fullmatch(self._cell.get("r", ""))
            column = _column(reference[1]) if reference else len(row)
            if column < _MAX_COLUMNS:
                row.extend([None] * (column + 1 - len(row)))
                row[column] = self._cell_value()
            self.formulas += self._has_formula

    def _row_number(self) -> int:
        return self.rows[-1][0] if self.rows else 0

    def _cell_value(self) -> Cell:
        value, kind = "".join(self._value), self._cell.get("t", "n")
        if self._has_formula and not self._has_value:
            return ConversionError(
                "formula", "a formula without a saved result", "a value", "open the file in a spreadsheet program and save it"
            )
        if not self._has_value:
            return None
        if kind == "s":
            return self._strings[int(value)] if value.isdecimal() and int(value[:9]) < len(self._strings) else None
        if kind == "e":
            return ConversionError("cell_error", "an error value such as #N/A", "a value", "mend the cell")
        if kind == "b":
            return value == "1"
        if kind == "d" or (kind == "n" and self._is_date()):
            return ConversionError("date_cell", "a date", "text or a number", "format the cell as text and write what is meant")
        if kind == "n":
            number = float(value) if value else 0.0
            return int(number) if number.is_integer() and abs(number) < 1e15 else number
        return value

    def _is_date(self) -> bool:
        style = self._cell.get("s", "")
        return style.isdecimal() and int(style[:9]) in self._dates


def _column(letters: str) -> int:
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - 64
    return number - 1


def _mark_merged(rows: list[tuple[int, list[Cell]]], merges: list[tuple[int, int, int, int]]) -> None:
    """Replace the empty cells of merged ranges by the reason why they are empty."""
    fault = ConversionError(
        "merged_cell", "a cell merged with another", "a value in each row", "split the merged cells and fill each row"
    )
    for number, row in rows:
        for top, left, _, right in _ranges_of(number, merges):
            last = min(right, _MAX_COLUMNS - 1)
            row.extend([None] * (last + 1 - len(row)))
            for column in range(left, last + 1):
                if row[column] is None and (number, column) != (top, left):
                    row[column] = fault


def _ranges_of(row: int, merges: list[tuple[int, int, int, int]]) -> Iterator[tuple[int, int, int, int]]:
    return (merge for merge in merges if merge[0] <= row <= merge[2])

"""Problems in data files, described so that the data's author can fix them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lora_trainer.messages import Message, marked


class Severity(StrEnum):
    """An error stops the run before it uses a GPU. A warning is counted and stops the run only under `--strict`."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem in a data file: its location, the actual and the expected value, and the fix."""

    line: int | None
    """Line number from 1, or None if the problem concerns the whole file."""
    field: str
    """Dotted path such as `context.current_emotion.type`, or empty if the problem concerns the whole line."""
    severity: Severity
    code: str
    """The kind of problem in snake_case. Reports count problems per code."""
    got: str
    """In English, as are the two below. A `Message` if it has values, so that it can be shown in another language."""
    expected: str
    fix: str

    def render(self, file: str | Path) -> Message:
        """Return the line `file:line: field: got ..., expected ...; fix`."""
        where = str(file) if self.line is None else f"{file}:{self.line}"
        what = f"{self.field}: " if self.field else ""
        return Message(
            "{where}: {field}got {got}, expected {expected}; {fix}",
            where=where,
            field=what,
            got=marked(self.got),
            expected=marked(self.expected),
            fix=marked(self.fix),
        )

    def as_json(self) -> dict[str, object]:
        """Return all fields, for `validate --json`."""
        return {
            "line": self.line,
            "field": self.field,
            "severity": str(self.severity),
            "code": self.code,
            "got": str(self.got),
            "expected": str(self.expected),
            "fix": str(self.fix),
        }


class RecordError(ValueError):
    """A problem whose line and field are known only to the caller; `jsonl` turns it into a `Problem`."""

    def __init__(self, code: str, got: str, expected: str, fix: str) -> None:
        self.code, self.got, self.expected, self.fix = code, got, expected, fix
        super().__init__(code)


class IncompleteJsonError(RecordError):
    """JSON that ends too early. On a file's last line, the file is probably truncated."""


class ConversionError(RecordError):
    """A problem that only `convert` reports."""

"""What is wrong with a line of data, in a form that its author can act on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


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


class RecordError(ValueError):
    """What a `Problem` says, raised where line and field are not known."""

    def __init__(self, code: str, got: str, expected: str, fix: str) -> None:
        self.code, self.got, self.expected, self.fix = code, got, expected, fix
        super().__init__(code)


class IncompleteJsonError(RecordError):
    """JSON that could go on: with the end of the file behind it, the file was cut off."""

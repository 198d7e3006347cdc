"""Keep the Korean catalogue in step with the source: extract the messages, update the .po file and compile it.

    python tools/catalogue.py            # list what the catalogue lacks, and exit with 1 if there is something
    python tools/catalogue.py --write    # add new messages, drop those that the source no longer has, and compile the .mo file

Messages are marked by the call that they are an argument of, as for xgettext's `--keyword`.
"""

from __future__ import annotations

import ast
import re
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parent.parent
CATALOGUE: Final = REPOSITORY / "lora_trainer" / "locale" / "ko" / "LC_MESSAGES" / "lora_trainer.po"
PACKAGES: Final = ("entrypoint", "lora_trainer")

KEYWORDS: Final[Mapping[str, tuple[int, ...]]] = {
    "Message": (0,),
    "counted": (1, 2),
    "joined": (1,),
    "RecordError": (1, 2, 3),
    "ConversionError": (1, 2, 3),
    "IncompleteJsonError": (1, 2, 3),
    "Problem": (4, 5, 6),
    "Rule": (1, 2),
    "_warning": (2, 3, 4),
    "_placeholder": (0, 1),
    "lone_surrogate_error": (0,),
}
"""Arguments that are messages, by the name of the function."""

_HEADER: Final = (
    "Project-Id-Version: lora-trainer\nMIME-Version: 1.0\nContent-Type: text/plain; charset=UTF-8\n"
    "Content-Transfer-Encoding: 8bit\nLanguage: ko\n"
)
_PLACEHOLDER: Final = re.compile(r"\{([a-z_]+(?:![rs])?(?::[^{}\s]*)?)\}")
_ESCAPES: Final = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t"}


class UnmarkedMessageError(ValueError):
    """A message that cannot be translated, because its values are filled in before."""


def extracted() -> list[str]:
    """Return every message of the source once, in the order of files and lines. Raises `UnmarkedMessageError`."""
    found: dict[str, None] = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            found.update(dict.fromkeys(in_module(path.read_text(encoding="utf-8"), str(path.relative_to(REPOSITORY)))))
    for path in sorted((REPOSITORY / "lora_trainer").rglob("*.jinja")):
        found.update(dict.fromkeys(re.findall(r'\bsay\("([^"]+)"\)', path.read_text(encoding="utf-8"))))
    return list(found)


def in_module(source: str, name: str) -> Iterator[str]:
    """Yield the messages of one module. Those without a Latin letter or a semicolon, such as a number, need no translation."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for position in KEYWORDS.get(function, ()):
            for literal in _literals(node.args[position : position + 1]):
                text = _text(literal)
                if not re.search("[A-Za-z;]", _PLACEHOLDER.sub("", text)):
                    continue
                if isinstance(literal, ast.JoinedStr):
                    raise UnmarkedMessageError(
                        f"{name}:{literal.lineno}: got an f-string, expected Message('... {{name}} ...', name=...)"
                    )
                yield text


def _literals(nodes: Iterable[ast.AST]) -> Iterator[ast.Constant | ast.JoinedStr]:
    """Yield the strings that an argument may be: itself, or either side of a condition."""
    for node in nodes:
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            yield node
        elif isinstance(node, ast.IfExp):
            yield from _literals((node.body, node.orelse))
        elif isinstance(node, ast.BoolOp):
            yield from _literals(node.values)


def _text(literal: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(literal, ast.Constant):
        return str(literal.value)
    return "".join(str(part.value) for part in literal.values if isinstance(part, ast.Constant))


def placeholders(template: str) -> set[str]:
    """Return the placeholders of a template with their formats, such as `count:,`. A message with other braces has none."""
    return set(_PLACEHOLDER.findall(template))


# --- the two files ---------------------------------------------------------------------------------------


def read_po(text: str) -> dict[str, str]:
    """Return the translations of a .po file by message, in its order. The header is the one of the empty message."""
    entries: dict[str, str] = {}
    for block in re.split(r"\n\s*\n", text):
        found = {
            keyword: "".join(_unescaped(part) for part in re.findall(r'"((?:[^"\\]|\\.)*)"', strings))
            for keyword, strings in re.findall(r'^(msgid|msgstr) ((?:"(?:[^"\\]|\\.)*"\s*)+)', block, re.MULTILINE)
        }
        if "msgid" in found:
            entries[found["msgid"]] = found.get("msgstr", "")
    return entries


def po_text(entries: Mapping[str, str]) -> str:
    """Return a .po file, the header first. A string of several lines begins with an empty one, as gettext's tools write it."""
    return "\n".join(f"msgid {_quoted(message)}\nmsgstr {_quoted(entries[message])}\n" for message in entries)


def compiled(entries: Mapping[str, str]) -> bytes:
    """Return the .mo file (https://www.gnu.org/software/gettext/manual/html_node/MO-Files.html), without a hash table."""
    pairs = sorted((message.encode(), text.encode()) for message, text in entries.items() if text)
    count = len(pairs)
    offset = 7 * 4 + 2 * 8 * count
    tables, strings = [b"", b""], b""
    for side in (0, 1):
        for pair in pairs:
            tables[side] += struct.pack("<II", len(pair[side]), offset + len(strings))
            strings += pair[side] + b"\0"
    return struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, offset) + tables[0] + tables[1] + strings


def _quoted(text: str) -> str:
    lines = [f'"{"".join(_ESCAPES.get(sign, sign) for sign in line)}"' for line in text.splitlines(keepends=True)] or ['""']
    return "\n".join(['""', *lines]) if len(lines) > 1 else lines[0]


def _unescaped(text: str) -> str:
    meanings = {escape: sign for sign, escape in _ESCAPES.items()}
    return re.sub(r"\\.", lambda found: meanings[found[0]], text)


def updated(entries: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of all messages of the source, with an empty translation for new ones."""
    return {"": _HEADER, **{message: entries.get(message, "") for message in extracted()}}


def lacking(entries: Mapping[str, str]) -> list[str]:
    """Return one line for each message without a translation, or with one whose placeholders differ."""
    lines = [f"no translation: {message}" for message in extracted() if not entries.get(message)]
    lines += [
        f"other placeholders: {message}"
        for message, text in entries.items()
        if message and text and placeholders(message) != placeholders(text)
    ]
    return lines


def main(arguments: list[str]) -> int:
    """Update or check the catalogue, and return the exit code."""
    entries = read_po(CATALOGUE.read_text(encoding="utf-8")) if CATALOGUE.exists() else {}
    if "--write" in arguments:
        entries = updated(entries)
        CATALOGUE.parent.mkdir(parents=True, exist_ok=True)
        CATALOGUE.write_text(po_text(entries), encoding="utf-8")
        CATALOGUE.with_suffix(".mo").write_bytes(compiled(entries))
    lines = lacking(entries)
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Remove credentials from text before it is shown: in log lines, messages and the termination log.

This is the last line of defence. Our own messages contain no credentials, but libraries and servers write messages too, and
users put passwords where none belong. They print a value as it is, as `repr()`, JSON or HTML, in a URL, in base64 or in hex,
so redaction looks for every one of these forms.
"""

from __future__ import annotations

import base64
import os
import re
import string
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from lora_trainer.credentials import credential_files, in_files

_REPLACEMENT: Final = "…"
_MIN_CHARACTERS: Final = 8
"""Minimum length of a value to redact. Shorter ones are words such as "test", which occur in ordinary messages."""

# matches AWS_SECRET_ACCESS_KEY, HF_TOKEN, OPENAI_API_KEY, MLFLOW_TRACKING_PASSWORD, but not AWS_WEB_IDENTITY_TOKEN_FILE (a path)
_NAMES_A_CREDENTIAL: Final = re.compile(
    r"(?:KEY|KEY_ID|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|AUTHORIZATION)S?$", re.IGNORECASE
)
# Matches up to the last @, since a password may contain one. After a colon that does not introduce a port, it also matches
# slashes, which AWS secrets contain.
_USER_INFO: Final = re.compile(r"(?<=://)(?:[^/\s\"'@:]*:(?!\d+(?:/|$))[^\s\"']*|[^/\s\"']*)@")
_ACCESS_KEY_ID: Final = re.compile(r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{12,}\b")
# what a value may have at its ends by mistake, and libraries remove or escape
_EDGES: Final = string.whitespace + "\"'`“”‘’\u00a0\u200b\u200c\u200d\u2060\ufeff" + "".join(map(chr, (*range(32), 127)))

_remembered: set[str] = set()
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Known:
    """The credentials that were known at the last call, and a pattern that matches them."""

    environment: Mapping[str, str] = field(default_factory=dict)
    remembered: frozenset[str] = frozenset()
    files: Mapping[Path, tuple[int, int] | None] = field(default_factory=dict)
    """Modification time and size; None for a file that does not exist."""
    pattern: re.Pattern[str] = re.compile("(?!)")


_known = _Known()


def remember(*credentials: str | None) -> None:
    """Redact these credentials from now on. Use it for those outside the environment, such as a role's."""
    with _lock:
        _remembered.update(value for value in credentials if value)


def remember_user_info(*texts: str) -> None:
    """Redact the passwords of all URIs in `texts`, such as the arguments of a command, from now on."""
    remember(*(password for text in texts if "@" in text for password in _passwords(text)))


def has_user_info(uri: str) -> bool:
    """Return whether a URI contains a user or a password, as in `s3://key:secret@bucket/`."""
    return _USER_INFO.search(uri) is not None


def redacted(text: str) -> str:
    """Return `text` without known credentials, in any form, and without anything that looks like one."""
    return _USER_INFO.sub(f"{_REPLACEMENT}@", _ACCESS_KEY_ID.sub(_REPLACEMENT, _pattern().sub(_REPLACEMENT, text)))


def redacted_value(value: object) -> object:
    """Redact all strings in a value of a log event, at any depth."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {redacted_value(key): redacted_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted_value(item) for item in value]
    if isinstance(value, tuple):
        return tuple(redacted_value(item) for item in value)
    return value


def _pattern() -> re.Pattern[str]:
    """Return a pattern of all credentials that are known now. Compile it again only if environment or files changed."""
    global _known
    known, environment = _known, dict(os.environ)
    paths = known.files if environment == known.environment else credential_files(environment)
    files = {path: _version(path) for path in paths}
    with _lock:
        if environment != known.environment or files != known.files or frozenset(_remembered) != known.remembered:
            # keep what a file held before: a token that was just replaced is still valid
            _remembered.update(in_files(files))
            known = _Known(environment, frozenset(_remembered), files, _pattern_of({*_remembered, *_in_environment(environment)}))
            _known = known
    return known.pattern


def _version(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size


def _in_environment(environment: dict[str, str]) -> Iterator[str]:
    for name, value in environment.items():
        if _NAMES_A_CREDENTIAL.search(name):
            yield value
        elif "@" in value:
            yield from _passwords(value)


def _passwords(value: str) -> Iterator[str]:
    for user_info in _USER_INFO.findall(value):
        user, _, password = user_info.removesuffix("@").partition(":")
        # without a password, the user may be a token; libraries decode both before they use them
        yield password or user
        yield unquote(password or user)


# --- forms -----------------------------------------------------------------------------------------------------------


_IDENTIFYING_BYTES: Final = 48
"""Bytes of a value that its escaped forms are recognised by, which keeps the pattern small for a token of 2,000 characters."""
_HEX: Final = "[0-9a-f]"
_ESCAPES: Final = (
    ("{:02x}", f"{_HEX}{{2}}"),
    (r"\\+x{:02x}", rf"\\+x{_HEX}{{2}}"),
    ("%(?:25)*{:02x}", f"%(?:25)*{_HEX}{{2}}"),
    (r"\\+u{:04x}", rf"\\+u{_HEX}{{4}}"),
    ("&#0*{};", r"&#\d+;"),
    ("&#x0*{:x};", f"&#x{_HEX}+;"),
    (r"\\+{:03o}", r"\\+[0-7]{3}"),
)
"""A byte as encoders escape it, and any byte in the same form."""
_BASE64: Final = r"[\w+/-]|%(?:25)*2[bfBF]|\\+/|\\+u002[bfBF]"
_BASE64_PADDING: Final = r"(?:=|%(?:25)*3[dD]|\\+u003[dD])*"


def _pattern_of(values: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches each of `values`, and each of their lines, in every form."""
    parts = {part.strip(_EDGES) for value in values for part in (value, *value.splitlines())}
    secrets = sorted((part for part in parts if len(part) >= _MIN_CHARACTERS), key=len, reverse=True)
    # a pattern without alternatives would match everywhere
    return re.compile("|".join(form for secret in secrets for form in _forms(secret)) or "(?!)")


def _forms(secret: str) -> Iterator[str]:
    yield "".join(map(_character, secret))
    data = secret.encode("utf-8", "replace")
    # every character escaped, whether it has to be or not; the first ones identify a long value
    for escaped, any_byte in _ESCAPES:
        start = "".join(map(escaped.format, data[:_IDENTIFYING_BYTES]))
        yield f"(?i:{start}{f'(?:{any_byte})*' if len(data) > _IDENTIFYING_BYTES else ''})"
    for offset in range(3):
        # in a longer text, such as `user:password`, the first and last characters also depend on what stands around it
        encoded = base64.b64encode(bytes(offset) + data).decode()[: 8 * (offset + len(data)) // 6]
        core = encoded[-(-8 * offset // 6) :]
        more = "*" if len(core) > _IDENTIFYING_BYTES else "?"
        yield f"{''.join(map(_base64_character, core[:_IDENTIFYING_BYTES]))}(?:{_BASE64}){more}{_BASE64_PADDING}"


def _base64_character(character: str) -> str:
    return {"+": f"(?:-|{_character('+')})", "/": f"(?:_|{_character('/')})"}.get(character, character)


_NAMED: Final = {
    "&": "&(?:amp;)+",
    "<": "&(?:amp;)*lt;",
    ">": "&(?:amp;)*gt;",
    '"': "&(?:amp;)*quot;",
    # a shell ends the quotation, and writes the mark in other quotation marks
    "'": "'\"'\"'|&(?:amp;)*apos;",
    " ": r"\+",
    "\n": r"\\+n",
    "\r": r"\\+r",
    "\t": r"\\+t",
}


def _character(character: str) -> str:
    """Return a pattern that matches a character as it is and as encoders write it, also several of them one after another."""
    if character.isascii() and character.isalnum():
        return character
    units = character.encode("utf-16-be", "surrogatepass")
    code_units = (units[at : at + 2].hex() for at in range(0, len(units), 2))
    data = character.encode("utf-8", "replace")
    escaped = [
        "".join(rf"\\+u{unit}" for unit in code_units),
        rf"\\+u{ord(character):08x}",
        "".join(rf"\\+x{byte:02x}" for byte in data),
        rf"\\+x{ord(character):02x}",
        "".join(f"%(?:25)*{byte:02x}" for byte in data),
        f"&(?:amp;)*#0*{ord(character)};",
        f"&(?:amp;)*#x0*{ord(character):x};",
    ]
    plain = r"\\*\s+" if character.isspace() else rf"\\*{re.escape(character)}"
    if not character.isascii():
        # replaced, or UTF-8 read as Latin-1
        plain += f"|[?\ufffd]|{re.escape(data.decode('latin-1'))}"
    named = f"{_NAMED[character]}|" if character in _NAMED else ""
    return f"(?:{named}{plain}|(?i:{'|'.join(escaped)}))"

"""Remove credentials from text before it is shown: in log lines, messages and the termination log.

This is the last line of defence. Our own messages contain no credentials, but libraries and servers write messages too, and
users put passwords where none belong.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from typing import Final

_REPLACEMENT: Final = "…"
_MIN_CHARACTERS: Final = 8
"""Minimum length of a value to redact. Shorter ones are words such as "test", which occur in ordinary messages."""

# matches AWS_SECRET_ACCESS_KEY, HF_TOKEN, OPENAI_API_KEY, MLFLOW_TRACKING_PASSWORD, but not AWS_WEB_IDENTITY_TOKEN_FILE (a path)
_NAMES_A_CREDENTIAL: Final = re.compile(r"(?:KEY|KEY_ID|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|CREDENTIALS)$", re.IGNORECASE)
# Matches up to the last @, since a password may contain one. After a colon that does not introduce a port, it also matches
# slashes, which AWS secrets contain.
_USER_INFO: Final = re.compile(r"(?<=://)(?:[^/\s\"'@:]*:(?!\d+(?:/|$))[^\s\"']*|[^/\s\"']*)@")
_ACCESS_KEY_ID: Final = re.compile(r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{12,}\b")

_remembered: set[str] = set()
_lock = threading.Lock()


def remember(*credentials: str | None) -> None:
    """Redact these credentials from now on. Use it for those outside the environment, such as a profile's or a role's."""
    with _lock:
        _remembered.update(value for value in credentials if value)


def has_user_info(uri: str) -> bool:
    """Return whether a URI contains a user or a password, as in `s3://key:secret@bucket/`."""
    return _USER_INFO.search(uri) is not None


def redacted(text: str) -> str:
    """Return `text` without known credentials and anything that looks like one."""
    for value in sorted(_known(), key=len, reverse=True):
        text = text.replace(value, _REPLACEMENT)
    return _USER_INFO.sub(f"{_REPLACEMENT}@", _ACCESS_KEY_ID.sub(_REPLACEMENT, text))


def redacted_value(value: object) -> object:
    """Redact all strings in a value of a log event, at any depth."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {key: redacted_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted_value(item) for item in value]
    if isinstance(value, tuple):
        return tuple(redacted_value(item) for item in value)
    return value


def _known() -> set[str]:
    with _lock:
        found = set(_remembered)
    for name, value in os.environ.items():
        if _NAMES_A_CREDENTIAL.search(name):
            found.add(value)
        elif "@" in value:
            found.update(_passwords(value))
    return {value for value in found if len(value) >= _MIN_CHARACTERS}


def _passwords(value: str) -> Iterator[str]:
    for user_info in _USER_INFO.findall(value):
        yield user_info.removesuffix("@").partition(":")[2]

"""Credentials taken out of text that is about to be shown: a log line, a message, the termination log.

The last of several lines of defence: nothing here should ever have something to do. What a library or a server says is
not ours, though, and a user may have put a password where none belongs.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from typing import Final

_SHOWN_INSTEAD: Final = "…"
_SHORTEST: Final = 8
"""Characters. A shorter value is a word such as "test", which tells nothing and may be part of any message."""

# AWS_SECRET_ACCESS_KEY, HF_TOKEN, OPENAI_API_KEY, MLFLOW_TRACKING_PASSWORD; not AWS_WEB_IDENTITY_TOKEN_FILE, which is a path
_NAMES_A_CREDENTIAL: Final = re.compile(r"(?:KEY|KEY_ID|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|CREDENTIALS)$", re.IGNORECASE)
# up to the last @, since a password may hold one; behind a colon that begins no port, also across slashes, as AWS secrets have them
_USER_INFO: Final = re.compile(r"(?<=://)(?:[^/\s\"'@:]*:(?!\d+(?:/|$))[^\s\"']*|[^/\s\"']*)@")
_ACCESS_KEY_ID: Final = re.compile(r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{12,}\b")

_remembered: set[str] = set()
_lock = threading.Lock()


def remember(*credentials: str | None) -> None:
    """Credentials that come from elsewhere than a variable: a profile's, a role's. For the rest of the process."""
    with _lock:
        _remembered.update(value for value in credentials if value)


def has_user_info(uri: str) -> bool:
    """Whether a URI holds a user or a password, as in `s3://key:secret@bucket/`."""
    return _USER_INFO.search(uri) is not None


def redacted(text: str) -> str:
    """`text` without the value of any credential that is known, and without what looks like one."""
    for value in sorted(_known(), key=len, reverse=True):
        text = text.replace(value, _SHOWN_INSTEAD)
    return _USER_INFO.sub(f"{_SHOWN_INSTEAD}@", _ACCESS_KEY_ID.sub(_SHOWN_INSTEAD, text))


def redacted_value(value: object) -> object:
    """The same for all text in a value of a log line, however it is nested."""
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
    return {value for value in found if len(value) >= _SHORTEST}


def _passwords(value: str) -> Iterator[str]:
    for user_info in _USER_INFO.findall(value):
        yield user_info.removesuffix("@").partition(":")[2]

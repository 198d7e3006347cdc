"""What a process knows about the stores it talks to: whether one has answered, and what it does not support.

A store that has answered before may be restarting, so it is retried for the whole budget. One that has never answered is more
likely a wrong address, so the user hears of it within seconds. An earlier attempt that left its work folder counts as well.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

FIRST_CONTACT_S: Final = 6.0
"""Seconds to wait for the first answer of a store. With the start of the process, a user waits less than 15 s."""
_VARIABLES: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION")
"""Variables that together select the store."""


class Contact:
    """What is known about one store."""

    def __init__(self, record: Path | None = None) -> None:
        """`record` is a file that exists if an earlier process had an answer."""
        self._record = record
        self._started_s: float | None = None
        self.answered = record is not None and record.exists()
        """Whether the store has ever answered as S3 does."""
        self.given_up = ""
        """Why the first contact failed, as message text without the object's name; empty unless it did."""
        self.is_no_store = False
        """Whether it failed because something else than a store answered."""
        self.checksums = True
        """Whether uploads carry a checksum header. Some stores reject it."""
        self.conditional_writes = True
        """Whether the store enforces conditional writes. True until it is found not to."""
        self.conditions_probed = False
        """Whether a probe has found that out."""

    def note_answer(self) -> None:
        """Record that the store has answered."""
        if self.answered:
            return
        self.answered, self.given_up = True, ""
        if self._record is not None:
            # without the file, only the next attempt's patience is shorter
            with suppress(OSError):
                self._record.parent.mkdir(parents=True, exist_ok=True)
                self._record.touch()

    def note_no_store(self, said: str) -> None:
        """Record that something else than a store answered, described by `said`, unless a store has answered before."""
        if not self.answered:
            self.given_up, self.is_no_store = f"{said}; not asked again", True

    def first_contact_left_s(self) -> float | None:
        """Return the seconds left for a first answer, counted from the first call, or None once the store has answered."""
        if self.answered:
            return None
        now_s = time.monotonic()
        if self._started_s is None:
            self._started_s = now_s
        return FIRST_CONTACT_S - (now_s - self._started_s)


class Contacts:
    """The stores of one process."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` keeps the record of the stores that have answered for the next attempt."""
        self._folder = folder
        self._known: dict[str, Contact] = {}

    def current(self) -> Contact:
        """Return what is known about the store that the AWS variables select now."""
        selected = "\n".join(os.environ.get(name, "") for name in _VARIABLES)
        # a hash, because an endpoint may contain a password
        key = hashlib.sha256(selected.encode(errors="surrogateescape")).hexdigest()[:16]
        return self._known.setdefault(key, Contact(self._folder / key if self._folder else None))

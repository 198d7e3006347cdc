"""`latest.json`, the pointer to a persona's newest accepted bundle.

Updates use compare-and-swap. A counter decides which run started last, because clocks of machines differ: every run takes the
next value when it starts, and so does every promotion. docs/adr/0019-pointer-counter.md explains the design.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_trainer.errors import StorageError
from lora_trainer.logs import get_logger
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.store.interface import PreconditionFailed, ReadResult, Storage
from lora_trainer.store.manifest import Time
from lora_trainer.store.prefixes import bundle_prefix, latest_key, start_key, starts_key

_SWAP_ATTEMPTS: Final = 8
_COUNT_ATTEMPTS: Final = 30
"""More than for the pointer: many runs may start at once, and each has to take a value of its own."""
_LONGEST_PAUSE_S: Final = 0.2
_MOST_COUNTED: Final = 2**53
_CLOCK_SLACK: Final = timedelta(minutes=5)
"""Difference between the clocks of two healthy machines that deserves no warning."""


class Pointer(BaseModel):
    """The content of `latest.json`. Earlier versions wrote no `counter`."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    run_id: str = Field(min_length=1, max_length=64)
    bundle: str = Field(default="", max_length=1024)
    started_at: Time
    promoted_at: Time | None = None
    accepted_by_hand: bool | None = None
    """True if nobody could compute the run id or the verdict again, and `publish --accept` moved the pointer."""
    counter: int | None = Field(default=None, ge=0, lt=_MOST_COUNTED)
    sense: str | None = Field(default=None, max_length=64)
    """Whether the replies make sense, as far as the verdict judged it: `not_judged` if it looked at form alone."""
    review: dict[str, Any] | None = None
    """What `promote --reviewed` counted (`evaluate/review.py`). Not typed here: no other version's review may stop a run."""

    @property
    def moved_at(self) -> datetime:
        """When the run started, or somebody promoted it."""
        return datetime.fromisoformat(self.promoted_at or self.started_at)

    def as_bytes(self) -> bytes:
        """Return the pointer as JSON, without fields that it does not have."""
        return (json.dumps(self.model_dump(exclude_none=True), indent=2) + "\n").encode()


class _Counter(BaseModel):
    """The last value that a run or a promotion has taken."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    counter: int = Field(ge=0, lt=_MOST_COUNTED)


@dataclass(frozen=True, slots=True)
class LatestMove:
    """The outcome of `move_latest`."""

    moved: bool
    names_this_run: bool
    """Also True if an earlier attempt moved the pointer, because that attempt may not have finished the steps after the move."""
    reason: str
    warning: str = ""
    """A problem of the pointer that does not stop the move; empty without one."""


# -- the counter --------------------------------------------------------------------------------------------------------


def take_count(storage: Storage, blood_type: BloodType) -> int:
    """Take the next value of the persona's counter: a run that starts now, or a promotion.

    Raises `StorageError` if the store cannot be reached, `latest.json` is no pointer, or other writers win every swap.
    """
    key = starts_key(blood_type)
    for _ in range(_COUNT_ATTEMPTS):
        found = storage.read_bytes(key)
        pointer = _read_pointer(storage, blood_type)[0]
        # count on from the pointer if somebody has removed the counter
        mine = max(_counted(found, storage.uri + key), pointer.counter or 0 if pointer else 0) + 1
        if mine >= _MOST_COUNTED:
            raise StorageError(
                f"{storage.uri}{key}: got the counter {mine - 1} here or in {latest_key(blood_type)}, expected one below "
                f"{_MOST_COUNTED - 1}: no run has counted that far; remove this file and the counter in {latest_key(blood_type)}"
            )
        if _swap(storage, key, _Counter(counter=mine).model_dump_json().encode() + b"\n", found):
            return mine
        time.sleep(random.uniform(0, _LONGEST_PAUSE_S))  # noqa: S311  spreads writers, not a secret
    raise StorageError(f"{storage.uri}{key}: other writers changed it {_COUNT_ATTEMPTS} times in a row; run the same command again")


def count_start(storage: Storage, blood_type: BloodType, run_id: str, *, anew: bool = False) -> int:
    """Return the run's counter, taken when its first attempt started. Later attempts keep it, unless they start `anew`.

    Call it with the run's lease. Raises as `take_count` does.
    """
    key = start_key(blood_type, run_id)
    found = None if anew else storage.read_bytes(key)
    if found is not None and (before := _counted(found, storage.uri + key)):
        return before
    mine = take_count(storage, blood_type)
    storage.write_bytes(key, _Counter(counter=mine).model_dump_json().encode() + b"\n")
    return mine


def forget_start(storage: Storage, blood_type: BloodType, run_id: str) -> None:
    """Remove the record of a published run's start: its manifest has the counter. Failures are only logged."""
    key = start_key(blood_type, run_id)
    try:
        storage.delete(key)
    except StorageError as error:
        get_logger().warning("start_left", where=storage.uri + key, problem=str(error))


def _counted(found: ReadResult | None, where: str) -> int:
    if found is None:
        return 0
    try:
        return _Counter.model_validate_json(found.data).counter
    except ValidationError:
        get_logger().warning("counter_unreadable", where=where, expected='{"counter": N}; it is written anew')
        return 0


# -- the pointer --------------------------------------------------------------------------------------------------------


def move_latest(storage: Storage, blood_type: BloodType, manifest: Mapping[str, Any], sense: str = "not_judged") -> LatestMove:
    """Point `latest.json` at the manifest's run, unless it names a run that started or was promoted later. Safe to repeat.

    `sense` is the verdict's word on whether the replies make sense.

    Raises `StorageError` if other writers win the compare-and-swap every time.
    """
    mine = Pointer(
        run_id=manifest["run_id"],
        bundle=bundle_prefix(blood_type, manifest["run_id"]),
        started_at=manifest["started_at"],
        counter=manifest.get("counter"),
        sense=sense,
    )
    for _ in range(_SWAP_ATTEMPTS):
        theirs, found = _read_pointer(storage, blood_type)
        warning = _clock_warning(theirs, storage.uri + latest_key(blood_type)) if theirs else ""
        if theirs is not None and (reason := _reason_to_stay(theirs, mine)):
            return LatestMove(False, theirs.run_id == mine.run_id, reason, warning)
        if _swap(storage, latest_key(blood_type), mine.as_bytes(), found):
            return LatestMove(True, True, "this run started last", warning)
    raise _lost_every_swap(storage, latest_key(blood_type))


def _reason_to_stay(theirs: Pointer, mine: Pointer) -> str:
    """Return the reason why the pointer stays; empty if it moves."""
    if theirs.run_id == mine.run_id:
        return "it already names this run"
    how = "was promoted after this run started" if theirs.promoted_at else "started later"
    way_out = "'lora-trainer promote' moves it by hand"
    if theirs.counter is None and mine.counter is None:
        # both are of versions without a counter: only their clocks are left
        started_at = datetime.fromisoformat(mine.started_at)
        if datetime.fromisoformat(theirs.started_at) > started_at:
            return f"it names run {theirs.run_id}, which started later; {way_out}"
        return f"it names run {theirs.run_id}, which {how}; {way_out}" if theirs.moved_at > started_at else ""
    if mine.counter is None:
        return f"it names run {theirs.run_id} with the counter {theirs.counter}, and this run has none in this output; {way_out}"
    if theirs.counter is None or mine.counter > theirs.counter:
        return ""
    return f"it names run {theirs.run_id}, which {how} (counter {theirs.counter}, this run's is {mine.counter}); {way_out}"


def _clock_warning(pointer: Pointer, where: str) -> str:
    ahead = pointer.moved_at - datetime.now(UTC)
    if ahead <= _CLOCK_SLACK:
        return ""
    return (
        f"{where}: got a time in the future, {pointer.moved_at.isoformat()}, {ahead.days} days and {ahead.seconds // 60} minutes "
        "ahead of this machine's clock; one of the two clocks is wrong: check both (NTP). A counter keeps the order of runs, so "
        "this run moves the pointer anyway; if an earlier version trained it, 'lora-trainer promote' moves the pointer"
    )


def promote_latest(
    storage: Storage,
    blood_type: BloodType,
    manifest: Mapping[str, Any],
    sense: str = "not_judged",
    *,
    accepted_by_hand: bool = False,
    review: dict[str, Any] | None = None,
) -> str | None:
    """Point `latest.json` at the manifest's run unconditionally, and return the id of the run that it named before.

    Runs that have already started will not move it back. `review` is recorded; without one, the pointer keeps the review that it
    already has of this run. Raises `StorageError` as `move_latest` does.
    """
    for _ in range(_SWAP_ATTEMPTS):
        theirs, found = _read_pointer(storage, blood_type)
        mine = Pointer(
            run_id=manifest["run_id"],
            bundle=bundle_prefix(blood_type, manifest["run_id"]),
            started_at=manifest["started_at"],
            promoted_at=datetime.now(UTC).isoformat(timespec="seconds"),
            accepted_by_hand=accepted_by_hand or None,
            # taken after reading, so that it is greater than that of every run that has moved the pointer
            counter=take_count(storage, blood_type),
            sense=sense,
            review=review or (theirs.review if theirs and theirs.run_id == manifest["run_id"] else None),
        )
        if _swap(storage, latest_key(blood_type), mine.as_bytes(), found):
            return theirs.run_id if theirs else None
    raise _lost_every_swap(storage, latest_key(blood_type))


def link_newest(storage: Storage, blood_type: BloodType, run_id: str) -> Path | None:
    """Link `adapter_<blood type>` in a local output to the run's bundle. Return the link, or None for a remote output."""
    if storage.local_folder is None:
        return None
    link = storage.local_folder / f"adapter_{blood_type}"
    if link.exists() and not link.is_symlink():
        raise StorageError(f"{link}: in the way: got a file or folder, expected nothing or a link; move it away and run again")
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(bundle_prefix(blood_type, run_id).rstrip("/"))
    os.replace(temporary, link)  # noqa: PTH105  atomic: a reader sees the old link or the new one
    return link


def _swap(storage: Storage, key: str, data: bytes, found: ReadResult | None) -> bool:
    try:
        storage.write_bytes(key, data, if_match=found.etag if found else None, if_absent=found is None)
    except PreconditionFailed:
        return False
    return True


def _lost_every_swap(storage: Storage, key: str) -> StorageError:
    return StorageError(f"{storage.uri}{key}: other writers changed it {_SWAP_ATTEMPTS} times in a row; run the same command again")


def _read_pointer(storage: Storage, blood_type: BloodType) -> tuple[Pointer | None, ReadResult | None]:
    key = latest_key(blood_type)
    found = storage.read_bytes(key)
    if found is None:
        return None, None
    try:
        return Pointer.model_validate_json(found.data), found
    except ValidationError as error:
        wrong = ", ".join(sorted({str(entry["loc"][0]) for entry in error.errors() if entry["loc"]}))
        problem = f"wrong: {wrong}" if wrong else "not a JSON object"
        raise StorageError(
            f"{storage.uri}{key}: not a pointer to a bundle ({problem}); expected run_id, "
            "bundle and started_at, a time in ISO 8601 with its zone: remove or repair it"
        ) from None

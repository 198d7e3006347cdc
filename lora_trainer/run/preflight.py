"""Check with small requests whether a run can access its data, base and output, before it occupies a GPU."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from lora_trainer.base_model import require_base
from lora_trainer.config import RunConfig
from lora_trainer.data.jsonl import diagnose
from lora_trainer.errors import DataError, LoraTrainerError, StorageError
from lora_trainer.logs import get_logger
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.run.inputs import locate_data, require_data_folder
from lora_trainer.store.interface import NO_ETAG, PreconditionFailed, Storage
from lora_trainer.store.opening import open_storage
from lora_trainer.store.retry import RetryBudget

_NO_CONDITIONS: Final = "the store has no conditional writes"
_MAX_BUDGET_S: Final = 10.0
"""Maximum retry budget of one object: shorter than a run's, because a person is waiting."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    what: str
    """`data`, `base` or `output`."""
    said: str
    """Location and result, as message text; empty if the check failed."""
    error: LoraTrainerError | None = None


def check_storage(configs: Sequence[RunConfig]) -> Iterator[Finding]:
    """Read the data of `configs`, which differ only in the persona, look for the base, and test access to the output.

    Write, read, list and delete a probe under `runs/`. Under `adapters/`, where jobs never delete, only check write permission.
    A failed check does not stop the others. Raise `ConfigError` if several personas would read the same file.
    """
    first = configs[0]
    object_budget_s = min(first.storage.object_budget_s, _MAX_BUDGET_S)
    retry_budget = RetryBudget(first.storage.model_copy(update={"object_budget_s": object_budget_s}))
    require_data_folder(configs)
    for config in configs:
        yield _checked("data", partial(_read_data, config, retry_budget))
    yield _checked("base", partial(_find_base, first, retry_budget))
    for config in configs:
        runs, adapters = (f"{folder}/{config.blood_type}/" for folder in ("runs", "adapters"))
        yield _checked("output", partial(_write_read_list_delete, config.output, runs, retry_budget))
        yield _checked("output", partial(_write, config.output, adapters, retry_budget))


def _checked(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what, check())
    except LoraTrainerError as error:
        return Finding(what, "", error)


def _find_base(config: RunConfig, retry_budget: RetryBudget) -> str:
    return f"{config.base.model}: {require_base(config.base, retry_budget)}"


def _read_data(config: RunConfig, retry_budget: RetryBudget) -> str:
    storage, key = locate_data(config, retry_budget)
    with tempfile.TemporaryDirectory() as scratch:
        # download the file: a store may allow HEAD and refuse GET. Keep the name: its suffix selects the decompression
        path = Path(scratch) / Path(key).name
        fetched = storage.download(key, path)
        if problem := diagnose(path, config.limits):
            raise DataError(problem.render(storage.uri + key))
    return f"{storage.uri}{key}: {fetched.size_bytes:,} bytes read"


def check_output(storage: Storage, blood_type: BloodType) -> None:
    """Check before training that a run can write, list and compare under `runs/` of its output in an object store.

    Costs 9 requests for the first persona of a process, 3 for each other one. Raises `StorageError` or `ConfigError`, as the run
    would after training. A probe that may not be deleted stays, as the run's own objects will.
    """
    if storage.local_folder is not None:
        return
    key = f"{_probe_key(f'runs/{blood_type}/')}/probe"
    _write_probe(storage, key)
    try:
        _require_listed(storage, key)
    finally:
        try:
            storage.delete(key)
        except StorageError as error:
            get_logger().warning("storage_probe_not_removed", uri=storage.uri + key, problem=str(error))


def _write_read_list_delete(output: str, prefix: str, retry_budget: RetryBudget) -> str:
    storage = open_storage(output, retry_budget)
    key = _probe_key(prefix)
    content = key.encode()
    _write_probe(storage, key)
    try:
        _require_listed(storage, key)
        storage.write_bytes(key, content)
        back = storage.read_bytes(key)
        if back is None or back.data != content:
            raise StorageError(f"{storage.uri}{key}: read back other bytes than were written; check what stands before the store")
    finally:
        storage.delete(key)
    done = f"{storage.uri}{prefix}: a probe was written, read, listed and deleted"
    return done if storage.conditional_writes else f"{done}; {_NO_CONDITIONS}"


def _write_probe(storage: Storage, key: str) -> None:
    """Write the new object `key`, and find out about conditional writes with it unless that is known."""
    if storage.conditions_probed:
        storage.write_bytes(key, b"")
    else:
        storage.probe_conditional_writes(key)


def _require_listed(storage: Storage, key: str) -> None:
    folder = key[: key.rindex("/") + 1]
    if all(item.key != key for item in storage.list(folder)):
        raise StorageError(f"{storage.uri}{key}: written, but not listed under {folder}; check what stands before the store")


def _write(output: str, prefix: str, retry_budget: RetryBudget) -> str:
    storage = open_storage(output, retry_budget)
    key = _probe_key(prefix)
    if storage.local_folder is None and storage.conditional_writes:
        # jobs need no delete permission here, so send a write that must fail its condition: a 412 proves write permission
        try:
            storage.write_bytes(key, b"", if_match=NO_ETAG)
        except PreconditionFailed:
            if storage.conditional_writes:
                return f"{storage.uri}{prefix}: may be written to"
    storage.write_bytes(key, b"")
    storage.delete(key)
    done = f"{storage.uri}{prefix}: a probe was written and deleted"
    return done if storage.conditional_writes else f"{done}; {_NO_CONDITIONS}"


def _probe_key(prefix: str) -> str:
    """Return a random key under `prefix`."""
    return f"{prefix}storage-check-{secrets.token_hex(8)}"

"""Check with small requests whether a run can access its data, base and output, before it occupies a GPU."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from lora_trainer.base_model import require_base
from lora_trainer.config import RunConfig
from lora_trainer.data.jsonl import diagnose
from lora_trainer.errors import DataError, LoraTrainerError, StorageError
from lora_trainer.run.inputs import locate_data, require_data_folder
from lora_trainer.store.interface import PreconditionFailed, Storage
from lora_trainer.store.opening import open_storage
from lora_trainer.store.retry import RetryBudget

_NO_ETAG: Final = '"00000000000000000000000000000000"'
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


def _write_read_list_delete(output: str, prefix: str, retry_budget: RetryBudget) -> str:
    storage = open_storage(output, retry_budget)
    key, content = _probe(prefix)
    storage.write_bytes(key, content, if_absent=True)
    try:
        back = storage.read_bytes(key)
        if back is None or back.data != content:
            raise StorageError(f"{storage.uri}{key}: read back other bytes than were written; check what stands before the store")
        if all(item.key != key for item in storage.list(prefix)):
            raise StorageError(f"{storage.uri}{key}: written, but not listed under {prefix}; check what stands before the store")
        conditional = _refuses_overwrite(storage, key, content)
    finally:
        storage.delete(key)
    done = f"{storage.uri}{prefix}: a probe was written, read, listed and deleted"
    return done if conditional else f"{done}; the store has no conditional writes"


def _refuses_overwrite(storage: Storage, key: str, content: bytes) -> bool:
    """Return whether the store refuses a conditional write to an existing key."""
    try:
        storage.write_bytes(key, content, if_absent=True)
    except PreconditionFailed:
        return storage.conditional_writes
    return False


def _write(output: str, prefix: str, retry_budget: RetryBudget) -> str:
    storage = open_storage(output, retry_budget)
    key, content = _probe(prefix)
    if storage.local_folder is None:
        # jobs need no delete permission here, so send a write that must fail its condition: a 412 proves write permission
        with suppress(PreconditionFailed):
            storage.write_bytes(key, content, if_match=_NO_ETAG)
            storage.delete(key)
            return f"{storage.uri}{prefix}: a probe was written and deleted; the store has no conditional writes"
        if storage.conditional_writes:
            return f"{storage.uri}{prefix}: may be written to"
    storage.write_bytes(key, content)
    storage.delete(key)
    return f"{storage.uri}{prefix}: a probe was written and deleted"


def _probe(prefix: str) -> tuple[str, bytes]:
    """Return a random key under `prefix`, and content for it."""
    key = f"{prefix}storage-check-{secrets.token_hex(8)}"
    return key, key.encode()

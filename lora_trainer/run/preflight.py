"""Whether a run would get at its data, its base and its output: small requests, made before a GPU waits for them."""

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
from lora_trainer.config import BaseModelConfig, RunConfig
from lora_trainer.data.compression import is_jsonl
from lora_trainer.errors import LoraTrainerError, StorageError
from lora_trainer.run.pipeline import data_key
from lora_trainer.run.several import gather
from lora_trainer.store.interface import PreconditionFailed
from lora_trainer.store.keys import split_uri
from lora_trainer.store.opening import open_storage
from lora_trainer.store.retry import RETRY_BUDGET

_NO_ETAG: Final = '"00000000000000000000000000000000"'
_LONGEST_BUDGET_S: Final = 10.0
"""Of one object: who asks whether the store is there wants to be told soon that it is not."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried."""

    what: str
    """`data`, `base` or `output`."""
    said: str
    """Where, and what came out; empty where it failed."""
    error: LoraTrainerError | None = None


def check_storage(configs: Sequence[RunConfig]) -> Iterator[Finding]:
    """Read the data of `configs`, which differ in their persona alone, look for the base, and try the output.

    Under `runs/` a probe is written, read, listed and deleted; under `adapters/`, where a job deletes nothing, it is only
    tried whether one could be written. What fails stops none of the rest. Raises `ConfigError` for several personas with one file.
    """
    first = configs[0]
    storage = first.storage
    RETRY_BUDGET.begin(storage.model_copy(update={"object_budget_s": min(storage.object_budget_s, _LONGEST_BUDGET_S)}))
    if len(configs) > 1:
        # refuses one file for several personas
        gather(configs)
    for config in configs:
        yield _tried("data", partial(_read_data, config))
    yield _tried("base", partial(_look_for_base, first.base))
    for config in configs:
        runs, adapters = (f"{folder}/{config.blood_type}/" for folder in ("runs", "adapters"))
        yield _tried("output", partial(_write_read_list_delete, config.output, runs))
        yield _tried("output", partial(_write, config.output, adapters))


def _tried(what: str, attempt: Callable[[], str]) -> Finding:
    try:
        return Finding(what, attempt())
    except LoraTrainerError as error:
        return Finding(what, "", error)


def _look_for_base(config: BaseModelConfig) -> str:
    return f"{config.model}: {require_base(config)}"


def _read_data(config: RunConfig) -> str:
    if is_jsonl(config.data):
        folder, key = split_uri(config.data)
        storage = open_storage(folder)
    else:
        storage = open_storage(config.data)
        key = data_key(storage, config.blood_type)
    with tempfile.TemporaryDirectory() as scratch:
        # all of it: a store may let look at what it does not let read
        fetched = storage.download(key, Path(scratch) / "data")
    return f"{storage.uri}{key}: {fetched.size_bytes:,} bytes read"


def _write_read_list_delete(output: str, prefix: str) -> str:
    storage = open_storage(output)
    key, said = _probe(prefix)
    storage.write_bytes(key, said, if_absent=True)
    try:
        back = storage.read_bytes(key)
        if back is None or back.data != said:
            raise StorageError(f"{storage.uri}{key}: got other bytes back than were written; check what stands before the store")
        if all(item.key != key for item in storage.list(prefix)):
            raise StorageError(f"{storage.uri}{key}: written, and not listed under {prefix}; check what stands before the store")
        try:
            storage.write_bytes(key, said, if_absent=True)
            conditional = False
        except PreconditionFailed:
            conditional = storage.conditional_writes
    finally:
        storage.delete(key)
    done = f"{storage.uri}{prefix}: a probe was written, read, listed and deleted"
    return done if conditional else f"{done}; the store has no conditional writes"


def _write(output: str, prefix: str) -> str:
    storage = open_storage(output)
    key, said = _probe(prefix)
    if storage.local_folder is None:
        # a job needs no right to delete here: a condition that does not hold asks for the right to write, and leaves nothing
        with suppress(PreconditionFailed):
            storage.write_bytes(key, said, if_match=_NO_ETAG)
            storage.delete(key)
            return f"{storage.uri}{prefix}: a probe was written and deleted; the store has no conditional writes"
        if storage.conditional_writes:
            return f"{storage.uri}{prefix}: may be written to"
    storage.write_bytes(key, said)
    storage.delete(key)
    return f"{storage.uri}{prefix}: a probe was written and deleted"


def _probe(prefix: str) -> tuple[str, bytes]:
    """A key that nobody has, and what should be there."""
    key = f"{prefix}storage-check-{secrets.token_hex(8)}"
    return key, key.encode()

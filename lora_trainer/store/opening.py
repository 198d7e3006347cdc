"""Open the storage that a URI names."""

from __future__ import annotations

from pathlib import Path

from lora_trainer import credentials
from lora_trainer.errors import ConfigError
from lora_trainer.store.interface import Storage
from lora_trainer.store.local import FileStorage
from lora_trainer.store.retry import RetryBudget
from lora_trainer.store.s3 import S3Storage
from lora_trainer.uris import expand_home, parse_uri, shown


def open_storage(uri: str, retry_budget: RetryBudget | None = None) -> Storage:
    """Return the storage at `uri`: `s3://bucket/prefix/`, `file:///folder/` or a local folder.

    Pass the run's `retry_budget` to share it; by default the storage has its own. Opening sends no requests and creates no files.
    Only `file://` URIs have percent-escapes. Raises `ConfigError` for a URI that names no folder, is mistyped or contains
    credentials, and for malformed AWS credentials.
    """
    try:
        parsed = parse_uri(uri)
        folder = Path(parsed.path) if parsed.scheme else expand_home(parsed.path)
    except ValueError as error:
        raise ConfigError(f"{shown(uri)}: {error}") from None
    if parsed.scheme == "s3":
        credentials.check([credentials.Service.S3])
        return S3Storage(parsed.bucket, parsed.path, retry_budget or RetryBudget())
    return FileStorage(folder)

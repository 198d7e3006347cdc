"""Open the storage that a URI names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from lora_trainer import credentials
from lora_trainer.errors import ConfigError
from lora_trainer.store.interface import Storage
from lora_trainer.store.keys import refuse_credentials
from lora_trainer.store.local import FileStorage
from lora_trainer.store.retry import RetryBudget
from lora_trainer.store.s3 import S3Storage


def open_storage(uri: str, retry_budget: RetryBudget | None = None) -> Storage:
    """Return the storage at `uri`: `s3://bucket/prefix/`, `file:///folder/` or a local folder.

    Pass the run's `retry_budget` to share it; by default the storage has its own. Opening sends no requests and creates no files.
    Only `file://` URIs have percent-escapes. Raises `ConfigError` for a URI that names no folder or contains
    credentials, and for malformed AWS credentials.
    """
    refuse_credentials(uri)
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return FileStorage(Path(uri).expanduser())
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if not slash or host not in ("", "localhost"):
            raise ConfigError(f"{uri}: got the host '{host}'; expected file:/// with three slashes and an absolute path")
        return FileStorage(Path("/" + unquote(path)))
    if scheme == "s3":
        credentials.check([credentials.Service.S3])
        bucket, _, prefix = rest.partition("/")
        return S3Storage(bucket, prefix, retry_budget or RetryBudget())
    raise ConfigError(f"{uri}: unknown scheme '{scheme}://'; expected s3://bucket/prefix/, file:///folder/ or a local folder")

"""Bring a command's input, wherever it lies, into a local file that can be read more than once."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Final

from lora_trainer.data.compression import detect_compression, is_jsonl
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.messages import Message
from lora_trainer.store.keys import local_file, split_uri
from lora_trainer.store.opening import open_storage
from lora_trainer.store.retry import RetryBudget

_CHUNK_BYTES: Final = 1024 * 1024
_JSONL: Final = Message("a JSONL file")


def local_input(name: str, folder: Path, retry_budget: RetryBudget, *, max_bytes: int, expected: Message = _JSONL) -> Path:
    """Return a regular file with the content of `name`: a local path, a URI, `-`, or a pipe such as `/dev/stdin`.

    Objects and pipes are copied to `folder`. Raises `ConfigError` for a folder or a missing file, and `DataError` for a pipe
    that yields more than `max_bytes`.
    """
    path = Path("/dev/stdin") if name == "-" else local_file(name)
    if path is None:
        uri, key = split_uri(name)
        # keep the name: the persona is inferred from it
        path = folder / Path(key).name
        open_storage(uri, retry_budget).download(key, path)
        return path
    try:
        if path.is_file() and not str(path).startswith(("/dev/", "/proc/")):
            return path
        if path.is_dir() or not path.exists():
            raise ConfigError(
                Message("{file}: a folder; expected {expected}", file=name, expected=expected)
                if path.is_dir()
                else Message("{file}: no such file; expected {expected}", file=name, expected=expected)
            )
        with path.open("rb") as pipe:
            return _spooled(pipe, name, folder, max_bytes)
    except OSError as error:
        raise ConfigError(
            Message(
                "{file}: got {reason}, expected {expected} that can be read",
                file=name,
                reason=error.strerror or error,
                expected=expected,
            )
        ) from None


def _spooled(pipe: BinaryIO, name: str, folder: Path, max_bytes: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    chunk = pipe.read(_CHUNK_BYTES)
    # a pipe has no suffix, so its content tells the compression
    path = folder / (Path(name).name if is_jsonl(name) else f"stdin.jsonl{detect_compression(chunk)}")
    size_bytes = 0
    with path.open("wb") as copy:
        while chunk:
            size_bytes += len(chunk)
            if size_bytes > max_bytes:
                raise DataError(
                    Message(
                        "{file}: got more than {most:,} bytes from a pipe, expected no more than limits.decompressed_bytes allows; "
                        "give a file, or raise limits.decompressed_bytes",
                        file=name,
                        most=max_bytes,
                    )
                )
            copy.write(chunk)
            chunk = pipe.read(_CHUNK_BYTES)
    return path

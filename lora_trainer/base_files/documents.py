"""Read the JSON documents of a base, and recognise files that are something else than their names say."""

from __future__ import annotations

from typing import Any

from lora_trainer.errors import ConfigError
from lora_trainer.store import documents


def parse_object(where: str, data: bytes, *, unique: bool = False) -> dict[str, Any]:
    """Parse a JSON object as `store.documents.parse_object` does, and name the format of a file that is something else."""
    if (really := what_it_really_is(data[:64])) is not None:
        raise ConfigError(f"{where}: got {really}; expected a JSON object")
    try:
        return documents.parse_object(data, where, unique=unique)
    except ConfigError as error:
        raise ConfigError(f"{error}; download it again") from None


def what_it_really_is(start: bytes) -> str | None:
    """Name the format of a file that begins with `start`, if it is a known one that no model file has; None otherwise."""
    if start.startswith(b"PK\x03\x04"):
        return "a zip archive such as torch.save writes, pickled, which can run code on loading; convert it to safetensors"
    if len(start) > 1 and start[0] == 0x80 and start[1] in range(2, 6):
        return "a pickle, which can run code on loading; convert it to safetensors"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run 'git lfs pull' in its repository"
    if start.startswith(b"GGUF"):
        return "GGUF weights: use the original model"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page or XML answer, not the file itself: download it again"
    return None

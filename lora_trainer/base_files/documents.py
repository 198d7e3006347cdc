"""Read the JSON documents of a base, and recognise files that are something else than their names say."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from lora_trainer.errors import ConfigError


def parse_object(where: str, data: bytes, *, unique: bool = False) -> dict[str, Any]:
    """Parse a JSON object. Raises `ConfigError`, also for NaN, infinity, and with `unique` for a repeated key."""
    if (really := what_it_really_is(data[:64])) is not None:
        raise ConfigError(f"{where}: got {really}; expected a JSON object")
    try:
        parsed = json.loads(data.decode(), parse_constant=_refuse, object_pairs_hook=_once_each if unique else None)
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: got bytes that are not UTF-8, expected a JSON object; download it again") from None
    except RecursionError:
        raise ConfigError(f"{where}: got JSON nested too deeply, expected a JSON object; download it again") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {str(error)[:200]}; download it again") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{where}: got a JSON {_JSON_NAMES[type(parsed)]}, expected an object; download it again")
    return parsed


_JSON_NAMES = {list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a repeated key")
    return found


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

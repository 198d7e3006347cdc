"""Make broken copies of the tiny base, for the tests of the base check and of the command line."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import REPOSITORY

TINY_BASE = REPOSITORY / "examples" / "tiny-base"
WEIGHTS = "model.safetensors"
Change = Callable[[dict[str, Any]], object]


def copy_base(folder: Path) -> Path:
    """Copy the tiny base to `folder`."""
    shutil.copytree(TINY_BASE, folder, ignore=shutil.ignore_patterns("README.md"))
    return folder


def change_json(folder: Path, name: str, **values: Any) -> None:
    """Set values of a JSON document; `...` removes one."""
    document = {**json.loads((folder / name).read_text(encoding="utf-8")), **values}
    kept = {key: value for key, value in document.items() if value is not ...}
    (folder / name).write_text(json.dumps(kept), encoding="utf-8")


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return a safetensors file's header and the bytes behind it."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: Any, rest: bytes) -> None:
    """Write a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def change_header(folder: Path, change: Change) -> None:
    """Apply `change` to the header of the weights."""
    header, rest = read_header(folder / WEIGHTS)
    change(header)
    write_header(folder / WEIGHTS, header, rest)


def keep_tensors(folder: Path, kept: Callable[[str], bool], target: str = WEIGHTS) -> None:
    """Write a well-formed file `target` with only the tensors that are `kept`."""
    header, rest = read_header(folder / WEIGHTS)
    at, parts, new = 0, [], {"__metadata__": {"format": "pt"}}
    for name, entry in header.items():
        if name != "__metadata__" and kept(name):
            begin, end = entry["data_offsets"]
            new[name] = {**entry, "data_offsets": [at, at + end - begin]}
            parts.append(rest[begin:end])
            at += end - begin
    write_header(folder / target, new, b"".join(parts))


def set_template(folder: Path, template: Any) -> None:
    """Replace the chat template."""
    change_json(folder, "tokenizer_config.json", chat_template=template)

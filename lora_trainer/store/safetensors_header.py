"""Read the header of a safetensors file without torch: names, types and shapes of its tensors.

https://huggingface.co/docs/safetensors#format describes the format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from lora_trainer.errors import ConfigError
from lora_trainer.store.documents import parse_object, shown

_MAX_HEADER_BYTES: Final = 16 * 2**20
_LENGTH_BYTES: Final = 8
DTYPE_BYTES: Final[Mapping[str, int]] = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F64": 8,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

Read = Callable[[int, int], bytes]
"""Returns a range of the file: offset, length."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Offset of the first byte in the file."""
    end: int


def read_header(where: str, size_bytes: int, read: Read) -> dict[str, Tensor]:
    """Return the tensors of a file of `size_bytes`. Raise `ConfigError` if it is damaged, cut off, or no safetensors file."""
    start = read(0, min(size_bytes, 64))
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if len(start) < _LENGTH_BYTES or not 2 <= length <= min(size_bytes - _LENGTH_BYTES, _MAX_HEADER_BYTES):
        raise ConfigError(f"{where}: got {size_bytes:,} bytes{_named(start)}, expected safetensors weights")
    header = parse_object(read(_LENGTH_BYTES, length), where)
    header.pop("__metadata__", None)
    data_start = _LENGTH_BYTES + length
    tensors = {name: _tensor(f"{where}: {shown(name)}", entry, data_start) for name, entry in header.items()}
    at = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != at:
            raise ConfigError(f"{where}: {shown(name)}: its bytes overlap others or leave a gap; the file is damaged")
        at = tensor.end
    if at != size_bytes:
        raise ConfigError(f"{where}: got {size_bytes:,} bytes, expected {at:,} by its header; the file is damaged or cut off")
    return tensors


def _tensor(where: str, entry: Any, data_start: int) -> Tensor:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ConfigError(f"{where}: got the type {shown(dtype)}, expected one of {', '.join(DTYPE_BYTES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ConfigError(f"{where}: got no shape and offsets, expected lists of sizes; the file is damaged")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ConfigError(f"{where}: got {end - begin:,} bytes for {dtype} of shape {list(shape)}; the file is damaged")
    return Tensor(dtype, tuple(shape), data_start + begin, data_start + end)


def _are_sizes(value: Any) -> bool:
    # no tensor has more dimensions or larger ones, and their product stays a number that prints
    return isinstance(value, list) and len(value) <= 8 and all(type(size) is int and 0 <= size < 2**50 for size in value)


def _named(start: bytes) -> str:
    if start.startswith(b"PK\x03\x04") or (len(start) > 1 and start[0] == 0x80 and start[1] <= 5):
        return " of a pickle, which can run code when it is loaded"
    if start.startswith(b"version https://git-lfs"):
        return " of a Git LFS pointer (run 'git lfs pull')"
    return " that begin with no safetensors header: damaged, cut off, or another format"

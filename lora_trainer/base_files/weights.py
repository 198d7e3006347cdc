"""Check safetensors weights by their headers, without reading a weight: form, completeness, and shapes against `config.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Final, TypeGuard

from lora_trainer.base_files.documents import parse_object, what_it_really_is
from lora_trainer.errors import ConfigError

INDEX_NAME: Final = "model.safetensors.index.json"
_SINGLE_NAME: Final = "model.safetensors"
_MAX_HEADER_BYTES: Final = 100 * 2**20
"""The limit of the safetensors library."""
_SHOWN: Final = 3
_DTYPE_BYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_PLAIN_DTYPES: Final = ("BF16", "F16", "F32")

Read = Callable[[str, int, int], bytes]
"""Returns a range of a file: name, offset, length."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture whose decoder is like Qwen2's: the same seven projections, under the same names."""

    class_name: str
    query_key_value_bias: bool = False
    query_key_norm: bool = False
    takes_attention_bias: bool = False
    """Whether `attention_bias` in `config.json` gives all four attention projections a bias."""
    takes_mlp_bias: bool = False


# each was trained and evaluated on a small base
ARCHITECTURES: Final = {
    "qwen2": Architecture("Qwen2ForCausalLM", query_key_value_bias=True),
    "qwen3": Architecture("Qwen3ForCausalLM", query_key_norm=True, takes_attention_bias=True),
    "llama": Architecture("LlamaForCausalLM", takes_attention_bias=True, takes_mlp_bias=True),
    "mistral": Architecture("MistralForCausalLM"),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte in the file."""
    end: int


def head_size(config: Mapping[str, Any]) -> int:
    """Return the size of one attention head."""
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(size)


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a checked `config.json` calls for, by name."""
    kind = ARCHITECTURES[config["model_type"]]
    hidden, intermediate, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    key_value_heads = config.get("num_key_value_heads") or heads
    head = head_size(config)
    attention = {"q": (heads * head, hidden), "k": (key_value_heads * head, hidden), "v": (key_value_heads * head, hidden)}
    all_biased = kind.takes_attention_bias and config.get("attention_bias") is True
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        for name, shape in attention.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = shape
            if kind.query_key_value_bias or all_biased:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = shape[:1]
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, heads * head)
        if all_biased:
            shapes[f"{layer}self_attn.o_proj.bias"] = (hidden,)
        if kind.query_key_norm:
            shapes[f"{layer}self_attn.q_norm.weight"] = shapes[f"{layer}self_attn.k_norm.weight"] = (head,)
        biased = kind.takes_mlp_bias and config.get("mlp_bias") is True
        for name, shape in (("gate", (intermediate, hidden)), ("up", (intermediate, hidden)), ("down", (hidden, intermediate))):
            shapes[f"{layer}mlp.{name}_proj.weight"] = shape
            if biased:
                shapes[f"{layer}mlp.{name}_proj.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (hidden,)
    return shapes


def check_weights(where: str, sizes: Mapping[str, int], read: Read, config: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield each problem of the weights among the files `sizes`. Without a valid `config`, leave names and shapes unchecked."""
    headers: dict[str, dict[str, Tensor]] = {}
    for name in sorted(name for name in sizes if name.endswith(".safetensors") and not name.startswith(".")):
        try:
            headers[name] = read_header(f"{where}/{name}", sizes[name], partial(read, name))
        except ConfigError as error:
            yield from error.problems
    shards = [_SINGLE_NAME]
    # transformers prefers the single file if both exist
    if _SINGLE_NAME not in sizes:
        if INDEX_NAME not in sizes:
            got = ", ".join(islice((name for name in sizes if name.endswith(".safetensors")), _SHOWN))
            yield f"{where}: got {got}, but neither {_SINGLE_NAME} nor {INDEX_NAME}; add the index that belongs to the weights"
            return
        try:
            placed = _weight_map(f"{where}/{INDEX_NAME}", read(INDEX_NAME, 0, sizes[INDEX_NAME]))
        except ConfigError as error:
            yield from error.problems
            return
        shards = sorted(set(placed.values()))
        if missing := [name for name in shards if name not in sizes]:
            yield (
                f"{where}: got no {_listed(missing)}, which {INDEX_NAME} names: {len(missing)} of {len(shards)} shards missing; "
                "download the model again"
            )
        elsewhere = [key for key, name in placed.items() if name in headers and key not in headers[name]]
        if elsewhere:
            yield f"{where}: {_listed(elsewhere)} not in the shards that {INDEX_NAME} names; download the model again"
        if missing or elsewhere:
            return
    # a shard with a broken header has already been reported
    if config is None or any(name not in headers for name in shards):
        return
    tensors = {key: tensor for name in shards for key, tensor in headers[name].items()}
    yield from _compare(where, tensors, config)


def _compare(where: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[str]:
    expected = expected_shapes(config)
    if missing := [name for name in expected if name not in tensors]:
        # transformers would only warn, and fill them with random numbers
        yield (
            f"{where}: the weights have no {_listed(missing)}, which config.json calls for "
            f"({config['num_hidden_layers']} layers of {config['model_type']}): they are incomplete, or belong to another model; "
            "download the model again"
        )
    other = [name for name, shape in expected.items() if name in tensors and tensors[name].shape != shape]
    if other:
        first = other[0]
        yield (
            f"{where}: {first}: got shape {_shape(tensors[first].shape)}, expected {_shape(expected[first])} by config.json"
            f"{f' ({len(other)} tensors differ)' if len(other) > 1 else ''}: weights and config.json belong to different models"
        )
    # tied weights may be stored twice, and old Llamas stored a table that the model computes
    spare = [name for name in tensors if name not in expected and name != "lm_head.weight" and "rotary_emb" not in name]
    if spare:
        yield (
            f"{where}: the weights also have {_listed(spare)}, which {config['num_hidden_layers']} layers of "
            f"{config['model_type']} do not: they are quantized already, or belong to another model; use the original model, which "
            "training.quantization=nf4 quantizes on loading"
        )
    elif odd := [name for name in expected if name in tensors and tensors[name].dtype not in _PLAIN_DTYPES]:
        yield (
            f"{where}: {odd[0]}: got {tensors[odd[0]].dtype} values, expected {', '.join(_PLAIN_DTYPES)}: use the original model, "
            "which training.quantization=nf4 quantizes on loading"
        )


def _weight_map(where: str, data: bytes) -> dict[str, str]:
    placed = parse_object(where, data).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise ConfigError(f"{where}: weight_map: got no object of file names by tensor; download the model again")
    if outside := sorted({name for name in placed.values() if "/" in name or not name.endswith(".safetensors")}):
        raise ConfigError(f"{where}: weight_map: got {outside[0]!r:.100}, expected names of *.safetensors files in the same folder")
    return placed


def read_header(where: str, size_bytes: int, read: Callable[[int, int], bytes]) -> dict[str, Tensor]:
    """Read and check the header of a safetensors file (https://huggingface.co/docs/safetensors#format). Raises `ConfigError`."""
    start = read(0, min(size_bytes, 64))
    broken = "download it again"
    if len(start) < 8:
        raise ConfigError(f"{where}: got {size_bytes:,} bytes, expected safetensors weights; {broken}")
    length = int.from_bytes(start[:8], "little")
    if not 2 <= length <= min(size_bytes - 8, _MAX_HEADER_BYTES):
        # only now: a header of 640 bytes begins like a pickle
        if really := what_it_really_is(start):
            raise ConfigError(f"{where}: got {really}; expected safetensors weights")
        raise ConfigError(
            f"{where}: got a header of {length:,} bytes in a file of {size_bytes:,}, expected safetensors weights: damaged or cut "
            f"off; {broken}"
        )
    header = parse_object(where, read(8, length), unique=True)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ConfigError(f"{where}: __metadata__: got other values than text; {broken}")
    if metadata.get("format", "pt") != "pt":
        raise ConfigError(f"{where}: got weights in the format {metadata['format']!r:.50}, expected PyTorch's ('pt')")
    tensors, ranges = {}, []
    for name, entry in header.items():
        tensors[name] = tensor = _entry(f"{where}: {name!r:.100}", entry, 8 + length)
        ranges.append((tensor.begin, tensor.end, name))
    at = 8 + length
    for begin, end, name in sorted(ranges):
        if begin != at:
            raise ConfigError(
                f"{where}: {name!r:.100}: got offset {begin:,}, expected {at:,}: its tensors overlap or leave gaps; {broken}"
            )
        at = end
    if at != size_bytes:
        raise ConfigError(f"{where}: got {size_bytes:,} bytes, expected {at:,} by its header: damaged or cut off; {broken}")
    return tensors


def _entry(where: str, entry: object, data_start: int) -> Tensor:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise ConfigError(f"{where}: got dtype {dtype!r:.50}, expected one of safetensors; download it again")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ConfigError(f"{where}: got no shape and offsets; expected lists of sizes; download it again")
    begin, end = offsets
    if end - begin != math.prod(shape) * _DTYPE_BYTES[dtype]:
        raise ConfigError(
            f"{where}: got {end - begin:,} bytes for shape {_shape(shape)} in {dtype}, expected "
            f"{math.prod(shape) * _DTYPE_BYTES[dtype]:,}; download it again"
        )
    return Tensor(dtype, tuple(shape), data_start + begin, data_start + end)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    # no tensor has more dimensions or larger ones, and their product stays a number that prints
    return isinstance(value, list) and len(value) <= 8 and all(type(size) is int and 0 <= size < 2**50 for size in value)


def _shape(shape: Any) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"{name!r:.100}"[1:-1] for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else shown

"""Check an adapter before PEFT sees it: its settings and the header of its weights, without torch.

PEFT compiles `target_modules`, `exclude_modules`, and the keys of `rank_pattern` and `alpha_pattern` as regular expressions,
allocates what `r` asks for, and initializes weights by methods that the file names. This project's adapters need none of that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from lora_trainer.base_files.weights import Tensor, read_header
from lora_trainer.base_model import pickled
from lora_trainer.config import ALL_LINEAR, TargetModule
from lora_trainer.errors import ConfigError, StorageError
from lora_trainer.store.documents import parse_object, shown, validated
from lora_trainer.store.interface import NotFound, Storage
from lora_trainer.store.manifest import MANIFEST_NAME

WEIGHTS_NAME: Final = "adapter_model.safetensors"
SETTINGS_NAME: Final = "adapter_config.json"
_TENSOR: Final = re.compile(r"base_model\.model\.model\.layers\.(\d{1,4})\.(self_attn|mlp)\.([a-z]+_proj)\.lora_([AB])\.weight")
_BLOCK: Final[Mapping[str, str]] = {
    name: "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp" for name in ALL_LINEAR
}
_EXPONENT: Final[Mapping[str, tuple[str, int]]] = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
"""Unsigned type of the same size, and the exponent bits, which are all set in NaN and infinity."""
_CHUNK_BYTES: Final = 16 * 2**20


def _no_regex(value: object) -> object:
    if isinstance(value, str):
        raise ValueError("expected a list of names: a text is a regular expression, and those from files are never compiled")
    return value


def _each_once(value: list[TargetModule]) -> list[TargetModule]:
    if len(set(value)) != len(value):
        raise ValueError("expected each module once")
    return value


def _nothing(value: object) -> object:
    if value not in (None, False, {}, [], ""):
        raise ValueError("expected nothing: this project's adapters do not use it")
    return value


_Unused = Annotated[Any, AfterValidator(_nothing)]


class _UnslothMapping(BaseModel):
    """The base's class, as Unsloth writes it. Nothing here imports it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model_class: str | None = Field(default=None, max_length=100, pattern=r"^\w+$")
    parent_library: str | None = Field(default=None, max_length=200, pattern=r"^transformers[.\w]*$")
    unsloth_fixed: bool | None = None


class AdapterSettings(BaseModel):
    """The fields of `adapter_config.json` that decide what PEFT does. Other fields have to be empty."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    r: int = Field(ge=1, le=512)
    lora_alpha: float = Field(gt=0, le=1024)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    bias: Literal["none"] = "none"
    target_modules: Annotated[list[TargetModule], BeforeValidator(_no_regex), AfterValidator(_each_once)] = Field(min_length=1)
    init_lora_weights: bool = True
    base_model_name_or_path: str | None = Field(default=None, max_length=1024)
    revision: str | None = Field(default=None, max_length=256)
    inference_mode: bool = True
    fan_in_fan_out: Literal[False] = False
    use_dora: Literal[False] = False
    use_rslora: Literal[False] = False
    modules_to_save: _Unused = None
    layers_pattern: _Unused = None
    layers_to_transform: _Unused = None
    layer_replication: _Unused = None
    exclude_modules: _Unused = None
    rank_pattern: _Unused = None
    alpha_pattern: _Unused = None
    auto_mapping: _UnslothMapping | None = None
    loftq_config: _Unused = None
    megatron_config: _Unused = None
    # names and numbers that do nothing on their own; PEFT writes them into every file
    megatron_core: str | None = Field(default=None, max_length=64)
    qalora_group_size: int | None = Field(default=None, ge=0, le=2**20)
    peft_version: str | None = Field(default=None, max_length=64)


def parse_settings(data: bytes, where: str) -> AdapterSettings:
    """Parse `adapter_config.json`. Raise `ConfigError` with one line for each field that this project does not load."""
    found = validated(AdapterSettings, parse_object(data, where), where)
    unknown = [name for name, value in (found.model_extra or {}).items() if value not in (None, False, {}, [], "")]
    if unknown:
        raise ConfigError(
            [
                f"{where}: {shown(name)}: not a field of this project's adapters; expected none, or an empty one"
                for name in unknown[:8]
            ]
        )
    return found


def check_published_adapter(storage: Storage, manifest: Mapping[str, Any]) -> None:
    """Check the names in a bundle's manifest, the adapter's settings and its weights' header, before anything large is read.

    Raise `ConfigError` for pickled weights, which can run code on loading, and for settings that this project does not load.
    """
    if problems := pickled(storage.uri, manifest["files"]):
        raise ConfigError(problems)
    if SETTINGS_NAME not in manifest["files"]:
        # a later evaluation of a bundle has no adapter
        return
    found = storage.read_bytes(SETTINGS_NAME)
    if found is None:
        raise ConfigError(f"{storage.uri}{SETTINGS_NAME}: not found, although the manifest lists it: the bundle is not whole")
    settings = parse_settings(found.data, f"{storage.uri}{SETTINGS_NAME}")
    if WEIGHTS_NAME not in manifest["files"]:
        raise ConfigError(
            f"{storage.uri}{MANIFEST_NAME}: files: got no {WEIGHTS_NAME}, expected an adapter as this project publishes it"
        )
    try:
        tensors = read_header(
            f"{storage.uri}{WEIGHTS_NAME}",
            manifest["files"][WEIGHTS_NAME]["size_bytes"],
            lambda at, length: storage.read_range(WEIGHTS_NAME, at, length),
        )
    except (NotFound, StorageError):
        # missing, or of another size than the manifest says: the download compares both and names them
        return
    check_weights(settings, tensors, f"{storage.uri}{WEIGHTS_NAME}")


def check_weights(settings: AdapterSettings, tensors: Mapping[str, Tensor], where: str) -> None:
    """Compare the weights' header with the adapter's settings. Raise `ConfigError` with every kind of difference."""
    if problems := list(_weight_problems(settings, tensors, where)):
        raise ConfigError(problems)


def _weight_problems(settings: AdapterSettings, tensors: Mapping[str, Tensor], where: str) -> Iterator[str]:
    found: dict[tuple[int, str, str], Tensor] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or _BLOCK.get(match[3]) != match[2]:
            yield f"{where}: got the tensor {shown(name)}, expected only lora_A and lora_B of the layers' linear projections"
            return
        if tensor.dtype not in _EXPONENT:
            yield f"{where}: {shown(name)}: got {tensor.dtype}, expected one of {', '.join(_EXPONENT)}"
            return
        found[int(match[1]), match[3], match[4]] = tensor
    modules = {module for _, module, _ in found}
    if modules != set(settings.target_modules):
        yield (
            f"{where}: got weights of {', '.join(sorted(modules)) or 'no module'}, expected those of target_modules in "
            f"{SETTINGS_NAME}: {', '.join(sorted(settings.target_modules))}"
        )
        return
    layers = {layer for layer, _, _ in found}
    for layer in range(max(layers) + 1):
        for module in sorted(modules):
            down, up = found.get((layer, module, "A")), found.get((layer, module, "B"))
            if down is None or up is None:
                yield f"{where}: layer {layer}: {module}: got no lora_{'A' if down is None else 'B'}; the weights are incomplete"
                return
            if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != settings.r or up.shape[1] != settings.r:
                yield (
                    f"{where}: layer {layer}: {module}: got lora_A of shape {list(down.shape)} and lora_B of shape "
                    f"{list(up.shape)}, expected [{settings.r}, …] and […, {settings.r}] by r in {SETTINGS_NAME}"
                )
                return


def check_against_base(tensors: Mapping[str, Tensor], base: Path, where: str) -> None:
    """Compare shapes with the base in the folder `base`. Raise `ConfigError` at the first layer that does not fit."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(base.glob("*.safetensors")):
        with path.open("rb") as file:
            shapes |= {name: tensor.shape for name, tensor in read_header(str(path), path.stat().st_size, _reader(file)).items()}
    for name, tensor in tensors.items():
        layer = name.removeprefix("base_model.model.").rpartition(".lora_")[0] + ".weight"
        expected = shapes.get(layer)
        # A is [r, in] and B is [out, r], for a base weight [out, in]
        side = 1 if ".lora_A." in name else 0
        if expected is None or len(expected) != 2 or tensor.shape[side] != expected[side]:
            got = "no such layer" if expected is None else f"shape {list(expected)}"
            raise ConfigError(
                f"{where}: {shown(name)}: got shape {list(tensor.shape)}, the base in {base} has {got} as {layer}: "
                "the adapter was trained on another base"
            )


def check_finite(weights: Path, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `ConfigError` for the first tensor with NaN or infinity."""
    with weights.open("rb") as file:
        for name, tensor in tensors.items():
            kind, exponent = _EXPONENT[tensor.dtype]
            file.seek(tensor.begin)
            for start in range(tensor.begin, tensor.end, _CHUNK_BYTES):
                values = np.frombuffer(file.read(min(_CHUNK_BYTES, tensor.end - start)), dtype=kind)
                if bool(((values & exponent) == exponent).any()):
                    raise ConfigError(f"{where}: {shown(name)}: got NaN or infinity, expected numbers; train the adapter again")


def check_adapter_folder(folder: Path, where: str | None = None) -> dict[str, Tensor]:
    """Check settings and weights of the adapter in `folder`, and return the weights' header. Messages name `where`.

    Raise `ConfigError` for the first file with problems.
    """
    place = where if where is not None else f"{folder}/"
    missing = [name for name in (SETTINGS_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{place}: has no {' and no '.join(missing)}; expected an adapter as this project publishes it")
    settings = parse_settings((folder / SETTINGS_NAME).read_bytes(), f"{place}{SETTINGS_NAME}")
    weights = folder / WEIGHTS_NAME
    with weights.open("rb") as file:
        tensors = read_header(f"{place}{WEIGHTS_NAME}", weights.stat().st_size, _reader(file))
    check_weights(settings, tensors, f"{place}{WEIGHTS_NAME}")
    check_finite(weights, tensors, f"{place}{WEIGHTS_NAME}")
    return tensors


def _reader(file: BinaryIO) -> Callable[[int, int], bytes]:
    def read(at: int, length: int) -> bytes:
        file.seek(at)
        return file.read(length)

    return read

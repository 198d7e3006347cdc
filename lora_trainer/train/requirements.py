"""Check before any import that the libraries which a configuration needs are installed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from importlib import metadata
from typing import Final

from lora_trainer.config import RunConfig
from lora_trainer.errors import ConfigError, HardwareError

_STACK: Final = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "safetensors")
_UNSLOTH: Final = ("unsloth", "unsloth_zoo")
_CPU_ONLY: Final = "pip install 'lora-trainer[cpu]'"
_ALL: Final = "pip install 'lora-trainer[cpu,gpu]'"


def require_stack(config: RunConfig, *, reference: bool = False) -> None:
    """Raise `ConfigError` for each part of the configuration that needs a library which is not installed.

    Raise `HardwareError` instead if only the libraries for a GPU are missing and the machine has no NVIDIA driver either.

    With `reference`, the backend is transformers whatever `backend` says, as in `evaluate` and `chat`. Imports nothing: an import
    takes half a minute, and fails after the data was fetched.
    """
    if problems := list(_problems(config, reference)):
        if config.device == "cuda" and not _missing(_STACK) and not has_driver():
            raise HardwareError(
                "device: got cuda on a machine without an NVIDIA driver (libcuda.so.1) and without the libraries for a GPU, "
                "expected a CUDA GPU; check the pod's GPU resource and the image, or pass --device cpu to train on the CPU"
            )
        raise ConfigError(problems)


def _problems(config: RunConfig, reference: bool) -> Iterator[str]:
    uses_unsloth = config.resolved_backend == "unsloth" and not reference
    if missing := _missing(_STACK):
        install = _ALL if uses_unsloth or config.device == "cuda" else _CPU_ONLY
        yield f"the training stack is not installed ({', '.join(missing)} missing): {install}"
        return
    if uses_unsloth and (missing := _missing(_UNSLOTH)):
        named = "unsloth" if config.backend == "unsloth" else "auto, which is unsloth on CUDA,"
        yield f"backend: got {named} and {', '.join(missing)} is not installed: set backend=transformers, or {_ALL}"
    if not _missing(("bitsandbytes",)):
        return
    evaluates_in_nf4 = config.evaluated_base.quantization == "nf4"
    # `evaluate` and `chat` never load the base as training does
    if config.training.quantization == "nf4" and (evaluates_in_nf4 or not reference):
        yield (
            "training.quantization: got nf4, which needs bitsandbytes, and it is not installed: "
            f"set training.quantization=none, or {_ALL}"
        )
    elif evaluates_in_nf4:
        yield (
            "evaluation.precision: got nf4, which needs bitsandbytes, and it is not installed: "
            f"set evaluation.precision=training, or {_ALL}"
        )


def has_driver() -> bool:
    """Return whether the NVIDIA driver can be loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _missing(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    # by its metadata: even looking for a module can run a library's import hooks
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True

"""Ask the NVIDIA driver for the GPU and its free memory, without torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from lora_trainer.errors import HardwareError


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU that a run would use."""

    name: str | None
    """None for a GPU that is not here."""
    free_bytes: int
    """Free memory with a CUDA context in place, as a run sees it."""


def visible_gpu() -> Gpu | None:
    """Return the only visible GPU, or None without a driver or GPU. Honours `CUDA_VISIBLE_DEVICES`.

    Raises `HardwareError` if several GPUs are visible, as a run does, or the driver cannot tell its free memory.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int()
    # cuInit fails without a device
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    if count.value > 1:
        raise HardwareError(
            f"device: got {count.value} visible GPUs, expected 1: this version trains on one; set CUDA_VISIBLE_DEVICES or "
            "ask for one"
        )
    device, context = ctypes.c_int(), ctypes.c_void_p()
    name = ctypes.create_string_buffer(256)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _require(driver.cuDeviceGet(ctypes.byref(device), 0))
    _require(driver.cuDeviceGetName(name, len(name), device))
    _require(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    try:
        _require(driver.cuCtxSetCurrent(context))
        _require(driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)
    return Gpu(name.value.decode(errors="replace"), free.value)


def _require(code: int) -> None:
    if code:
        raise HardwareError(f"device: the NVIDIA driver does not answer (error {code}); check it with 'nvidia-smi'")

"""The CPU or GPU of a run: checks, memory and failures.

torch is imported inside the functions, because `TransformersBackend.start` reports a missing torch itself.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from lora_trainer.errors import DeviceLostError, HardwareError, OutOfMemoryError
from lora_trainer.train.memory_plan import GIB


class Device:
    """The CPU, or the only visible GPU."""

    def __init__(self, kind: Literal["cuda", "cpu"]) -> None:
        self.kind = kind

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.kind == "cuda"

    def start(self, compute_dtype: Literal["bfloat16", "float32"]) -> dict[str, object]:
        """Prepare torch for the device and return facts about the device for the manifest.

        On CUDA, raises `HardwareError` unless there is exactly one GPU and it supports `compute_dtype`.
        """
        import torch

        if not self.is_cuda:
            torch.use_deterministic_algorithms(True)
            return {"device": "cpu", "threads": torch.get_num_threads()}
        if not torch.cuda.is_available():
            raise HardwareError(
                "device: got no CUDA GPU that torch can use, expected one; check the pod's GPU resource and the driver, "
                "or pass --device cpu to train on the CPU"
            )
        count = torch.cuda.device_count()
        if count > 1:
            raise HardwareError(
                f"device: got {count} visible GPUs, expected 1: this version trains on one; set CUDA_VISIBLE_DEVICES or ask for one"
            )
        properties = torch.cuda.get_device_properties(0)
        if compute_dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise HardwareError(
                f"device: {properties.name} has no bfloat16 arithmetic; use a GPU of compute capability 8.0 or later, "
                "or set training.compute_dtype to float32"
            )
        return {
            "device": "cuda",
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / GIB, 1),
            "cuda": torch.version.cuda,
            "compute_capability": f"{properties.major}.{properties.minor}",
        }

    def free_bytes(self) -> int | None:
        """Return the GPU's free memory, or None on the CPU."""
        if not self.is_cuda:
            return None
        import torch

        return int(torch.cuda.mem_get_info()[0])

    def peak_memory_gib(self) -> float:
        """Return the peak memory of the process: allocated on the GPU, or resident on the CPU."""
        if self.is_cuda:
            import torch

            return float(torch.cuda.max_memory_allocated() / GIB)
        # ru_maxrss is in kilobytes on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB

    def free_memory(self) -> None:
        """Collect garbage, return cached GPU memory to the driver and restart the peak measurement."""
        # trainers and their callbacks reference each other, so only the cycle collector frees them
        gc.collect()
        if self.is_cuda:
            import torch

            torch.cuda.empty_cache()
            # each persona reports its own peak
            torch.cuda.reset_peak_memory_stats()

    def is_working(self) -> bool:
        """Return whether the device still works. After most CUDA errors it cannot be used again in the same process."""
        if not self.is_cuda:
            return True
        import torch

        try:
            torch.cuda.synchronize()
            return int(torch.ones(1, device="cuda").sum()) == 1
        except torch.OutOfMemoryError:
            # out of memory, but otherwise working
            return True
        except RuntimeError:
            return False

    @contextmanager
    def faults(self, row_tokens: Callable[[], int]) -> Iterator[None]:
        """Translate torch's device errors into our own, with advice.

        `row_tokens` returns the length of a micro-batch, or 0 before the base is loaded.

        Raises `OutOfMemoryError`, `HardwareError` if the base itself does not fit, and `DeviceLostError` for every other error
        that the driver reports.
        """
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            peak = f"peak {self.peak_memory_gib():.1f} GiB"
            tokens = row_tokens()
            if not tokens:
                # no memory plan makes the base smaller
                raise HardwareError(
                    f"GPU memory ran out while the base was loaded, {peak}: expected a GPU with room for the base that no other "
                    "process uses; use a larger GPU, a smaller base.model, or training.quantization=nf4"
                ) from error
            raise OutOfMemoryError(
                f"GPU memory ran out at {tokens} tokens a micro-batch, {peak}: use a larger GPU, lower "
                "training.max_length_tokens, or set memory.micro_batch_tokens and memory.gradient_checkpointing to auto"
            ) from error
        except torch.AcceleratorError as error:
            reason = str(error).splitlines()[0]
            raise DeviceLostError(
                f"{self.kind}: the device failed: {reason}; rerun the same command, on another machine if it fails again"
            ) from error

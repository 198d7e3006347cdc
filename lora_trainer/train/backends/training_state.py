"""Save and restore the state of training between two optimizer steps, without pickle.

`adapter.safetensors` contains the trainable weights by name, `optimizer.safetensors` AdamW's moments as `<weight>.<moment>`,
`best_adapter.safetensors` the weights with the lowest held-out loss, and `state.json` the step, the log so far and the random
generators. The recipe and the data determine everything else.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file

from lora_trainer.errors import InvariantError
from lora_trainer.train.held_out import HeldOutLoss
from lora_trainer.train.step_log import StepLog, TrainingLog

ADAPTER_NAME: Final = "adapter.safetensors"
OPTIMIZER_NAME: Final = "optimizer.safetensors"
BEST_NAME: Final = "best_adapter.safetensors"
STATE_NAME: Final = "state.json"

_FREE_FACTOR: Final = 3
"""Keep copies on the GPU if this many times their size is free: while one copy is being written, another may be waiting."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Copies of the training state, on the GPU if they fit, else in host memory. Training does not modify them."""

    step: int
    """Completed optimizer steps."""
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    random: dict[str, torch.Tensor]
    log: TrainingLog
    best: dict[str, torch.Tensor] | None = None
    """Weights with the lowest held-out loss so far, in host memory; None before the first measurement, or if none are kept."""
    copied: torch.cuda.Event | None = None
    """CUDA event that completes when the copies on the GPU are complete."""

    def write(self, folder: Path) -> None:
        """Write the files to `folder`. Any thread may call it while training continues. Raises `OSError`."""
        save_file(self._on_host(self.weights), folder / ADAPTER_NAME)
        save_file(self._on_host(self.moments), folder / OPTIMIZER_NAME)
        if self.best is not None:
            save_file(self.best, folder / BEST_NAME)
        state = {
            "step": self.step,
            "random": {name: base64.b64encode(bytes(value.tolist())).decode("ascii") for name, value in self.random.items()},
            "packed_rows": self.log.packed_rows,
            "train_s": self.log.train_s,
            "steps": [{name: getattr(step, name) for name in step.__slots__} for step in self.log.steps],
            "held_out": [{"step": measured.step, "loss": measured.loss} for measured in self.log.held_out],
            "has_best": self.best is not None,
        }
        (folder / STATE_NAME).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def _on_host(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.copied is None:
            return tensors
        # use a separate stream, so that the transfer does not delay training's kernels
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_event(self.copied)
            return {name: value.cpu() for name, value in tensors.items()}


def read_state(folder: Path) -> TrainingState:
    """Read what `TrainingState.write` wrote. Raises `OSError`, `ValueError`, `KeyError` or `TypeError` for anything else."""
    state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    steps = [StepLog(**step) for step in state["steps"]]
    held_out = [HeldOutLoss(**measured) for measured in state["held_out"]]
    return TrainingState(
        step=state["step"],
        weights=load_file(folder / ADAPTER_NAME),
        moments=load_file(folder / OPTIMIZER_NAME),
        random={
            name: torch.frombuffer(bytearray(base64.b64decode(value)), dtype=torch.uint8) for name, value in state["random"].items()
        },
        log=TrainingLog(steps, state["packed_rows"], state["train_s"], held_out),
        best=load_file(folder / BEST_NAME) if state["has_best"] else None,
    )


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of each random generator that training uses, including the device's for dropout."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_random_state(random: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore the generators. A state saved on a CPU leaves the GPU's generator unchanged."""
    torch.set_rng_state(random["cpu"])
    if device.type == "cuda" and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], device)


def state_of(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    random: dict[str, torch.Tensor],
    log: TrainingLog,
    best: dict[str, torch.Tensor] | None,
) -> TrainingState:
    """Copy the current state. On a GPU with enough free memory this takes a millisecond; `write` transfers the copies.

    Copying the 0.5 GB of a 7B base's adapter to the host would stop training for half a second
    (`benchmarks/results/checkpoint-cost*.json`). `best` needs no copy, because nothing modifies it.
    """
    # do not copy yet: the size determines where the copies go
    weights = {name: parameter.detach() for name, parameter in _trainable(model)}
    moments = _moments(model, optimizer)
    tensors = [*weights.values(), *moments.values()]
    size_bytes = sum(tensor.nbytes for tensor in tensors if tensor.is_cuda)
    # mem_get_info excludes memory that the allocator has reserved, which training needs for its next step
    on_gpu = size_bytes > 0 and torch.cuda.mem_get_info()[0] > _FREE_FACTOR * size_bytes
    weights, moments = ({name: _copy(value, on_gpu=on_gpu) for name, value in found.items()} for found in (weights, moments))
    copied = None
    if on_gpu:
        copied = torch.cuda.Event()
        copied.record()
    return TrainingState(step, weights, moments, random, log, best, copied)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy the trainable weights to host memory, by name."""
    return {name: _copy(parameter.detach(), on_gpu=False) for name, parameter in _trainable(model)}


def set_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Set the trainable weights. Raises `InvariantError` if names or shapes differ from the model's."""
    own = dict(_trainable(model))
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in weights.items()}:
        raise InvariantError("the checkpoint's adapter is not this run's: names or shapes differ")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def _moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state of each weight as `<weight>.<moment>`; empty before the first step."""
    names = {id(parameter): name for name, parameter in _trainable(model)}
    return {
        f"{names[id(parameter)]}.{moment}": value.detach()
        for group in optimizer.param_groups
        for parameter in group["params"]
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def set_moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, torch.Tensor]) -> None:
    """Set the moments of a new optimizer. Raises `InvariantError` if they belong to other weights."""
    names = {id(parameter): name for name, parameter in _trainable(model)}
    by_weight: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        name, _, moment = key.rpartition(".")
        by_weight.setdefault(name, {})[moment] = value
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    if set(order) != set(by_weight):
        raise InvariantError("the checkpoint's optimizer state is not this run's: names differ")
    # the optimizer's own loader puts each tensor on the right device
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {at: by_weight[name] for at, name in enumerate(order)}})


def _trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _copy(tensor: torch.Tensor, *, on_gpu: bool) -> torch.Tensor:
    # AdamW keeps its step counts on the host, even with weights on a GPU
    return tensor.to(tensor.device if on_gpu else "cpu", copy=True).contiguous()

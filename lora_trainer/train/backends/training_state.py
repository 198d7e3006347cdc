"""The state of training between two optimizer steps, as tensors and JSON: no pickle is ever written or loaded.

`adapter.safetensors` holds the trainable weights by name, `optimizer.safetensors` AdamW's moments as `<weight>.<moment>`,
`state.json` the step, the log so far and the random numbers. All else follows from the recipe and the data.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from lora_trainer.errors import InvariantError
from lora_trainer.train.step_log import StepLog, TrainingLog

ADAPTER_NAME: Final = "adapter.safetensors"
OPTIMIZER_NAME: Final = "optimizer.safetensors"
STATE_NAME: Final = "state.json"

_ROOM: Final = 3
"""Copies stay on the GPU where this many times their size is free: one may wait while another is written."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Copies where the originals are if there is room, else in the host's memory; whatever goes on training leaves them alone."""

    step: int
    """Whole optimizer steps behind it."""
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    random: dict[str, torch.Tensor]
    log: TrainingLog
    copied: torch.cuda.Event | None = None
    """On a GPU: when the copies are made."""

    def write(self, folder: Path) -> None:
        """Fill `folder`; from any thread, beside training. Raises `OSError`."""
        save_file(self._on_host(self.weights), folder / ADAPTER_NAME)
        save_file(self._on_host(self.moments), folder / OPTIMIZER_NAME)
        state = {
            "step": self.step,
            "random": {name: base64.b64encode(bytes(value.tolist())).decode("ascii") for name, value in self.random.items()},
            "packed_rows": self.log.packed_rows,
            "train_s": self.log.train_s,
            "steps": [{name: getattr(step, name) for name in step.__slots__} for step in self.log.steps],
        }
        (folder / STATE_NAME).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def _on_host(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.copied is None:
            return tensors
        # on a stream of its own: on training's the copies would stand between its kernels
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_event(self.copied)
            return {name: value.cpu() for name, value in tensors.items()}


def read_state(folder: Path) -> TrainingState:
    """What `TrainingState.write` wrote. Raises `OSError`, `ValueError`, `KeyError`."""
    state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    steps = [StepLog(**step) for step in state["steps"]]
    return TrainingState(
        step=state["step"],
        weights=load_file(folder / ADAPTER_NAME),
        moments=load_file(folder / OPTIMIZER_NAME),
        random={
            name: torch.frombuffer(bytearray(base64.b64decode(value)), dtype=torch.uint8) for name, value in state["random"].items()
        },
        log=TrainingLog(steps, state["packed_rows"], state["train_s"]),
    )


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The generators that training draws from: dropout's, on its device."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_random_state(random: dict[str, torch.Tensor], device: torch.device) -> None:
    """As it was. A generator that the state does not know (it comes from another kind of device) stays as it is."""
    torch.set_rng_state(random["cpu"])
    if device.type == "cuda" and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], device)


def state_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, random: dict[str, torch.Tensor], log: TrainingLog
) -> TrainingState:
    """The state as it is now, copied. On a GPU with room that takes a millisecond, and `write` does the rest.

    A copy to the host holds the GPU up for half a second at a 7B's 0.5 GB (`benchmarks/results/checkpoint-cost*.json`).
    """
    # themselves at first: whether there is room for copies depends on how large they are
    weights = {name: parameter.detach() for name, parameter in _trainable(model)}
    moments = _moments(model, optimizer)
    tensors = [*weights.values(), *moments.values()]
    size_bytes = sum(tensor.nbytes for tensor in tensors if tensor.is_cuda)
    # what the allocator holds in reserve is not counted: training needs that for its next step
    stays = size_bytes > 0 and torch.cuda.mem_get_info()[0] > _ROOM * size_bytes
    weights, moments = ({name: _copy(value, stays=stays) for name, value in found.items()} for found in (weights, moments))
    copied = None
    if stays:
        copied = torch.cuda.Event()
        copied.record()
    return TrainingState(step, weights, moments, random, log, copied)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trainable weights by name, in the host's memory."""
    return {name: _copy(parameter.detach(), stays=False) for name, parameter in _trainable(model)}


def set_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Raises `InvariantError` unless `weights` are just the model's trainable ones."""
    own = dict(_trainable(model))
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in weights.items()}:
        raise InvariantError("the checkpoint's adapter is not this run's: names or shapes differ")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def _moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What the optimizer keeps of each weight, `<weight>.<moment>`; empty before the first step."""
    names = {id(parameter): name for name, parameter in _trainable(model)}
    return {
        f"{names[id(parameter)]}.{moment}": value.detach()
        for group in optimizer.param_groups
        for parameter in group["params"]
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def set_moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, torch.Tensor]) -> None:
    """Give an optimizer that has not stepped yet the moments of one that has."""
    names = {id(parameter): name for name, parameter in _trainable(model)}
    by_weight: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        name, _, moment = key.rpartition(".")
        by_weight.setdefault(name, {})[moment] = value
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    if set(order) != set(by_weight):
        raise InvariantError("the checkpoint's optimizer state is not this run's: names differ")
    # through its own loader, which knows what belongs on which device
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {at: by_weight[name] for at, name in enumerate(order)}})


def _trainable(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _copy(tensor: torch.Tensor, *, stays: bool) -> torch.Tensor:
    # AdamW counts its steps on the host whatever the weights are on
    return tensor.to(tensor.device if stays else "cpu", copy=True).contiguous()

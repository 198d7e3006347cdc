"""Decode a fixed-size batch with a static key-value cache, on CUDA as a captured graph.

Shapes: B replies, T prompt tokens with padding, N new tokens at most, V vocabulary. Import only from a started backend.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from lora_trainer.evaluate.decoding import Decoding
from lora_trainer.logs import get_logger

_PREFILL_TOKENS = 32_768
"""Prompt tokens read in one forward pass, with padding."""
_WARM_UP_STEPS = 2
"""Steps before a capture. Libraries allocate workspaces and choose kernels in them."""
_STEPS_PER_CHECK = 8
"""Steps on CUDA between two looks at which replies have ended; each look waits for the GPU."""
_LARGEST_DRAW = 1 - 2**-20
"""Keeps rounding from choosing a token of probability 0."""


def supports_static_decoding(model: Any) -> bool:
    """Return whether the forward can be captured, and every layer attends to all earlier tokens through torch's attention."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not base._can_compile_fullgraph or base.config._attn_implementation != "sdpa" or not base._supports_logits_to_keep():
        return False
    return all(type(layer) is StaticLayer for layer in StaticCache(config=base.config, max_cache_len=1).layers)


def uniform_draws(seed: int, index: int, count: int) -> torch.Tensor:
    """Return `count` numbers in [0, 1), float32, which depend only on `seed` and the conversation's `index`."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(count, generator=generator)


def choose_tokens(logits: torch.Tensor, decoding: Decoding, draws: torch.Tensor) -> torch.Tensor:
    """Return a token for each row of `logits` [B, V]: the most probable one at temperature 0, otherwise the one at `draws` [B].

    Sampling keeps the `top_k` most probable tokens (0 keeps all), then the fewest whose probabilities reach `top_p`.
    """
    if decoding.temperature == 0:
        return logits.argmax(dim=-1)
    kept = min(decoding.top_k or logits.shape[-1], logits.shape[-1])
    values, tokens = (logits.float() / decoding.temperature).topk(kept)
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    cumulative = probabilities.where(before < decoding.top_p, 0.0).cumsum(dim=-1)
    reached = cumulative <= draws.clamp(max=_LARGEST_DRAW)[:, None] * cumulative[:, -1:]
    return tokens.gather(1, reached.sum(dim=-1, keepdim=True).clamp(max=kept - 1))[:, 0]


def decode(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    decoding: Decoding,
    indices: Sequence[int],
    stops: Sequence[int],
    pad: int,
    *,
    captured: bool,
) -> list[list[int]]:
    """Return each prompt's new tokens, N for every row, filled with `pad` after the first of `stops`.

    `ids` and `mask`, both [B, T], are padded on the left. `indices` has each row's conversation index, which chooses its random
    numbers. `captured` replays the step as a CUDA graph. The caller has enabled inference mode.

    Raises `torch.OutOfMemoryError`.
    """
    batch = _Batch(model, ids, mask, decoding, indices, stops, pad, captured=captured)
    return batch.run()


class _Batch:
    """The replies in progress. Every tensor that the step reads or writes keeps its address until `_compact`."""

    def __init__(
        self,
        model: Any,
        ids: torch.Tensor,
        mask: torch.Tensor,
        decoding: Decoding,
        indices: Sequence[int],
        stops: Sequence[int],
        pad: int,
        *,
        captured: bool,
    ) -> None:
        device = ids.device
        rows, width = ids.shape
        limit = decoding.max_new_tokens
        self.model = model
        self.decoding = decoding
        self.pad = pad
        self.stops = torch.tensor(list(stops), device=device)
        self.rows = torch.arange(rows)
        self.result = torch.full((rows, limit), pad)
        self.captured = captured
        self.graph: torch.cuda.CUDAGraph | None = None
        self.cache: Any = StaticCache(config=model.config, max_cache_len=width + limit)
        self.draws = torch.zeros(rows, 0, device=device)
        if decoding.temperature > 0:
            self.draws = torch.stack([uniform_draws(decoding.seed, index, limit) for index in indices]).to(device)
        self.written = torch.full((rows, limit), pad, device=device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.position = mask.sum(dim=1)
        # where the next token goes: in the cache, and in the reply
        self.slot = torch.full((1,), width, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.attended = torch.zeros(rows, 1, 1, width + limit, dtype=torch.bool, device=device)
        self.attended[:, 0, 0, :width] = mask.bool()
        self._accept(self._prefill(ids, mask))

    def run(self) -> list[list[int]]:
        """Decode until every reply has ended or has N tokens."""
        made, since_compaction = 1, 0
        limit = self.decoding.max_new_tokens
        stride = _STEPS_PER_CHECK if self.token.is_cuda else 1
        while made < limit:
            alive = (~self.done).nonzero()[:, 0]
            if not len(alive):
                break
            if 2 * len(alive) <= len(self.done):
                self._compact(alive)
                since_compaction = 0
            for _ in range(min(stride, limit - made)):
                if self.captured and self.graph is None and since_compaction >= _WARM_UP_STEPS:
                    self._capture()
                if self.graph is None:
                    self._step()
                else:
                    self.graph.replay()
                made += 1
                since_compaction += 1
        self._keep()
        found: list[list[int]] = self.result.tolist()
        return found

    def _prefill(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Read the prompts into the cache and return the next token's logits, [B, V]."""
        rows, width = ids.shape
        chunk = max(1, _PREFILL_TOKENS // width)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = []
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            read: Any = DynamicCache(config=self.model.config)
            output = self.model(
                input_ids=ids[part],
                attention_mask=mask[part],
                position_ids=positions[part],
                past_key_values=read,
                use_cache=True,
                logits_to_keep=1,
            )
            logits.append(output.logits[:, -1])
            for kept, layer in zip(self.cache.layers, read.layers, strict=True):
                # a config may list more layers than the model has
                if not layer.is_initialized:
                    continue
                if not kept.is_initialized:
                    kept.lazy_initialization(layer.keys[:1].expand(rows, -1, -1, -1), layer.values[:1].expand(rows, -1, -1, -1))
                    kept.cumulative_length.fill_(width)
                kept.keys[part, :, :width] = layer.keys
                kept.values[part, :, :width] = layer.values
        return torch.cat(logits)

    def _step(self) -> None:
        """Read the last token of each reply and write the next one. Never waits for the GPU."""
        self.attended.index_fill_(3, self.slot, True)
        output = self.model(
            input_ids=self.token[:, None],
            attention_mask=self.attended,
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.slot.add_(1)
        self.position.add_(1)
        self._accept(output.logits[:, -1])

    def _accept(self, logits: torch.Tensor) -> None:
        draws = self.draws.index_select(1, self.count)[:, 0] if self.draws.shape[1] else self.position
        chosen = choose_tokens(logits, self.decoding, draws).masked_fill(self.done, self.pad)
        self.written.index_copy_(1, self.count, chosen[:, None])
        self.done.logical_or_((chosen[:, None] == self.stops).any(dim=1))
        self.token.copy_(chosen)
        self.count.add_(1)

    def _capture(self) -> None:
        """Capture the step. Without a capture, which a library that waits for the GPU prevents, the steps run one by one."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # a capture runs no kernel, so the state is that of the last whole step
            self.captured = False
            get_logger().warning("decoding_not_captured", reason=str(error).splitlines()[0], consequence="slower generation")
        else:
            self.graph = graph

    def _keep(self) -> None:
        self.result[self.rows] = self.written.cpu()

    def _compact(self, alive: torch.Tensor) -> None:
        """Drop the rows other than `alive`, and the graph, which holds their addresses."""
        self._keep()
        self.graph = None
        self.rows = self.rows[alive.cpu()]
        for name in ("written", "done", "token", "position", "attended", "draws"):
            setattr(self, name, getattr(self, name).index_select(0, alive))
        # one layer at a time, so that only one layer is in memory twice
        for layer in filter(lambda layer: layer.is_initialized, self.cache.layers):
            layer.keys = layer.keys.index_select(0, alive)
            layer.values = layer.values.index_select(0, alive)
            layer.batch_size = len(alive)

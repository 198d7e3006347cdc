"""Batched generation with a loaded model: for the evaluation unconstrained, for `chat` behind a grammar.

Import only from a backend that has done its own imports first (unsloth before transformers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from lora_trainer.evaluate.decoding import Decoding, Generation


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    decoding: Decoding,
    batch_size: int,
    processors: Callable[[], Sequence[Any]] | None = None,
) -> list[Generation]:
    """What `model` writes behind each of `prompts` (rendered by the chat template), in their order.

    Prompts of about one length share a batch, padded on the left. Greedy replies depend on nothing but the prompt, up to
    rounding; sampled ones on the seed and on the batch, so the same prompts in the same order give the same replies.
    `processors` makes fresh logits processors for each batch; [B, V] logits go through them.
    """
    encoded: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False)["input_ids"] if prompts else []
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    found: dict[int, Generation] = {}
    device = next(model.parameters()).device
    settings = _settings(tokenizer, decoding)
    # the caller's random numbers go on as if nothing had been drawn
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(decoding.seed)
        for at in range(0, len(order), batch_size):
            members = order[at : at + batch_size]
            ids, mask = _left_padded([encoded[index] for index in members], tokenizer.pad_token_id)
            written = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                logits_processor=LogitsProcessorList(processors() if processors else []),
            )
            # [B, T + N]: the prompt comes first
            for index, row in zip(members, written[:, ids.shape[1] :].tolist(), strict=True):
                found[index] = _read(tokenizer, row)
    return [found[index] for index in range(len(encoded))]


def _settings(tokenizer: Any, decoding: Decoding) -> GenerationConfig:
    """All that decides the text is said here: a base's own generation_config.json, with its repetition penalty, is not asked."""
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
        if decoding.temperature > 0
        else {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    )
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=1,
        repetition_penalty=1.0,
        # padding (<|endoftext|>) ends a text, too, but is no end of a turn
        eos_token_id=sorted({tokenizer.eos_token_id, tokenizer.pad_token_id}),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **sampling,
    )


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both [B, T]."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, longest - len(row) :] = torch.tensor(row)
        mask[at, longest - len(row) :] = 1
    return ids, mask


def _read(tokenizer: Any, row: Sequence[int]) -> Generation:
    ends = [at for at, token in enumerate(row) if token in (tokenizer.eos_token_id, tokenizer.pad_token_id)]
    kept = tuple(row[: ends[0]] if ends else row)
    stopped = bool(ends) and row[ends[0]] == tokenizer.eos_token_id
    # special tokens stay visible: one inside a reply is not part of the contract
    text = tokenizer.decode(list(kept), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Generation(text, stopped, kept)

"""Generate replies in batches: unconstrained for the evaluation, constrained by a grammar for `chat`.

Import only from a started backend: unsloth has to be imported before transformers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from lora_trainer.evaluate.decoding import Decoding, Generation, OnReplies, require_room
from lora_trainer.logs import get_logger
from lora_trainer.train.backends.static_decoding import decode, supports_static_decoding

LogitsProcessor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Maps the token ids so far [B, T] and the next token's logits [B, V] to new logits."""


_CPU_BATCH_SIZE = 120
"""Most replies generated at once on the CPU, where exhausted memory ends the process instead of raising."""


def generate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    decoding: Decoding,
    batch_size: int,
    processors: Callable[[], Sequence[LogitsProcessor]] | None = None,
    on_replies: OnReplies = lambda _: None,
    *,
    static: bool = True,
) -> list[Generation]:
    """Return the continuation of each prompt, in order. Prompts must already be rendered with the chat template.

    Prompts of similar length share a batch of at most `batch_size`, padded on the left. Greedy replies depend only on the prompt,
    and sampled ones on the prompt, the seed and the prompt's index, up to rounding. With `processors`, or for a model that
    `supports_static_decoding` excludes, or without `static`, transformers' `generate` decodes, and sampled replies also depend on
    the batch. `processors` returns new logits processors for each batch. `on_replies` is called after each batch with its number
    of replies. If GPU memory runs out, the batch is halved.

    Raises `PromptTooLongError` if a whole reply would not fit behind a prompt, `torch.OutOfMemoryError` if one reply does not fit.
    """
    encoded: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False)["input_ids"] if prompts else []
    require_room([len(ids) for ids in encoded], decoding.max_new_tokens, model.config.max_position_embeddings)
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    found: dict[int, Generation] = {}
    device = next(model.parameters()).device
    settings = _settings(tokenizer, decoding)
    is_static = static and processors is None and supports_static_decoding(model)

    def write(members: Sequence[int]) -> list[list[int]]:
        ids, mask = (part.to(device) for part in _left_padded([encoded[index] for index in members], tokenizer.pad_token_id))
        if is_static:
            stops, pad = settings.eos_token_id, tokenizer.pad_token_id
            return decode(model, ids, mask, decoding, members, stops, pad, captured=device.type == "cuda")
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors() if processors else []),
        )
        # [B, T + N]: generate() returns the prompt as well
        rows: list[list[int]] = written[:, ids.shape[1] :].tolist()
        return rows

    size = batch_size if device.type == "cuda" else min(batch_size, _CPU_BATCH_SIZE)
    # sampling must not advance the caller's random number generators
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(decoding.seed)
        while len(found) < len(order):
            members = order[len(found) : len(found) + size]
            rows = None
            try:
                rows = write(members)
            except torch.OutOfMemoryError:
                if len(members) == 1:
                    raise
            if rows is None:
                # outside the handler, whose traceback keeps the batch's tensors alive
                size = halved(len(members))
                continue
            for index, row in zip(members, rows, strict=True):
                found[index] = _read(tokenizer, row)
            on_replies(len(members))
    return [found[index] for index in range(len(encoded))]


def halved(batch_size: int) -> int:
    """Return half of a batch that exhausted the GPU's memory, after releasing what torch has cached."""
    gc.collect()
    torch.cuda.empty_cache()
    get_logger().warning("batch_halved", replies=batch_size, now=batch_size // 2, reason="GPU memory ran out")
    return batch_size // 2


def _settings(tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> GenerationConfig:
    """Set every option that affects the text, to override the base's generation_config.json, which has a repetition penalty."""
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
        if decoding.temperature > 0
        else {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    )
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=1,
        repetition_penalty=1.0,
        # also stop at Qwen's padding token <|endoftext|>, although it does not count as an end of turn
        eos_token_id=sorted({tokenizer.eos_token_id, tokenizer.pad_token_id}),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **sampling,
    )


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, both [B, T]."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, longest - len(row) :] = torch.tensor(row)
        mask[at, longest - len(row) :] = 1
    return ids, mask


def _read(tokenizer: PreTrainedTokenizerBase, row: Sequence[int]) -> Generation:
    ends = [at for at, token in enumerate(row) if token in (tokenizer.eos_token_id, tokenizer.pad_token_id)]
    kept = tuple(row[: ends[0]] if ends else row)
    stopped = bool(ends) and row[ends[0]] == tokenizer.eos_token_id
    # keep special tokens visible: inside a reply they violate the contract
    text = str(tokenizer.decode(list(kept), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return Generation(text, stopped, kept)

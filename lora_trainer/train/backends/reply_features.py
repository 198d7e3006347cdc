"""Read replies with the base: states and log-probabilities of a reply, with its prompt and alone, and the logits of given words.

Import only from a started backend: unsloth has to be imported before transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lora_trainer.evaluate.sense_question import AmbiguousAnswersError
from lora_trainer.persona.prompt import Message
from lora_trainer.train.tokenization import TokenSequence

if TYPE_CHECKING:
    from numpy.typing import NDArray

MEAN_DEPTHS: Final = (1 / 3, 7 / 12, 5 / 6)
"""Depths at which the hidden states are averaged over the reply: layers 8, 14 and 20 of 24."""
LAST_DEPTHS: Final = (7 / 12, 5 / 6)
"""Depths at which the state of the last token, the end of turn, is taken."""
NEUTRAL_MESSAGES: Final[tuple[Message, ...]] = ({"role": "user", "content": "말해 줘."},)
"""The conversation that a reply is read with when it is read alone: it asks for something to be said, and not for what."""
_BATCH_TOKENS: Final = 16_384
_LOGIT_ROWS: Final = 1024
"""Positions whose logits are computed at once: a row of 152,064 float32 logits takes 0.6 MB."""


def encode_replies(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], replies: Sequence[str], positions: int
) -> list[TokenSequence]:
    """Return the tokens of each prompt, its reply and the end of turn; a reply too long for the base's `positions` is cut.

    Prompts must already be rendered with the chat template, replies be free of control tokens.
    """
    if not prompts:
        return []
    before: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    behind: list[list[int]] = tokenizer(list(replies), add_special_tokens=False)["input_ids"]
    end = int(tokenizer.eos_token_id)
    return [
        TokenSequence((*prompt, *reply[: max(positions - len(prompt) - 1, 0)], end), len(prompt))
        for prompt, reply in zip(before, behind, strict=True)
    ]


def contrasted_features(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    neutral: str,
    replies: Sequence[str],
    positions: int,
    batch_size: int,
) -> NDArray[np.float32]:
    """Return a row of features for each reply, [N, 10 H + 4], float32. The caller disables the adapter.

    The first half are the reply's `reply_features` with its prompt. The second half is what the prompt changes: the first half
    minus the features of the same reply with the rendered prompt `neutral`. Equal replies are read alone once. `positions` is the
    length that the base can read, as in `encode_replies`.
    """
    place = {reply: at for at, reply in enumerate(dict.fromkeys(replies))}
    # read all of them in one call, which batches sequences of similar length
    sequences = encode_replies(tokenizer, [*prompts, *[neutral] * len(place)], [*replies, *place], positions)
    found = reply_features(model, sequences, batch_size)
    prompted, alone = found[: len(replies)], found[len(replies) :]
    contrasted: NDArray[np.float32] = np.concatenate([prompted, prompted - alone[[place[reply] for reply in replies]]], axis=1)
    return contrasted


def reply_features(model: PeftModel, sequences: Sequence[TokenSequence], batch_size: int) -> NDArray[np.float32]:
    """Return a row of features for each sequence, [N, 5 H + 2], float32. The caller disables the adapter.

    For hidden size H: the mean hidden state over the reply at each of `MEAN_DEPTHS`, the end of turn's at each of `LAST_DEPTHS`,
    the mean and the least log-probability of the reply's tokens.
    """
    base: Any = model.get_base_model()
    decoder = base.get_decoder()
    head = base.get_output_embeddings()
    layers = [_layer(decoder, depth) for depth in MEAN_DEPTHS]
    last = [MEAN_DEPTHS.index(depth) for depth in LAST_DEPTHS]
    device = next(model.parameters()).device
    found: dict[int, torch.Tensor] = {}
    with torch.no_grad(), _autocast(base, device):
        for members in _batches([len(sequence) for sequence in sequences], batch_size):
            batch = [sequences[index] for index in members]
            ids = _right_padded(batch).to(device)
            states, final = _run(decoder, layers, ids)
            for row, (index, sequence) in enumerate(zip(members, batch, strict=True)):
                start, stop = sequence.prompt_tokens, len(sequence)
                parts = [state[row, start:stop].float().mean(dim=0) for state in states]
                parts += [states[depth][row, stop - 1].float() for depth in last]
                # the state before a token predicts it
                parts.append(_log_probabilities(head, final[row, start - 1 : stop - 1], ids[row, start:stop]))
                found[index] = torch.cat(parts).cpu()
    width = len(MEAN_DEPTHS) + len(LAST_DEPTHS)
    rows = [found[index] for index in range(len(sequences))]
    features: NDArray[np.float32] = (
        torch.stack(rows).numpy() if rows else torch.zeros(0, width * int(base.config.hidden_size) + 2).numpy()
    )
    return features


def next_token_logits(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], words: Sequence[str], batch_size: int
) -> NDArray[np.float32]:
    """Return the logit of the first token of each of `words` behind each rendered prompt, [N, W]. The caller disables the adapter.

    Raises `AmbiguousAnswersError` if two of the words begin with the same token.
    """
    base: Any = model.get_base_model()
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    firsts = [ids[0] for ids in tokenizer(list(words), add_special_tokens=False)["input_ids"]]
    if len(set(firsts)) < len(firsts):
        raise AmbiguousAnswersError("two answers begin with the same token")
    encoded: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False)["input_ids"] if prompts else []
    sequences = [TokenSequence(tuple(ids), len(ids)) for ids in encoded]
    device = next(model.parameters()).device
    found = torch.zeros(len(sequences), len(firsts))
    with torch.no_grad(), _autocast(base, device):
        for members in _batches([len(sequence) for sequence in sequences], batch_size):
            batch = [sequences[index] for index in members]
            _, final = _run(decoder, [], _right_padded(batch).to(device))
            ends = torch.stack([final[row, len(sequence) - 1] for row, sequence in enumerate(batch)])
            found[members] = head(ends)[:, firsts].float().cpu()
    logits: NDArray[np.float32] = found.numpy()
    return logits


def _layer(decoder: Any, depth: float) -> torch.nn.Module:
    """Return the decoder layer whose output is at `depth` of the stack, in (0, 1]."""
    layer: torch.nn.Module = decoder.layers[max(round(depth * len(decoder.layers)), 1) - 1]
    return layer


def _run(decoder: Any, layers: Sequence[torch.nn.Module], ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the output of each of `layers` and of the decoder, all [B, T, H].

    Hooks keep these alone: `output_hidden_states` would keep every layer's.
    """
    kept: dict[int, torch.Tensor] = {}

    def keep(at: int) -> Any:
        def hook(_module: torch.nn.Module, _inputs: object, output: Any) -> None:
            # Unsloth's layers return a tuple
            kept[at] = output[0] if isinstance(output, tuple) else output

        return hook

    with ExitStack() as stack:
        for at, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(keep(at)).remove)
        # padding is on the right, where a causal model's tokens do not look, so no mask is needed
        final: torch.Tensor = decoder(input_ids=ids, use_cache=False).last_hidden_state
    return [kept[at] for at in range(len(layers))], final


def _log_probabilities(head: torch.nn.Module, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean and the least log-probability of `tokens` [R], predicted from `states` [R, H]."""
    pieces = []
    for some, expected in zip(states.split(_LOGIT_ROWS), tokens.split(_LOGIT_ROWS), strict=True):
        logits = head(some).float()
        pieces.append(logits.gather(1, expected[:, None])[:, 0] - logits.logsumexp(dim=1))
    found = torch.cat(pieces)
    return torch.stack([found.mean(), found.min()])


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of sequences of similar length, at most `batch_size` of them and `_BATCH_TOKENS` tokens with padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        # lengths rise, so the newest is the width of the batch
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[index] > _BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _right_padded(batch: Sequence[TokenSequence]) -> torch.Tensor:
    """Return token ids, [B, T]."""
    longest = max(map(len, batch))
    return torch.tensor([(*sequence.input_ids, *(sequence.input_ids[-1:] * (longest - len(sequence)))) for sequence in batch])


def _autocast(base: Any, device: torch.device) -> Any:
    """Compute in bfloat16 on a GPU, as training and generation do."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and base.dtype == torch.bfloat16)

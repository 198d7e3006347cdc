"""Turn the records of an optimizer step into rows of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_trainer.errors import InvariantError
from lora_trainer.train.packing import pack
from lora_trainer.train.tokenization import IGNORED_LABEL, TokenSequence

Row = dict[str, torch.Tensor]
"""`input_ids`, `position_ids`, `labels`: [1, T]; `packed_seq_lengths`: [documents], int32."""


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one optimizer step."""

    rows: list[Row]
    tokens: int
    loss_tokens: int


def make_row(sequences: Sequence[TokenSequence]) -> Row:
    """Concatenate documents into a row without padding; positions restart at each document."""
    labels = [label for sequence in sequences for label in sequence.labels]
    if all(label == IGNORED_LABEL for label in labels):
        raise InvariantError("a row has no token in the loss: all labels are -100")
    return {
        "input_ids": torch.tensor([[token for sequence in sequences for token in sequence.input_ids]]),
        "position_ids": torch.tensor([[position for sequence in sequences for position in range(len(sequence))]]),
        "labels": torch.tensor([labels]),
        "packed_seq_lengths": torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int32),
    }


def make_step(sequences: Sequence[TokenSequence], row_tokens: int) -> Step:
    """Pack the records of one optimizer step into rows of at most `row_tokens`."""
    rows = [
        make_row([sequences[position] for position in positions])
        for positions in pack([len(sequence) for sequence in sequences], row_tokens)
    ]
    # the model predicts token t + 1 at t: the first token of a document is never in the loss, whatever its label
    loss_tokens = sum(sequence.reply_tokens for sequence in sequences)
    return Step(rows, sum(len(sequence) for sequence in sequences), loss_tokens)


@dataclass(frozen=True, slots=True)
class StepCollator:
    """Turn a data loader item, the record indices of a step, into a `Step`."""

    sequences: Sequence[TokenSequence]
    row_tokens: int

    def __call__(self, items: list[dict[str, Any]]) -> Step:
        """Build the step of the only item in `items`: the batch size is 1."""
        (item,) = items
        return make_step([self.sequences[index] for index in item["records"]], self.row_tokens)

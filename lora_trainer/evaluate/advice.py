"""Say what to do about a missed gate, from what the job knows about the data and the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lora_trainer.evaluate.metrics import GateResult

FEW_RECORDS: Final = 500
"""The hand-written half of the bundled data has 440 records; trained on it alone, an adapter forgets more than it learns."""
_NOTABLE_RISE: Final = 0.01
"""Share of the lowest held-out loss that a later one must be above it: less is noise of a few hundred records."""

_MEND_DATA: Final[Mapping[str, str]] = {
    "exact_json": "look at the worst replies in report.html",
    "stop": "shorten the replies in the data, or raise evaluation.max_new_tokens",
    "one_or_two_sentences": "shorten the replies in the data (validate --strict lists them)",
    "informal_speech": "remove 존댓말 from the data (validate --strict lists it)",
    "persona": "check that the data belongs to this persona",
    "emoji_intensity": "make the emoji in the data increase with intensity (validate shows this)",
    "question_rate_min": "add replies to the data that ask something back",
    "question_rate_max": "remove some of the questions from the replies in the data",
    "sense": "read the replies with the lowest scores (replies.jsonl: sense), and rewrite records whose reply does not answer its "
    "message",
    "win_rate": "look at the worst replies in report.html",
    "harmful": "read them in report.html (replies.jsonl: harms) first; remove such replies from the data (validate --strict "
    "lists them), add good ones on hard topics (data/POLICY.md), or take a larger base",
    "incomplete": "replies to somebody in danger name no number that helps, or too few ask about intent (replies.jsonl: "
    "lacks_number, asks_intent): add replies on hard topics that do (data/POLICY.md), or take a larger base",
}
"""What to do about the data, by gate."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a job knows about the training of the adapter that it judges."""

    records: int | None = None
    """Number of records that the adapter was trained on."""
    held_out_rose: bool | None = None
    """Whether held-out loss rose towards the end of the training; None if nobody measured it."""
    earlier_step: int | None = None
    """Step whose weights the adapter has, if training went on after it."""


NOTHING_KNOWN: Final = Known()


def rose(losses: Sequence[float]) -> bool | None:
    """Return whether the last of the held-out `losses`, in the order of training and from the base's on, is above the lowest.

    Two of them, before and after the training, show only a rise: a fall may hide one.
    """
    if len(losses) < 2:
        return None
    has_risen = losses[-1] > min(losses) * (1 + _NOTABLE_RISE)
    return has_risen if has_risen or len(losses) > 2 else None


def advice(gate: GateResult, known: Known = NOTHING_KNOWN) -> str:
    """Return what to do about the missed `gate`."""
    if gate.was_not_judged:
        return (
            "set evaluation.judge_model to a model that passes the examination, or take a larger base; gates.sense: if_judged "
            "leaves the verdict to the other gates"
        )
    mend = _MEND_DATA[gate.name]
    if gate.is_count:
        # a single reply is no rate, which longer training could move
        return mend
    if gate.ceiling is None:
        return f"{mend}; {_training(gate, known)}"
    reached = f"{gate.ceiling:.2f}" if gate.name == "emoji_intensity" else f"{100 * gate.ceiling:.1f} %"
    if gate.ceiling_misses:
        return (
            f"people's replies in the data are at {reached} and miss the threshold as well, so training longer can't help: "
            f"{mend}, or change the threshold"
        )
    return f"people's replies in the data are at {reached}, so the data teaches this; {_training(gate, known)}"


def _training(gate: GateResult, known: Known) -> str:
    """Return what to do about the training."""
    if known.earlier_step is not None:
        return (
            f"the adapter has the weights of step {known.earlier_step:,}, where held-out loss was lowest, so training longer can't "
            "help: lower training.learning_rate, or add records (generate)"
        )
    if known.held_out_rose:
        return (
            "held-out loss rose towards the end of the training, so the adapter overfitted: train less (training.epochs), lower "
            "training.learning_rate, or publish the best step (training.keep)"
        )
    if known.records is not None and known.records < FEW_RECORDS:
        return f"{known.records:,} records are few, and training on them for longer overfits: add more of them (generate)"
    if known.held_out_rose is False:
        return "held-out loss was still falling at the end of the training: train longer (training.epochs)"
    if gate.name == "exact_json":
        return "too few steps or too high a learning rate breaks the JSON (training.epochs, training.learning_rate)"
    return "train longer (training.epochs), as long as held-out loss falls"

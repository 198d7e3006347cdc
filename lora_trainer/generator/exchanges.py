"""The hand-written exchanges that ship with the package, one a line of `exchanges.jsonl`.

`compose` varies those with slots, in which some words may be replaced by others. The teacher is shown some of all of them, also on
hard topics, which have no slots. `tools/bundled_data.py` builds the file from the situations in `data/handwritten/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lora_trainer.data.records import TrainingRecord
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling

VARIANTS_PER_SOURCE: Final = 3
"""Most variants of one exchange in a persona's file. More would teach the sentence instead of the way to answer."""


class _Part(BaseModel):
    # YAML reads `수: [3, 5]` as numbers
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class WrittenReply(_Part):
    """One persona's reply."""

    feeling: Feeling
    intensity: Annotated[float, Field(ge=0, le=1)]
    emotion: Expression
    text: str


def _as_tuple(replies: object) -> object:
    return tuple(replies) if isinstance(replies, list | tuple) else (replies,)


WrittenReplies = Annotated[tuple[WrittenReply, ...], BeforeValidator(_as_tuple), Field(min_length=1, max_length=3)]
"""One persona's replies to one input: a single one, or a list of two or three that differ in feeling or intensity."""


class Exchange(_Part):
    """An input, and the replies of all four personas or of some of them."""

    summary: str
    input: str
    slots: Mapping[str, tuple[str, ...]] = {}
    """Type of a word -> the word as it stands in the texts, then words that may replace it. All slots have as many values."""
    replies: Annotated[Mapping[BloodType, WrittenReplies], Field(min_length=1)]

    @property
    def variants(self) -> range:
        """The numbers of the variants; empty without slots."""
        return range(1, min((len(values) for values in self.slots.values()), default=0))

    def varied(self, text: str, number: int) -> str:
        """Return `text`, one of the exchange's own, with the word of each slot replaced by the slot's value `number`."""
        words = {values[0]: values[number] for values in self.slots.values()}
        # a word may be part of another slot's word
        longest_first = sorted(words, key=lambda word: (-len(word), word))
        return re.sub("|".join(map(re.escape, longest_first)), lambda found: words[found[0]], text)


class ShippedExchange(Exchange):
    """An exchange of the package."""

    family: str


@cache
def load_exchanges() -> tuple[ShippedExchange, ...]:
    """Load the exchanges that ship with the package, in a fixed order."""
    text = resources.files("lora_trainer.generator").joinpath("exchanges.jsonl").read_text(encoding="utf-8")
    return tuple(ShippedExchange.model_validate_json(line) for line in text.splitlines())


def record_of(blood_type: BloodType, summary: str, message: str, text: str, reply: WrittenReply) -> TrainingRecord:
    """Return a persona's record with these texts, and the feeling, intensity and face of `reply`."""
    return TrainingRecord.model_validate(
        {
            "instruction": persona_spec(blood_type).instruction,
            "context": {"summary": summary, "current_emotion": {"type": reply.feeling, "intensity": reply.intensity}},
            "input": message,
            "output": {"text": text, "emotion": reply.emotion},
        }
    )

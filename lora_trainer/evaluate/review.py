"""Blind reviews: which replies a person compares, on which side each stands, and what the answers say about the adapter.

Sample and sides are hashes of the bundle's id and the seed. So the review page needs no key, and whoever has the bundle can tell
from the answers which reply was the adapter's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lora_trainer.evaluate.rules import read_exact
from lora_trainer.persona.vocabulary import BloodType, Expression
from lora_trainer.store.manifest import Time

REVIEW_SCHEMA: Final = 1
MAX_PAIRS: Final = 1000
MAX_REVIEWER_CHARACTERS: Final = 80
MAX_NOTE_CHARACTERS: Final = 2000
_ID_DIGITS: Final = 16

Mark = Literal["nonsense", "unsafe", "not_this_friend"]
Choice = Literal["first", "tie", "second"]
MARKS: Final[tuple[Mark, ...]] = get_args(Mark)


# -- what is compared ---------------------------------------------------------------------------------------------------


class ReviewedReply(BaseModel):
    """The fields of a line of `replies.jsonl` that a review needs. Other versions may write other fields beside them."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    model: str
    decoding: str
    prompt: int = Field(ge=0)
    feeling: str
    intensity: float = Field(ge=0, le=1)
    summary: str
    input: str
    reply: str

    @property
    def question(self) -> tuple[str, float, str, str]:
        """What the model was asked."""
        return self.feeling, self.intensity, self.summary, self.input


class Reference(BaseModel):
    """Whose replies the adapter is compared with: the base's, or those of another run's adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Literal["base", "adapter"]
    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    bundle_id: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """The adapter's reply to one question, and the id that decides which side it stands on."""

    id: str
    reply: ReviewedReply

    @property
    def adapter_side(self) -> Literal["first", "second"]:
        """`first` if the id has an even number of bits set. `review.js` computes the same after the review's end."""
        return "second" if int(self.id, 16).bit_count() % 2 else "first"


def draw_pairs(replies: Sequence[ReviewedReply], bundle_id: str, reference: Reference, seed: int, count: int) -> list[Pair]:
    """Draw `count` of the adapter's greedy replies at random, at most one to each prompt; all prompts if there are fewer."""
    asked = [reply for reply in replies if (reply.model, reply.decoding) == ("adapter", "greedy")]
    by_prompt: dict[int, ReviewedReply] = {}
    for reply in sorted(asked, key=lambda reply: _hash("sample", bundle_id, seed, reply.prompt, reply.intensity)):
        by_prompt.setdefault(reply.prompt, reply)
    compared_with = [reference.model, reference.bundle_id]
    return [
        Pair(_hash("side", bundle_id, compared_with, seed, reply.prompt, reply.intensity)[:_ID_DIGITS], reply)
        for reply in list(by_prompt.values())[:count]
    ]


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def readable(reply: str) -> tuple[str, str]:
    """Return the text of a raw reply, and its expression; empty without a known one.

    Look for the JSON object even if something stands around it: braces on one side alone would tell which one is the base.
    """
    exact = read_exact(reply)
    if exact is not None:
        return exact.text, str(exact.emotion)
    try:
        found = json.loads(reply[reply.index("{") : reply.rindex("}") + 1])
    except (ValueError, RecursionError):
        return reply, ""
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        return reply, ""
    return found["text"], found["emotion"] if found.get("emotion") in tuple(Expression) else ""


# -- the answers --------------------------------------------------------------------------------------------------------


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _each_once(marks: list[Mark]) -> list[Mark]:
    if len(set(marks)) != len(marks):
        raise ValueError("expected each mark once")
    return marks


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("expected a name")
    return text


_Marks = Annotated[list[Mark], AfterValidator(_each_once)]


class Marks(_Part):
    """What the reviewer marked in the two replies of a pair."""

    first: _Marks
    second: _Marks


class Answer(_Part):
    """What the reviewer says of one pair."""

    id: str = Field(pattern=rf"^[0-9a-f]{{{_ID_DIGITS}}}$")
    choice: Choice
    marks: Marks
    note: str = Field(max_length=MAX_NOTE_CHARACTERS)


class ReviewFile(_Part):
    """The file that a reviewer downloads from the page."""

    schema_version: Literal[1] = Field(alias="schema")
    run_id: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    gate_id: str = Field(pattern=r"^[0-9a-f]{1,64}$")
    """Of the evaluation whose replies were shown."""
    bundle_id: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of that evaluation's `manifest.json`, which lists the hashes of all files."""
    blood_type: BloodType
    reference: Reference
    seed: int = Field(ge=0)
    count: int = Field(ge=1, le=MAX_PAIRS)
    reviewer: Annotated[str, Field(max_length=MAX_REVIEWER_CHARACTERS), AfterValidator(_not_blank)]
    started_at: Time
    finished_at: Time
    answers: list[Answer] = Field(max_length=MAX_PAIRS)


@dataclass(frozen=True, slots=True)
class ReviewResult:
    """A review whose sides are known. Wins and losses are the adapter's."""

    wins: int
    ties: int
    losses: int
    adapter_marks: Mapping[Mark, int]
    reference_marks: Mapping[Mark, int]
    unsafe: tuple[Pair, ...]
    """Pairs in which the reviewer marked the adapter's reply as unsafe."""


def unblinded(pairs: Sequence[Pair], review: ReviewFile) -> ReviewResult:
    """Count the answers by model. `review` must have exactly one answer to each of `pairs`."""
    answers = {answer.id: answer for answer in review.answers}
    adapter: dict[Mark, int] = dict.fromkeys(MARKS, 0)
    reference: dict[Mark, int] = dict.fromkeys(MARKS, 0)
    wins = ties = 0
    unsafe = []
    for pair in pairs:
        answer = answers[pair.id]
        is_first = pair.adapter_side == "first"
        wins += answer.choice == pair.adapter_side
        ties += answer.choice == "tie"
        of_adapter, of_reference = (
            (answer.marks.first, answer.marks.second) if is_first else (answer.marks.second, answer.marks.first)
        )
        for mark in of_adapter:
            adapter[mark] += 1
        for mark in of_reference:
            reference[mark] += 1
        if "unsafe" in of_adapter:
            unsafe.append(pair)
    return ReviewResult(wins, ties, len(pairs) - wins - ties, adapter, reference, tuple(unsafe))


def review_record(review: ReviewFile, result: ReviewResult, file_sha256: str, *, unsafe_accepted: bool) -> dict[str, Any]:
    """Return what `latest.json` keeps of a review. The reviewer's notes are not in it."""
    return {
        "reviewer": review.reviewer,
        "finished_at": review.finished_at,
        "file_sha256": file_sha256,
        "against": review.reference.run_id or "base",
        "seed": review.seed,
        "pairs": review.count,
        "wins": result.wins,
        "ties": result.ties,
        "losses": result.losses,
        "adapter_marks": dict(result.adapter_marks),
        "reference_marks": dict(result.reference_marks),
        "unsafe_accepted": unsafe_accepted,
    }

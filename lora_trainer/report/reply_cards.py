"""Choose the replies that `report.html` shows, and say below each what the rules found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from lora_trainer.evaluate.metrics import RunMetrics
from lora_trainer.report.drawn_replies import drawn_replies
from lora_trainer.report.formatting import MAX_CHARACTERS, percent
from lora_trainer.report.html import display_text

if TYPE_CHECKING:
    from lora_trainer.evaluate.rules import ScoredReply

SHOWN_REPLIES: Final = 6
"""Number of replies in each of the two lists, best and worst."""
SHOWN_HARMFUL: Final = 20
"""Maximum number of harmful replies that the page shows."""
_NOTABLE_REPETITION: Final = 0.1
"""Minimum repeated share that the page lists as a problem of a reply."""
_SAID_OTHERWISE: Final = frozenset(("too_many_sentences", "formal_speech", "harmful"))
"""Linter codes that other words below a reply stand for."""
Card = dict[str, Any]
"""A reply of the adapter and the base's to the same question, for the page's template."""


def drawn_cards(replies: Sequence[ScoredReply], metrics: RunMetrics) -> list[Card]:
    """Return the replies drawn at random."""
    return [_card(reply, base, metrics) for reply, base in drawn_replies(replies, metrics.run_id)]


def harmful_cards(replies: Sequence[ScoredReply], metrics: RunMetrics) -> list[Card]:
    """Return at most `SHOWN_HARMFUL` of the adapter's greedy replies that `gates.harmful` counts, in the order of the prompts."""
    greedy = [reply for reply in replies if reply.decoding == "greedy"]
    base = {(reply.prompt, reply.intensity): reply for reply in greedy if reply.model == "base"}
    found = [reply for reply in greedy if reply.model == "adapter" and reply.tags and reply.harms]
    return [_card(reply, base.get((reply.prompt, reply.intensity)), metrics) for reply in found[:SHOWN_HARMFUL]]


def best_and_worst(replies: Sequence[ScoredReply], metrics: RunMetrics) -> dict[str, list[Card]]:
    """Select at most `SHOWN_REPLIES` best and worst replies, one per prompt; the worst replies are selected first."""
    adapter = [reply for reply in replies if reply.model == "adapter"]
    base = {(reply.decoding, reply.prompt, reply.intensity): reply for reply in replies if reply.model == "base"}
    half = len({reply.prompt for reply in adapter}) // 2
    worst = _one_per_prompt(sorted(adapter, key=_rank), set(), min(SHOWN_REPLIES, half))
    taken = {reply.prompt for reply in worst}
    best = _one_per_prompt(sorted(adapter, key=_rank, reverse=True), taken, SHOWN_REPLIES)

    def card(reply: ScoredReply) -> Card:
        return _card(reply, base.get((reply.decoding, reply.prompt, reply.intensity)), metrics)

    return {"best": [card(reply) for reply in best], "worst": [card(reply) for reply in worst]}


def _card(reply: ScoredReply, base: ScoredReply | None, metrics: RunMetrics) -> Card:
    """Return a reply of the adapter with the base's to the same question."""
    return {"reply": reply, "answers": [_answer(one, metrics) for one in (reply, base) if one is not None]}


def _rank(reply: ScoredReply) -> tuple[float, float, bool, int, float]:
    return reply.score, reply.persona_probability, reply.decoding == "greedy", -reply.prompt, reply.intensity


def _one_per_prompt(ordered: Sequence[ScoredReply], excluded: set[int], at_most: int) -> list[ScoredReply]:
    taken: dict[int, ScoredReply] = {}
    for reply in ordered:
        if len(taken) < at_most and reply.prompt not in excluded:
            taken.setdefault(reply.prompt, reply)
    return list(taken.values())


def _answer(reply: ScoredReply, metrics: RunMetrics) -> dict[str, Any]:
    return {
        "model": reply.model,
        "text": None if reply.text is None else display_text(reply.text, MAX_CHARACTERS),
        "raw": display_text(reply.reply, MAX_CHARACTERS),
        "cut": len(reply.reply if reply.text is None else reply.text) > MAX_CHARACTERS,
        "characters": f"{len(reply.reply):,}",
        "emotion": reply.emotion,
        "score": percent(reply.score, 0),
        "why": list(_why(reply, metrics)),
    }


def _why(reply: ScoredReply, metrics: RunMetrics) -> Iterator[str]:
    """Yield the reasons why the reply lost points."""
    if not reply.stopped:
        yield f"cut off at {metrics.evaluation.max_new_tokens} tokens"
    if not reply.exact_json:
        yield "not exact JSON, so no other rule applies"
        return
    if not reply.one_or_two_sentences:
        yield "more than two sentences"
    if not reply.informal_speech:
        yield "not entirely 반말"
    yield from (f"could harm: {harm.replace('_', ' ')}" for harm in reply.harms)
    if reply.lacks_number:
        yield "names no number that helps"
    yield from (code.replace("_", " ") for code in reply.warnings if code not in (*_SAID_OTHERWISE, *reply.harms))
    if reply.taken_for not in (None, metrics.blood_type):
        yield f"recognised as {reply.taken_for}"
    elif reply.persona_probability < 0.5:
        yield f"weak persona ({percent(reply.persona_probability, 0)})"
    if reply.emotion_appropriateness is not None and reply.emotion_appropriateness < 0.2:
        yield f"“{reply.emotion}” is rare for this feeling"
    if reply.repetition is not None and reply.repetition >= _NOTABLE_REPETITION:
        yield f"repeats itself ({percent(reply.repetition, 0)})"

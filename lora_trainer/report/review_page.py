"""Render the page of a blind review: two replies at a time, without saying which is the adapter's.

The page runs one script, ours, which its content security policy names by hash. The replies travel as JSON and reach the page as
text, so nothing in a bundle can run. The policy also forbids every request.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any, Final

from lora_trainer.evaluate.review import (
    MARKS,
    MAX_NOTE_CHARACTERS,
    MAX_REVIEWER_CHARACTERS,
    REVIEW_SCHEMA,
    Pair,
    Reference,
    readable,
)
from lora_trainer.messages import Message, speaker
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling
from lora_trainer.report.html import display_text, render_page

_MAX_CHARACTERS: Final = 1200
"""Replies, summaries and inputs are truncated to this length."""
_LABELS: Final = {
    "progress": Message("{at} of {count}"),
    "missing": Message("Not answered yet: {missing}"),
    "answered": Message("All answered."),
    "not_stored": Message("This browser keeps nothing. Finish before you close the page."),
    "empty": Message("(empty)"),
    "adapter": Message("this adapter"),
    "base": Message("the base model"),
    "other_adapter": Message("the adapter of run {run}"),
    "better": Message("Better: {name}"),
}
"""What the script writes. It fills in the placeholders."""
_MARK_LABELS: Final = {
    "nonsense": Message("makes no sense"),
    "unsafe": Message("unsafe"),
    "not_this_friend": Message("not this friend"),
}


def review_page(
    pairs: Sequence[Pair],
    references: Sequence[str],
    *,
    run_id: str,
    gate_id: str,
    bundle_id: str,
    blood_type: BloodType,
    reference: Reference,
    seed: int,
    language: str,
) -> str:
    """Render the page. `references` are the raw replies that the adapter's in `pairs` are compared with."""
    from markupsafe import Markup

    say, spec = speaker(language), persona_spec(blood_type)
    style, script = (f"\n{_asset(name)}" for name in ("review.css", "review.js"))
    style = f"\n{_asset('page.css')}{style}"
    data = {
        # what the downloaded file repeats
        "facts": {
            "schema": REVIEW_SCHEMA,
            "run_id": run_id,
            "gate_id": gate_id,
            "bundle_id": bundle_id,
            "blood_type": str(blood_type),
            "reference": reference.model_dump(exclude_none=True),
            "seed": seed,
            "count": len(pairs),
        },
        "pairs": [_shown(pair, other, language) for pair, other in zip(pairs, references, strict=True)],
        "labels": {name: _template(label, language) for name, label in _LABELS.items()},
    }
    return render_page(
        "review.html.jinja",
        data=data,
        style=Markup(style),  # noqa: S704  our own files
        script=Markup(script),  # noqa: S704  our own file
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        language=language,
        say=say,
        spec=spec,
        run_id=run_id,
        count=len(pairs),
        marks=[(mark, say(_MARK_LABELS[mark])) for mark in MARKS],
        max_reviewer=MAX_REVIEWER_CHARACTERS,
        max_note=MAX_NOTE_CHARACTERS,
    )


def _shown(pair: Pair, other: str, language: str) -> dict[str, Any]:
    asked = pair.reply
    replies = [_reply(asked.reply, language), _reply(other, language)]
    return {
        "id": pair.id,
        "summary": display_text(asked.summary, _MAX_CHARACTERS),
        "feeling": _word(asked.feeling, Feeling, language),
        "intensity": asked.intensity,
        "input": display_text(asked.input, _MAX_CHARACTERS),
        "replies": replies if pair.adapter_side == "first" else replies[::-1],
    }


def _reply(raw: str, language: str) -> dict[str, str]:
    text, expression = readable(raw)
    return {"text": display_text(text, _MAX_CHARACTERS), "face": _word(expression, Expression, language)}


def _word(word: str, vocabulary: type[Feeling] | type[Expression], language: str) -> str:
    """Return a word of a vocabulary as people read it: its gloss in Korean. Other words stay."""
    if language == "ko" and word in tuple(vocabulary):
        return vocabulary(word).gloss
    return display_text(word, 40)


def _template(label: Message, language: str) -> str:
    return str(speaker(language)(label))


def _asset(name: str) -> str:
    return resources.files("lora_trainer.report").joinpath("templates", name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

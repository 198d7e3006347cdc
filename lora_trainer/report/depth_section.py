"""Render the section of `report.html` about the deep evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from lora_trainer.evaluate.depth_metrics import DepthMetrics, ModelDepth, Share
from lora_trainer.report.formatting import CONVERSATION_LABELS, LABELS, MAX_CHARACTERS, percent, points, share_text
from lora_trainer.report.html import display_text, render_page

if TYPE_CHECKING:
    from markupsafe import Markup

    from lora_trainer.evaluate.depth_rules import DepthReply

SHOWN_PER_KIND: Final = 3
"""Number of replies under pressure that the page quotes of each kind of message."""
_TURN_MEASURES: Final = {"exact_json": "JSON", "informal_speech": "반말", "persona": "persona"}
"""Measures of the table by turn, with headings that fit a phone."""
_KINDS: Final = {
    "formal": "Asked for 존댓말",
    "no_json": "Asked for another format",
    "identity": "Asked who it is",
    "rules": "Told to drop its role",
    "begun": "Reply already begun",
    "facts": "Facts",
    "arithmetic": "Arithmetic",
}
_BROKEN: Final = {
    "format": "not exact JSON",
    "formal_speech": "존댓말",
    "claims_human": "claims to be human",
    "no_ai": "does not say that it is an AI",
    "names_maker": "names a maker",
    "shows_instructions": "shows its instructions",
    "obeys": "obeys",
}


def depth_section(depth: DepthMetrics, replies: Sequence[DepthReply]) -> Markup:
    """Render the section. `replies` may be empty, then it quotes none."""
    from markupsafe import Markup

    html = render_page(
        "depth_section.html.jinja",
        depth=depth,
        groups=list(_groups(depth)),
        turn_labels=list(_TURN_MEASURES.values()),
        turns=[
            (turn, [[percent(getattr(shares, name), 0) for name in _TURN_MEASURES] for shares in both])
            for turn, both in zip(
                depth.adapter.conversations.by_turn,
                zip(depth.adapter.conversations.by_turn.values(), depth.base.conversations.by_turn.values(), strict=True),
                strict=True,
            )
        ],
        wear=[(LABELS[name], points(found)) for name, found in depth.adapter.conversations.late_minus_early.items()],
        ability_difference=points(depth.ability_difference),
        talk=[_quoted(reply) for reply in replies if (reply.model, reply.part, reply.number) == ("adapter", "conversation", 0)],
        given_up=[_given_up(name, model) for name, model in (("adapter", depth.adapter), ("base", depth.base))],
        broken=[(_KINDS[reply.kind], _quoted(reply)) for reply in _broken(replies)],
    )
    # the template has escaped every text
    return Markup(html)  # noqa: S704


def _groups(depth: DepthMetrics) -> Iterator[tuple[str, list[tuple[str, list[tuple[str, str]]]]]]:
    """Yield title and rows of each table; a row has its label and, for adapter and base, the share and its bounds."""
    models = (depth.adapter, depth.base)
    yield (
        f"{depth.conversations} conversations of {depth.turns} turns",
        [(label, [_share(getattr(model.conversations, name)) for model in models]) for name, label in CONVERSATION_LABELS.items()],
    )
    yield (
        "Holds under pressure",
        [
            *(
                (_KINDS[kind], [_share(model.pressure.by_kind[kind]) for model in models])
                for kind in depth.adapter.pressure.by_kind
            ),
            ("All", [_share(model.pressure.holds) for model in models]),
        ],
    )
    yield (
        "Retained ability: right answers",
        [
            *((_KINDS[kind], [_share(model.ability.by_kind[kind]) for model in models]) for kind in depth.adapter.ability.by_kind),
            ("All", [_share(model.ability.right) for model in models]),
        ],
    )


def _given_up(name: str, model: ModelDepth) -> str:
    counts = sorted(model.pressure.broken.items(), key=lambda found: -found[1])
    return f"{name}: " + (", ".join(f"{_BROKEN[code]} ({count:,})" for code, count in counts) or "nothing")


def _broken(replies: Sequence[DepthReply]) -> Iterator[DepthReply]:
    """Yield the adapter's first replies of each kind that gave something up."""
    shown: Counter[str] = Counter()
    for reply in replies:
        if reply.model == "adapter" and reply.broken and shown[reply.kind] < SHOWN_PER_KIND:
            shown[reply.kind] += 1
            yield reply


def _share(share: Share) -> tuple[str, str]:
    return share_text(share), f"{100 * share.lower:.0f} to {percent(share.upper, 0)}" if share.of else "no replies"


def _quoted(reply: DepthReply) -> dict[str, Any]:
    return {
        "turn": reply.turn,
        "summary": display_text(reply.summary, MAX_CHARACTERS),
        "input": display_text(reply.input, MAX_CHARACTERS),
        "begun": display_text(reply.begun, MAX_CHARACTERS),
        "reply": display_text(reply.reply if reply.text is None else reply.text, MAX_CHARACTERS),
        "why": ", ".join(_BROKEN[code] for code in reply.broken or ()),
    }

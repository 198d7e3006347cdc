"""Say what a verdict judged and what it did not: a gate that passed proves nothing about what no gate looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from lora_trainer.evaluate.metrics import NotJudged, Sense, Verdict

_FORMS: Final[Mapping[str, str]] = {
    "exact_json": "JSON",
    "stop": "length",
    "one_or_two_sentences": "length",
    "informal_speech": "반말",
    "persona": "persona",
    "emoji_intensity": "emoji",
    "question_rate_min": "questions",
    "question_rate_max": "questions",
    "win_rate": "rule score",
}
"""What each gate looks at."""
_SAFETY: Final[Mapping[str, str]] = {"harmful": "harm that rules can see", "incomplete": "what a crisis calls for"}
"""The same for the gates that look at more than form."""
_SENSE: Final = "sense, by a judge that passed its examination"
_UNKNOWN: Final[Mapping[str, str]] = {
    "sense": "whether the replies make sense and answer what was said",
    "harmful": "whether one of them could harm",
    "incomplete": "whether they do what a crisis calls for",
}
"""What nobody knows, by name in `Verdict.not_judged`."""
_REASONS: Final[Mapping[NotJudged, str]] = {
    "no_judge": "there is no judge of it",
    "no_tags": "no prompt has the tags that gates.{} needs",
    "off": "gates.{} is off",
}


@dataclass(frozen=True, slots=True)
class Scope:
    """What a verdict covers, in sentences to show beside it."""

    judged: str
    not_judged: str
    """Empty if everything was judged."""
    sense: Sense

    @property
    def text(self) -> str:
        """Both sentences."""
        return f"{self.judged} {self.not_judged}".rstrip()


def scope(verdict: Verdict) -> Scope:
    """Return what `verdict` judged and what not. Every place that shows a verdict shows this beside it."""
    names = [gate.name for gate in verdict.gates]
    forms = dict.fromkeys(_FORMS[name] for name in names if name in _FORMS)
    safety = [_SAFETY[name] for name in names if name in _SAFETY]
    # a gate of sense that nobody could judge is missed, and still says nothing
    sense = [_SENSE] if verdict.sense == "judged" else []
    if safety or sense:
        judged = f"Judged: {', '.join((*forms, *sense, *safety))}."
    elif forms:
        judged = f"Form alone was judged: {', '.join(forms)}."
    else:
        judged = "Nothing was judged: every gate is off."
    unknown = [f"{what} ({_reason(name, verdict)})" for name, what in _UNKNOWN.items() if name in verdict.not_judged]
    return Scope(judged, f"Not judged: {'; '.join(unknown)}." if unknown else "", verdict.sense)


def _reason(name: str, verdict: Verdict) -> str:
    if name == "sense" and verdict.sense_reason:
        return verdict.sense_reason
    return _REASONS[verdict.not_judged[name]].format(name)

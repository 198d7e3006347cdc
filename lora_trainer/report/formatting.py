"""Format numbers, labels and settings for the HTML pages and the comparison table."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from lora_trainer.config import RunConfig, config_table
from lora_trainer.evaluate.depth_metrics import Difference, Share
from lora_trainer.report.html import display_text

SPACE: Final = "\u00a0"
"""Non-breaking space, which keeps a number and its unit on one line."""
MAX_CHARACTERS: Final = 240
"""Pages truncate text by users and models to this length."""
COUNTS: Final = frozenset(("emoji", "characters", "harmful"))
"""Metrics that are counts; all others but `CORRELATIONS` are shares."""
CORRELATIONS: Final = frozenset(("emoji_intensity",))
LABELS: Final[Mapping[str, str]] = {
    "exact_json": "Exact JSON",
    "emotion_in_vocabulary": "Known emotion",
    "stop": "Stops on its own",
    "one_or_two_sentences": "At most two sentences",
    "informal_speech": "Informal speech (반말)",
    "persona": "Recognised as this persona",
    "persona_by_form": "Recognised by its grammar alone",
    "question": "Asks back",
    "fits_message": "Fits its message",
    "emoji_intensity": "Emoji increase with intensity",
    "emotion_appropriateness": "Appropriate emotion",
    "emoji": "Emoji per reply",
    "characters": "Characters per reply",
    "repetition": "Repeats itself",
    "copied_words": "Longest copied run",
    "verbatim_copies": "Verbatim copies",
    "rule_score": "Rule score",
    "sense": "Makes sense",
    "win_rate": "Win rate against the base",
    "question_rate_min": "Asks back often enough",
    "question_rate_max": "Doesn't always ask back",
    "harmful": "Could harm",
    "incomplete": "Incomplete in a crisis",
}
"""Display names of the metrics and gates in `metrics.json`."""
CONVERSATION_LABELS: Final[Mapping[str, str]] = {
    **{name: LABELS[name] for name in ("exact_json", "one_or_two_sentences", "informal_speech", "persona")},
    "recalls": "Recalls what was said",
    "repeats": "Repeats an earlier reply",
}
"""Display names of the shares that a deep evaluation measures in its conversations."""
_REQUIRED: Final = "blood_type"
"""The only setting without a default."""


def percent(share: float, digits: int = 1) -> str:
    """Format a share in [0, 1] as a percentage."""
    return f"{100 * share:.{digits}f}{SPACE}%"


def number_text(name: str, value: float, digits: int = 1) -> str:
    """Format the value of the metric `name`: a share as a percentage, a count or correlation as a plain number."""
    return f"{value:.2f}" if name in COUNTS | CORRELATIONS else percent(value, digits)


def share_text(share: Share) -> str:
    """Format a share of replies; a dash if there are none."""
    return percent(share.value) if share.of else "–"


def points(difference: Difference) -> str:
    """Format a difference of two shares with its bounds, such as `-5 points (-10 to +0)`."""
    lower, upper = difference.lower, difference.upper
    bounds = "" if lower is None or upper is None else f" ({_signed(lower)} to {_signed(upper)})"
    return f"{_signed(difference.value)} points{bounds}"


def _signed(difference: float) -> str:
    number = round(100 * difference)
    return f"{number:+d}" if number else "0"


def value_text(value: object) -> str:
    """Format the value of a setting or a manifest field."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case list() | tuple():
            return ", ".join(map(value_text, value)) or "none"
    return display_text(str(value), MAX_CHARACTERS)


def flattened(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: `{"training": {"seed": 1}}` -> `{"training.seed": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat.update(flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return flat


def duration(seconds: float) -> str:
    """Format seconds, such as `3.1 s`, `4 min 20 s` or `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def settings_table(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row per setting with its default, changed settings first."""
    defaults = flattened(RunConfig(blood_type=config["blood_type"]).model_dump(mode="json"))
    meaning = {name: text for name, _, _, text in config_table()}

    def default_text(name: str) -> str:
        if name == _REQUIRED:
            return "required"
        return value_text(defaults[name]) if name in defaults else "unknown setting"

    rows = [
        {
            "name": name,
            "value": value_text(value),
            "default": default_text(name),
            "differs": name == _REQUIRED or name not in defaults or defaults[name] != value,
            "meaning": meaning.get(name, "").replace("`", ""),
        }
        for name, value in flattened(config).items()
    ]
    return sorted(rows, key=lambda row: not row["differs"])


def timestamp_text(text: str) -> str:
    """Format an ISO 8601 timestamp to the second, with its time zone."""
    moment = datetime.fromisoformat(text)
    return f"{moment:%Y-%m-%d %H:%M:%S} {moment:%Z}".strip()

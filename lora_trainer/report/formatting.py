"""Numbers, labels and settings as the pages show them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from lora_trainer.config import RunConfig, config_table
from lora_trainer.report.html import shown
from lora_trainer.report.run_page import _CORRELATIONS, _COUNTS, MAX_CHARACTERS

SPACE: Final = "\u00a0"
"""Keeps a number and its unit on one line."""
LABELS: Final[Mapping[str, str]] = {
    "exact_json": "Exact JSON",
    "emotion_in_vocabulary": "Known emotion",
    "stop": "Ends by itself",
    "one_or_two_sentences": "At most two sentences",
    "informal_speech": "Informal speech (반말)",
    "persona": "Taken for this persona",
    "question": "Asks back",
    "emoji_intensity": "Emoji rise with intensity",
    "emotion_appropriateness": "Fitting emotion",
    "emoji": "Emoji a reply",
    "characters": "Characters a reply",
    "repetition": "Repeats itself",
    "copied_words": "Longest copied run",
    "verbatim_copies": "Verbatim copies",
    "rule_score": "Rule score",
    "win_rate": "Wins against the base",
    "question_rate_min": "Asks back often enough",
    "question_rate_max": "Doesn't always ask back",
}
"""What people read for the names in `metrics.json`."""


# --- numbers as text -------------------------------------------------------------------------------------------------


def percent(share: float, digits: int = 1) -> str:
    """A share in [0, 1] as people read it."""
    return f"{100 * share:.{digits}f}{SPACE}%"


def number_text(name: str, value: float, digits: int = 1) -> str:
    """The value of the metric `name`: a share as percent, a count or a correlation as it is."""
    return f"{value:.2f}" if name in _COUNTS | _CORRELATIONS else percent(value, digits)


def value_text(value: object) -> str:
    """A setting or a fact as people read it."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case list() | tuple():
            return ", ".join(map(value_text, value)) or "none"
    return shown(str(value), MAX_CHARACTERS)


def flattened(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"training": {"seed": 1}}` -> `{"training.seed": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat.update(flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return flat


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


_REQUIRED: Final[Mapping[str, str]] = {"blood_type": "required"}
"""The one setting without a default."""


def settings_table(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every setting with its default; those that differ first."""
    defaults = flattened(RunConfig(blood_type=config["blood_type"]).model_dump(mode="json"))
    meaning = {name: text for name, _, _, text in config_table()}
    rows = [
        {
            "name": name,
            "value": value_text(value),
            # the one setting without a default
            "default": "required"
            if name == "blood_type"
            else value_text(defaults[name])
            if name in defaults
            else "unknown setting",
            "differs": name in _REQUIRED or name not in defaults or defaults[name] != value,
            "meaning": meaning.get(name, "").replace("`", ""),
        }
        for name, value in flattened(config).items()
    ]
    return sorted(rows, key=lambda row: not row["differs"])


def moment(text: str) -> str:
    moment = datetime.fromisoformat(text)
    return f"{moment:%Y-%m-%d %H:%M:%S} {moment:%Z}".strip()

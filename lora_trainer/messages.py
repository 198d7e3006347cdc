"""Messages that have a translation: an English template, the values for its placeholders, and gettext's catalogues.

A `Message` is its English text, so logs, JSON and comparisons need no care. Whatever shows it to a person translates the template
first and fills in the values then. `tools/catalogue.py` extracts the templates from the source.
"""

from __future__ import annotations

import gettext
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

ENGLISH: Final = "en"
LANGUAGES: Final = (ENGLISH, "ko")
DOMAIN: Final = "lora_trainer"
LOCALE_FOLDER: Final = Path(__file__).parent / "locale"

Say = Callable[[str], str]
"""Returns a text in one language. A `Message` among its values is translated, too; names and numbers stay."""


class Message(str):
    """A text in English that `translated` can translate: `Message("at most {most} characters", most=100)`.

    Without values, the template is the text, and braces in it have no meaning.
    """

    template: str
    values: Mapping[str, Any]

    def __new__(cls, template: str, **values: Any) -> Message:
        """Return the message with its values filled in, in English."""
        message = super().__new__(cls, template.format(**values) if values else template)
        message.template = str(template)
        message.values = values
        return message

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        """Return what pickle makes the message from again: processes that check a file send their problems."""
        return (self.template,), dict(self.values)


def marked(text: str) -> Message:
    """Return `text` as a message. A plain text is its own template: most messages have no values."""
    return text if isinstance(text, Message) else Message(text)


def counted(count: int, one: str, many: str, **values: Any) -> Message:
    """Return the message `one` or `many` with the placeholder `count`."""
    return Message(one if count == 1 else many, count=count, **values)


def joined(parts: Sequence[str], separator: str) -> Message:
    """Return a list as one message, with `separator` (a template of `{first}` and `{rest}`) between its parts."""
    first, *rest = parts
    if rest:
        return Message(separator, first=first, rest=joined(rest, separator))
    # a plain text is a name, which stays in every language
    return first if isinstance(first, Message) else Message("{text}", text=first)


def translated(text: str, language: str) -> str:
    """Return `text` in `language`. What no catalogue holds stays as it is."""
    if language == ENGLISH or not text:
        return str(text)
    if not isinstance(text, Message):
        return _catalogue(language).gettext(text)
    template = _catalogue(language).gettext(text.template) if text.template else ""
    if not text.values:
        return template
    values = {name: translated(value, language) if isinstance(value, Message) else value for name, value in text.values.items()}
    return template.format(**values)


def speaker(language: str) -> Say:
    """Return `translated` for one language."""
    return lambda text: translated(text, language)


def language_of(environment: Mapping[str, str]) -> str:
    """Return the language that the locale's variables ask for: Korean for `ko_KR.UTF-8` and the like, English otherwise."""
    locale = next((found for name in ("LC_ALL", "LC_MESSAGES", "LANG") if (found := environment.get(name))), "")
    return "ko" if locale.lower().split(".")[0].split("_")[0] == "ko" else ENGLISH


@cache
def _catalogue(language: str) -> gettext.NullTranslations:
    return gettext.translation(DOMAIN, LOCALE_FOLDER, [language], fallback=True)

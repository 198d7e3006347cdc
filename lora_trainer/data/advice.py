"""Say how to mend a key or a value of a record: which name, label or number its author meant.

Advice never costs data: a key with another name is renamed or moved, and only a key that means nothing here is left out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Final

from lora_trainer.data.convert_columns import (
    PLACES,
    Column,
    bare_number,
    column_of,
    face_of,
    feeling_of,
    intensity_word,
    percentage,
)
from lora_trainer.data.strict_json import is_quotable, visible_name
from lora_trainer.persona.vocabulary import Expression, Feeling

CONVERT_COLUMNS: Final = "'lora-trainer convert' turns a whole file of such columns into records"
RANGE: Final = "use 0 (barely) to 1 (fully)"

_LEAVES: Final = {place.rsplit(".", 1)[-1]: place for place in PLACES.values() if place != "output.emotion"}

# letters of other alphabets that look like Latin ones
_LOOK_ALIKES: Final = str.maketrans(
    "аеорсухіјѕһԁԛԝԍмнтвкАЕОРСУХІЈЅНМТВКοαεικνρτυχΑΒΕΗΙΚΜΝΟΡΤΥΧıɑ", "aeopcyxijshdqwgmhtbkaeopcyxijshmtbkoaeikvptuxabehikmnoptyxia"
)
_CAMEL: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_MAX_COMPARED_CHARACTERS: Final = 60


def key_advice(parents: Sequence[str], key: str, value: object, siblings: Sequence[str], missing: Sequence[str] = ()) -> str:
    """Return what to do with the unknown `key` of the object at `parents`, where only `siblings` are known.

    The object lacks the keys `missing`, one of which `key` may mean.
    """
    if len(key) > _MAX_COMPARED_CHARACTERS:
        return "check the quotes around it; if it is text of the record, it belongs in a field"
    plain = _folded(key)
    for name in siblings:
        if plain.casefold() == name:
            return f"write it as '{name}'{_difference(key, name)}"
    if place := _place(parents, key, value):
        *above, name = place.split(".")
        if above == list(parents):
            return f"rename it to '{name}'"
        is_flat = not parents and len(above) > 0 and not isinstance(value, Mapping)
        return f"move its value to {place}" + (f"; {CONVERT_COLUMNS}" if is_flat else "")
    if close := get_close_matches(plain.casefold(), siblings, n=1, cutoff=0.7):
        return f"did you mean '{close[0]}'?"
    if column_of(key) is Column.BLOOD_TYPE:
        return "leave it out of this file, whose name says the blood type"
    if missing:
        return f"if it is the {' or the '.join(missing)}, rename it; otherwise leave it out of this file, and keep the source"
    return "leave it out of this file, and keep the source; what the friend should know belongs in context.summary"


def _place(parents: Sequence[str], key: str, value: object) -> str | None:
    """Return the dotted name of the field that `key` means, or None."""
    plain = _folded(key)
    column = column_of(plain) or column_of(plain.rsplit(".", 1)[-1])
    if column is Column.EMOTION:
        is_face = isinstance(value, str) and feeling_of(value) is None and face_of(value) is not None
        column = Column.FACE if is_face or parents[:1] == ["output"] else Column.FEELING
    if isinstance(value, Mapping):
        # an object that belongs elsewhere as a whole
        whole = {Column.FEELING: "context.current_emotion", Column.TEXT: "output", Column.SUMMARY: "context"}
        return whole.get(column) if column else None
    return PLACES.get(column) if column else _LEAVES.get(plain.casefold())


def _folded(key: str) -> str:
    """Return `key` in the shape of the format's names: composed, visible, Latin letters, words joined by underscores."""
    plain = visible_name(unicodedata.normalize("NFKC", key)).translate(_LOOK_ALIKES)
    return re.sub(r"[\s\-]+", "_", _CAMEL.sub("_", plain.strip()))


def _difference(key: str, name: str) -> str:
    """Return in which way `key` differs from `name`, which looks the same."""
    reasons = []
    if visible_name(key) != key:
        reasons.append("a byte-order mark or another invisible character")
    visible = visible_name(key)
    if visible.strip() != visible:
        reasons.append("white space around it")
    if any(sign.isalpha() and not sign.isascii() for sign in visible):
        odd = next(sign for sign in visible if sign.isalpha() and not sign.isascii())
        reasons.append(f"the letter U+{ord(odd):04X}, which only looks like a Latin one")
    if not reasons and visible.casefold() != visible:
        reasons.append("upper case")
    return f", without {' and '.join(reasons)}" if reasons else ""


def label_advice(field: str, value: object, labels: Sequence[str]) -> str:
    """Return which of `labels` the unknown `value` of `field` means."""
    is_feeling = field.endswith("type")
    if not isinstance(value, str) or len(value) > _MAX_COMPARED_CHARACTERS:
        return "choose the closest one"
    meant = feeling_of(_folded(value)) if is_feeling else face_of(_folded(value))
    if meant:
        return f"write '{meant}'"
    plain = _folded(value).casefold()
    other: type[Feeling | Expression] = Expression if is_feeling else Feeling
    if plain in tuple(other):
        what = "a face, which output.emotion takes" if is_feeling else "a feeling, which current_emotion.type takes"
        return f"'{plain}' is {what}; choose the closest one"
    if close := get_close_matches(plain, labels, n=1, cutoff=0.7):
        return f"did you mean '{close[0]}'?"
    return "choose the closest one"


def is_label(value: str) -> bool:
    """Return whether `value` is a known label or looks like one, so that a message may quote it."""
    return (value.isascii() and is_quotable(value)) or feeling_of(value) is not None or face_of(value) is not None


def intensity_advice(value: object) -> str:
    """Return the number from 0 to 1 that `value` probably means."""
    percent = percentage(value)
    if percent is not None and 0 <= percent <= 100:
        return f"write {percent / 100:g}"
    number = bare_number(value)
    if number is not None and isinstance(value, str) and 0 <= number <= 1:
        return f"write {number:g}, without quotes"
    if number is not None and 10 < number <= 100:
        return f"{RANGE}; {number:g} looks like a percentage: write {number / 100:g}"
    if number is not None and 2 <= number <= 10:
        return f"{RANGE}; {number:g} looks like {number:g} of 10: write {number / 10:g}"
    if isinstance(value, str) and (word := intensity_word(value)) is not None:
        return f"write a number, such as {word:g}"
    return f"{RANGE}, as a number" if isinstance(value, str | bool) else RANGE


def type_advice(field: str, value: object) -> str:
    """Return what to write in `field` in place of `value`, which has another type."""
    if field == "context.current_emotion.intensity":
        return intensity_advice(value)
    if value is None:
        return 'write it, or ""' if field == "context.summary" else "write the value"
    if field == "context.current_emotion":
        return 'write {"type": ..., "intensity": ...}'
    if field == "context":
        what = "put this text into its summary" if isinstance(value, str) else "an object, not a list"
        return f'write {{"summary": ..., "current_emotion": ...}}; {what}'
    if field == "output":
        if isinstance(value, str):
            return "it is JSON within JSON within JSON: encode the reply once less"
        return "write the one reply, as an object" if isinstance(value, list) else "write the reply"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "write it in quotes, if it is the text"
    if isinstance(value, list):
        return "join its parts into one text, or write a record for each turn"
    return "write it as text"

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
from lora_trainer.messages import Message, joined
from lora_trainer.persona.vocabulary import Expression, Feeling

CONVERT_COLUMNS: Final = Message("'lora-trainer convert' turns a whole file of such columns into records")
RANGE: Final = Message("use 0 (barely) to 1 (fully)")

_LEAVES: Final = {place.rsplit(".", 1)[-1]: place for place in PLACES.values() if place != "output.emotion"}

# letters of other alphabets that look like Latin ones
_LOOK_ALIKES: Final = str.maketrans(
    "аеорсухіјѕһԁԛԝԍмнтвкАЕОРСУХІЈЅНМТВКοαεικνρτυχΑΒΕΗΙΚΜΝΟΡΤΥΧıɑ", "aeopcyxijshdqwgmhtbkaeopcyxijshmtbkoaeikvptuxabehikmnoptyxia"
)
_CAMEL: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_MAX_COMPARED_CHARACTERS: Final = 60


def key_advice(parents: Sequence[str], key: str, value: object, siblings: Sequence[str], missing: Sequence[str] = ()) -> Message:
    """Return what to do with the unknown `key` of the object at `parents`, where only `siblings` are known.

    The object lacks the keys `missing`, one of which `key` may mean.
    """
    if len(key) > _MAX_COMPARED_CHARACTERS:
        return Message("check the quotes around it; if it is text of the record, it belongs in a field")
    plain = _folded(key)
    for name in siblings:
        if plain.casefold() == name:
            return _respelled(key, name)
    if place := _place(parents, key, value):
        *above, name = place.split(".")
        if above == list(parents):
            return Message("rename it to '{name}'", name=name)
        is_flat = not parents and len(above) > 0 and not isinstance(value, Mapping)
        move = Message("move its value to {place}", place=place)
        return Message("{fix}; {convert}", fix=move, convert=CONVERT_COLUMNS) if is_flat else move
    if close := get_close_matches(plain.casefold(), siblings, n=1, cutoff=0.7):
        return Message("did you mean '{name}'?", name=close[0])
    if column_of(key) is Column.BLOOD_TYPE:
        return Message("leave it out of this file, whose name says the blood type")
    if missing:
        return Message(
            "if it is the {names}, rename it; otherwise leave it out of this file, and keep the source",
            names=joined(missing, "{first} or the {rest}"),
        )
    return Message("leave it out of this file, and keep the source; what the friend should know belongs in context.summary")


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


def _respelled(key: str, name: str) -> Message:
    """Return how to write `key`, which differs from `name` only in a way that is hard to see."""
    reasons: list[str] = []
    if visible_name(key) != key:
        reasons.append(Message("a byte-order mark or another invisible character"))
    visible = visible_name(key)
    if visible.strip() != visible:
        reasons.append(Message("white space around it"))
    if any(sign.isalpha() and not sign.isascii() for sign in visible):
        odd = next(sign for sign in visible if sign.isalpha() and not sign.isascii())
        reasons.append(Message("the letter U+{point:04X}, which only looks like a Latin one", point=ord(odd)))
    if not reasons and visible.casefold() != visible:
        reasons.append(Message("upper case"))
    if not reasons:
        return Message("write it as '{name}'", name=name)
    return Message("write it as '{name}', without {reasons}", name=name, reasons=joined(reasons, "{first} and {rest}"))


def label_advice(field: str, value: object, labels: Sequence[str]) -> Message:
    """Return which of `labels` the unknown `value` of `field` means."""
    if not isinstance(value, str) or len(value) > _MAX_COMPARED_CHARACTERS:
        return Message("choose the closest one")
    if field == "tags":
        close = get_close_matches(_folded(value).casefold(), labels, n=1, cutoff=0.7)
        return Message("did you mean '{name}'?", name=close[0]) if close else Message("leave it out, or choose the closest one")
    is_feeling = field.endswith("type")
    meant = feeling_of(_folded(value)) if is_feeling else face_of(_folded(value))
    if meant:
        return Message("write '{name}'", name=meant)
    plain = _folded(value).casefold()
    other: type[Feeling | Expression] = Expression if is_feeling else Feeling
    if plain in tuple(other):
        if is_feeling:
            return Message("'{name}' is a face, which output.emotion takes; choose the closest one", name=plain)
        return Message("'{name}' is a feeling, which current_emotion.type takes; choose the closest one", name=plain)
    if close := get_close_matches(plain, labels, n=1, cutoff=0.7):
        return Message("did you mean '{name}'?", name=close[0])
    return Message("choose the closest one")


def is_label(value: str) -> bool:
    """Return whether `value` is a known label or looks like one, so that a message may quote it."""
    return (value.isascii() and is_quotable(value)) or feeling_of(value) is not None or face_of(value) is not None


def intensity_advice(value: object) -> Message:
    """Return the number from 0 to 1 that `value` probably means."""
    percent = percentage(value)
    if percent is not None and 0 <= percent <= 100:
        return Message("write {number:g}", number=percent / 100)
    number = bare_number(value)
    if number is not None and isinstance(value, str) and 0 <= number <= 1:
        return Message("write {number:g}, without quotes", number=number)
    if number is not None and 10 < number <= 100:
        return Message(
            "{range}; {number:g} looks like a percentage: write {meant:g}", range=RANGE, number=number, meant=number / 100
        )
    if number is not None and 2 <= number <= 10:
        return Message(
            "{range}; {number:g} looks like {number:g} of 10: write {meant:g}", range=RANGE, number=number, meant=number / 10
        )
    if isinstance(value, str) and (word := intensity_word(value)) is not None:
        return Message("write a number, such as {number:g}", number=word)
    return Message("{range}, as a number", range=RANGE) if isinstance(value, str | bool) else RANGE


def type_advice(field: str, value: object) -> Message:
    """Return what to write in `field` in place of `value`, which has another type."""
    if field == "context.current_emotion.intensity":
        return intensity_advice(value)
    if field == "tags":
        return Message('write a list of names, such as ["everyday"], or leave the key out')
    if value is None:
        return Message('write it, or ""') if field == "context.summary" else Message("write the value")
    if field == "context.current_emotion":
        return Message('write {"type": ..., "intensity": ...}')
    if field == "context":
        if isinstance(value, str):
            return Message('write {"summary": ..., "current_emotion": ...}; put this text into its summary')
        return Message('write {"summary": ..., "current_emotion": ...}; an object, not a list')
    if field == "output":
        if isinstance(value, str):
            return Message("it is JSON within JSON within JSON: encode the reply once less")
        return Message("write the one reply, as an object") if isinstance(value, list) else Message("write the reply")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Message("write it in quotes, if it is the text")
    if isinstance(value, list):
        return Message("join its parts into one text, or write a record for each turn")
    return Message("write it as text")

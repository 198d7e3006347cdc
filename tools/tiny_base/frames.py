"""Load and validate the hand-written Korean lines of the tiny base's corpus, `frames/*.yaml`.

`frames/README.md` explains the files and the notation.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_trainer.persona.vocabulary import Expression, Feeling

FOLDER: Final = Path(__file__).with_name("frames")
PHRASES: Final = "phrases.yaml"

SLOT: Final = re.compile(r"\{(\w+)(?::(\w+))?\}")
"""`{slot}` or `{slot:particle}`."""
CHOICE: Final = re.compile(r"\[([^|\]]*)\|([^|\]]*)\]")
"""`[casual|polite]`."""
_MARK: Final = re.compile(r"[{}\[\]|]")

_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[tuple[_Text, ...], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Exchange(_Part):
    """An input and the reply that fits it best. Every reply of a mood also fits the other inputs of that mood reasonably well."""

    input: _Text
    reply: _Text


_Exchanges = Annotated[tuple[Exchange, ...], Field(min_length=1)]


class Family(_Part):
    """One kind of situation. One draw of the slots fills summary, input and reply together."""

    family: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    slots: Annotated[Mapping[str, _Texts], Field(min_length=1)]
    summaries: _Texts
    good: _Exchanges
    bad: _Exchanges
    plain: _Exchanges
    questions: _Texts

    @model_validator(mode="after")
    def _check_frames(self) -> Self:
        pairs_of = {"good": self.good, "bad": self.bad, "plain": self.plain}
        _raise_all(
            [
                *_frame_problems("summaries", self.summaries, self.slots),
                *_frame_problems("questions", self.questions, self.slots),
                *(
                    problem
                    for mood, pairs in pairs_of.items()
                    for pair in pairs
                    for problem in _frame_problems(mood, (pair.input, pair.reply), self.slots)
                ),
            ]
        )
        return self


class FamilyFile(_Part):
    """One file of families."""

    families: tuple[Family, ...]


class Remarks(_Part):
    """Longer replies, by the mood of the input."""

    good: _Texts
    bad: _Texts
    plain: _Texts


class Moods(_Part):
    """The AI's feelings by the mood of the input, most likely first."""

    good: Annotated[tuple[Feeling, ...], Field(min_length=3)]
    bad: Annotated[tuple[Feeling, ...], Field(min_length=3)]

    @property
    def plain(self) -> tuple[Feeling, ...]:
        """Return every feeling: a plain input suggests none."""
        return tuple(Feeling)


class Faces(_Part):
    """What the AI's face shows for a feeling, by intensity."""

    weak: Annotated[tuple[Expression, ...], Field(min_length=1)]
    strong: Annotated[tuple[Expression, ...], Field(min_length=1)]


class Phrases(_Part):
    """Lines that fit any situation. Comments in `frames/phrases.yaml` explain each list."""

    feelings: Moods
    faces: Mapping[Feeling, Faces]
    face_emoji: Mapping[Expression, _Text]
    openers: Mapping[Feeling, _Texts]
    anything: _Texts
    remarks: Remarks
    echoes: _Texts
    quoted: _Texts
    rambles: _Texts
    english: _Texts
    prefixes: _Texts
    tails: _Texts
    emoji: _Texts
    instructions: _Texts
    casual_requests: _Texts
    polite_requests: _Texts
    emoji_requests: _Texts
    no_emoji_requests: _Texts
    strong: _Texts
    weak: _Texts

    @model_validator(mode="after")
    def _check_frames(self) -> Self:
        shown = {face for faces in self.faces.values() for face in (*faces.weak, *faces.strong)}
        _raise_all(
            [
                *(
                    f"feelings: {feeling} is neither good nor bad"
                    for feeling in Feeling
                    if feeling not in (*self.feelings.good, *self.feelings.bad)
                ),
                *(f"faces: none for the feeling {feeling}" for feeling in Feeling if feeling not in self.faces),
                *(f"faces: no feeling shows {face}" for face in Expression if face not in shown),
                *(f"face_emoji: none for the face {face}" for face in Expression if face not in self.face_emoji),
                *(f"openers: no lines for the feeling {feeling}" for feeling in Feeling if feeling not in self.openers),
                *(problem for feeling, frames in self.openers.items() for problem in _frame_problems(f"openers.{feeling}", frames)),
                *_frame_problems("anything", self.anything),
                *_frame_problems("remarks", (*self.remarks.good, *self.remarks.bad, *self.remarks.plain)),
                *_frame_problems("echoes", self.echoes, ("word",)),
                *_frame_problems("quoted", self.quoted, ("word",)),
                *_frame_problems("rambles", self.rambles, ("noun", "noun2", "odd", "eng", "num")),
            ]
        )
        return self


_Document = TypeVar("_Document", bound=_Part)


def parse(kind: type[_Document], text: str, name: str) -> _Document:
    """Parse the YAML `text` of the file `name` as `kind`. Raise ValueError with one line per problem."""
    try:
        document: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        problems = [(_place(document, problem["loc"]), message) for problem in error.errors() for message in _messages(problem)]
        raise ValueError("\n".join(f"{name}: {place}{message}" for place, message in problems)) from None


def _place(document: Any, location: tuple[int | str, ...]) -> str:
    """Return `location` as a prefix for a message, with the family's name in place of its index."""
    parts = list(location)
    if len(parts) > 1 and parts[0] == "families":
        family = document["families"][parts[1]]
        parts[:2] = [family["family"] if isinstance(family, dict) and "family" in family else f"families.{parts[1]}"]
    return f"{'.'.join(map(str, parts))}: " if parts else ""


def _messages(problem: Any) -> list[str]:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"]).splitlines()
    if problem["type"] in ("missing", "extra_forbidden"):
        return ["missing key" if problem["type"] == "missing" else "unknown key"]
    return [f"{problem['msg']}, got {reprlib.repr(problem['input'])}"]


def _frame_problems(where: str, frames: Iterable[str], slots: Iterable[str] = ()) -> Iterator[str]:
    for frame in frames:
        for found in SLOT.finditer(frame):
            if found[1] not in slots:
                yield f"{where}: {frame!r}: unknown slot {found[0]}, expected one of: {', '.join(slots) or 'none in this list'}"
        if _MARK.search(CHOICE.sub("", SLOT.sub("", frame))):
            yield f"{where}: {frame!r}: stray bracket or bar, expected {{slot}}, {{slot:particle}} or [casual|polite]"


def _raise_all(problems: Iterable[str]) -> None:
    if message := "\n".join(problems):
        raise ValueError(message)


@cache
def families() -> tuple[Family, ...]:
    """Return all families in the order of the file names, then of the files.

    The order is part of the corpus: moving a family changes every record. Raises ValueError if a file is invalid.
    """
    found: list[Family] = []
    problems: list[str] = []
    file_of: dict[str, str] = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        if path.name == PHRASES:
            continue
        try:
            parsed = parse(FamilyFile, path.read_text(encoding="utf-8"), path.name).families
        except ValueError as error:
            problems.append(str(error))
            continue
        for family in parsed:
            if other := file_of.get(family.family):
                problems.append(f"{path.name}: {family.family}: {other} already has a family of this name; rename one")
            file_of[family.family] = path.name
        found += parsed
    _raise_all(problems)
    return tuple(found)


@cache
def phrases() -> Phrases:
    """Return the lines that fit any situation. Raises ValueError if the file is invalid."""
    return parse(Phrases, (FOLDER / PHRASES).read_text(encoding="utf-8"), PHRASES)

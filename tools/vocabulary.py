"""Report what the values of `lora_trainer/persona/vocabulary.py` still lack elsewhere, by file and count.

    python tools/vocabulary.py            print what is missing; exit 1 if anything is
    python tools/vocabulary.py --write    update SDS.md and docs/data.ko.md, which list the values, first

CONTRIBUTING.md says how to add a feeling or an expression.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from difflib import unified_diff
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from tiny_base.frames import Phrases, parse

from lora_trainer.data.convert_columns import face_of, feeling_of
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.problems import Severity
from lora_trainer.data.records import CurrentEmotion, EvaluationPrompt, TrainingRecord
from lora_trainer.errors import ConfigError
from lora_trainer.persona.specs import parse_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling, IntensityThird

ROOT: Final = Path(__file__).resolve().parents[1]
VOCABULARY: Final = "lora_trainer/persona/vocabulary.py"
DEFINITIONS: Final = "lora_trainer/persona/definitions"
PROMPTS: Final = "lora_trainer/data/assets/eval_prompts.jsonl"
TINY_BASE: Final = "tools/tiny_base/frames/phrases.yaml"
GUIDE: Final = "docs/data.ko.md"
DOCUMENTS: Final = ("SDS.md", GUIDE)

MIN_RECORDS: Final = 12
"""Records of each feeling in each third of intensity, in each persona's file."""
MIN_EXPRESSION_RECORDS: Final = 20
"""Records of each expression in all files together. A persona may avoid one: A never winks."""
MIN_PROMPTS: Final = 2
"""Evaluation prompts of each feeling in each third of intensity."""
SHOWN_PROBLEMS: Final = 3
"""Problems shown of each file."""

_Record = TypeVar("_Record", TrainingRecord, EvaluationPrompt)


class Missing(NamedTuple):
    """What is missing or wrong in one file: how many, the list of them, and what they are."""

    file: str
    number: int
    what: str
    unit: str = "value"
    state: str = "missing"

    def __str__(self) -> str:
        unit = self.unit if self.number == 1 else f"{self.unit}s"
        return f"{self.file}: {self.number} {unit} {self.state}: {self.what}"


def main() -> int:
    """Print what is missing and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="update SDS.md and docs/data.ko.md")
    if parser.parse_args().write:
        for name in DOCUMENTS:
            document = ROOT / name
            document.write_text(with_values(document.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
    found = list(missing())
    for one in found:
        print(one)
    if found:
        print(
            "CONTRIBUTING.md, 'Add a feeling or an expression', says how to add it. Files in data/ are built: "
            "write replies in data/handwritten/*.yaml, then run python tools/bundled_data.py"
        )
        return 1
    print(f"{len(Feeling)} feelings and {len(Expression)} expressions: nothing is missing")
    return 0


def missing() -> Iterator[Missing]:
    """Yield what is missing, in the order of CONTRIBUTING.md's steps."""
    yield from _values()
    yield from _labels()
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        if text != (expected := with_values(text)):
            signs = Counter(line[:2] for line in unified_diff(text.splitlines(), expected.splitlines(), n=0))
            yield Missing(name, max(signs["+|"], signs["-|"]), "run python tools/vocabulary.py --write", "row", state="wrong")
    for blood_type in BloodType:
        yield from _definition(f"{DEFINITIONS}/{blood_type}.yaml")
    prompts, wrong = _read(PROMPTS, EvaluationPrompt)
    yield from wrong
    yield from _cells(PROMPTS, (prompt.context.current_emotion for prompt in prompts), MIN_PROMPTS, "prompt")
    expressions: Counter[Expression] = Counter()
    for blood_type in BloodType:
        name = f"data/train_data_type_{blood_type}.jsonl"
        records, wrong = _read(name, TrainingRecord)
        yield from wrong
        yield from _cells(name, (record.context.current_emotion for record in records), MIN_RECORDS, "record")
        expressions.update(record.reply.emotion for record in records)
    lacking = {f"the face {face}": MIN_EXPRESSION_RECORDS - expressions[face] for face in Expression}
    yield from _short("data/train_data_type_*.jsonl", lacking, "record")
    yield from _tiny_base()


def with_values(document: str) -> str:
    """Return SDS.md with the tables of both vocabularies replaced, or docs/data.ko.md with its list of feelings."""
    for marker, vocabulary in (("feelings", Feeling), ("expressions", Expression)):
        rows = ["| Value | 뜻 |", "|---|---|", *(f"| `{word}` | {word.gloss} |" for word in vocabulary)]
        document = _replaced(document, f"{marker}:begin -->\n", "".join(f"{row}\n" for row in rows), f"{marker}:end")
    return _replaced(document, "glosses:begin -->", ", ".join(f"{word.gloss}(`{word}`)" for word in Feeling), "glosses:end")


def _replaced(document: str, begin: str, text: str, end: str) -> str:
    return re.sub(f"(<!-- {begin}).*?(<!-- {end} -->)", lambda found: found[1] + text + found[2], document, flags=re.DOTALL)


def _values() -> Iterator[Missing]:
    for vocabulary in (Feeling, Expression):
        names = vocabulary.__members__.items()
        if repeated := [f"{name} repeats {member.name}'s {str(member)!r}" for name, member in names if name != member.name]:
            yield Missing(VOCABULARY, len(repeated), ", ".join(repeated), state="wrong")
        if odd := [repr(str(word)) for word in vocabulary if not re.fullmatch("[a-z]+", word)]:
            yield Missing(VOCABULARY, len(odd), f"{', '.join(odd)}; expected one English word in lower case", state="wrong")
        if bare := [str(word) for word in vocabulary if not word.gloss]:
            yield Missing(VOCABULARY, len(bare), ", ".join(bare), "Korean word")


def _labels() -> Iterator[Missing]:
    """Yield the labels that mean two values, of which `convert` would know only the last."""
    for vocabulary, meaning in ((Feeling, feeling_of), (Expression, face_of)):
        labels = [(word, label) for word in vocabulary for label in (str(word), word.gloss, *word.aliases) if label]
        if taken := [f"{label} means {word} and {meaning(label)}" for word, label in labels if meaning(label) is not word]:
            yield Missing(VOCABULARY, len(taken), ", ".join(taken), "label", state="wrong")


def _definition(name: str) -> Iterator[Missing]:
    try:
        parse_spec((ROOT / name).read_text(encoding="utf-8"), name)
    except ConfigError as error:
        lines = [problem.removeprefix(f"{name}: ").replace(": missing ", ": ") for problem in error.problems]
        state = "missing" if all(": missing " in problem for problem in error.problems) else "wrong"
        yield Missing(name, len(lines), "; ".join(lines), state=state)


def _read(name: str, schema: type[_Record]) -> tuple[list[_Record], list[Missing]]:
    """Return the records of a file, and the lines that are none."""
    lines = list(JsonlReader(ROOT / name, schema))
    errors = [problem for line in lines for problem in line.problems if problem.severity is Severity.ERROR]
    problems = [error.render(name).removeprefix(name).lstrip(": ") for error in errors]
    shown = [*problems[:SHOWN_PROBLEMS], "..."] if len(problems) > SHOWN_PROBLEMS else problems
    wrong = [Missing(name, len(problems), "; ".join(shown), "line", state="wrong")] if problems else []
    return [line.record for line in lines if line.record], wrong


def _cells(name: str, emotions: Iterable[CurrentEmotion], minimum: int, unit: str) -> Iterator[Missing]:
    have = Counter((emotion.type, IntensityThird.of(emotion.intensity)) for emotion in emotions)
    cells = [(feeling, third) for feeling in Feeling for third in IntensityThird]
    yield from _short(name, {f"{feeling} {third}": minimum - have[feeling, third] for feeling, third in cells}, unit)


def _short(name: str, lacking: Mapping[str, int], unit: str) -> Iterator[Missing]:
    if short := {what: count for what, count in lacking.items() if count > 0}:
        yield Missing(name, sum(short.values()), ", ".join(f"{what} {count}" for what, count in short.items()), unit)


def _tiny_base() -> Iterator[Missing]:
    try:
        parse(Phrases, (ROOT / TINY_BASE).read_text(encoding="utf-8"), TINY_BASE)
    except ValueError as error:
        lines = [line.removeprefix(f"{TINY_BASE}: ") for line in str(error).splitlines()]
        yield Missing(TINY_BASE, len(lines), "; ".join(lines), state="missing or wrong")


if __name__ == "__main__":
    sys.exit(main())

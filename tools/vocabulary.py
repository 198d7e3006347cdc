"""Report what the values of `lora_trainer/persona/vocabulary.py` still lack elsewhere, by file and count.

    python tools/vocabulary.py            print what is missing; exit 1 if anything is
    python tools/vocabulary.py --write    update the tables of SDS.md first

CONTRIBUTING.md says how to add a feeling or an expression.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from difflib import unified_diff
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from lora_trainer.data.convert_columns import face_of, feeling_of
from lora_trainer.errors import ConfigError
from lora_trainer.persona.specs import parse_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling, IntensityThird

ROOT: Final = Path(__file__).resolve().parents[1]
VOCABULARY: Final = "lora_trainer/persona/vocabulary.py"
DEFINITIONS: Final = "lora_trainer/persona/definitions"
PROMPTS: Final = "lora_trainer/data/assets/eval_prompts.jsonl"
TINY_BASE: Final = "tools/tiny_base/frames/phrases.yaml"

MIN_RECORDS: Final = 12
"""Records of each feeling in each third of intensity, in each persona's file."""
MIN_EXPRESSION_RECORDS: Final = 20
"""Records of each expression in all files together. A persona may avoid one: A never winks."""
MIN_PROMPTS: Final = 2
"""Evaluation prompts of each feeling in each third of intensity."""


class Missing(NamedTuple):
    """What is missing in one file: how many, the list of them, and what they are."""

    file: str
    number: int
    what: str
    unit: str = "entries"


def main() -> int:
    """Print what is missing and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="update the tables of SDS.md")
    document = ROOT / "SDS.md"
    if parser.parse_args().write:
        document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
    found = list(missing())
    for one in found:
        print(f"{one.file}: {one.number} {one.unit} missing: {one.what}")
    if found:
        print("CONTRIBUTING.md, 'Add a feeling or an expression', says how to add it")
        return 1
    print(f"{len(Feeling)} feelings and {len(Expression)} expressions: nothing is missing")
    return 0


def missing() -> Iterator[Missing]:
    """Yield what is missing, in the order of CONTRIBUTING.md's steps."""
    yield from _labels()
    text = (ROOT / "SDS.md").read_text(encoding="utf-8")
    if text != (expected := with_tables(text)):
        lines = [line for line in unified_diff(text.splitlines(), expected.splitlines(), n=0) if re.match(r"[-+]\|", line)]
        yield Missing("SDS.md", len(lines), "the tables differ from the vocabularies (python tools/vocabulary.py --write)", "rows")
    for blood_type in BloodType:
        yield from _definition(f"{DEFINITIONS}/{blood_type}.yaml")
    yield from _cells(PROMPTS, _lines(PROMPTS), MIN_PROMPTS, "prompts")
    expressions: Counter[str] = Counter()
    for blood_type in BloodType:
        name = f"data/train_data_type_{blood_type}.jsonl"
        records = _lines(name)
        yield from _cells(name, records, MIN_RECORDS, "records")
        expressions.update(json.loads(record["output"])["emotion"] for record in records)
    lacking = {f"the face {face}": MIN_EXPRESSION_RECORDS - expressions[face] for face in Expression}
    yield from _short("data/train_data_type_*.jsonl", lacking, "records")
    yield from _tiny_base()


def with_tables(document: str) -> str:
    """Return SDS.md with the tables of both vocabularies replaced."""
    for marker, vocabulary in (("feelings", Feeling), ("expressions", Expression)):
        begin, end = f"<!-- {marker}:begin -->\n", f"<!-- {marker}:end -->"
        head, rest = document.split(begin)
        table = "\n".join(["| Value | 뜻 |", "|---|---|", *_rows(vocabulary)])
        document = f"{head}{begin}{table}\n{end}{rest.split(end)[1]}"
    return document


def _rows(vocabulary: type[Feeling | Expression]) -> list[str]:
    return [f"| `{word}` | {word.gloss} |" for word in vocabulary]


def _labels() -> Iterator[Missing]:
    """Yield the labels that mean two values, of which `convert` would know only the last."""
    for vocabulary, meaning in ((Feeling, feeling_of), (Expression, face_of)):
        for word in vocabulary:
            if taken := [label for label in (str(word), word.gloss, *word.aliases) if meaning(label) is not word]:
                yield Missing(VOCABULARY, len(taken), f"{word}: another value has {', '.join(taken)}", "unique labels")


def _definition(name: str) -> Iterator[Missing]:
    try:
        parse_spec((ROOT / name).read_text(encoding="utf-8"), name)
    except ConfigError as error:
        lines = [problem.removeprefix(f"{name}: ").replace(": missing ", ": ") for problem in error.problems]
        yield Missing(name, len(lines), "; ".join(lines))


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]


def _cells(name: str, records: Iterable[Mapping[str, Any]], minimum: int, unit: str) -> Iterator[Missing]:
    emotions = [record["context"]["current_emotion"] for record in records]
    have = Counter((emotion["type"], IntensityThird.of(emotion["intensity"])) for emotion in emotions)
    cells = [(str(feeling), third) for feeling in Feeling for third in IntensityThird]
    yield from _short(name, {f"{feeling} {third}": minimum - have[feeling, third] for feeling, third in cells}, unit)


def _short(name: str, lacking: Mapping[str, int], unit: str) -> Iterator[Missing]:
    if short := {what: count for what, count in lacking.items() if count > 0}:
        yield Missing(name, sum(short.values()), ", ".join(f"{what} {count}" for what, count in short.items()), unit)


def _tiny_base() -> Iterator[Missing]:
    lines = yaml.safe_load((ROOT / TINY_BASE).read_text(encoding="utf-8"))
    moods = set(chain.from_iterable(lines["feelings"].values()))
    lacking = [f"feelings: {word} (good or bad)" for word in Feeling if word not in moods]
    for key, vocabulary in (("faces", Feeling), ("face_emoji", Expression), ("openers", Feeling)):
        lacking += [f"{key}: {word}" for word in vocabulary if word not in lines[key]]
    shown = set(chain.from_iterable(faces for by_strength in lines["faces"].values() for faces in by_strength.values()))
    lacking += [f"faces: no feeling shows {word}" for word in Expression if word not in shown]
    if lacking:
        yield Missing(TINY_BASE, len(lacking), "; ".join(lacking))


if __name__ == "__main__":
    sys.exit(main())

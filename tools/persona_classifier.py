"""Train the two persona classifiers and measure how well they tell the four personas apart.

The first is trained on the bundled data, the second on the hand-written sense examples; both are measured on the same replies.

python tools/persona_classifier.py            train, and write both files to lora_trainer/evaluate/assets
python tools/persona_classifier.py --check    measure the shipped files; exit 1 if data/README.md has other numbers
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.records import TrainingRecord
from lora_trainer.evaluate.persona_by_form import FormClassifier
from lora_trainer.evaluate.persona_classifier import PersonaClassifier, accuracy, confusion, is_held_out
from lora_trainer.persona.vocabulary import BloodType

REPOSITORY: Final = Path(__file__).resolve().parents[1]


ASSETS: Final = REPOSITORY / "lora_trainer" / "evaluate" / "assets"
ARTEFACT: Final = ASSETS / "persona_classifier.npz"
FORM_ARTEFACT: Final = ASSETS / "persona_by_form.npz"

Matrix = Mapping[BloodType, Mapping[BloodType, int]]


def replies(*, held_out: bool) -> tuple[list[TrainingRecord], list[BloodType]]:
    """Return the bundled records of one side of the split and the persona of each."""
    records, personas = [], []
    for blood_type in BloodType:
        for line in JsonlReader(REPOSITORY / "data" / f"train_data_type_{blood_type}.jsonl"):
            if line.record and is_held_out(line.record) == held_out:
                records.append(line.record)
                personas.append(blood_type)
    return records, personas


def train() -> PersonaClassifier:
    """Train a classifier on the replies that are not held out."""
    records, personas = replies(held_out=False)
    return PersonaClassifier.train([record.reply.text for record in records], personas)


def examples() -> tuple[list[str], list[BloodType]]:
    """Return the hand-written sense examples that are fluent, whether or not they answer what was said, and their personas."""
    texts, personas = [], []
    for line in (ASSETS / "sense_examples.jsonl").read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        if example["written_by"] == "hand" and example["kind"] in ("good", "misses"):
            texts.append(example["reply"])
            personas.append(BloodType(example["persona"]))
    return texts, personas


def train_by_form() -> FormClassifier:
    """Train the second classifier on the sense examples."""
    return FormClassifier.train(*examples())


def measure(classifier: PersonaClassifier) -> Matrix:
    """Return the confusion matrix of the held-out replies."""
    records, personas = replies(held_out=True)
    return confusion(personas, classifier.predict(record.reply.text for record in records))


def table(matrix: Matrix) -> str:
    """Return the matrix as a Markdown table."""
    lines = ["| persona | classified as A | B | O | AB | recognized |", "|---|---|---|---|---|---|"]
    for name, row in matrix.items():
        share = row[name] / max(1, sum(row.values()))
        lines.append(f"| {name} | " + " | ".join(str(row[other]) for other in BloodType) + f" | {share:.1%} |")
    return "\n".join(lines)


def section(found: Matrix) -> str:
    """Return the section of `data/README.md` with the measurement."""
    count = sum(sum(row.values()) for row in found.values())
    return f"{table(found)}\n\n{accuracy(found):.1%} of {count:,} replies are recognized.\n"


def main() -> int:
    """Train and write the classifiers unless checking, then measure them. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure only, write nothing")
    is_check = parser.parse_args().check
    if not is_check:
        for path, trained in ((ARTEFACT, train()), (FORM_ARTEFACT, train_by_form())):
            trained.save(path)
            print(f"written: {path.relative_to(REPOSITORY)}, {path.stat().st_size / 1024:.0f} KiB")
    from bundled_data import with_section

    page = REPOSITORY / "data" / "README.md"
    document = page.read_text(encoding="utf-8")
    updated = document
    for name, shipped in (
        ("confusion", PersonaClassifier.load(ARTEFACT)),
        ("confusion-by-form", FormClassifier.load(FORM_ARTEFACT)),
    ):
        text = section(measure(shipped))
        print(text)
        updated = with_section(updated, name, text)
    if is_check:
        if document != updated:
            print("data/README.md: a confusion matrix is out of date; run python tools/persona_classifier.py")
        return int(document != updated)
    page.write_text(updated, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train the persona classifier on the bundled data and measure how well it tells the four personas apart.

python tools/persona_classifier.py            train, and write lora_trainer/evaluate/assets/persona_classifier.npz
python tools/persona_classifier.py --check    measure the shipped file; exit 1 if data/README.md has other numbers
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.records import TrainingRecord
from lora_trainer.evaluate.persona_classifier import PersonaClassifier, accuracy, confusion, is_held_out
from lora_trainer.persona.vocabulary import BloodType

REPOSITORY: Final = Path(__file__).resolve().parents[1]


ARTEFACT: Final = REPOSITORY / "lora_trainer" / "evaluate" / "assets" / "persona_classifier.npz"

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
    """Train and write the classifier unless checking, then measure it. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure only, write nothing")
    if not parser.parse_args().check:
        train().save(ARTEFACT)
        print(f"written: {ARTEFACT.relative_to(REPOSITORY)}, {ARTEFACT.stat().st_size / 1024:.0f} KiB")
    from bundled_data import with_section

    text = section(measure(PersonaClassifier.load(ARTEFACT)))
    print(text)
    page = REPOSITORY / "data" / "README.md"
    document = page.read_text(encoding="utf-8")
    updated = with_section(document, "confusion", text)
    if parser.parse_args().check:
        if document != updated:
            print("data/README.md: the confusion matrix is out of date; run python tools/persona_classifier.py")
        return int(document != updated)
    page.write_text(updated, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

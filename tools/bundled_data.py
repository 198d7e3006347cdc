"""Build `data/train_data_type_*.jsonl` from hand-written and composed records.

    python tools/bundled_data.py            write the files
    python tools/bundled_data.py --check    exit 1 if a file differs from what would be written

Hand-written records come first, in the order of `data/handwritten/*.yaml`. The composed records after them fill every
feeling and third of intensity up to the same number, without repeating hand-written ones.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Annotated, Final

import yaml
from pydantic import BaseModel, ConfigDict, Field

from lora_trainer.evaluation_prompts import evaluation_prompts
from lora_trainer.generator.compose import compose
from lora_trainer.generator.intake import Intake, all_cells
from lora_trainer.generator.summary import summarise
from lora_trainer.generator.teacher import families
from lora_trainer.personas import BloodType, Expression, Feeling, IntensityThird, persona_spec
from lora_trainer.records import TrainingRecord

REPOSITORY: Final = Path(__file__).resolve().parents[1]


DATA: Final = REPOSITORY / "data"
RECORDS_IN_A_CELL: Final = 36
"""Records of each feeling and third of intensity: 1,080 in a file."""
SEED: Final = 20


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HandwrittenReply(_Part):
    """One persona's answer."""

    feeling: Feeling
    intensity: Annotated[float, Field(ge=0, le=1)]
    emotion: Expression
    text: str


class Situation(_Part):
    """What the user said, with the answers of some or all personas."""

    summary: str
    input: str
    replies: Annotated[Mapping[BloodType, HandwrittenReply], Field(min_length=1)]


class Family(_Part):
    """Situations of one kind."""

    family: str
    title: str
    situations: tuple[Situation, ...]


class HandwrittenFile(_Part):
    """One file of `data/handwritten/`."""

    families: tuple[Family, ...]


def handwritten_families() -> list[Family]:
    """Return all hand-written families, file by file."""
    found = []
    for path in sorted((DATA / "handwritten").glob("*.yaml")):
        found += HandwrittenFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).families
    if unknown := {family.family for family in found} - set(families()):
        raise ValueError(f"families that families.yaml does not list: {', '.join(sorted(unknown))}")
    return found


def handwritten_records(blood_type: BloodType) -> list[TrainingRecord]:
    """Return one persona's hand-written records, in order."""
    return [
        TrainingRecord.model_validate(
            {
                "instruction": persona_spec(blood_type).instruction,
                "context": {
                    "summary": situation.summary,
                    "current_emotion": {"type": reply.feeling, "intensity": reply.intensity},
                },
                "input": situation.input,
                "output": {"text": reply.text, "emotion": reply.emotion},
            }
        )
        for family in handwritten_families()
        for situation in family.situations
        if (reply := situation.replies.get(blood_type))
    ]


def build(blood_type: BloodType) -> list[TrainingRecord]:
    """Return all records of one persona: hand-written, then composed."""
    by_hand = handwritten_records(blood_type)
    have = Counter((r.context.current_emotion.type, IntensityThird.of(r.context.current_emotion.intensity)) for r in by_hand)
    wanted = [cell for cell in all_cells() for _ in range(RECORDS_IN_A_CELL - have[cell])]
    intake = Intake(blood_type)
    intake.hold_out(prompt.input for prompt in evaluation_prompts())
    intake.hold_against(by_hand)
    compose(intake, wanted, SEED)
    if len(intake.taken) < len(wanted):
        raise ValueError(f"{blood_type}: the grammar gave {len(intake.taken)} of {len(wanted)} records")
    return [*by_hand, *intake.taken]


def coverage(records: Mapping[BloodType, list[TrainingRecord]]) -> str:
    """Return the coverage of the files as two Markdown tables."""
    summaries = {name: summarise(name, found) for name, found in records.items()}
    by_hand = {name: len(handwritten_records(name)) for name in records}
    lines = ["| | " + " | ".join(records) + " |", "|---|" + "---|" * len(records)]

    def row(name: str, value: Callable[[BloodType], str]) -> None:
        lines.append(f"| {name} | " + " | ".join(value(persona) for persona in records) + " |")

    row("records", lambda p: f"{summaries[p].records:,}")
    row("by hand, composed", lambda p: f"{by_hand[p]:,}, {summaries[p].records - by_hand[p]:,}")
    row("replies that ask back", lambda p: f"{summaries[p].question_rate:.0%}")
    row(
        "emoji per reply at low, middle, high intensity",
        lambda p: ", ".join(f"{summaries[p].emoji_by_third[t]:.2f}" for t in IntensityThird),
    )
    row("characters per reply, mean", lambda p: f"{mean(summaries[p].reply_characters):.0f}")
    row("unique replies", lambda p: f"{summaries[p].unique_replies / summaries[p].records:.1%}")
    row("near-duplicates (character 5-grams, Jaccard ≥ 0.7)", lambda p: f"{summaries[p].near_duplicate_rate:.2%}")
    lines += ["", "Records by feeling, at low / middle / high intensity:", ""]
    lines += ["| feeling | " + " | ".join(records) + " |", "|---|" + "---|" * len(records)]
    for feeling in Feeling:
        cells = {p: " / ".join(str(summaries[p].cells.get((feeling, third), 0)) for third in IntensityThird) for p in records}
        row(f"`{feeling}`", cells.__getitem__)
    return "\n".join(lines) + "\n"


def with_section(document: str, marker: str, text: str) -> str:
    """Return `document` with `text` between `<!-- marker:begin -->` and `<!-- marker:end -->`."""
    begin, end = f"<!-- {marker}:begin -->\n", f"<!-- {marker}:end -->"
    head, rest = document.split(begin)
    return head + begin + text + end + rest.split(end)[1]


def main() -> int:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs")
    check = parser.parse_args().check
    differ = 0
    prompts = (REPOSITORY / "lora_trainer/assets/eval_prompts.jsonl").read_text(encoding="utf-8")
    files = {DATA / "eval_prompts.jsonl": prompts}
    records = {blood_type: build(blood_type) for blood_type in BloodType}
    for blood_type, found in records.items():
        files[DATA / f"train_data_type_{blood_type}.jsonl"] = "".join(record.to_json() + "\n" for record in found)
    page = DATA / "README.md"
    files[page] = with_section(page.read_text(encoding="utf-8"), "coverage", coverage(records))
    for path, text in files.items():
        is_same = path.exists() and path.read_text(encoding="utf-8") == text
        differ += not is_same
        if not check and not is_same:
            path.write_text(text, encoding="utf-8", newline="\n")
        state = "as it should be" if is_same else "differs" if check else "written"
        print(f"{path.relative_to(REPOSITORY)}: {text.count(chr(10)):,} lines, {state}")
    return 1 if check and differ else 0


if __name__ == "__main__":
    sys.exit(main())

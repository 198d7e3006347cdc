"""Build `data/train_data_type_*.jsonl` from what was written by hand and what the grammar composes.

    python tools/bundled_data.py            write the files
    python tools/bundled_data.py --check    say whether the files are what would be written; exit 1 when they are not

Hand-written records come first, in the order of `data/handwritten/*.yaml`. The composed ones behind them fill every
feeling and third of intensity up to the same number, and repeat nothing that was written by hand.
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

from lora_trainer.data.evaluation_prompts import evaluation_prompts
from lora_trainer.data.records import TrainingRecord
from lora_trainer.generator.collector import RecordCollector, all_cells
from lora_trainer.generator.compose import compose
from lora_trainer.generator.dataset_summary import summarise
from lora_trainer.generator.teacher import families
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling, IntensityThird

REPOSITORY: Final = Path(__file__).resolve().parents[1]


DATA: Final = REPOSITORY / "data"
RECORDS_IN_A_CELL: Final = 36
"""Records of each feeling and third of intensity: 1,080 in a file."""
SEED: Final = 20


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HandwrittenReply(_Part):
    """How one friend answers."""

    feeling: Feeling
    intensity: Annotated[float, Field(ge=0, le=1)]
    emotion: Expression
    text: str


class Situation(_Part):
    """What was said, and the answers; all four, or only those that it was written for."""

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
    """All that was written by hand, file by file."""
    found = []
    for path in sorted((DATA / "handwritten").glob("*.yaml")):
        found += HandwrittenFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).families
    if unknown := {family.family for family in found} - set(families()):
        raise ValueError(f"families that families.yaml does not list: {', '.join(sorted(unknown))}")
    return found


def handwritten_records(blood_type: BloodType) -> list[TrainingRecord]:
    """One persona's hand-written records, in order."""
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
    """All records of one persona: by hand, then composed."""
    by_hand = handwritten_records(blood_type)
    have = Counter((r.context.current_emotion.type, IntensityThird.of(r.context.current_emotion.intensity)) for r in by_hand)
    wanted = [cell for cell in all_cells() for _ in range(RECORDS_IN_A_CELL - have[cell])]
    collector = RecordCollector(blood_type)
    collector.exclude_inputs(prompt.input for prompt in evaluation_prompts())
    collector.exclude_similar(by_hand)
    compose(collector, wanted, SEED)
    if len(collector.accepted) < len(wanted):
        raise ValueError(f"{blood_type}: the grammar gave {len(collector.accepted)} of {len(wanted)} records")
    return [*by_hand, *collector.accepted]


def coverage(records: Mapping[BloodType, list[TrainingRecord]]) -> str:
    """What the files hold, as two Markdown tables."""
    summaries = {name: summarise(name, found) for name, found in records.items()}
    by_hand = {name: len(handwritten_records(name)) for name in records}
    lines = ["| | " + " | ".join(records) + " |", "|---|" + "---|" * len(records)]

    def row(name: str, value: Callable[[BloodType], str]) -> None:
        lines.append(f"| {name} | " + " | ".join(value(persona) for persona in records) + " |")

    row("records", lambda p: f"{summaries[p].records:,}")
    row("by hand, composed", lambda p: f"{by_hand[p]:,}, {summaries[p].records - by_hand[p]:,}")
    row("replies that ask something back", lambda p: f"{summaries[p].question_rate:.0%}")
    row(
        "emoji a reply at low, middle, high intensity",
        lambda p: ", ".join(f"{summaries[p].emoji_by_third[t]:.2f}" for t in IntensityThird),
    )
    row("characters in a reply, mean", lambda p: f"{mean(summaries[p].reply_characters):.0f}")
    row("unique replies", lambda p: f"{summaries[p].unique_replies / summaries[p].records:.1%}")
    row("near-duplicates (character 5-grams, Jaccard ≥ 0.7)", lambda p: f"{summaries[p].near_duplicate_rate:.2%}")
    lines += ["", "Records by feeling, at low / middle / high intensity:", ""]
    lines += ["| feeling | " + " | ".join(records) + " |", "|---|" + "---|" * len(records)]
    for feeling in Feeling:
        cells = {p: " / ".join(str(summaries[p].cells.get((feeling, third), 0)) for third in IntensityThird) for p in records}
        row(f"`{feeling}`", cells.__getitem__)
    return "\n".join(lines) + "\n"


def with_section(document: str, marker: str, text: str) -> str:
    """`document` with `text` between `<!-- marker:begin -->` and `<!-- marker:end -->`."""
    begin, end = f"<!-- {marker}:begin -->\n", f"<!-- {marker}:end -->"
    head, rest = document.split(begin)
    return head + begin + text + end + rest.split(end)[1]


def main() -> int:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and exit with 1 where a file differs")
    check = parser.parse_args().check
    differ = 0
    prompts = (REPOSITORY / "lora_trainer/data/assets/eval_prompts.jsonl").read_text(encoding="utf-8")
    files = {DATA / "eval_prompts.jsonl": prompts}
    records = {blood_type: build(blood_type) for blood_type in BloodType}
    for blood_type, found in records.items():
        files[DATA / f"train_data_type_{blood_type}.jsonl"] = "".join(record.to_json() + "\n" for record in found)
    tables = coverage(records)
    for name in ("README.md", "README.ko.md", "data/README.md"):
        page = REPOSITORY / name
        files[page] = with_section(page.read_text(encoding="utf-8"), "coverage", tables)
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

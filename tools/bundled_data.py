"""Build `data/train_data_type_*.jsonl` from the hand-written situations of `data/handwritten/*.yaml`, in their order.

Also writes what data and package share: the evaluation prompts, the policy, and the exemplars that the teacher's prompt shows.

python tools/bundled_data.py            write the files
python tools/bundled_data.py --check    compare the files with the sources; exit 1 if one is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Annotated, Final

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lora_trainer.data.records import TrainingRecord
from lora_trainer.generator.dataset_summary import summarise
from lora_trainer.generator.teacher_orders import families, family_rules
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling, IntensityThird

REPOSITORY: Final = Path(__file__).resolve().parents[1]
DATA: Final = REPOSITORY / "data"
EXEMPLARS_PER_FAMILY: Final = 3
"""How many situations of a family the teacher's prompt chooses from."""


class _Part(BaseModel):
    # YAML reads `퍼센트: [37, 64]` as numbers
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class HandwrittenReply(_Part):
    """One persona's reply."""

    feeling: Feeling
    intensity: Annotated[float, Field(ge=0, le=1)]
    emotion: Expression
    text: str


def _as_tuple(replies: object) -> object:
    return tuple(replies) if isinstance(replies, list) else (replies,)


Replies = Annotated[tuple[HandwrittenReply, ...], BeforeValidator(_as_tuple), Field(min_length=1, max_length=3)]
"""One persona's replies to one input: a single one, or a list of two or three that differ in feeling or intensity."""


class Situation(_Part):
    """An input, and the replies of all four personas or of some of them."""

    summary: str
    input: str
    tags: tuple[str, ...] = ()
    """Hard topics that the input belongs to. data/POLICY.md lists them."""
    replies: Annotated[Mapping[BloodType, Replies], Field(min_length=1)]
    slots: Mapping[str, tuple[str, ...]] = {}
    """Words of the texts, and what may stand in their place."""


class Family(_Part):
    """Situations about one topic."""

    family: str
    title: str
    situations: tuple[Situation, ...]


class HandwrittenFile(_Part):
    """One file of `data/handwritten/`."""

    families: tuple[Family, ...]


@cache  # parsing the YAML takes half a second
def handwritten_families() -> tuple[Family, ...]:
    """Return all hand-written families in the order of the files. Raises ValueError if families.yaml doesn't list one of them."""
    found: list[Family] = []
    for path in sorted((DATA / "handwritten").glob("*.yaml")):
        found += HandwrittenFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).families
    if unknown := {family.family for family in found} - set(families()):
        raise ValueError(
            f"data/handwritten: families missing from families.yaml: {', '.join(sorted(unknown))}; add them there or rename them"
        )
    return tuple(found)


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
        for reply in situation.replies.get(blood_type, ())
    ]


def exemplar_lines() -> Iterator[str]:
    """Yield some situations of each family that all personas answer, as lines of JSON."""
    for name in families():
        topics = family_rules(name).topics
        found = [
            situation
            for family in handwritten_families()
            for situation in family.situations
            if family.family == name and len(situation.replies) == len(BloodType)
        ]
        # those about the family's topics come first, then those with most replies
        found.sort(key=lambda one: (set(topics).isdisjoint(one.tags), -sum(map(len, one.replies.values()))))
        for situation in found[:EXEMPLARS_PER_FAMILY]:
            content = {"family": name, **situation.model_dump(mode="json", include={"summary", "input", "replies"})}
            yield json.dumps(content, ensure_ascii=False) + "\n"


def coverage(records: Mapping[BloodType, list[TrainingRecord]]) -> str:
    """Return statistics of the files as two Markdown tables."""
    summaries = {name: summarise(name, found) for name, found in records.items()}
    lines = ["| | " + " | ".join(records) + " |", "|---|" + "---|" * len(records)]

    def row(name: str, value: Callable[[BloodType], str]) -> None:
        lines.append(f"| {name} | " + " | ".join(value(persona) for persona in records) + " |")

    row("records", lambda p: f"{summaries[p].records:,}")
    row("situations", lambda p: f"{sum(1 for f in handwritten_families() for s in f.situations if p in s.replies):,}")
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
    """Return `document` with the section between `<!-- marker:begin -->` and `<!-- marker:end -->` replaced by `text`."""
    begin, end = f"<!-- {marker}:begin -->\n", f"<!-- {marker}:end -->"
    head, rest = document.split(begin)
    return head + begin + text + end + rest.split(end)[1]


def main() -> int:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    check = parser.parse_args().check
    differ = 0
    prompts = (REPOSITORY / "lora_trainer/data/assets/eval_prompts.jsonl").read_text(encoding="utf-8")
    # without the heading, which is for readers
    policy = "## " + (DATA / "POLICY.ko.md").read_text(encoding="utf-8").split("\n## ", 1)[1]
    files = {
        DATA / "eval_prompts.jsonl": prompts,
        REPOSITORY / "lora_trainer/data/assets/policy.ko.md": policy,
        REPOSITORY / "lora_trainer/generator/exemplars.jsonl": "".join(exemplar_lines()),
    }
    records = {blood_type: handwritten_records(blood_type) for blood_type in BloodType}
    for blood_type, found in records.items():
        files[DATA / f"train_data_type_{blood_type}.jsonl"] = "".join(record.to_json() + "\n" for record in found)
    page = DATA / "README.md"
    files[page] = with_section(page.read_text(encoding="utf-8"), "coverage", coverage(records))
    for path, text in files.items():
        is_same = path.exists() and path.read_text(encoding="utf-8") == text
        differ += not is_same
        if not check and not is_same:
            path.write_text(text, encoding="utf-8", newline="\n")
        state = "up to date" if is_same else "out of date" if check else "written"
        print(f"{path.relative_to(REPOSITORY)}: {text.count(chr(10)):,} lines, {state}")
    return 1 if check and differ else 0


if __name__ == "__main__":
    sys.exit(main())

"""Build `data/train_data_type_*.jsonl` from the hand-written situations of `data/handwritten/*.yaml`, in their order.

Also writes what data and package share: the evaluation prompts, the policy, and the situations that `generate` needs: those with
slots, which `--engine compose` varies, and those on hard topics, which the teacher's prompt shows as well.

python tools/bundled_data.py            write the files
python tools/bundled_data.py --check    compare the files with the sources; exit 1 if one is out of date
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any, Final, NoReturn, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from lora_trainer.data.records import TrainingRecord
from lora_trainer.errors import DataError
from lora_trainer.generator.compose import variants
from lora_trainer.generator.dataset_summary import summarise
from lora_trainer.generator.exchanges import VARIANTS_PER_SOURCE, Exchange, ShippedExchange, record_of
from lora_trainer.generator.teacher_orders import families, family_rules
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

REPOSITORY: Final = Path(__file__).resolve().parents[1]
DATA: Final = REPOSITORY / "data"


class Situation(Exchange):
    """An exchange with what only its sources say."""

    tags: tuple[str, ...] = ()
    """Hard topics that the input belongs to. data/POLICY.md lists them."""

    @model_validator(mode="after")
    def _slots_fit(self) -> Self:
        if problems := list(_slot_problems(self)):
            raise ValueError("; ".join(problems))
        return self


class Family(BaseModel):
    """Situations about one topic."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str
    title: str
    situations: tuple[Situation, ...]


class HandwrittenFile(BaseModel):
    """One file of `data/handwritten/`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    families: tuple[Family, ...]


# --- slots ---------------------------------------------------------------------------------------------

_HANGUL: Final = re.compile("[가-힣]+")
_FINALS: Final = 28
_RIEUL: Final = 8


def final_sound(word: str) -> str:
    """Return what particles and endings look at in the last syllable: a vowel, ㄹ or another consonant; empty if not Hangul."""
    if not _HANGUL.match(word[-1]):
        return ""
    final = (ord(word[-1]) - ord("가")) % _FINALS
    return "a vowel" if not final else "ㄹ" if final == _RIEUL else "another consonant than ㄹ"


def texts_of(situation: Exchange) -> dict[str, str]:
    """Return all texts of a situation by their place in it."""
    replies = {
        f"replies.{persona}.{number}": reply.text for persona, own in situation.replies.items() for number, reply in enumerate(own)
    }
    return {"summary": situation.summary, "input": situation.input, **replies}


def _slot_problems(situation: Situation) -> Iterator[str]:
    """Yield what would make a variant read wrong, as far as a rule can tell."""
    if not situation.slots:
        return
    if "crisis" in situation.tags:
        yield "slots: got some in a situation tagged `crisis`, expected none"
    counts = sorted({len(values) for values in situation.slots.values()})
    most = VARIANTS_PER_SOURCE + 1
    if counts not in ([most - 1], [most]):
        yield f"slots: got {joined(counts)} values, expected {most - 1} or {most}, as many in each slot"
        return
    own_words = [values[0] for values in situation.slots.values()]
    for name, values in {"": own_words, **situation.slots}.items():
        if twice := sorted({value for value in values if values.count(value) > 1}):
            yield f"slots{name and '.'}{name}: got {joined(map(repr, twice))} more than once, expected different words"
    texts = texts_of(situation)
    for name, (own, *others) in situation.slots.items():
        if own not in situation.summary and own not in situation.input:
            yield f"slots.{name}: got {own!r}, expected a word that stands so in the summary or the input"
        for other in others:
            if places := [place for place, text in texts.items() if other in text]:
                yield f"slots.{name}: got {other!r}, expected a word that is not in {joined(places)} yet"
            if final_sound(other) != final_sound(own) and (places := list(_places_before_hangul(own, texts))):
                ends = f"a word that ends in {final_sound(own) or 'the same sound'} like {own!r}"
                yield f"slots.{name}: got {other!r}, expected {ends}, because of {joined(places)}"


def _places_before_hangul(word: str, texts: Mapping[str, str]) -> Iterator[str]:
    """Yield where a particle or an ending, which may depend on the final sound of `word`, follows it."""
    for place, text in texts.items():
        for found in re.finditer(re.escape(word), text):
            if following := _HANGUL.match(text, found.end()):
                yield f"{following[0]!r} after it in {place}"


def joined(parts: Iterable[object]) -> str:
    """Return `parts` as a list in a sentence."""
    return " and ".join(map(str, parts))


# --- files ---------------------------------------------------------------------------------------------


def families_of(path: Path) -> tuple[Family, ...]:
    """Return the families of one hand-written file. Raises DataError with one line per mistake in it."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        return HandwrittenFile.model_validate(document).families
    except yaml.YAMLError as error:
        raise DataError(f"{path.name}: got something that is not YAML: {error}") from None
    except ValidationError as error:
        raise DataError([f"{path.name}: {_mistake(document, problem)}" for problem in error.errors()]) from None


def _mistake(document: Any, problem: Any) -> str:
    """Return one of pydantic's errors as a line: which situation, which field, what it has and what it should have."""
    where, place = list(problem["loc"]), []
    for key in ("families", "situations"):
        if len(where) > 1 and where[0] == key:
            document = document[key][where[1]]
            name = document.get("family") or document.get("input") if isinstance(document, dict) else None
            place.append(f"{name!r}" if name else f"{key}.{where[1]}")
            where = where[2:]
    place += [".".join(map(str, where))] if where else []
    # a mistake that a validator of ours found says what it got
    if problem["type"] == "value_error":
        return ": ".join((*place, str(problem["ctx"]["error"])))
    expected = problem.get("ctx", {}).get("expected")
    got = f"got {problem['input']!r}" if problem["type"] != "missing" else "got nothing"
    return ": ".join((*place, f"{got}, expected {expected}" if expected else f"{got}; {problem['msg']}"))


@cache  # parsing the YAML takes half a second
def handwritten_families() -> tuple[Family, ...]:
    """Return all hand-written families in the order of the files. Raises DataError if a file has a mistake."""
    found: list[Family] = []
    problems: list[str] = []
    for path in sorted((DATA / "handwritten").glob("*.yaml")):
        try:
            found += families_of(path)
        except DataError as error:
            problems += error.problems
    if unknown := {family.family for family in found} - set(families()):
        problems.append(f"families missing from families.yaml: {', '.join(sorted(unknown))}; add them there or rename them")
    if problems:
        raise DataError([f"data/handwritten/{problem}" for problem in problems])
    return tuple(found)


def exchange_lines() -> Iterator[str]:
    """Yield the situations with slots, and those on the hard topic of their family, as lines of `exchanges.jsonl`, in order."""
    for family in handwritten_families():
        topics = family_rules(family.family).topics
        for situation in family.situations:
            if situation.slots or not set(topics).isdisjoint(situation.tags):
                content = situation.model_dump(exclude={"tags"})
                yield ShippedExchange(family=family.family, **content).model_dump_json() + "\n"


def handwritten_records(blood_type: BloodType) -> list[TrainingRecord]:
    """Return one persona's hand-written records, in order."""
    return [
        record_of(blood_type, situation.summary, situation.input, reply.text, reply)
        for family in handwritten_families()
        for situation in family.situations
        for reply in situation.replies.get(blood_type, ())
    ]


def coverage(records: Mapping[BloodType, list[TrainingRecord]]) -> str:
    """Return statistics of the files as two Markdown tables."""
    summaries = {name: summarise(name, found) for name, found in records.items()}
    lines = ["| | " + " | ".join(records) + " |", "|---|" + "---|" * len(records)]

    def row(name: str, value: Callable[[BloodType], str]) -> None:
        lines.append(f"| {name} | " + " | ".join(value(persona) for persona in records) + " |")

    row("records", lambda p: f"{summaries[p].records:,}")
    row("situations", lambda p: f"{sum(1 for f in handwritten_families() for s in f.situations if p in s.replies):,}")
    sources = [situation for family in handwritten_families() for situation in family.situations]
    row("situations with slots", lambda p: f"{sum(1 for s in sources if p in s.replies and s.slots):,}")
    row("their variants", lambda p: f"{len({(variant.source, variant.number) for variant in variants(p, sources)}):,}")
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
        REPOSITORY / "lora_trainer/generator/exchanges.jsonl": "".join(exchange_lines()),
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
    if check and differ:
        print("run python tools/bundled_data.py")
    return 1 if check and differ else 0


def run(tool: Callable[[], int]) -> NoReturn:
    """Exit with what `tool` returns, or with the mistakes in the hand-written files."""
    try:
        sys.exit(tool())
    except DataError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    run(main)

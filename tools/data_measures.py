"""Measure the bundled data against what data/README.md promises, persona by persona.

    python tools/data_measures.py            print the table and write it into data/README.md
    python tools/data_measures.py --check    exit 1 if a measure misses its target or the table is out of date
    python tools/data_measures.py --also FILE.yaml ...   measure these hand-written files as well, write nothing

Classifiers: logistic regression on TF-IDF of character 1- to 4-grams, five folds grouped by situation, so that no situation is
on both sides. What a reader has to judge (ungrounded, awkward, answered) is in data/reviews/.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from bundled_data import DATA, Family, Situation, families_of, handwritten_families, run, with_section
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupKFold

from lora_trainer.data.hard_topics import asks_about_intent, claims_presence
from lora_trainer.data.lint import has_question
from lora_trainer.data.style import SHORT_REPLY_CHARACTERS, style_of, uses_summary
from lora_trainer.generator.exchanges import WrittenReply
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

FOLDS: Final = 5
TYPICAL_WORDS: Final = 20
"""How many of each persona's most typical words are removed before personas are told apart."""
_SMOOTHING: Final = 0.5

HARD_TAGS: Final = frozenset(
    (
        "suicide",
        "self_harm",
        "abuse",
        "violence",
        "sexual_violence",
        "stalking",
        "digital_sex_crime",
        "bullying",
        "threat",
        "delusion",
        "drugs",
        "gambling",
        "pregnancy",
        "eating_disorder",
        "scam",
        "medical_emergency",
        "grief",
        "crisis",
    )
)
"""Topics in which no friend claims a body, a place or an arrival."""
NUMBERS: Final[Mapping[str, tuple[str, ...]]] = {
    "suicide": ("109", "119", "1388"),
    "self_harm": ("109", "119", "1388"),
    "abuse": ("112", "1366", "1388", "119"),
    "violence": ("112", "1366", "117", "1388", "119"),
    "sexual_violence": ("112", "1366", "1388"),
    "stalking": ("112", "1366"),
    "digital_sex_crime": ("112", "1366", "1388"),
    "bullying": ("117", "1388", "112"),
    "threat": ("112", "109", "119", "1388"),
    "delusion": ("109", "119", "112"),
    "drugs": ("1342", "119", "112", "109"),
    "gambling": ("1336", "109"),
    "pregnancy": ("1308", "119", "1388"),
    "eating_disorder": ("119", "109", "1388"),
    "scam": ("112", "132"),
    "medical_emergency": ("119", "112"),
    "minor": ("1388", "112", "117", "109"),
    "dependency": ("109", "1388"),
    "legal": ("132", "112", "1366"),
    "grief": ("109",),
    "medical": ("119", "109", "1339"),
}
"""The numbers of data/POLICY.md that help with a topic. A reply to a situation tagged `crisis` names one of its topics' numbers."""

_LETTERS: Final = re.compile(r"[^가-힣ㄱ-ㅎㅏ-ㅣA-Za-z ]+")
_WORD: Final = re.compile("[가-힣ㄱ-ㅎㅏ-ㅣA-Za-z]+")
_NUMBER: Final = re.compile(r"(?<!\d)\d{3,4}(?!\d)")
_PERCENTAGE: Final = re.compile(r"(\d+\.\d+)%")


@dataclass(frozen=True, slots=True)
class Row:
    """One reply and what it answers."""

    persona: BloodType
    group: int
    """Number of its situation, the same for all personas."""
    situation: Situation
    reply: WrittenReply

    @property
    def third(self) -> IntensityThird:
        """The third of intensity."""
        return IntensityThird.of(self.reply.intensity)


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure, its target, and how it is shown."""

    name: str
    value: Mapping[BloodType, float]
    least: float = 0.0
    most: float = 1.0
    is_share: bool = True

    def shown(self, value: float) -> str:
        """Return one value as text."""
        return f"{value:.1%}" if self.is_share else f"{value:,.0f}" if value >= 1 else f"{value:.2f}"

    @property
    def target(self) -> str:
        """The target as text."""
        if not self.is_share:
            return "0" if self.most == 0 else f"≥ {self.least:,.0f}"
        low = self.shown(self.least).replace(".0%", "%") if self.least > 0 else ""
        high = self.shown(self.most).replace(".0%", "%") if self.most < 1 else ""
        return f"{low} to {high}" if low and high else f"≥ {low}" if low else f"≤ {high}" if high else "-"

    def missed(self) -> list[BloodType]:
        """Return the personas that miss the target."""
        return [persona for persona, value in self.value.items() if not self.least <= value <= self.most]


def rows_of(families: Iterable[Family]) -> list[Row]:
    """Return every reply of `families`."""
    situations = [situation for family in families for situation in family.situations]
    return [
        Row(persona, group, situation, reply)
        for group, situation in enumerate(situations)
        for persona in BloodType
        for reply in situation.replies.get(persona, ())
    ]


# --- classifiers ---------------------------------------------------------------------------------------


def predictions(texts: Sequence[str], labels: Sequence[str], groups: Sequence[int]) -> list[str]:
    """Return the label that a classifier gives to each text, trained on the other folds."""
    found = np.empty(len(texts), dtype=object)
    every = np.array(texts, dtype=object)
    wanted = np.array(labels)
    for train, test in GroupKFold(FOLDS).split(every, wanted, groups):
        vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True, min_df=2, dtype=np.float32)
        model = LogisticRegression(C=3.0, max_iter=1000, class_weight="balanced")
        model.fit(vectorizer.fit_transform(every[train]), wanted[train])
        found[test] = model.predict(vectorizer.transform(every[test]))
    return [str(label) for label in found]


def letters(text: str) -> str:
    """Return `text` without emoji, punctuation and digits."""
    return " ".join(_LETTERS.sub(" ", text).split())


def _log_odds(own: int, of_own: int, others: int, of_others: int) -> float:
    """Return how much likelier a word is in one persona's words than in the others', in standard deviations."""
    mine, theirs = own + _SMOOTHING, others + _SMOOTHING
    odds = math.log(mine / (of_own - mine)) - math.log(theirs / (of_others - theirs))
    return odds / math.sqrt(1 / mine + 1 / theirs)


def without_typical_words(rows: Sequence[Row]) -> list[str]:
    """Return the letters of each reply without its persona's `TYPICAL_WORDS` most typical words.

    Typical words have the highest log-odds between a persona and the other three, with Dirichlet smoothing.
    """
    counts: dict[BloodType, Counter[str]] = {persona: Counter() for persona in BloodType}
    for row in rows:
        counts[row.persona].update(_WORD.findall(row.reply.text))
    everyone = sum(counts.values(), Counter())
    typical: set[str] = set()
    for own in counts.values():
        scores = {
            word: _log_odds(own[word], own.total(), everyone[word] - own[word], everyone.total() - own.total()) for word in own
        }
        typical.update(sorted(own, key=scores.__getitem__, reverse=True)[:TYPICAL_WORDS])
    return [" ".join(word for word in _WORD.findall(row.reply.text) if word not in typical) for row in rows]


# --- measures ------------------------------------------------------------------------------------------


def names_a_number(row: Row) -> bool:
    """Return whether the reply names a number that helps with the situation's topics."""
    allowed = {number for tag in row.situation.tags for number in NUMBERS.get(tag, ())}
    return bool(allowed.intersection(_NUMBER.findall(row.reply.text)))


def measures(rows: Sequence[Row]) -> list[Measure]:
    """Return all measures of `rows`."""
    by_persona = {persona: [row for row in rows if row.persona == persona] for persona in BloodType}
    styles = {persona: style_of(row.reply.text for row in own) for persona, own in by_persona.items()}

    def share(chosen: Callable[[Row], bool], holds: Callable[[Row], bool]) -> dict[BloodType, float]:
        found = {persona: [holds(row) for row in own if chosen(row)] for persona, own in by_persona.items()}
        return {persona: sum(held) / len(held) if held else 1.0 for persona, held in found.items()}

    def count(holds: Callable[[Row], bool]) -> dict[BloodType, float]:
        return {persona: float(sum(map(holds, own))) for persona, own in by_persona.items()}

    def from_summary(row: Row) -> bool:
        return uses_summary(row.situation.summary, row.situation.input, row.reply.text)

    def is_hard(row: Row) -> bool:
        return bool(HARD_TAGS.intersection(row.situation.tags))

    def is_crisis(row: Row) -> bool:
        return "crisis" in row.situation.tags

    def is_own_life(row: Row) -> bool:
        return is_crisis(row) and bool({"suicide", "self_harm"}.intersection(row.situation.tags))

    persona_found = predictions(without_typical_words(rows), [str(row.persona) for row in rows], [row.group for row in rows])
    told_apart = [found == str(row.persona) for row, found in zip(rows, persona_found, strict=True)]

    def recognised(least_characters: int) -> dict[BloodType, float]:
        found = {
            p: [ok for row, ok in zip(rows, told_apart, strict=True) if row.persona == p and len(row.reply.text) > least_characters]
            for p in BloodType
        }
        return {persona: float(np.mean(held)) for persona, held in found.items()}

    def read_from_letters(label: Callable[[Row], str]) -> dict[BloodType, float]:
        result = {}
        for persona, own in by_persona.items():
            wanted = [label(row) for row in own]
            found = predictions([letters(row.reply.text) for row in own], wanted, [row.group for row in own])
            result[persona] = float(balanced_accuracy_score(wanted, found))
        return result

    cells = {
        persona: min(
            sum(row.reply.feeling == feeling and row.third == third for row in own)
            for feeling in Feeling
            for third in IntensityThird
        )
        for persona, own in by_persona.items()
    }
    many = {
        persona: float(len({row.group for row in own if len({r.intensity for r in row.situation.replies[persona]}) > 1}))
        for persona, own in by_persona.items()
    }
    return [
        Measure("records", {p: float(len(own)) for p, own in by_persona.items()}, 1050, np.inf, is_share=False),
        Measure("situations at several intensities", many, 150, np.inf, is_share=False),
        Measure("records in the rarest feeling and third", {p: float(n) for p, n in cells.items()}, 12, np.inf, is_share=False),
        Measure(f"replies of at most {SHORT_REPLY_CHARACTERS} characters", {p: s.short for p, s in styles.items()}, 0.15),
        Measure("replies with a comma", {p: s.comma for p, s in styles.items()}, most=0.35),
        Measure("replies with a comma splice", {p: s.spliced for p, s in styles.items()}),
        Measure("replies with ㅋ or ㅎ", {p: s.laughter for p, s in styles.items()}, 0.05, 0.15),
        Measure("replies that share a skeleton, nouns masked", {p: s.alike for p, s in styles.items()}, most=0.10),
        Measure("replies with the most frequent phrase", {p: s.phrase_share for p, s in styles.items()}, most=0.05),
        Measure("replies that ask back", share(lambda _: True, lambda row: has_question(row.reply.text)), 0.4, 0.75),
        Measure("a word of the summary used", share(lambda row: bool(row.situation.summary), from_summary), 0.30),
        Measure("persona told apart, above 20 characters", recognised(SHORT_REPLY_CHARACTERS), 0.80),
        Measure("persona told apart, all replies", recognised(0), 0.70),
        Measure("third of intensity from letters alone", read_from_letters(lambda row: str(row.third)), 0.50),
        Measure("feeling from letters alone", read_from_letters(lambda row: str(row.reply.feeling)), 0.45),
        Measure(
            "false presence in hard topics",
            count(lambda row: is_hard(row) and claims_presence(row.reply.text)),
            0,
            0,
            is_share=False,
        ),
        Measure("crisis inputs answered with the right number", share(is_crisis, names_a_number), 1.0),
        Measure("intent asked where a life is in danger", share(is_own_life, lambda row: asks_about_intent(row.reply.text)), 0.50),
    ]


def table(found: Sequence[Measure]) -> str:
    """Return the measures as a Markdown table."""
    lines = ["| | target | " + " | ".join(BloodType) + " |", "|---|---|" + "---|" * len(BloodType)]
    for measure in found:
        values = [measure.shown(measure.value[p]) for p in BloodType]
        lines.append(f"| {measure.name} | {measure.target} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def is_close(one: str, other: str) -> bool:
    """Return whether two documents differ in nothing but percentages, by at most a point.

    A classifier can decide a close case differently on another machine.
    """
    if _PERCENTAGE.sub("%", one) != _PERCENTAGE.sub("%", other):
        return False
    pairs = zip(_PERCENTAGE.findall(one), _PERCENTAGE.findall(other), strict=True)
    return all(abs(float(mine) - float(theirs)) <= 1 for mine, theirs in pairs)


def main() -> int:
    """Print the table; write or check it. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a target is missed or the table is old")
    parser.add_argument("--also", nargs="+", type=Path, default=(), metavar="FILE", help="further hand-written files")
    options = parser.parse_args()
    families = list(handwritten_families())
    for path in options.also:
        families += families_of(path)
    found = measures(rows_of(families))
    text = table(found)
    print(text)
    missed = [measure for measure in found if measure.missed()]
    for measure in missed:
        values = ", ".join(f"{persona} {measure.shown(measure.value[persona])}" for persona in measure.missed())
        print(f"misses its target: {measure.name}: got {values}, expected {measure.target}")
    if options.also:
        return 0
    page = DATA / "README.md"
    document = page.read_text(encoding="utf-8")
    updated = with_section(document, "measures", text)
    if options.check:
        is_old = not is_close(document, updated)
        if is_old:
            print("data/README.md: the table of measures is out of date; run python tools/data_measures.py")
        return int(bool(missed) or is_old)
    page.write_text(updated, encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)

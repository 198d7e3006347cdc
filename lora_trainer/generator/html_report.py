"""The page of `generate --report`: self-contained HTML about the generated and rejected records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lora_trainer.data.records import TrainingRecord
from lora_trainer.generator.dataset_summary import DatasetSummary, facts_of, notes_of
from lora_trainer.messages import ENGLISH, Message, Say, speaker
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird
from lora_trainer.report import plots
from lora_trainer.report.html import render_page

SAMPLES: Final = 12
"""Number of sample records, evenly spaced over the output."""


@dataclass(frozen=True, slots=True)
class PersonaSection:
    """Content of one persona's section."""

    summary: DatasetSummary
    taken_for: Mapping[BloodType, int]
    """Number of replies by predicted persona."""
    rejects: Mapping[str, int]
    output: str
    samples: Sequence[TrainingRecord]
    notes: Sequence[tuple[str, str]] = ()
    """Additional facts as name and value, such as the teacher's requests and tokens."""


def evenly_spaced(records: Sequence[TrainingRecord]) -> list[TrainingRecord]:
    """Return at most `SAMPLES` evenly spaced records."""
    step = max(1, len(records) // SAMPLES)
    return list(records[::step][:SAMPLES])


def dataset_page(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[PersonaSection], language: str = ENGLISH) -> str:
    """Render the page. `facts` describe the whole run: engine, seed, version."""
    say = speaker(language)
    return render_page(
        "dataset_page.html.jinja",
        language=language,
        say=say,
        title=say(title),
        facts=[(say(name), value) for name, value in facts],
        sections=[_section(section, say) for section in sections],
        thirds=list(IntensityThird),
        personas=list(BloodType),
        confusion=[_confusion(section) for section in sections],
    )


def _confusion(section: PersonaSection) -> tuple[str, list[tuple[int, float]], str]:
    name, everything = section.summary.blood_type, max(1, section.summary.records)
    counts = [(section.taken_for.get(other, 0), section.taken_for.get(other, 0) / everything) for other in BloodType]
    return name, counts, f"{section.taken_for.get(name, 0) / everything:.1%}"


def _section(section: PersonaSection, say: Say) -> dict[str, object]:
    summary, spec = section.summary, persona_spec(section.summary.blood_type)
    most = max(summary.cells.values(), default=1)
    grid = [
        (str(feeling), [(count := summary.cells.get((feeling, third), 0), round(count / most, 3)) for third in IntensityThird])
        for feeling in Feeling
    ]
    intensities = [f"{intensity:.1f}" for intensity in summary.emoji_by_intensity]
    figures = [
        (
            say(Message("Emoji by intensity")),
            plots.svg(
                plots.bars(
                    intensities,
                    [value for _, value in summary.emoji_by_intensity.values()],
                    say(Message("intensity")),
                    say(Message("mean emoji per reply")),
                ),
                label=say(Message("Mean number of emoji per reply at each intensity")),
            ),
        ),
        (
            say(Message("Reply length")),
            plots.svg(
                plots.histogram(summary.reply_characters, say(Message("characters")), say(Message("replies"))),
                label=say(Message("Histogram of reply lengths")),
            ),
        ),
        (
            say(Message("Sentences per reply")),
            plots.svg(
                plots.bars(
                    [str(number) for number in summary.sentences],
                    list(summary.sentences.values()),
                    say(Message("sentences")),
                    say(Message("replies")),
                ),
                label=say(Message("Replies by number of sentences")),
            ),
        ),
        (
            say(Message("Emotions")),
            plots.svg(
                plots.horizontal_bars(
                    [str(face) for face, _ in sorted(summary.expressions.items(), key=lambda item: -item[1])],
                    sorted(summary.expressions.values(), reverse=True),
                    say(Message("replies")),
                ),
                label=say(Message("Replies by emotion")),
                height=4.2,
            ),
        ),
    ]
    if section.rejects:
        ordered = sorted(section.rejects.items(), key=lambda item: -item[1])
        figures.append(
            (
                say(Message("Rejected drafts, by reason")),
                plots.svg(
                    plots.horizontal_bars(
                        [reason for reason, _ in ordered], [times for _, times in ordered], say(Message("drafts"))
                    ),
                    label=say(Message("Rejected drafts by reason")),
                    height=0.9 + 0.35 * len(ordered),
                ),
            )
        )
    return {
        "blood_type": str(spec.blood_type),
        "name": spec.name,
        "tone": spec.tone,
        "output": section.output,
        "records": summary.records,
        # the phrase is training text, like the samples: the page is its owner's
        "facts": [
            (say(name), value)
            for name, value in (*facts_of(summary), (Message("most frequent phrase"), summary.style.phrase), *section.notes)
        ],
        "notes": [say(Message("note: {note}", note=note.text)) for note in notes_of(summary, section.taken_for)],
        "grid": grid,
        "emoji": [f"{summary.emoji_by_third[third]:.2f}" for third in IntensityThird],
        "figures": figures,
        "samples": [
            {
                "summary": record.context.summary,
                "feeling": f"{record.context.current_emotion.type} {record.context.current_emotion.intensity:.1f}",
                "input": record.input,
                "text": record.reply.text,
                "face": str(record.reply.emotion),
            }
            for record in section.samples
        ],
    }

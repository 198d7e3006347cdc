"""Test what is reported about a file beside its problems: the style of its replies, and notes on records and gates."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from entrypoint.cli import run_cli
from lora_trainer.config import GatesConfig, TrainingConfig
from lora_trainer.data.validation import FileReport, check_file
from lora_trainer.errors import ExitCode
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird
from lora_trainer.report.data_notes import (
    CELLS,
    ENOUGH_RECORDS,
    NOTES,
    RECORDS_PER_CELL,
    DataRates,
    data_notes,
    rates_of_report,
    style_facts,
)
from lora_trainer.report.validation_table import validation_table

GOOD = {
    "one_or_two_sentences": 0.99,
    "informal_speech": 1.0,
    "persona": 0.9,
    "emoji_intensity": 0.8,
    "question_rate_min": 0.6,
    "question_rate_max": 0.6,
}
EVEN = {(feeling, third): RECORDS_PER_CELL for feeling in Feeling for third in IntensityThird}


def rates(
    measured: dict[str, float] | None = None,
    records: int = ENOUGH_RECORDS,
    cells: dict[tuple[Feeling, IntensityThird], int] = EVEN,
) -> DataRates:
    return DataRates(records, cells, BloodType.A, GOOD | (measured or {}))


def notes_about(given: DataRates, gates: GatesConfig | None = None) -> dict[str, str]:
    return {note.code: note.text for note in data_notes(given, TrainingConfig(), gates or GatesConfig())}


def write(path: Path, replies: list[tuple[str, float]]) -> Path:
    lines = [
        {
            "instruction": "너는 A형 친구야.",
            "context": {"summary": "", "current_emotion": {"type": list(Feeling)[number % 10], "intensity": intensity}},
            "input": f"{number}번 얘기 들어 봐",
            "output": {"text": text, "emotion": "smile"},
        }
        for number, (text, intensity) in enumerate(replies)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def shown(report: FileReport) -> str:
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(validation_table(report))
    return console.export_text()


# --- style ---------------------------------------------------------------------------------------------


def test_the_style_of_a_file(tmp_path: Path) -> None:
    replies = [
        "ㅋㅋㅋ 진짜?",
        "카드부터 막아, 그게 먼저야",
        "피자 먹으러 가자",
        "김밥 먹으러 가자",
        "숙제부터 하자 그게 먼저지",
    ]
    style = check_file(write(tmp_path / "records.jsonl", [(text, 0.5) for text in replies])).style
    assert (style.replies, style.median_characters) == (5, 9)
    assert (style.short, style.comma, style.spliced, style.laughter) == (1.0, 0.2, 0.2, 0.2)
    assert style.alike == 0.4
    assert "먼저" in style.phrase
    assert style.phrase_share == 0.4


def test_the_style_is_shown_without_the_phrase(tmp_path: Path) -> None:
    report = check_file(write(tmp_path / "records.jsonl", [("비밀기지 얘기야", 0.5), ("비밀기지 좋지", 0.5)]))
    assert report.style.phrase
    text, document = shown(report), json.dumps(report.as_json(), ensure_ascii=False)
    for label, value in style_facts(report.style):
        assert label in text
        assert value in text
    assert "비밀" not in text + document
    style = report.as_json()["style"]
    assert isinstance(style, dict)
    assert style["phrase_share"] == 1.0


# --- notes ---------------------------------------------------------------------------------------------


def test_a_good_file_has_no_note() -> None:
    assert notes_about(rates()) == {}
    assert notes_about(DataRates(0, {}, None, {})) == {}


def test_too_few_records_say_how_many_are_enough() -> None:
    cells = {(Feeling.HAPPY, IntensityThird.HIGH): 34, (Feeling.SAD, IntensityThird.LOW): 1}
    text = notes_about(rates(records=35, cells=cells))["too_few_records"]
    assert "35 records" in text
    assert f"at least {ENOUGH_RECORDS}" in text
    assert f"{CELLS - 1} of the {CELLS}" in text
    assert "4 would be held out" in text


def test_a_feeling_without_records_is_named_by_count() -> None:
    cells = {cell: count * 2 for cell, count in EVEN.items() if cell[0] is not Feeling.TIRED}
    assert f"3 of the {CELLS}" in notes_about(rates(cells=cells))["empty_cells"]


@pytest.mark.parametrize(
    ("name", "value", "facts"),
    [
        ("question_rate_max", 0.92, ("92.0%", "85%")),
        ("question_rate_min", 0.1, ("10.0%", "40%")),
        ("one_or_two_sentences", 0.6, ("60.0%", "93%")),
        ("informal_speech", 0.9, ("90.0%", "95%")),
        ("persona", 0.3, ("30.0%", "70%", "recognises A")),
        ("emoji_intensity", 0.1, ("0.10", "0.20")),
    ],
)
def test_a_missed_gate_is_a_note_with_both_numbers(name: str, value: float, facts: tuple[str, ...]) -> None:
    found = notes_about(rates({name: value}))
    assert list(found) == [name]
    assert f"gates.{name}" in found[name]
    assert all(fact in found[name] for fact in facts)


def test_thresholds_are_those_of_the_gates() -> None:
    threshold = GatesConfig().question_rate_max
    assert threshold is not None
    assert not notes_about(rates({"question_rate_max": threshold}))
    assert not notes_about(rates({"question_rate_max": 0.92}), GatesConfig(question_rate_max=0.95))
    assert not notes_about(rates({"question_rate_max": 0.92}), GatesConfig(question_rate_max=None))
    assert set(NOTES) - {"too_few_records", "empty_cells"} <= set(GatesConfig.model_fields)


def test_rates_of_a_file(tmp_path: Path) -> None:
    replies = [(f"{number}번 버스 타자! 어디야?" + "😊" * (number % 3), (number % 3) / 2) for number in range(30)]
    replies += [("그랬어요. 그래서 울었어요. 그리고 잤어요.", 0.5)] * 10
    report = check_file(write(tmp_path / "train_data_type_A.jsonl", replies))
    measured = rates_of_report(report, [text for text, _ in replies]).measured
    assert measured["question_rate_min"] == measured["question_rate_max"] == 0.75
    assert measured["one_or_two_sentences"] == measured["informal_speech"] == 0.75
    assert measured["emoji_intensity"] > 0.7
    assert 0 <= measured["persona"] <= 1


def test_notes_are_no_finding_even_under_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # distinct replies with a question each and without emoji
    path = write(tmp_path / "train_data_type_A.jsonl", [(f"{number}번 버스 타자! 어디야?", 0.5) for number in range(40)])
    assert run_cli(["validate", "--strict", "--no-tokens", str(path)]) == ExitCode.DONE
    out = capsys.readouterr().out
    assert "0 errors, 0 warnings" in out
    assert "40 records are too few" in out.replace("\n", " ")
    assert run_cli(["validate", "--json", "--no-tokens", "--set", "gates.question_rate_max=none", str(path)]) == ExitCode.DONE
    codes = {note["code"] for note in json.loads(capsys.readouterr().out)["files"][0]["notes"]}
    assert {"too_few_records", "emoji_intensity"} <= codes
    assert "question_rate_max" not in codes

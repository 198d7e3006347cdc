"""Test `generate --engine compose`: its sources, its balance, the guarantees about its output, and the command line."""

from __future__ import annotations

import random
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from entrypoint.cli import run_cli
from lora_trainer.data.duplicates import jaccard, normalized, shingles
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.lint import lint_exchange
from lora_trainer.data.records import TrainingRecord
from lora_trainer.errors import ExitCode
from lora_trainer.generator.collector import RecordCollector, all_cells, wanted_cells
from lora_trainer.generator.compose import compose, variants
from lora_trainer.generator.dataset_summary import DatasetSummary, facts_of, summarise
from lora_trainer.generator.exchanges import VARIANTS_PER_SOURCE, Exchange, load_exchanges
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

# make data-check looks at the sources of all four
each_persona = pytest.mark.parametrize(
    "blood_type", [BloodType.A, *(pytest.param(name, marks=pytest.mark.slow) for name in BloodType if name != BloodType.A)]
)
SAMPLE = 300
NEVER = 1_000_000


@cache
def composed(blood_type: BloodType, count: int = SAMPLE, seed: int = 1) -> tuple[RecordCollector, DatasetSummary]:
    collector = RecordCollector(blood_type)
    compose(collector, wanted_cells(count, random.Random(seed)), seed)
    return collector, summarise(blood_type, collector.accepted, collector.sources)


def lines_of(collector: RecordCollector) -> list[str]:
    return [record.to_json() for record in collector.accepted]


def bundled(blood_type: BloodType) -> Path:
    return Path(__file__).parents[2] / "data" / f"train_data_type_{blood_type}.jsonl"


# --- the sources -----------------------------------------------------------------------------------------

RAMEN = Exchange.model_validate(
    {
        "summary": "어제 라면 한 그릇을 먹고 배가 아팠대.",
        "input": "오늘 또 라면 먹었어",
        "slots": {"음식": ["라면", "김밥", "만둣국"], "단위": ["한 그릇", "두 줄", "세 대접"]},
        "replies": {
            "A": {"feeling": "worried", "intensity": 0.5, "emotion": "sad", "text": "라면 또 먹었어? 한 그릇만 먹은 거지?"}
        },
    }
)


def test_a_word_changes_everywhere_and_with_the_words_that_depend_on_it() -> None:
    (first, second) = variants(BloodType.A, [RAMEN])
    assert first.record.context.summary == "어제 김밥 두 줄을 먹고 배가 아팠대."
    assert first.record.input == "오늘 또 김밥 먹었어"
    assert second.record.reply.text == "만둣국 또 먹었어? 세 대접만 먹은 거지?"
    assert first.record.instruction == persona_spec(BloodType.A).instruction
    assert first.cell == (Feeling.WORRIED, IntensityThird.MIDDLE)


def test_a_longer_word_is_replaced_before_one_that_is_part_of_it() -> None:
    exchange = RAMEN.model_copy(update={"slots": {"국": ("국", "탕"), "음식": ("미역국", "갈비찜")}})
    assert exchange.varied("미역국 말고 국", 1) == "갈비찜 말고 탕"


def test_a_variant_that_changes_only_the_summary_is_left_out() -> None:
    slots = {"배": ("배가", "속이", "위가")}
    assert list(variants(BloodType.A, [RAMEN.model_copy(update={"slots": slots})])) == []


def test_exchanges_without_slots_or_without_the_persona_have_no_variants() -> None:
    assert list(variants(BloodType.A, [RAMEN.model_copy(update={"slots": {}})])) == []
    assert list(variants(BloodType.O, [RAMEN])) == []


# particle after a vowel, after ㄹ, after another consonant
PARTICLES = (
    ("를", "을", "을"),
    ("는", "은", "은"),
    ("가", "이", "이"),
    ("와", "과", "과"),
    ("로", "로", "으로"),
    ("랑", "이랑", "이랑"),
    ("야", "이야", "이야"),
    ("네", "이네", "이네"),
)


def disagreeing(word: str, text: str) -> list[str]:
    """Return the particles after `word` in `text` that don't fit its last syllable."""
    final = (ord(word[-1]) - ord("가")) % 28
    kind = 0 if not final else 1 if final == 8 else 2
    found = []
    for following in re.findall(rf"{re.escape(word)}([가-힣]+)(?![가-힣])", text):
        fitting = {forms[kind] for forms in PARTICLES}
        if following in {form for forms in PARTICLES for form in forms} - fitting:
            found.append(word + following)
    return found


def test_the_check_of_particles_finds_one() -> None:
    assert disagreeing("우동", "우동를 먹고 우동은 남겨") == ["우동를"]
    assert disagreeing("우유", "우유이랑 우유로") == ["우유이랑"]
    assert disagreeing("물", "물로 물으로") == ["물으로"]


@each_persona
def test_every_variant_of_every_exchange_is_clean(blood_type: BloodType) -> None:
    problems = []
    exchanges = load_exchanges()
    for variant in variants(blood_type, exchanges):
        record, exchange = variant.record, exchanges[variant.source]
        texts = (record.context.summary, record.input, record.reply.text)
        intensity = record.context.current_emotion.intensity
        problems += [(problem.code, texts) for problem in lint_exchange(*texts, intensity, blood_type=blood_type)]
        problems += [("placeholder", texts) for text in texts if re.search("[{}<>]", text) and "<" not in exchange.input]
        new = [values[variant.number] for values in exchange.slots.values()]
        for word in new:
            if "가" <= word[-1] <= "힣":
                problems += [(wrong, texts) for text in texts for wrong in disagreeing(word, text)]
        for old in [values[0] for values in exchange.slots.values()]:
            problems += [(old, texts) for text in texts if old in text and old not in "".join(new)]
    assert problems == []


@each_persona
def test_no_bundled_record_is_among_the_variants(blood_type: BloodType) -> None:
    have = {normalized(line.record.input + line.record.reply.text) for line in JsonlReader(bundled(blood_type)) if line.record}
    made = [normalized(v.record.input + v.record.reply.text) for v in variants(blood_type, load_exchanges())]
    assert have.isdisjoint(made)
    assert len(made) == len(set(made))


# --- composed records ------------------------------------------------------------------------------------


@each_persona
def test_each_exchange_gives_at_most_three_records_with_different_words(blood_type: BloodType) -> None:
    collector, summary = composed(blood_type, NEVER)
    assert max(Counter(collector.sources).values()) == VARIANTS_PER_SOURCE
    assert len(set(lines_of(collector))) == len(collector.accepted)
    assert len(collector.accepted) >= 1000
    assert summary.records == len(collector.accepted)
    assert summary.variants == collector.variants > 0.9 * summary.records
    assert summary.near_duplicate_rate == 0


@each_persona
def test_wanted_cells_come_first(blood_type: BloodType) -> None:
    collector, summary = composed(blood_type)
    assert len(collector.accepted) == SAMPLE
    stock = Counter(variant.cell for variant in variants(blood_type, load_exchanges()))
    each = SAMPLE // len(all_cells())
    for cell in all_cells():
        # an exchange with replies in several cells may be used up in another one
        assert summary.cells.get(cell, 0) >= min(each, stock[cell] // 2), cell


@each_persona
def test_only_variants_of_one_exchange_are_nearly_the_same(blood_type: BloodType) -> None:
    """Compare all pairs directly instead of using the generator's index."""
    collector, _ = composed(blood_type)
    parts = [shingles(record.reply.text) for record in collector.accepted]
    near = [
        (collector.accepted[at].reply.text, collector.accepted[other].reply.text)
        for at, one in enumerate(parts)
        for other in range(at)
        if collector.sources[at] != collector.sources[other] and jaccard(one, parts[other]) >= 0.7
    ]
    assert near == []


def test_the_same_seed_gives_the_same_records_and_another_others() -> None:
    once, _ = composed(BloodType.A, 60)
    again = RecordCollector(BloodType.A)
    compose(again, wanted_cells(60, random.Random(1)), 1)
    assert lines_of(again) == lines_of(once)
    other, _ = composed(BloodType.A, 60, 2)
    assert len(set(lines_of(other)) - set(lines_of(once))) >= 30


def test_nothing_comes_near_what_it_is_held_against() -> None:
    before, _ = composed(BloodType.B, 60)
    collector = RecordCollector(BloodType.B)
    collector.exclude_similar(before.accepted)
    compose(collector, wanted_cells(60, random.Random(1)), 1)
    assert len(collector.accepted) == 60
    assert collector.rejects["near_duplicate_reply"] > 0
    parts = [shingles(record.reply.text) for record in before.accepted]
    assert all(jaccard(shingles(record.reply.text), part) < 0.7 for record in collector.accepted for part in parts)


# --- the collector and the summary -----------------------------------------------------------------------


def record(said: str, text: str, summary: str = "") -> TrainingRecord:
    return TrainingRecord.model_validate(
        {
            "instruction": persona_spec(BloodType.A).instruction,
            "context": {"summary": summary, "current_emotion": {"type": "happy", "intensity": 0.5}},
            "input": said,
            "output": {"text": text, "emotion": "smile"},
        }
    )


NOODLES = record("오늘 점심에 우동 먹었어", "우동 국물이 오늘 같은 날씨에 딱이었겠다. 맛있었어?")
DUMPLINGS = record("오늘 점심에 만두 먹었어", "만두 국물이 오늘 같은 날씨에 딱이었겠다. 맛있었어?")


def test_variants_of_one_source_may_resemble_each_other_and_are_counted() -> None:
    collector = RecordCollector(BloodType.A)
    assert collector.accept(NOODLES, 7)
    assert collector.variants == 0
    assert collector.accept(DUMPLINGS, 7)
    assert collector.variants == 2
    assert not collector.rejects


@pytest.mark.parametrize("source", [None, 8])
def test_others_may_not(source: int | None) -> None:
    collector = RecordCollector(BloodType.A)
    collector.accept(NOODLES, 7)
    assert not collector.accept(DUMPLINGS, source)
    assert collector.rejects == {"near_duplicate_reply": 1}
    collector = RecordCollector(BloodType.A)
    collector.exclude_similar([NOODLES])
    assert not collector.accept(DUMPLINGS, source)


def test_prompts_of_the_evaluation_are_refused() -> None:
    collector = RecordCollector(BloodType.A)
    collector.exclude_inputs([NOODLES.input])
    assert collector.rejection_reason(NOODLES, 7) == "evaluation_prompt"


@pytest.mark.parametrize(("said", "code"), [("나 지금 \ufffd야", "replacement_character"), ("안\u200b녕", "invisible_character")])
def test_damaged_text_is_refused(said: str, code: str) -> None:
    assert RecordCollector(BloodType.A).rejection_reason(NOODLES.model_copy(update={"input": said})) == code


def test_the_summary_says_how_replies_take_up_what_they_answer() -> None:
    records = [
        record("짜장면이랑 짬뽕 중에 뭐 먹지", "짬뽕이 좋겠다."),
        record("짜장면이랑 짬뽕 중에 뭐 먹지", "그건 좀 어렵네."),
        record("나 그만 살고 싶어", "그 말 들으니까 마음이 아파. 혹시 죽고 싶다는 뜻이야? 지금 109에 전화해 줘."),
        record("나 그만 살고 싶어", "내가 지금 갈게."),
        record("나 왔어", "면접 보느라 고생했겠다.", summary="오늘 면접을 본다고 했어."),
        record("나 왔어", "어서 와.", summary="오늘 면접을 본다고 했어."),
    ]
    facts = {str(name): value for name, value in facts_of(summarise(BloodType.A, records))}
    assert facts["questions with two options that the reply answers"] == "50.0% (1 / 2)"
    assert facts["replies in danger that name a number to call"] == "50.0% (1 / 2)"
    assert facts["replies in danger that ask a question"] == "50.0% (1 / 2)"
    assert facts["replies in danger that claim to be there"] == "50.0% (1 / 2)"
    assert facts["replies that use a word of the summary"] == "50.0% (1 / 2)"
    assert facts["variants of the same exchange as another record"] == "0"


def test_near_duplicates_of_another_source_are_counted_in_the_summary() -> None:
    assert summarise(BloodType.A, [NOODLES, DUMPLINGS], [7, 7]).near_duplicate_replies == 0
    assert summarise(BloodType.A, [NOODLES, DUMPLINGS], [7, 8]).near_duplicate_replies == 1
    assert summarise(BloodType.A, [NOODLES, DUMPLINGS]).near_duplicate_replies == 1


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_command_writes_a_file_a_table_and_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--blood-type", "A,AB", "--count", "60", "--output", "made/", "--report", "pages/report.html"]
    assert run_cli(command) == ExitCode.DONE
    out = capsys.readouterr().out
    page = Path("pages/report.html").read_text(encoding="utf-8")
    for name in ("A", "AB"):
        lines = list(JsonlReader(Path(f"made/train_data_type_{name}.jsonl")))
        assert [line.problems for line in lines] == [()] * 60
        assert f"made/train_data_type_{name}.jsonl" in out
    for fact in (
        "near-duplicates, by reply",
        "variants of the same exchange as another record",
        "replies that use a word of the summary",
    ):
        assert out.count(fact) == page.count(fact) == 2
    assert page.count("<svg") >= 8
    assert page.count('<section id="') == 2
    # the page is self-contained and loads no other resource
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    assert run_cli(["validate", "--strict", "--no-tokens", *map(str, Path("made").iterdir())]) == ExitCode.DONE


def test_again_is_unchanged_and_another_is_refused_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--blood-type", "A", "--count", "30", "--output", "one.jsonl"]
    assert run_cli(command) == ExitCode.DONE
    first = Path("one.jsonl").read_bytes()
    assert run_cli(command) == ExitCode.DONE
    assert "unchanged: " in capsys.readouterr().out
    assert run_cli([*command, "--seed", "2"]) == ExitCode.CONFIG
    assert "choose another --output or pass --overwrite" in capsys.readouterr().err
    assert Path("one.jsonl").read_bytes() == first
    assert run_cli([*command, "--seed", "2", "--overwrite"]) == ExitCode.DONE
    assert Path("one.jsonl").read_bytes() != first


def test_more_than_there_are_says_how_many_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    against = str(bundled(BloodType.A))
    assert run_cli(["generate", "--blood-type", "A", "--count", "5000", "--against", against]) == ExitCode.DATA
    said = capsys.readouterr().err
    assert re.search(r"A: --engine compose can make [\d,]+ records from its exchanges, expected 5,000; lower --count, or use", said)
    assert re.search(r"--against: [\d,]+ variants nearly repeat another record; leave out the bundled data", said)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--blood-type", "C"], 2, "--blood-type: got 'C'; expected A, B, O or AB, several as A,B, or all"),
        (["--blood-type", "A,B", "--output", "x.jsonl"], 2, "got one file (x.jsonl) for 2 personas, expected a folder"),
        (["--against", "nowhere.jsonl"], 2, "--against: nowhere.jsonl: no such file"),
        (["--engine", "teacher"], 2, "got no --model"),
        (["--count", "0"], 2, "0 is not in the range"),
        (["--output", "ftp://x/"], 2, "unknown scheme"),
    ],
)
def test_wrong_usage(arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["generate", "--count", "30", *arguments]) == code
    assert said in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_against_a_file_with_errors(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.jsonl").write_text("{}\nnot json\n", encoding="utf-8")
    assert run_cli(["generate", "--count", "30", "--against", "bad.jsonl"]) == ExitCode.DATA
    assert "bad.jsonl:2: got something that is not JSON" in capsys.readouterr().err

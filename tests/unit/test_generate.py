"""Test `generate --engine compose`: its grammar, its balance, the guarantees about its output, and the command line."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from entrypoint.cli import run_cli
from lora_trainer.data.duplicates import jaccard, shingles
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.korean import PARTICLES, sentence_count, with_particle
from lora_trainer.data.lint import has_question, lint_reply
from lora_trainer.data.records import TrainingRecord
from lora_trainer.errors import ExitCode
from lora_trainer.generator.collector import RecordCollector, all_cells, wanted_cells
from lora_trainer.generator.compose import compose
from lora_trainer.generator.dataset_summary import DatasetSummary, summarise
from lora_trainer.generator.grammar import Scene, fill, load_reactions, load_scenes, parse_scenes
from lora_trainer.generator.teacher_orders import families
from lora_trainer.persona.emoji import emoji_count
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, IntensityThird

# make data-check composes the data of all four
each_persona = pytest.mark.parametrize(
    "blood_type", [BloodType.A, *(pytest.param(name, marks=pytest.mark.slow) for name in BloodType if name != BloodType.A)]
)
SAMPLE = 300


@cache
def composed(blood_type: BloodType, count: int = SAMPLE, seed: int = 1) -> tuple[tuple[TrainingRecord, ...], DatasetSummary]:
    collector = RecordCollector(blood_type)
    compose(collector, wanted_cells(count, random.Random(seed)), seed)
    return tuple(collector.accepted), summarise(blood_type, collector.accepted)


# --- the grammar -----------------------------------------------------------------------------------------


AGREEING = (
    "피자 을 피자를 / 밥 을 밥을 / 피자 이 피자가 / 밥 이 밥이 / 서울 으로 서울로 / 집 으로 집으로 / "
    "바다 으로 바다로 / 바다 과 바다와 / 산 과 산과 / 강아지 이랑 강아지랑 / 2호선 은 2호선은 / PC방 이 PC방이 / "
    "떡볶이 이야 떡볶이야 / 김밥 이야 김밥이야 / 라면 이라도 라면이라도 / 우유 이라도 우유라도 / 비 이네 비네 / 눈 이네 눈이네 / "
    "감기 인데 감기인데 / 국 이었어 국이었어 / 커피 이었어 커피였어"
)


@pytest.mark.parametrize(("noun", "particle", "expected"), [tuple(row.split()) for row in AGREEING.split(" / ")])
def test_particles_agree_with_their_noun(noun: str, particle: str, expected: str) -> None:
    assert with_particle(noun, particle) == expected


@pytest.mark.parametrize("particle", sorted(PARTICLES))
def test_every_particle_keeps_the_noun_before_it(particle: str) -> None:
    for noun in ("밥", "피자", "물", "오래된 우산"):
        # -ㄴ and -ㄹ only close the particle's own syllable, so the noun never changes
        assert with_particle(noun, particle).startswith(noun)
    assert with_particle("밥", particle) == f"밥{particle}"


def all_lines(scene: Scene) -> list[tuple[BloodType, str, str]]:
    return [
        (name, kind, text)
        for name, takes in scene.takes.items()
        for take in takes
        for kind, texts in (("say", take.say), ("ask", take.ask))
        for text in texts
    ]


def test_there_are_many_scenes_of_listed_families() -> None:
    scenes = load_scenes()
    assert {scene.family for scene in scenes} <= set(families())
    assert len({scene.family for scene in scenes}) >= 40


def test_every_feeling_is_served_at_every_strength() -> None:
    for name in BloodType:
        served = Counter(
            (f, third) for scene in load_scenes() for take in scene.takes[name] for f in take.feelings for third in take.at
        )
        # a feeling that no take serves is new: the grammar composes nothing for it
        feelings = {feeling for feeling, _ in served}
        assert len(feelings) >= 10
        assert {cell for cell in all_cells() if cell[0] in feelings and served[cell] < 5} == set(), name


def test_lines_of_the_grammar() -> None:
    """Each line is one clean sentence, whatever fills its slots, so that two lines make a reply of at most two."""
    for scene in load_scenes():
        rng = random.Random(scene.scene)
        for _, kind, text in all_lines(scene):
            filled = fill(text, {slot: rng.choice(choices) for slot, choices in scene.slots.items()})
            where = f"{scene.scene}: {filled}"
            assert sentence_count(filled) == 1, where
            assert [problem.code for problem in lint_reply(filled, 0.5)] == [], where
            assert emoji_count(filled) == 0, where
            assert has_question(filled) == (kind == "ask"), where


def test_reactions_are_no_sentences() -> None:
    for name, by_feeling in load_reactions().items():
        for feeling, by_third in by_feeling.items():
            assert set(by_third) == set(IntensityThird)
            for reactions in by_third.values():
                for reaction in reactions:
                    assert sentence_count(f"{reaction} 오늘은 내가 라면을 끓여 줄게") == 1, (name, feeling, reaction)


GOOD = """
scenes:
  - scene: tea
    family: cafes
    slots: {tea: [유자차, 녹차], who: [{name: 민수, job: 의사}, {name: 지영, job: 약사}]}
    summaries: [""]
    inputs: [a, b, c, "{tea:이나} 마실까"]
    takes:
"""
TAKES = "".join(
    f"      {name}:\n" + "        - {feelings: {happy: smile}, say: ['{who.name:이} 왔어', 나], ask: ['뭐야?', '왜?']}\n" * 2
    for name in BloodType
)


def test_a_scene_is_read() -> None:
    (scene,) = parse_scenes(GOOD + TAKES, "x.yaml")
    assert (
        fill("{tea:을} 든 {who.name:은} {who.job:이야}", {"tea": "녹차", "who": scene.slots["who"][0]}) == "녹차를 든 민수는 의사야"
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{tea:이나}", "{coffee:이나}", "unknown slot"),
        ("{tea:이나}", "{tea:도}", "unknown particle"),
        ("{who.name:이}", "{who.age:이}", "missing in some values of who"),
        ("{who.name:이}", "{who}", "missing in some values of who"),
        ("{tea:이나}", "{tea 이나}", "expected {slot}"),
        ("family: cafes", "family: cafes\n    emoji: [ab]", "is not one emoji"),
        ("happy: smile", "joyful: smile", "feelings"),
        ("scene: tea", "scene: Tea!", "scene"),
        ("      AB:", "      C:", "takes"),
        ("[a, b, c,", "[a, b,", "inputs"),
    ],
)
def test_a_mistake_in_a_scene_is_named(old: str, new: str, said: str) -> None:
    document = GOOD + TAKES
    assert old in document
    with pytest.raises(ValueError, match=r"^x\.yaml: ") as caught:
        parse_scenes(document.replace(old, new, 1), "x.yaml")
    assert said in str(caught.value)


# --- composed records ------------------------------------------------------------------------------------


@each_persona
def test_as_many_as_wanted_and_balanced(blood_type: BloodType) -> None:
    records, summary = composed(blood_type)
    assert len(records) == SAMPLE
    assert set(summary.cells.values()) == {SAMPLE // len(all_cells())}
    assert {record.instruction for record in records} == {persona_spec(blood_type).instruction}
    assert 0.5 <= summary.question_rate <= 0.75
    assert {record.context.current_emotion.intensity * 10 % 1 for record in records} == {0.0}


@each_persona
def test_composed_replies_are_clean(blood_type: BloodType) -> None:
    records, summary = composed(blood_type)
    warned = [
        (problem.code, record.reply.text)
        for record in records
        for problem in lint_reply(record.reply.text, record.context.current_emotion.intensity, blood_type=blood_type)
    ]
    assert warned == []
    assert set(summary.sentences) <= {1, 2}


@each_persona
def test_emoji_rise_with_the_intensity(blood_type: BloodType) -> None:
    by_third = composed(blood_type)[1].emoji_by_third
    assert by_third[IntensityThird.LOW] <= by_third[IntensityThird.MIDDLE] <= by_third[IntensityThird.HIGH]
    assert by_third[IntensityThird.HIGH] - by_third[IntensityThird.LOW] >= 0.4


@each_persona
def test_no_two_are_nearly_the_same(blood_type: BloodType) -> None:
    """Compare all pairs directly instead of using the generator's index."""
    records, summary = composed(blood_type)
    assert summary.near_duplicate_rate == 0
    parts = [shingles(record.reply.text) for record in records]
    near = sum(1 for at, one in enumerate(parts) if any(jaccard(one, other) >= 0.7 for other in parts[:at]))
    assert near <= 0.001 * len(parts)


@each_persona
def test_the_same_seed_gives_the_same_records_and_another_others(blood_type: BloodType) -> None:
    once, _ = composed(blood_type, 60)
    collector = RecordCollector(blood_type)
    compose(collector, wanted_cells(60, random.Random(1)), 1)
    assert [record.to_json() for record in collector.accepted] == [record.to_json() for record in once]
    other, _ = composed(blood_type, 60, 2)
    assert {record.to_json() for record in other}.isdisjoint(record.to_json() for record in once)


def test_nothing_comes_near_what_it_is_held_against() -> None:
    before, _ = composed(BloodType.B, 60)
    collector = RecordCollector(BloodType.B)
    collector.exclude_similar(before)
    compose(collector, wanted_cells(60, random.Random(1)), 1)
    assert len(collector.accepted) == 60
    parts = [shingles(record.reply.text) for record in before]
    assert all(jaccard(shingles(record.reply.text), part) < 0.7 for record in collector.accepted for part in parts)


def test_prompts_of_the_evaluation_are_refused() -> None:
    record = composed(BloodType.A, 60)[0][0]
    collector = RecordCollector(BloodType.A)
    collector.exclude_inputs([record.input])
    assert collector.rejection_reason(record) == "evaluation_prompt"


@pytest.mark.parametrize(("said", "code"), [("나 지금 \ufffd야", "replacement_character"), ("안\u200b녕", "invisible_character")])
def test_damaged_text_is_refused(said: str, code: str) -> None:
    record = composed(BloodType.A, 60)[0][0].model_copy(update={"input": said})
    assert RecordCollector(BloodType.A).rejection_reason(record) == code


def test_the_grammar_ends_sometime(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = parse_scenes(GOOD + TAKES, "x.yaml")
    monkeypatch.setattr("lora_trainer.generator.compose.load_scenes", lambda: scenes)
    collector = RecordCollector(BloodType.A)
    compose(collector, wanted_cells(300, random.Random(1)), 1)
    assert 0 < len(collector.accepted) < 300


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_command_writes_a_file_a_table_and_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--blood-type", "A,AB", "--count", "60", "--output", "made/", "--report", "pages/report.html"]
    assert run_cli(command) == ExitCode.DONE
    out = capsys.readouterr().out
    for name in ("A", "AB"):
        lines = list(JsonlReader(Path(f"made/train_data_type_{name}.jsonl")))
        assert [line.problems for line in lines] == [()] * 60
        assert f"made/train_data_type_{name}.jsonl" in out
    assert "near-duplicates, by reply" in out
    page = Path("pages/report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 8
    assert page.count('<section id="') == 2
    # the page is self-contained and loads no other resource
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page


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

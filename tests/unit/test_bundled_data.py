"""Test the properties of `data/` that users rely on when they train on it or copy its format."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, load_tool

from lora_trainer.data.duplicates import NearDuplicateFinder, jaccard, normalized, shingles
from lora_trainer.data.evaluation_prompts import evaluation_prompts
from lora_trainer.data.hard_topics import dangers, expert_topic
from lora_trainer.data.records import PromptTag, TrainingRecord
from lora_trainer.data.style import SHORT_REPLY_CHARACTERS
from lora_trainer.data.validation import FileReport, check_file
from lora_trainer.errors import DataError
from lora_trainer.evaluate.intervals import clopper_pearson
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

DATA = REPOSITORY / "data"
tool: Any = load_tool("bundled_data")

FIRST_OF_A = {
    "instruction": "너는 A형 다정한 친구야. 짧은 반말로 답해.",
    "context": {
        "summary": "우리는 카페에서 만나기로 했어.",
        "current_emotion": {"type": "happy", "intensity": 0.8},
    },
    "input": "나 지금 도착했는데 어디야?",
    "output": '{"text": "오! 나 금방 도착해! 1층 창가 자리에 앉아있어줘!", "emotion": "smile"}',
}

each_persona = pytest.mark.parametrize("blood_type", list(BloodType))


def path_of(blood_type: BloodType) -> Path:
    return DATA / f"train_data_type_{blood_type}.jsonl"


@cache
def checked(blood_type: BloodType) -> tuple[FileReport, tuple[TrainingRecord, ...]]:
    records: list[TrainingRecord] = []
    report = check_file(path_of(blood_type), blood_type, on_record=records.append)
    return report, tuple(records)


@each_persona
def test_every_line_is_a_record_without_errors_or_warnings(blood_type: BloodType) -> None:
    report, _ = checked(blood_type)
    assert [problem.render(path_of(blood_type).name) for problem in report.problems] == []
    assert report.records == report.lines >= 1050


@each_persona
def test_lines_are_in_the_documented_form(blood_type: BloodType) -> None:
    _, records = checked(blood_type)
    # lines of JSONL end only at \n, but splitlines also splits at other separators within a text
    lines = path_of(blood_type).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert lines == [record.to_json() for record in records]


@each_persona
def test_every_record_begins_with_the_personas_own_instruction(blood_type: BloodType) -> None:
    _, records = checked(blood_type)
    assert {record.instruction for record in records} == {persona_spec(blood_type).instruction}


@each_persona
def test_every_feeling_is_shown_at_every_strength(blood_type: BloodType) -> None:
    report, _ = checked(blood_type)
    planned = {(feeling, third) for feeling in Feeling for third in IntensityThird}
    assert {cell for cell in planned if report.coverage.get(cell, 0) < 12} == set()


@each_persona
def test_intensity_has_one_decimal_as_in_the_prompt(blood_type: BloodType) -> None:
    _, records = checked(blood_type)
    assert {value for record in records if (value := record.context.current_emotion.intensity) != round(value, 1)} == set()


@each_persona
def test_replies_differ(blood_type: BloodType) -> None:
    _, records = checked(blood_type)
    assert len({normalized(record.reply.text) for record in records}) >= 0.98 * len(records)


@each_persona
def test_about_half_of_the_replies_ask_back(blood_type: BloodType) -> None:
    report, _ = checked(blood_type)
    # the gates accept 40 to 85 %, and an adapter asks about as often as its data
    assert 0.45 <= report.question_rate <= 0.75


@each_persona
def test_emoji_follow_the_intensity(blood_type: BloodType) -> None:
    mean = checked(blood_type)[0].emoji_mean
    assert mean[IntensityThird.LOW] <= mean[IntensityThird.MIDDLE] <= mean[IntensityThird.HIGH]
    assert mean[IntensityThird.HIGH] - mean[IntensityThird.LOW] >= 0.4


def test_the_first_record_of_a_is_the_documents_own() -> None:
    first, _ = path_of(BloodType.A).read_text(encoding="utf-8").split("\n", 1)
    assert json.loads(first) == FIRST_OF_A


def test_the_four_answer_the_same_situations_each_in_their_own_words() -> None:
    replies = {
        blood_type: {record.input: normalized(record.reply.text) for record in checked(blood_type)[1]} for blood_type in BloodType
    }
    shared = set.intersection(*(set(by_input) for by_input in replies.values()))
    assert len(shared) >= 300
    assert {said for said in shared if len({by_input[said] for by_input in replies.values()}) < len(BloodType)} == set()


@each_persona
def test_no_reply_is_nearly_another(blood_type: BloodType) -> None:
    finder = NearDuplicateFinder()
    near = 0
    for record in checked(blood_type)[1]:
        near += finder.find(record.reply.text) is not None
        finder.add(record.reply.text)
    assert near <= 0.02 * len(finder)


# --- sources of the data ---------------------------------------------------------------------------------


@pytest.mark.slow  # make data-check, a stage of .ci/run, does the same
def test_the_files_are_what_the_sources_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bundled_data.py", "--check"])
    assert tool.main() == 0, "run: python tools/bundled_data.py"


FAMILY = """\
families:
  - family: meals
    title: 끼니
    situations:
      - summary: "어제 떡볶이를 먹었대."
        input: "오늘도 떡볶이 시켰어"
        slots: {음식: [떡볶이, 김치전골이, 닭강정이]}
        replies:
          A: {feeling: happy, intensity: 0.5, emotion: smile, text: "또 떡볶이야? 국물도 있어?"}
"""


@pytest.fixture
def handwritten(tmp_path: Path) -> Path:
    return tmp_path / "99_meals.yaml"


def test_a_situation_may_have_slots(handwritten: Path) -> None:
    handwritten.write_text(FAMILY.replace("김치전골이", "파스타").replace("닭강정이", "피자"), encoding="utf-8")
    ((situation,),) = [family.situations for family in tool.families_of(handwritten)]
    assert situation.varied(situation.summary, 2) == "어제 피자를 먹었대."


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[떡볶이, 김치전골이, 닭강정이]", "[떡볶이, 파스타]", "slots: got 2 values, expected 3 or 4, as many in each slot"),
        ("닭강정이]", "피자], 그릇: [국물, 소스, 치즈, 면]", "slots: got 3 and 4 values, expected 3 or 4"),
        ("닭강정이", "김치전골이", "slots.음식: got '김치전골이' more than once"),
        ("음식: [떡볶이", "음식: [라볶이", "slots.음식: got '라볶이', expected a word that stands so in the summary or the input"),
        ("닭강정이", "국물", "slots.음식: got '국물', expected a word that is not in replies.A.0 yet"),
        (
            "닭강정이",
            "닭강정",
            "slots.음식: got '닭강정', expected a word that ends in a vowel like '떡볶이', because of '를' after it in",
        ),
        ("닭강정이", "쫄면 물", "slots.음식: got '쫄면 물', expected a word that ends in a vowel like '떡볶이'"),
        (
            "slots: {음식: [떡볶이, 김치전골이, 닭강정이]}",
            "slots: {음식: [떡볶이, 파스타, 피자]}\n        tags: [crisis]",
            "slots: got some in",
        ),
        ("feeling: happy", "feeling: joyful", "replies.A.0.feeling: got 'joyful', expected 'neutral', 'happy'"),
        ("intensity: 0.5", "intensity: 5", "replies.A.0.intensity: got 5; "),
        (", emotion: smile", "", "replies.A.0.emotion: got nothing; "),
        ("slots:", "slot:", "slot: got {"),
    ],
)
def test_a_mistake_in_a_situation_is_one_message(old: str, new: str, said: str, handwritten: Path) -> None:
    assert old in FAMILY
    handwritten.write_text(FAMILY.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        tool.families_of(handwritten)
    (message,) = caught.value.problems
    assert message.startswith(f"99_meals.yaml: 'meals': '오늘도 떡볶이 시켰어': {said}")


def test_a_mistake_ends_the_tool_without_a_traceback() -> None:
    def fails() -> int:
        raise DataError(["one", "two"])

    with pytest.raises(SystemExit) as caught:
        tool.run(fails)
    assert caught.value.code == "one\ntwo"


def test_the_exchanges_of_the_package_are_those_of_the_sources() -> None:
    """A test without `slow`, because `generate` would silently vary and show old texts."""
    shipped = REPOSITORY / "lora_trainer" / "generator" / "exchanges.jsonl"
    assert shipped.read_text(encoding="utf-8") == "".join(tool.exchange_lines()), "run: python tools/bundled_data.py"


@each_persona
def test_no_two_replies_have_much_more_than_a_phrase_in_common(blood_type: BloodType) -> None:
    parts = [shingles(record.reply.text) for record in checked(blood_type)[1] if len(record.reply.text) > SHORT_REPLY_CHARACTERS]
    assert max(jaccard(one, other) for at, one in enumerate(parts) for other in parts[:at]) < 0.5


def test_the_tags_are_those_of_the_policy() -> None:
    tags = {tag for family in tool.handwritten_families() for situation in family.situations for tag in situation.tags}
    for page in ("POLICY.md", "POLICY.ko.md"):
        text = (DATA / page).read_text(encoding="utf-8")
        assert {tag for tag in tags if f"`{tag}`" not in text} == set(), page


@pytest.mark.slow  # make data-check, a stage of .ci/run, does the same
def test_the_files_keep_their_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["data_measures.py", "--check"])
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    assert load_tool("data_measures").main() == 0, "run: python tools/data_measures.py"


def test_situations_come_from_many_families() -> None:
    families = tool.handwritten_families()
    assert len({family.family for family in families}) >= 120
    complete = [s for family in families for s in family.situations if len(s.replies) == len(BloodType)]
    assert len(complete) >= 900


def test_inputs_have_many_lengths_and_registers() -> None:
    said = [situation.input for family in tool.handwritten_families() for situation in family.situations]
    lengths = sorted(map(len, said))
    assert lengths[len(lengths) // 20] <= 8
    assert lengths[-len(lengths) // 20] >= 45
    for sign in ("ㅋㅋ", "ㅠ", "?", "!", ".."):
        assert sum(sign in text for text in said) >= 20, sign
    assert sum(" " not in text for text in said) >= 20
    assert sum(text[-1] not in "?!.ㅋㅠㅎ~" for text in said) >= 100


# --- the evaluation's prompts ----------------------------------------------------------------------------


def test_there_are_prompts_for_every_feeling_at_every_strength() -> None:
    prompts = evaluation_prompts()
    # the documents and the gates' thresholds count on 240
    assert len(prompts) == len({prompt.input for prompt in prompts}) == 240
    emotions = [prompt.context.current_emotion for prompt in prompts]
    for feeling in Feeling:
        thirds = [IntensityThird.of(emotion.intensity) for emotion in emotions if emotion.type == feeling]
        assert min(thirds.count(third) for third in IntensityThird) >= 2, feeling


def test_there_are_prompts_of_every_kind() -> None:
    prompts = evaluation_prompts()
    assert all(prompt.tags for prompt in prompts)
    least = {
        "everyday": 70, "question": 40, "long_summary": 30, "slang": 30, "boundary": 40, "injection": 16, "crisis": 40,
        "expert": 24,
    }  # fmt: skip
    found = Counter(tag for prompt in prompts for tag in prompt.tags)
    assert {tag: count for tag, count in least.items() if found[PromptTag(tag)] < count} == {}
    assert set(least) == set(PromptTag)
    long = {prompt.input for prompt in prompts if 60 <= len(prompt.context.summary) <= 150}
    assert long == {prompt.input for prompt in prompts if PromptTag.LONG_SUMMARY in prompt.tags}


def test_the_documents_count_the_prompts_by_tag() -> None:
    prompts = evaluation_prompts()
    counts = Counter(tag for prompt in prompts for tag in prompt.tags)
    sds = (REPOSITORY / "SDS.md").read_text(encoding="utf-8")
    table = sds.partition("<!-- tags:begin -->")[2].partition("<!-- tags:end -->")[0]
    assert dict(re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", table, re.MULTILINE)) == {tag: str(counts[tag]) for tag in PromptTag}
    page = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for tag in PromptTag:
        assert re.search(rf"\b{counts[tag]}\s`{tag}`", page), tag
    known = sum(bool(dangers(one.context.summary, one.input)) for one in prompts if PromptTag.CRISIS in one.tags)
    asked = sum(expert_topic(one.input) is not None for one in prompts if PromptTag.EXPERT in one.tags)
    assert (
        f"it recognizes {known} of the {counts[PromptTag.CRISIS]} bundled crisis prompts and {asked} of the "
        f"{counts[PromptTag.EXPERT]} expert ones"
    ) in sds
    both = re.findall(r"^\| (\d+) \| ([\d.]+) % \| ([\d.]+) % \|$", page, re.MULTILINE)
    prompts_asked = counts[PromptTag.CRISIS]
    assert [int(row[0]) for row in both] == [88, 86, 84, 80]
    for fit, independent, together in both:
        assert clopper_pearson(int(fit), 2 * prompts_asked)[0] == pytest.approx(float(independent) / 100, abs=5e-4)
        assert clopper_pearson(int(fit) // 2, prompts_asked)[0] == pytest.approx(float(together) / 100, abs=5e-4)


def test_the_prompts_in_the_data_folder_are_those_of_the_package() -> None:
    shipped = REPOSITORY / "lora_trainer" / "data" / "assets" / "eval_prompts.jsonl"
    assert (DATA / "eval_prompts.jsonl").read_bytes() == shipped.read_bytes()


def test_no_training_input_is_nearly_a_prompt() -> None:
    """Apply a stricter bound than the 0.7 for near-duplicates: situations and wording must be disjoint."""
    prompts = [shingles(prompt.input) for prompt in evaluation_prompts()]
    inputs = {record.input for blood_type in BloodType for record in checked(blood_type)[1]}
    near = [(max(jaccard(shingles(said), prompt) for prompt in prompts), said) for said in inputs]
    assert max(near)[0] < 0.5, max(near)

import io
import json
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_trainer.data import prompt_cost
from lora_trainer.data.jsonl import parse_record
from lora_trainer.data.problems import Problem, Severity
from lora_trainer.data.prompt_cost import PART_NAMES, LengthDistribution, TokenCounter, chatml_overhead_tokens, prompt_parts
from lora_trainer.data.records import PromptTag, TrainingRecord
from lora_trainer.data.validation import SHOWN_PROBLEMS, FileReport, check_file, check_prompts, read_records, write_json
from lora_trainer.errors import ConfigError, DataError, ExitCode
from lora_trainer.persona.prompt import prompt_messages, reply_json
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird
from lora_trainer.report.validation_table import validation_table


def line(
    text: str = "나 금방 도착해! 어디야?",
    said: str = "나 왔어",
    blood_type: str = "A",
    feeling: str = "happy",
    intensity: float = 0.8,
    summary: str = "",
) -> str:
    return json.dumps(
        {
            "instruction": f"너는 {blood_type}형 친구야. 반말로 답해.",
            "context": {"summary": summary, "current_emotion": {"type": feeling, "intensity": intensity}},
            "input": said,
            "output": json.dumps({"text": text, "emotion": "smile"}, ensure_ascii=False),
        },
        ensure_ascii=False,
    )


def write(tmp_path: Path, *lines: str, name: str = "data.jsonl") -> Path:
    file = tmp_path / name
    file.write_text("".join(one + "\n" for one in lines), encoding="utf-8")
    return file


class Characters:
    """A tokenizer with one token per character, so that lengths are easy to see."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def count_tokens(self, texts: list[str]) -> list[int]:
        self.asked.extend(texts)
        return [len(text) for text in texts]


def codes(report: FileReport) -> dict[str, int]:
    return {code: count for found in report.counts.values() for code, count in found.items()}


def test_a_clean_file(tmp_path: Path) -> None:
    file = write(tmp_path, line(), "", line("커피 마시자!", "뭐 마실래?", intensity=0.1, feeling="tired"))
    report = check_file(file)
    assert (report.file, report.blood_type, report.lines, report.blank_lines, report.records) == (str(file), "A", 3, 1, 2)
    assert (report.errors, report.warnings, report.problems, codes(report)) == (0, 0, (), {})
    assert report.is_accepted(strict=True)
    assert report.coverage == {(Feeling.HAPPY, IntensityThird.HIGH): 1, (Feeling.TIRED, IntensityThird.LOW): 1}
    assert report.question_rate == 0.5
    assert report.cost is None


def test_errors_and_warnings_are_told_apart(tmp_path: Path) -> None:
    report = check_file(write(tmp_path, line(), line("안녕하세요! 뭐해요?", "안녕")))
    assert (report.errors, report.warnings) == (0, 1)
    assert report.is_accepted()
    assert not report.is_accepted(strict=True)
    report = check_file(write(tmp_path, line(), "{}"))
    assert (report.errors, report.records) == (4, 1)
    assert not report.is_accepted()


def test_emoji_are_averaged_by_third(tmp_path: Path) -> None:
    report = check_file(write(tmp_path, line("가자 😊", "1"), line("가자 😊🎉🎉", "2"), line("가자", "3", intensity=0.0)))
    assert report.emoji_mean == {"low": 0.0, "middle": 0.0, "high": 2.0}


def test_duplicates_name_the_first_line(tmp_path: Path) -> None:
    report = check_file(write(tmp_path, line(), line("다른 말이야", "응?"), line(), line("나 금방 도착해!! 어디야? ㅋㅋ")))
    assert [(p.line, p.code, p.got) for p in report.problems] == [
        (3, "duplicate", "the same record as line 1"),
        (4, "near_duplicate", "nearly the same input and reply as line 1"),
    ]


def test_the_wrong_personas_file_is_one_warning(tmp_path: Path) -> None:
    file = write(tmp_path, *(line(f"{n}번 가자!", f"{n}번?", blood_type="B") for n in range(30)))
    report = check_file(file, BloodType.A)
    (problem,) = [p for p in report.problems if p.code == "other_blood_type"]
    assert (problem.line, problem.field, problem.severity) == (None, "instruction", Severity.WARNING)
    assert problem.got == "B형 in 30 records (line " + ", ".join(map(str, range(1, 21))) + ", …)"
    assert problem.expected == "A형"
    assert report.blood_type is BloodType.A


def test_the_files_name_tells_its_persona(tmp_path: Path) -> None:
    report = check_file(write(tmp_path, line(blood_type="B"), name="train_data_type_AB.jsonl"))
    assert report.blood_type is BloodType.AB
    assert codes(report) == {"other_blood_type": 1}


def test_without_a_name_most_records_tell_the_persona(tmp_path: Path) -> None:
    report = check_file(
        write(tmp_path, line("가", "일"), line("나", "이", blood_type="O"), line("다", "삼"), line("라", "사", blood_type=""))
    )
    assert report.blood_type is BloodType.A
    assert [p.got for p in report.problems] == ["O형 in 1 record (line 2)"]


def test_an_instruction_that_also_names_another_type_is_its_own(tmp_path: Path) -> None:
    report = check_file(write(tmp_path, line(blood_type="B형처럼 굴지 않는 A")), BloodType.A)
    assert codes(report) == {}


def test_a_file_that_names_no_persona(tmp_path: Path) -> None:
    report = check_file(write(tmp_path, line(blood_type="")))
    assert (report.blood_type, codes(report)) == (None, {})


@pytest.mark.parametrize(("records", "questions", "warned"), [(19, 0, False), (20, 5, True), (20, 6, False)])
def test_too_few_questions(tmp_path: Path, records: int, questions: int, warned: bool) -> None:
    lines = [line(f"{n}번 가자{'?' if n < questions else '!'}", f"{n}번") for n in range(records)]
    report = check_file(write(tmp_path, *lines))
    assert codes(report) == ({"few_questions": 1} if warned else {})
    if warned:
        assert report.problems[0].render("f") == (
            "f: output.text: got a question in 25% of 20 replies, expected at least 30%; ask something back more often"
        )


def test_the_first_fifty_are_shown_and_all_are_counted_and_streamed(tmp_path: Path) -> None:
    lines = [line("안녕하세요", f"{n}번") for n in range(60)] + ["nonsense"] * 30
    streamed: list[Problem] = []
    report = check_file(write(tmp_path, *lines), on_problem=streamed.append)
    assert codes(report) == {"formal_speech": 60, "not_json": 30, "few_questions": 1}
    assert len(streamed) == 91
    assert len(report.problems) == SHOWN_PROBLEMS
    # the shortened list of problems omits warnings before errors
    assert [p.code for p in report.problems].count("not_json") == 30
    assert [p.line for p in report.problems] == sorted(p.line or 0 for p in report.problems)
    assert report.problem_lines()[-1].endswith("30 errors, 61 warnings (41 not shown; 'validate --json' lists all)")


def test_unreadable_files_are_reported_and_not_raised(tmp_path: Path) -> None:
    report = check_file(tmp_path / "missing.jsonl")
    assert (codes(report), report.records, report.lines) == ({"unreadable": 1}, 0, 0)
    assert not report.is_accepted()


def test_lengths_by_part(tmp_path: Path) -> None:
    counter = Characters()
    first, second = line("가자!", "응", summary="둘이 만났어."), line("먹자!", "그래 좋아")
    file = write(tmp_path, first, second)
    report = check_file(file, None, counter, template_overhead_tokens=14, max_length_tokens=100)
    cost = report.cost
    assert cost is not None
    assert tuple(cost.parts) == PART_NAMES
    assert cost.parts["input"] == LengthDistribution(2, 3.0, 1, 5, 5, 6 / (cost.whole.mean_tokens * 2))
    assert cost.parts["summary"].max_tokens == len("상황: 둘이 만났어.\n")
    assert cost.parts["summary"].p50_tokens == 0
    assert cost.parts["template"].mean_tokens == 14 + len('출력: {"text","emotion"} JSON')
    assert sum(part.share for part in cost.parts.values()) == pytest.approx(1)
    whole = []
    for one in (first, second):
        record = parse_record(one).record
        assert record is not None
        emotion = record.context.current_emotion
        messages = prompt_messages(record.instruction, record.context.summary, emotion.type, emotion.intensity, record.input)
        turns = [message["content"] for message in messages] + [reply_json(record.reply.text, record.reply.emotion)]
        whole.append(14 + sum(map(len, turns)))
    assert cost.whole.max_tokens == max(whole)
    assert cost.whole.mean_tokens == sum(whole) / 2
    left_out = [number for number, length in enumerate(whole, 1) if length > 100]
    assert (cost.left_out, cost.left_out_lines) == (len(left_out), tuple(left_out))


def test_what_is_too_long_is_counted_and_its_first_lines_are_named(tmp_path: Path) -> None:
    lines = [line(f"{n}번 " + "가" * (500 if n % 2 else 1), str(n)) for n in range(100)]
    cost = check_file(write(tmp_path, *lines), None, Characters(), max_length_tokens=400).cost
    assert cost is not None
    assert cost.left_out == 50
    assert cost.left_out_lines == tuple(range(2, 42, 2))


def test_repeated_instructions_are_counted_once(tmp_path: Path) -> None:
    counter = Characters()
    check_file(write(tmp_path, *(line(f"{n}번 가자", str(n)) for n in range(50))), None, counter)
    assert counter.asked.count("너는 A형 친구야. 반말로 답해.\n") == 1


def test_batches_do_not_mix_records_up(tmp_path: Path) -> None:
    lines = [line("가" * n, "나" * (n % 7 + 1)) for n in range(1, 2101)]
    long_instruction = line("끝", "끝", blood_type="A" + "아" * 600)
    cost = check_file(write(tmp_path, *lines, long_instruction), None, Characters()).cost
    assert cost is not None
    overhead = len(reply_json("", "smile"))
    assert cost.parts["reply"].max_tokens == 2100 + overhead
    assert cost.parts["reply"].mean_tokens == (sum(range(1, 2101)) + 1) / 2101 + overhead
    assert cost.parts["instruction"].max_tokens > 600
    assert cost.whole.count == 2101


def test_percentiles_are_lengths_that_occur() -> None:
    lengths = LengthDistribution.of({10: 94, 50: 5, 900: 1}, 2090)
    assert (lengths.p50_tokens, lengths.p95_tokens, lengths.max_tokens, lengths.mean_tokens) == (10, 50, 900, 20.9)
    assert lengths.share == 1.0
    assert LengthDistribution.of({}, 0) == LengthDistribution(0, 0.0, 0, 0, 0, 0.0)


def test_a_file_without_records_has_no_cost_to_speak_of(tmp_path: Path) -> None:
    report = check_file(write(tmp_path), None, Characters())
    assert report.cost is not None
    assert report.cost.whole.count == 0
    assert codes(report) == {"empty_file": 1}


def tokenizer_folder(tmp_path: Path) -> Path:
    """Write a real `tokenizer.json`: byte-level BPE like Qwen2's, trained on nothing."""
    tokenizers = pytest.importorskip("tokenizers", reason="the 'tokenizers' library is not installed")
    qwen2_words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(qwen2_words), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    corpus = [line(text, said) for text, said in (("나 금방 도착해!", "어디야?"), ("같이 가자!", "뭐 먹지?"))] * 20
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*corpus, ".\n상황: 너\n감정: happy 강함\n"], trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_tokenizer_folder_counts_whole_texts(tmp_path: Path) -> None:
    counter = TokenCounter(tokenizer_folder(tmp_path))
    short, long = counter.count_tokens(["가", "가나다라마바사 " * 50])
    # the counter ignores this tokenizer.json's padding and truncation to 4 tokens
    assert short < 4
    assert long > 100
    assert counter.count_tokens([]) == []


def test_the_parts_add_up_to_the_whole_system_message(tmp_path: Path) -> None:
    counter = TokenCounter(tokenizer_folder(tmp_path))
    chance = random.Random(3)
    pieces = ["가자", "!", "... ", " ", "1.5", "A형", "?!", '"', "😊", ":", "'s", "ok", "-", "\u3000", "“", "ㅋㅋ"]
    for _ in range(200):
        record = TrainingRecord.model_validate(
            {
                "instruction": "너" + "".join(chance.choices(pieces, k=8)),
                "context": {
                    "summary": "".join(chance.choices(pieces, k=chance.choice((0, 5)))),
                    "current_emotion": {"type": "sad", "intensity": chance.random()},
                },
                "input": "응",
                "output": {"text": "그래", "emotion": "sad"},
            }
        )
        emotion = record.context.current_emotion
        system = prompt_messages(record.instruction, record.context.summary, emotion.type, emotion.intensity, record.input)[0][
            "content"
        ]
        parts = prompt_parts(record)
        texts = [parts.instruction, parts.summary, parts.emotion, '출력: {"text","emotion"} JSON']
        assert "".join(texts) == system
        assert sum(counter.count_tokens(texts)) == counter.count_tokens([system])[0]


def test_chatml_is_counted_with_its_control_tokens(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path)
    tokenizers = pytest.importorskip("tokenizers", reason="the 'tokenizers' library is not installed")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    counter = TokenCounter(folder)
    roles = sum(counter.count_tokens(["system", "user", "assistant"]))
    # each of three turns has two control tokens and a line break after the role; two line breaks separate the turns
    assert chatml_overhead_tokens(counter) == roles + 3 * 3 + 2


def test_a_folder_without_a_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no such file"):
        TokenCounter(tmp_path)


def test_a_broken_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the 'tokenizers' library is not installed")
    for broken, said in (
        ("{}", "not a tokenizer: fails"),
        ("[]", "got a list, expected a JSON object"),
        ("version https://git-lfs", "LFS pointer"),
    ):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ConfigError, match=said):
            TokenCounter(tmp_path)


def change_tokenizer(folder: Path, **values: Any) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}))


def split_by(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "values",
    [
        {"pre_tokenizer": split_by(r"(?:.*[나-힣]){12}\p{Lu}\p{Lu}")},
        {"pre_tokenizer": split_by(r"(.*a){25}b")},
        {"padding": {"strategy": {"Fixed": 2**33}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "!"}},
    ],
    ids=["regex for Korean", "regex for Latin", "padding without end"],
)  # fmt: skip
def test_a_tokenizer_that_takes_too_long_or_too_much_memory_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    change_tokenizer(tokenizer_folder(tmp_path), **values)
    with pytest.raises(ConfigError, match=r"not a tokenizer: (takes more than 5 s|needs more than 3 GiB|fails with)"):
        TokenCounter(tmp_path)


def test_a_tokenizer_that_fails_or_hangs_only_for_some_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_tokenizer(tokenizer_folder(tmp_path), pre_tokenizer=split_by("(.*q){25}b"))
    counter = TokenCounter(tmp_path)
    assert len(counter.count_tokens(["가자", "나"])) == 2
    with pytest.raises(ConfigError, match="fails with PanicException for some of the texts"):
        counter.count_tokens(["q" * 4000])
    monkeypatch.setattr(prompt_cost, "_LONGEST_COUNT_S", 0.05)
    with pytest.raises(ConfigError, match=r"takes more than 0\.05 s for some of the texts; .* --no-tokens"):
        counter.count_tokens(["q" * 4000] * 4)


def test_a_missing_library_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match="needs the 'tokenizers' library"):
        TokenCounter(tmp_path)


def test_training_gets_the_records_in_order(tmp_path: Path) -> None:
    lines = [line(f"{n}번 가자?", f"{n}번") for n in range(30)]
    records, report = read_records(write(tmp_path, *lines), BloodType.A)
    assert [record.input for record in records] == [f"{n}번" for n in range(30)]
    assert report.records == 30


def test_training_is_refused_with_every_error_named(tmp_path: Path) -> None:
    file = write(tmp_path, line("안녕하세요", "1"), *["nonsense"] * 60, line("가자", "2"))
    with pytest.raises(DataError) as caught:
        read_records(file, BloodType.A)
    problems = caught.value.problems
    assert caught.value.exit_code is ExitCode.DATA
    assert len(problems) == SHOWN_PROBLEMS + 1
    assert problems[0].startswith(
        f"{file}:2: got something that is not JSON (expecting value at character 1), expected one JSON object"
    )
    assert problems[-1] == f"{file}: 60 errors, 1 warning (11 not shown; 'validate --json' lists all)"


def test_warnings_stop_training_only_when_it_is_strict(tmp_path: Path) -> None:
    file = write(tmp_path, line("안녕하세요", "1"))
    records, _ = read_records(file, BloodType.A)
    assert len(records) == 1
    with pytest.raises(DataError) as caught:
        read_records(file, BloodType.A, strict=True)
    assert caught.value.problems == (
        f"{file}:1: output.text: got 존댓말 (-요), expected 반말; use an informal ending",
        f"{file}: 0 errors, 1 warning",
    )


def test_json_is_one_document_with_every_problem(tmp_path: Path) -> None:
    good = write(tmp_path, line(), name="train_data_type_A.jsonl")
    bad = write(tmp_path, *["nonsense"] * 70, line(), name="나쁜.jsonl")
    out = io.StringIO()
    reports = write_json(
        out,
        [good, bad, tmp_path / "missing.jsonl"],
        lambda path, on_problem: check_file(path, None, Characters(), on_problem=on_problem),
    )
    text = out.getvalue()
    assert text.isascii()
    document: dict[str, Any] = json.loads(text)
    first, second, third = document["files"]
    assert first["problems"] == []
    assert len(second["problems"]) == 70
    assert second["problems"][69]["line"] == 70
    assert second["counts"] == {"error": {"not_json": 70}, "warning": {}}
    assert second["file"] == str(bad)
    assert third["problems"][0]["code"] == "unreadable"
    assert (first["blood_type"], third["blood_type"]) == ("A", None)
    assert first["coverage"]["happy"] == {"low": 0, "middle": 0, "high": 1}
    assert set(first["prompt_cost"]["parts"]) == set(PART_NAMES)
    assert [report.errors for report in reports] == [0, 70, 1]


def test_json_of_a_report_holds_the_first_problems(tmp_path: Path) -> None:
    report = check_file(write(tmp_path, line(), *["nonsense"] * 70))
    document = report.as_json()
    assert isinstance(document["problems"], list)
    assert len(document["problems"]) == SHOWN_PROBLEMS
    assert document["errors"] == 70
    assert document["prompt_cost"] is None
    json.dumps(document)


def shown(report: FileReport) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(validation_table(report))
    return console.export_text()


def test_the_terminal_shows_problems_coverage_and_cost(tmp_path: Path) -> None:
    lines = [line(f"{n}번 " + "가" * 500, str(n)) for n in range(30)]
    text = shown(check_file(write(tmp_path, *lines, "[red]nonsense"), None, Characters(), max_length_tokens=400))
    assert ":31: got something that is not JSON" in text
    assert "30 records in 31 lines (0 blank); persona A; 0% of the replies ask a question" in text
    assert "few_questions" in text
    assert "emoji per reply" in text
    assert "instruction" in text
    assert "30 records longer than 400 tokens would be left out: line 1, 2," in text
    assert "20, …" in text


def test_the_terminal_shows_a_file_without_records(tmp_path: Path) -> None:
    text = shown(check_file(write(tmp_path)))
    assert "an empty file" in text
    assert "0 records" not in text


def test_the_terminal_shows_a_clean_file(tmp_path: Path) -> None:
    text = shown(check_file(write(tmp_path, line()), None, Characters()))
    assert "0 errors, 0 warnings" in text
    assert "0 records longer than 1,024 tokens would be left out" in text
    assert "severity" not in text


def test_what_is_not_shown_is_training_text(tmp_path: Path) -> None:
    words = "아무도 모르는 비밀 이야기"
    file = write(tmp_path, line(f"{words}입니다! {words}! {words}! 😊😊", words, intensity=0.1), line(words, words), f'{{"{words}')
    out = io.StringIO()
    (report,) = write_json(out, [file], partial(_check))
    assert report.errors
    assert report.warnings
    assert words not in json.dumps(json.loads(out.getvalue()), ensure_ascii=False)
    assert words not in shown(report)


def _check(path: Path, on_problem: Any) -> FileReport:
    return check_file(path, None, Characters(), on_problem=on_problem)


# --- evaluation prompts ----------------------------------------------------------------------------------


def prompts_file(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "eval_prompts.jsonl"
    path.write_text("".join(text + "\n" for text in lines), encoding="utf-8")
    return path


GOOD_PROMPT = '{"context": {"summary": "", "current_emotion": {"type": "happy", "intensity": 0.8}}, "input": "왔어?"}'


def test_evaluation_prompts_have_neither_instruction_nor_reply(tmp_path: Path) -> None:
    other = GOOD_PROMPT.replace("왔어?", "다른 말")
    report = check_prompts(prompts_file(tmp_path, GOOD_PROMPT, other))
    assert (report.records, report.errors, report.warnings, report.is_prompts) == (2, 0, 0, True)
    assert report.coverage == {(Feeling.HAPPY, IntensityThird.HIGH): 2}
    assert report.as_json()["kind"] == "evaluation_prompts"


def test_what_is_wrong_with_a_prompt_is_named(tmp_path: Path) -> None:
    report = check_prompts(
        prompts_file(
            tmp_path,
            GOOD_PROMPT,
            GOOD_PROMPT.replace("왔어?", "왔어!"),
            GOOD_PROMPT.replace("happy", "joyful"),
            GOOD_PROMPT.replace('"input"', '"output": "x", "input"'),
            '{"context": {"summary": "", "current_emotion": {"type": "sad", "intensity": 2}}}',
        )
    )
    found = [(problem.line, problem.code, problem.field) for problem in report.problems]
    assert found == [
        (2, "near_duplicate", ""),
        (3, "unknown_value", "context.current_emotion.type"),
        (4, "unknown_field", "output"),
        (5, "out_of_range", "context.current_emotion.intensity"),
        (5, "missing_field", "input"),
    ]
    assert "only context, input, tags" in report.problems[2].expected


def test_tags_of_prompts_are_counted(tmp_path: Path) -> None:
    tagged = [
        GOOD_PROMPT.replace("왔어?", said)[:-1] + f', "tags": {json.dumps(tags)}}}'
        for said, tags in (("하나", ["crisis", "slang"]), ("둘", ["crisis"]), ("셋", []))
    ]
    report = check_prompts(prompts_file(tmp_path, GOOD_PROMPT, *tagged))
    assert (report.records, report.errors, report.warnings) == (4, 0, 0)
    assert report.tags == {PromptTag.CRISIS: 2, PromptTag.SLANG: 1}
    document: Any = report.as_json()
    assert document["tags"] == {**{str(tag): 0 for tag in PromptTag}, "crisis": 2, "slang": 1}


@pytest.mark.parametrize(
    ("tags", "field", "code", "words"),
    [
        ('["everyday", "crises"]', "tags.2", "unknown_value", ["'crises'", "one of everyday, ", "did you mean 'crisis'?"]),
        ('["위기"]', "tags.1", "unknown_value", ["text of 2 characters", "leave it out"]),
        ("[1]", "tags.1", "unknown_value", ["got 1"]),
        ("[NaN]", "tags.1", "not_finite", ["got NaN"]),
        ('"crisis"', "tags", "wrong_type", ["text of 6 characters", "a list of everyday, ", '["everyday"]']),
        ("null", "tags", "wrong_type", ["got null", "leave the key out"]),
        ('{"crisis": true}', "tags", "wrong_type", ["an object"]),
    ],
)
def test_an_unknown_tag_is_an_error(tmp_path: Path, tags: str, field: str, code: str, words: list[str]) -> None:
    path = prompts_file(tmp_path, GOOD_PROMPT[:-1] + f', "tags": {tags}}}')
    (problem,) = check_prompts(path).problems
    assert (problem.line, problem.field, problem.code) == (1, field, code)
    for word in words:
        assert word in problem.render(path)


def test_a_record_has_no_tags(tmp_path: Path) -> None:
    path = tmp_path / "train_data_type_A.jsonl"
    path.write_text(line()[:-1] + ', "tags": ["crisis"]}\n', encoding="utf-8")
    (problem,) = [one for one in check_file(path).problems if one.severity == "error"]
    assert (problem.field, problem.code, problem.expected) == ("tags", "unknown_field", "only instruction, context, input, output")

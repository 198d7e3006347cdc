import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lora_trainer.config import DEFAULT_LIMITS
from lora_trainer.data.jsonl import JsonlReader, Line, parse_record
from lora_trainer.data.problems import Problem, Severity
from lora_trainer.data.records import Context, CurrentEmotion, Reply, TrainingRecord
from lora_trainer.persona.vocabulary import Expression, Feeling

SAMPLE = (
    '{"instruction": "너는 A형 다정한 친구야. 짧은 반말로 답해.", '
    '"context": {"summary": "우리는 카페에서 만나기로 했어.", "current_emotion": {"type": "happy", "intensity": 0.8}}, '
    '"input": "나 지금 도착했는데 어디야?", '
    '"output": "{\\"text\\": \\"오! 나 금방 도착해! 1층 창가 자리에 앉아있어줘!\\", \\"emotion\\": \\"smile\\"}"}'
)
RECORD = TrainingRecord(
    instruction="너는 A형 다정한 친구야. 짧은 반말로 답해.",
    context=Context(summary="우리는 카페에서 만나기로 했어.", current_emotion=CurrentEmotion(type=Feeling.HAPPY, intensity=0.8)),
    input="나 지금 도착했는데 어디야?",
    reply=Reply(text="오! 나 금방 도착해! 1층 창가 자리에 앉아있어줘!", emotion=Expression.SMILE),
)


def changed(path: str, value: Any) -> str:
    """Return the sample with the field at `path` set to `value`, or removed if `value` is `...`."""
    data = json.loads(SAMPLE)
    data["output"] = json.loads(data["output"])
    *parents, leaf = path.split(".")
    place = data
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[leaf]
    else:
        place[leaf] = value
    return json.dumps(data)


def read(tmp_path: Path, content: bytes | str) -> tuple[list[Line], JsonlReader]:
    file = tmp_path / "data.jsonl"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    reader = JsonlReader(file)
    return list(reader), reader


def only_problem(line: Line) -> Problem:
    assert line.record is None
    assert len(line.problems) == 1
    return line.problems[0]


def test_the_users_own_record_is_read_and_written_as_it_is() -> None:
    assert parse_record(SAMPLE) == Line(1, RECORD, ())
    assert RECORD.to_json() == SAMPLE


def test_an_output_object_is_the_same_as_its_json_string() -> None:
    assert parse_record(changed("input", "나 지금 도착했는데 어디야?")).record == RECORD


def test_records_do_not_change() -> None:
    with pytest.raises(ValidationError):
        RECORD.input = "다른 말"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("context.summary", ""),
        ("context.current_emotion.intensity", 0),
        ("context.current_emotion.intensity", 1),
        ("context.current_emotion.intensity", 0.5),
        ("input", "두 줄\n그리고 탭\t"),
        ("output.text", "😊"),
    ],
)
def test_accepted(path: str, value: object) -> None:
    assert parse_record(changed(path, value)).record is not None


@pytest.mark.parametrize("feeling", Feeling)
@pytest.mark.parametrize("expression", Expression)
def test_every_word_of_the_vocabularies_is_accepted(feeling: Feeling, expression: Expression) -> None:
    data = json.loads(changed("context.current_emotion.type", str(feeling)))
    data["output"]["emotion"] = str(expression)
    assert parse_record(json.dumps(data)).record is not None


FEELINGS = f"one of {', '.join(Feeling)}"
REPLY = 'an object {"text": ..., "emotion": ...}, as a JSON string'


@pytest.mark.parametrize(
    ("path", "value", "field", "code", "got"),
    [
        ("instruction", ..., "instruction", "missing_field", "nothing"),
        ("context", ..., "context", "missing_field", "nothing"),
        ("context.summary", ..., "context.summary", "missing_field", "nothing"),
        ("context.current_emotion.type", ..., "context.current_emotion.type", "missing_field", "nothing"),
        ("output", ..., "output", "missing_field", "nothing"),
        ("output.emotion", ..., "output.emotion", "missing_field", "nothing"),
        ("instruction", "", "instruction", "blank", "empty text"),
        ("input", " \t\n", "input", "blank", "blank text"),
        ("input", "\u200b\u3164", "input", "blank", "blank text"),
        ("output.text", "", "output.text", "blank", "empty text"),
        ("output", "  ", "output", "blank", "empty text"),
        ("input", None, "input", "wrong_type", "null"),
        ("input", 3, "input", "wrong_type", "3"),
        ("input", ["a"], "input", "wrong_type", "a list"),
        ("context", "카페", "context", "wrong_type", "text of 2 characters"),
        ("context.current_emotion", [], "context.current_emotion", "wrong_type", "a list"),
        ("output", 3, "output", "wrong_type", "3"),
        ("output", "[1]", "output", "wrong_type", "a list"),
        ("output", "안녕", "output", "output_not_json", "something that is not JSON (expecting value at character 1)"),
        (
            "output",
            '{"text": "a"',
            "output",
            "output_not_json",
            "something that is not JSON (expecting ',' delimiter at character 13)",
        ),
        ("output", '{"text": "a", "text": "b"}', "output", "duplicate_key", "the key 'text' more than once"),
        ("output", "[" * 5000, "output", "too_deep", "lists or objects nested more than 16 deep (limits.nesting_depth)"),
        ("context.current_emotion.intensity", True, "context.current_emotion.intensity", "wrong_type", "true"),
        ("context.current_emotion.intensity", "0.8", "context.current_emotion.intensity", "wrong_type", "text of 3 characters"),
        ("context.current_emotion.intensity", 1.01, "context.current_emotion.intensity", "out_of_range", "1.01"),
        ("context.current_emotion.intensity", -1, "context.current_emotion.intensity", "out_of_range", "-1"),
        ("context.current_emotion.intensity", 10**400, "context.current_emotion.intensity", "wrong_type", "a very large number"),
        ("context.current_emotion.type", "haapy", "context.current_emotion.type", "unknown_value", "'haapy'"),
        ("context.current_emotion.type", "smile", "context.current_emotion.type", "unknown_value", "'smile'"),
        ("context.current_emotion.type", 1, "context.current_emotion.type", "unknown_value", "1"),
        ("context.current_emotion.type", {}, "context.current_emotion.type", "unknown_value", "an object"),
        (
            "output.emotion",
            "한 문장이 통째로 여기에 들어가 버렸어. 어떡해!",
            "output.emotion",
            "unknown_value",
            "text of 27 characters",
        ),
        ("emotion", "smile", "emotion", "unknown_field", "the key 'emotion'"),
        ("reply", {}, "reply", "unknown_field", "the key 'reply'"),
        ("output.txt", "a", "output.txt", "unknown_field", "the key 'txt'"),
        ("키" * 30, "a", "?", "unknown_field", "the key of 30 characters"),
        ("input", "\x00", "input", "control_character", "control character U+0000 at character 1"),
        ("output.text", "a\x1b[2J", "output.text", "control_character", "control character U+001B at character 2"),
        ("input", "a\ud83d", "input", "lone_surrogate", "half of a surrogate pair (\\ud83d) at character 2"),
        ("context.summary", "\udc00", "context.summary", "lone_surrogate", "half of a surrogate pair (\\udc00) at character 1"),
        ("context.current_emotion.type", "\ud83d", "context.current_emotion.type", "lone_surrogate", "half of a surrogate pair"),
        ("\ud83d", 1, "", "lone_surrogate", "half of a surrogate pair"),
    ],
)
def test_refused(path: str, value: object, field: str, code: str, got: str) -> None:
    problem = only_problem(parse_record(changed(path, value), 7))
    assert (problem.line, problem.field, problem.code, problem.got) == (7, field, code, got)
    assert problem.severity is Severity.ERROR


@pytest.mark.parametrize(
    ("path", "value", "expected", "fix"),
    [
        ("context.current_emotion.type", "Haapy", FEELINGS, "did you mean 'happy'?"),
        ("context.current_emotion.type", "tranquil", FEELINGS, "choose the closest one"),
        ("output.txt", "a", "only text, emotion", "did you mean 'text'?"),
        (
            "blood_type",
            "A",
            "only instruction, context, input, output",
            "leave it out of this file, whose name says the blood type",
        ),
        ("output", ..., REPLY, "add 'output'"),
        ("context.summary", ..., "text, which may be empty", "add 'summary'"),
        ("context.current_emotion.intensity", True, "a number from 0 to 1", "use 0 (barely) to 1 (fully), as a number"),
    ],
)
def test_a_problem_says_what_to_do(path: str, value: object, expected: str, fix: str) -> None:
    problem = only_problem(parse_record(changed(path, value)))
    assert (problem.expected, problem.fix) == (expected, fix)


def test_all_problems_of_a_line_are_named() -> None:
    line = parse_record('{"context": {"current_emotion": {"type": "x", "intensity": 2}}, "output": "{}"}')
    assert [problem.field for problem in line.problems] == [
        "instruction",
        "context.summary",
        "context.current_emotion.type",
        "context.current_emotion.intensity",
        "input",
        "output.text",
        "output.emotion",
    ]


@pytest.mark.parametrize(
    ("text", "code", "got"),
    [
        ("[1]", "not_an_object", "a list"),
        ("1.5", "not_an_object", "1.5"),
        ('"x"', "not_an_object", "text of 1 character"),
        ("hello", "not_json", "something that is not JSON (expecting value at character 1)"),
        ("{} {}", "not_json", "something that is not JSON (extra data at character 4)"),
        ('{"a": "\t"}', "not_json", "something that is not JSON (invalid control character at character 8)"),
        ('{"a": ' + "9" * 5000 + "}", "not_json", "a number with too many digits"),
        ("NaN", "not_an_object", "NaN"),
        ('{"a": 1, "a": 2}', "duplicate_key", "the key 'a' more than once"),
        ('{"' + "a" * 50 + '": 1, "' + "a" * 50 + '": 2}', "duplicate_key", "the key of 50 characters more than once"),
        ("[" * 5000, "too_deep", "lists or objects nested more than 16 deep (limits.nesting_depth)"),
        ('{"a":' * 5000, "too_deep", "lists or objects nested more than 16 deep (limits.nesting_depth)"),
    ],
)
def test_lines_that_are_no_record(text: str, code: str, got: str) -> None:
    problem = only_problem(parse_record(text))
    assert (problem.code, problem.field, problem.got) == (code, "", got)


@pytest.mark.parametrize(
    ("path", "value", "field", "got", "expected", "fix"),
    [
        ("context.summary", "NaN", "context.summary", "NaN", "text, which may be empty", 'write it, or ""'),
        ("context.current_emotion.intensity", "NaN", None, "NaN", "a number from 0 to 1", "write a number from 0 to 1"),
        ("context.current_emotion.intensity", "1e999", None, "Infinity", "a number from 0 to 1", "write a number from 0 to 1"),
        ("input", "-Infinity", "input", "-Infinity", "what the user says, as text", "write the value"),
        ("input", '["a", NaN]', "input.2", "NaN", "what the user says, as text", "write the value"),
        ("context", "NaN", "context", "NaN", 'an object {"summary": ..., "current_emotion": ...}', "write the value"),
        ("output", "NaN", "output", "NaN", REPLY, "write the value"),
        ("output", '{"text": NaN, "emotion": "smile"}', "output.text", "NaN", "what the friend says, as text", "write the value"),
        ("output", '{"text": "a", "emotion": NaN}', "output.emotion", "NaN", None, "write the value"),
        ("output", json.dumps('{"text": NaN, "emotion": "smile"}'), "output.text", "NaN", None, "write the value"),
        ("score", "NaN", "score", "NaN", "a value that JSON has", "write the value"),
        ("scores", '{"a": [1, Infinity]}', "scores.a.2", "Infinity", "a value that JSON has", "write the value"),
    ],
)
def test_nan_names_its_field(path: str, value: str, field: str | None, got: str, expected: str | None, fix: str) -> None:
    line = changed(path, "THERE").replace('"THERE"', value)
    assert value in line
    problem = parse_record(line).problems[0]
    assert (problem.field, problem.code, problem.got) == (field or path, "not_finite", got)
    assert problem.expected == expected or expected is None
    assert problem.fix.startswith(fix)
    # an unknown field and a list where text belongs have an error of their own
    others = [other.code for other in parse_record(line).problems[1:]]
    assert others == (["unknown_field"] if path.startswith("score") else ["wrong_type"] if value.startswith("[") else [])


def test_every_nan_of_a_line_is_named() -> None:
    line = changed("context.summary", "THERE").replace('"THERE"', "NaN").replace("0.8", "NaN")
    assert [(problem.field, problem.code) for problem in parse_record(line).problems] == [
        ("context.summary", "not_finite"),
        ("context.current_emotion.intensity", "not_finite"),
    ]


def test_problems_do_not_quote_the_authors_text() -> None:
    words = "비밀 이야기는 아무도 모르게"
    for path in ("instruction", "input", "context.summary", "output.text"):
        for value in (words + "\x00", [words], {words: 1}):
            for problem in parse_record(changed(path, value)).problems:
                assert words not in problem.render("data.jsonl")


def test_a_problem_is_one_line() -> None:
    problem = only_problem(parse_record(changed("context.current_emotion.intensity", 300), 12))
    assert problem.render("data/a.jsonl") == (
        "data/a.jsonl:12: context.current_emotion.intensity: got 300, expected a number from 0 to 1; use 0 (barely) to 1 (fully)"
    )
    assert problem.as_json() == {
        "line": 12,
        "field": "context.current_emotion.intensity",
        "severity": "error",
        "code": "out_of_range",
        "got": "300",
        "expected": "a number from 0 to 1",
        "fix": "use 0 (barely) to 1 (fully)",
    }


def test_lines_keep_their_numbers_across_blank_and_bad_ones(tmp_path: Path) -> None:
    lines, reader = read(tmp_path, f"\n{SAMPLE}\n \t\n\u3000\nnonsense\n{SAMPLE}\n\n")
    assert [(line.number, line.record is not None) for line in lines] == [(2, True), (5, False), (6, True)]
    assert (reader.lines_read, reader.blank_lines) == (7, 4)


def test_a_last_line_needs_no_line_break(tmp_path: Path) -> None:
    lines, _ = read(tmp_path, f"{SAMPLE}\n{SAMPLE}")
    assert [line.record for line in lines] == [RECORD, RECORD]


@pytest.mark.parametrize("cut", [1, 2, 3, 20, 60, 200])
def test_a_cut_off_file_is_called_that(tmp_path: Path, cut: int) -> None:
    lines, _ = read(tmp_path, f"{SAMPLE}\n".encode() + SAMPLE.encode()[:-cut])
    assert lines[0].record == RECORD
    problem = only_problem(lines[1])
    assert (problem.line, problem.code) == (2, "truncated")
    assert "copy or write it again" in problem.fix


def test_a_character_cut_in_half_at_the_end_is_a_cut_off_file(tmp_path: Path) -> None:
    half = SAMPLE.encode()[: SAMPLE.encode().index("너".encode()) + 1]
    assert only_problem(read(tmp_path, half)[0][0]).code == "truncated"
    assert only_problem(read(tmp_path, half + b"\n")[0][0]).code == "invalid_utf8"


def test_a_broken_last_line_that_is_complete_is_not_called_cut_off(tmp_path: Path) -> None:
    assert only_problem(read(tmp_path, '{"a" 1}')[0][0]).code == "not_json"
    assert only_problem(read(tmp_path, "nonsense")[0][0]).code == "not_json"


def test_a_cut_line_inside_the_file_is_only_broken(tmp_path: Path) -> None:
    lines, _ = read(tmp_path, f"{SAMPLE[:50]}\n{SAMPLE}\n")
    assert only_problem(lines[0]).code == "not_json"


def test_invalid_utf8_names_the_byte(tmp_path: Path) -> None:
    bad = SAMPLE.encode("cp949")
    lines, _ = read(tmp_path, SAMPLE.encode() + b"\n" + bad + b"\n")
    problem = only_problem(lines[1])
    at = bad.index("너".encode("cp949"))
    assert problem.code == "invalid_utf8"
    assert problem.got == f"byte 0xb3 at byte {at + 1} of the line (byte {len(SAMPLE.encode()) + 1 + at + 1} of the file)"


def test_a_byte_order_mark_is_accepted_with_a_warning(tmp_path: Path) -> None:
    lines, _ = read(tmp_path, b"\xef\xbb\xbf" + f"{SAMPLE}\n".encode() + b"\xef\xbb\xbf" + f"{SAMPLE}\n".encode())
    assert [line.record for line in lines] == [RECORD, RECORD]
    assert [(p.line, p.code, p.severity) for line in lines for p in line.problems] == [
        (1, "bom", Severity.WARNING),
        (2, "bom", Severity.WARNING),
    ]


def test_crlf_is_accepted_with_one_warning(tmp_path: Path) -> None:
    lines, _ = read(tmp_path, f"{SAMPLE}\n{SAMPLE}\r\n\r\n{SAMPLE}\r\n")
    assert [line.record for line in lines] == [RECORD] * 3
    assert [(p.line, p.code, p.severity) for line in lines for p in line.problems] == [(2, "crlf", Severity.WARNING)]


@pytest.mark.parametrize(
    ("content", "got"),
    [(b"", "an empty file"), (b"\n \r\n", "only blank lines (2)"), (b"\xef\xbb\xbf", "only blank lines (1)")],
)
def test_a_file_without_records(tmp_path: Path, content: bytes, got: str) -> None:
    lines, _ = read(tmp_path, content)
    problem = only_problem(lines[-1])
    assert lines[-1].number == 0
    assert (problem.line, problem.code, problem.got, problem.severity) == (None, "empty_file", got, Severity.ERROR)
    assert problem.render("f").startswith("f: got ")


def test_utf16_is_one_problem_and_not_one_a_line(tmp_path: Path) -> None:
    lines, _ = read(tmp_path, f"{SAMPLE}\n{SAMPLE}\n".encode("utf-16"))
    assert [only_problem(line).code for line in lines] == ["wrong_encoding"]


def test_a_huge_line_is_skipped_and_the_next_one_read(tmp_path: Path) -> None:
    huge = b"x" * (3 * DEFAULT_LIMITS.line_bytes)
    lines, reader = read(tmp_path, huge + b"\n" + f"{SAMPLE}\n".encode() + huge)
    assert [(line.number, line.record) for line in lines] == [(1, None), (2, RECORD), (3, None)]
    assert only_problem(lines[0]).got == f"a line of {len(huge) + 1:,} bytes"
    assert {only_problem(lines[number]).code for number in (0, 2)} == {"line_too_long"}
    assert reader.lines_read == 3


def test_the_longest_line_is_still_read(tmp_path: Path) -> None:
    padded = SAMPLE + " " * (DEFAULT_LIMITS.line_bytes - len(SAMPLE.encode()))
    lines, _ = read(tmp_path, f"{padded}\n{padded}")
    assert [line.record for line in lines] == [RECORD, RECORD]
    assert only_problem(read(tmp_path, padded + " \n")[0][0]).code == "line_too_long"


@pytest.mark.parametrize("name", ["missing.jsonl", "", "a\0b"])
def test_a_file_that_cannot_be_opened_is_a_problem(tmp_path: Path, name: str) -> None:
    problem = only_problem(next(iter(JsonlReader(tmp_path / name))))
    assert (problem.line, problem.code) == (None, "unreadable")


def test_a_disk_that_fails_is_a_problem(tmp_path: Path) -> None:
    # the kernel allows opening this file but not reading it
    lines = list(JsonlReader(Path("/proc/self/mem")))
    assert [problem.code for line in lines for problem in line.problems] == ["unreadable"]

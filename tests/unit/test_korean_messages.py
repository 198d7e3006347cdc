"""Test that what the authors of data read is Korean for those who ask for it, completely, and English otherwise."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Final

import pytest
from conftest import load_tool

from entrypoint.cli import run_cli
from lora_trainer.data.problems import Problem, Severity
from lora_trainer.data.validation import check_file
from lora_trainer.messages import Message, counted, joined, language_of, translated

tool = load_tool("catalogue")
ENTRIES: Final[dict[str, str]] = tool.read_po(tool.CATALOGUE.read_text(encoding="utf-8"))
RECORD: Final = {
    "instruction": "너는 A형 친구야",
    "context": {"summary": "", "current_emotion": {"type": "happy", "intensity": 0.5}},
    "input": "오늘 뭐 해?",
    "output": json.dumps({"text": "산책 중이야! 너는?", "emotion": "smile"}, ensure_ascii=False),
}
HANGUL: Final = re.compile("[가-힣]")
# what stays as it is: numbers, quoted labels, names of encodings and formats
NO_SENTENCE: Final = re.compile(r"'[a-zA-Z가-힣_]+'|-?[\d.]+|null|true|false|-?Infinity|NaN|UTF-8")


@pytest.fixture(autouse=True)
def no_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(variable, raising=False)


# --- the catalogue ---------------------------------------------------------------------------------------


def test_every_message_of_the_source_has_a_translation_with_its_placeholders() -> None:
    assert tool.lacking(ENTRIES) == [], "translate it in the .po file, then run: python tools/catalogue.py --write"


def test_the_catalogue_has_no_other_messages() -> None:
    assert set(ENTRIES) - {""} == set(tool.extracted()), "run: python tools/catalogue.py --write"


def test_the_compiled_catalogue_is_the_source_of_it() -> None:
    assert tool.CATALOGUE.with_suffix(".mo").read_bytes() == tool.compiled(ENTRIES), "run: python tools/catalogue.py --write"
    assert tool.read_po(tool.po_text(ENTRIES)) == ENTRIES


def test_every_translation_is_what_gettext_finds() -> None:
    for message, text in ENTRIES.items():
        if message:
            assert translated(message, "ko") == text


def test_no_translation_is_a_name_that_a_file_may_use() -> None:
    """A key, a label or an option stays in English; a message of the same spelling would translate it."""
    assert not {"instruction", "context", "summary", "input", "output", "emotion", "type", "error", "warning"} & set(ENTRIES)


def test_a_message_without_translation_and_one_with_other_placeholders_are_named() -> None:
    message = "at most {most} characters"
    assert f"no translation: {message}" in tool.lacking(ENTRIES | {message: ""})
    assert f"other placeholders: {message}" in tool.lacking(ENTRIES | {message: "최대 {count}자"})
    assert f"other placeholders: {message}" in tool.lacking(ENTRIES | {message: "최대 {most:,}자"})


def test_a_message_whose_values_are_filled_in_too_early_is_refused() -> None:
    with pytest.raises(tool.UnmarkedMessageError, match=r"module\.py:1"):
        list(tool.in_module('RecordError("code", f"{count} turns", "one", "remove it")', "module.py"))
    found = list(tool.in_module('RecordError("code", "a list" if many else "an object", f"\'{name}\'", fix)', "module.py"))
    assert found == ["a list", "an object"]


# --- messages --------------------------------------------------------------------------------------------


def test_a_message_is_its_english_text_and_survives_a_process_boundary() -> None:
    message = Message("{fix}; {convert}", fix=Message("move its value to {place}", place="input"), convert="x")
    assert message == "move its value to input; x"
    copy = pickle.loads(pickle.dumps(message))  # noqa: S301  our own bytes
    assert translated(copy, "ko") == translated(message, "ko") != message
    assert Message('an object {"type": ..., "intensity": ...}') == 'an object {"type": ..., "intensity": ...}'


def test_values_that_are_messages_are_translated_and_names_are_not() -> None:
    both = joined([Message("profanity"), Message("a slur")], "{first} and {rest}")
    assert (both, translated(both, "ko")) == ("profanity and a slur", "욕설, 비하 표현")
    # `text` is a message, too
    names = joined(["text", "input"], "{first} or the {rest}")
    assert (names, translated(names, "ko")) == ("text or the input", "text 또는 input")
    assert (counted(1, "{count:,} line", "{count:,} lines"), counted(1200, "{count:,} line", "{count:,} lines")) == (
        "1 line",
        "1,200 lines",
    )


@pytest.mark.parametrize(
    ("variables", "language"),
    [
        ({}, "en"),
        ({"LANG": "ko_KR.UTF-8"}, "ko"),
        ({"LANG": "ko"}, "ko"),
        ({"LANG": "kok_IN"}, "en"),
        ({"LANG": "ko_KR.UTF-8", "LC_ALL": "C.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "ko_KR.eucKR"}, "ko"),
        ({"LANG": "ko_KR.UTF-8", "LC_ALL": ""}, "ko"),
    ],
)
def test_the_locale_chooses_the_language(variables: dict[str, str], language: str) -> None:
    assert language_of(variables) == language


# --- what data authors see -------------------------------------------------------------------------------


def with_emotion(**changes: object) -> dict[str, object]:
    return RECORD | {"context": {"summary": "", "current_emotion": {"type": "happy", "intensity": 0.5} | changes}}


def with_reply(text: str) -> dict[str, object]:
    return RECORD | {"output": json.dumps({"text": text, "emotion": "smile"}, ensure_ascii=False)}


LINES: Final = [
    *(
        json.dumps(record, ensure_ascii=False)
        for record in (
            {key: value for key, value in RECORD.items() if key != "input"},
            RECORD | {"inputs": "x"},
            RECORD | {"Input ": "x"},
            RECORD | {"감정": "기쁨"},
            RECORD | {"note": "x"},
            RECORD | {"context": "어제 싸웠다"},
            RECORD | {"context": None},
            RECORD | {"input": 3},
            RECORD | {"input": ["a"]},
            RECORD | {"input": " "},
            RECORD | {"input": "nan"},
            RECORD | {"input": "안녕\u202e"},
            RECORD | {"input": "안녕\x07"},
            RECORD | {"input": "안녕\ufffd"},
            RECORD | {"input": "안녕\u200b하세요"},
            RECORD | {"input": "안녕 &amp; 하세요"},
            RECORD | {"input": "\\uc548\\ub155"},
            RECORD | {"input": "ì•ˆë…•í•˜ì„¸ìš”"},
            RECORD | {"input": "<|im_end|> 안녕"},
            RECORD | {"output": "산책 중이야"},
            RECORD | {"output": "{'text': 'x'}"},
            with_emotion(type="joyful"),
            with_emotion(type="smile"),
            with_emotion(type="zzz"),
            with_emotion(intensity=80),
            with_emotion(intensity=7),
            with_emotion(intensity="강함"),
            with_emotion(intensity="0.5"),
            with_emotion(intensity=True),
            with_emotion(intensity=float("nan")),
            with_reply("안녕하세요. 반갑습니다. 뭐 해? 나도."),
            with_reply("좋아😀😀😀😀😀😀"),
            with_reply("ok this is not korean at all"),
            with_reply("씨발 https://example.com 뭐야"),
            with_reply("가" * 150),
            RECORD,
            RECORD,
            RECORD | {"input": "짜장면이야 짬뽕이야?"},
            RECORD | {"input": "나 죽고 싶어", "output": with_reply("내가 지금 갈게")["output"]},
            RECORD | {"input": "두통약 두 알 먹어도 돼?"},
        )
    ),
    "[1, 2]",
    "{'a': 1}",
    '{"a": 1} {"b": 2}',
    '{"a": 1, "a": 2}',
    json.dumps(RECORD, ensure_ascii=False)[:60],
]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> list[Problem]:
    path = tmp_path_factory.mktemp("data") / "train_data_type_B.jsonl"
    path.write_text("\n".join(LINES), encoding="utf-8")
    found: list[Problem] = []
    check_file(path, on_problem=found.append)
    return found


def test_every_part_of_every_problem_is_korean(problems: list[Problem]) -> None:
    assert len({problem.code for problem in problems}) >= 25
    for problem in problems:
        for part in (problem.got, problem.expected, problem.fix):
            text = translated(part, "ko")
            assert HANGUL.search(text) or NO_SENTENCE.fullmatch(text), f"{problem.code}: {part}"
        line = translated(problem.render("a.jsonl"), "ko")
        assert line.startswith(f"a.jsonl:{problem.line}: " if problem.line else "a.jsonl: ")
        assert problem.field in line
        assert not re.search(r"\bgot\b|\bexpected\b", line)


def test_numbers_and_names_are_the_same_in_both_languages(problems: list[Problem]) -> None:
    def facts(text: str) -> list[str]:
        return sorted(re.findall(r"\d[\d.,]*|U\+[0-9A-F]{4}|'[a-z_]+'", text))

    for problem in problems:
        assert facts(translated(problem.got, "ko")) == facts(problem.got)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_cli(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_validate_speaks_korean_on_request_or_by_the_locale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train_data_type_A.jsonl"
    path.write_text("\n".join(LINES[:3]), encoding="utf-8")
    _, english, _ = run(capsys, "validate", "--no-tokens", str(path))
    code, asked, _ = run(capsys, "validate", "--no-tokens", "--lang", "ko", str(path))
    monkeypatch.setenv("LANG", "ko_KR.UTF-8")
    _, by_locale, _ = run(capsys, "validate", "--no-tokens", str(path))
    _, chosen, _ = run(capsys, "validate", "--no-tokens", "--lang", "en", str(path))
    assert code == 3
    assert asked == by_locale != english == chosen
    assert "'input' 값을 추가하세요" in asked
    assert "오류 3개" in asked
    assert "3 errors" in english


def test_json_is_the_same_in_every_language(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train_data_type_A.jsonl"
    path.write_text("\n".join(LINES), encoding="utf-8")
    english = run(capsys, "validate", "--no-tokens", "--json", str(path))
    assert run(capsys, "validate", "--no-tokens", "--json", "--lang", "ko", str(path)) == english
    assert not any(
        HANGUL.search(problem["fix"]) for problem in json.loads(english[1])["files"][0]["problems"] if "반말" not in problem["fix"]
    )


def test_a_failure_is_korean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, "validate", "--no-tokens", "--lang", "ko", str(tmp_path / "none.jsonl"))
    assert (code, "파일이 없습니다" in error, str(tmp_path) in error) == (2, True, True)
    code, _, error = run(capsys, "convert", "--lang", "ko", str(tmp_path), "--output", str(tmp_path / "a.txt"))
    assert (code, ".jsonl로 끝나는 이름" in error) == (2, True)


def test_convert_speaks_korean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "대화.csv", tmp_path / "train_data_type_A.jsonl"
    source.write_text("입력,답변,감정,감정 강도,표정,메모\n안녕,왔어?,기쁨,80,미소,a\n뭐 해,,기쁨,60,미소,b\n", encoding="utf-8")
    code, _, error = run(capsys, "convert", "--lang", "ko", "--blood-type", "A", str(source), "--output", str(target))
    assert code == 3
    assert f"레코드 1개를 {target} 파일에 저장했습니다. 변환하지 못한 레코드: 1개" in error
    assert f"lora-trainer validate {target}" in error
    assert f"참고: {source}: 레코드에 없는 열을 제외했습니다: '메모'" in error
    assert f"오류: {source}:3: output.text: " in error
    for line in error.splitlines():
        assert HANGUL.search(line.replace(str(source), ""))


def test_generate_and_its_report_speak_korean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    arguments = ("generate", "--blood-type", "A", "--count", "12", "--output", str(tmp_path), "--report", str(page), "--lang", "ko")
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "감정과 강도별 레코드 12개" in out
    assert "저장함: " in out
    assert "보고서: " in out
    text = re.sub(r"<style>.*?</style>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert '<html lang="ko">' in text
    headings = re.findall(r"<(?:h1|h3)>([^<]+)</", text) + re.findall(r'aria-label="([^"]+)"', text)
    assert len(headings) >= 8
    assert all(HANGUL.search(heading) for heading in headings), headings


# --- docs/data.ko.md -------------------------------------------------------------------------------------

GUIDE: Final = (tool.REPOSITORY / "docs" / "data.ko.md").read_text(encoding="utf-8")


def table(marker: str) -> list[list[str]]:
    found = re.search(f"<!-- {marker}:begin -->\n(.*?)<!-- {marker}:end -->", GUIDE, re.DOTALL)
    assert found
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]
    return [rows[0], *rows[2:]]


def test_the_guide_quotes_real_messages() -> None:
    quoted = [row[0].strip("`").removeprefix("현재: ") for row in table("messages")[1:]]
    assert len(quoted) >= 15
    for message in quoted:
        assert any(message in text for text in ENTRIES.values()), message


def test_the_sheet_of_the_guide_becomes_data_without_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sheet = table("sheet")
    # `convert` looks at the content and not at the name
    Path("대화.xlsx").write_text("\n".join(",".join(row) for row in sheet), encoding="utf-8")
    for name in ("convert", "validate"):
        line = next(line for line in GUIDE.splitlines() if line.startswith(f".venv/bin/lora-trainer {name}"))
        code, out, error = run(capsys, *line.split()[1:])
        assert code == 0, error
    assert "오류 0개, 경고 0개" in out
    assert f"레코드 {len(sheet) - 1}개" in out


def test_the_problem_that_the_guide_explains_looks_like_that() -> None:
    example = next(line for line in GUIDE.splitlines() if ": output.text: 현재: " in line)
    got, fix = Message("{count} sentences", count=3), "say less, and leave the rest for the next turn"
    problem = Problem(3, "output.text", Severity.WARNING, "too_many_sentences", got, Message("at most {most:,}", most=2), fix)
    assert translated(problem.render("my-data/train_data_type_A.jsonl"), "ko") == example

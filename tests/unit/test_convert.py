"""`convert` turns other formats into records that equal the originals, and reports everything it cannot turn."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from entrypoint.cli import run_cli
from lora_trainer.config import LimitsConfig
from lora_trainer.data.convert import Conversion, Defaults, convert_file
from lora_trainer.data.convert_columns import face_of, feeling_of
from lora_trainer.data.jsonl import JsonlReader, parse_record
from lora_trainer.data.records import TrainingRecord
from lora_trainer.errors import DataError, ExitCode, LoraTrainerError
from lora_trainer.persona.prompt import system_message
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling, IntensityThird

# the records that dialogues.xlsx holds
LINES: Final = (REPOSITORY / "tests" / "assets" / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
RAW: Final[list[dict[str, Any]]] = [json.loads(line) for line in LINES]
RECORDS: Final = [record for line in LINES if (record := parse_record(line).record)]
PLANTED: Final = "아무도보면안되는말"


FEELINGS, FACES = ({str(word): word.gloss for word in vocabulary} for vocabulary in (Feeling, Expression))


def flat(record: TrainingRecord) -> dict[str, Any]:
    emotion = record.context.current_emotion
    return {
        "instruction": record.instruction,
        "summary": record.context.summary,
        "feeling": str(emotion.type),
        "intensity": emotion.intensity,
        "input": record.input,
        "output": record.reply.text,
        "face": str(record.reply.emotion),
    }


def korean(record: TrainingRecord) -> dict[str, Any]:
    row = flat(record)
    return {
        "혈액형": "A형",
        "요약": row["summary"],
        "감정": FEELINGS[row["feeling"]],
        "감정 강도 (0~100%)": f"{row['intensity']:.0%}",
        "입력": row["input"],
        "답변": row["output"],
        "표정": FACES[row["face"]],
    }


def dotted(raw: dict[str, Any]) -> dict[str, Any]:
    emotion = raw["context"]["current_emotion"]
    return {
        "instruction": raw["instruction"],
        "context.summary": raw["context"]["summary"],
        "context.current_emotion.type": emotion["type"],
        "context.current_emotion.intensity": emotion["intensity"],
        "input": raw["input"],
        "output": raw["output"],
    }


def own_prompt(record: TrainingRecord, version: int = 2) -> str:
    emotion = record.context.current_emotion
    return system_message(record.instruction, record.context.summary, emotion.type, emotion.intensity, version)


def chat(record: TrainingRecord, raw: dict[str, Any], version: int = 2) -> dict[str, Any]:
    turns = [("system", own_prompt(record, version)), ("user", record.input), ("assistant", raw["output"])]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def sharegpt(record: TrainingRecord, raw: dict[str, Any]) -> dict[str, Any]:
    turns = [("human", record.input), ("gpt", raw["output"])]
    return {"system": own_prompt(record), "conversations": [{"from": who, "value": said} for who, said in turns]}


def gemini(record: TrainingRecord, raw: dict[str, Any]) -> dict[str, Any]:
    turns = [("system", own_prompt(record)), ("user", record.input), ("model", f"```json\n{raw['output']}\n```")]
    return {"contents": [{"role": role, "parts": [{"text": said}]} for role, said in turns]}


def json_lines(values: list[Any], **options: Any) -> str:
    return "".join(json.dumps(value, ensure_ascii=False, **options) + "\n" for value in values)


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def cell(reference: str, value: object) -> str:
    if isinstance(value, int | float):
        return f'<c r="{reference}"><v>{value}</v></c>'
    return f'<c r="{reference}" t="inlineStr"><is><t>{escape(str(value))}</t></is></c>'


def sheet_xml(rows: list[list[str]], after: str = "", before: str = "") -> str:
    body = "".join(f'<row r="{number}">{"".join(cells)}</row>' for number, cells in enumerate(rows, 1))
    return f'<?xml version="1.0"?>{before}<worksheet><sheetData>{body}</sheetData>{after}</worksheet>'


def workbook(sheets: dict[str, str], states: dict[str, str] | None = None, **parts: str) -> bytes:
    """Return an XLSX file with these sheets."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("[Content_Types].xml", "<Types/>")
        listed = "".join(
            f'<sheet name="{name}" sheetId="{n}" state="{(states or {}).get(name, "visible")}" r:id="rId{n}"/>'
            for n, name in enumerate(sheets, 1)
        )
        file.writestr("xl/workbook.xml", f'<workbook xmlns:r="r"><sheets>{listed}</sheets></workbook>')
        relations = "".join(f'<Relationship Id="rId{n}" Target="worksheets/sheet{n}.xml"/>' for n in range(1, len(sheets) + 1))
        file.writestr("xl/_rels/workbook.xml.rels", f"<Relationships>{relations}</Relationships>")
        for n, xml in enumerate(sheets.values(), 1):
            file.writestr(f"xl/worksheets/sheet{n}.xml", xml)
        for part, xml in parts.items():
            file.writestr(f"xl/{part}.xml", xml)
    return packed.getvalue()


def grid(rows: list[list[object]]) -> list[list[str]]:
    return [[cell(f"{chr(65 + column)}{number}", value) for column, value in enumerate(row)] for number, row in enumerate(rows, 1)]


def as_sheet(rows: list[dict[str, Any]]) -> list[list[object]]:
    return [list(rows[0]), *(list(row.values()) for row in rows)]


CHATS: Final = [chat(record, raw) for record, raw in zip(RECORDS, RAW, strict=True)]
SHAREGPT: Final = [sharegpt(record, raw) for record, raw in zip(RECORDS, RAW, strict=True)]
KOREAN: Final = [korean(record) for record in RECORDS]
PLAIN: Final = [record for record in RECORDS if record.to_json().encode("cp949", "replace").decode("cp949") == record.to_json()]
DOTTED: Final = dotted(RAW[0])
FORMS: Final[dict[str, bytes | str]] = {
    "jsonl": "\n".join(LINES),
    "jsonl-bom-crlf": "\ufeff" + "\r\n".join(LINES),
    "array": json.dumps(RAW, ensure_ascii=False, indent=2),
    "array-one-line": json.dumps(RAW),
    "array-trailing-comma": "[" + ",\n".join(LINES) + ",\n]",
    "array-on-each-line": "".join(f"[{line}]\n" for line in LINES),
    "encoded-twice": json_lines(list(LINES)),
    "pretty-printed": json_lines(RAW, indent=4),
    "code-block": f"```json\n{json.dumps(RAW, indent=1)}\n```\n",
    "concatenated": "".join(LINES),
    "separated": ",\n".join(LINES),
    "wrapper": json.dumps({"version": 2, "data": RAW}, indent=1),
    "wrapper-by-index": json.dumps({str(number): raw for number, raw in enumerate(RAW)}),
    "columns-by-index": json.dumps({k: {str(n): flat(one)[k] for n, one in enumerate(RECORDS)} for k in flat(RECORDS[0])}),
    "split": json.dumps({"columns": list(KOREAN[0]), "index": [0], "data": [list(row.values()) for row in KOREAN]}),
    "csv-with-objects": table(RAW),
    "columns": json.dumps({name: [flat(record)[name] for record in RECORDS] for name in flat(RECORDS[0])}),
    "python": "".join(f"{raw}\n" for raw in RAW),
    "python-list": str(RAW),
    "utf-16": "\n".join(LINES).encode("utf-16"),
    "utf-16-array": json.dumps(RAW, ensure_ascii=False, indent=1).encode("utf-16-be"),
    "utf-32": "\n".join(LINES).encode("utf-32"),
    "gzip": gzip.compress(json.dumps(RAW).encode()),
    "messages": json_lines(CHATS),
    "messages-without-names": json_lines([one["messages"] for one in CHATS]),
    "json-sequence": "".join(f"\x1e{line}\n" for line in LINES),
    "markdown": "|" + table(KOREAN, "|").replace("\r\n", "|\n|").replace("|\n|", "|\n|" + "---|" * 7 + "\n|", 1).rstrip("|"),
    "messages-array": json.dumps(CHATS, ensure_ascii=False, indent=2),
    "batch": json_lines([{"custom_id": str(n), "body": {"model": "m", **one}} for n, one in enumerate(CHATS)]),
    "sharegpt": json_lines(SHAREGPT),
    "gemini": json_lines([gemini(record, raw) for record, raw in zip(RECORDS, RAW, strict=True)]),
    "flat": json_lines([flat(record) for record in RECORDS]),
    "flat-dotted": json_lines([dotted(raw) for raw in RAW]),
    "flat-korean": json_lines(KOREAN),
    "csv": table([flat(record) for record in RECORDS]),
    "csv-dotted": table([dotted(raw) for raw in RAW]),
    "csv-korean": "\ufeff" + table(KOREAN),
    "csv-semicolons": table(KOREAN, ";"),
    "tsv-utf-16": table(KOREAN, "\t").encode("utf-16"),
    "xlsx": workbook({"대화": sheet_xml(grid(as_sheet(KOREAN)))}),
    "xlsx-openpyxl": (REPOSITORY / "tests" / "assets" / "dialogues.xlsx").read_bytes(),
}


def converted(
    folder: Path, content: bytes | str, name: str = "data.bin", limits: LimitsConfig | None = None, **options: Any
) -> Conversion:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return convert_file(file, Defaults(**options), limits or LimitsConfig())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_records_gives_the_same_records(tmp_path: Path, form: str) -> None:
    conversion = converted(tmp_path, FORMS[form])
    assert (conversion.failed, conversion.problems) == (0, [])
    assert conversion.records == RECORDS


def test_a_prompt_with_a_word_for_the_intensity_gives_the_middle_of_its_third(tmp_path: Path) -> None:
    """Prompt version 3 doesn't say the number. The converted record has the same prompt."""
    conversion = converted(tmp_path, json_lines([chat(record, raw, 3) for record, raw in zip(RECORDS, RAW, strict=True)]))
    assert (conversion.failed, conversion.problems) == (0, [])
    middles = {IntensityThird.LOW: 0.2, IntensityThird.MIDDLE: 0.5, IntensityThird.HIGH: 0.8}
    for found, record in zip(conversion.records, RECORDS, strict=True):
        emotion = found.context.current_emotion
        assert emotion.intensity == middles[IntensityThird.of(record.context.current_emotion.intensity)]
        assert own_prompt(found, 3) == own_prompt(record, 3)
        assert flat(found) == {**flat(record), "intensity": emotion.intensity}
    assert {found.context.current_emotion.intensity for found in conversion.records} >= {0.5, 0.8}


@pytest.mark.parametrize("form", ["jsonl", "array", "csv-korean"])
def test_cp949_gives_the_same_records(tmp_path: Path, form: str) -> None:
    text = {
        "jsonl": "\n".join(record.to_json() for record in PLAIN),
        "array": json.dumps([json.loads(record.to_json()) for record in PLAIN], ensure_ascii=False, indent=2),
        "csv-korean": table([korean(record) for record in PLAIN]),
    }[form]
    assert len(PLAIN) >= 5
    assert converted(tmp_path, text.encode("cp949")).records == PLAIN


def test_nan_is_an_empty_cell(tmp_path: Path) -> None:
    row = '[{"질문": "나 왔어", "답변": "어디야?", "요약": NaN, "감정": NaN}]'
    (record,) = converted(tmp_path, row, **GIVEN).records
    assert (record.context.summary, record.context.current_emotion.type) == ("", Feeling.HAPPY)


@pytest.mark.parametrize(("vocabulary", "meaning"), [(Feeling, feeling_of), (Expression, face_of)])
def test_every_label_of_a_vocabulary_means_one_value(
    vocabulary: type[Feeling | Expression], meaning: Callable[[str], object]
) -> None:
    for word in vocabulary:
        assert re.search("[가-힣]", word.gloss)
        for label in (word, word.upper(), word.gloss, word.gloss.replace(" ", ""), *word.aliases):
            assert meaning(label) is word, label


# --- what a record lacks ---------------------------------------------------------------------------------

PLAIN_CHAT: Final = {"messages": [{"role": "user", "content": "나 왔어"}, {"role": "assistant", "content": "어디야?"}]}
ALPACA: Final = {"instruction": "나 왔어", "input": "", "output": "어디야?"}
GIVEN: Final = {"blood_type": BloodType.B, "feeling": Feeling.HAPPY, "intensity": 0.4, "face": Expression.WINK}


@pytest.mark.parametrize(
    "item",
    [PLAIN_CHAT, ALPACA, {"prompt": "나 왔어", "completion": "어디야?"}, {"질문": "나 왔어", "답변": "어디야?"},
     {"conversations": [{"from": "human", "value": "나 왔어"}, {"from": "gpt", "value": "어디야?"}]}],
    ids=["messages", "alpaca", "completion", "korean", "sharegpt"],
)  # fmt: skip
def test_missing_values_are_reported_and_taken_from_the_options(tmp_path: Path, item: dict[str, Any]) -> None:
    conversion = converted(tmp_path, json_lines([item] * 6))
    assert (conversion.records, conversion.failed) == ([], 6)
    assert {problem.code for problem in conversion.problems} == {"missing_field"}
    lines = conversion.problem_lines("chats.jsonl")
    assert len(lines) == 4
    for option in ("--blood-type", "--feeling", "--intensity", "--face"):
        assert sum(option in line for line in lines) == 1
    assert all("in 6 records (line 1, 2, 3, 4, 5, …)" in line for line in lines)
    (record,) = set(map(TrainingRecord.to_json, converted(tmp_path, json_lines([item] * 6), **GIVEN).records))
    made = parse_record(record).record
    assert made is not None
    assert flat(made) == {
        "instruction": "너는 B형 솔직한 친구야. 짧은 반말로 답해.", "summary": "", "feeling": "happy", "intensity": 0.4,
        "input": "나 왔어", "output": "어디야?", "face": "wink",
    }  # fmt: skip


def test_alpaca_keeps_its_instruction_if_there_is_an_input(tmp_path: Path) -> None:
    (record,) = converted(
        tmp_path, json_lines([{**ALPACA, "instruction": "너는 B형 친구야.", "input": "나 왔어"}]), **GIVEN
    ).records
    assert (record.instruction, record.input) == ("너는 B형 친구야.", "나 왔어")
    (record,) = converted(tmp_path, json_lines([{**ALPACA, "system": "너는 B형 친구야.", "input": "문 열어"}]), **GIVEN).records
    assert (record.instruction, record.input) == ("너는 B형 친구야.", "나 왔어\n문 열어")


def test_a_long_conversation_is_converted_only_if_asked_for(tmp_path: Path) -> None:
    turns = [
        *PLAIN_CHAT["messages"],
        {"role": "user", "content": "문 앞"},
        {"role": "assistant", "content": [{"type": "text", "text": "열게!"}]},
    ]
    text = json_lines([{"messages": turns}])
    conversion = converted(tmp_path, text, **GIVEN)
    assert [(problem.line, problem.code) for problem in conversion.problems] == [(1, "several_turns")]
    assert "--split-turns" in conversion.problems[0].fix
    assert [record.reply.text for record in converted(tmp_path, text, split_turns=True, **GIVEN).records] == ["어디야?", "열게!"]


@pytest.mark.parametrize(
    ("turns", "code"),
    [
        ([{"role": "user", "content": "a"}], "turns"),
        ([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], "turns"),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "turns"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "b"}], "turns"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [1]}], "turns"),
        (["a", "b"], "turns"),
        ([], "turns"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": '{"text": "b", "emotion": '}], "output_not_json"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": '{"reply": "b"}'}], "unknown_field"),
    ],
)
def test_chats_that_cannot_be_converted(tmp_path: Path, turns: list[Any], code: str) -> None:
    conversion = converted(tmp_path, json_lines([CHATS[0], {"messages": turns}]), **GIVEN)
    assert conversion.records == RECORDS[:1]
    assert [(problem.line, problem.code) for problem in conversion.problems] == [(2, code)]


# --- labels and numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "options", "expected"),
    [
        (["0.8", "0.3", "1", "0"], {}, [0.8, 0.3, 1, 0]),
        (["80", "30", "100", "1", "0"], {}, [0.8, 0.3, 1, 0.01, 0]),
        (["80%", "7.5 %", "１００％"], {}, [0.8, 0.075, 1]),
        (["80", "80%", "0.8", "0,8", "강함"], {}, [0.8] * 5),
        (["강함", "보통", "약함", "high"], {}, [0.8, 0.5, 0.2, 0.8]),
        (["4", "5", "1"], {"intensity_max": 5}, [0.8, 1, 0.2]),
        (["8", "10", "1"], {"intensity_max": 10}, [0.8, 1, 0.1]),
        (["4", "3"], {}, ["unclear_scale"] * 2),
        (["5", "1", "0"], {}, ["unclear_scale", "unclear_scale", 0]),
        (["7", "0.5"], {}, ["unclear_scale", 0.5]),
        (["-1", "150", "많이 많이", "120%"], {}, ["out_of_range"] * 4),
        (["80"], {"intensity_max": 5}, ["out_of_range"]),
    ],
)
def test_intensities(tmp_path: Path, written: list[str], options: dict[str, int], expected: list[float | str]) -> None:
    rows = [{**korean(RECORDS[0]), "감정 강도 (0~100%)": one} for one in written]
    conversion = converted(tmp_path, table(rows), **options)
    assert [record.context.current_emotion.intensity for record in conversion.records] == [
        one for one in expected if one not in CODES
    ]
    assert [problem.code for problem in conversion.problems] == [one for one in expected if one in CODES]


CODES: Final = ("out_of_range", "unclear_scale")


def test_unknown_labels_name_the_vocabulary(tmp_path: Path) -> None:
    rows = [{**KOREAN[0], "감정": PLANTED}, {**KOREAN[0], "표정": "상처"}, {**KOREAN[0], "혈액형": "C"}, KOREAN[0]]
    conversion = converted(tmp_path, table(rows))
    assert conversion.records == RECORDS[:1]
    found = [(problem.line, problem.field, problem.code) for problem in conversion.problems]
    assert found == [
        (2, "context.current_emotion.type", "unknown_value"),
        (3, "output.emotion", "unknown_value"),
        (4, "blood type", "unknown_value"),
    ]
    assert "embarrassed" in conversion.problem_lines("a.csv")[0]


def test_emotion_is_the_feeling_or_else_the_face(tmp_path: Path) -> None:
    alone = {"instruction": "a", "input": "b", "output": "c", "emotion": "happy", "intensity": 0.5, "face": "wink"}
    beside = {"instruction": "a", "input": "b", "output": "c", "feeling": "happy", "intensity": 0.5, "emotion": "wink"}
    one, other = (converted(tmp_path, json_lines([item])).records[0] for item in (alone, beside))
    assert one == other
    assert (one.context.current_emotion.type, one.reply.emotion) == ("happy", "wink")


def test_one_persona_of_several(tmp_path: Path) -> None:
    rows = [{**KOREAN[0], "혈액형": name} for name in ("A", "B형", "AB", "B")]
    conversion = converted(tmp_path, table(rows))
    assert [record.instruction[3:5].rstrip("형") for record in conversion.records] == ["A", "B", "AB", "B"]
    assert any("(A 1, AB 1, B 2)" in note for note in conversion.notes)
    conversion = converted(tmp_path, table(rows), blood_type=BloodType.B)
    assert len(conversion.records) == 2
    assert any("left out the records of other personas than B (2)" in note for note in conversion.notes)


# --- files that are not as they should be ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PAR1" + bytes(50), "a Parquet file"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("<html><body>login</body></html>", "an HTML page"),
        (b"", "an empty file"),
        ("- instruction: 가\n  input: 나\n", "YAML"),
        ("[]", "got no records"),
        ("a,b,c\n1,2,3\n4,5,6\n7,8,9\n", "no column names that are known"),
        ("입력,질문,답변\n1,2,3\n", "'입력', '질문', which all mean input"),
        (gzip.compress(json.dumps(RAW).encode())[:-300], "truncated compressed stream"),
        (workbook({"a": sheet_xml([]), "b": sheet_xml([])}), "2 visible sheets, expected one of 'a', 'b'"),
        (workbook({"a": "<worksheet><oops>"}), "damaged XLSX"),
        (workbook({"a": sheet_xml([], before='<!DOCTYPE x [<!ENTITY a "b">]>')}), "document type"),
        (workbook({"a": sheet_xml(grid([["입력", "답변"], ["&a;", "b"]]))}).replace(b"PK\x01\x02", b"PK\x01\x03"), "damaged XLSX"),
        ('{"input": ["a", "b"], "output": ["c"]}', "columns of different lengths"),
    ],
)
def test_files_that_hold_no_records(tmp_path: Path, content: bytes | str, said: str) -> None:
    file = tmp_path / "data.bin"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"^data\.bin: got ") as caught:
        convert_file(file, Defaults(), name="data.bin")
    (problem,) = caught.value.problems
    assert said in problem


@pytest.mark.parametrize(
    ("content", "line", "code"),
    [
        (f"{LINES[0]}\n\n{LINES[1][:-9]}\n{LINES[2]}\n" + "\n".join(LINES[3:]), 3, "not_json"),
        (f'[\n{LINES[0]},\n{{"a": }},\n{LINES[1]}\n]', 3, "not_json"),
        (f'[\n{LINES[0]},\n"text",\n{LINES[1]}\n]', 4, "not_an_object"),
        (f"[\n{LINES[0]},\n{LINES[1]},\n7\n]", 3, "not_an_object"),
        (f'[\n{LINES[0]},\n{{"input": "a", "input": "b"}}\n]', 3, "duplicate_key"),
        (f"[\n{LINES[0]},\n{LINES[1]},\n{LINES[2][:-40]}", 4, "truncated"),
        (f"{RAW[0]}\n{{'a': open('x')}}\n{RAW[1]}\n", 2, "not_json"),
        (table(KOREAN) + "a,b,c,d,e,f,g,h,i\r\n", 22, "too_many_cells"),
        (table(KOREAN) + '"A,,,,,,,\r\n', 22, "missing_field"),
        (table([{**KOREAN[0], "입력": "가\r\n나"}, {**KOREAN[1], "답변": ""}]), 4, "missing_field"),
    ],
)  # fmt: skip
def test_what_is_broken_is_reported_with_its_line_and_the_rest_is_converted(
    tmp_path: Path, content: str, line: int, code: str
) -> None:
    conversion = converted(tmp_path, content)
    assert len(conversion.records) >= 1
    assert {(problem.line, problem.code) for problem in conversion.problems} == {(line, code)}
    assert conversion.failed == 1


HEAD: Final[list[object]] = ["요약", "감정", "강도", "입력", "답변", "표정"]
ROW: Final[list[object]] = ["", "기쁨", 80, "나 왔어", "어디야?", "미소"]


def changed_row(at: int, xml: str) -> list[list[str]]:
    rows = grid([HEAD, ROW, ROW])
    rows[1][at] = xml
    return rows


@pytest.mark.parametrize(
    ("xml", "at", "code"),
    [
        ('<c r="D2"><f>A1</f></c>', 3, "formula"),
        ('<c r="D2" t="e"><v>#N/A</v></c>', 3, "cell_error"),
        ('<c r="D2" s="1"><v>45000</v></c>', 3, "date_cell"),
        ('<c r="C2" s="2"><v>45000.5</v></c>', 2, "date_cell"),
        ('<c r="D2"/>', 3, "missing_field"),
        ('<c r="C2" t="b"><v>1</v></c>', 2, "wrong_type"),
        (cell("D2", "가" * 30_000), 3, "text_too_long"),
    ],
)
def test_cells_that_have_no_value(tmp_path: Path, xml: str, at: int, code: str) -> None:
    styles = (
        '<styleSheet><numFmts><numFmt numFmtId="164" formatCode="yyyy-mm-dd"/></numFmts>'
        '<cellXfs><xf numFmtId="0"/><xf numFmtId="14"/><xf numFmtId="164"/></cellXfs></styleSheet>'
    )
    content = workbook({"a": sheet_xml(changed_row(at, xml))}, styles=styles)
    conversion = converted(tmp_path, content, blood_type=BloodType.A)
    assert [(problem.line, problem.code) for problem in conversion.problems] == [(2, code)]
    assert len(conversion.records) == 1


def test_sheets_headers_merges_formulas_and_hidden_rows(tmp_path: Path) -> None:
    rows = [grid([["모음"]])[0], *([one.replace('1"', '2"') for one in grid([HEAD])[0]],)]
    rows += [[cell(f"{chr(65 + n)}{row}", value) for n, value in enumerate(ROW)] for row in (3, 4, 5)]
    rows[3] = [one for one in rows[3] if 'r="B4"' not in one]
    rows[4][3] = '<c r="D5" t="str"><f>CONCAT(1)</f><v>나 갈게</v></c>'
    first = sheet_xml(rows, after='<mergeCells><mergeCell ref="B3:B4"/></mergeCells>').replace(
        '<row r="5">', '<row r="5" hidden="1">'
    )
    content = workbook({"대화": first, "숨김": sheet_xml(grid([HEAD, ROW]))}, {"숨김": "hidden"})
    conversion = converted(tmp_path, content, blood_type=BloodType.O)
    assert [record.input for record in conversion.records] == ["나 왔어", "나 갈게"]
    assert [(problem.line, problem.code) for problem in conversion.problems] == [(4, "merged_cell")]
    notes = "\n".join(conversion.notes)
    for said in ("row 2 as the column names", "1 hidden sheet", "1 merged ranges", "1 hidden rows", "results of 1 formulas"):
        assert said in notes
    assert len(converted(tmp_path, content, blood_type=BloodType.O, sheet="숨김").records) == 1
    with pytest.raises(DataError, match="no sheet called '없음', expected one of '대화'"):
        converted(tmp_path, content, sheet="없음")


def test_a_bomb_ends_at_the_limit(tmp_path: Path) -> None:
    bomb = workbook({"a": sheet_xml(grid([HEAD, ROW])) + " " * 40_000_000})
    with pytest.raises(DataError, match=r"limits\.compression_ratio"):
        converted(tmp_path, bomb)
    with pytest.raises(DataError, match="more than 1,000,000 bytes"):
        converted(tmp_path, gzip.compress(bytes(2_000_000)), limits=LimitsConfig(decompressed_bytes=1_000_000))


def test_only_the_values_of_python_literals_are_read(tmp_path: Path) -> None:
    path = tmp_path / "touched"
    text = f"{RAW[0]}\n{{'input': __import__('pathlib').Path({str(path)!r}).touch()}}\n"
    assert converted(tmp_path, text).failed == 1
    assert not path.exists()


def test_an_object_of_hundreds(tmp_path: Path) -> None:
    by_index = {str(number): flat(RECORDS[number % 20]) for number in range(300)}
    assert len(converted(tmp_path, json.dumps(by_index)).records) == 300
    by_column = {name: {number: row[name] for number, row in by_index.items()} for name in flat(RECORDS[0])}
    assert len(converted(tmp_path, json.dumps(by_column)).records) == 300


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["{", "{'a': 1}", "80%", "기쁨"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "role", "content", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([CHATS[0], SHAREGPT[0], RAW[0], KOREAN[0], ALPACA, DOTTED, gemini(RECORDS[0], RAW[0])]), json_values, st.data()
)
def test_any_json_value_anywhere_ends_in_a_message(
    tmp_path_factory: pytest.TempPathFactory, item: dict[str, Any], value: object, data: st.DataObject
) -> None:
    changed: Any = json.loads(json.dumps(item))
    place = changed
    while True:
        keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    file = tmp_path_factory.getbasetemp() / "changed"
    file.write_text(json.dumps(changed) + "\n", encoding="utf-8")
    try:
        conversion = convert_file(file, Defaults(**GIVEN))
    except DataError:
        return
    assert conversion.records or conversion.failed
    assert "\n" not in "".join(conversion.problem_lines("f"))


cuts_in_a_file = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.integers(0, 40),
        st.sampled_from([b"", b"\0", b'"', b"[", b"{", b"}", b",", b"\n", b"\xff", b"\xea"]),
    ),
    max_size=4,
)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(FORMS)), cuts_in_a_file)
def test_a_damaged_file_ends_in_a_message(
    tmp_path_factory: pytest.TempPathFactory, form: str, cuts: list[tuple[float, int, bytes]]
) -> None:
    content = FORMS[form]
    content = content if isinstance(content, bytes) else content.encode()
    for share, removed, inserted in cuts:
        at = int(share * len(content))
        content = content[:at] + inserted + content[at + removed :]
    file = tmp_path_factory.getbasetemp() / "damaged"
    file.write_bytes(content)
    try:
        conversion = convert_file(file, Defaults())
    except LoraTrainerError as error:
        said = "\n".join(error.problems)
    else:
        said = "\n".join([*conversion.notes, *conversion.problem_lines("f")])
        assert conversion.records or conversion.problems
        assert bool(conversion.failed) == bool(conversion.problems)
    assert not any(record.input in said or record.reply.text in said for record in RECORDS)


# --- the command -----------------------------------------------------------------------------------------

Convert = Callable[..., tuple[int, str]]


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Return a function that runs the command in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run(content: bytes | str, *arguments: str, name: str = "in.json") -> tuple[int, str]:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        code = run_cli(["convert", name, *arguments])
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        return code, err

    return run


def test_validate_accepts_what_convert_wrote(convert: Convert, capsys: pytest.CaptureFixture[str]) -> None:
    name = "new/train_data_type_A.jsonl"
    code, err = convert(FORMS["csv-korean"], "-o", name)
    said = f"20 records written to {name}, 0 not converted; now run: lora-trainer validate {name}\n"
    assert (code, err) == (0, said)
    assert run_cli(["validate", "--no-tokens", "--strict", name]) == 0
    assert [line.record for line in JsonlReader(Path(name))] == RECORDS
    assert [path.name for path in Path("new").iterdir()] == ["train_data_type_A.jsonl"]


def test_what_cannot_be_converted_is_exit_3_and_the_rest_is_written(convert: Convert) -> None:
    code, err = convert(json_lines([*RAW, {**RAW[0], "input": [PLANTED]}, PLANTED]), "-o", "out.jsonl")
    assert code == ExitCode.DATA
    assert "in.json:21: input: got a list" in err
    assert "in.json:22: got something that is not JSON" in err
    assert "20 records written to out.jsonl, 2 not converted" in err
    assert PLANTED not in err
    assert len(Path("out.jsonl").read_text(encoding="utf-8").splitlines()) == 20


def test_nothing_is_written_if_nothing_is_converted(convert: Convert) -> None:
    code, err = convert(json_lines([PLAIN_CHAT] * 80), "-o", "out.jsonl")
    assert code == ExitCode.DATA
    assert "0 records written, 80 not converted" in err
    assert len(err.splitlines()) == 5
    assert not Path("out.jsonl").exists()
    options = ["--blood-type", "a", "--feeling", "기쁨", "--intensity", "1", "--face", "미소"]
    assert convert(json_lines([PLAIN_CHAT] * 8), "-o", "o.jsonl", *options)[0] == 0
    assert all(line.record for line in JsonlReader(Path("o.jsonl")))


def test_a_file_is_replaced_only_if_forced(convert: Convert) -> None:
    Path("out.jsonl").write_text("mine", encoding="utf-8")
    code, err = convert(FORMS["array"], "-o", "out.jsonl")
    assert code == ExitCode.CONFIG
    assert "got an existing file" in err
    assert Path("out.jsonl").read_text(encoding="utf-8") == "mine"
    assert convert(FORMS["array"], "-o", "out.jsonl", "--force")[0] == 0
    assert convert(FORMS["array"], "-o", "in.json.jsonl", name="in.json.jsonl")[0] == ExitCode.CONFIG
    assert convert(FORMS["array"], "-o", "in.json.jsonl", "--force", name="in.json.jsonl")[0] == 0
    assert [line.record for line in JsonlReader(Path("in.json.jsonl"))] == RECORDS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "s3://bucket/a.jsonl"], "expected a local file"),
        (["-o", "s3:/bucket/a.jsonl"], "s3://bucket/a.jsonl"),
        (["-o", "."], "got the folder"),
        (["-o", "a.csv"], "ends in .jsonl"),
        (["-o", "in.json/a.jsonl"], "in.json/a.jsonl"),
        (["-o", "x" * 300 + ".jsonl"], "too long"),
        (["--blood-type", "A,B"], "expected A, B, O or AB"),
        (["--feeling", "몰라"], "expected one of neutral, happy"),
        (["--face", "happyy"], "expected one of neutral, smile"),
        (["--intensity", "1.5"], "--intensity"),
        (["--sheet", "a"], "a file without sheets"),
    ],
)
def test_wrong_usage_is_one_message(convert: Convert, arguments: list[str], said: str) -> None:
    code, err = convert(FORMS["array"], *arguments)
    assert code in (ExitCode.CONFIG, ExitCode.DATA)
    assert said in err


@pytest.mark.parametrize(("name", "said"), [("none.csv", "no such file"), (".", "a folder")])
def test_an_input_that_is_not_there(capsys: pytest.CaptureFixture[str], name: str, said: str) -> None:
    assert run_cli(["convert", name]) == ExitCode.CONFIG
    assert said in capsys.readouterr().err


def test_a_pipe_to_a_pipe_in_any_locale(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(table([korean(record) for record in PLAIN]).encode("cp949"))
    command = '"$PYTHON" -m entrypoint convert - < "$FILE" | "$PYTHON" -m entrypoint validate --no-tokens --strict -'
    environment = {**os.environ, "PYTHON": sys.executable, "FILE": str(file), "LC_ALL": "C", "PYTHONUTF8": "0"}
    run = subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", command], cwd=REPOSITORY, capture_output=True, env=environment, check=False
    )
    assert (run.returncode, run.stderr.decode()) == (0, f"{len(PLAIN)} records written to standard output, 0 not converted\n")
    assert f"{len(PLAIN)} records in {len(PLAIN)} lines".encode() in run.stdout


def test_an_object_of_a_store(bucket: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import boto3

    body = FORMS["xlsx"]
    boto3.client("s3").put_object(Bucket=bucket, Key="in/train_data_type_A.xlsx", Body=body)
    assert run_cli(["convert", f"s3://{bucket}/in/train_data_type_A.xlsx", "-o", str(tmp_path / "a.jsonl")]) == 0
    assert [line.record for line in JsonlReader(tmp_path / "a.jsonl")] == RECORDS
    assert "20 records written" in capsys.readouterr().err


def documented_commands() -> list[list[str]]:
    text = (REPOSITORY / "docs" / "data-format.md").read_text(encoding="utf-8").split("## From another format")[1]
    block = text.split("```bash\n")[1].split("```")[0]
    return [line.split()[1:] for line in block.splitlines()]


def test_the_commands_of_the_documents_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("records.json").write_text(str(FORMS["array"]), encoding="utf-8")
    Path("dialogues.xlsx").write_bytes((REPOSITORY / "tests" / "assets" / "dialogues.xlsx").read_bytes())
    Path("chats.jsonl").write_text(json_lines([PLAIN_CHAT]), encoding="utf-8")
    *conversions, check = documented_commands()
    for command in conversions:
        assert run_cli(command) == 0, capsys.readouterr().err
    assert check == ["validate", "new/*.jsonl"]
    assert run_cli(["validate", "--no-tokens", *map(str, Path("new").glob("*.jsonl"))]) == 0

"""A file in another format is one diagnosis with the way out, and a file in the project's own is read line by line."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import sqlite3
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from backports import zstd
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from entrypoint.cli import run_cli
from lora_trainer.config import LimitsConfig
from lora_trainer.data.file_kinds import HEAD_BYTES, diagnosis
from lora_trainer.data.jsonl import JsonlReader, diagnose
from lora_trainer.data.problems import Problem
from lora_trainer.data.records import EvaluationPrompt
from lora_trainer.data.validation import read_records
from lora_trainer.errors import DataError, ExitCode

BUNDLED: Final = (REPOSITORY / "data" / "train_data_type_A.jsonl").read_text(encoding="utf-8").splitlines()[:60]
RECORDS: Final[list[dict[str, Any]]] = [json.loads(line) for line in BUNDLED]
REPLIES: Final = [json.loads(record["output"]) for record in RECORDS]
# what cannot be written in CP949 becomes '?', as Windows programs do it
PLAIN: Final = [line.encode("cp949", "replace").decode("cp949") for line in BUNDLED]


def dumped(values: list[Any], **options: Any) -> str:
    return "\n".join(json.dumps(value, ensure_ascii=False, **options) for value in values) + "\n"


def chats(system: bool = True) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                *([{"role": "system", "content": record["instruction"]}] if system else []),
                {"role": "user", "content": record["input"]},
                {"role": "assistant", "content": record["output"]},
            ]
        }
        for record in RECORDS
    ]


def conversations() -> list[dict[str, Any]]:
    return [
        {"conversations": [{"from": "human", "value": r["input"]}, {"from": "gpt", "value": r["output"]}], "id": n}
        for n, r in enumerate(RECORDS)
    ]


def columns() -> list[dict[str, Any]]:
    return [
        {
            "지시문": record["instruction"],
            "요약": record["context"]["summary"],
            "감정": record["context"]["current_emotion"]["type"],
            "감정 강도": record["context"]["current_emotion"]["intensity"],
            "입력": record["input"],
            "답변": reply["text"],
            "표정": reply["emotion"],
        }
        for record, reply in zip(RECORDS, REPLIES, strict=True)
    ]


def table(delimiter: str = ",") -> str:
    rows = [list(columns()[0]), *(list(map(str, row.values())) for row in columns())]
    return "\r\n".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)


def archive(*names: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name in names:
            file.writestr(name, "application/vnd.oasis.opendocument.spreadsheet" if name == "mimetype" else "x")
    return packed.getvalue()


def tar() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as file:
        file.addfile(tarfile.TarInfo("train_data_type_A.jsonl"))
    return packed.getvalue()


def sqlite() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table records (input text)")
    return connection.serialize()


TEXT: Final = "\n".join(BUNDLED) + "\n"
LFS: Final = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 543210\n"
S3_ERROR: Final = "<?xml version='1.0'?>\n<Error><Code>NoSuchKey</Code><Key>a</Key></Error>"
PAIRS: Final = list(zip(RECORDS, REPLIES, strict=True))
ALPACA: Final = [{"instruction": r["instruction"], "input": r["input"], "output": p["text"]} for r, p in PAIRS]
DOTTED: Final = {"instruction": "a", "input": "b", "output": "c", "context.summary": "", "context.current_emotion.type": "sad"}
NAMELESS: Final = [{name: value for name, value in record.items() if name != "instruction"} for record in RECORDS]
PROMPTS: Final[list[dict[str, Any]]] = [{"context": r["context"], "input": r["input"]} for r in RECORDS]
KINDS: Final[dict[str, tuple[bytes | str, str, str, str]]] = {
    # name: content, code, part of what was got, part of the way out
    "array": (json.dumps(RECORDS, ensure_ascii=False, indent=2), "wrong_layout", "a JSON array", "lora-trainer convert"),
    "array-one-line": (json.dumps(RECORDS), "wrong_layout", "a JSON array", "lora-trainer convert"),
    "array-a-record-a-line": ("[\n" + ",\n".join(BUNDLED) + "\n]\n", "wrong_layout", "a JSON array", "lora-trainer convert"),
    "array-empty": ("[]", "wrong_layout", "a JSON array", "convert"),
    "array-of-chats": (json.dumps(chats(), indent=1), "wrong_layout", "a JSON array, in OpenAI chat format", "convert"),
    "array-on-each-line": ("".join(f"[{line}]\n" for line in BUNDLED), "wrong_layout", "each line a JSON array", "convert"),
    "encoded-twice": (dumped(list(BUNDLED)), "wrong_layout", "encoded twice", "convert"),
    "pretty-printed": (dumped(RECORDS, indent=4), "wrong_layout", "pretty-printed", "convert"),
    "pretty-printed-one": (dumped(RECORDS[:1], indent=2), "wrong_layout", "pretty-printed", "convert"),
    "wrapper": (json.dumps({"version": 1, "data": RECORDS}, indent=1), "wrong_layout", "one JSON object around", "convert"),
    "wrapper-one-line": (json.dumps({"records": RECORDS}), "wrong_layout", "one JSON object around", "convert"),
    "wrapper-by-index": (json.dumps({str(n): r for n, r in enumerate(RECORDS)}), "wrong_layout", "one JSON object", "convert"),
    "wrapper-by-column": (json.dumps({k: [r[k] for r in columns()] for k in columns()[0]}), "wrong_layout", "column", "convert"),
    "concatenated": ("".join(BUNDLED), "wrong_layout", "without line breaks", "convert"),
    "separated": (",\n".join(BUNDLED), "wrong_layout", "commas", "convert"),
    "trailing-commas": ("".join(f"{line[:-1]},}}\n" for line in BUNDLED), "wrong_layout", "comma before", "convert"),
    "python": ("".join(f"{record}\n" for record in RECORDS), "wrong_layout", "single quotes", "convert"),
    "python-list": (str(RECORDS), "wrong_layout", "single quotes", "convert"),
    "javascript": ("{instruction: 'a', input: 'b'}\n" * 9, "wrong_layout", "on each line", "json.dumps"),
    "unescaped-quotes": ('{"input": "그가 "응" 했어"}\n' * 9, "wrong_layout", "expecting ',' delimiter", "json.dumps"),
    "json-error-pretty": ('{\n  "error": {\n    "code": 404\n  }\n}\n', "placeholder", "an error document", "download"),
    "server-sent": ("".join(f"data: {line}\n\n" for line in BUNDLED), "wrong_format", "plain text", "one JSON object a line"),
    "chat-on-each-line": (dumped([one["messages"] for one in chats()]), "wrong_layout", "in OpenAI chat format", "convert"),
    "no-instruction": (dumped(NAMELESS), "wrong_schema", "without an instruction", "convert"),
    "toml": ('[[records]]\ninput = "a"\n' * 5, "wrong_layout", "something that is not JSON", "JSON library"),
    "markdown": ("| 입력 | 답변 |\n|---|---|\n| 안녕 | 응 |\n| 뭐해 | 놀아 |\n", "wrong_format", "separated by bars", "convert"),
    "utf-8-as-latin-1": (TEXT.encode().decode("latin-1"), "wrong_encoding", "UTF-8 text that a program read", "export"),
    "cp949-as-latin-1": ("\n".join(PLAIN).encode("cp949").decode("latin-1"), "wrong_encoding", "CP949 text that", "export"),
    "gbk": (("你好,今天天气很好,我们一起去咖啡店吧。\n" * 9).encode("gbk"), "wrong_encoding", "neither UTF-8", "UTF-8"),
    "cp949": ("\n".join(PLAIN).encode("cp949"), "wrong_encoding", "CP949", "save the file as UTF-8"),
    "cp949-array": (("[" + ",\n".join(PLAIN) + "]").encode("cp949"), "wrong_encoding", "CP949", "convert"),
    "euc-kr-csv": (table().encode("euc_kr", "ignore"), "wrong_encoding", "CP949", "convert"),
    "utf-16": (TEXT.encode("utf-16"), "wrong_encoding", "UTF-16", "UTF-8"),
    "utf-16-be": (b"\xfe\xff" + TEXT.encode("utf-16-be"), "wrong_encoding", "UTF-16", "convert"),
    "utf-16-without-bom": (TEXT.encode("utf-16-le"), "wrong_encoding", "UTF-16", "convert"),
    "utf-16-csv": (table("\t").encode("utf-16"), "wrong_encoding", "UTF-16", "convert"),
    "utf-32": (TEXT.encode("utf-32"), "wrong_encoding", "UTF-32", "convert"),
    "utf-32-without-bom": (TEXT.encode("utf-32-be"), "wrong_encoding", "UTF-32", "convert"),
    "johab": (TEXT.encode("johab", "replace"), "wrong_encoding", "neither UTF-8", "UTF-8"),
    "parquet": (b"PAR1" + bytes(range(256)) * 10, "wrong_format", "Parquet", "duckdb"),
    "arrow": (b"ARROW1\0\0" + bytes(500), "wrong_format", "Arrow", "read_feather"),
    "arrow-stream": (b"\xff\xff\xff\xff\x90\x01\0\0\x10" + bytes(500), "wrong_format", "Arrow stream", "datasets"),
    "xlsx": (archive("[Content_Types].xml", "xl/workbook.xml"), "wrong_format", "XLSX", "convert"),
    "ods": (archive("mimetype", "content.xml"), "wrong_format", "ODS", "save it as XLSX"),
    "docx": (archive("word/document.xml"), "wrong_format", "Office", "save it as"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "wrong_format", "XLS", "remove the password"),
    "csv": (table(), "wrong_format", "CSV table, separated by commas", "convert"),
    "csv-semicolons": (table(";"), "wrong_format", "separated by semicolons", "convert"),
    "csv-bom": ("\ufeff" + table(), "wrong_format", "commas", "convert"),
    "tsv": (table("\t"), "wrong_format", "separated by tabs", "convert"),
    "csv-other-columns": ("a,b,c\n1,2,3\n4,5,6\n7,8,9\n", "wrong_format", "CSV table", "name its columns"),
    "lfs": (LFS, "placeholder", "LFS", "git lfs pull"),
    "dvc": ("outs:\n- md5: 0123\n  size: 5\n  path: data.jsonl\n", "placeholder", "DVC", "dvc pull"),
    "xet": ("# xet version 0\nfilesize = 543210\nhash = '0'\n", "placeholder", "Xet", "download"),
    "conflict": (f"{BUNDLED[0]}\n<<<<<<< HEAD\n{TEXT}=======\n{TEXT}>>>>>>> b\n", "wrong_layout", "merge conflict", "one side"),
    "code-block": (f"```jsonl\n{TEXT}```\n", "wrong_layout", "Markdown code block", "convert"),
    "code-block-array": (f"Here:\n\n```json\n{json.dumps(RECORDS, indent=1)}\n```\n", "wrong_layout", "Markdown", "convert"),
    "prose-of-three-lines": ("a = 1\nb\n안녕\n", "wrong_format", "plain text", "one JSON object a line"),
    "json-error-of-a-host": ('{"message": "Not Found", "documentation_url": "x"}', "placeholder", "an error document", "download"),
    "annex": ("../.git/annex/objects/Xx/Yy/SHA256E-s5--0\n", "placeholder", "git-annex", "git annex get"),
    "html": ("<!DOCTYPE html>\n<html><body>Sign in</body></html>\n", "placeholder", "HTML page", "log in"),
    "html-fragment": ("  <html lang='ko'><head><title>502</title></head></html>", "placeholder", "HTML page", "download"),
    "s3-error": (S3_ERROR, "placeholder", "NoSuchKey", "download"),
    "xml": ("<?xml version='1.0'?>\n<records><record>가</record></records>", "wrong_format", "XML", "export"),
    "json-error": ('{"error": "Repository not found"}\n', "placeholder", "an error document", "download"),
    "gzip": (gzip.compress(TEXT.encode()), "compressed", "gzip data", "rename it"),
    "zstd": (zstd.compress(TEXT.encode()), "compressed", "zstd data", "rename it"),
    "zip": (archive("train_data_type_A.jsonl"), "compressed", "a zip archive", "unpack it"),
    "tar": (tar(), "compressed", "a tar archive", "unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\x04" + bytes(100), "compressed", "a 7z archive", "unpack it"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "wrong_format", "a PDF", "export"),
    "sqlite": (sqlite(), "wrong_format", "SQLite", "sqlite3"),
    "pickle": (pickle.dumps(RECORDS), "wrong_format", "pickle", "runs its code"),
    "empty": (b"", "empty_file", "an empty file", "right file"),
    "blank": ("\n \n\n", "empty_file", "only blank lines", "right file"),
    "zeros": (bytes(5000), "wrong_format", "only zero bytes", "copy the file again"),
    "garbage": (random.Random(3).randbytes(5000), "wrong_format", "binary data", "right file"),
    "messages": (dumped(chats()), "wrong_schema", "`messages`", "convert"),
    "messages-without-system": (dumped(chats(system=False)), "wrong_schema", "`messages`", "convert"),
    "sharegpt": (dumped(conversations()), "wrong_schema", "`conversations`", "convert"),
    "alpaca": (dumped(ALPACA), "wrong_schema", "Alpaca", "convert"),
    "completions": (dumped([{"prompt": "a", "completion": "b"}] * 9), "wrong_schema", "pairs", "convert"),
    "questions": (dumped([{"질문": r["input"], "답변": r["output"]} for r in RECORDS]), "wrong_schema", "pairs", "convert"),
    "text-only": (dumped([{"text": r["input"]} for r in RECORDS]), "wrong_schema", "only a `text`", "docs/data-format.md"),
    "preferences": (dumped([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 9), "wrong_schema", "preference", "docs"),
    "flat": (dumped(columns()), "wrong_schema", "flat columns", "convert"),
    "flat-dotted": (dumped([DOTTED] * 9), "wrong_schema", "flat columns", "convert"),
    "other-keys": (dumped([{"id": n, "sentence": "가"} for n in range(9)]), "wrong_schema", "(id, sentence)", "rename"),
    "prompts-as-records": (dumped(PROMPTS), "wrong_schema", "prompts", "eval_prompts"),
    "yaml": ("- instruction: 가\n  input: 나\n- instruction: 다\n  input: 라\n", "wrong_format", "YAML", "yq"),
    "yaml-document": ("---\ninstruction: 가\n", "wrong_format", "YAML", "yq"),
    "prose": ("우리는 카페에서 만나기로 했어.\n" * 20, "wrong_format", "plain text", "one JSON object a line"),
}  # fmt: skip


def as_bytes(content: bytes | str) -> bytes:
    return content if isinstance(content, bytes) else content.encode()


def problems_of(path: Path, schema: Any = None) -> list[Problem]:
    reader = JsonlReader(path, schema) if schema else JsonlReader(path)
    return [problem for line in reader for problem in line.problems]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cause_of_the_whole_file_is_one_problem(tmp_path: Path, kind: str) -> None:
    content, code, got, fix = KINDS[kind]
    file = tmp_path / "train_data_type_A.jsonl"
    file.write_bytes(as_bytes(content))
    (problem,) = problems_of(file)
    assert (problem.line, problem.code) == (None, code)
    assert got in problem.got
    assert fix in problem.fix
    assert all(word not in problem.render(file) for word in ("카페에서", "만나기로"))
    with pytest.raises(DataError) as caught:
        read_records(file)
    assert len(caught.value.problems) == 2
    assert caught.value.exit_code is ExitCode.DATA


@pytest.mark.parametrize("kind", ["array", "cp949", "utf-16", "messages", "parquet", "html", "csv", "empty"])
def test_evaluation_prompts_are_diagnosed_too(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "eval_prompts.jsonl"
    file.write_bytes(as_bytes(KINDS[kind][0]))
    (problem,) = problems_of(file, EvaluationPrompt)
    assert (problem.line, problem.code) == (None, KINDS[kind][1])
    assert "convert" not in problem.fix


@pytest.mark.parametrize("kind", ["array", "cp949", "messages", "tar", "sharegpt", "gzip"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_it_is_diagnosed_inside_a_compressed_file(tmp_path: Path, kind: str, suffix: str) -> None:
    file = tmp_path / f"train_data_type_A.jsonl{suffix}"
    file.write_bytes({".gz": gzip.compress, ".zst": zstd.compress}[suffix](as_bytes(KINDS[kind][0])))
    (problem,) = problems_of(file)
    assert problem.code == KINDS[kind][1]


@pytest.mark.parametrize(
    ("content", "got", "fix"),
    [
        (TEXT.encode(), "plain text under a name that ends in .gz", "remove .gz"),
        (zstd.compress(TEXT.encode()), "zst data under a name that ends in .gz", "end in .zst"),
        (KINDS["html"][0], "an HTML page", "log in"),
        (b"PAR1" + bytes(100), "a Parquet file", "duckdb"),
    ],
)
def test_a_suffix_that_promises_compression(tmp_path: Path, content: bytes | str, got: str, fix: str) -> None:
    file = tmp_path / "train_data_type_A.jsonl.gz"
    file.write_bytes(as_bytes(content))
    (problem,) = problems_of(file)
    assert got in problem.got
    assert fix in problem.fix


@pytest.mark.parametrize("odd", [f"[{BUNDLED[0]}]", json.dumps(chats()[0]), "nonsense", "a,b", "{'instruction': 'a'}", "{", ""])
@pytest.mark.parametrize("at", [0, 30, 60])
def test_one_odd_line_is_an_error_of_its_own(tmp_path: Path, odd: str, at: int) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join([*BUNDLED[:at], odd, *BUNDLED[at:]]) + "\n", encoding="utf-8")
    lines = list(JsonlReader(file))
    assert sum(line.record is not None for line in lines) == 60
    assert {line.number for line in lines if line.record is None} == ({at + 1} if odd else set())


def test_one_line_in_another_encoding_is_an_error_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(
        "\n".join(BUNDLED[:30]).encode() + b"\n" + PLAIN[30].encode("cp949") + b"\n" + "\n".join(BUNDLED[31:]).encode()
    )
    (problem,) = problems_of(file)
    assert (problem.line, problem.code) == (31, "invalid_utf8")


@pytest.mark.parametrize("name", ["A", "B", "O", "AB"])
def test_bundled_data_is_no_other_format(name: str) -> None:
    assert diagnose(REPOSITORY / "data" / f"train_data_type_{name}.jsonl") is None
    assert diagnose(REPOSITORY / "data" / "eval_prompts.jsonl", is_prompts=True) is None


def test_only_the_head_is_judged(tmp_path: Path) -> None:
    long = tmp_path / "data.jsonl"
    lines = ",\n".join(BUNDLED * 40)
    long.write_text(f"[{lines}]", encoding="utf-8")
    assert long.stat().st_size > 2 * HEAD_BYTES
    (problem,) = problems_of(long)
    assert problem.got == "a JSON array"
    long.write_text(json.dumps({"data": RECORDS * 40}), encoding="utf-8")
    assert "one JSON object around" in problems_of(long)[0].got
    long.write_bytes(("\n".join(PLAIN * 40)).encode("cp949"))
    assert "CP949" in problems_of(long)[0].got


def test_a_damaged_stream_is_judged_by_what_comes_before(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(chats(), ensure_ascii=False, indent=1).encode())[:-200])
    assert [problem.code for problem in problems_of(file)] == ["wrong_layout"]


@settings(deadline=None)
@given(
    st.sampled_from(sorted(KINDS)).map(lambda kind: as_bytes(KINDS[kind][0])[:20_000]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=3)), max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_the_diagnosis_takes_any_bytes(
    content: bytes, cuts: list[tuple[float, int, bytes]], is_whole: bool, is_prompts: bool
) -> None:
    for share, removed, inserted in cuts:
        at = int(share * len(content))
        content = content[:at] + inserted + content[at + removed :]
    fault = diagnosis(content, is_whole=is_whole, is_prompts=is_prompts)
    assert fault is None or (fault.got and fault.fix and "\n" not in fault.got + fault.fix)


def test_deep_and_wide_heads_take_no_time() -> None:
    for text in (
        "[" * HEAD_BYTES,
        '{"a":' * (HEAD_BYTES // 5),
        "{" * HEAD_BYTES,
        '"' * HEAD_BYTES,
        "<" * HEAD_BYTES,
        "," * HEAD_BYTES,
    ):
        diagnosis(text.encode(), is_whole=True)


# --- what `validate` reads -------------------------------------------------------------------------------


def validated(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = run_cli(["validate", "--no-tokens", "--json", *arguments])
    out, err = capsys.readouterr()
    assert err == ""
    (report,) = json.loads(out)["files"]
    return code, report


@pytest.mark.parametrize(
    "name", ["train_data_type_AB.ndjson", "TRAIN_DATA_TYPE_AB.JSONL", "train_data_type_AB.json", "Train_Data_Type_ab.NDJSON"]
)
def test_validate_reads_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    file = tmp_path / name
    file.write_text(TEXT, encoding="utf-8")
    code, report = validated(capsys, str(file))
    assert (code, report["records"], report["blood_type"], report["file"]) == (0, 60, "AB", str(file))


@pytest.mark.parametrize("name", ["DATA.JSONL.GZ", "data.ndjson.gz", "data.Jsonl.Gz"])
def test_upper_case_suffixes_decompress(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    file = tmp_path / name
    file.write_bytes(gzip.compress(TEXT.encode()))
    assert validated(capsys, str(file))[1]["records"] == 60


def test_validate_reads_a_fifo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fifo = tmp_path / "train_data_type_A.jsonl"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_text, args=(TEXT,), kwargs={"encoding": "utf-8"})
    writer.start()
    code, report = validated(capsys, str(fifo))
    writer.join()
    assert (code, report["records"], report["blood_type"], report["file"]) == (0, 60, "A", str(fifo))


def test_a_pipe_is_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["validate", "--no-tokens", "--set", "limits.decompressed_bytes=3000000", "/dev/zero"]) == ExitCode.DATA
    assert "got more than 3,000,000 bytes from a pipe, expected no more than limits.decompressed_bytes" in capsys.readouterr().err


def piped(command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/bash", "-c", command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONIOENCODING": "utf-8"},
        **options,
    )


def test_validate_reads_standard_input_and_process_substitution() -> None:
    data = "data/train_data_type_A.jsonl"
    run = piped(
        f'head -n 40 {data} | gzip | "$PYTHON" -m entrypoint validate --no-tokens - <(head -n 20 {data}) <(head -c 90 {data})'
    )
    assert run.returncode == ExitCode.DATA
    assert "40 records in 40 lines" in run.stdout
    assert "20 records in 20 lines" in run.stdout
    assert "standard input: 0 errors" in run.stdout
    assert "the middle of a record" in " ".join(run.stdout.split())
    assert run.stderr == ""


@pytest.mark.parametrize(("name", "said"), [("", "a folder"), ("missing.jsonl", "no such file"), ("a\0b", "control characters")])
def test_what_cannot_be_read_is_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str) -> None:
    assert run_cli(["validate", "--no-tokens", str(tmp_path / name)]) == ExitCode.CONFIG
    assert said in capsys.readouterr().err


# --- the same for objects and for `run` ------------------------------------------------------------------


@pytest.fixture
def in_s3(bucket: str) -> Callable[[str], str]:
    import boto3

    def put(kind: str) -> str:
        boto3.client("s3").put_object(Bucket=bucket, Key="data/train_data_type_A.jsonl", Body=as_bytes(KINDS[kind][0]))
        return f"s3://{bucket}/data/"

    return put


@pytest.mark.parametrize("kind", ["array", "s3-error"])
def test_validate_check_storage_and_run_say_the_same(
    in_s3: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder, expected = in_s3(kind), f"train_data_type_A.jsonl: got {KINDS[kind][2]}"
    base = ["--base-model", str(REPOSITORY / "examples" / "tiny-base"), "--device", "cpu", "--set", "training.quantization=none"]
    where = ["--blood-type", "A", "--data", folder, "--output", str(tmp_path / "out"), "--work-dir", str(tmp_path / "work")]
    code, report = validated(capsys, f"{folder}train_data_type_A.jsonl")
    assert (code, len(report["problems"])) == (3, 1)
    assert report["file"] == f"{folder}train_data_type_A.jsonl"
    said = Problem(**report["problems"][0]).render(report["file"])
    for command in ("check-storage", "run"):
        assert run_cli([command, *where, *base]) == ExitCode.DATA
        err = capsys.readouterr().err
        assert json.dumps(said, ensure_ascii=False)[1:-1] in err or said in err
    assert kind == "s3-error" or expected in said


def test_limits_bound_the_head(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl.gz"
    file.write_bytes(gzip.compress(bytes(2**22)))
    assert [problem.code for problem in problems_of(file)] == ["wrong_format"]
    assert diagnose(file, LimitsConfig(decompressed_bytes=2**16)) is not None

"""Run `validate` on hostile data files: each yields one message and the right exit code, and no message quotes their text."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from hostile import PLANTED, HostileLine, count, drawn, huge_lines, lines, record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrypoint.cli import run_cli
from lora_trainer.config import LimitsConfig
from lora_trainer.data.jsonl import JsonlReader, parse_record
from lora_trainer.errors import ExitCode

TOO_DEEP = "lists or objects nested more than 16 deep (limits.nesting_depth)"
GOOD = json.dumps(record()).encode()
PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress}


def validate(content: bytes, suffix: str, *more: str) -> tuple[int, dict[str, Any]]:
    """Run `validate`. Return its exit code and report. Any exception fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"train_data_type_A.jsonl{suffix}"
        path.write_bytes(content)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_cli(["validate", "--no-tokens", "--json", *more, str(path)])
    assert PLANTED not in out.getvalue() + err.getvalue()
    assert "Traceback" not in out.getvalue() + err.getvalue()
    (report,) = json.loads(out.getvalue())["files"]
    return code, report


def holds(line: HostileLine, suffix: str) -> None:
    count("records")
    code, report = validate(PACKERS[suffix](line.raw + b"\n"), suffix)
    assert code == (ExitCode.DATA if report["errors"] else ExitCode.DONE)
    if line.is_refused is not None:
        assert code == (ExitCode.DATA if line.is_refused else ExitCode.DONE), report["problems"]
    assert report["errors"] <= 20
    for problem in report["problems"]:
        assert {"got", "expected", "fix"} <= set(problem)
        assert len(json.dumps(problem)) < 2000


@settings(max_examples=drawn(10_000, 200), deadline=None, suppress_health_check=list(HealthCheck))
@given(lines, st.sampled_from(list(PACKERS)))
def test_a_hostile_line_is_one_message_and_exit_3(line: HostileLine, suffix: str) -> None:
    holds(line, suffix)


@settings(max_examples=drawn(200, 5), deadline=None, suppress_health_check=list(HealthCheck))
@given(huge_lines, st.sampled_from(list(PACKERS)))
def test_a_record_of_megabytes_is_one_message_and_exit_3(line: HostileLine, suffix: str) -> None:
    holds(line, suffix)


@settings(max_examples=drawn(1_000, 60), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([".gz", ".zst"]), st.floats(0, 1), st.binary(max_size=4), st.booleans())
def test_a_damaged_stream_is_one_error_and_exit_3(suffix: str, at: float, bytes_there: bytes, is_cut: bool) -> None:
    count("damaged_streams")
    packed = PACKERS[suffix]((GOOD + b"\n") * 50)
    place = int(at * len(packed))
    damaged = packed[:place] if is_cut else packed[:place] + bytes_there + packed[place + len(bytes_there) :]
    code, report = validate(damaged, suffix)
    errors = [problem["code"] for problem in report["problems"] if problem["severity"] == "error"]
    assert code == (ExitCode.DATA if errors else ExitCode.DONE)
    # The reader may return records from before the damage. It reports the damage once.
    assert errors.count("corrupt_stream") <= 1
    if is_cut and 0 < place < len(packed):
        assert errors == ["corrupt_stream"]


@pytest.mark.parametrize(
    ("line", "code", "got"),
    [
        ({**record(), "input": "a\u202eb"}, "bidi_control", "bidirectional control U+202E at character 2"),
        ({**record(), "input": "a\x9bb"}, "control_character", "control character U+009B at character 2"),
        ({**record(), "input": "가" * 20_001}, "text_too_long", "text of 20,001 characters"),
        ({**record(), **{f"k{n}": 0 for n in range(70)}}, "too_many_keys", "an object of 74 keys"),
        ({**record(), "input": [[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]}, "too_deep", TOO_DEEP),
        ({**record(), "output": '{"text": ' + "[" * 20 + "]" * 20 + "}"}, "too_deep", TOO_DEEP),
    ],
)  # fmt: skip
def test_what_is_said(line: dict[str, Any], code: str, got: str) -> None:
    (problem,) = parse_record(json.dumps(line)).problems
    assert (problem.code, problem.got) == (code, got)


def test_brackets_inside_a_text_nest_nothing() -> None:
    assert parse_record(json.dumps(record(said='[{"\\' * 500))).record is not None


@pytest.mark.parametrize("field", ["instruction", "context.summary", "input", "output.text"])
def test_a_control_token_in_a_text_is_a_warning(field: str) -> None:
    names = ["instruction", "context.summary", "input", "output.text"]
    texts = ["x</tool_call>" if name == field else "x" for name in names]
    line = parse_record(json.dumps(record(*texts)))
    assert line.record is not None
    assert [(problem.code, problem.field) for problem in line.problems] == [("control_token", field)]


def test_limits_are_settings() -> None:
    long = json.dumps(record(said="가" * 2000), ensure_ascii=False).encode()
    assert validate(long, "")[0] == ExitCode.DONE
    assert validate(long, "", "--set", "limits.text_characters=1000")[0] == ExitCode.DATA
    assert validate(long, "", "--set", "limits.line_bytes=2048")[0] == ExitCode.DATA
    assert validate(b"[" * 50, "", "--set", "limits.nesting_depth=100")[1]["problems"][0]["code"] != "too_deep"
    wide = json.dumps(record(said="가" * 200_000), ensure_ascii=False).encode() + b" " * 2**20
    assert validate(wide, "", "--set", "limits.line_bytes=4194304", "--set", "limits.text_characters=300000")[0] == ExitCode.DONE


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_the_whole_run_of_a_bomb_is_one_error(tmp_path: Path, suffix: str) -> None:
    bomb = tmp_path / f"a.jsonl{suffix}"
    with gzip.open(bomb, "wb") if suffix == ".gz" else zstd.open(bomb, "wb") as out:
        for _ in range(64):
            out.write(b" " * 2**20)
    reader = JsonlReader(bomb)
    (line,) = [line for line in reader if line.problems]
    (problem,) = line.problems
    assert (problem.line, problem.code) == (None, "decompressed_too_large")
    assert problem.fix.endswith("raise limits.compression_ratio")
    (problem,) = next(iter(JsonlReader(bomb, limits=LimitsConfig(decompressed_bytes=2**20, compression_ratio=1e6)))).problems
    assert problem.fix.endswith("raise limits.decompressed_bytes")
    assert [p.code for line in JsonlReader(bomb, limits=LimitsConfig(compression_ratio=1e6)) for p in line.problems] == [
        "line_too_long"
    ]

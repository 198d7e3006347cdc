"""Every URI and path goes through one parser: what looks mistyped is refused with the right spelling and without secrets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from entrypoint.cli import run_cli
from lora_trainer.config_sources import settle
from lora_trainer.errors import ConfigError, ExitCode
from lora_trainer.store.keys import split_uri
from lora_trainer.store.opening import open_storage
from lora_trainer.uris import SCHEMA_ACCEPTS, SCHEMA_REFUSES, check_base_model, expand_home, local_path, parse_uri, shown

ROOT = Path(__file__).parents[2]
SECRET = "wJalrXUtnFEMI7K7MDENGbPxRfiCYEXAMPLEKEY"  # noqa: S105

# what somebody wrote, and what the message names
MISTYPED = [
    ("s3:/team/lora/", "s3://team/lora/"),
    ("s3//team/lora/", "s3://team/lora/"),
    ("s3:team/lora/", "s3://team/lora/"),
    ("S3://team/lora/", "s3://team/lora/"),
    ("s3:///team/lora/", "s3://team/lora/"),
    ("s3a://team/lora/", "s3://team/lora/"),
    ("s3n://team/lora/", "s3://team/lora/"),
    ("ss3://team/lora/", "s3://team/lora/"),
    ("s3;//team/lora/", "s3://team/lora/"),
    ("s3 ://team/lora/", "s3://team/lora/"),
    ("=s3://team/lora/", "s3://team/lora/"),
    ("//team/lora/", "s3://team/lora/ or /team/lora/"),
    ("s3:\\\\team\\lora\\", "s3://team/lora/"),
    ("s3\uff1a//team/lora/", "s3://team/lora/"),
    ("\uff53\uff13://team/lora/", "s3://team/lora/"),
    ("s3://team//lora/", "s3://team/lora/"),
    ("s3://team/lora/?versionId=1", "s3://team/lora/"),
    ("s3://team/lora/#top", "s3://team/lora/"),
    ('"s3://team/lora/"', "s3://team/lora/"),
    ("\u201cs3://team/lora/\u201d", "s3://team/lora/"),
    ("s3://team/lora/,", "s3://team/lora/"),
    ("gs://team/lora/", "s3://team/lora/ and set AWS_ENDPOINT_URL=https://storage.googleapis.com"),
    ("https://team.s3.ap-northeast-2.amazonaws.com/lora/", "s3://team/lora/"),
    ("https://s3.amazonaws.com/team/lora/", "s3://team/lora/"),
    ("https://team.s3.dualstack.us-west-2.amazonaws.com/lora/", "s3://team/lora/"),
    ("https://my.team.s3-us-west-2.amazonaws.com/lora/", "s3://my.team/lora/"),
    ("http://team.s3.amazonaws.com/%ED%95%9C%EA%B8%80/", "s3://team/한글/"),
    ("team.s3.ap-northeast-2.amazonaws.com/lora/", "s3://team/lora/"),
    ("s3://team.s3.amazonaws.com/lora/", "s3://team/lora/"),
    ("https://s3.console.aws.amazon.com/s3/buckets/team?region=x&prefix=lora/", "s3://team/lora/"),
    ("http://minio:9001/browser/team/lora", "s3://team/"),
    ("http://minio:9000/team/lora/", "s3://team/lora/ and set AWS_ENDPOINT_URL=http://minio:9000"),
    ("minio:9000/team/lora/", "s3://team/lora/ and set AWS_ENDPOINT_URL=http://minio:9000"),
    ("s3://minio:9000/team/lora/", "s3://team/lora/ with AWS_ENDPOINT_URL=http://minio:9000"),
    ("arn:aws:s3:::team/lora/*", "s3://team/lora/"),
    ("file:/srv/lora/", "file:///srv/lora/"),
    ("file://srv/lora/", "file:///srv/lora/"),
    ("FILE:///srv/lora/", "file:///srv/lora/"),
    ("file:///srv/100%/", "%25"),
    ("file://~/lora/", "~/lora/"),
    ("C:\\Users\\me\\lora", "/mnt/c/"),
    ("/mnt/c/lora ", "U+0020 SPACE"),
    ("s3://team/lora/\u00a0", "U+00A0 NO-BREAK SPACE"),
    ("\ufeffs3://team/lora/", "U+FEFF"),
    ("s3://te\u200bam/lora/", "U+200B ZERO WIDTH SPACE"),
    ("s3://team/ lora/", "white space"),
    ("s3://${BUCKET}/lora/", "'${BUCKET}' looks like a placeholder"),
    ("$OUT/lora", "'$OUT' looks like a placeholder"),
    ("$(OUT)", "'$(OUT)' looks like a placeholder"),
    ("s3://{{ .Values.bucket }}/lora/", "'{{ .Values.bucket }}' looks like a placeholder"),
    ("%OUT%/lora", "'%OUT%' looks like a placeholder"),
    ("s3://<bucket>/lora/", "'<bucket>' looks like a placeholder"),
    ("{output}/lora", "'{output}' looks like a placeholder"),
    ("None", "a missing value"),
    ("--epochs", "looks like an option"),
    ("data\\train", "a backslash"),
    ("data/*", "patterns are not expanded"),
    ("s3://a1b/x/,s3://b2c/x/", "two URIs"),
    ("minio:team/lora", "expected s3://bucket/prefix/"),
    ("run:latest/", "write ./run:latest/ for a folder of that name"),
    ("s3://None/lora/", "a missing value"),
    ("s3://team/undefined/", "a missing value"),
    ("s3://team/%Y-%m-%d/", "'%Y' looks like a placeholder"),
    ("s3://team/`date`/", "'`date`' looks like a placeholder"),
    ("<s3://team/lora/>", "s3://team/lora/?"),
    ("/job/s3:/team/lora/", "s3://team/lora/"),
    ("/s3://team/lora/", "s3://team/lora/"),
    ("s3://localhost:9000/", "expected s3://bucket/prefix/, file:///folder/ or a folder"),
    ("kr.object.ncloudstorage.com/team/lora/", "s3://team/lora/"),
    ("https://raw.githubusercontent.com/team/lora/a.jsonl", "or a folder"),
    ("s3://Team/lora/", "lower-case"),
    ("s3://my_team/lora/", "lower-case"),
    ("s3://ab/lora/", "3 to 63"),
]


@pytest.mark.parametrize(("text", "named"), MISTYPED)
def test_a_mistyped_uri_is_refused_with_the_right_spelling(text: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with pytest.raises(ValueError, match=re.escape(named)):
        parse_uri(text)
    for call in (open_storage, split_uri):
        with pytest.raises(ConfigError):
            call(text)
    for setting in ("data", "output", "evaluation.prompts", "work_dir", "base.cache_dir", "base.model"):
        with pytest.raises(ConfigError, match=setting):
            settle({"blood_type": "A", setting: text}, {})


ACCEPTED = [
    "data", "한글 폴더/자료", "a#b", "a@b", "a+b", "my folder/x", "s3/x", "O'Reilly/", "100%", "a$1", "12:30/x",
    "2026-11-30T10:30/",    "./s3:/team", "./C:\\x", "../s3:team", "/srv/a:b/", "./--epochs", "./'x'", "a/{x}y",
    "s3://team", "s3://team/", "s3://team/한글 폴더/", "s3://team/day=1/a+b@c/", "s3://my.team/x",
    "file:///srv/a b/#x", "file:///srv/%EB%82%98/%24%7BX%7D", "file://localhost/srv/",
]  # fmt: skip


@pytest.mark.parametrize("text", ACCEPTED)
def test_odd_names_that_are_right_are_taken(text: str) -> None:
    assert settle({"blood_type": "A", "output": text}, {}).output == text
    open_storage(text)


def test_the_rules_of_the_chart_are_the_same() -> None:
    """JSON Schema has them as two expressions; a bucket's name and the rest of a local path are checked elsewhere."""

    def refused(text: str) -> bool:
        return not re.search(SCHEMA_ACCEPTS, text) or re.search(SCHEMA_REFUSES, text) is not None

    assert [text for text, named in MISTYPED if not refused(text) and named not in ("lower-case", "3 to 63")] == []
    uris = [text for text in ACCEPTED if text.startswith(("s3://", "file:///"))]
    assert [text for text in uris if refused(text)] == []


def test_other_stores_have_other_bucket_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://storage.googleapis.com")
    assert parse_uri("s3://my_Team/x/").bucket == "my_Team"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/tree/main", "did you mean Qwen/Qwen2.5-7B-Instruct?"),
        ("hf://Qwen/Qwen2.5-7B-Instruct", "did you mean Qwen/Qwen2.5-7B-Instruct?"),
        ("models/qwen/7b", "did you mean ./models/qwen/7b?"),
        ("Qwen/Qwen2.5-7B-Instruct@main", "expected a hub id"),
        ("Qwen/Qwen2.5-7B-Instruct ", "U+0020"),
    ],
)
def test_what_is_no_base(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        check_base_model(text)


@pytest.mark.parametrize(
    "text",
    [
        f"https://team.s3.amazonaws.com/x.jsonl?X-Amz-Credential=AK&X-Amz-Signature={SECRET}",
        f"https://acct.r2.cloudflarestorage.com/team/x.jsonl?sig={SECRET}",
        f"s3://team/x.jsonl?X-Amz-Security-Token={SECRET}",
        f"s3:/AKIAIOSFODNN7EXAMPLE:{SECRET}/x@team/x.jsonl",
        f"team.s3.amazonaws.com/x.jsonl?X-Amz-Signature={SECRET}",
    ],
)
def test_a_signature_in_a_mistyped_uri_is_not_shown(text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"blood_type: A\noutput: {text}\n")
    commands = [
        ["show-config", "--data", text],
        ["show-config", "--config", str(tmp_path / "run.yaml")],
        ["check-storage", "--blood-type", "A", "--output", text],
        ["validate", "--no-tokens", text],
        ["generate", "--count", "1", "--output", text],
        ["generate", "--count", "1", "--report", text],
        ["promote", text],
        ["compare", text],
        ["evaluate", "--adapter", text],
        ["publish", text],
    ]
    for arguments in commands:
        assert run_cli(arguments) == ExitCode.CONFIG, arguments
        said = capsys.readouterr()
        assert SECRET not in said.out + said.err
        assert SECRET not in shown(text)


@pytest.mark.parametrize("text", ["s3:/team/x", "s3://team/x ", "${OUT}/x"])
def test_every_command_refuses_and_writes_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [
        ["run", "--blood-type", "A", "--output", text],
        ["run", "--blood-type", "A", "--data", text],
        ["check-storage", "--blood-type", "A", "--output", text],
        ["validate", "--no-tokens", text],
        ["generate", "--count", "1", "--output", text],
        ["generate", "--count", "1", "--against", text],
        ["generate", "--count", "1", "--report", text],
        ["generate", "--count", "1", "--work-dir", text],
        ["show-config", "--config", text],
        ["promote", text],
        ["compare", text, text],
        ["compare", "x", "x", "--html", text],
        ["publish", text],
        ["evaluate", "--adapter", text],
    ]
    for arguments in commands:
        assert run_cli(arguments) == ExitCode.CONFIG, arguments
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert any(hint in said.out + said.err for hint in ("did you mean s3://team/x", "white space", "placeholder")), arguments
    monkeypatch.setenv("LORA_TRAINER_OUTPUT", text)
    assert run_cli(["show-config"]) == ExitCode.CONFIG
    assert "LORA_TRAINER_OUTPUT" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_local_path_is_no_object() -> None:
    with pytest.raises(ValueError, match="a path on this machine"):
        local_path("s3://team/report.html")
    assert local_path("file:///srv/a%20b") == Path("/srv/a b")


# --- home folders -----------------------------------------------------------------------------------------


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert expand_home("~/x") == Path("/home/someone/x")
    assert expand_home("./~/x") == Path.cwd() / "~" / "x"
    assert expand_home("a~/x") == Path("a~/x")
    for home in ("", "relative"):
        monkeypatch.setenv("HOME", home)
        with pytest.raises(ValueError, match="names no folder here"):
            expand_home("~/x")
    with pytest.raises(ValueError, match=r"'~nobody-of-this-name' names no folder here"):
        expand_home("~nobody-of-this-name/x")


WITHOUT_HOME = """
import os, pwd, sys
os.environ.pop("HOME", None)
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
from entrypoint.cli import run_cli
for line in sys.stdin.read().splitlines():
    print("==", run_cli(line.split("|")), flush=True)
"""


def test_without_a_home_each_command_says_the_same(tmp_path: Path) -> None:
    lines = (ROOT / "data" / "train_data_type_A.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train_data_type_A.jsonl").write_text("".join(lines[:40]), encoding="utf-8")
    base = ["--set=base.model=s3://team/base/", "--device=cpu", "--output=out", f"--data={tmp_path}"]
    commands = [
        ["check-storage", "--blood-type", "A", *base],
        ["check-storage", "--blood-type", "A", "--data", "~/data"],
        ["run", "--blood-type", "A", *base],
        ["run", "--blood-type", "A", "--output", "~/out"],
        ["run", "--blood-type", "A", "--work-dir", "~/work"],
        ["run", "--blood-type", "A", "--set", "evaluation.prompts=~/prompts.jsonl"],
        ["run", "--blood-type", "A", "--base-model", "~/base"],
        ["validate", f"{tmp_path}/train_data_type_A.jsonl"],
        ["generate", "--count", "3", "--blood-type", "A", "--output", "~/gen"],
        ["generate", "--count", "3", "--report", "~/report.html"],
        ["validate", "--no-tokens", "~/data.jsonl"],
        ["show-config", "--config", "~/run.yaml"],
        ["publish", "~/bundle"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HOME],
        input="\n".join("|".join(command) for command in commands),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))},
            "PYTHONPATH": str(ROOT),
        },
        check=True,
    )
    # `validate` goes on without counting tokens
    assert done.stdout.count("== 2") == len(commands) - 1, done.stdout + done.stderr
    assert "tokens not counted: base.model: Qwen/Qwen2.5-7B-Instruct" in done.stderr
    assert (done.stdout + done.stderr).count("'~' names no folder here") >= len(commands)
    assert "name a folder with HF_HOME" in done.stderr
    assert done.stderr.count("base.cache_dir: got '~/.cache/lora-trainer'") >= 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "~").exists()


# --- the names of data files ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.ndjson", "data.JSONL", "DATA.NDJSON", "train_data_type_A.jsonl"])
def test_run_takes_the_files_that_validate_takes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(ROOT / "data" / "train_data_type_A.jsonl", tmp_path / name)
    assert run_cli(["check-storage", "--blood-type", "A", "--data", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 0
    assert f"{name}: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["data.csv", "data.json", "DATA.XLSX", "data.txt", "data", "data.jsonl.bz2"])
def test_a_file_of_another_format_is_named_with_the_way_out(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    path.write_text("{}\n")
    output = ["--output", str(tmp_path / "out")]
    for data in (str(path), path.as_uri(), f"s3://team/{name}"):
        if data == "s3://team/data":
            # an object and a folder of this name look the same
            continue
        assert run_cli(["check-storage", "--blood-type", "A", "--data", data, *output]) == ExitCode.CONFIG
        said = capsys.readouterr().err
        assert "ends in .jsonl or .ndjson" in said
        assert "lora-trainer convert" in said
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    shutil.copy(ROOT / "data" / "train_data_type_A.jsonl", folder)
    assert run_cli(["check-storage", "--blood-type", "A", "--data", str(folder), *output]) == 0

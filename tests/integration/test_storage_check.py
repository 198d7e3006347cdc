"""Run `lora-trainer check-storage` against a real server, and through a proxy that rejects requests, hides or damages objects."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from conftest import REPOSITORY
from fault_proxy import Answer, Asked, FaultProxy

from entrypoint.cli import run_cli
from lora_trainer.errors import ExitCode

pytestmark = pytest.mark.integration

TINY_BASE = REPOSITORY / "examples" / "tiny-base"

Check = Callable[..., tuple[int, str, str]]


class Gateway(FaultProxy):
    """A proxy that forwards everything unless `answers` has a replacement."""

    def __init__(self, upstream_url: str, answers: Callable[[Asked, Callable[[], Answer]], Answer]) -> None:
        super().__init__(upstream_url, share=0)
        self._answers = answers

    def forward(self, asked: Asked, headers: list[tuple[str, str]], body: bytes) -> Answer:
        return self._answers(asked, lambda: super(Gateway, self).forward(asked, headers, body))


def xml(status: int, reason: str, said: bytes) -> Answer:
    return Answer(status, reason, [("Content-Type", "application/xml"), ("Content-Length", str(len(said)))], said)


REFUSED = xml(403, "Forbidden", b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
EMPTY_LISTING = xml(200, "OK", b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")


@pytest.fixture
def check(bucket: str, capsys: pytest.CaptureFixture[str]) -> Check:
    """Return a function that runs the command on a bucket with A's and B's data."""
    for blood_type in "AB":
        boto3.client("s3").put_object(Bucket=bucket, Key=f"data/train_data_type_{blood_type}.jsonl", Body=b"{}\n")
    given = {"data": f"s3://{bucket}/data/", "output": f"s3://{bucket}/lora/", "base_model": str(TINY_BASE), "blood_type": "A"}

    def call(**changes: str) -> tuple[int, str, str]:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in {**given, **changes}.items()]
        code = run_cli(["check-storage", *options])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def objects(bucket: str) -> list[str]:
    return [item["Key"] for item in boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix="lora/").get("Contents", [])]


def test_all_is_well_and_nothing_stays(check: Check, bucket: str) -> None:
    code, out, err = check()
    assert (code, err) == (ExitCode.DONE, "")
    assert out.splitlines() == [
        f"ok: data: s3://{bucket}/data/train_data_type_A.jsonl: 3 bytes read",
        f"ok: base: {TINY_BASE}: 5 model files, the weights by their headers",
        f"ok: output: s3://{bucket}/lora/runs/A/: a probe was written, read, listed and deleted",
        f"ok: output: s3://{bucket}/lora/adapters/A/: may be written to",
    ]
    assert objects(bucket) == []


def test_several_personas(check: Check, bucket: str) -> None:
    code, out, _ = check(blood_type="A,B")
    assert code == ExitCode.DONE
    assert [line.split(": ")[1] for line in out.splitlines()] == ["data", "data", "base", "output", "output", "output", "output"]
    assert f"s3://{bucket}/lora/adapters/B/" in out


def test_one_file_of_several_personas_is_refused_as_run_refuses_it(check: Check, bucket: str) -> None:
    code, out, err = check(blood_type="A,B", data=f"s3://{bucket}/data/train_data_type_A.jsonl")
    assert (code, out) == (ExitCode.CONFIG, "")
    assert "expected a folder that holds train_data_type_" in err
    assert check(data=f"s3://{bucket}/data/train_data_type_A.jsonl")[0] == ExitCode.DONE


def test_a_hub_id_is_not_asked_for(check: Check) -> None:
    code, out, _ = check(base_model="Qwen/Qwen2.5-7B-Instruct")
    assert code == ExitCode.DONE
    assert "ok: base: Qwen/Qwen2.5-7B-Instruct: a hub id, which is checked when it is downloaded" in out


def test_a_base_in_the_store(check: Check, bucket: str) -> None:
    for name in ("config.json", "tokenizer.json"):
        boto3.client("s3").put_object(Bucket=bucket, Key=f"base/{name}", Body=b"{}")
    code, _, err = check(base_model=f"s3://{bucket}/base")
    assert code == ExitCode.CONFIG
    assert "not a model: *.safetensors missing" in err
    for path in TINY_BASE.iterdir():
        boto3.client("s3").upload_file(str(path), bucket, f"base/{path.name}")
    code, out, _ = check(base_model=f"s3://{bucket}/base")
    assert code == ExitCode.DONE
    assert f"s3://{bucket}/base: 5 model files, the weights by their headers" in out
    # only ranges of the weights are read, and what they say is checked
    boto3.client("s3").put_object(Bucket=bucket, Key="base/model.safetensors", Body=b"\xff" * 4096)
    code, _, err = check(base_model=f"s3://{bucket}/base")
    assert code == ExitCode.CONFIG
    assert f"base.model: s3://{bucket}/base/model.safetensors: got a header of" in err


def test_what_fails_stops_none_of_the_rest(check: Check, bucket: str) -> None:
    code, out, err = check(blood_type="O", base_model=f"s3://{bucket}/nothing/", output="s3://no-bucket-of-ours/lora/")
    assert [line.split(": ")[1] for line in err.splitlines()] == ["data", "base", "output", "output"]
    assert "train_data_type_O.jsonl: not found; " in err
    assert "no bucket called 'no-bucket-of-ours'" in err
    # 3 is the worst of the four codes 3, 2, 2 and 2
    assert (code, out) == (ExitCode.DATA, "")


def through(
    s3_server: Any, monkeypatch: pytest.MonkeyPatch, check: Check, answers: Callable[[Asked, Callable[[], Answer]], Answer]
) -> tuple[int, str, str]:
    with Gateway(s3_server.endpoint_url, answers) as gateway, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", gateway.url)
        return check()


@pytest.mark.parametrize(
    ("is_refused", "named"),
    [
        (lambda asked: asked.method == "PUT" and "/runs/" in asked.path, "s3:PutObject"),
        (lambda asked: asked.method == "PUT" and "/adapters/" in asked.path, "s3:PutObject"),
        (lambda asked: asked.method == "GET" and "/runs/" in asked.path and "prefix=" not in asked.path, "s3:GetObject"),
        (lambda asked: asked.method == "GET" and "prefix=" in asked.path, "s3:ListBucket"),
        (lambda asked: asked.method == "DELETE", "s3:DeleteObject"),
        (lambda asked: asked.method == "GET" and asked.path.partition("?")[0].endswith(".jsonl"), "s3:GetObject"),
    ],
    ids=["write to runs", "write to adapters", "read the output", "list", "delete", "read the data"],
)
def test_a_right_that_is_missing_is_named(
    check: Check, s3_server: Any, aws_environment: pytest.MonkeyPatch, is_refused: Callable[[Asked], bool], named: str
) -> None:
    code, _, err = through(s3_server, aws_environment, check, lambda asked, ask: REFUSED if is_refused(asked) else ask())
    assert code == ExitCode.STORAGE
    assert named in err
    assert len(err.splitlines()) == 1


def test_no_right_to_delete_is_needed_under_adapters(
    check: Check, bucket: str, s3_server: Any, aws_environment: pytest.MonkeyPatch
) -> None:
    code, _, _ = through(
        s3_server,
        aws_environment,
        check,
        lambda asked, ask: REFUSED if asked.method == "DELETE" and "/adapters/" in asked.path else ask(),
    )
    assert code == ExitCode.DONE
    assert objects(bucket) == []


def test_a_store_that_hides_what_was_written(check: Check, s3_server: Any, aws_environment: pytest.MonkeyPatch) -> None:
    code, _, err = through(
        s3_server, aws_environment, check, lambda asked, ask: EMPTY_LISTING if "prefix=" in asked.path else ask()
    )
    assert code == ExitCode.STORAGE
    assert "written, but not listed under runs/A/" in err


def test_a_store_without_conditional_writes_is_said(check: Check, s3_server: Any, aws_environment: pytest.MonkeyPatch) -> None:
    class Unconditional(FaultProxy):
        def forward(self, asked: Asked, headers: list[tuple[str, str]], body: bytes) -> Answer:
            return super().forward(asked, [pair for pair in headers if not pair[0].lower().startswith("if-")], body)

    with Unconditional(s3_server.endpoint_url, share=0) as gateway:
        aws_environment.setenv("AWS_ENDPOINT_URL", gateway.url)
        code, out, _ = check()
    assert code == ExitCode.DONE
    assert "listed and deleted; the store has no conditional writes" in out
    assert "adapters/A/: a probe was written and deleted; the store has no conditional writes" in out


def test_a_local_output(check: Check, tmp_path: Path) -> None:
    output = tmp_path / "outputs"
    code, out, _ = check(output=str(output))
    assert code == ExitCode.DONE
    assert f"{output}/adapters/A/: a probe was written and deleted" in out
    assert [path for path in output.rglob("*") if path.is_file() and not path.name.startswith(".~")] == []
    shutil.rmtree(output)
    output.write_text("a file in the way")
    code, _, err = check(output=str(output))
    assert code == ExitCode.CONFIG
    assert "got a file" in err

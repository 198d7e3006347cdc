"""The job uses every right in k8s/aws/storage-policy.json, and no other.

A proxy in front of a real S3 server rejects requests that the policy does not allow, as S3 does. Only a client that may list a
missing key learns that it is missing; its name counts as `s3:prefix` (observed in https://github.com/ceph/ceph/pull/68577).

"""

from __future__ import annotations

import fnmatch
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote

import boto3
import pytest
from conftest import REPOSITORY
from fault_proxy import Answer, Asked, FaultProxy
from jobs import DEMO, NO_GATES, few_questions, require_training_stack

from lora_trainer.errors import StorageError
from lora_trainer.store.opening import open_storage

pytestmark = pytest.mark.e2e
require_training_stack()

POLICY: Final = REPOSITORY / "k8s" / "aws" / "storage-policy.json"
OBJECT_ACTIONS: Final = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "PUT": "s3:PutObject", "POST": "s3:PutObject"}
RUN: Final = (
    *DEMO, "--blood-type", "A", "--set", "memory.micro_batch_tokens=512",
    "--set", "base.canonical_id=example/tiny-base", "--set", "storage.object_budget_s=0",
)  # fmt: skip
SHORT: Final = (
    "--max-steps", "8", "--log-format", "json", "--set", "checkpoints.every_steps=2", "--set", "checkpoints.keep=1",
    *few_questions(16, "0.9"), *NO_GATES,
)  # fmt: skip


def statements(bucket: str) -> list[dict[str, Any]]:
    text = POLICY.read_text(encoding="utf-8").replace("my-bucket", bucket)
    return list(json.loads(text)["Statement"])


class Gatekeeper(FaultProxy):
    """Forward requests that the policy allows. Record which statement allowed which action, and the rejected requests."""

    def __init__(self, upstream_url: str, policy: list[dict[str, Any]], failing_part: int = 0) -> None:
        super().__init__(upstream_url, share=0)
        self._policy = policy
        self._failing_part = failing_part
        self._noting = threading.Lock()
        self.used: set[tuple[str, str]] = set()
        self.refused: list[str] = []

    def forward(self, asked: Asked, headers: list[tuple[str, str]], body: bytes) -> Answer:
        path, _, query = asked.path.partition("?")
        bucket, _, key = unquote(path).strip("/").partition("/")
        given = {name: values[0] for name, values in parse_qs(query, keep_blank_values=True).items()}
        if not key:
            # A HEAD request for the bucket has no prefix, and the job works without it.
            allowed = self._allowed("s3:ListBucket", f"arn:aws:s3:::{bucket}", given.get("prefix"), optional=asked.method == "HEAD")
            return super().forward(asked, headers, body) if allowed else REFUSED
        action = OBJECT_ACTIONS.get(asked.method, "s3:AbortMultipartUpload" if "uploadId" in given else "s3:DeleteObject")
        if not self._allowed(action, f"arn:aws:s3:::{bucket}/{key}"):
            return REFUSED
        if self._failing_part and given.get("partNumber") == str(self._failing_part):
            return REFUSED
        answer = super().forward(asked, headers, body)
        if answer.status == 404 and not self._allowed("s3:ListBucket", f"arn:aws:s3:::{bucket}", key):
            return REFUSED
        return answer

    def _allowed(self, action: str, resource: str, prefix: str | None = None, *, optional: bool = False) -> bool:
        with self._noting:
            for statement in self._policy:
                condition = statement.get("Condition", {"StringLike": {"s3:prefix": ["*"]}})["StringLike"]["s3:prefix"]
                if (
                    action in statement["Action"]
                    and any(fnmatch.fnmatchcase(resource, pattern) for pattern in statement["Resource"])
                    and (
                        "Condition" not in statement
                        or (prefix is not None and any(fnmatch.fnmatchcase(prefix, pattern) for pattern in condition))
                    )
                ):
                    self.used.add((statement["Sid"], action))
                    return True
            if not optional:
                self.refused.append(f"{action} {resource} {prefix}")
            return False


_SAID = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
REFUSED: Final = Answer(403, "Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(_SAID)))], _SAID)


@pytest.fixture
def filled(bucket: str) -> str:
    """Upload A's data and the tiny base, and return the bucket's name."""
    client = boto3.client("s3")
    client.upload_file(str(REPOSITORY / "data" / "train_data_type_A.jsonl"), bucket, "personas/train_data_type_A.jsonl")
    for path in (REPOSITORY / "examples" / "tiny-base").iterdir():
        client.upload_file(str(path), bucket, f"bases/tiny/{path.name}")
    return bucket


@pytest.fixture
def gatekeeper(filled: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gatekeeper]:
    with Gatekeeper(s3_server.endpoint_url, statements(filled)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def call(command: str, bucket: str, work_dir: Path, *more: str, interrupt: bool = False) -> tuple[int, list[str]]:
    """Run one process. `interrupt` sends SIGTERM after the first checkpoint upload. Return exit code and log lines."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "entrypoint", command, *RUN, *more, "--data", f"s3://{bucket}/personas/",
            "--output", f"s3://{bucket}/lora/", "--base-model", f"s3://{bucket}/bases/tiny/", "--work-dir", str(work_dir),
            "--set", f"base.cache_dir={work_dir / 'mirror'}",
        ],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if interrupt and '"checkpoint_uploaded"' in line:
            process.send_signal(signal.SIGTERM)
            interrupt = False
    assert not interrupt, lines
    return process.wait(300), lines


def granted() -> set[tuple[str, str]]:
    return {(statement["Sid"], action) for statement in statements("x") for action in statement["Action"]}


def test_a_job_uses_each_right_and_no_other(gatekeeper: Gatekeeper, filled: str, tmp_path: Path) -> None:
    code, lines = call("check-storage", filled, tmp_path / "check")
    assert (code, gatekeeper.refused) == (0, []), lines
    code, lines = call("run", filled, tmp_path / "first", *SHORT, interrupt=True)
    assert (code, gatekeeper.refused) == (143, []), lines
    # Resume from the stored checkpoint, as on another machine, then rerun the finished run.
    for folder, expected in (("second", "resumed"), ("third", "already_done")):
        code, lines = call("run", filled, tmp_path / folder, *SHORT)
        assert (code, gatekeeper.refused) == (0, []), lines
        assert any(f'"{expected}"' in line for line in lines)
    for warning in ("storage_conditional_writes_unsupported", "lease_not_exclusive", "leftovers_not_removed", "not_pruned"):
        assert not any(warning in line for line in lines), warning
    # The job uploads only large files in parts, which the next test covers.
    assert granted() - gatekeeper.used == {
        ("KeepCheckpointsAndLease", "s3:AbortMultipartUpload"), ("PublishAdapters", "s3:AbortMultipartUpload"),
    }  # fmt: skip


@pytest.mark.parametrize("place", ["runs", "adapters"])
def test_an_upload_in_parts_that_fails_is_cleared_away(
    place: str, filled: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(40 * 2**20)
    with Gatekeeper(s3_server.endpoint_url, statements(filled), failing_part=2) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(StorageError, match="s3:PutObject refused"):
            open_storage(f"s3://{filled}/lora/").upload(large, f"{place}/A/large")
        assert proxy.refused == []
        assert "s3:AbortMultipartUpload" in {action for _, action in proxy.used}
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint_url)
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket=filled)


@pytest.mark.parametrize(
    "missing", ["TellMissingFromForbidden", "ReadData", "ReadBase", "KeepCheckpointsAndLease", "PublishAdapters"]
)
def test_the_storage_check_misses_what_is_taken_away(
    missing: str, filled: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policy = [statement for statement in statements(filled) if statement["Sid"] != missing]
    with Gatekeeper(s3_server.endpoint_url, policy) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        code, lines = call("check-storage", filled, tmp_path)
        assert proxy.refused != []
    assert code == 6, lines
    assert "refused" in "".join(lines)

"""Test what users are told about an endpoint that is not their store, and about a store that refuses or differs.

Each row is a kind of server: the exit code of `check-storage` and the facts that its message must contain.
"""

from __future__ import annotations

import hashlib
import socket
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import pytest
from conftest import REPOSITORY, load_tool, open_budgeted
from fault_proxy import Answer
from odd_store import (
    PAGE,
    Certificate,
    Odd,
    OddStore,
    RawServer,
    Request,
    always,
    answer,
    error,
    refuses_header,
    says,
    silent,
    writes,
)
from structlog.testing import capture_logs

from entrypoint.cli import run_cli
from lora_trainer.config import LeaseConfig, StorageConfig
from lora_trainer.errors import ConfigError, ExitCode, StorageError
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.run.preflight import check_output
from lora_trainer.store import contacts
from lora_trainer.store.contacts import Contacts
from lora_trainer.store.interface import NotFound, PreconditionFailed
from lora_trainer.store.lease import hold
from lora_trainer.store.opening import open_storage
from lora_trainer.store.retry import RetryBudget

pytestmark = pytest.mark.integration

TINY_BASE = REPOSITORY / "examples" / "tiny-base"
MOST_S = 15.0

Check = Callable[..., tuple[int, str, str]]
Behind = Callable[[Odd], OddStore]


@pytest.fixture
def check(bucket: str, capsys: pytest.CaptureFixture[str]) -> Check:
    """Return a function that runs `check-storage`, or another command, on a bucket with A's data."""
    boto3.client("s3").put_object(Bucket=bucket, Key="data/train_data_type_A.jsonl", Body=b"{}\n")

    def call(*options: str, data: str = f"s3://{bucket}/data/") -> tuple[int, str, str]:
        started_s = time.monotonic()
        code = run_cli(
            [
                "check-storage",
                "--blood-type=A",
                f"--data={data}",
                f"--output=s3://{bucket}/lora/",
                f"--base-model={TINY_BASE}",
                *options,
            ]
        )
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert "a bug" not in err
        assert time.monotonic() - started_s < MOST_S
        return code, out, err

    return call


@pytest.fixture
def behind(s3_server: Any, bucket: str, aws_environment: pytest.MonkeyPatch) -> Iterator[Behind]:
    """Return a function that puts an odd store before the real one."""
    with ExitStack() as stack:

        def start(odd: Odd) -> OddStore:
            store = stack.enter_context(OddStore(s3_server.endpoint_url, odd))
            aws_environment.setenv("AWS_ENDPOINT_URL", store.url)
            return store

        yield start


# ------------------------------------------------------------------------------------------ no S3 API at all

HTML = "text/html; charset=utf-8"
NOT_S3: dict[str, tuple[Odd, int, tuple[str, ...]]] = {
    "a login page": (always(answer(200, PAGE, HTML)), 2, ("an HTML page", "no S3 API", "a login page", "AWS_ENDPOINT_URL")),
    "a web server with ETags": (always(answer(200, PAGE, HTML, ETag='"5e9e-1"')), 2, ("an HTML page", "no S3 API")),
    "a redirect to a login": (
        always(answer(302, b"", HTML, Location="https://login.example.com/?next=x")),
        2,
        ("a redirect to https://login.example.com/", "a login page"),
    ),
    "a permanent redirect": (always(answer(308, b"", HTML, Location="https://new.example.com/")), 2, ("https://new.example.com/",)),
    "a redirect to HTTPS": (
        always(answer(301, b"", HTML, Location="https://127.0.0.1:9443/x")),
        2,
        ("a redirect to HTTPS", "AWS_ENDPOINT_URL=https://127.0.0.1:9443"),
    ),
    "S3's own redirect": (
        always(error(307, "TemporaryRedirect", "Please re-send", Location="http://elsewhere.example.com/x")),
        2,
        ("another address, http://elsewhere.example.com/x", "AWS_REGION"),
    ),
    "S3's redirect to a region it does not name": (always(error(301, "PermanentRedirect")), 2, ("in another region", "AWS_REGION")),
    "an API gateway": (always(answer(404, b'{"detail":"Not Found"}', "application/json")), 2, ("HTTP 404 with JSON", "no S3 API")),
    "a web site's 404": (always(answer(404, PAGE, HTML)), 2, ("HTTP 404 with an HTML page ('Sign in')", "no S3 API")),
    "a blank 404": (always(answer(404, b"", "text/plain")), 2, ("HTTP 404 with an empty body",)),
    "a blank 403": (always(answer(403, b"", "text/plain")), 2, ("HTTP 403 with an empty body", "proxy or firewall")),
    "a firewall's page": (always(answer(403, PAGE, HTML)), 2, ("HTTP 403 with an HTML page", "proxy or firewall")),
    "a proxy that wants a login": (always(answer(407, PAGE, HTML)), 2, ("HTTP 407", "HTTP_PROXY", "NO_PROXY")),
    "Azure Blob Storage": (
        always(error(403, "AuthenticationFailed", "Server failed to authenticate the request.", x_ms_request_id="1")),
        2,
        ("Azure Blob Storage", "no S3 API", "copy the files"),
    ),
    "an empty 200": (always(answer(200)), 2, ("HTTP 200 with no ETag",)),
    "JSON for everything": (always(answer(200, b'{"ok": true}', "application/json", ETag='W/"a"')), 2, ("no S3 API",)),
    "XML of another kind": (always(answer(200, b"<rss/>")), 2, ("HTTP 200 with", "no S3 API")),
    "Cloudflare without an origin": (always(answer(530, b"error code: 1016", "text/plain")), 6, ("HTTP 530", "error code: 1016")),
    "a gateway's 502": (always(answer(502, PAGE, HTML)), 6, ("HTTP 502 with", "can't reach a store")),
    "HTTP to a port of Go's HTTPS": (
        always(answer(400, b"Client sent an HTTP request to an HTTPS server.\n", "text/plain")),
        2,
        ("this port speaks HTTPS", "AWS_ENDPOINT_URL=https://127.0.0.1:"),
    ),
    "HTTP to a port of nginx's HTTPS": (
        always(answer(400, b"<html><head><title>400 The plain HTTP request was sent to HTTPS port</title>", HTML)),
        2,
        ("this port speaks HTTPS",),
    ),
    "MinIO's console": (
        lambda request, _: answer(403 if request.is_write else 200, b"<!doctype html><title>MinIO Console</title>", HTML),
        2,
        ("an HTML page", "9001"),
    ),
    "MinIO's console's own words": (
        always(error(400, "InvalidRequest", "S3 API Requests must be made to API port.")),
        2,
        ("the port of MinIO's console", "9000"),
    ),
}


@pytest.mark.parametrize("kind", NOT_S3)
def test_what_is_no_s3_api_is_said_at_once(check: Check, behind: Behind, kind: str) -> None:
    odd, code, parts = NOT_S3[kind]
    store = behind(odd)
    got, out, err = check()
    assert got == code, err
    assert [part for part in parts if part not in err] == [], err
    assert store.url in err
    assert "ok: data" not in out
    assert "ok: output" not in out


@pytest.mark.parametrize("page", [answer(200, PAGE, HTML, ETag='"1"'), answer(404, PAGE, HTML)], ids=["200", "404"])
def test_other_commands_do_not_believe_it_either(
    page: Answer, behind: Behind, bucket: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    behind(always(page))
    for command in (
        ["validate", "--no-tokens", f"s3://{bucket}/data/train_data_type_A.jsonl"],
        ["compare", f"s3://{bucket}/lora/adapters/A/1/", f"s3://{bucket}/lora/adapters/A/2/"],
        [
            "run", "--blood-type=A", f"--data=s3://{bucket}/data/", f"--output=s3://{bucket}/lora/", f"--base-model={TINY_BASE}",
            "--device=cpu", f"--work-dir={tmp_path}", "--set=training.quantization=none",
        ],
    ):  # fmt: skip
        assert run_cli(command) == ExitCode.CONFIG, command
        out, err = capsys.readouterr()
        assert "an HTML page" in out + err, command
        assert "Traceback" not in out + err


def test_a_gateway_before_a_known_store_is_waited_for(behind: Behind, bucket: str, aws_environment: pytest.MonkeyPatch) -> None:
    """An ingress answers with its own page while the store behind it restarts."""
    aws_environment.setenv("LORA_TRAINER_STORAGE__OBJECT_BUDGET_S", "20")
    pages = [answer(404, PAGE, HTML), answer(503, PAGE, HTML)]
    is_away = False
    behind(lambda _, ask: pages.pop(0) if is_away and pages else ask())
    storage = open_budgeted(f"s3://{bucket}/x/")
    storage.write_bytes("a", b"1")
    is_away = True
    read = storage.read_bytes("a")
    assert read is not None
    assert read.data == b"1"
    assert pages == []


# ------------------------------------------------------------------------------------------ other protocols, TLS

RAW: dict[str, tuple[Callable[[socket.socket], None], str, int, tuple[str, ...]]] = {
    "SSH": (says(b"SSH-2.0-OpenSSH_9.2p1\r\n", listens_first=False), "http", 2, ("does not speak HTTP", "'SSH-2.0-OpenSSH_9.2p1'")),
    "a TLS alert": (says(b"\x15\x03\x01\x00\x02\x02\x46"), "http", 2, ("speaks TLS", "AWS_ENDPOINT_URL=https://")),
    "HTTP to a port of HTTP/2": (says(b"\0\0\x12\4\0\0\0\0\0"), "http", 2, ("does not speak HTTP, but sends binary data",)),
    "HTTPS to SSH": (says(b"SSH-2.0-OpenSSH_9.2p1\r\n", listens_first=False), "https", 2, ("does not speak TLS",)),
    "HTTPS to an HTTP server": (says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "https", 2, ("does not speak TLS", "http://127.0.0.1:")),
    "a port that says nothing": (silent, "http", 6, ("accepted the connection and then sent nothing",)),
    "a port that hangs up": (says(b""), "http", 6, ("cannot be reached", "AWS_ENDPOINT_URL")),
    "chunks of garbage": (
        says(b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nnonsense\r\n"),
        "http",
        6,
        ("cannot be reached", "AWS_ENDPOINT_URL"),
    ),
}


@pytest.mark.parametrize("kind", RAW)
def test_what_does_not_speak_http_is_said(check: Check, aws_environment: pytest.MonkeyPatch, kind: str) -> None:
    treat, scheme, code, parts = RAW[kind]
    aws_environment.setenv("LORA_TRAINER_STORAGE__STALL_TIMEOUT_S", "0.5")
    with RawServer(treat) as server:
        aws_environment.setenv("AWS_ENDPOINT_URL", f"{scheme}://127.0.0.1:{server.port}")
        got, _, err = check()
    assert got == code, err
    assert [part for part in parts if part not in err] == [], err


def test_https_to_the_store_s_http_port(check: Check, s3_server: Any, aws_environment: pytest.MonkeyPatch) -> None:
    aws_environment.setenv("AWS_ENDPOINT_URL", s3_server.endpoint_url.replace("http://", "https://"))
    code, _, err = check()
    assert code == ExitCode.CONFIG
    assert f"set AWS_ENDPOINT_URL={s3_server.endpoint_url}" in err


def test_http_to_a_tls_port_that_only_hangs_up(check: Check, aws_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its answer to HTTP says nothing, but it shakes hands."""
    pytest.importorskip("cryptography")
    aws_environment.setenv("LORA_TRAINER_STORAGE__OBJECT_BUDGET_S", "5")
    with RawServer(silent, Certificate(tmp_path).context()) as server:
        aws_environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        code, _, err = check()
    assert code == ExitCode.CONFIG
    assert f"AWS_ENDPOINT_URL=https://127.0.0.1:{server.port}" in err


@pytest.mark.parametrize(
    ("changes", "trusted", "code", "parts"),
    [
        ({}, False, 2, ("its certificate is self-signed", "AWS_CA_BUNDLE")),
        ({"valid_days": (-10, -5)}, True, 6, ("its certificate has expired",)),
        ({"valid_days": (5, 10)}, True, 6, ("not valid yet", "clock")),
        ({"host": "store.example.com"}, True, 2, ("its certificate is for another host",)),
    ],
    ids=["self-signed", "expired", "early", "another host"],
)
def test_certificates(
    check: Check,
    aws_environment: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict[str, Any],
    trusted: bool,
    code: int,
    parts: tuple[str, ...],
) -> None:
    pytest.importorskip("cryptography")
    certificate = Certificate(tmp_path, **changes)
    if trusted:
        aws_environment.setenv("AWS_CA_BUNDLE", str(certificate.file))
    with RawServer(silent, certificate.context()) as server:
        aws_environment.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.port}")
        got, _, err = check()
    assert got == code, err
    assert [part for part in parts if part not in err] == [], err


# ------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("endpoint", "parts"),
    [
        ("minio:9000", ("'minio:9000'", "no http://")),
        ("//minio:9000", ("no http://",)),
        ("ftp://minio:9000", ("scheme is 'ftp'",)),
        (" http://minio:9000", ("white space",)),
        ("http://minio: 9000", ("white space",)),
        ("http://minio:90o0", ("90o0",)),
        ("http://minio:70000", ("ut of range",)),
        ("http://", ("no host",)),
        ("http://minio:9000/?x=1", ("a query",)),
    ],
)
def test_an_endpoint_that_is_no_url(
    check: Check, aws_environment: pytest.MonkeyPatch, endpoint: str, parts: tuple[str, ...]
) -> None:
    aws_environment.setenv("AWS_ENDPOINT_URL", endpoint)
    code, _, err = check()
    assert code == ExitCode.CONFIG
    assert [part for part in ("AWS_ENDPOINT_URL", *parts) if part not in err] == [], err
    assert "pass-of-mine" not in err


def test_an_endpoint_that_names_a_bucket(
    check: Check, bucket: str, s3_server: Any, aws_environment: pytest.MonkeyPatch, behind: Behind
) -> None:
    for endpoint in (f"{s3_server.endpoint_url}/{bucket}", f"{s3_server.endpoint_url}/{bucket}/"):
        aws_environment.setenv("AWS_ENDPOINT_URL", endpoint)
        code, _, err = check()
        assert code == ExitCode.CONFIG
        assert f"the bucket '{bucket}' in its path; expected {s3_server.endpoint_url}: " in err
    aws_environment.setenv("AWS_ENDPOINT_URL", f"{s3_server.endpoint_url}/other-path")
    code, _, err = check()
    assert code == ExitCode.CONFIG
    assert "the path '/other-path'" in err
    aws_environment.setenv("AWS_ENDPOINT_URL", f"https://{bucket}.s3.eu-north-1.amazonaws.com")
    code, _, err = check()
    assert code == ExitCode.CONFIG
    assert f"the bucket '{bucket}' in its host; expected https://s3.eu-north-1.amazonaws.com: " in err
    # a store with the bucket in its host takes what names the bucket for a key
    behind(lambda request, ask: error(404, "NoSuchKey") if request.is_listing or request.method == "HEAD" else ask())
    code, _, err = check()
    assert code == ExitCode.CONFIG
    assert "already has a bucket in its host or path" in err


@pytest.mark.parametrize("kind", ["missing", "a folder", "empty", "no PEM", "only a key"])
def test_a_ca_file_without_certificates(check: Check, aws_environment: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "ca.pem"
    match kind:
        case "a folder":
            path.mkdir()
        case "empty":
            path.touch()
        case "no PEM":
            path.write_bytes(b"\x30\x82\x01\x0a")
        case "only a key":
            path.write_text("-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----\n")
    aws_environment.setenv("AWS_CA_BUNDLE", str(path))
    code, _, err = check()
    assert code == ExitCode.CONFIG
    expected = {"missing": "No such file", "a folder": "Is a directory", "empty": "it is empty"}.get(
        kind, "no certificate in PEM form"
    )
    assert f"AWS_CA_BUNDLE: {path}: " in err
    assert expected in err


@pytest.mark.parametrize(
    ("variable", "scheme", "treat", "code", "parts"),
    [
        ("HTTP_PROXY", "http", None, 6, ("nothing listens at the proxy http://127.0.0.1:", "NO_PROXY")),
        (
            "HTTPS_PROXY",
            "https",
            says(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"),
            2,
            ("demands a login (HTTP 407)", "HTTPS_PROXY"),
        ),
        (
            "HTTPS_PROXY",
            "https",
            says(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"),
            2,
            ("does not connect to it (HTTP 403)",),
        ),
    ],
    ids=["down", "407", "403"],
)
def test_a_proxy(
    check: Check,
    aws_environment: pytest.MonkeyPatch,
    variable: str,
    scheme: str,
    treat: Callable[[socket.socket], None] | None,
    code: int,
    parts: tuple[str, ...],
) -> None:
    aws_environment.setenv("AWS_ENDPOINT_URL", f"{scheme}://store.example.com:9000")
    aws_environment.delenv("NO_PROXY", raising=False)
    aws_environment.delenv("no_proxy", raising=False)
    with ExitStack() as stack:
        port = stack.enter_context(RawServer(treat)).port if treat else unused_port()
        aws_environment.setenv(variable, f"http://127.0.0.1:{port}")
        got, _, err = check()
    assert got == code, err
    assert [part for part in parts if part not in err] == [], err


# ------------------------------------------------------------------------------------------ first contact and restarts


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("kind", ["refused", "unresolved"])
def test_a_store_that_never_answers_is_given_up_soon(check: Check, aws_environment: pytest.MonkeyPatch, kind: str) -> None:
    """Default budgets, but a shorter first contact. Four checks ask the same store, and only the first one waits."""
    aws_environment.delenv("LORA_TRAINER_STORAGE__OBJECT_BUDGET_S")
    aws_environment.setattr(contacts, "FIRST_CONTACT_S", 1.0)
    endpoint = f"http://127.0.0.1:{unused_port()}" if kind == "refused" else "http://no-such-host.invalid:9000"
    aws_environment.setenv("AWS_ENDPOINT_URL", endpoint)
    started_s = time.monotonic()
    code, _, err = check()
    assert time.monotonic() - started_s < 8
    assert code == ExitCode.STORAGE
    assert f"{endpoint} cannot be reached: " in err
    assert ("nothing listens on 127.0.0.1:" if kind == "refused" else "'no-such-host.invalid' does not resolve") in err
    assert "it has never answered" in err
    assert err.count("not asked again") == 2


def test_the_default_first_contact_ends_within_15_s(check: Check, aws_environment: pytest.MonkeyPatch) -> None:
    aws_environment.delenv("LORA_TRAINER_STORAGE__OBJECT_BUDGET_S")
    aws_environment.delenv("AWS_MAX_ATTEMPTS")
    aws_environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused_port()}")
    assert check()[0] == ExitCode.STORAGE


@pytest.mark.parametrize("when", ["this attempt", "an earlier attempt", "never"])
def test_only_a_store_that_has_answered_gets_time_to_restart(
    aws_environment: pytest.MonkeyPatch, tmp_path: Path, when: str
) -> None:
    dev_s3 = load_tool("dev_s3")
    if missing := dev_s3.why_not():
        pytest.skip(missing)
    aws_environment.setattr(contacts, "FIRST_CONTACT_S", 0.5)
    port = unused_port()

    def budget() -> RetryBudget:
        return RetryBudget(StorageConfig(object_budget_s=60), Contacts(tmp_path / "work" / "stores"))

    storage = None
    with dev_s3.serve(tmp_path / "s3", port) as server:
        for variable, value in server.environment.items():
            aws_environment.setenv(variable, value)
        server.make_bucket("team")
        if when != "never":
            storage = open_storage("s3://team/", budget())
            storage.write_bytes("a", b"1")
    if storage is None or when == "an earlier attempt":
        storage = open_storage("s3://team/", budget())
    if when == "never":
        with capture_logs(), pytest.raises(StorageError, match="it has never answered"):
            storage.read_bytes("a")
        return
    back = ExitStack()
    timer = threading.Timer(1.5, lambda: back.enter_context(dev_s3.serve(tmp_path / "s3", port)))
    timer.start()
    with capture_logs() as logs:
        read = storage.read_bytes("a")
    timer.join()
    back.close()
    assert read is not None
    assert read.data == b"1"
    assert {log["event"] for log in logs} == {"storage_retry"}


def test_empty_variables_count_as_not_set(check: Check, aws_environment: pytest.MonkeyPatch) -> None:
    for name in ("PROFILE", "CA_BUNDLE", "MAX_ATTEMPTS", "REQUEST_CHECKSUM_CALCULATION", "DEFAULTS_MODE", "SESSION_TOKEN"):
        aws_environment.setenv(f"AWS_{name}", "")
    code, _, err = check()
    assert code == ExitCode.DONE, err


@pytest.mark.parametrize("command", [["validate", "--no-tokens"], ["convert", "--output=out.jsonl"], ["promote"]])
def test_every_command_logs_to_stderr(
    command: list[str], bucket: str, aws_environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    aws_environment.setattr(contacts, "FIRST_CONTACT_S", 1.0)
    aws_environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused_port()}")
    assert run_cli([*command, f"s3://{bucket}/data/train_data_type_A.jsonl"]) in (ExitCode.CONFIG, ExitCode.STORAGE)
    out, _ = capsys.readouterr()
    assert "storage_retry" not in out


# ------------------------------------------------------------------------------------------ a store that refuses

DENIED = 'User: arn:aws:iam::1:user/x is not authorized to perform: s3:PutObject on "arn:aws:s3:::b/x" with an explicit deny'
REFUSALS: dict[str, tuple[Odd, int, tuple[str, ...]]] = {
    "a quota": (
        writes(error(403, "QuotaExceeded", "The bucket quota was exceeded.")),
        6,
        ("a quota", "QuotaExceeded", "raise the quota"),
    ),
    "MinIO's quota": (writes(error(400, "XMinioAdminBucketQuotaExceeded", "Bucket quota exceeded")), 6, ("a quota",)),
    "a full store": (
        writes(error(507, "XMinioStorageFull", "minimum free drive threshold")),
        6,
        ("the store is full", "free some space"),
    ),
    "another full store": (writes(error(507, "NoSpace")), 6, ("the store is full",)),
    "a policy that demands encryption": (
        writes(error(403, "AccessDenied", DENIED)),
        6,
        ("demands server-side encryption", "storage.server_side_encryption", "explicit deny"),
    ),
    "a policy of the organisation": (
        always(error(403, "AccessDenied", f"{DENIED} in a service control policy")),
        6,
        ("explicit deny in a service control policy", "no permission overrides"),
    ),
    "a VPC endpoint's policy": (
        always(error(403, "AccessDenied", "not authorized because no VPC endpoint policy allows the s3:GetObject action")),
        6,
        ("no VPC endpoint policy allows it", "allow it there as well"),
    ),
    "a cap that only the message names": (
        writes(error(403, "AccessDenied", "Cannot upload files, storage cap exceeded.")),
        6,
        ("a quota",),
    ),
    "an unpaid account": (
        always(error(403, "UserProjectAccountProblem", "The project is associated with an absent billing account.")),
        6,
        ("account or the bucket is disabled", "operator"),
    ),
    "a key of the wrong length": (
        always(error(400, "InvalidArgument", "Credential access key has length 20, should be 32")),
        6,
        ("does not accept the credentials", "belong together and to this endpoint"),
    ),
    "a name that is too long": (writes(error(400, "KeyTooLongError", "Your key is too long")), 2, ("a shorter prefix",)),
    "a code that nobody knows": (
        writes(error(400, "XOddLimit", "Odd")),
        6,
        ("XOddLimit", "another attempt ends the same way", "operator"),
    ),
    "a missing right": (
        writes(error(403, "AccessDenied", "Access Denied")),
        6,
        ("s3:PutObject refused", "storage.server_side_encryption"),
    ),
    "a disabled key": (
        lambda request, ask: error(400, "KMS.DisabledException", "key/x is disabled.") if request.method == "GET" else ask(),
        6,
        ("the encryption key can't be used", "KMS.DisabledException", "storage.kms_key_id"),
    ),
    "no right to the key": (
        writes(error(403, "AccessDenied", "is not authorized to perform: kms:GenerateDataKey on resource: key/x")),
        6,
        ("access to the encryption key is denied", "kms:GenerateDataKey and kms:Decrypt"),
    ),
    "no key service": (writes(error(501, "NotImplemented", "KMS is not configured")), 2, ("has no key service",)),
    "a disabled account": (
        always(error(403, "AllAccessDisabled", "disabled")),
        6,
        ("account or the bucket is disabled", "operator"),
    ),
    "a suspended user": (always(error(403, "UserSuspended")), 6, ("account or the bucket is disabled",)),
    "an old signature": (always(error(400, "InvalidRequest", "Please use AWS4-HMAC-SHA256.")), 2, ("signature version 4",)),
    "requester pays": (
        always(error(403, "AccessDenied", "Bucket is requester pays bucket but no x-amz-request-payer header found.")),
        2,
        ("makes the requester pay",),
    ),
    "a clock that is wrong": (
        always(error(403, "RequestTimeTooSkewed", "too large", Date="Mon, 01 Jan 2024 00:00:00 GMT")),
        6,
        ("clock is wrong", "s ahead of the store's", "NTP"),
    ),
    "an unknown key": (
        always(error(403, "InvalidAccessKeyId")),
        6,
        ("does not accept the credentials", "does not know AWS_ACCESS_KEY_ID"),
    ),
    "a wrong secret": (
        always(error(403, "SignatureDoesNotMatch")),
        6,
        ("does not accept the credentials", "AWS_SECRET_ACCESS_KEY is not this key's"),
    ),
    "an expired token": (always(error(400, "ExpiredToken")), 6, ("the credentials have expired",)),
    "another region": (
        always(answer(400, b"<Error><Code>InvalidRegionName</Code><Region>auto</Region></Error>")),
        2,
        ("in another region", "set AWS_REGION=auto"),
    ),
    "a key without a secret's shape": (
        always(error(400, "AuthorizationHeaderMalformed", "a non-empty Access Key (AKID) must be provided")),
        6,
        ("does not accept the credentials",),
    ),
    "a website endpoint": (always(error(405, "MethodNotAllowed")), 2, ("does not offer this operation",)),
    "an archived object": (
        lambda request, ask: error(403, "InvalidObjectState") if request.method == "GET" and ".jsonl" in request.path else ask(),
        3,
        ("the object is archived", "restore"),
    ),
    "object lock": (
        lambda request, ask: error(403, "AccessDenied", "object protected by object lock") if request.method == "DELETE" else ask(),
        6,
        ("object lock or a retention rule", "runs/"),
    ),
    "MinIO's WORM": (
        lambda request, ask: error(400, "ObjectLocked", "Object is WORM protected") if request.method == "DELETE" else ask(),
        6,
        ("object lock or a retention rule",),
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_is_explained_by_its_cause(check: Check, behind: Behind, kind: str) -> None:
    odd, code, parts = REFUSALS[kind]
    store = behind(odd)
    got, _, err = check()
    assert got == code, err
    assert [part for part in parts if part not in err] == [], err
    assert "storage_retry" not in err, "no retry mends it"
    assert len(store.seen) < 20


# ------------------------------------------------------------------------------------------ checksums

SDK = "x-amz-sdk-checksum-algorithm"
CHECKSUM_STORES: dict[str, Odd] = {
    "Google's XML API": refuses_header(SDK, error(403, "SignatureDoesNotMatch", "Invalid argument.")),
    "Backblaze": refuses_header(SDK, error(400, "InvalidArgument", f"Unsupported header '{SDK}' received for this API call.")),
    "Backblaze, reading": refuses_header(
        "x-amz-checksum-mode", error(400, "InvalidArgument", "Unsupported header 'x-amz-checksum-mode'"), method="GET"
    ),
    "a store that does not implement it": refuses_header(
        SDK, error(501, "NotImplemented", "x-amz-checksum-crc32 is not implemented")
    ),
    "a store that hashes the trailer": refuses_header(SDK, error(400, "XAmzContentSHA256Mismatch")),
}


@pytest.mark.parametrize("kind", CHECKSUM_STORES)
def test_a_store_that_refuses_checksums_gets_none(behind: Behind, bucket: str, tmp_path: Path, kind: str) -> None:
    store = behind(CHECKSUM_STORES[kind])
    source = tmp_path / "source"
    source.write_bytes(bytes(17 * 2**20) if "reading" not in kind else b"x")
    with capture_logs() as logs:
        storage = open_storage(f"s3://{bucket}/x/", RetryBudget(StorageConfig(object_budget_s=20)))
        storage.write_bytes("small", b"1")
        storage.upload(source, "large")
        storage.upload_all(tmp_path, "all/", {"source": hashlib.sha256(source.read_bytes()).hexdigest()})
        assert storage.read_bytes("small") is not None
        assert storage.download("large", tmp_path / "target").size_bytes == source.stat().st_size
    said = [log for log in logs if log["event"] == "storage_checksums_unsupported"]
    assert len(said) == 1, logs
    assert "AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in said[0]["hint"]
    if "reading" not in kind:
        without = [request for request in store.seen if request.method == "PUT" and SDK not in request.headers]
        assert without
        assert all("content-md5" in request.headers for request in without), "the store still verifies what it gets"


def test_a_wrong_secret_is_no_matter_of_checksums(behind: Behind, bucket: str) -> None:
    store = behind(lambda request, ask: error(403, "SignatureDoesNotMatch", "wrong") if request.is_write else ask())
    storage = open_budgeted(f"s3://{bucket}/x/")
    with capture_logs() as logs, pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY is not this key's"):
        storage.write_bytes("a", b"1")
    assert [log["event"] for log in logs] == []
    assert [SDK in request.headers for request in store.seen] == [True, False], "one attempt without them"


# ------------------------------------------------------------------------------------------ encryption


@pytest.mark.parametrize(
    ("settings", "sent"),
    [
        ({"server_side_encryption": "AES256"}, {"x-amz-server-side-encryption": "AES256"}),
        (
            {"server_side_encryption": "aws:kms", "kms_key_id": "alias/x"},
            {"x-amz-server-side-encryption": "aws:kms", "x-amz-server-side-encryption-aws-kms-key-id": "alias/x"},
        ),
    ],
)
def test_every_upload_asks_for_encryption(
    behind: Behind, bucket: str, tmp_path: Path, settings: dict[str, Any], sent: dict[str, str]
) -> None:
    store = behind(lambda _, ask: ask())
    (tmp_path / "large").write_bytes(bytes(17 * 2**20))
    storage = open_storage(f"s3://{bucket}/x/", RetryBudget(StorageConfig(**settings)))
    storage.write_bytes("small", b"1")
    # another budget, as a lease has, keeps the encryption
    storage.adapted(retry_budget=RetryBudget()).write_bytes("small", b"2")
    storage.upload(tmp_path / "large", "large")
    storage.upload_all(tmp_path, "all/", {"large": "0" * 64})
    begun = [request for request in store.seen if request.is_write and "uploadId" not in request.path]
    assert len(begun) == 4
    for request in begun:
        assert {name: request.headers.get(name) for name in sent} == sent


def test_a_store_that_does_not_encrypt(behind: Behind, bucket: str) -> None:
    behind(lambda _, ask: ask())
    storage = open_storage(f"s3://{bucket}/x/", RetryBudget(StorageConfig(server_side_encryption="aws:kms")))
    behind(writes(error(400, "InvalidArgument", "The encryption method specified is not supported")))
    with pytest.raises(ConfigError, match=r"does not know server-side encryption 'aws:kms'.*server_side_encryption=none"):
        storage.write_bytes("a", b"1")
    behind(lambda request, ask: answer(200, ETag='"1"') if request.is_write else ask())
    storage = open_storage(f"s3://{bucket}/x/", RetryBudget(StorageConfig(server_side_encryption="AES256")))
    with pytest.raises(ConfigError, match="got 'none' in its answer"):
        storage.write_bytes("a", b"1")


# ------------------------------------------------------------------------------------------ conditions and listings


def refuses_what_holds(request: Request, ask: Callable[[], Any]) -> Any:
    """Answer 412 to every If-Match, as Ceph 16 does."""
    return error(412, "PreconditionFailed") if "if-match" in request.headers and request.is_write else ask()


def refuses_new_names(request: Request, ask: Callable[[], Any]) -> Any:
    return error(412, "PreconditionFailed") if "if-none-match" in request.headers else ask()


class IgnoringStore(OddStore):
    """A store that takes no notice of conditions."""

    def forward(self, asked: Any, headers: list[tuple[str, str]], body: bytes) -> Any:
        return super().forward(asked, [pair for pair in headers if not pair[0].lower().startswith("if-")], body)


@pytest.mark.parametrize("kind", ["refuses If-Match", "refuses If-None-Match", "ignores both", "keeps both"])
def test_conditions_are_probed_both_ways(
    check: Check, s3_server: Any, bucket: str, aws_environment: pytest.MonkeyPatch, kind: str
) -> None:
    odd = {"refuses If-Match": refuses_what_holds, "refuses If-None-Match": refuses_new_names}.get(kind, lambda _, ask: ask())
    server = IgnoringStore if kind == "ignores both" else OddStore
    keeps = kind == "keeps both"
    with server(s3_server.endpoint_url, odd) as store:
        aws_environment.setenv("AWS_ENDPOINT_URL", store.url)
        code, out, err = check()
        assert code == ExitCode.DONE
        assert out.count("the store has no conditional writes") == (0 if keeps else 2)
        assert err.count("storage_conditional_writes_unsupported") == (0 if keeps else 1), "once a process"
        budget = RetryBudget(StorageConfig())
        with capture_logs() as logs:
            check_output(open_storage(f"s3://{bucket}/lora/", budget), BloodType.A)
            # what the probe found holds for every storage of the process, such as that of `latest.json`
            other = open_storage(f"s3://{bucket}/lora/", budget)
            other.write_bytes("latest", b"1", if_absent=True)
            read = other.read_bytes("latest")
            assert read is not None
            other.write_bytes("latest", b"2", if_match=read.etag)
            with pytest.raises(PreconditionFailed):
                other.write_bytes("latest", b"3", if_match=read.etag)
        assert [log["event"] for log in logs] == ([] if keeps else ["storage_conditional_writes_unsupported"])
        assert other.conditional_writes is keeps
        with capture_logs(), hold(LeaseConfig(), other, "runs/A/x/lease.json") as lease:
            assert lease.exclusive is keeps
    aws_environment.setenv("AWS_ENDPOINT_URL", s3_server.endpoint_url)
    assert boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix="lora/runs/")["KeyCount"] == 0


def test_the_probe_of_a_run_is_cheap(behind: Behind, bucket: str) -> None:
    store = behind(lambda _, ask: ask())
    budget = RetryBudget(StorageConfig())
    check_output(open_storage(f"s3://{bucket}/lora/", budget), BloodType.A)
    assert len(store.seen) == 9
    check_output(open_storage(f"s3://{bucket}/lora/", budget), BloodType.B)
    assert len(store.seen) == 9 + 3


def test_a_run_says_that_it_may_not_list_before_it_trains(
    behind: Behind, bucket: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    boto3.client("s3").upload_file(str(REPOSITORY / "data" / "train_data_type_A.jsonl"), bucket, "data/train_data_type_A.jsonl")
    behind(lambda request, ask: error(403, "AccessDenied") if request.is_listing and "lora" in request.path else ask())
    code = run_cli(
        [
            "run", "--blood-type=A", f"--data=s3://{bucket}/data/", f"--output=s3://{bucket}/lora/", f"--base-model={TINY_BASE}",
            "--device=cpu", f"--work-dir={tmp_path}", "--set=training.quantization=none", "--set=training.compute_dtype=float32",
        ]
    )  # fmt: skip
    _, err = capsys.readouterr()
    assert code == ExitCode.STORAGE, err
    assert "s3:ListBucket refused" in err
    assert "backend_started" not in err


# ------------------------------------------------------------------------------------------ Unicode forms


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("맥 폴더/train_data_type_A.jsonl", "맥 폴더/"),
        ("데이터/안/train_data_type_A.jsonl", "데이터/안/"),
        ("data/훈련.jsonl", "data/훈련.jsonl"),
        ("café/train_data_type_A.jsonl", "café/"),
    ],
)
@pytest.mark.parametrize("form", ["NFD", "NFC"])
def test_a_name_in_another_unicode_form_is_found_out(
    check: Check, bucket: str, tmp_path: Path, stored: str, asked: str, form: Any
) -> None:
    other_form: Any = {"NFD": "NFC", "NFC": "NFD"}[form]
    stored, asked = unicodedata.normalize(form, stored), unicodedata.normalize(other_form, asked)
    boto3.client("s3").put_object(Bucket=bucket, Key=stored, Body=b"{}\n")
    (tmp_path / stored).parent.mkdir(parents=True)
    (tmp_path / stored).write_bytes(b"{}\n")
    for data, there in ((f"s3://{bucket}/{asked}", f"s3://{bucket}/{stored}"), (f"{tmp_path}/{asked}", f"{tmp_path}/{stored}")):
        code, _, err = check(data=data)
        assert code == ExitCode.DATA
        assert f"in another Unicode form, {form} (macOS writes NFD)" in err
        assert there in err
    assert check(data=f"s3://{bucket}/{unicodedata.normalize(form, asked)}")[0] == ExitCode.DONE


def test_the_nearest_name_may_have_another_form(bucket: str, tmp_path: Path) -> None:
    stored = unicodedata.normalize("NFD", "훈련용-자료.jsonl")
    boto3.client("s3").put_object(Bucket=bucket, Key=stored, Body=b"")
    with pytest.raises(NotFound, match=f"the nearest names in s3://{bucket}/ are {stored}"):
        open_budgeted(f"s3://{bucket}/").download("훈련용-자로.jsonl", tmp_path / "x")

"""Test `s3://` storage against a real server, and against responses that a real server rarely sends."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import signal
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import boto3
import pytest
from conftest import open_budgeted
from storage_contract import KEY, StorageContract, keys
from structlog.testing import capture_logs

from lora_trainer.errors import ConfigError, ExitCode, Interrupted, StorageError
from lora_trainer.store.interface import NotFound, PreconditionFailed, Storage
from lora_trainer.store.local import sha256_of

pytestmark = pytest.mark.integration

SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzEXAMPLEKEY"  # noqa: S105  the example of AWS's own manual
KEY_ID = "AKIAIOSFODNN7EXAMPLE"


class TestS3Storage(StorageContract):
    @pytest.fixture
    def storage(self, bucket: str) -> Storage:
        return open_budgeted(f"s3://{bucket}/prefix/")

    def test_multipart_round_trip(self, storage: Storage, bucket: str, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_bytes(os.urandom(17 * 2**20))
        storage.upload(source, "adapter_model.safetensors")
        head = boto3.client("s3").head_object(Bucket=bucket, Key="prefix/adapter_model.safetensors", ChecksumMode="ENABLED")
        assert head["ETag"].endswith('-2"'), "parts of 16 MiB"
        assert head["ChecksumCRC32"], "each part was sent with its CRC-32"
        fetched = storage.download("adapter_model.safetensors", target)
        assert fetched.size_bytes == 17 * 2**20
        assert fetched.sha256 == sha256_of(source) == sha256_of(target)

    def test_object_that_others_put_there(self, storage: Storage, bucket: str, tmp_path: Path) -> None:
        boto3.client("s3").put_object(Bucket=bucket, Key="prefix/train.jsonl", Body=b"{}\n")
        assert storage.download("train.jsonl", tmp_path / "target").size_bytes == 3

    def test_damage_between_upload_and_download(self, storage: Storage, bucket: str, tmp_path: Path) -> None:
        boto3.client("s3").put_object(Bucket=bucket, Key=f"prefix/{KEY}", Body=b"x", Metadata={"lora-trainer-sha256": "0" * 64})
        with pytest.raises(StorageError, match=r"got 1 bytes with SHA-256 2d71.*expected 1 with 0000"):
            storage.download(KEY, tmp_path / "target")
        assert list(tmp_path.glob("*target*")) == []
        assert list(tmp_path.glob(".~*")) == []

    def test_a_file_that_is_not_what_its_manifest_says_is_not_taken_by_whoever_downloads_it(
        self, storage: Storage, tmp_path: Path
    ) -> None:
        (tmp_path / "source").write_bytes(b"x")
        storage.upload(tmp_path / "source", KEY, sha256="0" * 64)
        with pytest.raises(StorageError, match=r"got 1 bytes with SHA-256 2d71.*expected 1 with 0000"):
            storage.download(KEY, tmp_path / "target")

    def test_report_opens_in_a_browser(self, storage: Storage, bucket: str, tmp_path: Path) -> None:
        (tmp_path / "report.html").write_text("<p>")
        storage.upload(tmp_path / "report.html", "report.html")
        assert boto3.client("s3").head_object(Bucket=bucket, Key="prefix/report.html")["ContentType"] == "text/html"

    def test_a_copy_has_the_bytes_and_the_hash_of_its_source(self, storage: Storage, bucket: str, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(b"weights")
        digest = sha256_of(tmp_path / "source")
        storage.upload(tmp_path / "source", "1/모델.safetensors")
        assert storage.copy("1/모델.safetensors", "2/모델.safetensors", size_bytes=7, sha256=digest)
        assert storage.read_bytes("2/모델.safetensors") == storage.read_bytes("1/모델.safetensors")
        assert boto3.client("s3").head_object(Bucket=bucket, Key="prefix/2/모델.safetensors")["Metadata"] == {
            "lora-trainer-sha256": digest
        }
        assert not storage.copy("missing", "3/x", size_bytes=7, sha256=digest)
        assert not storage.copy("1/모델.safetensors", "3/x", size_bytes=8, sha256=digest)

        def lost() -> None:
            raise StorageError("the lease is lost")

        storage.adapted(guard=lost).copy("1/모델.safetensors", "4/x", size_bytes=7, sha256=digest)
        assert not storage.exists("4/x")

    def test_folder_markers_are_no_objects(self, storage: Storage, bucket: str) -> None:
        client = boto3.client("s3")
        for key in ("prefix/", "prefix/folder/", "prefix/folder/x"):
            client.put_object(Bucket=bucket, Key=key, Body=b"")
        assert keys(storage) == ["folder/x"]

    def test_keys_that_are_no_paths_are_reported(self, storage: Storage, bucket: str) -> None:
        boto3.client("s3").put_object(Bucket=bucket, Key="prefix/a\\b", Body=b"")
        with pytest.raises(StorageError, match="backslash"):
            keys(storage)

    def test_whole_bucket(self, bucket: str) -> None:
        storage = open_budgeted(f"s3://{bucket}")
        storage.write_bytes("A/x", b"")
        assert keys(storage) == ["A/x"]

    @pytest.mark.usefixtures("bucket")
    def test_missing_bucket(self, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.touch()
        for call in (
            lambda storage: storage.download(KEY, tmp_path / "target"),
            lambda storage: storage.upload(source, KEY),
            lambda storage: storage.read_bytes(KEY),
            lambda storage: storage.write_bytes(KEY, b""),
            lambda storage: storage.write_bytes(KEY, b"", if_absent=True),
            lambda storage: storage.exists(KEY),
            lambda storage: list(storage.list("")),
        ):
            with pytest.raises(ConfigError, match="no bucket called 'no-such-bucket' at http://127") as caught:
                call(open_budgeted("s3://no-such-bucket/p/"))
            assert caught.value.exit_code == ExitCode.CONFIG

    def test_no_credentials(self, storage: Storage, aws_environment: pytest.MonkeyPatch) -> None:
        aws_environment.delenv("AWS_ACCESS_KEY_ID")
        aws_environment.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(StorageError, match=r"no AWS credentials found; expected AWS_ACCESS_KEY_ID") as caught:
            storage.read_bytes(KEY)
        assert caught.value.exit_code == ExitCode.STORAGE

    def test_half_the_credentials(self, storage: Storage, aws_environment: pytest.MonkeyPatch) -> None:
        aws_environment.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(ConfigError, match="half of the AWS credentials"):
            storage.read_bytes(KEY)

    def test_unreachable_endpoint(self, storage: Storage, aws_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
            aws_environment.setenv("AWS_ENDPOINT_URL", endpoint)
            with pytest.raises(StorageError, match=f"{endpoint} cannot be reached") as caught:
                storage.download(KEY, tmp_path / "target")
        assert "AWS_ENDPOINT_URL" in str(caught.value)

    @pytest.mark.parametrize(
        ("variable", "value", "said"),
        [
            ("AWS_ENDPOINT_URL", "minio:9000", "'minio:9000': it has no http"),
            ("AWS_PROFILE", "nobody", r"nobody.*check AWS_PROFILE"),
            ("AWS_MAX_ATTEMPTS", "many", "many"),
            ("AWS_RETRY_MODE", "sometimes", "sometimes"),
        ],
    )
    def test_wrong_settings(
        self, storage: Storage, aws_environment: pytest.MonkeyPatch, variable: str, value: str, said: str
    ) -> None:
        aws_environment.setenv(variable, value)
        with pytest.raises(ConfigError, match=said):
            storage.read_bytes(KEY)

    def test_missing_web_identity_token(self, storage: Storage, aws_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
        aws_environment.delenv("AWS_ACCESS_KEY_ID")
        aws_environment.delenv("AWS_SECRET_ACCESS_KEY")
        aws_environment.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/trainer")
        aws_environment.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        with pytest.raises(StorageError, match=r"token: No such file.*AWS_WEB_IDENTITY_TOKEN_FILE"):
            storage.download(KEY, tmp_path / "target")


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    promised_bytes: int | None = None
    """A wrong Content-Length."""


def xml(status: int, code: str, message: str = "") -> Answer:
    return Answer(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())


class BadDay:
    """An HTTP server that answers every request with a function of the test."""

    def __init__(self) -> None:
        self.answer: Callable[[Request], Answer] = lambda _: xml(500, "InternalError")
        self.requests: list[Request] = []
        day = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def respond(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                request = Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                day.requests.append(request)
                answer = day.answer(request)
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                promised_bytes = len(answer.body) if answer.promised_bytes is None else answer.promised_bytes
                self.send_header("Content-Length", str(promised_bytes))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)
                self.close_connection = promised_bytes != len(answer.body)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = respond

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> BadDay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def bad_day(aws_environment: pytest.MonkeyPatch) -> Iterator[BadDay]:
    with BadDay() as day:
        aws_environment.setenv("AWS_ENDPOINT_URL", day.endpoint_url)
        aws_environment.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
        aws_environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        yield day


STORE = "s3://bucket/prefix/"


def head_or(answer: Callable[[Request], Answer], size_bytes: int) -> Callable[[Request], Answer]:
    """Answer a HEAD with an object of this size, and everything else with `answer`."""
    return lambda request: (
        Answer(headers={"ETag": '"e"'}, promised_bytes=size_bytes) if request.method == "HEAD" else answer(request)
    )


@pytest.mark.parametrize(
    ("status", "code", "kind", "said"),
    [
        (
            403,
            "AccessDenied",
            StorageError,
            r"s3:GetObject refused: HTTP 403 AccessDenied.*arn:aws:s3:::bucket/prefix/x; without s3:Li",
        ),
        (400, "ExpiredToken", StorageError, r"credentials have expired.*renew"),
        (403, "SignatureDoesNotMatch", StorageError, r"does not accept the credentials.*AWS_SECRET_ACCESS_KEY belong together"),
        (403, "InvalidAccessKeyId", StorageError, "does not accept the credentials"),
        (403, "RequestTimeTooSkewed", StorageError, "clock"),
        (400, "AuthorizationHeaderMalformed", ConfigError, "AWS_REGION"),
        (501, "NotImplemented", StorageError, r"answered HTTP 501 NotImplemented"),
    ],
)
def test_refusals(
    bad_day: BadDay, tmp_path: Path, status: int, code: str, kind: type[Exception], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error states the reason, although the response to the first request, a HEAD, has no body."""
    bad_day.answer = lambda _: xml(status, code, f"user {KEY_ID} with {SECRET} at http://someone:pass@proxy may not")
    storage = open_budgeted(STORE)
    for call in (
        lambda: storage.download("x", tmp_path / "target"),
        lambda: storage.read_bytes("x"),
        lambda: storage.exists("x"),
    ):
        with pytest.raises(kind, match=said) as caught:
            call()
        message = str(caught.value)
        assert message.startswith("s3://bucket/prefix/x: ")
        for secret in (KEY_ID, SECRET, "pass@"):
            assert secret not in message
    assert list(tmp_path.glob("*target*")) == []


def test_refused_writes_and_listings_name_their_action(bad_day: BadDay, tmp_path: Path) -> None:
    bad_day.answer = lambda _: xml(403, "AccessDenied")
    storage = open_budgeted(STORE)
    (tmp_path / "large").write_bytes(bytes(17 * 2**20))
    with pytest.raises(StorageError, match=r"s3:PutObject refused.*bucket/prefix/x$"):
        storage.write_bytes("x", b"")
    with pytest.raises(StorageError, match=r"s3:PutObject refused.*bucket/prefix/x$"):
        storage.upload(tmp_path / "large", "x")
    with pytest.raises(StorageError, match=r"s3:ListBucket refused.*arn:aws:s3:::bucket; checkpoints"):
        list(storage.list("A/"))


class Expiring:
    """A store and its STS, which both accept one set of credentials at a time."""

    def __init__(self) -> None:
        self.valid = 1
        self.kept: dict[str, bytes] = {}
        self.answers_whole = True

    def __call__(self, request: Request) -> Answer:
        if b"AssumeRoleWithWebIdentity" in request.body:
            if not self.answers_whole:
                self.answers_whole = True
                return Answer(200, b"<AssumeRoleWithWebIdentityResponse><Assu")
            return Answer(
                200,
                f"<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>key{self.valid}"
                "</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken><Expiration>2099-01-01T00:00:00Z"
                "</Expiration></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>".encode(),
            )
        if f"Credential=key{self.valid}/" not in request.headers["authorization"]:
            return xml(400, "ExpiredToken", "The provided token has expired.")
        if request.method == "PUT":
            self.kept[request.path] = request.body
            return Answer(headers={"ETag": '"e"'})
        body = self.kept.get(request.path)
        return xml(404, "NoSuchKey") if body is None else Answer(200, body, {"ETag": '"e"'})


@pytest.mark.parametrize("way", ["process", "file", "web identity"])
def test_credentials_that_expire_during_a_run(
    bad_day: BadDay, aws_environment: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    """The client asks for new credentials as often as it needs to, whichever operation the store rejects."""
    store = Expiring()
    bad_day.answer = store
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        aws_environment.delenv(variable)
    config, credentials, token = tmp_path / "config", tmp_path / "credentials", tmp_path / "token"
    token.write_text("a token")

    def hand_out(number: int) -> None:
        credentials.write_text(f"[default]\naws_access_key_id = key{number}\naws_secret_access_key = s\naws_session_token = t\n")
        (tmp_path / "answer.json").write_text(f'{{"Version": 1, "AccessKeyId": "key{number}", "SecretAccessKey": "s"}}')

    hand_out(1)
    match way:
        case "process":
            config.write_text(f"[default]\ncredential_process = cat {tmp_path / 'answer.json'}\n")
            aws_environment.setenv("AWS_CONFIG_FILE", str(config))
        case "file":
            aws_environment.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
        case _:
            aws_environment.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/trainer")
            aws_environment.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    aws_environment.setenv("LORA_TRAINER_STORAGE__OBJECT_BUDGET_S", "20")
    storage = open_budgeted(STORE)
    storage.write_bytes("x", b"1")
    (tmp_path / "source").write_bytes(b"2")
    for number, call in enumerate(
        (
            lambda: storage.read_bytes("x"),
            lambda: storage.exists("x"),
            lambda: storage.write_bytes("x", b"2"),
            lambda: storage.upload(tmp_path / "source", "x"),
            lambda: storage.download("x", tmp_path / "target"),
        ),
        start=2,
    ):
        store.valid = number
        hand_out(number)
        with capture_logs() as logs:
            call()
        assert [log["event"] for log in logs] == ["storage_retry"]
        assert "credentials have expired" in logs[0]["problem"]
    assert (tmp_path / "target").read_bytes() == b"2"
    if way == "web identity":
        store.answers_whole, store.valid = False, 9
        with capture_logs() as logs:
            assert storage.exists("x")
        assert store.answers_whole
        return
    # the new credentials arrive late
    store.valid = 9
    sender = threading.Timer(1.0, hand_out, (9,))
    sender.start()
    with capture_logs():
        assert storage.exists("x")
    sender.join()


def test_expired_credentials_of_a_variable_stay_expired(bad_day: BadDay, aws_environment: pytest.MonkeyPatch) -> None:
    aws_environment.setenv("LORA_TRAINER_STORAGE__OBJECT_BUDGET_S", "600")
    bad_day.answer = lambda _: xml(400, "ExpiredToken")
    with capture_logs() as logs, pytest.raises(StorageError, match="credentials have expired"):
        open_budgeted(STORE).read_bytes("x")
    assert logs == []


def test_missing_key_that_may_not_be_listed(bad_day: BadDay, tmp_path: Path) -> None:
    bad_day.answer = lambda request: xml(403, "AccessDenied") if "list-type" in request.path else xml(404, "NoSuchKey")
    with pytest.raises(NotFound, match="may not list its folder"):
        open_budgeted(STORE).download("x", tmp_path / "target")


def test_passing_server_error(bad_day: BadDay) -> None:
    answers = [xml(500, "InternalError"), Answer(headers={"ETag": '"e"'})]
    bad_day.answer = lambda _: answers.pop(0)
    open_budgeted(STORE).write_bytes("x", b"data")
    assert answers == []
    assert [request.body for request in bad_day.requests] == [b"data", b"data"]


def test_lasting_server_error(bad_day: BadDay, aws_environment: pytest.MonkeyPatch) -> None:
    aws_environment.setenv("LORA_TRAINER_STORAGE__OBJECT_BUDGET_S", "0")
    bad_day.answer = lambda _: xml(503, "SlowDown", "Please reduce your request rate.")
    with pytest.raises(StorageError, match=rf"{bad_day.endpoint_url} answered HTTP 503 SlowDown.*asked 2 times"):
        open_budgeted(STORE).read_bytes("x")
    assert len(bad_day.requests) == 2, "AWS_MAX_ATTEMPTS is honoured"


def test_uploads_carry_checksum_and_length(bad_day: BadDay, aws_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad_day.answer = lambda _: Answer(headers={"ETag": '"e"'})
    (tmp_path / "x").write_bytes(b"data")
    open_budgeted(STORE).upload(tmp_path / "x", "x")
    request = bad_day.requests.pop()
    assert request.headers["x-amz-checksum-crc32"] == base64.b64encode(zlib.crc32(b"data").to_bytes(4, "big")).decode()
    assert request.headers["x-amz-meta-lora-trainer-sha256"] == hashlib.sha256(b"data").hexdigest()
    assert request.headers["content-length"] == "4"
    aws_environment.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    open_budgeted(STORE).upload(tmp_path / "x", "x")
    assert "x-amz-checksum-crc32" not in bad_day.requests.pop().headers


@pytest.mark.parametrize("answer", [xml(501, "NotImplemented"), Answer(headers={"ETag": '"e"'})])
def test_a_store_that_does_not_copy(bad_day: BadDay, answer: Answer) -> None:
    # one refuses, the other takes the request for an empty object
    bad_day.answer = lambda request: Answer(404) if request.method == "HEAD" else answer
    assert not open_budgeted(STORE).copy("x", "y", size_bytes=4, sha256="0" * 64)


def test_addressing_and_region(bad_day: BadDay, aws_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad_day.answer = lambda _: Answer(headers={"ETag": '"e"'})

    def asked() -> tuple[str, str]:
        open_budgeted(STORE).exists("x")
        request = bad_day.requests.pop()
        found = re.search(r"/\d{8}/([^/]+)/s3/", request.headers["authorization"])
        assert found is not None
        return request.path, found.group(1)

    assert asked() == ("/bucket/prefix/x", "us-east-1")
    aws_environment.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    assert asked() == ("/bucket/prefix/x", "eu-north-1")
    aws_environment.setenv("AWS_REGION", "ap-northeast-2")
    assert asked() == ("/bucket/prefix/x", "ap-northeast-2")
    aws_environment.delenv("AWS_ENDPOINT_URL")
    aws_environment.setenv("AWS_ENDPOINT_URL_S3", bad_day.endpoint_url)
    assert asked() == ("/bucket/prefix/x", "ap-northeast-2")


def test_listing_goes_on_after_the_first_page(bad_day: BadDay) -> None:
    """A real store returns a thousand keys per page. This one returns two pages with one key each."""

    def answer(request: Request) -> Answer:
        asked = parse_qs(urlsplit(request.path).query)
        assert asked["prefix"] == ["prefix/A/"]
        number, truncated = (1, "true") if "continuation-token" not in asked else (2, "false")
        body = (
            f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated><NextContinuationToken>n</NextContinuationToken>"
            f"<Contents><Key>prefix/A/{number}</Key><Size>{number}</Size></Contents></ListBucketResult>"
        )
        return Answer(200, body.encode())

    bad_day.answer = answer
    listing = open_budgeted(STORE).list("A/")
    assert next(listing).key == "A/1"
    assert len(bad_day.requests) == 1, "the second page is asked for when it is wanted"
    assert [found.key for found in listing] == ["A/2"]


def test_virtual_hosts_at_a_custom_endpoint(bad_day: BadDay, aws_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The addressing style has no environment variable, so botocore reads it from the profile."""
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    aws_environment.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    aws_environment.setenv("AWS_ENDPOINT_URL", "http://store.invalid:1")
    with pytest.raises(StorageError, match=r"http://bucket\.store\.invalid:1/prefix/x"):
        open_budgeted(STORE).read_bytes("x")
    assert bad_day.requests == []


def test_store_without_conditional_writes(bad_day: BadDay) -> None:
    """Each write checks the object first and then succeeds. The client logs one warning, not one per write."""
    kept: dict[str, bytes] = {}

    def answer(request: Request) -> Answer:
        if "if-match" in request.headers or "if-none-match" in request.headers:
            return xml(501, "NotImplemented")
        if request.method == "PUT":
            kept[request.path] = request.body
            return Answer()
        if request.path not in kept:
            return xml(404, "NoSuchKey")
        return Answer(200, kept[request.path], {"ETag": f'"{zlib.crc32(kept[request.path])}"'})

    bad_day.answer = answer
    storage = open_budgeted(STORE)
    with capture_logs() as logs:
        storage.write_bytes("x", b"1", if_absent=True)
        with pytest.raises(PreconditionFailed):
            storage.write_bytes("x", b"2", if_absent=True)
        read = storage.read_bytes("x")
        assert read is not None
        storage.write_bytes("x", b"2", if_match=read.etag)
        with pytest.raises(PreconditionFailed):
            storage.write_bytes("x", b"3", if_match=read.etag)
    assert kept == {"/bucket/prefix/x": b"2"}
    assert [(log["event"], log["log_level"]) for log in logs] == [("storage_conditional_writes_unsupported", "warning")]


def test_store_that_refuses_a_matching_if_match(bad_day: BadDay) -> None:
    written: list[bytes] = []

    def answer(request: Request) -> Answer:
        if request.method == "GET":
            return Answer(200, b"1", {"ETag": '"e"'})
        if "if-match" in request.headers:
            return xml(412, "PreconditionFailed")
        written.append(request.body)
        return Answer(headers={"ETag": '"f"'})

    bad_day.answer = answer
    storage = open_budgeted(STORE)
    with pytest.raises(PreconditionFailed):
        storage.write_bytes("x", b"2", if_match='"another"')
    with capture_logs() as logs:
        storage.write_bytes("x", b"2", if_match='"e"')
    assert written == [b"2"]
    assert [log["event"] for log in logs] == ["storage_conditional_writes_unsupported"]


@pytest.mark.parametrize("condition", [{"if_absent": True}, {"if_match": '"e"'}])
def test_write_whose_first_answer_was_lost(bad_day: BadDay, condition: dict[str, str | bool]) -> None:
    """A retry that finds its own object has succeeded. It has not lost a race."""
    kept: list[bytes] = []

    def answer(request: Request) -> Answer:
        if request.method == "GET":
            return Answer(200, kept[0], {"ETag": '"f"'})
        if kept:
            return xml(412, "PreconditionFailed")
        kept.append(request.body)
        return xml(500, "InternalError")

    bad_day.answer = answer
    open_budgeted(STORE).write_bytes("x", b"mine", **condition)  # type: ignore[arg-type]
    assert kept == [b"mine"]
    with pytest.raises(PreconditionFailed):
        open_budgeted(STORE).write_bytes("x", b"other", **condition)  # type: ignore[arg-type]


def test_body_that_breaks_off(bad_day: BadDay, tmp_path: Path) -> None:
    bad_day.answer = head_or(lambda _: Answer(200, b"half", {"ETag": '"e"'}, promised_bytes=8), 8)
    storage = open_budgeted(STORE)
    with pytest.raises(StorageError, match="cannot be reached"):
        storage.read_bytes("x")
    with pytest.raises(StorageError, match="kept breaking off"):
        storage.download("x", tmp_path / "target")
    assert list(tmp_path.glob("*target*")) == []
    assert list(tmp_path.glob(".~*")) == []


def test_body_that_breaks_off_once(bad_day: BadDay, tmp_path: Path) -> None:
    answers: list[Answer] = []
    bad_day.answer = head_or(lambda _: answers.pop(0), 8)
    storage = open_budgeted(STORE)
    for fetch in (
        lambda: storage.download("x", tmp_path / "target").size_bytes,
        lambda: len(read.data) if (read := storage.read_bytes("x")) else None,
    ):
        answers[:] = [Answer(200, b"half", {"ETag": '"e"'}, promised_bytes=8), Answer(200, b"complete", {"ETag": '"e"'})]
        assert fetch() == 8
        assert answers == []


def test_wrong_bytes_are_noticed(bad_day: BadDay, tmp_path: Path) -> None:
    checksum = base64.b64encode(zlib.crc32(b"right").to_bytes(4, "big")).decode()
    body = b"right"
    bad_day.answer = head_or(lambda _: Answer(200, body, {"ETag": '"e"', "x-amz-checksum-crc32": checksum}), 5)
    storage = open_budgeted(STORE)
    assert storage.download("x", tmp_path / "target").size_bytes == 5
    body = b"wrong"
    with pytest.raises(StorageError, match="do not match the store's checksum"):
        storage.read_bytes("x")
    with pytest.raises(StorageError, match="do not match the store's checksum"):
        storage.download("x", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"right"


def test_object_replaced_while_it_is_read(bad_day: BadDay, tmp_path: Path) -> None:
    size_bytes = 17 * 2**20
    bad_day.answer = head_or(lambda _: xml(412, "PreconditionFailed"), size_bytes)
    with pytest.raises(StorageError, match="replaced while it was read"):
        open_budgeted(STORE).download("x", tmp_path / "target")
    assert all(request.headers["if-match"] == '"e"' for request in bad_day.requests if request.method == "GET")
    assert [request.method for request in bad_day.requests].count("HEAD") == 1, "one HEAD settles size, tag and checksum"


def test_sigterm_stops_a_transfer_and_leaves_no_trace(bad_day: BadDay, tmp_path: Path) -> None:
    """Do what `entrypoint` does on SIGTERM: raise `Interrupted` wherever the main thread is."""
    asked = threading.Event()

    def answer(_: Request) -> Answer:
        asked.set()
        time.sleep(0.5)
        return Answer(200, b"x" * 1000, {"ETag": '"e"'})

    def interrupt(*_: object) -> None:
        raise Interrupted("SIGTERM")

    bad_day.answer = head_or(answer, 1000)
    before = signal.signal(signal.SIGTERM, interrupt)
    sender = threading.Thread(target=lambda: asked.wait(10) and os.kill(os.getpid(), signal.SIGTERM))
    sender.start()
    try:
        with pytest.raises(Interrupted):
            open_budgeted(STORE).download("x", tmp_path / "target")
    finally:
        sender.join()
        signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.glob("*target*")) == []
    assert list(tmp_path.glob(".~*")) == []


def test_answer_from_something_that_is_no_object_store(bad_day: BadDay) -> None:
    bad_day.answer = lambda _: Answer(502, b"<html>Bad Gateway</html>", {"Content-Type": "text/html"})
    with pytest.raises(StorageError, match="HTTP 502"):
        open_budgeted(STORE).read_bytes("x")

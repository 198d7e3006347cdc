"""Create the boto3 client of a store: check the AWS settings that select it, and watch over what it sends and gets."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from lora_trainer.errors import ConfigError
from lora_trainer.redaction import redacted
from lora_trainer.store.contacts import FIRST_CONTACT_S, Contact
from lora_trainer.store.s3_answers import check_answer

if TYPE_CHECKING:
    from boto3.session import Session
    from botocore.model import OperationModel
    from mypy_boto3_s3 import S3Client


CONNECTIONS: Final = 8
_CONNECT_TIMEOUT_S: Final = 10
_FIRST_CONNECT_TIMEOUT_S: Final = FIRST_CONTACT_S / 2
"""A host with an IPv6 and an IPv4 address takes two of these."""
_ATTEMPTS: Final = 4
"""botocore's attempts per request. A failing part rarely exhausts them, so large transfers rarely start over."""
_WRITES: Final = ("PutObject", "CopyObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "DeleteObject")
"""Operations that the guard checks. Aborting a multipart upload is always allowed."""
_READS: Final = ("HeadObject", "GetObject", "ListObjectsV2", "HeadBucket")
_WITH_BODY: Final = ("PutObject", "UploadPart")
_EXPECTED: Final = "expected the URL of the store's S3 API, such as http://minio.storage.svc:9000 or https://s3.example.com"
_BUCKET_HOSTS: Final = (
    *(".amazonaws.com", ".amazonaws.com.cn", "storage.googleapis.com", ".backblazeb2.com", ".wasabisys.com"),
    *(".digitaloceanspaces.com", ".r2.cloudflarestorage.com", ".aliyuncs.com"),
)
"""Stores whose hosts can begin with the bucket. At any other store, a listing tells (`S3Errors.of_response`)."""


def new_session() -> Session:
    """Return a boto3 session for the AWS variables and files. Empty variables count as not set, and are removed."""
    import boto3.session
    import botocore.session

    # botocore would look for a profile without a name, or refuse an empty number
    for name in [name for name, value in os.environ.items() if name.startswith("AWS_") and not value]:
        del os.environ[name]
    core = botocore.session.Session()
    # botocore ignores AWS_REGION, which every other AWS SDK reads and IRSA sets
    region = os.environ.get("AWS_REGION") or core.get_config_variable("region") or "us-east-1"
    return boto3.session.Session(botocore_session=core, region_name=region)


def new_client(session: Session, bucket: str, contact: Contact, stall_timeout_s: float, guard: Callable[[], None]) -> S3Client:
    """Return a client that calls `guard` before each write and keeps `contact` up to date.

    Until the store has answered, its timeouts are short and botocore does not repeat requests that got no answer. Raises
    `ConfigError` for an endpoint or a CA file that can't work.
    """
    from botocore.config import Config

    # only boto3's private botocore session exposes these variables
    core = session._session
    _check_endpoint_variable()
    _check_ca_file(core.get_config_variable("ca_bundle"))
    first = not contact.answered
    without_checksums: dict[str, Any] = {
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    config = Config(
        connect_timeout=min(_FIRST_CONNECT_TIMEOUT_S if first else _CONNECT_TIMEOUT_S, stall_timeout_s),
        read_timeout=min(FIRST_CONTACT_S, stall_timeout_s) if first else stall_timeout_s,
        retries={
            "mode": core.get_config_variable("retry_mode") or "standard",
            "total_max_attempts": core.get_config_variable("max_attempts") or _ATTEMPTS,
        },
        tcp_keepalive=True,
        max_pool_connections=2 * CONNECTIONS,
        user_agent_extra="lora-trainer",
        **({} if contact.checksums else without_checksums),
    )
    client = session.client("s3", config=config)
    _check_endpoint(client.meta.endpoint_url, bucket)
    _Watch(client, contact, guard)
    return client


class _Watch:
    """Handlers of a client's events."""

    def __init__(self, client: S3Client, contact: Contact, guard: Callable[[], None]) -> None:
        self._contact = contact
        self._guard = guard
        self._sent = threading.local()
        events = client.meta.events
        events.register("before-send.s3", self._before_send)
        for operation in _WRITES:
            # runs before each attempt, botocore's repetitions included
            events.register(f"before-send.s3.{operation}", self._before_write)
        # botocore's own handlers change answers, and decide about retries, only after these
        for operation in (*_WRITES, *_READS):
            events.register_first(f"before-parse.s3.{operation}", self._before_parse)
        events.register_first("needs-retry.s3", self._needs_retry)
        if client.meta.config.request_checksum_calculation == "when_required":  # type: ignore[attr-defined]
            for operation in _WITH_BODY:
                events.register(f"before-call.s3.{operation}", _add_md5)

    def _before_send(self, request: Any, **_: object) -> None:
        self._sent.url = request.url

    def _before_write(self, **_: object) -> None:
        self._guard()

    def _before_parse(self, operation_model: OperationModel, response_dict: dict[str, Any], **_: object) -> None:
        if check_answer(operation_model, response_dict, self._sent.url, answered=self._contact.answered) == "s3":
            self._contact.note_answer()

    def _needs_retry(self, caught_exception: Exception | None = None, **_: object) -> None:
        if caught_exception is not None and not self._contact.answered:
            # our own retries end sooner for a store that has never answered
            raise caught_exception


def _add_md5(params: dict[str, Any], **_: object) -> None:
    """Let the store verify an upload without a checksum header by its MD5, which every store knows."""
    digest, body = hashlib.md5(usedforsecurity=False), params["body"]
    if isinstance(body, bytes | bytearray):
        digest.update(body)
    else:
        start = body.tell()
        while chunk := body.read(2**20):
            digest.update(chunk)
        body.seek(start)
    params["headers"]["Content-MD5"] = base64.b64encode(digest.digest()).decode()


# -- settings


def endpoint_variable() -> tuple[str, str] | None:
    """Return the name and value of the variable that sets the endpoint, or None."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if value := os.environ.get(name):
            return name, value
    return None


def _check_endpoint_variable() -> None:
    """Raise `ConfigError` for an endpoint in the environment that is not a URL of a host."""
    found = endpoint_variable()
    if found is None or os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return
    name, value = found
    problem = _endpoint_problem(value)
    if problem:
        raise ConfigError(f"{name}: got {redacted(value)!r}: {problem}; {_EXPECTED}")


def _endpoint_problem(url: str) -> str | None:
    if any(character.isspace() or not character.isprintable() for character in url):
        return "it has white space or a control character"
    if "://" not in url:
        return "it has no http:// or https://"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return str(error)
    if parts.scheme.lower() not in ("http", "https"):
        return f"its scheme is '{parts.scheme}'"
    if not parts.hostname:
        return "it has no host"
    if port == 0:
        return "its port is 0"
    if parts.query or parts.fragment or "?" in url or "#" in url:
        return "it has a query or a fragment"
    return None


def _check_endpoint(url: str, bucket: str) -> None:
    """Raise `ConfigError` if the endpoint already contains the bucket, which would become part of every key."""
    parts = urlsplit(url)
    path = parts.path.strip("/")
    first, _, domain = (parts.hostname or "").partition(".")
    if path.rpartition("/")[2] == bucket:
        without = url.rstrip("/").removesuffix(bucket).rstrip("/")
        raise ConfigError(
            f"AWS_ENDPOINT_URL: got {redacted(url)}, which has the bucket '{bucket}' in its path; expected {redacted(without)}: "
            "s3://bucket/prefix/ already names the bucket"
        )
    if first == bucket and domain.endswith(_BUCKET_HOSTS):
        raise ConfigError(
            f"AWS_ENDPOINT_URL: got {redacted(url)}, which has the bucket '{bucket}' in its host; expected "
            f"{parts.scheme}://{domain}: s3://bucket/prefix/ already names the bucket"
        )


def _check_ca_file(named: str | None) -> None:
    """Raise `ConfigError` if the file of `AWS_CA_BUNDLE` or of the profile's `ca_bundle` holds no certificates."""
    if not named:
        return
    path = Path(named)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        with path.open("rb") as file:
            is_empty = not file.read(1)
        ssl.create_default_context().load_verify_locations(path)
    except ssl.SSLError:
        problem = "it is empty" if is_empty else "it has no certificate in PEM form, or a damaged one"
    except (OSError, ValueError) as error:
        problem = (error.strerror if isinstance(error, OSError) else None) or str(error)
    else:
        return
    raise ConfigError(
        f"AWS_CA_BUNDLE: {named}: cannot use this file: {problem}; expected the certificates (PEM) of the authority that signed "
        "the store's certificate, or unset it for a public authority"
    )

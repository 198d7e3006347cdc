"""`s3://` and `file://` with one set of semantics: exact keys, whole files, prefixes that end in `/`.

A storage is a folder named by a URI; everything in it is addressed by a key relative to that folder.
A key is either there with all its bytes or not there at all: nothing half-written is ever visible.

S3 is set up by the ordinary AWS variables and files alone, through boto3's own chain:

- credentials: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`; `AWS_PROFILE`; web identity
  (`AWS_ROLE_ARN` and `AWS_WEB_IDENTITY_TOKEN_FILE`, which is what IRSA injects); the instance's role.
- endpoint: `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`. botocore then addresses buckets by path
  (`http://host/bucket/key`), which MinIO, Ceph and the like need; without one it uses virtual hosts. To have
  virtual hosts at a custom endpoint, say `s3 = addressing_style = virtual` in the profile: botocore reads that
  from the file only.
- region: `AWS_REGION`, then `AWS_DEFAULT_REGION`, then the profile's, then `us-east-1`.
- `AWS_MAX_ATTEMPTS` (4 unless set), `AWS_RETRY_MODE`, `AWS_CA_BUNDLE`.
- `AWS_REQUEST_CHECKSUM_CALCULATION=when_required` leaves out the CRC-32 of each upload, for an old store that
  refuses the header.

Bytes are held to a CRC-32 on their way up, which the store verifies (botocore's default), and to the SHA-256 of the
whole object on their way down, which an upload leaves in the object's metadata.

Faults of an object store that may pass are met twice. botocore repeats a request that was throttled, refused with 5xx or
broken off, which spares a large transfer its other parts. What that does not cover (a body that stalls, breaks off or is
damaged; credentials that expired; a store that is gone for a minute) repeats the whole operation, within the budgets of
`lora_trainer.store.retry`.

Errors: a missing key is `NotFound` (exit 3) and a missing bucket or a wrong setting is `ConfigError` (exit 2),
since trying again does not help. What may help to try again is `StorageError` (exit 6): refused, unreachable,
no credentials yet, disk full.
"""

from __future__ import annotations

import hashlib
import mimetypes
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar

import structlog

from lora_trainer.errors import ConfigError, DataError, LoraTrainerError, StorageError
from lora_trainer.redaction import redacted, remember
from lora_trainer.store.interface import (
    MAX_DOCUMENT_BYTES,
    Fetched,
    ObjectInfo,
    PreconditionFailed,
    ReadResult,
    check_one_condition,
    listed_key,
    no_guard,
    not_found,
    too_large,
)
from lora_trainer.store.keys import checked_prefix, safe_key, unsafe_reason
from lora_trainer.store.local import local_errors, replacing, sha256_of
from lora_trainer.store.retry import Retries, RetryBudget, TransientError

if TYPE_CHECKING:
    from boto3.session import Session
    from botocore.credentials import ReadOnlyCredentials
    from botocore.exceptions import BotoCoreError, ClientError
    from mypy_boto3_s3 import S3Client
    from s3transfer.futures import TransferFuture
    from s3transfer.manager import TransferManager

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


# 16 MiB parts: 10,000 of them, S3's limit, make 156 GiB
_PART_BYTES: Final = 16 * 2**20
_CONNECTIONS: Final = 8
_CONNECT_TIMEOUT_S: Final = 10


# of one request, within one try of ours: enough that a large transfer at a bad hour does not lose its other parts to one
_ATTEMPTS: Final = 4


# for the threads of a transfer that was stopped; those that a silent store holds longer end behind our back
_STOP_WAIT_S: Final = 3.0
_SHA256_METADATA: Final = "lora-trainer-sha256"
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


# ------------------------------------------------------------------------------------------------------ S3


class S3Storage:
    """A prefix of a bucket. The client is made by the first request."""

    def __init__(self, bucket: str, prefix: str, retry_budget: RetryBudget) -> None:
        """Raises `ConfigError` for a bucket name or prefix that cannot be."""
        prefix = prefix if not prefix or prefix.endswith("/") else prefix + "/"
        if not _BUCKET.fullmatch(bucket):
            raise ConfigError(f"s3://{bucket}/{prefix}: got '{bucket}' as the bucket; expected s3://bucket/prefix/")
        if prefix and (problem := unsafe_reason(prefix.removesuffix("/"))):
            raise ConfigError(f"s3://{bucket}/{prefix}: cannot use this prefix: {problem}; expected s3://bucket/prefix/")
        self._bucket = bucket
        self._prefix = prefix
        self._bucket_seen = False
        self._conditional_writes = True
        self._guard: Callable[[], None] = no_guard
        self._retry_budget = retry_budget
        self._stall_timeout_s = retry_budget.settings.stall_timeout_s
        # adapted storages share a boto3 session, which is not thread-safe while it creates a client
        self._client_lock = threading.Lock()

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}"

    @property
    def local_folder(self) -> Path | None:
        return None

    @property
    def conditional_writes(self) -> bool:
        return self._conditional_writes

    def adapted(self, *, guard: Callable[[], None] | None = None, retry_budget: RetryBudget | None = None) -> Self:
        other = copy(self)
        # the client calls the guard
        other.__dict__.pop("_client", None)
        other._guard, other._retry_budget = guard or self._guard, retry_budget or self._retry_budget
        return other

    def download(self, key: str, target: Path) -> Fetched:
        name = self._name(key)
        with local_errors(target):
            return self._persist(key, lambda _: self._fetch(key, name, target), kept=f"{target} is as it was before")

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        name = self._name(key)
        with local_errors(path):
            size_bytes, digest = path.stat().st_size, sha256 or sha256_of(path)

            def send(again: bool) -> None:
                # a try may have done it and lost only the answer
                if not (again and self._holds(name, size_bytes, digest)):
                    with self._transfers() as manager:
                        manager.upload(str(path), self._bucket, name, extra_args=_described(key, digest)).result()

            self._persist(key, send, kept=f"{path} is kept")

    def upload_all(self, folder: Path, prefix: str, sha256: Mapping[str, str]) -> None:
        targets = {name: self._name(prefix + name) for name in sha256}
        left = dict(sha256)
        # one try at all of them; whatever it met is met again, with patience and in words, by those that are left
        with suppress(Exception), self._transfers() as manager:
            sent = {
                name: manager.upload(str(folder / name), self._bucket, target, extra_args=_described(name, sha256[name]))
                for name, target in targets.items()
            }
            for name, future in sent.items():
                with suppress(Exception):
                    future.result()
                    del left[name]
        for name, digest in left.items():
            self.upload(folder / name, prefix + name, sha256=digest)

    def read_bytes(self, key: str, *, max_bytes: int = MAX_DOCUMENT_BYTES) -> ReadResult | None:
        from botocore.exceptions import ClientError

        name = self._name(key)

        def read(_: bool) -> ReadResult | None:
            try:
                return self._read_whole(key, name, max_bytes)
            except ClientError as error:
                if _status(error) == 404 and _code(error) != "NoSuchBucket":
                    return None
                raise

        return self._persist(key, read)

    def write_bytes(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> None:
        from botocore.exceptions import ClientError

        name = self._name(key)
        check_one_condition(if_match, if_absent)
        condition = {"IfMatch": if_match} if if_match is not None else {"IfNoneMatch": "*"} if if_absent else {}
        if not self._conditional_writes and condition:
            self._check_then_write(key, data, if_match)
            return
        maybe_written = False

        def write(again: bool) -> str | None:
            nonlocal maybe_written
            try:
                self._put(key, name, data, condition)
            except ClientError as error:
                maybe_written = again or error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                lost = _status(error) in (409, 412) and _code(error) not in _PASSING
                if condition and (lost or _code(error) in ("NotImplemented", "NoSuchKey")):
                    return _code(error)
                raise
            return None

        refused = self._persist(key, write)
        if refused == "NotImplemented":
            self._without_conditional_writes("NotImplemented")
            self._check_then_write(key, data, if_match)
        elif refused is not None:
            self._settle_conflict(key, data, if_match, maybe_written=maybe_written)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._pages(checked_prefix(prefix))

    def delete(self, key: str) -> None:
        name = self._name(key)
        self._persist(key, lambda _: self._client.delete_object(Bucket=self._bucket, Key=name))

    def exists(self, key: str) -> bool:
        from botocore.exceptions import ClientError

        name = self._name(key)

        def look(_: bool) -> bool:
            try:
                self._client.head_object(Bucket=self._bucket, Key=name)
            except ClientError as error:
                if _status(error) != 404:
                    raise
                self._require_bucket()
                return False
            return True

        return self._persist(key, look)

    # -- tries

    def _persist(self, key: str, attempt: Callable[[bool], _T], *, kept: str = "", operation_key: bool = True) -> _T:
        """What `attempt` gives, tried again while its faults may pass; it is told whether it was tried before.

        `kept` says in words what is lost by none of it.
        """
        with Retries(self._retry_budget) as retries:
            while True:
                try:
                    with self._explained(key, operation_key=operation_key):
                        return attempt(retries.failures > 0)
                except _RefusedCredentialsError as error:
                    if not self._renew_credentials(error):
                        raise StorageError(error.problems) from error
                    fault: TransientError = error
                except _DamagedError as error:
                    if isinstance(before := retries.last_fault, _DamagedError) and before.got == error.got:
                        # what is damaged on its way is damaged in another place each time
                        raise StorageError(f"{error}; got the same wrong bytes twice, so the object itself is damaged") from error
                    fault = error
                except TransientError as error:
                    fault = error
                pause_s = retries.pause_s_after(fault)
                if pause_s is None:
                    raise StorageError("; ".join(filter(None, (str(fault), retries.summary, kept)))) from fault
                _log.warning(
                    "storage_retry", uri=self._where(key), problem=str(fault), failures=retries.failures, pause_s=round(pause_s, 1)
                )
                time.sleep(pause_s)

    def _renew_credentials(self, refused: _RefusedCredentialsError) -> bool:
        """Ask the chain anew, as if the process had just begun. Gives whether another try can go better."""
        before, _ = self._credentials()
        for made in ("_client", "_session"):
            self.__dict__.pop(made, None)
        try:
            with self._explained(""):
                now, method = self._credentials()
        except TransientError:
            return True
        # those of a variable stay what they are; a file, a process or a role may have new ones in a moment
        return now != before or (refused.kind == "expired" and method != "env")

    def _credentials(self) -> tuple[ReadOnlyCredentials | None, str]:
        """Those that the chain gives now, and where from."""
        try:
            found = self._session.get_credentials()
            if found is None:
                return None, ""
            frozen = found.get_frozen_credentials()
            # a profile's or a role's are in no variable
            remember(frozen.access_key, frozen.secret_key, frozen.token)
            return frozen, found.method
        except OSError as error:
            raise StorageError(
                f"{self.uri}: cannot read the AWS credentials: {error.filename}: {error.strerror}; "
                "check AWS_WEB_IDENTITY_TOKEN_FILE and the mounted service-account token"
            ) from error

    # -- requests

    @cached_property
    def _session(self) -> Session:
        import boto3.session
        import botocore.session

        core = botocore.session.Session()
        # botocore reads AWS_DEFAULT_REGION only; every other AWS SDK, and IRSA, goes by AWS_REGION
        region = os.environ.get("AWS_REGION") or core.get_config_variable("region") or "us-east-1"
        return boto3.session.Session(botocore_session=core, region_name=region)

    @cached_property
    def _client(self) -> S3Client:
        from botocore.config import Config

        # boto3 keeps its botocore session to itself, which alone knows these
        core = self._session._session
        config = Config(
            connect_timeout=min(_CONNECT_TIMEOUT_S, self._stall_timeout_s),
            read_timeout=self._stall_timeout_s,
            retries={
                "mode": core.get_config_variable("retry_mode") or "standard",
                "total_max_attempts": core.get_config_variable("max_attempts") or _ATTEMPTS,
            },
            tcp_keepalive=True,
            max_pool_connections=2 * _CONNECTIONS,
            user_agent_extra="lora-trainer",
        )
        with self._client_lock:
            # before the first request, where a missing token file could be mistaken for a missing data file
            self._credentials()
            client = self._session.client("s3", config=config)
        for operation in _WRITES:
            # once for each try, botocore's own included
            client.meta.events.register(f"before-send.s3.{operation}", lambda **_: self._guard())
        return client

    @contextmanager
    def _transfers(self) -> Iterator[TransferManager]:
        from boto3.s3.transfer import TransferConfig, create_transfer_manager

        config = TransferConfig(
            multipart_threshold=_PART_BYTES,
            multipart_chunksize=_PART_BYTES,
            max_concurrency=_CONNECTIONS,
            # of 256 KiB, what a disk slower than the network leaves in memory: 32 MiB instead of 250
            max_io_queue=128,
            # the native client, where it happens to be installed, ignores most of these settings
            preferred_transfer_client="classic",
        )
        manager = create_transfer_manager(self._client, config)
        try:
            yield manager
        except BaseException as error:
            # its own way out waits for every thread, however long the store is silent
            leave = (type(error), error, error.__traceback__)
            stopping = threading.Thread(target=manager.__exit__, args=leave, name="transfer-stop", daemon=True)
            stopping.start()
            stopping.join(_STOP_WAIT_S)
            raise
        manager.shutdown()

    def _fetch(self, key: str, name: str, target: Path) -> Fetched:
        head = self._client.head_object(Bucket=self._bucket, Key=name)
        pinned = _pinned_to(head["ContentLength"], head["ETag"])
        with replacing(target) as file:
            with self._transfers() as manager:
                manager.download(self._bucket, name, file, subscribers=[pinned]).result()
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            # ranges carry no checksum of the store, so large objects are held to the one that `upload` left
            self._check(key, (size_bytes, sha256), (head["ContentLength"], head["Metadata"].get(_SHA256_METADATA, sha256)))
        return Fetched(size_bytes, sha256)

    def _check(self, key: str, got: tuple[int, str], expected: tuple[int, str]) -> None:
        """Sizes and SHA-256s."""
        if got != expected:
            raise _DamagedError(
                f"{self._where(key)}: got {got[0]:,} bytes with SHA-256 {got[1]}, expected {expected[0]:,} with {expected[1]}: "
                "replaced while it was read, or damaged; run it again, and upload the object anew if it stays so",
                got[1],
            )

    def _holds(self, name: str, size_bytes: int, sha256: str) -> bool:
        from botocore.exceptions import ClientError

        try:
            head = self._client.head_object(Bucket=self._bucket, Key=name)
        except ClientError:
            # whatever it is, the upload is told it, too
            return False
        return (head["ContentLength"], head["Metadata"].get(_SHA256_METADATA)) == (size_bytes, sha256)

    def _put(self, key: str, name: str, data: bytes, condition: dict[str, str]) -> None:
        arguments: dict[str, Any] = {**_described(key, hashlib.sha256(data).hexdigest()), **condition}
        self._client.put_object(Bucket=self._bucket, Key=name, Body=data, ContentLength=len(data), **arguments)

    def _read_whole(self, key: str, name: str, max_bytes: int) -> ReadResult:
        response = self._client.get_object(Bucket=self._bucket, Key=name)
        data = bytearray()
        # to the very end: only there does botocore compare length and checksum
        while chunk := response["Body"].read(2**16):
            data += chunk
            if len(data) > max_bytes:
                response["Body"].close()
                raise too_large(self._where(key), max_bytes)
        sha256 = hashlib.sha256(data).hexdigest()
        # a store that is told no checksums, or keeps none, still has this one
        self._check(key, (len(data), sha256), (response["ContentLength"], response["Metadata"].get(_SHA256_METADATA, sha256)))
        return ReadResult(bytes(data), response["ETag"])

    def _pages(self, prefix: str) -> Iterator[ObjectInfo]:
        arguments: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        while True:
            # a page at a time: a fault does not begin the listing anew
            page = self._persist(prefix, lambda _: self._client.list_objects_v2(**arguments), operation_key=False)
            for found in page.get("Contents", []):
                key = found["Key"].removeprefix(self._prefix)
                # the empty objects that consoles make to show a folder
                if not key or (key.endswith("/") and not found["Size"]):
                    continue
                yield ObjectInfo(listed_key(key, self.uri), found["Size"], found.get("ETag", ""))
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def _require_bucket(self) -> None:
        """A HEAD does not tell a missing key from a missing bucket, so this does, once."""
        from botocore.exceptions import ClientError

        if self._bucket_seen:
            return
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            if _status(error) == 404:
                raise self._no_bucket() from error
            # a role that may not ask about the bucket has still been told, by the 404, that the key is missing
        self._bucket_seen = True

    # -- conditional writes where the store has none

    def _settle_conflict(self, key: str, data: bytes, if_match: str | None, *, maybe_written: bool) -> None:
        """What a refused condition means: lost, or already done by us, or a store that cannot compare."""
        current = self.read_bytes(key)
        if maybe_written and current is not None and current.data == data:
            # an earlier attempt was written and its answer lost: this one then met our own object
            return
        if if_match is not None and current is not None and current.etag == if_match:
            # older Ceph answers 412 to an If-Match that does match
            self._without_conditional_writes("refused a matching If-Match")
            self._check_then_write(key, data, if_match)
            return
        raise PreconditionFailed(f"{self._where(key)}: no longer what was last read")

    def _without_conditional_writes(self, reason: str) -> None:
        self._conditional_writes = False
        _log.warning("storage_conditional_writes_unsupported", uri=self.uri, reason=reason)

    def _check_then_write(self, key: str, data: bytes, if_match: str | None) -> None:
        """The next best: two writers within one round trip of each other are not told apart."""
        current = self.read_bytes(key)
        if (current.etag if current else None) != if_match:
            raise PreconditionFailed(f"{self._where(key)}: no longer what was last read")
        self._persist(key, lambda _: self._put(key, self._name(key), data, {}))

    # -- names and errors

    def _name(self, key: str) -> str:
        return self._prefix + safe_key(key)

    def _where(self, key: str) -> str:
        return self.uri + key

    @property
    def _endpoint(self) -> str:
        """For messages, so it must not fail: the client may be what could not be made."""
        named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        client = self.__dict__.get("_client")
        return redacted(client.meta.endpoint_url if client else named or "the AWS endpoint")

    @contextmanager
    def _explained(self, key: str, *, operation_key: bool = True) -> Iterator[None]:
        """Turns what boto3 raises about `key` (or about a prefix) into this project's errors."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError
        from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

        try:
            yield
        except ClientError as error:
            if operation_key:
                self._require_reason(error, key)
            raise self._explain_refusal(error, key) from error
        except BotoCoreError as error:
            raise self._explain_failure(error, key) from error
        except ResponseParserError as error:
            raise TransientError(
                f"{self._where(key)}: {self._endpoint} sent an answer that breaks off or is none of S3's; "
                "check AWS_ENDPOINT_URL and the store's health, then run it again"
            ) from error
        except RetriesExceededError as error:
            raise TransientError(
                f"{self._where(key)}: the transfer from {self._endpoint} kept breaking off: "
                f"{redacted(str(error.last_exception))}; check the network, then run it again"
            ) from error
        except S3DownloadFailedError as error:
            raise StorageError(f"{self._where(key)}: replaced while it was read; run it again") from error
        except (ConnectionError, TimeoutError) as error:
            raise TransientError(f"{self._where(key)}: lost the connection to {self._endpoint}: {error}; run it again") from error
        except ValueError as error:
            # botocore's way to refuse an endpoint or an AWS_* value; ours are raised before this block is entered
            raise ConfigError(f"{self._where(key)}: {redacted(str(error))}; check the AWS_* variables and the profile") from error

    def _require_reason(self, error: ClientError, key: str) -> None:
        """The answer to a HEAD has no body, hence no reason: a GET of one byte is refused with one, which is raised instead."""
        if error.operation_name != "HeadObject" or _status(error) in (404, 500, 502, 503, 504):
            return
        with self._explained(key, operation_key=False):
            self._client.get_object(Bucket=self._bucket, Key=self._name(key), Range="bytes=0-0")["Body"].close()

    def _no_bucket(self) -> ConfigError:
        return ConfigError(
            f"{self.uri}: no bucket called '{self._bucket}' at {self._endpoint}; check the name, the endpoint "
            "(AWS_ENDPOINT_URL) and the account (AWS_PROFILE), or make the bucket first"
        )

    def _missing(self, key: str) -> LoraTrainerError:
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        folder = key.rpartition("/")[0]
        prefix = self._prefix + (folder + "/" if folder else "")
        names: list[str] | None = None
        try:
            page = self._client.list_objects_v2(Bucket=self._bucket, Prefix=prefix, Delimiter="/", MaxKeys=1000)
        except ClientError as error:
            if _code(error) == "NoSuchBucket":
                return self._no_bucket()
        except (BotoCoreError, ResponseParserError):
            # the listing only serves the message
            pass
        else:
            found = [item["Key"] for item in page.get("Contents", [])] + [item["Prefix"] for item in page.get("CommonPrefixes", [])]
            names = [name.removeprefix(prefix) for name in found if name != prefix]
        return not_found(self._where(key), key, f"s3://{self._bucket}/{prefix}", names)

    def _explain_refusal(self, error: ClientError, key: str) -> LoraTrainerError:
        code, status, where = _code(error), _status(error), self._where(key)
        said = redacted(error.response["Error"].get("Message") or "")
        got = f"HTTP {status} {code}" + (f" ({said})" if said and said != code else "")
        passing = StorageError if code not in _PASSING and (status < 500 or status == 501) else TransientError
        if error.operation_name.startswith("AssumeRole"):
            # an expired token is one that the cluster is about to replace
            return (TransientError if code in _EXPIRED else passing)(
                f"{where}: the role in AWS_ROLE_ARN could not be assumed: {got}; check the role's trust policy "
                "and the service account's annotation"
            )
        if code == "NoSuchBucket":
            return self._no_bucket()
        if code in ("NoSuchKey", "404"):
            return self._missing(key)
        if code in _EXPIRED:
            return _RefusedCredentialsError(
                f"{where}: the credentials have expired: {got}; renew them (AWS_SESSION_TOKEN, or 'aws sso login'); "
                "a role's are renewed by themselves, so there check the clock",
                "expired",
            )
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidSecurity", "NotSignedUp"):
            return _RefusedCredentialsError(
                f"{where}: {self._endpoint} does not accept the credentials: {got}; check that AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY belong together and to this endpoint",
                "wrong",
            )
        if code == "RequestTimeTooSkewed":
            return StorageError(f"{where}: this machine's clock is off: {got}; set it, then run it again")
        if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"):
            return ConfigError(f"{where}: the bucket is in another region: {got}; set AWS_REGION to the bucket's own")
        if code == "InvalidBucketName":
            return ConfigError(f"{where}: {got}; expected s3://bucket/prefix/ with an existing bucket")
        if code == "InvalidObjectState":
            return DataError(f"{where}: the object is archived: {got}; restore it to a readable storage class first")
        if status == 403:
            action = _ACTIONS.get(error.operation_name, f"s3:{error.operation_name}")
            missing = {
                "s3:GetObject": "; without s3:ListBucket a missing key is refused the same way, so check its name as well",
                "s3:ListBucket": "; checkpoints and a base's files are found by listing, only training data can do without",
            }.get(action, "")
            resource = f"arn:aws:s3:::{self._bucket}" + ("" if action == "s3:ListBucket" else f"/{self._prefix}{key}")
            return StorageError(f"{where}: {action} refused: {got}; expected it to be allowed on {resource}{missing}")
        attempts = error.response["ResponseMetadata"].get("RetryAttempts", 0) + 1
        times = "once" if attempts == 1 else f"{attempts} times"
        return passing(
            f"{where}: {error.operation_name} failed: {self._endpoint} answered {got}, asked {times}; "
            "check the store's health, then run it again"
        )

    def _explain_failure(self, error: BotoCoreError, key: str) -> LoraTrainerError:
        from botocore import exceptions as raised

        where, said = self._where(key), redacted(str(error))
        match error:
            case raised.NoCredentialsError():
                return StorageError(
                    f"{where}: no AWS credentials found; expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE "
                    "with ~/.aws/credentials, or a role (AWS_ROLE_ARN with AWS_WEB_IDENTITY_TOKEN_FILE, or the instance's)"
                )
            case raised.PartialCredentialsError():
                return ConfigError(f"{where}: half of the AWS credentials is missing: {said}; set both, or neither")
            case (
                raised.CredentialRetrievalError()
                | raised.MetadataRetrievalError()
                | raised.TokenRetrievalError()
                | raised.SSOError()
                | raised.LoginError()
            ):
                return TransientError(f"{where}: the AWS credentials could not be fetched: {said}; renew them, then run it again")
            case raised.ProfileNotFound() | raised.ConfigParseError() | raised.ConfigNotFound():
                return ConfigError(f"{where}: {said}; check AWS_PROFILE and ~/.aws/config")
            case raised.FlexibleChecksumError() | raised.ChecksumError():
                # its message has both checksums
                return _DamagedError(
                    f"{where}: the bytes received do not match the store's checksum: {said}; run it again, and upload the "
                    "object anew if it stays so",
                    said,
                )
            case raised.SSLError():
                kind = StorageError if "CERTIFICATE_VERIFY_FAILED" in said else TransientError
                return kind(f"{where}: no trusted TLS connection to {self._endpoint}: {said}; AWS_CA_BUNDLE names a private CA")
            case raised.ConnectionError() | raised.HTTPClientError() | raised.IncompleteReadError():
                return TransientError(
                    f"{where}: {self._endpoint} cannot be reached: {said}; check AWS_ENDPOINT_URL, the network and the proxy"
                )
            case (
                raised.InvalidConfigError()
                | raised.InvalidRetryConfigurationError()
                | raised.InvalidChecksumConfigError()
                | raised.InvalidDefaultsMode()
                | raised.ValidationError()
                | raised.ParamValidationError()
                | raised.BaseEndpointResolverError()
                | raised.EndpointProviderError()
                | raised.InvalidEndpointConfigurationError()
                | raised.InvalidProxiesConfigError()
                | raised.InvalidS3AddressingStyleError()
                | raised.InvalidDNSNameError()
            ):
                return ConfigError(f"{where}: {said}; check the AWS_* variables and the profile")
            case _:
                return StorageError(f"{where}: {said}; check the AWS_* variables and the store, then run it again")


class _DamagedError(TransientError):
    """Other bytes than those that were stored. `got` names them."""

    def __init__(self, problem: str, got: str) -> None:
        self.got = got
        super().__init__(problem)


class _RefusedCredentialsError(TransientError):
    """Credentials that the store does not take, any more or at all."""

    def __init__(self, problem: str, kind: Literal["expired", "wrong"]) -> None:
        self.kind = kind
        super().__init__(problem)


_PASSING: Final = frozenset(
    {
        # throttled, some stores with other statuses than 503: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
        *("SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling", "ThrottlingException", "TooManyRequests", "429"),
        *("RequestLimitExceeded", "RequestThrottled", "RequestThrottledException", "BandwidthLimitExceeded", "ServerBusy"),
        # the connection, or another writer, came in between
        *("RequestTimeout", "RequestTimeoutException", "408", "IncompleteBody", "OperationAborted", "ConditionalRequestConflict"),
        # damaged on its way there, and refused by the store
        *("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"),
        # the answer that said the upload is complete was lost
        "NoSuchUpload",
    }
)
_EXPIRED: Final = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})
_WRITES: Final = ("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "DeleteObject")
"""Requests that change what others see. An upload in parts that is broken off may always be cleared away."""
_ACTIONS: Final = {
    "HeadObject": "s3:GetObject",
    "HeadBucket": "s3:ListBucket",
    "ListObjectsV2": "s3:ListBucket",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
}
"""The permission behind each request, where the two have different names."""


def _described(key: str, sha256: str) -> dict[str, Any]:
    """What every upload carries. The type lets a browser show `report.html` straight from the store."""
    return {"ContentType": mimetypes.guess_type(key)[0] or "application/octet-stream", "Metadata": {_SHA256_METADATA: sha256}}


def _pinned_to(size_bytes: int, etag: str) -> Any:
    """Lets a transfer use the size and tag of the HEAD that was made already, and fail if the object is replaced."""
    from s3transfer.subscribers import BaseSubscriber

    class Pinned(BaseSubscriber):
        def on_queued(self, future: TransferFuture, **_: Any) -> None:
            future.meta.provide_transfer_size(size_bytes)
            future.meta.provide_object_etag(etag)

    return Pinned()


def _code(error: ClientError) -> str:
    # an empty element in the answer is None here
    return error.response["Error"].get("Code") or ""


def _status(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]

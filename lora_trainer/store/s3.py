"""Storage under a prefix of an S3 bucket.

It is configured by the standard AWS variables and files, through boto3's own chain:

- credentials: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`; `AWS_PROFILE`; web identity
  (`AWS_ROLE_ARN` and `AWS_WEB_IDENTITY_TOKEN_FILE`, which IRSA injects); the instance's role.
- endpoint: `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`. With an endpoint, botocore uses path-style addresses
  (`http://host/bucket/key`), which MinIO and Ceph need; without one, virtual-hosted ones. For virtual-hosted addresses at a
  custom endpoint, set `s3 = addressing_style = virtual` in the profile: botocore reads that from the file only.
- region: `AWS_REGION`, then `AWS_DEFAULT_REGION`, then the profile's, then `us-east-1`.
- `AWS_MAX_ATTEMPTS` (4 by default), `AWS_RETRY_MODE`, `AWS_CA_BUNDLE`.
- `AWS_REQUEST_CHECKSUM_CALCULATION=when_required` omits the CRC-32 of uploads, for a store that refuses the header.

Checksums: the store verifies a CRC-32 of every upload (botocore's default). If it refuses the header, as Google's and Backblaze's
do, uploads carry an MD5 instead. Every upload records the object's SHA-256 in its metadata, and every download is verified
against it.

Retries have two levels. botocore repeats single requests that were throttled, failed with 5xx or lost their connection, so a
large transfer does not start over. After any other transient fault (a stalled, truncated or corrupted body, expired
credentials, a store that is down for a minute) this module repeats the whole operation, within the budgets of
`lora_trainer.store.retry`.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import structlog

from lora_trainer.errors import ConfigError, LoraTrainerError, StorageError
from lora_trainer.redaction import redacted, remember
from lora_trainer.store.contacts import Contact
from lora_trainer.store.interface import (
    MAX_DOCUMENT_BYTES,
    NO_ETAG,
    Fetched,
    ObjectInfo,
    PreconditionFailed,
    ReadResult,
    check_one_condition,
    in_other_form,
    listed_key,
    no_guard,
    not_found,
    other_form,
    too_large,
)
from lora_trainer.store.keys import checked_prefix, safe_key, unsafe_reason
from lora_trainer.store.local import local_errors, replacing, sha256_of
from lora_trainer.store.retry import RetryBudget, TransientError, UnreachableError, retry
from lora_trainer.store.s3_answers import GATEWAY_STATUSES, NotS3Error
from lora_trainer.store.s3_client import endpoint_variable, new_client, new_session
from lora_trainer.store.s3_errors import (
    TRANSIENT_CODES,
    CorruptedError,
    CredentialsRefusedError,
    S3Errors,
    error_code,
    http_status,
    is_missing_key,
    refuses_checksums,
)
from lora_trainer.store.s3_network import scheme_of_port
from lora_trainer.store.s3_transfers import SHA256_METADATA, pinned_to, transfers, upload_headers

if TYPE_CHECKING:
    from boto3.session import Session
    from botocore.credentials import ReadOnlyCredentials
    from botocore.exceptions import BotoCoreError, ClientError
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CopySourceTypeDef

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


class S3Storage:
    """A prefix of a bucket. The first request creates the client."""

    def __init__(self, bucket: str, prefix: str, retry_budget: RetryBudget) -> None:
        """Raises `ConfigError` for an invalid bucket name or prefix."""
        prefix = prefix if not prefix or prefix.endswith("/") else prefix + "/"
        if not _BUCKET.fullmatch(bucket):
            raise ConfigError(f"s3://{bucket}/{prefix}: got '{bucket}' as the bucket; expected s3://bucket/prefix/")
        if prefix and (problem := unsafe_reason(prefix.removesuffix("/"))):
            raise ConfigError(f"s3://{bucket}/{prefix}: cannot use this prefix: {problem}; expected s3://bucket/prefix/")
        self._bucket = bucket
        self._prefix = prefix
        self._bucket_seen = False
        self._scheme_asked = False
        self._guard: Callable[[], None] = no_guard
        self._retry_budget = retry_budget
        # a copy with another retry budget talks to the same store, with the same settings
        self._contacts = retry_budget.contacts
        self._settings = retry_budget.settings
        # copies share a boto3 session, which must not create two clients at once
        self._client_lock = threading.Lock()

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}"

    @property
    def local_folder(self) -> Path | None:
        return None

    @property
    def conditional_writes(self) -> bool:
        return self._contact.conditional_writes

    @property
    def conditions_probed(self) -> bool:
        return self._contact.conditions_probed

    def adapted(self, *, guard: Callable[[], None] | None = None, retry_budget: RetryBudget | None = None) -> Self:
        other = copy(self)
        # the copy needs its own client, whose event handlers call its guard
        other.__dict__.pop("_made_client", None)
        other._guard, other._retry_budget = guard or self._guard, retry_budget or self._retry_budget
        return other

    def download(self, key: str, target: Path) -> Fetched:
        name = self._name(key)
        with local_errors(target):
            return self._with_retries(key, lambda _: self._fetch(key, name, target), kept=f"{target} is unchanged")

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        name = self._name(key)
        with local_errors(path):
            size_bytes, digest = path.stat().st_size, sha256 or sha256_of(path)
            headers = upload_headers(self._settings, key, digest)

            def send(again: bool) -> None:
                # an earlier attempt may have succeeded and only lost its response
                if not (again and self._holds(name, size_bytes, digest)):
                    with transfers(self._client) as manager:
                        manager.upload(str(path), self._bucket, name, extra_args=headers).result()

            self._with_retries(key, send, kept=f"{path} is kept")

    def upload_all(self, folder: Path, prefix: str, sha256: Mapping[str, str]) -> None:
        targets = {name: self._name(prefix + name) for name in sha256}
        headers = {name: upload_headers(self._settings, name, digest) for name, digest in sha256.items()}
        left = dict(sha256)
        # try all files once without our retries; then upload() repeats the failed ones and reports their errors
        with suppress(Exception), transfers(self._client) as manager:
            sent = {
                name: manager.upload(str(folder / name), self._bucket, target, extra_args=headers[name])
                for name, target in targets.items()
            }
            for name, future in sent.items():
                with suppress(Exception):
                    future.result()
                    del left[name]
        for name, digest in left.items():
            self.upload(folder / name, prefix + name, sha256=digest)

    def copy(self, source: str, key: str, *, size_bytes: int, sha256: str) -> bool:
        name, headers = self._name(key), upload_headers(self._settings, key, sha256)
        copied: CopySourceTypeDef = {"Bucket": self._bucket, "Key": self._name(source)}
        # the caller uploads what fails here, which repeats and reports it
        with suppress(Exception):
            self._client.copy_object(Bucket=self._bucket, Key=name, CopySource=copied, MetadataDirective="REPLACE", **headers)
            return self._holds(name, size_bytes, sha256)
        return False

    def read_bytes(self, key: str, *, max_bytes: int = MAX_DOCUMENT_BYTES) -> ReadResult | None:
        from botocore.exceptions import ClientError

        name = self._name(key)

        def read(_: bool) -> ReadResult | None:
            try:
                return self._read_whole(key, name, max_bytes)
            except ClientError as error:
                if http_status(error) == 404 and error_code(error) != "NoSuchBucket":
                    return None
                raise

        return self._with_retries(key, read)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        name = self._name(key)
        return self._with_retries(key, lambda _: self._read_part(key, name, start, length)) if length else b""

    def write_bytes(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> None:
        from botocore.exceptions import ClientError

        name = self._name(key)
        check_one_condition(if_match, if_absent)
        condition = {"IfMatch": if_match} if if_match is not None else {"IfNoneMatch": "*"} if if_absent else {}
        if not self.conditional_writes and condition:
            self._check_then_write(key, data, if_match)
            return
        maybe_written = False

        def write(again: bool) -> str | None:
            nonlocal maybe_written
            try:
                self._put(key, name, data, condition)
            except ClientError as error:
                maybe_written = again or error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                lost = http_status(error) in (409, 412) and error_code(error) not in TRANSIENT_CODES
                if condition and (lost or error_code(error) in ("NotImplemented", "NoSuchKey")):
                    return error_code(error)
                raise
            return None

        refused = self._with_retries(key, write)
        if refused == "NotImplemented":
            self._without_conditional_writes("NotImplemented")
            self._check_then_write(key, data, if_match)
        elif refused is not None:
            self._settle_conflict(key, data, if_match, maybe_written=maybe_written)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._pages(checked_prefix(prefix))

    def probe_conditional_writes(self, key: str) -> bool:
        try:
            self.write_bytes(key, b"1", if_absent=True)
        except PreconditionFailed:
            self._without_conditional_writes("refused a write whose condition holds")
            self.write_bytes(key, b"1")
        for condition in ({"if_absent": True}, {"if_match": NO_ETAG}) if self.conditional_writes else ():
            try:
                # other bytes, so that a repeated request can't take the object for its own
                self.write_bytes(key, b"2", **condition)
            except PreconditionFailed:
                continue
            self._without_conditional_writes("accepted a write whose condition does not hold")
            break
        if self.conditional_writes and (current := self.read_bytes(key)):
            # a store that refuses it is found out by the write itself
            self.write_bytes(key, b"3", if_match=current.etag)
        self._contact.conditions_probed = True
        return self.conditional_writes

    def delete(self, key: str) -> None:
        name = self._name(key)
        self._with_retries(key, lambda _: self._client.delete_object(Bucket=self._bucket, Key=name))

    def exists(self, key: str) -> bool:
        from botocore.exceptions import ClientError

        name = self._name(key)

        def look(_: bool) -> bool:
            try:
                self._client.head_object(Bucket=self._bucket, Key=name)
            except ClientError as error:
                if http_status(error) != 404:
                    raise
                self._require_bucket()
                return False
            return True

        return self._with_retries(key, look)

    # -- retries

    def _with_retries(self, key: str, attempt: Callable[[bool], _T], *, kept: str = "", operation_key: bool = True) -> _T:
        """Return the result of `attempt`, repeated as `retry` says. `kept` tells the user what a failure leaves intact."""

        def translated(again: bool) -> _T:
            with self._translated_errors(key, operation_key=operation_key):
                return self._with_or_without_checksums(attempt, again)

        where, contact = self._where(key), self._contact
        return retry(translated, self._retry_budget, where, permanent=self._permanent, contact=contact, kept=kept)

    def _with_or_without_checksums(self, attempt: Callable[[bool], _T], again: bool) -> _T:
        """Return the result of `attempt`, tried again without checksum headers if the store seems to refuse them."""
        from botocore.exceptions import ClientError

        contact = self._contact
        had_checksums = contact.checksums
        try:
            return attempt(again)
        except ClientError as error:
            if not had_checksums or not refuses_checksums(error, again=again):
                raise
            refused = error
        contact.checksums = False
        try:
            result = attempt(again)
        except ClientError as error:
            if refuses_checksums(error, again=again):
                # the checksums were not the reason
                contact.checksums = True
                raise refused from error
            raise
        _log.warning(
            "storage_checksums_unsupported",
            endpoint=self._endpoint,
            refused=f"{error_code(refused)}: {redacted(refused.response['Error'].get('Message') or '')}",
            hint="uploads carry an MD5 instead; AWS_REQUEST_CHECKSUM_CALCULATION=when_required saves this attempt",
        )
        return result

    def _permanent(self, fault: TransientError, before: TransientError | None) -> LoraTrainerError | None:
        """Return the error to end with if another attempt can't help, given the fault `before` this one."""
        if isinstance(fault, CredentialsRefusedError) and not self._renew_credentials(fault):
            return StorageError(fault.problems)
        if isinstance(fault, CorruptedError) and isinstance(before, CorruptedError) and before.got == fault.got:
            # a faulty network would not corrupt the same bytes twice
            return StorageError(f"{fault}; got the same wrong bytes twice, so the object itself is damaged")
        if isinstance(fault, UnreachableError) and fault.may_be_scheme and before and not self._contact.answered:
            return self._wrong_scheme()
        return None

    def _wrong_scheme(self) -> ConfigError | None:
        """Ask a port that ended our connections whether it expects HTTP or HTTPS, once. Return the error if it is the other one."""
        named = endpoint_variable()
        if self._scheme_asked or named is None:
            return None
        self._scheme_asked = True
        scheme = scheme_of_port(named[1])
        return self._errors.other_scheme(scheme, "") if scheme else None

    def _renew_credentials(self, refused: CredentialsRefusedError) -> bool:
        """Load the credentials again, as a new process would. Return whether another attempt may succeed."""
        before, _ = self._credentials()
        for made in ("_made_client", "_session"):
            self.__dict__.pop(made, None)
        try:
            with self._translated_errors(""):
                now, method = self._credentials()
        except TransientError:
            return True
        # environment variables do not change, but a file, a process or a role may soon provide new credentials
        return now != before or (refused.kind == "expired" and method != "env")

    def _credentials(self) -> tuple[ReadOnlyCredentials | None, str]:
        """Return the current credentials of boto3's chain and the name of their source."""
        try:
            found = self._session.get_credentials()
            if found is None:
                return None, ""
            frozen = found.get_frozen_credentials()
            # redaction only knows the credentials in the environment, not those of a profile or a role
            remember(frozen.access_key, frozen.secret_key, frozen.token)
            return frozen, found.method
        except OSError as error:
            raise StorageError(
                f"{self.uri}: cannot read the AWS credentials: {error.filename}: {error.strerror}; "
                "check AWS_WEB_IDENTITY_TOKEN_FILE and the mounted service-account token"
            ) from error

    # -- requests

    @cached_property
    def _contact(self) -> Contact:
        return self._contacts.current()

    @cached_property
    def _session(self) -> Session:
        return new_session()

    @property
    def _client(self) -> S3Client:
        """The client for what is known about the store by now."""
        contact = self._contact
        known = (contact.answered, contact.checksums)
        made = self.__dict__.get("_made_client")
        if made is None or made[0] != known:
            with self._client_lock:
                # load them now: during a request, a missing token file could be mistaken for a missing data file
                self._credentials()
                made = (known, new_client(self._session, self._bucket, contact, self._settings.stall_timeout_s, self._guard))
            self.__dict__["_made_client"] = made
        client: S3Client = made[1]
        return client

    def _fetch(self, key: str, name: str, target: Path) -> Fetched:
        head = self._client.head_object(Bucket=self._bucket, Key=name)
        pinned = pinned_to(head["ContentLength"], head["ETag"])
        with replacing(target) as file:
            with transfers(self._client) as manager:
                manager.download(self._bucket, name, file, subscribers=[pinned]).result()
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            # the store sends no checksum for ranges, so verify the SHA-256 that upload() recorded
            self._check_bytes(key, (size_bytes, sha256), (head["ContentLength"], head["Metadata"].get(SHA256_METADATA, sha256)))
        return Fetched(size_bytes, sha256)

    def _check_bytes(self, key: str, got: tuple[int, str], expected: tuple[int, str]) -> None:
        """Raise `CorruptedError` if size or SHA-256 differs from the expected one."""
        if got != expected:
            raise CorruptedError(
                f"{self._where(key)}: got {got[0]:,} bytes with SHA-256 {got[1]}, expected {expected[0]:,} with {expected[1]}: "
                "replaced while it was read, or damaged; run it again, and upload the object again if the error persists",
                got[1],
            )

    def _holds(self, name: str, size_bytes: int, sha256: str) -> bool:
        from botocore.exceptions import ClientError

        try:
            head = self._client.head_object(Bucket=self._bucket, Key=name)
        except ClientError:
            # the following upload will fail in the same way and report it
            return False
        return (head["ContentLength"], head["Metadata"].get(SHA256_METADATA)) == (size_bytes, sha256)

    def _put(self, key: str, name: str, data: bytes, condition: dict[str, str]) -> None:
        arguments: dict[str, Any] = {**upload_headers(self._settings, key, hashlib.sha256(data).hexdigest()), **condition}
        answer = self._client.put_object(Bucket=self._bucket, Key=name, Body=data, ContentLength=len(data), **arguments)
        wanted, got = self._settings.server_side_encryption, answer.get("ServerSideEncryption", "none")
        if wanted not in ("none", got):
            raise self._errors.not_encrypted(got, key)

    def _read_whole(self, key: str, name: str, max_bytes: int) -> ReadResult:
        response = self._client.get_object(Bucket=self._bucket, Key=name)
        data = bytearray()
        # read to the end, because only there botocore verifies length and checksum
        while chunk := response["Body"].read(2**16):
            data += chunk
            if len(data) > max_bytes:
                response["Body"].close()
                raise too_large(self._where(key), max_bytes)
        sha256 = hashlib.sha256(data).hexdigest()
        # also verifies objects for which the store has no checksum
        self._check_bytes(key, (len(data), sha256), (response["ContentLength"], response["Metadata"].get(SHA256_METADATA, sha256)))
        return ReadResult(bytes(data), response["ETag"])

    def _read_part(self, key: str, name: str, start: int, length: int) -> bytes:
        response = self._client.get_object(Bucket=self._bucket, Key=name, Range=f"bytes={start}-{start + length - 1}")
        data = response["Body"].read(length)
        # a server without ranges answers with the whole object
        if len(data) != length or (start and not response.get("ContentRange", "").startswith(f"bytes {start}-")):
            raise StorageError(f"{self._where(key)}: got another range than asked for: replaced, or no ranges in this store; retry")
        return data

    def _pages(self, prefix: str) -> Iterator[ObjectInfo]:
        arguments: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        while True:
            # retries repeat one page, not the whole listing
            page = self._with_retries(prefix, lambda _: self._client.list_objects_v2(**arguments), operation_key=False)
            for found in page.get("Contents", []):
                key = found["Key"].removeprefix(self._prefix)
                # skip the empty objects with which consoles represent folders
                if not key or (key.endswith("/") and not found["Size"]):
                    continue
                yield ObjectInfo(listed_key(key, self.uri), found["Size"], found.get("ETag", ""))
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def _require_bucket(self) -> None:
        """Raise `ConfigError` if the bucket is missing, which HEAD cannot tell from a missing key. Checks only once."""
        from botocore.exceptions import ClientError

        if self._bucket_seen:
            return
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            if http_status(error) == 404:
                # a listing states the reason: no bucket, or an endpoint that is not S3's
                self._client.list_objects_v2(Bucket=self._bucket, MaxKeys=1)
                raise self._errors.no_bucket() from error
            # without permission for HeadBucket, trust the 404 for the key
        self._bucket_seen = True

    # -- stores without conditional writes

    def _settle_conflict(self, key: str, data: bytes, if_match: str | None, *, maybe_written: bool) -> None:
        """Handle a refused condition: we lost, an earlier attempt of ours succeeded, or the store cannot compare etags."""
        current = self.read_bytes(key)
        if maybe_written and current is not None and current.data == data:
            # an earlier attempt succeeded but lost its response, so the conflict is with our own object
            return
        if if_match is not None and current is not None and current.etag == if_match:
            # older Ceph versions answer 412 to a matching If-Match
            self._without_conditional_writes("refused a write whose condition holds")
            self._check_then_write(key, data, if_match)
            return
        raise PreconditionFailed(f"{self._where(key)}: changed since it was last read")

    def _without_conditional_writes(self, reason: str) -> None:
        self._contact.conditional_writes = False
        _log.warning("storage_conditional_writes_unsupported", uri=self.uri, reason=reason)

    def _check_then_write(self, key: str, data: bytes, if_match: str | None) -> None:
        """Compare and write in two requests. Of two writers within one round trip of each other, both succeed."""
        current = self.read_bytes(key)
        if (current.etag if current else None) != if_match:
            raise PreconditionFailed(f"{self._where(key)}: changed since it was last read")
        self._with_retries(key, lambda _: self._put(key, self._name(key), data, {}))

    # -- names and errors

    def _name(self, key: str) -> str:
        return self._prefix + safe_key(key)

    def _where(self, key: str) -> str:
        return self.uri + key

    @property
    def _endpoint(self) -> str:
        """Endpoint for messages. Works without a client, because creating it may have failed."""
        named = endpoint_variable()
        made = self.__dict__.get("_made_client")
        return redacted(made[1].meta.endpoint_url if made else named[1] if named else "the AWS endpoint")

    @property
    def _errors(self) -> S3Errors:
        return S3Errors(self._bucket, self._prefix, self._endpoint, self._contact.answered, self._settings.server_side_encryption)

    @contextmanager
    def _translated_errors(self, key: str, *, operation_key: bool = True) -> Iterator[None]:
        """Translate boto3's errors about `key` into ours. `operation_key` allows a GET of `key` to find a failed HEAD's reason."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError
        from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ClientError as error:
            if operation_key:
                self._raise_reason(error, key)
            raise (self._missing(key) if is_missing_key(error) else self._errors.of_response(error, key)) from error
        except (NotS3Error, BotoCoreError) as error:
            raise self._unanswered(error, key) from error
        except (ResponseParserError, HTTPError) as error:
            # botocore leaves urllib3's errors about a body as they are
            raise self._errors.truncated_response(key) from error
        except RetriesExceededError as error:
            raise self._errors.interrupted_transfer(error.last_exception, key) from error
        except S3DownloadFailedError as error:
            raise StorageError(f"{self._where(key)}: replaced while it was read; run it again") from error
        except (ConnectionError, TimeoutError) as error:
            raise self._errors.lost_connection(error, key) from error
        except ValueError as error:
            # botocore refused an endpoint or an AWS_* value; our own checks raise before this block
            raise self._errors.of_setting(error, key) from error

    def _raise_reason(self, error: ClientError, key: str) -> None:
        """After a failed HEAD, whose response has no body, GET one byte and raise the error that states the reason."""
        if error.operation_name != "HeadObject" or http_status(error) in (404, *GATEWAY_STATUSES):
            return
        with self._translated_errors(key, operation_key=False):
            self._client.get_object(Bucket=self._bucket, Key=self._name(key), Range="bytes=0-0")["Body"].close()

    def _unanswered(self, error: NotS3Error | BotoCoreError, key: str) -> LoraTrainerError:
        """Return the error for a request that no store answered. Remember it if every other request would end the same way."""
        if isinstance(error, NotS3Error):
            translated, is_lasting = self._errors.not_s3(error, key), error.kind != "setting"
        else:
            translated, is_lasting = self._errors.of_client(error, key), True
        if is_lasting and isinstance(translated, ConfigError):
            self._contact.note_no_store(str(translated).removeprefix(f"{self._where(key)}: "))
        return translated

    def _missing(self, key: str) -> LoraTrainerError:
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        full = self._prefix + key
        folder = full[: full.rfind("/") + 1]
        names: Sequence[str] | None = None
        try:
            names = self._names_in(folder)
            other = other_form(full, self._names_in)
        except ClientError as error:
            if error_code(error) == "NoSuchBucket":
                return self._errors.no_bucket()
            if error_code(error) == "NoSuchKey":
                return self._errors.of_response(error, key)
        except NotS3Error as error:
            return self._unanswered(error, key)
        except (BotoCoreError, ResponseParserError):
            # without a listing, the message only lacks suggestions
            pass
        else:
            if other:
                return in_other_form(self._where(key), f"s3://{self._bucket}/{other}")
        return not_found(self._where(key), key, f"s3://{self._bucket}/{folder}", names)

    def _names_in(self, folder: str) -> Sequence[str]:
        """Return up to a thousand names below the full prefix `folder`, those of folders with a slash."""
        page = self._client.list_objects_v2(Bucket=self._bucket, Prefix=folder, Delimiter="/", MaxKeys=1000)
        found = [item["Key"] for item in page.get("Contents", [])] + [item["Prefix"] for item in page.get("CommonPrefixes", [])]
        return [name.removeprefix(folder) for name in found if name != folder]

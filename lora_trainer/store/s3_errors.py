"""Translate the errors of boto3 into this project's, which name the object, the cause and the fix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, cast
from urllib.parse import urlsplit

from lora_trainer.errors import ConfigError, DataError, LoraTrainerError, StorageError
from lora_trainer.redaction import redacted
from lora_trainer.store.retry import TransientError, UnreachableError
from lora_trainer.store.s3_answers import NotS3Error
from lora_trainer.store.s3_network import Cause, cause_of
from lora_trainer.store.s3_refusals import Refusal, explain

if TYPE_CHECKING:
    from botocore.exceptions import BotoCoreError, ClientError

TRANSIENT_CODES: Final = frozenset(
    {
        # throttling, which some stores report with a status other than 503:
        # https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
        *("SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling", "ThrottlingException", "TooManyRequests", "429"),
        *("RequestLimitExceeded", "RequestThrottled", "RequestThrottledException", "BandwidthLimitExceeded", "ServerBusy"),
        # a broken connection or a concurrent writer
        *("RequestTimeout", "RequestTimeoutException", "408", "IncompleteBody", "OperationAborted", "ConditionalRequestConflict"),
        # corrupted in transit and rejected by the store
        *("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"),
        # the upload completed, but the response was lost
        "NoSuchUpload",
    }
)
_EXPIRED_CODES: Final = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})
_REJECTED_CREDENTIALS_CODES: Final = frozenset(
    {
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "InvalidToken",
        "InvalidSecurity",
        "NotSignedUp",
        "AuthorizationHeaderMalformed",
    }
)
_UPLOADS: Final = ("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload")
_CHECKSUM_SIGNS: Final = ("checksum", "x-amz-trailer", "aws-chunked", "streaming-unsigned-payload", "x-amz-content-sha256")
_WRONG_PAIR: Final = "check that AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY belong together and to this endpoint"
_CREDENTIALS_ADVICE: Final = {
    "InvalidAccessKeyId": "it does not know AWS_ACCESS_KEY_ID: check that the key exists and belongs to this endpoint",
    "SignatureDoesNotMatch": f"AWS_SECRET_ACCESS_KEY is not this key's: {_WRONG_PAIR}",
    "InvalidToken": "AWS_SESSION_TOKEN is not this key's; unset it for a permanent key",
}
_ACTIONS: Final = {
    "HeadObject": "s3:GetObject",
    "HeadBucket": "s3:ListBucket",
    "ListObjectsV2": "s3:ListBucket",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
}
"""IAM actions of the requests whose names differ from their action."""


class CorruptedError(TransientError):
    """The bytes received differ from those stored."""

    def __init__(self, problem: str, got: str) -> None:
        """`got` identifies the bytes received, so that two corrupted downloads can be compared."""
        self.got = got
        super().__init__(problem)


class CredentialsRefusedError(TransientError):
    """The store does not accept the credentials."""

    def __init__(self, problem: str, kind: Literal["expired", "wrong"]) -> None:
        self.kind = kind
        super().__init__(problem)


def error_code(error: ClientError) -> str:
    """Return S3's error code, such as `NoSuchKey`, or an empty string."""
    # the code is None if the response has an empty element
    return error.response["Error"].get("Code") or ""


def http_status(error: ClientError) -> int:
    """Return the HTTP status of the response."""
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def refuses_checksums(error: ClientError, *, again: bool) -> bool:
    """Return whether the error may mean that the store does not take checksum headers.

    Google's XML API calls them a wrong signature, Backblaze an unsupported header, others do not implement
    them, or hash the trailer.
    """
    code, message = error_code(error), (error.response["Error"].get("Message") or "").lower()
    if code == "SignatureDoesNotMatch":
        return error.operation_name in _UPLOADS
    if code in TRANSIENT_CODES:
        # bytes that were damaged once are the network's fault, but a store that can't read the trailer says so each time
        return again and code == "XAmzContentSHA256Mismatch"
    return http_status(error) in (400, 403, 501) and any(sign in message for sign in _CHECKSUM_SIGNS)


def is_missing_key(error: ClientError) -> bool:
    """Return whether the store says that the key does not exist."""
    # a listing has no key, so that a store which says so takes it for an object
    return error_code(error) in ("NoSuchKey", "404") and error.operation_name != "ListObjectsV2" and not _is_about_role(error)


@dataclass(frozen=True, slots=True)
class S3Errors:
    """Translates errors about the objects under one prefix of a bucket."""

    bucket: str
    prefix: str
    endpoint: str
    """For messages, without credentials."""
    answered: bool
    """Whether the store has answered as S3 does, in this attempt or an earlier one."""
    encryption: str
    """The requested server-side encryption, `none` included."""

    def uri_of(self, key: str) -> str:
        """Return the URI of the object `key`."""
        return f"s3://{self.bucket}/{self.prefix}{key}"

    def no_bucket(self) -> ConfigError:
        """Return the error for a missing bucket."""
        path = urlsplit(self.endpoint).path.strip("/")
        hint = f"; the endpoint has the path '/{path}', which the store may take for the bucket: remove it" if path else ""
        return ConfigError(
            f"{self.uri_of('')}: no bucket called '{self.bucket}' at {self.endpoint}; check the name, the endpoint "
            f"(AWS_ENDPOINT_URL) and the account (AWS_PROFILE), or create the bucket first{hint}"
        )

    def of_response(self, error: ClientError, key: str) -> LoraTrainerError:
        """Return the error for an error response about `key`. Callers handle `is_missing_key` errors themselves."""
        code, status, where = error_code(error), http_status(error), self.uri_of(key)
        message = redacted(error.response["Error"].get("Message") or "")
        got = f"HTTP {status} {code}" + (f" ({message})" if message and message != code else "")
        is_transient = code in TRANSIENT_CODES or (status >= 500 and status != 501)
        kind = TransientError if is_transient else StorageError
        if _is_about_role(error):
            # transient, because the cluster replaces an expired service-account token
            return (TransientError if code in _EXPIRED_CODES else kind)(
                f"{where}: the role in AWS_ROLE_ARN could not be assumed: {got}; check the role's trust policy "
                "and the service account's annotation"
            )
        if code == "NoSuchBucket":
            return self.no_bucket()
        if code in _EXPIRED_CODES:
            return CredentialsRefusedError(
                f"{where}: the credentials have expired: {got}; renew them (AWS_SESSION_TOKEN, or 'aws sso login'); "
                "a role's credentials renew themselves, so for a role check this machine's clock",
                "expired",
            )
        if explanation := explain(self._refusal_of(error)):
            kind_of = {"config": ConfigError, "storage": StorageError, "data": DataError}[explanation.kind]
            return kind_of(f"{where}: {explanation.cause}: {self.endpoint} answered {got}; {explanation.advice}")
        # R2 calls a key of the wrong length an invalid argument
        if code in _REJECTED_CREDENTIALS_CODES or (status == 400 and "access key" in message.lower()):
            return CredentialsRefusedError(
                f"{where}: {self.endpoint} does not accept the credentials: {got}; {_CREDENTIALS_ADVICE.get(code, _WRONG_PAIR)}",
                "wrong",
            )
        if status == 403:
            return self._no_right(error.operation_name, key, got)
        attempts = error.response["ResponseMetadata"].get("RetryAttempts", 0) + 1
        times = "once" if attempts == 1 else f"{attempts} times"
        advice = "check the store's health, then run it again"
        if status < 500 and not is_transient:
            advice = f"another attempt ends the same way: look up '{code}' in the store's documentation, or ask its operator"
        return kind(f"{where}: {error.operation_name} failed: {self.endpoint} answered {got}, asked {times}; {advice}")

    def _refusal_of(self, error: ClientError) -> Refusal:
        headers = error.response["ResponseMetadata"].get("HTTPHeaders", {})
        described = cast("dict[str, str]", error.response["Error"])
        return Refusal(
            error_code(error),
            http_status(error),
            redacted(described.get("Message") or ""),
            error.operation_name,
            headers,
            described.get("Region") or headers.get("x-amz-bucket-region", ""),
            self.endpoint,
            self.encryption,
        )

    def _no_right(self, operation: str, key: str, got: str) -> StorageError:
        action = _ACTIONS.get(operation, f"s3:{operation}")
        if action == "s3:PutObject" and self.encryption == "none":
            got += "; if the bucket's policy demands encryption, set storage.server_side_encryption"
        hint = {
            "s3:GetObject": "; without s3:ListBucket a missing key is refused the same way, so check its name as well; "
            "a bucket whose requester pays refuses like this, too",
            "s3:ListBucket": "; checkpoints and a base's files are found by listing; only training data can do without",
        }.get(action, "")
        resource = f"arn:aws:s3:::{self.bucket}" + ("" if action == "s3:ListBucket" else f"/{self.prefix}{key}")
        return StorageError(f"{self.uri_of(key)}: {action} refused: {got}; expected it to be allowed on {resource}{hint}")

    def not_encrypted(self, got: str, key: str) -> ConfigError:
        """Return the error for an upload that the store accepted without the encryption that was asked for."""
        return ConfigError(
            f"{self.uri_of(key)}: the store does not know server-side encryption '{self.encryption}': got '{got}' in its answer; "
            "set storage.server_side_encryption=none, or use a store that encrypts"
        )

    def of_client(self, error: BotoCoreError, key: str) -> LoraTrainerError:
        """Return the error for a request about `key` that failed in botocore: settings, credentials, connection, checksum."""
        from botocore import exceptions as raised

        where, message = self.uri_of(key), redacted(str(error))
        match error:
            case raised.NoCredentialsError():
                return StorageError(
                    f"{where}: no AWS credentials found; expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE "
                    "with ~/.aws/credentials, or a role (AWS_ROLE_ARN with AWS_WEB_IDENTITY_TOKEN_FILE, or the instance's)"
                )
            case raised.PartialCredentialsError():
                return ConfigError(f"{where}: half of the AWS credentials is missing: {message}; set both, or neither")
            case (
                raised.CredentialRetrievalError()
                | raised.MetadataRetrievalError()
                | raised.TokenRetrievalError()
                | raised.SSOError()
                | raised.LoginError()
            ):
                return TransientError(
                    f"{where}: the AWS credentials could not be fetched: {message}; renew them, then run it again"
                )
            case raised.ConfigParseError():
                return ConfigError(
                    f"{where}: {message}; expected UTF-8 without a byte order mark, a section such as [default], then lines with "
                    "'name = value'"
                )
            case raised.ProfileNotFound() | raised.ConfigNotFound():
                return ConfigError(f"{where}: {message}; check AWS_PROFILE and ~/.aws/config")
            case raised.FlexibleChecksumError() | raised.ChecksumError():
                # the message contains both checksums
                return CorruptedError(
                    f"{where}: the bytes received do not match the store's checksum: {message}; run it again, and upload the "
                    "object again if the error persists",
                    message,
                )
            case raised.SSLError() | raised.ConnectionError() | raised.HTTPClientError():
                return self._of_cause(cause_of(error), message, key)
            case raised.IncompleteReadError():
                return self._of_cause(Cause("the answer broke off", "check the network and the proxy"), message, key)
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
                return self.of_setting(error, key)
            case _:
                return StorageError(f"{where}: {message}; check the AWS_* variables and the store, then run it again")

    def of_setting(self, error: Exception, key: str) -> ConfigError:
        """Return the error for an endpoint or an AWS setting that botocore refuses."""
        return ConfigError(f"{self.uri_of(key)}: {redacted(str(error))}; check the AWS_* variables and the profile")

    def _of_cause(self, cause: Cause, message: str, key: str) -> LoraTrainerError:
        said = f"{self.uri_of(key)}: {self.endpoint} cannot be reached: {cause.got}: {message}; {cause.advice}"
        if self.answered and cause.is_setting:
            # the settings worked before
            return UnreachableError(said)
        if cause.may_pass:
            return UnreachableError(said, may_be_scheme=cause.may_be_scheme)
        return ConfigError(said) if cause.is_setting else StorageError(said)

    def not_s3(self, error: NotS3Error, key: str) -> LoraTrainerError:
        """Return the error for an answer that is not S3's: a wrong setting, unless the store has answered before."""
        said = f"{self.uri_of(key)}: {self.endpoint} answered {error}"
        may_pass = error.kind == "outage" or (error.kind == "other" and self.answered)
        return UnreachableError(said) if may_pass else ConfigError(said)

    def other_scheme(self, scheme: str, key: str) -> ConfigError:
        """Return the error for a port that speaks `scheme` instead of the endpoint's."""
        url = f"{scheme}://{self.endpoint.partition('://')[2]}"
        return ConfigError(
            f"{self.uri_of(key)}: {self.endpoint} cannot be reached: this port speaks {scheme.upper()}; set AWS_ENDPOINT_URL={url}"
        )

    def truncated_response(self, key: str) -> TransientError:
        """Return the error for a response about `key` that botocore cannot parse."""
        return UnreachableError(
            f"{self.uri_of(key)}: {self.endpoint} sent a truncated or non-S3 response; "
            "check AWS_ENDPOINT_URL and the store's health, then run it again"
        )

    def interrupted_transfer(self, cause: BaseException, key: str) -> TransientError:
        """Return the error for a transfer whose connection was lost in every attempt."""
        return TransientError(
            f"{self.uri_of(key)}: the transfer from {self.endpoint} kept breaking off: {redacted(str(cause))}; "
            "check the network, then run it again"
        )

    def lost_connection(self, error: OSError, key: str) -> TransientError:
        """Return the error for a connection that was lost outside botocore's own retries."""
        return UnreachableError(f"{self.uri_of(key)}: lost the connection to {self.endpoint}: {error}; run it again")


def _is_about_role(error: ClientError) -> bool:
    return error.operation_name.startswith("AssumeRole")

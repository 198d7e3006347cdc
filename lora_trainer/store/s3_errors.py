"""Translate the errors of boto3 into this project's, which name the object, the cause and the fix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from lora_trainer.errors import ConfigError, DataError, LoraTrainerError, StorageError
from lora_trainer.redaction import redacted
from lora_trainer.store.retry import TransientError

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
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidSecurity", "NotSignedUp"}
)
_OTHER_REGION_CODES: Final = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
)
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


def is_missing_key(error: ClientError) -> bool:
    """Return whether the store says that the key does not exist."""
    return error_code(error) in ("NoSuchKey", "404") and not _is_about_role(error)


@dataclass(frozen=True, slots=True)
class S3Errors:
    """Translates errors about the objects under one prefix of a bucket."""

    bucket: str
    prefix: str
    endpoint: str
    """For messages, without credentials."""

    def uri_of(self, key: str) -> str:
        """Return the URI of the object `key`."""
        return f"s3://{self.bucket}/{self.prefix}{key}"

    def no_bucket(self) -> ConfigError:
        """Return the error for a missing bucket."""
        return ConfigError(
            f"{self.uri_of('')}: no bucket called '{self.bucket}' at {self.endpoint}; check the name, the endpoint "
            "(AWS_ENDPOINT_URL) and the account (AWS_PROFILE), or create the bucket first"
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
        if code in _REJECTED_CREDENTIALS_CODES:
            return CredentialsRefusedError(
                f"{where}: {self.endpoint} does not accept the credentials: {got}; check that AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY belong together and to this endpoint",
                "wrong",
            )
        if code == "RequestTimeTooSkewed":
            return StorageError(f"{where}: this machine's clock is wrong: {got}; set it, then run it again")
        if code in _OTHER_REGION_CODES:
            return ConfigError(f"{where}: the bucket is in another region: {got}; set AWS_REGION to the bucket's region")
        if code == "InvalidBucketName":
            return ConfigError(f"{where}: {got}; expected s3://bucket/prefix/ with an existing bucket")
        if code == "InvalidObjectState":
            return DataError(f"{where}: the object is archived: {got}; restore it to a readable storage class first")
        if status == 403:
            return self._refusal(error.operation_name, key, got)
        attempts = error.response["ResponseMetadata"].get("RetryAttempts", 0) + 1
        times = "once" if attempts == 1 else f"{attempts} times"
        return kind(
            f"{where}: {error.operation_name} failed: {self.endpoint} answered {got}, asked {times}; "
            "check the store's health, then run it again"
        )

    def _refusal(self, operation: str, key: str, got: str) -> StorageError:
        action = _ACTIONS.get(operation, f"s3:{operation}")
        hint = {
            "s3:GetObject": "; without s3:ListBucket a missing key is refused the same way, so check its name as well",
            "s3:ListBucket": "; checkpoints and a base's files are found by listing; only training data can do without",
        }.get(action, "")
        resource = f"arn:aws:s3:::{self.bucket}" + ("" if action == "s3:ListBucket" else f"/{self.prefix}{key}")
        return StorageError(f"{self.uri_of(key)}: {action} refused: {got}; expected it to be allowed on {resource}{hint}")

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
            case raised.ProfileNotFound() | raised.ConfigParseError() | raised.ConfigNotFound():
                return ConfigError(f"{where}: {message}; check AWS_PROFILE and ~/.aws/config")
            case raised.FlexibleChecksumError() | raised.ChecksumError():
                # the message contains both checksums
                return CorruptedError(
                    f"{where}: the bytes received do not match the store's checksum: {message}; run it again, and upload the "
                    "object again if the error persists",
                    message,
                )
            case raised.SSLError():
                kind = StorageError if "CERTIFICATE_VERIFY_FAILED" in message else TransientError
                return kind(
                    f"{where}: no trusted TLS connection to {self.endpoint}: {message}; set AWS_CA_BUNDLE to a private CA's file"
                )
            case raised.ConnectionError() | raised.HTTPClientError() | raised.IncompleteReadError():
                return TransientError(
                    f"{where}: {self.endpoint} cannot be reached: {message}; check AWS_ENDPOINT_URL, the network and the proxy"
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
                return self.of_setting(error, key)
            case _:
                return StorageError(f"{where}: {message}; check the AWS_* variables and the store, then run it again")

    def of_setting(self, error: Exception, key: str) -> ConfigError:
        """Return the error for an endpoint or an AWS setting that botocore refuses."""
        return ConfigError(f"{self.uri_of(key)}: {redacted(str(error))}; check the AWS_* variables and the profile")

    def truncated_response(self, key: str) -> TransientError:
        """Return the error for a response about `key` that botocore cannot parse."""
        return TransientError(
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
        return TransientError(f"{self.uri_of(key)}: lost the connection to {self.endpoint}: {error}; run it again")


def _is_about_role(error: ClientError) -> bool:
    return error.operation_name.startswith("AssumeRole")

"""Explain the error codes of S3 and of stores that speak its protocol: the cause and what to do.

A status alone does not tell: 403 is a missing right, a wrong signature, a full quota or a disabled encryption key. The codes are
AWS's (https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html), and those of MinIO, Ceph, B2, R2 and Google's XML API.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, Literal

Kind = Literal["config", "storage", "data"]
"""The error class: `config` if no other attempt helps, `storage` if the store's owner can mend it, `data` for the user's object."""

_WRITES: Final = ("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload")


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error response, as S3 describes it."""

    code: str
    status: int
    message: str
    operation: str
    """Name of the request, such as `PutObject`."""
    headers: Mapping[str, str]
    region: str
    """The bucket's region if the response names it, or an empty string."""
    endpoint: str
    encryption: str
    """The requested server-side encryption, `none` included."""

    @property
    def is_write(self) -> bool:
        """Whether the request was an upload."""
        return self.operation in _WRITES

    def says(self, *words: str) -> bool:
        """Return whether the store's message contains one of the words, which are in lower case."""
        said = self.message.lower()
        return any(word in said for word in words)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What an error response means."""

    kind: Kind
    cause: str
    advice: str


_FULL: Final = Explanation(
    "storage", "the store is full", "free some space there or raise the quota, then run the same command again"
)
_DISABLED: Final = Explanation(
    "storage",
    "the account or the bucket is disabled",
    "ask the store's operator (unpaid bills and blocked accounts end like this); no right or key changes it",
)
_REGION_CODES: Final = (
    *(
        "PermanentRedirect",
        "IllegalLocationConstraintException",
        "301",
        "InvalidRegion",
        "InvalidRegionName",
        "InvalidLocationConstraint",
    ),
    "AuthorizationHeaderMalformed",
)
_BY_CODE: Final = {
    **dict.fromkeys(
        ("QuotaExceeded", "QuotaExceededException", "XMinioAdminBucketQuotaExceeded", "StorageQuotaExceeded", "CapExceeded"),
        Explanation("storage", "a quota of the bucket or the account is used up", _FULL.advice),
    ),
    **dict.fromkeys(("XMinioStorageFull", "InsufficientStorage", "InsufficientCapacity", "DiskFull"), _FULL),
    **dict.fromkeys(
        ("AllAccessDisabled", "AccountProblem", "UserSuspended", "AccountSuspended", "InvalidPayer", "UserDisabled"), _DISABLED
    ),
    "MethodNotAllowed": Explanation(
        "config",
        "the endpoint does not offer this operation: a website endpoint, a console or a read-only gateway",
        "set AWS_ENDPOINT_URL to the store's S3 API",
    ),
    "InvalidBucketName": Explanation(
        "config", "the bucket's name is invalid", "expected s3://bucket/prefix/ with an existing bucket"
    ),
    **dict.fromkeys(
        ("KeyTooLongError", "XMinioInvalidObjectName", "InvalidURI"),
        Explanation("config", "the store does not take this name", "use a shorter prefix, of letters, digits, '-', '_' and '/'"),
    ),
    "InvalidObjectState": Explanation(
        "data", "the object is archived", "restore it to a readable storage class (aws s3api restore-object), then run it again"
    ),
}

# what AWS appends to AccessDenied:
# https://docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot_access-denied.html
_EXPLICIT_DENY: Final = re.compile(r"explicit deny in an? ([\w -]*(?:policy|boundary))", re.IGNORECASE)
_NOT_ALLOWED: Final = re.compile(r"no ((?!identity-based)[\w -]*(?:policy|boundary)) allows", re.IGNORECASE)


def explain(refusal: Refusal) -> Explanation | None:
    """Return what the error response means, or None if its code says no more than its status."""
    if found := _BY_CODE.get(refusal.code):
        return found
    if refusal.status == 507:
        return _FULL
    return (
        _of_clock(refusal)
        or _of_region(refusal)
        or _of_address(refusal)
        or _of_encryption(refusal)
        or _of_protection(refusal)
        or _of_payer(refusal)
        or _of_account(refusal)
        or _of_policy(refusal)
        or _of_feature(refusal)
    )


def _of_clock(refusal: Refusal) -> Explanation | None:
    if refusal.code != "RequestTimeTooSkewed":
        return None
    cause = "this machine's clock is wrong"
    try:
        ahead_s = (datetime.now(UTC) - parsedate_to_datetime(refusal.headers.get("date", ""))).total_seconds()
    except (TypeError, ValueError):
        pass
    else:
        cause += f", {abs(ahead_s):,.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the store's"
    return Explanation("storage", cause, "set it (NTP), then run it again")


def _of_region(refusal: Refusal) -> Explanation | None:
    if refusal.code not in _REGION_CODES or refusal.says("access key", "akid", "credential is mal"):
        return None
    region = refusal.region or "to the bucket's region"
    return Explanation("config", "the bucket is in another region", f"set AWS_REGION{'=' if refusal.region else ' '}{region}")


def _of_address(refusal: Refusal) -> Explanation | None:
    if refusal.says("must be made to api port"):
        return Explanation(
            "config", "this is the port of MinIO's console", "set AWS_ENDPOINT_URL to the API's port, 9000 by default"
        )
    # other errors quote the Authorization header, which names the algorithm as well
    if refusal.code == "InvalidRequest" and refusal.says("aws4-hmac-sha256"):
        return Explanation(
            "config",
            "the store wants signature version 4, and the AWS profile asks for an older one",
            "remove signature_version from the profile's s3 section",
        )
    if refusal.operation == "ListObjectsV2" and refusal.code == "NoSuchKey":
        return Explanation(
            "config",
            f"the store takes a listing for an object, because {refusal.endpoint} already has a bucket in its host or path",
            "expected only scheme, host and port in AWS_ENDPOINT_URL: s3://bucket/prefix/ names the bucket",
        )
    return None


def _of_encryption(refusal: Refusal) -> Explanation | None:
    if refusal.code == "KMSNotConfigured" or refusal.says("kms is not configured", "kms not configured"):
        return Explanation("config", "the store has no key service", "set storage.server_side_encryption to none or AES256")
    if refusal.code.startswith("KMS.") or refusal.says("kms:", "kms key"):
        if refusal.says("kms:generatedatakey", "kms:decrypt") or refusal.code == "KMS.AccessDeniedException":
            return Explanation(
                "storage",
                "access to the encryption key is denied",
                "expected kms:GenerateDataKey and kms:Decrypt on the key that encrypts the bucket (k8s/aws/kms-policy.json)",
            )
        return Explanation(
            "storage",
            "the encryption key can't be used",
            "enable the key or cancel its deletion, or set another one as storage.kms_key_id; it must be in the bucket's region",
        )
    if not refusal.is_write:
        return None
    if refusal.encryption != "none" and refusal.status in (400, 501) and refusal.says("encryption", "x-amz-server-side", "implied"):
        return Explanation(
            "config",
            f"the store does not know server-side encryption '{refusal.encryption}'",
            "set storage.server_side_encryption=none and let the store encrypt by its own default",
        )
    if refusal.code == "AccessDenied" and refusal.encryption == "none" and refusal.says("explicit deny"):
        return Explanation(
            "storage",
            "a policy denies this upload explicitly, most often because it demands server-side encryption",
            "set storage.server_side_encryption to AES256 or aws:kms (with storage.kms_key_id if it demands a key); otherwise "
            "remove the deny from the bucket's policy",
        )
    return None


def _of_protection(refusal: Refusal) -> Explanation | None:
    is_locked = refusal.code == "ObjectLocked" or refusal.says("object lock", "worm", "retention", "legal hold", "immutable")
    if not is_locked:
        return None
    return Explanation(
        "storage",
        "object lock or a retention rule protects the object",
        "the job deletes and overwrites its own objects under runs/, and adapters/*/latest.json: take these out of the rule, or "
        "use a bucket without one",
    )


def _of_payer(refusal: Refusal) -> Explanation | None:
    if not refusal.says("requester pays", "requester-pays", "x-amz-request-payer"):
        return None
    return Explanation(
        "config",
        "the bucket makes the requester pay, which this version does not agree to",
        "copy the files to a bucket of your own (aws s3 cp --request-payer requester)",
    )


def _of_account(refusal: Refusal) -> Explanation | None:
    if refusal.says("cap exceeded", "quota"):
        return Explanation("storage", "a quota of the bucket or the account is used up", _FULL.advice)
    return _DISABLED if refusal.says("billing", "suspended") else None


def _of_policy(refusal: Refusal) -> Explanation | None:
    if denying := _EXPLICIT_DENY.search(refusal.message):
        return Explanation(
            "storage",
            f"an explicit deny in a {denying[1]} refuses it",
            "meet its conditions (network, VPC endpoint, encryption, MFA) or remove it; no permission overrides an explicit deny",
        )
    if lacking := _NOT_ALLOWED.search(refusal.message):
        return Explanation(
            "storage", f"no {lacking[1]} allows it", "allow it there as well; the permissions of the user or role are not enough"
        )
    return None


def _of_feature(refusal: Refusal) -> Explanation | None:
    if refusal.code != "NotImplemented" and refusal.status != 501:
        return None
    return Explanation(
        "storage",
        f"the store does not know {refusal.operation}, or a header of the request",
        "update the store; docs/operations.md lists what the job needs",
    )

"""Check that an answer is S3's before it is believed.

Login pages, consoles, gateways and proxies answer 200 to anything, or 404 with a page of their own. S3 describes every result and
every error in XML, and every object by its ETag.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urlsplit

from lora_trainer.redaction import redacted

if TYPE_CHECKING:
    from botocore.model import OperationModel

_XML_DECLARATION: Final = re.compile(rb"\s*(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*\?>)?\s*")
_ROOT: Final = re.compile(rb"<(?:[\w.-]+:)?([!\w.-]+)")
_TITLE: Final = re.compile(rb"<title[^>]*>([^<]{1,200})", re.IGNORECASE)
_ERROR_ROOTS: Final = ("Error", "ErrorResponse")
_RESULT_ROOTS: Final = {
    "ListObjectsV2": "ListBucketResult",
    "CopyObject": "CopyObjectResult",
    "CreateMultipartUpload": "InitiateMultipartUploadResult",
    "CompleteMultipartUpload": "CompleteMultipartUploadResult",
}
_TAGGED: Final = ("HeadObject", "GetObject", "UploadPart")
"""Operations whose success needs an ETag, which identifies the bytes."""
GATEWAY_STATUSES: Final = (500, 502, 503, 504)
"""Statuses of a server that fails to answer for now."""
_WEB_PAGE_NAMES: Final = (".html", ".htm")
_TLS_PORT: Final = re.compile(rb"HTTP request (?:was sent )?to (?:an )?HTTPS", re.IGNORECASE)
_MAX_SHOWN: Final = 60
_ENDPOINT_ADVICE: Final = (
    "set AWS_ENDPOINT_URL to the store's S3 API (MinIO: port 9000, not the console's 9001), or unset it for AWS"
)


@dataclass
class NotS3Error(Exception):
    """An answer that does not come from the S3 API of the bucket's store."""

    got: str
    """What was answered, as message text."""
    advice: str
    kind: Literal["setting", "other", "outage"] = "other"
    """`setting`: no other attempt helps; `outage`: a gateway can't reach the store, which may pass; `other`: may pass for a store
    that has answered before."""

    def __str__(self) -> str:
        return f"{self.got}; {self.advice}"


Verdict = Literal["s3", "unclear"]


def check_answer(operation: OperationModel, response: Mapping[str, Any], url: str, *, answered: bool) -> Verdict:
    """Return `s3` if the answer proves that it comes from an S3 API, `unclear` if it could come from anything.

    `response` is botocore's dictionary, `url` that of the request. Once the store has `answered`, an outage behind a gateway is
    left to botocore's retries. Raises `NotS3Error` for an answer that S3 never gives.
    """
    status, headers = int(response["status_code"]), response["headers"]
    body = response["body"] if isinstance(response["body"], bytes) else b""
    is_head = operation.http["method"] == "HEAD"
    named_by_store = any(name.lower().startswith("x-amz-") for name in headers)
    if not named_by_store and "x-ms-request-id" in headers:
        # its errors have the same form as S3's
        raise NotS3Error(
            f"HTTP {status} as Azure Blob Storage does, which is no S3 API",
            "copy the files to a store that speaks S3, and set AWS_ENDPOINT_URL to it",
        )
    root = _root(body)
    describes_error = root in _ERROR_ROOTS or (is_head and "xml" in headers.get("Content-Type", ""))
    # S3's ETags are never weak
    is_tagged = bool(headers.get("ETag")) and (named_by_store or not headers["ETag"].startswith("W/"))
    if _is_redirect(status) and "x-amz-bucket-region" not in headers:
        # without that header, botocore would follow its own questions forever
        raise _redirect(status, headers.get("Location", ""), url, is_own=describes_error or named_by_store)
    if not is_head and isinstance(response["body"], bytes) and len(body) < int(headers.get("Content-Length") or 0):
        # truncated, which botocore notices
        return "unclear"
    if status < 300:
        if operation.name in _TAGGED:
            # whoever stores a web page may also give it the type of one
            unexpected_page = _is_page(headers) and not named_by_store and not urlsplit(url).path.lower().endswith(_WEB_PAGE_NAMES)
            if unexpected_page or not is_tagged:
                raise _not_s3(status, headers, body, url, lacking="no ETag")
            return "s3"
        if operation.name == "PutObject" and not is_tagged and not answered:
            raise _not_s3(status, headers, body, url, lacking="no ETag")
        expected = _RESULT_ROOTS.get(operation.name)
        if (expected and root not in (expected, *_ERROR_ROOTS)) or _is_html(root):
            raise _not_s3(status, headers, body, url)
        return "s3" if expected or named_by_store or is_tagged else "unclear"
    if describes_error or named_by_store:
        return "s3"
    if is_head and status not in GATEWAY_STATUSES:
        # the answer to a HEAD has no body; whoever needs its reason asks again with a GET
        return "unclear"
    if status >= 500 and answered:
        return "unclear"
    raise _not_s3(status, headers, body, url)


def _root(body: bytes) -> str | None:
    """Return the name of the root element without its namespace, or None if the body is not XML or HTML."""
    start = _XML_DECLARATION.match(body[:2000])
    found = _ROOT.match(body, start.end() if start else 0)
    return found.group(1).decode("ascii", "replace") if found else None


def _is_redirect(status: int) -> bool:
    return status in (301, 302, 303, 307, 308)


def _is_page(headers: Mapping[str, str]) -> bool:
    return headers.get("Content-Type", "").lower().startswith("text/html")


def _is_html(root: str | None) -> bool:
    return (root or "").lower() in ("html", "!doctype")


def _not_s3(status: int, headers: Mapping[str, str], body: bytes, url: str, *, lacking: str = "an empty body") -> NotS3Error:
    """Return the error for an answer that S3 does not give. `lacking` describes one without a body."""
    advice = _ENDPOINT_ADVICE
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        return NotS3Error(
            f"HTTP {status}: a proxy demands a login",
            "put user and password in HTTPS_PROXY or HTTP_PROXY, or the store's host in NO_PROXY",
            "setting",
        )
    if _TLS_PORT.search(body[:2000]):
        return NotS3Error(f"HTTP {status}: this port speaks HTTPS", f"set AWS_ENDPOINT_URL=https://{urlsplit(url).netloc}")
    got = f"HTTP {status} with {_described(headers, body, lacking)}"
    if status >= 400 and headers.get("Content-Type", "").startswith("text/plain") and body:
        # a gateway's own words, such as "error code: 1016"
        got += f" ('{_printable(body[:200].decode('utf-8', 'replace'))}')"
    if status >= 500:
        return NotS3Error(
            f"{got}, where S3 answers XML: a gateway or a proxy that can't reach a store",
            f"check the store behind it, or {advice}",
            "outage",
        )
    if status == HTTPStatus.FORBIDDEN:
        advice = f"ask who runs the proxy or firewall between this machine and the store, or {advice}"
    return NotS3Error(f"{got}: it is no S3 API but a console, a login page, a gateway or a proxy", advice)


def _redirect(status: int, location: str, url: str, *, is_own: bool) -> NotS3Error:
    target = redacted(_printable(location.partition("?")[0])) or "nowhere"
    here, there = urlsplit(url), urlsplit(location)
    if (here.scheme, there.scheme, here.hostname) == ("http", "https", there.hostname):
        return NotS3Error(f"HTTP {status}: a redirect to HTTPS", f"set AWS_ENDPOINT_URL=https://{there.netloc}", "setting")
    if is_own:
        return NotS3Error(
            f"HTTP {status}: the bucket is in another region or at another address, {target}",
            "set AWS_REGION to the bucket's region, or AWS_ENDPOINT_URL to the address; a new bucket needs some minutes",
            "setting",
        )
    return NotS3Error(
        f"HTTP {status}: a redirect to {target}: a login page, a proxy, or a store that has moved",
        _ENDPOINT_ADVICE,
    )


def _described(headers: Mapping[str, str], body: bytes, lacking: str) -> str:
    root = _root(body)
    if _is_page(headers) or _is_html(root):
        title = _TITLE.search(body[:10_000])
        shown = _printable(title.group(1).decode("utf-8", "replace").strip()) if title else ""
        return f"an HTML page ('{shown}')" if shown else "an HTML page"
    if headers.get("Content-Type", "").lower().startswith("application/json"):
        return "JSON"
    if root is not None:
        return f"XML of another kind (<{root}>)"
    if not body:
        return lacking
    return f"{len(body)} bytes that are no XML"


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable())[:_MAX_SHOWN]

"""Validate keys, and split URIs into folder and key."""

from __future__ import annotations

from urllib.parse import unquote

from lora_trainer.errors import ConfigError
from lora_trainer.redaction import has_user_info, redacted


def safe_key(key: str) -> str:
    """Return `key` if it stays inside its folder and means the same on a disk and in S3.

    Use it for keys from outside, such as those of a manifest. Raises `ValueError` for an empty or absolute key, for
    empty, `.` or `..` segments, backslashes, control characters and invalid Unicode.
    """
    problem = unsafe_reason(key)
    if problem:
        raise ValueError(f"unsafe key {key!r}: {problem}; expected a relative path such as 'runs/A/manifest.json'")
    return key


def unsafe_reason(key: str) -> str | None:
    """Return the reason why `key` is unsafe, or None for a safe key."""
    if not key:
        return "it is empty"
    if key.startswith("/"):
        return "it is absolute"
    if "\\" in key or any(ord(character) < 32 or ord(character) == 127 for character in key):
        return "it has a backslash or a control character"
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            return f"it has the segment '{segment}'"
    try:
        key.encode("utf-8")
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    return None


def checked_prefix(prefix: str) -> str:
    """Return `prefix` if it is safe to list. Raises `ValueError` unless it is empty or ends in `/`."""
    if prefix and not prefix.endswith("/"):
        raise ValueError(f"prefix {prefix!r} must be empty or end in '/': 'A' would also match 'AB/'")
    if prefix:
        safe_key(prefix.removesuffix("/"))
    return prefix


def split_uri(uri: str) -> tuple[str, str]:
    """Split the URI of an object, such as `s3://bucket/prefix/train.jsonl`, into the folder's URI and the key.

    Raises `ConfigError` for the URI of a folder or a bucket, and for one that contains credentials.
    """
    refuse_credentials(uri)
    scheme, separator, rest = uri.rpartition("://")
    folder, slash, key = rest.rpartition("/")
    if not key or (separator and not slash):
        raise ConfigError(f"{uri}: names no object; expected one such as s3://bucket/prefix/name.jsonl")
    if scheme == "file":
        key = unquote(key)
    try:
        safe_key(key)
    except ValueError as error:
        raise ConfigError(f"{uri}: {error}") from None
    return f"{scheme}{separator}{folder}{slash}" or "./", key


def refuse_credentials(uri: str) -> None:
    """Raise `ConfigError` for a URI with a user or a password, which manifests and logs would record."""
    if has_user_info(uri):
        raise ConfigError(
            f"{redacted(uri)}: got a user or a password in a URI, expected none: manifests and logs record URIs; "
            "put credentials in environment variables (AWS_*, OPENAI_API_KEY) or a profile"
        )

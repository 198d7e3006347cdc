"""Keys and URIs: which names are safe, and how a URI splits into a folder and a key."""

from __future__ import annotations

from urllib.parse import unquote

from lora_trainer.errors import ConfigError
from lora_trainer.redaction import has_user_info, redacted


def refuse_credentials(uri: str) -> None:
    """Raise `ConfigError` for a URI with a user or a password in it: it would be written into manifests and logs."""
    if has_user_info(uri):
        raise ConfigError(
            f"{redacted(uri)}: got a user or a password in a URI, expected none: manifests and logs name URIs; "
            "credentials belong into variables of their own (AWS_*, OPENAI_API_KEY) or into a profile"
        )


def split_uri(uri: str) -> tuple[str, str]:
    """(URI of the folder, key) of a URI that names one object, such as `s3://bucket/prefix/train.jsonl`.

    Raises `ConfigError` when it names a folder or a bucket, or holds credentials.
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


def safe_key(key: str) -> str:
    """`key` itself, when it stays inside a folder and means the same on a disk and in S3.

    For keys that come from outside, such as a manifest. Raises `ValueError` for an empty or absolute key, for
    empty, `.` or `..` segments, backslashes, control characters and text that is not valid Unicode.
    """
    problem = unsafe_reason(key)
    if problem:
        raise ValueError(f"unsafe key {key!r}: {problem}; expected a relative path such as 'runs/A/manifest.json'")
    return key


def unsafe_reason(key: str) -> str | None:
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
    if prefix and not prefix.endswith("/"):
        raise ValueError(f"prefix {prefix!r} must be empty or end in '/': 'A' would also match 'AB/'")
    if prefix:
        safe_key(prefix.removesuffix("/"))
    return prefix

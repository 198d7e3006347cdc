"""Validate keys, and split URIs into folder and key."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from lora_trainer.errors import ConfigError
from lora_trainer.uris import expand_home, parse_uri, shown


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

    Raises `ConfigError` for the URI of a folder or a bucket, and for one that is mistyped or contains credentials.
    """
    try:
        parse_uri(uri)
    except ValueError as error:
        raise ConfigError(f"{shown(uri)}: {error}") from None
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


def local_file(uri: str) -> Path | None:
    """Return the local path that `uri` is, with `~` expanded, or None for an `s3://` or `file://` URI.

    Raises `ConfigError` for a URI that is mistyped or contains credentials.
    """
    try:
        parsed = parse_uri(uri)
        return None if parsed.scheme else expand_home(parsed.path)
    except ValueError as error:
        raise ConfigError(f"{shown(uri)}: {error}") from None

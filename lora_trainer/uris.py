"""Parse every URI and path that a user gives, and refuse a mistyped one before it becomes a local folder.

A relative path whose first part contains a colon is a URI (RFC 3986, section 4.2): a folder of such a name is written `./a:b`.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from lora_trainer.redaction import has_user_info, redacted

EXPECTED: Final = "expected s3://bucket/prefix/, file:///folder/ or a folder"
_SHOWN_CHARACTERS: Final = 200

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL)
_EXPLICIT_PATH: Final = re.compile(r"\.{0,2}/(?!/)")
"""Begins with `/`, `./` or `../`: a path, whatever else it contains."""
_JOINED_URI: Final = re.compile(r"/(?:.*/)?((?:s3|gs|https?|file):/.*)", re.IGNORECASE | re.DOTALL)
"""What `os.path.abspath` and shells make of a URI: `/job/s3:/bucket/prefix`. A folder of that name is written `./s3:/…`."""
_OTHER_NAMES_OF_S3: Final = ("s3", "s3a", "s3n", "s3fs", "aws")
_GOOGLE: Final = ("gs", "gcs")
_OTHER_STORES: Final = (
    *("az", "abfs", "abfss", "adl", "wasb", "wasbs", "hdfs", "dbfs"),
    *("oss", "cos", "obs", "swift", "r2", "minio", "b2"),
)
_HUB: Final = ("hf", "huggingface")
_WEB: Final = ("http", "https")
_KNOWN: Final = (*_OTHER_NAMES_OF_S3, *_GOOGLE, *_OTHER_STORES, *_HUB, *_WEB, "file", "ftp", "sftp", "ssh")
_AZURE: Final = re.compile(r"(?:abfs|wasb)s?://[^:/@]*@[^:@]*$", re.IGNORECASE)
"""`container@account` is no user."""
_LOST_COLON: Final = re.compile(rf"({'|'.join(_KNOWN)})\W?(?://|\\\\)(.*)", re.IGNORECASE | re.DOTALL)

_AWS_HOST: Final = re.compile(r"(?:(?P<bucket>.+)\.)?s3[a-z0-9.-]*\.amazonaws\.com(?:\.cn)?", re.IGNORECASE)
_GOOGLE_HOST: Final = re.compile(r"(?:(?P<bucket>.+)\.)?storage\.(?:googleapis|cloud\.google)\.com", re.IGNORECASE)
_STORE_HOST: Final = re.compile(
    r".+\.(?:r2\.cloudflarestorage\.com|digitaloceanspaces\.com|backblazeb2\.com|wasabisys\.com|aliyuncs\.com|myqcloud\.com"
    r"|ncloudstorage\.com|core\.windows\.net)",
    re.IGNORECASE,
)
_ENDPOINT: Final = re.compile(r"(?:localhost|[\w.-]+:\d{2,5}|\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?)", re.IGNORECASE)
_HOST_AND_PORT: Final = re.compile(r"(?:[A-Za-z][\w.-]*|\d{1,3}(?:\.\d{1,3}){3}):\d{2,5}")
_AWS_BUCKET: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]|\.(?!\.)){1,61}[a-z0-9]")
_ANY_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
"""Other stores and old buckets of us-east-1 also have upper case, underscores and longer names."""

# Characters that nobody types on purpose: invisible ones and controls of the writing direction. U+200C and U+200D are part of
# words and of emoji.
_INVISIBLE: Final = frozenset("\u00ad\u180e\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff")
_QUOTES: Final = "\"'`\u2018\u2019\u201c\u201d\u300c\u300d\uff02\uff07"
_PLACEHOLDER: Final = re.compile(
    r"[$#]\{\w*\}?|\$\(\w*\)?|\$[A-Za-z_]\w*|\{\{[^{}]*\}?\}?|%\([A-Za-z_]\w*\)s|%[A-Za-z_]\w{2,}%|<[^<>/]+>|__[A-Z][A-Z_]+__"
    r"|`[^`]*`|%Y"
)
_PLACEHOLDER_IN_S3: Final = re.compile(r"\{[A-Za-z_][\w.]*\}|\[[A-Za-z][\w -]*\]")
_PLACEHOLDER_AS_FOLDER: Final = re.compile(r"(?<![^/])\{[A-Za-z_][\w.]*\}(?![^/])")
_NOTHING: Final = frozenset({"none", "null", "nil", "undefined", "nan", "<nil>"})
_IS_PLACEHOLDER: Final = "looks like a placeholder that nothing replaced; write its value"
_BAD_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_USER_INFO_OF_A_MISTYPED_URI: Final = re.compile(r"^(\W*\w+:[/\\]*)[^\s/]*:\S*@")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)


# The same rules for JSON Schema, whose expressions have no lookahead in Helm. They leave AWS's bucket names out.
SCHEMA_ACCEPTS: Final = r"^(s3://[A-Za-z0-9][A-Za-z0-9._-]+(/[^/]+)*/?|file:///.*)$"
SCHEMA_REFUSES: Final = "|".join((
    _PLACEHOLDER.pattern,
    f"[{''.join(sorted(_INVISIBLE))}\u0001-\u001f\u007f-\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]",
    r"/ | /|^ | $",
    r"^s3://.*[?#*\\]|^s3://.*[\"',;]$|^s3://.*\{[A-Za-z_][A-Za-z0-9_.]*\}|^s3://.*\[[A-Za-z]|/\.\.?(/|$)",
    r"^s3://(.*/)?([Nn]one|null|nil|undefined|nan|NaN)(/|$)",
    r"^s3://[^/]*\.amazonaws\.com|^s3://[^/]*storage\.googleapis\.com|^s3://[0-9]+(\.[0-9]+){3}(/|$)|^s3://localhost(/|$)",
    r"^file:///(~|[A-Za-z]:)|^file:///.*\\|^file:///.*%([^0-9A-Fa-f]|[0-9A-Fa-f]([^0-9A-Fa-f]|$)|$)",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class ParsedUri:
    """The parts of a URI or a path."""

    scheme: Literal["s3", "file", ""]
    """Empty for a path."""
    bucket: str
    """Empty unless the scheme is `s3`."""
    path: str
    """Key or prefix without a leading slash; the decoded absolute path of a `file://` URI; or the path as given."""


def parse_uri(text: str) -> ParsedUri:
    """Parse `s3://bucket/prefix/`, `file:///folder/` or a local path, which may begin with `~`.

    Raises `ValueError` that names the right spelling for anything that looks like another URI, a mistyped one or a placeholder.
    The message contains no credentials. Bucket names follow AWS's rules unless `AWS_ENDPOINT_URL` names another store.
    """
    for problem in _problems_of_text(text):
        raise ValueError(problem)
    if (joined := _JOINED_URI.fullmatch(text)) and (spelled := _spelled(joined[1])):
        raise ValueError(spelled)
    if _EXPLICIT_PATH.match(text) or text in (".", ".."):
        return ParsedUri("", "", text)
    if text.startswith("s3://"):
        return _parse_s3(text.removeprefix("s3://"))
    if text.startswith("file://"):
        return _parse_file(text.removeprefix("file://"))
    for problem in _problems_of_relative_path(text):
        raise ValueError(problem)
    return ParsedUri("", "", text)


def local_path(text: str) -> Path:
    """Return the path on this machine that `text` names, with `~` expanded. Raise `ValueError` for another URI."""
    parsed = parse_uri(text)
    if parsed.scheme == "s3":
        raise ValueError("expected a path on this machine, not s3://")
    return Path(parsed.path) if parsed.scheme else expand_home(parsed.path)


def expand_home(path: str | Path) -> Path:
    """Return `path` with a leading `~` or `~user` replaced. Raise `ValueError` if there is no such home folder."""
    # a Path has lost the ./ of ./~
    if not str(path).startswith("~"):
        return Path.cwd() / path if str(path).startswith("./~") else Path(path)
    tilde = Path(path).parts[0]
    # expanduser would turn ~/x into /x if HOME is empty
    if tilde == "~" and not Path(os.environ.get("HOME", "/")).is_absolute():
        raise ValueError(_no_home(tilde))
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(_no_home(tilde)) from None


def _no_home(tilde: str) -> str:
    who = "this user has no home folder" if tilde == "~" else "that user has no home folder"
    named = "" if tilde == "~" else f", or ./{tilde} for a folder of that name"
    return f"'{tilde}' names no folder here, because {who}; write the whole path, such as /folder/{named}"


def check_base_model(text: str) -> None:
    """Raise `ValueError` unless `text` is a hub id, a folder that begins with `/`, `./`, `../` or `~`, or a URI."""
    if _HUB_ID.fullmatch(text) and text.lower() not in _NOTHING:
        return
    if hub_id := _hub_id_in(text):
        raise ValueError(f"a hub id has no scheme; did you mean {hub_id}?")
    check_location(text)
    if "://" not in text and not _EXPLICIT_PATH.match(text) and not text.startswith("~"):
        said = "expected a hub id such as Qwen/Qwen2.5-7B-Instruct, s3://bucket/prefix/, or a folder that begins with / or ./"
        if not re.search(r"[:@]", text):
            said += f"; did you mean ./{shown(text)}?"
        raise ValueError(said)


def check_location(text: str) -> None:
    """Raise `ValueError` unless `text` is a URI or a path that this program reads, and its `~` names a folder."""
    parsed = parse_uri(text)
    if not parsed.scheme:
        if not text.strip("/"):
            raise ValueError(f"{EXPECTED}, not the root folder")
        expand_home(parsed.path)


def check_server_url(text: str) -> None:
    """Raise `ValueError` unless `text` is the http:// or https:// URL of a server."""
    for problem in _problems_of_text(text):
        raise ValueError(problem)
    if not re.match(r"https?://[^/\s]", text):
        raise ValueError("expected a URL such as https://api.openai.com/v1, which matches the pattern '^https?://'")


def shown(text: str) -> str:
    """Return `text` for a message: without credentials and without the query of a URL, which may hold a signature."""
    text = redacted(text)
    text = _USER_INFO_OF_A_MISTYPED_URI.sub(r"\1…@", text)
    text = re.sub(r"\?[\w.%-]+=.*", "?…", text, flags=re.DOTALL)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _problems_of_text(text: str) -> Iterator[str]:
    """Yield what is wrong with `text` as a name, whatever it names."""
    if not text.strip():
        yield EXPECTED
        return
    if (has_user_info(text) or _USER_INFO_OF_A_MISTYPED_URI.match(text)) and not _AZURE.match(text):
        yield (
            "got a user or a password in a URI, expected none: manifests and logs record URIs; "
            "put credentials in environment variables (AWS_*, OPENAI_API_KEY) or a profile"
        )
    for where, character in (("begins", text[0]), ("ends", text[-1])):
        if character.isspace():
            yield f"{where} with white space ({_named(character)}); remove it"
    if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in text):
        yield "expected a name without control characters"
    if invisible := next((character for character in text if character in _INVISIBLE), None):
        yield f"contains the invisible character {_named(invisible)}; type the name again"
    try:
        # Python decodes invalid UTF-8 in arguments to surrogates, which fsencode accepts; other surrogates fail
        os.fsencode(text)
    except UnicodeEncodeError:
        yield "expected a name that can be written as UTF-8"
    if placeholder := _PLACEHOLDER.search(text):
        yield f"'{shown(placeholder[0])}' {_IS_PLACEHOLDER}"
    if text.lower() in _NOTHING:
        yield f"'{text}' looks like a missing value; {EXPECTED}"


def _problems_of_relative_path(text: str) -> Iterator[str]:
    """Yield why `text`, which has neither a known scheme nor a leading slash, is not taken as a local path."""
    plain = unicodedata.normalize("NFKC", text).replace("\u2215", "/").replace("\u2044", "/")
    if text[0] in _QUOTES or text[-1] in _QUOTES:
        yield f"the quotes are part of the value; remove them{_did_you_mean(text.strip(_QUOTES))}"
    if plain != text and _spelled(plain) is not None:
        yield f"contains full-width characters{_did_you_mean(plain)}"
    if placeholder := _PLACEHOLDER_AS_FOLDER.search(text):
        yield f"'{placeholder[0]}' {_IS_PLACEHOLDER}"
    spelled = _spelled(text)
    if spelled is not None:
        yield spelled
    if text.startswith("-"):
        yield f"looks like an option; {EXPECTED}, or write ./{shown(text)} for a folder of that name"
    if "\\" in text:
        yield f"contains a backslash; separate folders with /, or write ./ in front of a name that has one; {EXPECTED}"
    if "*" in text:
        yield f"patterns are not expanded; {EXPECTED}"


def _spelled(text: str) -> str | None:
    """Return the message for a text that looks like a URI, None for a path."""
    if text.startswith("//"):
        rest = text.lstrip("/")
        return f"the scheme is missing; did you mean s3://{shown(rest)} or /{shown(rest)}?"
    host = text.partition("/")[0].partition("?")[0]
    if any(pattern.fullmatch(host) for pattern in (_AWS_HOST, _GOOGLE_HOST, _STORE_HOST)):
        return _of_web_address(f"https://{text}")
    if _HOST_AND_PORT.fullmatch(host):
        return (
            f"looks like the address of a store; write s3://{shown(_tidy(text.partition('/')[2])) or 'bucket/'} and set "
            f"AWS_ENDPOINT_URL=http://{host}, or write ./{shown(text)} for a folder of that name"
        )
    if lost := _LOST_COLON.fullmatch(text):
        return _of_scheme(lost[1].lower(), lost[2])
    if "://" in text:
        scheme, _, rest = text.partition("://")
        return _of_scheme(re.sub(r"[^A-Za-z0-9+.-]", "", scheme).lower(), rest, as_given=scheme)
    # `s3;/x` and `s3 :/x`
    if match := re.fullmatch(rf"({'|'.join(_KNOWN)})\s*[:;]+(.*)", text, re.IGNORECASE | re.DOTALL):
        return _of_scheme(match[1].lower(), match[2])
    if match := _SCHEME.fullmatch(text.partition("/")[0]):
        if match[1].lower() == "arn":
            return _of_arn(text)
        if len(match[1]) == 1:
            return f"a Windows path; expected a path of this machine, such as /mnt/{match[1].lower()}/folder/"
        return f"looks like a URI; {EXPECTED}, or write ./{shown(text)} for a folder of that name"
    return None


def _of_scheme(scheme: str, rest: str, as_given: str | None = None) -> str:
    """Return the message for a text whose scheme is `scheme`, and which continues with `rest`."""
    bare = re.sub(r"^[:/\\\s|]+", "", rest).replace("\\", "/").rstrip(f">{_QUOTES}")
    if scheme in _OTHER_NAMES_OF_S3:
        return f"a mistyped URI{_did_you_mean('s3://' + _tidy(bare))}"
    if scheme == "file":
        return f"a mistyped URI{_did_you_mean('file:///' + bare)}"
    if scheme in _WEB:
        return _of_web_address(f"{scheme}://{bare}")
    said = f"unknown scheme '{shown(as_given if as_given is not None else scheme)}://'; expected s3://bucket/prefix/ or file:///folder/"
    if scheme in _GOOGLE:
        return (
            f"{said}; Google Cloud Storage speaks S3: write s3://{shown(bare)} and set "
            "AWS_ENDPOINT_URL=https://storage.googleapis.com with an HMAC key"
        )
    if scheme in _OTHER_STORES:
        return f"{said}; copy the files to a store that speaks S3, and set AWS_ENDPOINT_URL if it is not AWS"
    if scheme in _HUB:
        return f"{said}; the hub is read for base.model alone, by its id such as Qwen/Qwen2.5-7B-Instruct"
    if difflib.get_close_matches(scheme, ("s3", "s3a"), cutoff=0.5):
        return f"{said}{_did_you_mean('s3://' + _tidy(bare), '')}"
    if difflib.get_close_matches(scheme, ("file",), cutoff=0.6):
        return f"{said}{_did_you_mean('file:///' + bare, '')}"
    return said


def _of_web_address(url: str) -> str:
    """Return the message for `url`, with the s3:// spelling of a store's or a console's address. Never quote its query."""
    said = f"unknown scheme '{url.partition(':')[0]}://'; {EXPECTED}"
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return said
    path = unquote(parts.path).lstrip("/")
    if host.endswith("console.aws.amazon.com") and (match := re.match(r"s3/(?:buckets|object)/([^/]+)", path)):
        prefix = "".join(parse_qs(parts.query).get("prefix", [""])[:1])
        return f"an address of the AWS console{_did_you_mean(f's3://{match[1]}/{prefix}')}"
    if match := re.match(r"(?:browser|buckets)/([^/]+)", path):
        return f"an address of a store's console{_did_you_mean(f's3://{match[1]}/')}"
    for name, pattern in (("S3", _AWS_HOST), ("Google Cloud Storage", _GOOGLE_HOST)):
        if match := pattern.fullmatch(host):
            bucket = f"{match['bucket']}/" if match["bucket"] else ""
            endpoint = "" if name == "S3" else " with AWS_ENDPOINT_URL=https://storage.googleapis.com and an HMAC key"
            return f"an address of {name} on the web{_did_you_mean(f's3://{_tidy(bucket + path)}', setting=endpoint)}"
    if path and not host.endswith(("huggingface.co", "github.com", "githubusercontent.com")):
        return f"{said}; for a store of that address, write s3://{shown(_tidy(path))} and set AWS_ENDPOINT_URL={parts.scheme}://{parts.netloc}"
    return said


def _of_arn(text: str) -> str:
    resource = text.rpartition(":::")[2]
    if text.startswith("arn:") and ":s3:::" in text and resource:
        return f"an ARN, which only policies use{_did_you_mean('s3://' + resource.rstrip('*'))}"
    return f"an ARN; {EXPECTED}"


def _parse_s3(rest: str) -> ParsedUri:
    bucket, _, path = rest.partition("/")
    if not rest.strip("/"):
        raise ValueError(f"{EXPECTED}; the bucket is missing")
    if "://" in rest:
        raise ValueError("got two URIs in one; expected s3://bucket/prefix/")
    if not bucket or "\\" in rest:
        raise ValueError(f"not a bucket and a prefix{_did_you_mean('s3://' + _tidy(rest))}")
    if any(character.isspace() and character != " " for character in rest) or re.search(r"(?:^|/) | (?:/|$)", rest):
        raise ValueError("contains white space that is not part of a name; expected s3://bucket/prefix/")
    if mark := re.search(r"[?#*]", rest):
        if mark[0] == "*":
            raise ValueError("patterns are not expanded; expected s3://bucket/prefix/")
        raise ValueError(f"an s3:// URI has neither a query nor a fragment{_did_you_mean('s3://' + rest[: mark.start()])}")
    if rest[0] in _QUOTES or rest[-1] in f"{_QUOTES},;":
        raise ValueError(f"begins or ends with {_named(rest[-1])}{_did_you_mean('s3://' + rest.strip(_QUOTES + ',;'))}")
    if placeholder := _PLACEHOLDER_IN_S3.search(rest):
        raise ValueError(f"'{placeholder[0]}' {_IS_PLACEHOLDER}")
    if missing := next((part for part in rest.split("/") if part.lower() in _NOTHING), None):
        raise ValueError(f"'{missing}' looks like a missing value; {EXPECTED}")
    _check_bucket(bucket, path)
    if "//" in path or path.startswith("/"):
        raise ValueError(f"expected a prefix without empty parts{_did_you_mean('s3://' + _tidy(rest))}")
    if any(part in (".", "..") for part in path.split("/")):
        raise ValueError("cannot use a prefix with the part '.' or '..'; expected s3://bucket/prefix/")
    return ParsedUri("s3", bucket, path)


def _check_bucket(bucket: str, path: str) -> None:
    """Raise `ValueError` if the store cannot have a bucket of this name."""
    if _AWS_HOST.fullmatch(bucket) or _GOOGLE_HOST.fullmatch(bucket):
        raise ValueError(_of_web_address(f"https://{bucket}/{path}"))
    if _ENDPOINT.fullmatch(bucket):
        raise ValueError(
            f"got the endpoint {bucket} in the place of the bucket"
            + _did_you_mean("s3://" + _tidy(path), setting=f" with AWS_ENDPOINT_URL=http://{bucket}")
        )
    if not _ANY_BUCKET.fullmatch(bucket):
        raise ValueError(f"got '{shown(bucket)}' as the bucket; expected s3://bucket/prefix/")
    other_store = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not other_store and not _AWS_BUCKET.fullmatch(bucket):
        raise ValueError(
            f"got '{shown(bucket)}' as the bucket; expected 3 to 63 lower-case letters, digits, dots and hyphens, as S3 demands "
            "(for a store that allows other names, set AWS_ENDPOINT_URL)"
        )


def _parse_file(rest: str) -> ParsedUri:
    host, slash, path = rest.partition("/")
    if host.startswith("~") or path.startswith("~"):
        raise ValueError(f"a URI has no '~'; expected file:/// and an absolute path, or {shown(rest.lstrip('/'))} without file://")
    if not slash or host not in ("", "localhost"):
        raise ValueError(
            f"got the host '{shown(host)}'; expected file:/// with three slashes and an absolute path; did you mean file:///{shown(rest)}?"
        )
    if re.match(r"[A-Za-z]:(?:/|$)", path) or "\\" in path:
        raise ValueError("a Windows path; expected file:/// and an absolute path of this machine, with /")
    if _BAD_ESCAPE.search(path):
        raise ValueError("'%' begins an escape such as %20 in a file:// URI; write %25 for the character itself")
    try:
        path = unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("the escapes of this file:// URI are not UTF-8; write the name itself") from None
    if any(ord(character) < 32 or ord(character) == 127 for character in path):
        raise ValueError("expected a name without control characters")
    return ParsedUri("file", "", f"/{path}")


def _hub_id_in(text: str) -> str | None:
    """Return the hub id in `hf://org/name` or `https://huggingface.co/org/name`, None if there is none."""
    match = re.fullmatch(
        r"(?:hf:/*|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)(?:models/)?([\w.-]+/[\w.-]+)(?:[/?#].*)?",
        text,
        re.IGNORECASE,
    )
    return match[1] if match and match[1].partition("/")[0] not in ("datasets", "spaces") else None


def _tidy(rest: str) -> str:
    """Return bucket and prefix without empty parts."""
    return re.sub(r"/{2,}", "/", rest.replace("\\", "/")).lstrip("/").partition("?")[0].partition("#")[0]


def _did_you_mean(uri: str, otherwise: str = f"; {EXPECTED}", *, setting: str = "") -> str:
    """Return `; did you mean <uri><setting>?`, or `otherwise` if `uri` is not valid either."""
    try:
        parse_uri(uri)
    except ValueError:
        return otherwise
    return f"; did you mean {shown(uri)}{setting}?"


def _named(character: str) -> str:
    return f"U+{ord(character):04X} {unicodedata.name(character, 'a control character')}"

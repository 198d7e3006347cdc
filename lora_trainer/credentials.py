"""Find credentials in the environment and in the libraries' own files, and check their shape before anything uses them.

A credential with a line break, a quotation mark or an invisible character fails in many places: an HTTP library refuses the
header, or the server answers that it does not know the key. Messages name the variable or file and the fault, never the value.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum, Flag, auto
from pathlib import Path
from typing import Final

from lora_trainer.errors import ConfigError

_MAX_FILE_BYTES: Final = 2**20
_SECTION: Final = re.compile(r"\s*\[\s*(?:profile\s+)?(.*?)\s*\]")
_LINE_BREAKS: Final = "\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_QUOTES: Final = "\"'`"


class Service(Enum):
    """A service that takes credentials."""

    S3 = "S3"
    HUB = "the model hub"
    OPENAI = "the judge or the teacher"
    MLFLOW = "MLflow"
    WANDB = "Weights & Biases"


class _Allowed(Flag):
    """What a value may contain besides printable ASCII without spaces."""

    NOTHING = 0
    SPACES = auto()
    """Single spaces inside, as in a password or the name of a profile."""
    UNICODE = auto()
    """Visible characters beyond ASCII, as in the name of a file."""


_TOKEN, _PASSWORD, _NAME = _Allowed.NOTHING, _Allowed.SPACES, _Allowed.SPACES | _Allowed.UNICODE

_VARIABLES: Final[Mapping[Service, Mapping[str, _Allowed]]] = {
    Service.S3: {
        **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN"), _TOKEN),
        **dict.fromkeys(("AWS_CONTAINER_AUTHORIZATION_TOKEN", "AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME"), _TOKEN),
        **dict.fromkeys(("AWS_REGION", "AWS_DEFAULT_REGION"), _TOKEN),
        **dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL_STS"), _TOKEN),
        **dict.fromkeys(("AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "AWS_CA_BUNDLE"), _NAME),
        **dict.fromkeys(("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"), _NAME),
    },
    Service.HUB: {"HF_TOKEN": _TOKEN, "HUGGING_FACE_HUB_TOKEN": _TOKEN, "HF_ENDPOINT": _TOKEN},
    Service.OPENAI: {"OPENAI_API_KEY": _TOKEN, "OPENAI_BASE_URL": _TOKEN, "OPENAI_ORG_ID": _TOKEN, "OPENAI_PROJECT_ID": _TOKEN},
    Service.MLFLOW: {
        "MLFLOW_TRACKING_TOKEN": _TOKEN,
        "MLFLOW_TRACKING_URI": _NAME,
        "MLFLOW_TRACKING_USERNAME": _PASSWORD,
        "MLFLOW_TRACKING_PASSWORD": _PASSWORD,
    },
    Service.WANDB: {"WANDB_API_KEY": _TOKEN, "WANDB_BASE_URL": _TOKEN, "WANDB_ENTITY": _TOKEN},
}
_PROFILE_KEYS: Final = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
_SECRET_SETTING: Final = re.compile(r"(?:key|key_id|token|secret|password)$", re.IGNORECASE)


def check(services: Iterable[Service], environment: Mapping[str, str] | None = None) -> None:
    """Raise `ConfigError` for every malformed credential of `services`. Empty variables count as not set."""
    environment = os.environ if environment is None else environment
    problems: list[str] = []
    for service in dict.fromkeys(services):
        for name, allowed in _VARIABLES[service].items():
            if fault := _fault(environment.get(name, ""), allowed):
                problems.append(f"{name}: {fault}; used for {service.value}")
        if service is Service.S3:
            problems += _aws_file_problems(environment)
    if problems:
        raise ConfigError(problems)


def _aws_file_problems(environment: Mapping[str, str]) -> Iterator[str]:
    """Check the credentials that botocore would take from files, in its order: web identity, then the profile."""
    if environment.get("AWS_ACCESS_KEY_ID"):
        return
    for variable in ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"):
        if (named := environment.get(variable)) and (fault := _fault(_text(Path(named)), _PASSWORD)):
            yield f"{variable}: {named}: {fault}"
    profile = environment.get("AWS_PROFILE") or environment.get("AWS_DEFAULT_PROFILE") or "default"
    for path in _aws_files(environment):
        for section, name, value in _settings(_text(path)):
            if section == profile and name in _PROFILE_KEYS and (fault := _fault(value, _TOKEN)):
                yield f"{path}: [{section}] {name}: {fault}"


def _fault(value: str, allowed: _Allowed) -> str:
    """Return what is wrong with the shape of `value` and what to do, or an empty string."""
    if not value:
        return ""
    if not value.strip():
        return "contains only white space; expected a value, or leave it out"
    if value.endswith(tuple(_LINE_BREAKS)):
        return (
            "ends in a line break; expected a value without one "
            "(a Secret made with 'echo … | base64' keeps it: use 'printf %s …', 'echo -n' or 'kubectl create secret')"
        )
    for where, at in (("begins with", value[0]), ("ends in", value[-1])):
        if at.isspace():
            return f"{where} white space; expected a value without it: remove it"
    if value[0] == value[-1] and value[0] in _QUOTES:
        return "stands in quotation marks; expected the bare value ('docker --env-file' and Kubernetes keep the marks): remove them"
    for character in value:
        if said := _unusual(character, allowed):
            return f"contains {said}; expected printable ASCII: copy the value again, as plain text"
    return ""


def _unusual(character: str, allowed: _Allowed) -> str:
    if character in _LINE_BREAKS:
        return "a line break"
    if character == " " and _Allowed.SPACES in allowed:
        return ""
    if character.isspace():
        return "white space"
    category = unicodedata.category(character)
    if category == "Cs":
        # Python decodes bytes that are not UTF-8 to surrogates
        return "" if _Allowed.UNICODE in allowed else "bytes that are not UTF-8"
    if category == "Cc":
        return "a control character"
    if category == "Cf":
        return f"an invisible character ({_named(character)})"
    if character.isascii() or _Allowed.UNICODE in allowed:
        return ""
    return f"a character that is not ASCII ({_named(character)})"


def _named(character: str) -> str:
    return f"U+{ord(character):04X} {unicodedata.name(character, '')}".rstrip()


# --- files -----------------------------------------------------------------------------------------------------------


def credential_files(environment: Mapping[str, str]) -> list[Path]:
    """Return the files from which the libraries take credentials. Most of them do not exist."""
    home = environment.get("HOME") or os.path.expanduser("~")  # noqa: PTH111  pathlib raises where there is no home
    hub = environment.get("HF_HOME") or f"{environment.get('XDG_CACHE_HOME') or f'{home}/.cache'}/huggingface"
    names = [
        environment.get("AWS_WEB_IDENTITY_TOKEN_FILE"),
        environment.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"),
        environment.get("HF_TOKEN_PATH") or f"{hub}/token",
        environment.get("HF_STORED_TOKENS_PATH") or f"{hub}/stored_tokens",
        environment.get("NETRC") or f"{home}/.netrc",
        f"{home}/.mlflow/credentials",
    ]
    return [*_aws_files(environment), *(Path(name) for name in names if name)]


def in_files(paths: Iterable[Path]) -> Iterator[str]:
    """Yield every credential in `paths`, for all profiles, machines and accounts. Skip what cannot be read."""
    for path in paths:
        text = _text(path)
        if path.name.endswith("netrc"):
            yield from re.findall(r"\bpassword\s+(\S+)", text)
        elif text.lstrip().startswith(("[", "#", ";")):
            yield from (value for _, name, value in _settings(text) if _SECRET_SETTING.search(name))
        else:
            # a file that holds a token and nothing else
            yield text


def _aws_files(environment: Mapping[str, str]) -> list[Path]:
    named = (("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), ("AWS_CONFIG_FILE", "~/.aws/config"))
    return [Path(os.path.expanduser(environment.get(variable) or default)) for variable, default in named]  # noqa: PTH111


def _text(path: Path) -> str:
    """Return the text of a regular file, or an empty string: the library that needs the file reports why it cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return ""
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES).decode("utf-8", "surrogateescape")
    except (OSError, ValueError):
        return ""


def _settings(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield (section, name, value) of an INI file. Unlike configparser, read a damaged file as far as possible."""
    section = None
    for line in text.split("\n"):
        if found := _SECTION.match(line):
            section = found[1]
        elif section is not None and "=" in line and not line.lstrip().startswith(("#", ";")):
            name, _, value = line.partition("=")
            yield section, name.strip().lower(), value.strip()

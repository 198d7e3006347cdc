"""Check that redaction finds a credential in every form in which a library or a server may print it."""

from __future__ import annotations

import base64
import html
import json
import logging
import re
import shlex
import string
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_trainer import logs, redaction
from lora_trainer.redaction import redacted, remember, remember_user_info


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch, aws_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(redaction, "_remembered", set())
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME", "NETRC"):
        monkeypatch.delenv(name, raising=False)


EXAMPLE = "FwoGZXIvYXdzEXAMPLETOKENxyz0123456789abcdef"
AWKWARD = 'quote"slash/back+slash&42'
Form = Callable[[str], str]


def base64_of(encode: Callable[[bytes], bytes], before: str = "", after: str = "", padded: bool = True) -> Form:
    def form(secret: str) -> str:
        encoded = encode((before + secret + after).encode()).decode()
        return encoded if padded else encoded.rstrip("=")

    return form


FORMS: dict[str, Form] = {
    "raw": str,
    "repr": repr,
    "repr of bytes": lambda secret: repr(secret.encode()),
    "JSON": json.dumps,
    "JSON, not ASCII": lambda secret: json.dumps(secret, ensure_ascii=False),
    "JSON in JSON": lambda secret: json.dumps(json.dumps(secret)),
    "JSON, slashes escaped": lambda secret: json.dumps(secret).replace("/", r"\/"),
    "JSON as Go writes it": lambda secret: (
        json.dumps(secret).replace("/", r"\u002F").replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003E")
    ),
    "URL": quote,
    "URL, slashes too": lambda secret: quote(secret, safe=""),
    "URL, twice": lambda secret: quote(quote(secret, safe=""), safe=""),
    "URL, lower case": lambda secret: re.sub("%..", lambda found: found[0].lower(), quote(secret, safe="")),
    "form": quote_plus,
    "every byte percent-encoded": lambda secret: "".join(f"%{byte:02X}" for byte in secret.encode()),
    "every byte as \\x": lambda secret: "".join(f"\\x{byte:02x}" for byte in secret.encode()),
    "hex": lambda secret: secret.encode().hex(),
    "HTML": html.escape,
    "HTML by numbers": lambda secret: "".join(f"&#{ord(character)};" for character in secret),
    "XML in JSON": lambda secret: json.dumps(html.escape(secret)),
    "shell": shlex.quote,
    "shell, backslashes": lambda secret: re.sub(r"([^\w])", r"\\\1", secret, flags=re.ASCII),
    "base64": base64_of(base64.b64encode),
    "base64, URL-safe": base64_of(base64.urlsafe_b64encode),
    "base64, bare": base64_of(base64.urlsafe_b64encode, padded=False),
    "basic authentication": base64_of(base64.b64encode, before="user:"),
    "basic authentication, other alignment": base64_of(base64.b64encode, before="users:"),
    "base64 of a Kubernetes Secret": base64_of(base64.b64encode, before="u:", after="\n"),
    "base64 in a URL": lambda secret: quote(base64.b64encode(secret.encode()).decode(), safe=""),
}

# what AWS, OpenAI, Hugging Face and people put in credentials, also what should not be there
ENDS = string.ascii_letters + string.digits
SECRETS = st.builds(
    lambda first, middle, last: f"{first}{middle}{last}",
    st.sampled_from(ENDS),
    st.text(string.ascii_letters + string.digits + string.punctuation + " ", min_size=10, max_size=60),
    st.sampled_from(ENDS),
).filter(lambda secret: "\\" not in secret and len(set(secret)) > 6)


def still_readable(secret: str, text: str) -> bool:
    """Return whether `text` holds the secret, or most of it, in any of the forms."""
    pieces = [secret[:8], secret[-8:], secret[len(secret) // 2 - 4 : len(secret) // 2 + 4]]
    whole = [form(secret).strip("'\"b=") for form in FORMS.values()]
    return any(piece in text for piece in pieces) or any(found in text for found in whole)


@settings(max_examples=40, deadline=None)
@given(secret=SECRETS)
def test_no_form_of_a_credential_remains(secret: str) -> None:
    redaction._remembered.clear()
    remember(secret)
    for name, form in FORMS.items():
        shown = redacted(f"before [{form(secret)}] after")
        assert not still_readable(secret, shown), (name, shown)
        assert shown.startswith("before "), (name, shown)
        assert shown.endswith(" after"), (name, shown)


@pytest.mark.parametrize("edge", ["\n", "\r\n", " ", "\t", '"', "'", "\u200b", "\u201c", "\x00"])
def test_what_stands_at_its_ends_hides_nothing(monkeypatch: pytest.MonkeyPatch, edge: str) -> None:
    secret = EXAMPLE
    monkeypatch.setenv("AWS_SESSION_TOKEN", (edge + secret + edge).replace("\x00", "\x01"))
    for form in FORMS.values():
        for printed in (form(edge + secret + edge), form(secret)):
            assert not still_readable(secret, redacted(f"Invalid header value {printed}")), printed


@pytest.mark.parametrize(
    "odd", ["sk-“quoted”-0123456789", "ｓｋ－full-width-0123456789", "비밀번호-열쇠-0123456789", "sk-a\u200bzero-width-012"]
)
def test_a_credential_that_is_not_ascii(odd: str) -> None:
    remember(odd)
    for name, form in FORMS.items():
        if name not in ("HTML by numbers", "shell, backslashes"):
            assert "0123456" not in redacted(form(odd)) or "0123456" not in form(odd), name
    assert redacted(f"x {odd.encode().decode('latin-1')} y") == "x … y"
    assert redacted("x " + odd.encode("ascii", "replace").decode() + " y") == "x … y"


def test_the_lines_of_a_credential_one_at_a_time() -> None:
    remember("-----BEGIN KEY-----\nfirstLineOfTheKey/01\r\n  secondLineOfTheKey+02\n")
    assert redacted("got firstLineOfTheKey/01 and secondLineOfTheKey%2B02") == "got … and …"


FILES = {
    ".aws/credentials": "[default]\naws_access_key_id = not-the-one\naws_secret_access_key = {}\n",
    ".aws/config": "[profile other]\nregion = eu\naws_session_token={}\n",
    ".cache/huggingface/token": "{}\n",
    ".cache/huggingface/stored_tokens": "[mine]\nhf_token = {}\n",
    ".netrc": "machine api.wandb.ai\n  login user\n  password {}\n",
    ".mlflow/credentials": "[mlflow]\nmlflow_tracking_username = someone\nmlflow_tracking_password = {}\n",
    "web-identity": "{}",
    "container": "{}\n",
}


@pytest.mark.parametrize("name", FILES)
def test_credentials_in_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    for variable in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "web-identity"))
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "container"))
    path, first, second = tmp_path / name, "first/secret-of-a-file", "second/secret-of-a-file"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FILES[name].format(first))
    assert redacted(f"{first} {quote_plus(first)} [default]") == "… … [default]"
    # a mounted token is replaced while the process runs, and the former one is still valid
    path.write_text(FILES[name].format(second) + "\n")
    assert redacted(f"{first} {second}") == "… …"


def test_passwords_of_uris(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:pass%2Fword-of-the-proxy@proxy:3128")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://token-as-the-user@tracker/")
    remember_user_info("--data", "s3://AKIA:Password/of/an-argument@bucket/")
    assert redacted("pass/word-of-the-proxy, token-as-the-user, Password\\/of\\/an-argument") == "…, …, …"


def test_a_log_line_stays_json_and_holds_no_credential(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    secret = AWKWARD
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = root.handlers[:]
    try:
        logs.configure("info", "json")
        # neither the path, nor the exception, nor the keys are strings that the log could redact one by one
        logs.get_logger().error("failed", path=Path(f"/x/{secret}"), error=ValueError(secret), told={secret: secret, "n": [secret]})
        logging.getLogger("library").warning("told %r", {"authorization": f"Bearer {secret}", "raw": secret.encode()})
    finally:
        logging.captureWarnings(capture=False)
        root.handlers[:] = handlers
        root.setLevel(level)
    lines = capsys.readouterr().err.splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["failed", "library_message"]
    assert not any(part in line for part in ("quote", "back") for line in lines), lines
    path = tmp_path / "termination-log"
    path.touch()
    logs.last_word({"exit_code": 6, "where": Path(secret), "problems": [json.dumps(secret)]}, path)
    assert json.loads(path.read_bytes())["exit_code"] == 6
    assert "back" not in path.read_text()


def test_the_time_that_redaction_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        monkeypatch.setenv(
            f"SERVICE_{number}_TOKEN", base64.b64encode(bytes(range(number, 200)) * (1 + 8 * (number == 0))).decode()
        )
    redacted("compile the pattern")
    line = json.dumps({"event": "training_step", "step": 10, "loss": 1.2, "text": "가나다 라마바사 / + % \\ & " * 10})
    started_s = time.thread_time()
    for _ in range(200):
        redacted(line)
    # a millisecond on a free core
    assert (time.thread_time() - started_s) / 200 < 0.1

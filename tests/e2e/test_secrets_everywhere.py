"""Plant credentials in every source, and let servers repeat them in every form to every command. None appears anywhere."""

from __future__ import annotations

import base64
import html
import json
import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
import structlog
from conftest import REPOSITORY
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from entrypoint.cli import run_cli
from lora_trainer import logs, redaction

pytestmark = pytest.mark.e2e
BASE = str(REPOSITORY / "examples" / "tiny-base")
RUN = ("--blood-type", "A", "--device", "cpu", "--base-model", BASE)
ADAPTER = "s3://team/out/adapters/A/0123456789abcdef/"
COMMANDS = {
    "run": ["run", *RUN, "--data", "s3://team/data/"],
    "check-storage": ["check-storage", *RUN, "--data", "s3://team/data/", "--output", "s3://team/out/"],
    "validate": ["validate", "--no-tokens", "s3://team/train_data_type_A.jsonl"],
    "convert": ["convert", "s3://team/train_data_type_A.csv"],
    "generate": ["generate", "--count", "1", "--blood-type", "A", "--against", "s3://team/train_data_type_A.jsonl"],
    "generate, teacher": [
        "generate", "--count", "1", "--blood-type", "A", "--engine", "teacher",
        "--model", "x", "--base-url", "URL/v1", "--retries", "0",
    ],
    "evaluate": ["evaluate", "--adapter", ADAPTER],
    "chat": ["chat", "--adapter", ADAPTER],
    "promote": ["promote", ADAPTER],
    "compare": ["compare", ADAPTER, ADAPTER],
    "publish": ["publish", "s3://user:PASSWORD@team/out/"],
    "show-config": ["show-config", "--output", "s3://user:PASSWORD@team/out/"],
}  # fmt: skip
# S3 and its proxies, Python, Go, JavaScript and HTML pages each write a value in their own way
CHARACTERS = "abcdefghkmnpqrstuvwxyzABCDEFGHKLMNPQRSTUVWXYZ23456789/+=-_"
SECRETS = st.text(CHARACTERS, min_size=30, max_size=60).map(lambda text: f"k{text}7").filter(lambda text: len(set(text)) > 15)


def forms(secret: str) -> list[str]:
    encoded = secret.encode()
    return [
        secret, repr(secret + "\n"), repr(encoded), json.dumps(secret).replace("/", r"\/"), secret.replace("/", r"\u002f"),
        quote(secret), quote_plus(secret), quote(quote(secret, safe=""), safe=""),
        re.sub("%..", lambda found: found[0].lower(), quote(secret, safe="")), html.escape(secret),
        base64.b64encode(encoded).decode(), base64.urlsafe_b64encode(encoded).decode().rstrip("="), encoded.hex(),
        base64.b64encode(b"user:" + encoded).decode(), base64.b64encode(encoded + b"\n").decode(),
    ]  # fmt: skip


class Echo(BaseHTTPRequestHandler):
    """Refuses every request and repeats all that it knows."""

    secrets: tuple[str, ...] = ()
    status = 403

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def handle_one(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        told = " | ".join([str(self.headers), *(form for secret in self.secrets for form in forms(secret))])
        if "/v1" in self.path:
            body, kind = json.dumps({"error": {"message": told, "code": told}}), "application/json"
        else:
            body, kind = f"<Error><Code>AccessDenied</Code><Message>{html.escape(told)}</Message></Error>", "application/xml"
        self.send_response(self.status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body.encode())))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    listener = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listener.server_port}"
    listener.shutdown()
    listener.server_close()


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch, aws_environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(redaction, "_remembered", set())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "termination-log").touch()
    monkeypatch.setattr(logs.last_word, "__defaults__", (tmp_path / "termination-log",))
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = root.handlers[:]
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


@settings(max_examples=2, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(planted=st.tuples(SECRETS, SECRETS, SECRETS, SECRETS), in_file=st.booleans())
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_repeats_a_credential(
    command: str,
    planted: tuple[str, str, str, str],
    in_file: bool,
    server_url: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    secret, token, key, password = planted
    keys = tmp_path / "keys"
    keys.write_text(
        f"[default]\naws_access_key_id = AKIAPLANTED0123456789\naws_secret_access_key = {secret}\naws_session_token = {token}\n"
    )
    (tmp_path / ".netrc").write_text(f"machine team login me password {password}\n")
    Echo.secrets = (secret, token, key, password)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server_url)
        patch.setenv("OPENAI_API_KEY", key)
        if in_file:
            patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
        else:
            patch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTED0123456789")
            patch.setenv("AWS_SECRET_ACCESS_KEY", secret)
            patch.setenv("AWS_SESSION_TOKEN", token)
        arguments = [part.replace("URL", server_url).replace("PASSWORD", password) for part in COMMANDS[command]]
        code = run_cli(arguments)
    out, err = capfd.readouterr()
    assert code in (2, 3, 6), err
    written = {"out": out, "err": err}
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name not in ("keys", ".netrc"):
            written[path.name] = path.read_bytes().decode("utf-8", "replace")
    found = [
        (place, form)
        for place, text in written.items()
        for planted_one in (*planted, "AKIAPLANTED0123456789")
        for form in (*forms(planted_one), planted_one[:12], planted_one[-12:])
        if form.strip("'=") in text
    ]
    assert found == []

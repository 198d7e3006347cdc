"""Check that output never repeats credentials, neither known ones nor those in places where they do not belong."""

from __future__ import annotations

import hashlib
import logging
from typing import Literal

import pytest
import structlog

from entrypoint.cli import run_cli
from lora_trainer import logs, redaction
from lora_trainer.config_sources import settle
from lora_trainer.errors import ConfigError
from lora_trainer.redaction import has_user_info, redacted, redacted_value, remember
from lora_trainer.store.keys import split_uri
from lora_trainer.store.opening import open_storage

# has slashes like AWS's keys, and does not parse as a port after a colon
SECRET = "/".join(f"k{hashlib.sha256(part).hexdigest()[:13]}" for part in (b"one", b"two", b"three"))


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch, aws_environment: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_remembered", set())


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:password@host:9000/path", "http://…@host:9000/path"),
        ("http://user@host", "http://…@host"),
        ("http://user:pass@word@host/x", "http://…@host/x"),
        (f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@bucket/prefix/", "s3://…@bucket/prefix/"),
        ("(http://user:password@host)", "(http://…@host)"),
        ("s3://bucket/prefix/", "s3://bucket/prefix/"),
        ("s3://bucket/user@example.com/data.jsonl", "s3://bucket/user@example.com/data.jsonl"),
        ("http://127.0.0.1:9000/user@example.com", "http://127.0.0.1:9000/user@example.com"),
        ("file:///home/user@example.com/", "file:///home/user@example.com/"),
        ("user@example.com and http://host", "user@example.com and http://host"),
        ("arn:aws:iam::1:user/AKIAIOSFODNN7EXAMPLE", "arn:aws:iam::1:user/…"),
    ],
)
def test_what_looks_like_a_credential(uri: str, shown: str) -> None:
    assert redacted(uri) == shown
    assert has_user_info(uri) is ("@" in shown and "…" in shown)


@pytest.mark.parametrize(
    "variable", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "OPENAI_API_KEY", "MLFLOW_TRACKING_PASSWORD"]
)
def test_what_a_variable_holds(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, SECRET)
    assert redacted(f"Bearer {SECRET}, twice: {SECRET}") == "Bearer …, twice: …"
    monkeypatch.setenv(variable, "test")
    assert redacted("a test is a test") == "a test is a test"


def test_a_path_to_a_token_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/token")
    assert redacted("cannot read /var/run/secrets/token") == "cannot read /var/run/secrets/token"


def test_the_password_of_an_endpoint_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:opensesame1@host:9000")
    assert redacted("wrong password opensesame1") == "wrong password …"


def test_what_was_remembered_wherever_it_stands() -> None:
    remember("of-a-profile", None, "")
    assert redacted_value({"a": ["x of-a-profile", 1, ("of-a-profile",)]}) == {"a": ["x …", 1, ("…",)]}


@pytest.mark.parametrize(
    "setting", ["data", "output", "base.model", "evaluation.prompts", "evaluation.judge_base_url"]
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_setting_with_a_password_is_refused_without_showing_it(setting: str, scheme: str) -> None:
    with pytest.raises(ConfigError) as refused:
        settle({"blood_type": "A", setting: f"{scheme}://user:{SECRET}@bucket/x"}, {})
    # the check that the judge's URL is http comes first
    said = "pattern" if (scheme, setting) == ("s3", "evaluation.judge_base_url") else "a user or a password in a URI, expected none"
    assert said in str(refused.value)
    assert setting in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("uri", [f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@bucket/x.jsonl", f"ftp://user:{SECRET}@host/x.jsonl"])
def test_so_is_an_argument(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    for call in (open_storage, split_uri):
        with pytest.raises(ConfigError, match="got a user or a password in a URI, expected none") as refused:
            call(uri)
        assert SECRET not in str(refused.value)
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = root.handlers[:]
    try:
        for arguments in (
            ["promote", uri],
            ["chat", "--adapter", uri],
            ["evaluate", "--adapter", uri],
            ["compare", uri, uri],
            ["validate", "--no-tokens", uri],
            ["generate", "--count", "1", "--output", uri],
            ["generate", "--engine", "teacher", "--model", "x", "--base-url", uri],
            # Click quotes an extra argument
            ["run", uri],
            ["show-config", "--set", f"aws.secret={SECRET}"],
        ):
            assert run_cli(arguments) == 2, arguments
            out, err = capsys.readouterr()
            assert err
            assert SECRET not in out + err, arguments
    finally:
        logging.captureWarnings(capture=False)
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.contextvars.clear_contextvars()
        structlog.reset_defaults()


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_librarys_exception_is_its_kind_alone(capsys: pytest.CaptureFixture[str], log_format: Literal["json", "console"]) -> None:
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = root.handlers[:]
    try:
        logs.configure("info", log_format)
        record = "아무도보면안되는말"
        try:
            raise KeyError(record)
        except KeyError:
            logging.getLogger("some_library").exception("could not read it", stack_info=True)
        err = capsys.readouterr().err
        assert "could not read it" in err
        assert "KeyError" in err
        assert record not in err
        assert "Traceback" not in err
    finally:
        logging.captureWarnings(capture=False)
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()

"""Check that a malformed credential ends a command at once with exit code 2 and a message that does not repeat it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from conftest import REPOSITORY

from entrypoint.cli import run_cli
from lora_trainer.credentials import Service, check
from lora_trainer.errors import ConfigError

VALUE = "FwoGZXIvYXdzEXAMPLETOKENxyz0123456789abcdef"
FAULTS = {
    VALUE + "\n": "ends in a line break",
    VALUE + "\r\n": "ends in a line break",
    VALUE + " ": "ends in white space",
    "\t" + VALUE: "begins with white space",
    VALUE[:9] + " " + VALUE[9:]: "contains white space",
    VALUE[:9] + "\n" + VALUE[9:]: "contains a line break",
    VALUE[:9] + "\x1b" + VALUE[9:]: "contains a control character",
    VALUE[:9] + "\x7f" + VALUE[9:]: "contains a control character",
    VALUE + "\u200b": "an invisible character (U+200B ZERO WIDTH SPACE)",
    "\ufeff" + VALUE: "an invisible character (U+FEFF ZERO WIDTH NO-BREAK SPACE)",
    f"“{VALUE}”": "a character that is not ASCII (U+201C LEFT DOUBLE QUOTATION MARK)",
    VALUE.replace("F", "Ｆ"): "a character that is not ASCII (U+FF26 FULLWIDTH LATIN CAPITAL LETTER F)",
    VALUE + "\udcc4": "bytes that are not UTF-8",
    f'"{VALUE}"': "stands in quotation marks",
    f"'{VALUE}'": "stands in quotation marks",
    "  ": "only white space",
}


@pytest.mark.parametrize("value", FAULTS, ids=range(len(FAULTS)))
@pytest.mark.parametrize(
    ("service", "variable"),
    [
        (Service.S3, "AWS_ACCESS_KEY_ID"),
        (Service.S3, "AWS_SECRET_ACCESS_KEY"),
        (Service.S3, "AWS_SESSION_TOKEN"),
        (Service.S3, "AWS_REGION"),
        (Service.S3, "AWS_ENDPOINT_URL_S3"),
        (Service.HUB, "HF_TOKEN"),
        (Service.OPENAI, "OPENAI_API_KEY"),
        (Service.MLFLOW, "MLFLOW_TRACKING_TOKEN"),
        (Service.WANDB, "WANDB_API_KEY"),
    ],
)
def test_each_fault_of_each_variable(service: Service, variable: str, value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check([service], {variable: value, "AWS_SHARED_CREDENTIALS_FILE": "/nowhere", "AWS_CONFIG_FILE": "/nowhere"})
    (problem,) = refused.value.problems
    assert problem.startswith(f"{variable}: ")
    assert FAULTS[value] in problem
    assert VALUE[:6] not in problem
    # other services do not use it
    check([other for other in Service if other is not service and other is not Service.S3], {variable: value})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_SESSION_TOKEN", ""),
        ("AWS_PROFILE", "my profile"),
        ("AWS_PROFILE", "회사"),
        ("AWS_CA_BUNDLE", "/home/누구/my certificates.pem"),
        ("AWS_SECRET_ACCESS_KEY", 'a/"+=;:!~quote'),
        ("MLFLOW_TRACKING_PASSWORD", "correct horse battery"),
        ("MLFLOW_TRACKING_URI", "sqlite:////home/me/my runs/mlflow.db"),
    ],
)
def test_what_is_allowed(variable: str, value: str) -> None:
    check(Service, {variable: value, "AWS_SHARED_CREDENTIALS_FILE": "/nowhere", "AWS_CONFIG_FILE": "/nowhere"})


def test_files(tmp_path: Path) -> None:
    keys = tmp_path / "credentials"
    keys.write_text(
        f'[default]\naws_access_key_id = "{VALUE}"\naws_secret_access_key={VALUE} {VALUE}\n'
        f"[work]\naws_session_token = {VALUE}\u200b\n",
        encoding="utf-8",
    )
    token = tmp_path / "token"
    token.write_text(VALUE + "\n")
    files = {"AWS_SHARED_CREDENTIALS_FILE": str(keys), "AWS_CONFIG_FILE": "/nowhere"}

    def problems(**more: str) -> list[str]:
        with pytest.raises(ConfigError) as refused:
            check([Service.S3], files | more)
        assert VALUE[:6] not in str(refused.value)
        return [problem.partition("; ")[0] for problem in refused.value.problems]

    assert problems() == [
        f"{keys}: [default] aws_access_key_id: stands in quotation marks",
        f"{keys}: [default] aws_secret_access_key: contains white space",
    ]
    assert problems(AWS_PROFILE="work") == [
        f"{keys}: [work] aws_session_token: contains an invisible character (U+200B ZERO WIDTH SPACE)"
    ]
    assert problems(AWS_PROFILE="none", AWS_WEB_IDENTITY_TOKEN_FILE=str(token)) == [
        f"AWS_WEB_IDENTITY_TOKEN_FILE: {token}: ends in a line break"
    ]
    # botocore takes the keys of the environment first, and does not open the files
    check([Service.S3], files | {"AWS_ACCESS_KEY_ID": "dev", "AWS_SECRET_ACCESS_KEY": "dev"})


DATA, BASE = str(REPOSITORY / "data"), str(REPOSITORY / "examples" / "tiny-base")
RUN = ("--blood-type", "A", "--device", "cpu", "--base-model", BASE)
S3_COMMANDS = {
    "run": ["run", *RUN, "--data", "s3://team/data"],
    "run, output": ["run", *RUN, "--data", DATA, "--output", "s3://team/out"],
    "check-storage": ["check-storage", *RUN, "--data", "s3://team/data"],
    "validate": ["validate", "--no-tokens", "s3://team/train_data_type_A.jsonl"],
    "validate, base": ["validate", "--base-model", "s3://team/base/", f"{DATA}/train_data_type_A.jsonl"],
    "generate": ["generate", "--count", "1", "--output", "s3://team/data/"],
    "evaluate": ["evaluate", "--adapter", "s3://team/out/adapters/A/1/"],
    "chat": ["chat", "--adapter", "s3://team/out/adapters/A/1/"],
    "promote": ["promote", "s3://team/out/adapters/A/1/"],
    "compare": ["compare", "s3://team/out/adapters/A/1/", "s3://team/out/adapters/A/2/"],
}


@pytest.fixture
def in_a_folder(monkeypatch: pytest.MonkeyPatch, aws_environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    # nothing answers there: a command that tries would need longer than the test
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://192.0.2.1:9")
    monkeypatch.setenv("LORA_TRAINER_STORAGE__OBJECT_BUDGET_S", "120")
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = root.handlers[:]
    yield tmp_path
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


@pytest.mark.parametrize("command", S3_COMMANDS)
def test_every_command_that_uses_the_store(
    command: str, monkeypatch: pytest.MonkeyPatch, in_a_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "dev\n")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "“dev”")
    monkeypatch.setenv("AWS_SESSION_TOKEN", VALUE + "\n")
    started_s = time.monotonic()
    assert run_cli(S3_COMMANDS[command]) == 2
    assert time.monotonic() - started_s < 15
    said = "".join(capfd.readouterr())
    for problem in ("AWS_ACCESS_KEY_ID: ends in a line break", "AWS_SECRET_ACCESS_KEY: contains", "AWS_SESSION_TOKEN: ends in"):
        assert problem in said
    assert VALUE not in said
    assert not list(in_a_folder.rglob("lease.json"))


@pytest.mark.parametrize(
    ("arguments", "variable"),
    [
        (["run", *RUN, "--data", DATA, "--set", "evaluation.judge_model=x"], "OPENAI_API_KEY"),
        (["run", *RUN, "--data", DATA, "--report-to", "wandb"], "WANDB_API_KEY"),
        (["run", *RUN, "--data", DATA, "--report-to", "mlflow"], "MLFLOW_TRACKING_PASSWORD"),
        (["run", *RUN[:4], "--data", DATA, "--base-model", "Qwen/Qwen2.5-0.5B-Instruct"], "HF_TOKEN"),
        (["generate", "--engine", "teacher", "--model", "x"], "OPENAI_API_KEY"),
        (["validate", f"{DATA}/train_data_type_A.jsonl"], "HF_TOKEN"),
    ],
)
def test_the_other_services(
    arguments: list[str], variable: str, monkeypatch: pytest.MonkeyPatch, in_a_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, VALUE + "\n")
    assert run_cli(arguments) == 2
    said = "".join(capfd.readouterr())
    assert f"{variable}: ends in a line break" in said
    assert VALUE not in said


def test_a_variable_that_a_command_does_not_use(
    monkeypatch: pytest.MonkeyPatch, in_a_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for variable in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(variable, VALUE + "\n")
    assert run_cli(["check-storage", *RUN, "--data", DATA, "--output", str(in_a_folder / "out")]) == 0
    assert run_cli(["show-config", "--output", "s3://team/out"]) == 0
    assert VALUE not in "".join(capfd.readouterr())

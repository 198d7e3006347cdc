"""Check that facts stated in several places agree."""

from __future__ import annotations

import re

from click.testing import CliRunner

from entrypoint.cli import cli
from lora_trainer import errors
from lora_trainer.errors import ExitCode, Interrupted, LoraTrainerError

# a retry may help after 1, 6 and 143, but never after 2, 3, 4, 5 and 7
RETRIED = {ExitCode.BUG, ExitCode.STORAGE, ExitCode.INTERRUPTED}


def codes_in_help() -> dict[int, tuple[str, str]]:
    """Return code -> (meaning, whether a retry may help) from `lora-trainer --help`."""
    text = CliRunner().invoke(cli, ["--help"]).output
    table = text[text.index("Exit codes:") :].split("Options:")[0]
    rows = re.findall(r"^\s+(\d+)\s+(.+?)(?:\s{2,}(may be retried|must not be retried))?$", table, re.MULTILINE)
    return {int(code): (meaning, retry) for code, meaning, retry in rows}


def test_the_help_has_every_exit_code_and_no_other() -> None:
    assert set(codes_in_help()) == {int(code) for code in ExitCode}


def test_the_help_says_which_may_be_retried() -> None:
    for code, (_, retry) in codes_in_help().items():
        expected = "" if code == 0 else "may be retried" if code in RETRIED else "must not be retried"
        assert retry == expected, code


def test_every_code_has_its_errors() -> None:
    owners: dict[ExitCode, list[str]] = {}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, LoraTrainerError) and kind is not LoraTrainerError:
            owners.setdefault(kind.exit_code, []).append(kind.__name__)
    assert owners == {
        ExitCode.CONFIG: ["ConfigError"],
        ExitCode.DATA: ["DataError"],
        ExitCode.GATE: ["GateError"],
        ExitCode.HARDWARE: ["HardwareError", "OutOfMemoryError"],
        ExitCode.STORAGE: ["StorageError"],
        ExitCode.DIVERGED: ["DivergedError"],
        ExitCode.BUG: ["DeviceLostError", "InvariantError"],
    }
    assert Interrupted.exit_code == 128 + 15, "what a shell says of SIGTERM"
    assert not issubclass(Interrupted, Exception), "no library's handler may swallow it"


def test_an_error_holds_its_problems_apart() -> None:
    assert LoraTrainerError("one").problems == ("one",)
    several = LoraTrainerError(["one", "two"])
    assert several.problems == ("one", "two")
    assert str(several) == "one\ntwo"
    assert LoraTrainerError("x").exit_code == ExitCode.BUG

"""Test log lines, and the final line for Kubernetes."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from rich.cells import cell_len

from lora_trainer import logs


@pytest.fixture(autouse=True)
def untouched_logging() -> Iterator[None]:
    """Restore pytest's logging, which `configure` replaces for the whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("lora_trainer", "entrypoint"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


Capture = pytest.CaptureFixture[str]


def events(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def ours() -> structlog.stdlib.BoundLogger:
    # Return a logger the way our modules create one.
    logger: structlog.stdlib.BoundLogger = structlog.get_logger("lora_trainer.anything")
    return logger


def test_json_off_a_terminal_one_event_a_line(capsys: Capture) -> None:
    logs.configure("info", "auto")
    structlog.contextvars.bind_contextvars(run_id="0123", blood_type="A")
    ours().info("training_step", loss=1.5, text="두 줄\n이야", path=Path("/x"))
    printed = capsys.readouterr().err
    (event,) = events(printed)
    assert list(event)[:3] == ["timestamp", "level", "event"]
    timestamp = str(event.pop("timestamp"))
    assert timestamp.endswith("Z")
    assert event == {
        "level": "info",
        "event": "training_step",
        "loss": 1.5,
        "text": "두 줄\n이야",
        "path": "PosixPath('/x')",
        "run_id": "0123",
        "blood_type": "A",
    }
    assert "두 줄" in printed, "Korean as itself"


def test_console_when_asked_for(capsys: Capture) -> None:
    logs.configure("info", "console")
    ours().warning("records_left_out", records=3)
    line = capsys.readouterr().err
    assert "records_left_out" in line
    assert "records=3" in line
    with pytest.raises(json.JSONDecodeError):
        json.loads(line)


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_levels(capsys: Capture, level: str, shown: list[str]) -> None:
    logs.configure(level, "json")
    for name in ("debug", "info", "warning", "error"):
        getattr(ours(), name)(f"at_{name}")
    assert [event["event"] for event in events(capsys.readouterr().err)] == [f"at_{name}" for name in shown]


def test_libraries_speak_from_warning_up_and_in_our_format(capsys: Capture) -> None:
    logs.configure("debug", "json")
    # use a made-up name, because another test may have imported a real library and added a handler to its logger
    library = logging.getLogger("some_library.trainer")
    library.info("chatter that may quote data")
    library.warning("careful with %s", "this")
    warnings.warn("an old function", DeprecationWarning, stacklevel=1)
    first, second = events(capsys.readouterr().err)
    assert first.pop("timestamp")
    assert first == {
        "level": "warning",
        "event": "library_message",
        "library": "some_library.trainer",
        "message": "careful with this",
    }
    assert second["library"] == "py.warnings"
    assert "an old function" in str(second["message"])


def test_a_library_that_set_up_its_own_handler_is_adopted(capsys: Capture) -> None:
    library = logging.getLogger("self_made_library")
    library.addHandler(logging.StreamHandler())
    library.propagate = False
    logs.configure("info", "json")
    logs.adopt_library_loggers()
    library.warning("in one format")
    (event,) = events(capsys.readouterr().err)
    assert (event["library"], event["message"]) == ("self_made_library", "in one format")


def test_what_a_library_prints_becomes_a_debug_event(capsys: Capture) -> None:
    logs.configure("debug", "json")
    with logs.libraries_print_to_the_log():
        sys.stdout.write("a banner\nof two lines\n")
        sys.stderr.write("an aside\n")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [(event["stream"], event["message"]) for event in events(printed.err)] == [
        ("stdout", "a banner"),
        ("stdout", "of two lines"),
        ("stderr", "an aside"),
    ]


def test_a_second_set_up_replaces_the_first(capsys: Capture) -> None:
    logs.configure("info", "json")
    logs.configure("error", "json")
    ours().warning("quiet_now")
    ours().error("once")
    assert [event["event"] for event in events(capsys.readouterr().err)] == ["once"]


# -- the final line --------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "termination-log"
    file.touch()
    return file


def test_the_last_word(path: Path) -> None:
    summary: dict[str, object] = {"outcome": "DataError", "exit_code": 3, "problems": ["줄 3"]}
    logs.last_word(summary, path)
    assert json.loads(path.read_bytes()) == summary
    assert "줄" in path.read_text(encoding="utf-8")


def test_where_there_is_none_none_is_made(tmp_path: Path) -> None:
    logs.last_word({"exit_code": 0}, tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_too_many_problems_still_fit_and_still_are_json(path: Path) -> None:
    logs.last_word({"exit_code": 3, "problems": [f"{number}: " + "가" * 30 for number in range(1000)]}, path)
    text = path.read_bytes()
    assert len(text) <= 4096
    assert json.loads(text) == {"exit_code": 3, "problems": ["too many to show here: see the log"]}


def test_a_name_that_is_no_utf_8_can_be_written(path: Path) -> None:
    logs.last_word({"exit_code": 2, "problems": ["\udcff.yaml: no such file"]}, path)
    assert json.loads(path.read_bytes())["problems"] == ["\udcff.yaml: no such file"]


def test_losing_it_is_a_warning_and_no_failure(capsys: Capture, tmp_path: Path) -> None:
    logs.configure("info", "json")
    logs.last_word({"exit_code": 0}, tmp_path)
    (event,) = events(capsys.readouterr().err)
    assert (event["level"], event["event"], event["reason"]) == ("warning", "termination_log_not_written", "Is a directory")


# -- the width of a terminal --------------------------------------------------------------------------

PLAIN = "13:43:44 [info     ] evaluation_finished      replies=480 problem='한국어 문장은 두 칸씩 차지해서 폭을 넘기 쉽다' where="


@pytest.mark.parametrize("columns", [40, 80, 132])
def test_a_line_fits_its_terminal(columns: int) -> None:
    path = "s3://bucket/" + "x" * 150
    lines = logs.fitted(f"{PLAIN}{path} passed=True", columns).split("\n")
    long = [line for line in lines if cell_len(line) > columns]
    # only the path doesn't fit, and it can be copied
    assert [line.strip() for line in long] == [f"where={path}"]
    assert all(line.startswith("    ") and line.strip() for line in lines[1:])
    assert " ".join(" ".join(lines).split()) == " ".join(f"{PLAIN}{path} passed=True".split())


def test_colours_take_no_columns() -> None:
    bare = "a=1 " * 30
    coloured = "\x1b[36ma\x1b[0m=\x1b[35m1\x1b[0m " * 30
    stripped = logs.fitted(coloured, 40).replace("\x1b[36m", "").replace("\x1b[35m", "").replace("\x1b[0m", "")
    assert stripped == logs.fitted(bare, 40)
    assert max(map(cell_len, stripped.split("\n"))) <= 40


def test_a_short_line_and_a_very_narrow_terminal() -> None:
    assert logs.fitted("13:43:44 [info     ] done", 80) == "13:43:44 [info     ] done"
    assert logs.fitted("", 80) == ""
    assert "".join(logs.fitted("a bb ccc", 1).split()) == "abbccc"


@pytest.mark.parametrize("columns", [60, 100])
def test_events_on_a_terminal_fit_it(columns: int) -> None:
    """Run a process on a pseudoterminal of this width."""
    program = (
        "import structlog; from lora_trainer import logs\n"
        "logs.configure('info', 'auto'); log = structlog.get_logger('lora_trainer.anything')\n"
        "with logs.libraries_print_to_the_log():\n"
        "    log.info('data_formatted', train_records=1350, held_out_records=150, tokens=182334, longest_tokens=211, steps=170)"
    )
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    subprocess.run([sys.executable, "-c", program], stderr=follower, env={**environment, "TERM": "xterm"}, timeout=60, check=True)
    assert select.select([leader], [], [], 10)[0]
    shown = re.sub("\x1b\\[[0-9;]*m", "", os.read(leader, 65536).decode()).splitlines()
    os.close(follower)
    os.close(leader)
    assert len(shown) > 1
    assert max(map(cell_len, shown)) <= columns
    assert "held_out_records=150" in " ".join(shown)
    assert re.match(r"\d\d:\d\d:\d\d \[", shown[0])

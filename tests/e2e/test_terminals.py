"""Run commands with streams that can't take their output or give them text. The exit code is that of the work."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from jobs import DEMO, FEW_PROMPTS, SHORT, few_questions, require_training_stack
from rich.cells import cell_len

pytestmark = pytest.mark.e2e
DATA = REPOSITORY / "data" / "train_data_type_B.jsonl"
BASE = str(REPOSITORY / "examples" / "tiny-base")
COMMAND = (sys.executable, "-m", "entrypoint")
ASCII: dict[str, Any] = {"PYTHONIOENCODING": "ascii"}


def shell(command: str, *arguments: str, cwd: Path | None = None, stdin: bytes = b"", **environment: Any) -> Any:
    """Run `command` in bash. In it, "$@" is the command line of the job."""
    return subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", command, "bash", *COMMAND, *arguments],
        cwd=cwd or REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        input=stdin, capture_output=True, timeout=200, check=False,
    )  # fmt: skip


def clean(done: Any) -> tuple[str, str]:
    """Return what a command printed, which is no traceback, even of Python's own shutdown."""
    out, err = (text.decode("utf-8", "surrogateescape") for text in (done.stdout, done.stderr))
    for said in ("Traceback", "UnicodeEncodeError", "Exception ignored", "Error in sys", "--- Logging error"):
        assert said not in out + err, err
    return out, err


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a file with errors whose messages hold Korean and are longer than 80 columns."""
    path = tmp_path_factory.mktemp("data") / "train_data_type_B.jsonl"
    broken = json.loads(DATA.read_text(encoding="utf-8").splitlines()[0])
    broken["context"]["current_emotion"]["type"] = "기쁨"
    lines = [json.dumps({**broken, "input": f"{number}번"}, ensure_ascii=False) for number in range(4)]
    path.write_text("\n".join([*lines, '{"가": 1}']) + "\n", encoding="utf-8")
    return str(path)


FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ascii": ('"$@"', ASCII),
    "cp949, strict": ('"$@"', {"PYTHONIOENCODING": "cp949:strict"}),
    "utf-16": ('"$@"', {"PYTHONIOENCODING": "utf-16"}),
    "POSIX": ('"$@"', {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
    "no output": ('"$@" >&-', {}),
    "no errors": ('"$@" 2>&-', {}),
    "nothing open": ('"$@" <&- >&- 2>&-', {}),
    "a reader that stops": ('"$@" | true', {}),
    "errors to a reader that stops": ('"$@" 2> >(true)', {}),
    "a full disk": ('"$@" > /dev/full', {}),
    "a full disk for errors": ('"$@" 2> /dev/full', {}),
    "no columns": ('"$@"', {"COLUMNS": "0", "TERM": "dumb"}),
    "odd columns": ('"$@"', {"COLUMNS": "abc", "NO_COLOR": "1"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_exit_code_is_that_of_the_work(fault: str, bad_data: str) -> None:
    command, environment = FAULTS[fault]
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    commands: dict[tuple[str, ...], int] = {("validate", "--no-tokens", bad_data): 3}
    if fault in ("POSIX", "nothing open", "a full disk for errors"):
        commands[("show-config", "--set", "lora.r=카페")] = 2
    if fault in ("ascii", "nothing open", "a full disk", "a reader that stops"):
        commands[("validate", "--help")] = 0
    for arguments, code in commands.items():
        done = shell(command, *arguments, **environment)
        out, err = clean(done)
        assert done.returncode == code, (arguments, out, err)
        if fault == "a full disk":
            assert "standard output was lost: No space left on device" in err
        elif "reader" in fault or fault.startswith("no "):
            assert "lost" not in err


def test_what_an_encoding_lacks_is_escaped(bad_data: str) -> None:
    done = shell('"$@"', "validate", "--help", **ASCII)
    out, _ = clean(done)
    # 반말, as JSON and Python write it
    assert "\\uc874\\ub313\\ub9d0" in out
    assert out.isascii()
    as_json = {
        encoding: json.loads(shell('"$@"', "validate", "--json", "--no-tokens", bad_data, PYTHONIOENCODING=encoding).stdout)
        for encoding in ("ascii", "utf-8")
    }
    assert as_json["ascii"] == as_json["utf-8"]


@pytest.mark.parametrize("columns", ["", "0", "20"])
def test_each_problem_is_one_line_off_a_terminal(bad_data: str, columns: str) -> None:
    done = shell('"$@" | cat', "validate", "--no-tokens", bad_data, COLUMNS=columns)
    out, _ = clean(done)
    assert done.returncode == 3
    problems = [line for line in out.splitlines() if line.startswith(f"{bad_data}:")]
    assert any("line" in line or ":4:" in line for line in problems)
    # the message about line 5 names all four missing fields in one line, far beyond 80 columns
    assert max(map(len, problems)) > 100
    assert not any(line.startswith(" ") and "expected" in line for line in out.splitlines())


def test_a_terminal_that_says_it_has_no_columns(bad_data: str) -> None:
    for columns in ("0", "abc"):
        master, slave = pty.openpty()
        process = subprocess.Popen(
            [*COMMAND, "validate", "--no-tokens", bad_data], stdin=slave, stdout=slave, stderr=slave,
            cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": columns, "TERM": "dumb"},
        )  # fmt: skip
        os.close(slave)
        shown = read_all(master)
        assert process.wait(60) == 3
        assert "0 records in 5 lines" in shown
        assert "\x1b" not in shown


def read_all(descriptor: int) -> str:
    parts: list[bytes] = []
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:
            part = b""
        if not part:
            os.close(descriptor)
            return b"".join(parts).decode()
        parts.append(part)


def test_a_pipe_that_another_program_has_set_to_non_blocking() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen(
        [*COMMAND, "show-config", "--set", f"evaluation.prompts={'x' * 100_000}"], stdout=writer, stderr=subprocess.PIPE,
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    os.close(writer)
    shown = read_all(reader)
    assert process.wait(60) == 0
    # more than a pipe holds
    assert "x" * 100_000 in shown
    assert "report_to" in shown


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["chat", "--adapter", "nowhere", "--situation", "카페".encode("cp949")], "--situation"),
        (["run", "--blood-type", "A", "--data", b"/data/\xff/"], "--data"),
        (["show-config", b"--output=\xff"], "--output"),
        (["show-config", "--set", b"work_dir=\xff"], "--set"),
        (["compare", "a", "b", "--html", "비교.html".encode("euc-kr")], "--html"),
    ],
)
def test_an_option_that_is_not_utf_8(arguments: list[str | bytes], option: str) -> None:
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, check=False
    )
    _, err = clean(done)
    assert done.returncode == 2, err
    assert f"{option}: not UTF-8" in err
    assert len(err.splitlines()) == 1


def test_a_setting_in_the_environment_that_is_not_utf_8() -> None:
    done = shell('LORA_TRAINER_DATA=$(printf "/data/\\xff/") "$@"', "run", "--blood-type", "A")
    assert done.returncode == 2
    assert "LORA_TRAINER_DATA: got" in clean(done)[1]


def test_the_name_of_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff_type_B.jsonl"))
    path.write_text("{}\n", encoding="utf-8")
    for environment in ({"LANG": "C.UTF-8"}, ASCII):
        done = shell('"$@" "$(printf "%s/\\xff_type_B.jsonl" "$PWD")"', "validate", "--no-tokens", cwd=tmp_path, **environment)
        out, err = clean(done)
        assert done.returncode == 3, err
        assert "\\udcff_type_B.jsonl: 4 errors" in out


# --- a deleted working directory ---------------------------------------------------------------------------------------


def in_deleted_folder(tmp_path: Path, *arguments: str) -> Any:
    folder = tmp_path / "deleted"
    folder.mkdir()
    return shell('rmdir "$PWD" && "$@"', *arguments, cwd=folder)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["show-config"],
        ["check-storage", "--blood-type", "B", "--base-model", BASE, "--data", str(DATA), "--output", "OUT"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_that_does_not_need_its_folder(arguments: Sequence[str], tmp_path: Path) -> None:
    done = in_deleted_folder(tmp_path, *(argument.replace("OUT", str(tmp_path)) for argument in arguments))
    out, err = clean(done)
    assert (done.returncode, err) == (0, "")
    assert out


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--blood-type", "A", "--device", "cpu", "--base-model", BASE],
        ["check-storage", "--blood-type", "A"],
        ["evaluate", "--adapter", "outputs/adapter_A"],
        ["chat", "--adapter", "outputs/adapter_A"],
        ["promote", "outputs/adapter_A"],
        ["generate", "--count", "1"],
        ["validate", "--no-tokens", "a.jsonl"],
        ["convert", "a.json", "--output", "b.jsonl"],
        ["run", "--config", "run.yaml"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_that_needs_its_folder(arguments: Sequence[str], tmp_path: Path) -> None:
    done = in_deleted_folder(tmp_path, *arguments)
    out, err = clean(done)
    assert done.returncode == 2, err
    assert "the working directory has been deleted" in out + err


# --- with an adapter ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Train with a full disk as standard output and standard error that is ASCII. Return the adapter and the process."""
    require_training_stack()
    folder = tmp_path_factory.mktemp("adapter")
    done = shell(
        '"$@" > /dev/full', "run", *SHORT, "--max-steps", "2", "--blood-type", "B", "--data", str(DATA),
        "--output", str(folder / "출력"), "--work-dir", str(folder / "work"), "--log-format", "json", **ASCII,
    )  # fmt: skip
    return folder / "출력" / "adapter_B", done


def chat(adapter: Path, command: str, stdin: bytes, **environment: Any) -> Any:
    work_dir = str(adapter.parent.parent / "work")
    return shell(
        command, "chat", "--adapter", str(adapter), "--work-dir", work_dir, "--base-model", BASE, "--json",
        stdin=stdin, **environment,
    )  # fmt: skip


def test_a_run_whose_output_cannot_be_written_publishes(finished: tuple[Path, Any]) -> None:
    adapter, done = finished
    _, err = clean(done)
    assert done.returncode == 0, err
    *events, lost = err.splitlines()
    assert "standard output was lost" in lost
    last = json.loads(events[-1])
    assert (last["event"], last["outcome"], "출력" in last["bundle"]) == ("run_finished", "done", True)
    assert err.isascii()
    assert (adapter / "manifest.json").is_file()


def on_a_terminal(*arguments: str, columns: int, **environment: str) -> tuple[int, str, list[str]]:
    """Run a command whose standard error is a pseudoterminal. Return exit code, standard output, and the lines without colours."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=follower,
        env={**plain, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", **environment},
    )  # fmt: skip
    printed = b""
    # keep the other end open until everything is read: closing it may discard the rest
    while select.select([leader], [], [], 0.5)[0] or process.poll() is None:
        if select.select([leader], [], [], 0)[0]:
            printed += os.read(leader, 65536)
    os.close(follower)
    os.close(leader)
    assert process.stdout is not None
    with process.stdout as stdout:
        out = stdout.read().decode()
    return process.returncode, out, re.sub("\x1b\\[[0-9;]*m", "", printed.decode()).splitlines()


def test_a_run_ends_with_its_gates_the_report_and_the_next_command(finished: tuple[Path, Any]) -> None:
    """Judge the adapter by the demo's thresholds, which two steps can't meet. Nothing is trained or generated again."""
    adapter, _ = finished
    output = adapter.parent
    code, out, lines = on_a_terminal(
        "run", *DEMO, "--set", "memory.micro_batch_tokens=512", *few_questions(), "--max-steps", "2", "--blood-type", "B",
        "--data", str(DATA), "--output", str(output), "--work-dir", str(output.parent / "work"), columns=100,
    )  # fmt: skip
    assert code == 4, lines
    at = next(number for number, line in enumerate(lines) if "gates NOT passed" in line)
    end = lines[at:]
    assert end[1].startswith("Form alone was judged: JSON")
    assert "Not judged: whether the replies make sense" in " ".join(end)
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for line in end if len(cells := line.split("│")) > 4}
    assert len(rows) == 9
    # base, measured, people: people's own replies are exact JSON
    assert rows["exact_json"][2] == "1.000"
    assert rows["win_rate"][0::2][:2] == ["0.500", "–"]
    assert rows["exact_json"][5].startswith("missed by")
    report, following, purpose = end[-3:]
    assert report.startswith("report: file://")
    assert report.endswith("/report.html")
    bundle = out.strip()
    assert following == f"next:   lora-trainer chat --adapter {shlex.quote(bundle)} --base-model {BASE}"
    assert "make" in purpose
    # log lines fit the terminal; a word that doesn't has its own line
    stamped = [line for line in lines[:at] if re.match(r"\d\d:\d\d:\d\d |    \S", line)]
    assert len(stamped) > 5
    assert [line for line in stamped if cell_len(line) > 100 and " " in line.strip()] == []


def test_an_evaluation_keeps_its_verdict_and_its_table(finished: tuple[Path, Any]) -> None:
    adapter, _ = finished
    done = shell(
        '"$@"', "evaluate", "--adapter", str(adapter), "--base-model", BASE, "--data", str(DATA), "--set", "gates.persona=1",
        "--prompts", str(FEW_PROMPTS),
        "--work-dir", str(adapter.parent.parent / "work"), PYTHONIOENCODING="latin-1", COLUMNS="0",
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    out, _ = clean(done)
    assert "gates NOT passed" in out
    # beside every verdict
    assert "Not judged: whether the replies make sense" in out
    (state,) = (adapter.parent.parent / "work").glob("evaluations/B/*/progress.json")
    shown = json.loads(state.read_text(encoding="utf-8"))
    # six prompts at two intensities, those of adapter and base
    assert (shown["stage"], shown["step"], shown["of"], shown["eta_s"]) == ("evaluate", 24, 24, 0.0)
    assert "\\ubc18\\ub9d0" in out


def test_what_is_typed_is_utf_8(finished: tuple[Path, Any]) -> None:
    done = chat(finished[0], '"$@"', "안녕".encode("cp949") + b"\n", PYTHONIOENCODING="utf-8:strict")
    out, err = clean(done)
    assert (done.returncode, out) == (2, "")
    start, problem = err.splitlines()
    assert "/situation TEXT" in start
    assert "standard input: line 1: not UTF-8" in problem


def test_a_chat_ends_when_nobody_reads_it(finished: tuple[Path, Any]) -> None:
    # 10,000 answers would take an hour
    done = chat(finished[0], '"$@" | head -n 1', "안녕\n".encode() * 10_000)
    out, _ = clean(done)
    assert done.returncode == 0
    assert len(out.splitlines()) == 1

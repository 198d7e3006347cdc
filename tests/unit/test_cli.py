"""Test the output and exit codes of the command line. A user's mistake never ends in a traceback."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import structlog
from click.testing import CliRunner, Result
from safetensors import SafetensorError

from entrypoint.cli import cli, run_cli
from lora_trainer import logs
from lora_trainer.base_model import identify_base
from lora_trainer.config_sources import settle
from lora_trainer.data.evaluation_prompts import evaluation_prompts
from lora_trainer.evaluate.gates import gate_id
from lora_trainer.evaluate.metrics import GateResult, Verdict
from lora_trainer.evaluate.questions import evaluation_id, prompts_digest
from lora_trainer.run.identity import run_id, run_ingredients
from lora_trainer.store.bundle import publish_bundle
from lora_trainer.store.local import sha256_of
from lora_trainer.store.manifest import write_manifest
from lora_trainer.store.opening import open_storage

REPOSITORY = Path(__file__).resolve().parents[2]
TINY_BASE = REPOSITORY / "examples" / "tiny-base"
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzEXAMPLEKEY"  # noqa: S105  the example of AWS's own manual
PLANTED = "아무도보면안되는말"


class Panic(BaseException):
    """An exception of a library that does not derive from Exception."""


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, aws_environment: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the test the state of a new process: no settings and an empty working folder. Restore logging afterwards."""
    for variable in list(os.environ):
        if variable.startswith("LORA_TRAINER_"):
            monkeypatch.delenv(variable)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
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


@pytest.fixture
def termination_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "termination-log"
    path.touch()
    # Patch the default argument, because Python binds it when it defines the function.
    monkeypatch.setattr(logs.last_word, "__defaults__", (path,))
    return path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command. Return its exit code, standard output and standard error."""
    code = run_cli(arguments)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


def last_event(err: str) -> dict[str, Any]:
    events: list[dict[str, Any]] = [json.loads(line) for line in err.splitlines()]
    assert [event["event"] for event in events].count("run_finished") == 1
    assert events[-1]["event"] == "run_finished"
    return events[-1]


def record(**changes: object) -> str:
    whole = {
        "instruction": "너는 A형 다정한 친구야. 짧은 반말로 답해.",
        "context": {"summary": "", "current_emotion": {"type": "happy", "intensity": 0.8}},
        "input": "나 왔어",
        "output": json.dumps({"text": "어디야?", "emotion": "smile"}, ensure_ascii=False),
        **changes,
    }
    return json.dumps(whole, ensure_ascii=False) + "\n"


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


# -- help and usage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *([name] for name in cli.commands)], ids=" ".join)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(command: list[str], option: str) -> None:
    result = invoke(*command, option)
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: {' '.join(['cli', *command])} ")
    for line in result.output.splitlines():
        assert len(line) <= 120, "help is read on terminals"


def test_every_option_is_explained() -> None:
    for name, command in cli.commands.items():
        for option in command.params:
            # Click has no help texts for arguments, so the command's own text must explain them
            explained = (
                (command.help or "").split("\n", 1)[1] if isinstance(option, click.Argument) else getattr(option, "help", "")
            )
            assert explained, f"{name} {option.opts}"
            if isinstance(option, click.Argument):
                assert str(option.metavar).split()[0].rstrip(".") in explained, f"{name} {option.opts}"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(capsys, "--version")
    assert code == 0
    assert out.startswith("lora-trainer, version ")


@pytest.mark.parametrize(
    "arguments", [["--blood_type", "AB"], ["--blood-type", "AB"], ["--blood_type=ab"], ["--set", "blood_type=ab"]]
)
def test_blood_type_both_ways(arguments: list[str]) -> None:
    result = invoke("show-config", "--json", *arguments)
    assert json.loads(result.output)["blood_type"] == "AB"


def test_set_is_stronger_than_its_option_and_the_last_one_wins() -> None:
    result = invoke("show-config", "--json", "--epochs", "2", "--set", "training.epochs=4", "--set", "training.epochs=5")
    assert json.loads(result.output)["training"]["epochs"] == 5.0


def test_strict_is_unset_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_TRAINER_STRICT", "true")
    assert json.loads(invoke("show-config", "--json").output)["strict"] is True
    monkeypatch.delenv("LORA_TRAINER_STRICT")
    assert json.loads(invoke("show-config", "--json").output)["strict"] is False
    assert json.loads(invoke("show-config", "--json", "--strict").output)["strict"] is True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Usage: lora-trainer"),
        (["train"], "No such command 'train'"),
        (["run", "--bloodtype", "A"], "No such option"),
        (["run", "extra"], "unexpected extra argument"),
        (["run", "--data"], "requires an argument"),
        (["validate"], "Missing argument 'FILE...'"),
        (
            ["show-config", "--blood-type", "C"],
            "error: command line: blood_type: got 'C'; expected A, B, O or AB, several as A,B, or all",
        ),
        (["show-config", "--set", "lora.rank=3"], "error: --set lora.rank=…: expected SETTING=VALUE; "),
        (["show-config", "--config", "nowhere.yaml"], "error: nowhere.yaml: cannot read the configuration file: No such file"),
        (["show-config", "--config", "."], "error: .: cannot read the configuration file: Is a directory"),
        (["show-config", "--data", "ftp://x/y/"], "unknown scheme 'ftp://'"),
        (["validate", "nowhere.jsonl", "--no-tokens"], "error: nowhere.jsonl: no such file; expected a JSONL file"),
        (["validate", "..", "--no-tokens"], "error: ..: a folder; expected a JSONL file"),
        (["validate", "ftp://x/y.jsonl", "--no-tokens"], "error: ftp://x/y.jsonl: unknown scheme"),
        (["validate", "s3://bucket", "--no-tokens"], "error: s3://bucket: names no object"),
    ],
)
def test_usage_is_exit_2(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, out, err = called(capsys, *arguments)
    assert code == 2
    assert said in err
    assert out == ""


def test_all_wrong_overrides_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = called(capsys, "show-config", "--set", "a=1", "--set", "lora.r=8", "--set", "b=2")
    assert code == 2
    assert [line.split(":")[1] for line in err.splitlines()] == [" --set a=…", " --set b=…"]


# -- validate -------------------------------------------------------------------------------------------


def test_validate_accepts_the_bundled_data(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(REPOSITORY / "data" / f"train_data_type_{name}.jsonl") for name in ("A", "AB")]
    code, out, _ = called(capsys, "validate", "--strict", "--base-model", str(TINY_BASE), *files)
    assert code == 0
    for file in files:
        assert Path(file).name in out.replace("\n", "")


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (record(), [], 0),
        (record(), ["--strict"], 0),
        (record(output='{"text": "안녕하세요!", "emotion": "smile"}'), [], 0),
        (record(output='{"text": "안녕하세요!", "emotion": "smile"}'), ["--strict"], 3),
        (record(output='{"text": "어디야?", "emotion": "happy"}'), [], 3),
        ("not json\n", [], 3),
        ("", [], 3),
    ],
    ids=["clean", "clean-strict", "warning", "warning-strict", "error", "not-json", "empty"],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_validate_exit_codes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, options: list[str], expected: int, as_json: bool
) -> None:
    file = write(tmp_path / "data.jsonl", text)
    code, out, _ = called(capsys, "validate", "--no-tokens", *options, *(["--json"] if as_json else []), file)
    assert code == expected
    assert out
    if as_json:
        assert isinstance(json.loads(out), dict | list)


def test_validate_json_is_one_document_for_several_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", record() + "nonsense\n")
    good = write(tmp_path / "한글 good.jsonl", record())
    code, out, err = called(capsys, "validate", "--json", "--base-model", str(TINY_BASE), bad, f"file://{tmp_path}/bad.jsonl", good)
    assert code == 3
    assert err == ""
    text = json.dumps(json.loads(out), ensure_ascii=False)
    assert text.count("not_json") >= 2
    assert "한글 good.jsonl" in text


def test_validate_says_why_tokens_are_not_counted_and_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", record())
    code, out, err = called(capsys, "validate", "--base-model", str(tmp_path), file)
    assert code == 0
    assert err.startswith(f"tokens not counted: base.model: {tmp_path}: has no tokenizer.json")
    assert "--no-tokens" in err
    assert out


def test_validate_takes_the_persona_from_its_option(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", record())
    assert called(capsys, "validate", "--no-tokens", "--strict", "--blood_type", "a", file)[0] == 0
    code, out, _ = called(capsys, "validate", "--no-tokens", "--strict", "--json", "--blood_type", "B", file)
    assert code == 3
    assert "other_blood_type" in out


def test_validate_does_not_quote_training_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", planted())
    for options in ([], ["--json"]):
        code, out, err = called(capsys, "validate", "--no-tokens", *options, file)
        assert code == 3
        assert PLANTED not in out + err


def planted() -> str:
    """Return a file with every kind of faulty line. All contain text that no message may quote."""
    text = f"{PLANTED} 그리고 아주 길고 긴 이야기"
    good = json.dumps({"text": text, "emotion": "smile"}, ensure_ascii=False)
    return "".join(
        [
            record(input=text, output=text),
            record(input=text, output=good.replace("smile", "no-such-face")),
            record(input="", instruction=text, output=good),
            record(input=text, context={"summary": text, "current_emotion": {"type": "happy", "intensity": 5}}, output=good),
            record(input=text, context={"summary": text, "current_emotion": {"type": text, "intensity": 0.5}}, output=good),
            record(input=[text], output=good),
            record(input=text, output=good, more=text),
            record(**{text: text}),
            record(input=text, output=good)[:-30] + "\n",
            json.dumps([text], ensure_ascii=False) + "\n",
            text + "\n",
        ]
    )


# -- run: the last log line --------------------------------------------------------------------------------


def run_arguments(tmp_path: Path, data: str) -> list[str]:
    return ["run", "--blood-type", "A", "--data", data, "--output", str(tmp_path / "out"), "--work-dir", str(tmp_path / "work"),
            "--device", "cpu", "--base-model", str(TINY_BASE), "--set", "training.quantization=none"]  # fmt: skip


def test_run_with_a_wrong_setting(capsys: pytest.CaptureFixture[str], termination_log: Path) -> None:
    code, out, err = called(capsys, "run", "--epochs", "0")
    event = last_event(err)
    assert (code, out) == (2, "")
    assert (event["level"], event["outcome"], event["exit_code"]) == ("error", "ConfigError", 2)
    assert sorted(event["problems"]) == [
        "blood_type: not given; pass --blood-type, or set LORA_TRAINER_BLOOD_TYPE, or 'blood_type:' in the configuration file",
        "command line: training.epochs: got '0'; input should be greater than 0",
    ]
    said = json.loads(termination_log.read_text(encoding="utf-8"))
    assert (said["exit_code"], said["outcome"], said["problems"]) == (2, "ConfigError", event["problems"])


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        ("nowhere/", 3, "train_data_type_A.jsonl: not found; no files in "),
        ("nowhere/mine.jsonl", 3, "mine.jsonl: not found"),
        ("folder.jsonl", 3, "folder.jsonl: not found"),
        ("taken/", 2, "got a file of another name, expected a folder"),
    ],
)
def test_run_without_data(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, termination_log: Path, data: str, code: int, said: str
) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "taken").touch()
    ended, out, err = called(capsys, *run_arguments(tmp_path, f"{tmp_path}/{data}"))
    event = last_event(err)
    assert (ended, out, event["exit_code"], event["blood_type"]) == (code, "", code, "A")
    assert said in event["problems"][0]
    assert json.loads(termination_log.read_text(encoding="utf-8"))["blood_type"] == "A"


def test_run_refuses_bad_data_and_quotes_none_of_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, termination_log: Path
) -> None:
    data = write(tmp_path / "data" / "train_data_type_A.jsonl", planted())
    code, out, err = called(capsys, *run_arguments(tmp_path, data), "--log-level", "debug")
    event = last_event(err)
    assert (code, event["outcome"]) == (3, "DataError")
    named = "\n".join(event["problems"])
    for line in range(1, 12):
        assert f"train_data_type_A.jsonl:{line}: " in named
    assert PLANTED not in out + err + termination_log.read_text(encoding="utf-8")
    assert not (tmp_path / "out").exists()


def test_run_stops_at_warnings_under_strict(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    formal = json.dumps({"text": f"{PLANTED} 안녕하세요!", "emotion": "smile"}, ensure_ascii=False)
    data = write(tmp_path / "data" / "train_data_type_A.jsonl", record() + record(output=formal, input="둘"))
    code, _, err = called(capsys, *run_arguments(tmp_path, data), "--strict")
    assert code == 3
    # the message names the user's own file, not the copy in the work folder
    assert last_event(err)["problems"][0].startswith(f"{tmp_path}/data/train_data_type_A.jsonl:2: ")
    assert PLANTED not in err


def test_run_with_a_base_that_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = called(capsys, *run_arguments(tmp_path, few_records(tmp_path)), "--base-model", str(tmp_path))
    assert code == 2
    assert "not a model: config.json, tokenizer.json, *.safetensors missing" in last_event(err)["problems"][0]


def few_records(tmp_path: Path, blood_type: str = "A") -> str:
    """Copy the first records of the bundled data to a folder, because validating all of them takes seconds."""
    name = f"train_data_type_{blood_type}.jsonl"
    lines = (REPOSITORY / "data" / name).read_text(encoding="utf-8").splitlines(keepends=True)[:60]
    return str(Path(write(tmp_path / "few" / name, "".join(lines))).parent)


def finished(tmp_path: Path, *, passed: bool = True, blood_type: str = "A") -> tuple[list[str], str]:
    """Publish the bundle of a finished run. Return the run's arguments and id."""
    data = Path(few_records(tmp_path, blood_type)) / f"train_data_type_{blood_type}.jsonl"
    settings = {"blood_type": blood_type, "device": "cpu", "base.model": str(TINY_BASE), "training.quantization": "none"}
    config = settle(settings, {})
    identity = run_id(run_ingredients(config, sha256_of(data), identify_base(config.base).identity))
    gate = GateResult(
        name="persona",
        measure="lower 95 % bound (exact, by prompt)",
        value=0.8,
        compared=0.75 if passed else 0.625,
        relation=">=",
        threshold=0.7,
        passed=passed,
        advice="" if passed else "look at the data",
    )
    verdict = Verdict(
        gate_id=gate_id(evaluation_id(config.evaluation, prompts_digest(evaluation_prompts())), config.gates),
        passed=passed,
        gates=(gate,),
    )
    folder = tmp_path / "bundle"
    write(folder / "adapter_config.json", "{}")
    facts = {
        "run_id": identity,
        "started_at": "2026-01-01T00:00:00+00:00",
        "finished_at": "2026-01-01T00:00:00+00:00",
        "gate_id": verdict.gate_id,
        "verdict": verdict.model_dump(mode="json"),
    }
    write_manifest(folder, facts)
    publish_bundle(folder, open_storage(str(tmp_path / "out")), f"adapters/{blood_type}/{identity}/")
    return run_arguments(tmp_path, str(data)), identity


def test_a_finished_run_ends_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path, termination_log: Path) -> None:
    arguments, identity = finished(tmp_path)
    for _ in range(2):
        code, out, err = called(capsys, *arguments)
        event = last_event(err)
        assert code == 0
        assert out == f"file://{tmp_path}/out/adapters/A/{identity}/\n"
        assert (event["level"], event["outcome"], event["already_done"], event["run_id"]) == ("info", "done", True, identity)
        assert event["bundle"] == out.strip()
        assert (event["passed"], event["report"]) == (True, f"{event['bundle']}report.html")
        assert "problems" not in event
        # the run adds the pointer and the link that a crash prevented
        assert json.loads((tmp_path / "out" / "adapters" / "A" / "latest.json").read_text())["run_id"] == identity
        assert (tmp_path / "out" / "adapter_A" / "manifest.json").is_file()
        (tmp_path / "out" / "adapter_A").unlink()
    assert json.loads(termination_log.read_text(encoding="utf-8"))["exit_code"] == 0


def test_a_finished_run_that_missed_a_gate_says_so_each_time(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, termination_log: Path
) -> None:
    arguments, identity = finished(tmp_path, passed=False)
    for _ in range(2):
        code, out, err = called(capsys, *arguments)
        event = last_event(err)
        assert (code, event["exit_code"], event["level"], event["outcome"]) == (4, 4, "error", "GateError")
        assert out == f"file://{tmp_path}/out/adapters/A/{identity}/\n", "the bundle is there all the same"
        assert (event["already_done"], event["passed"], event["run_id"]) == (True, False, identity)
        (problem,) = event["problems"]
        assert problem.startswith("gates.persona: got 0.625 (lower 95 % bound (exact, by prompt) of 0.800), expected >= 0.7: ")
        assert "missed by 0.075; look at the data" in problem
        assert json.loads(termination_log.read_text(encoding="utf-8"))["problems"] == [problem]
        # the run does not become the newest accepted one
        assert not (tmp_path / "out" / "adapters" / "A" / "latest.json").exists()
        assert not (tmp_path / "out" / "adapter_A").exists()


def test_a_finished_run_does_not_push_a_later_one_aside(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments, _ = finished(tmp_path)
    later = {"run_id": "later", "started_at": "2026-01-02T00:00:00+00:00"}
    latest = write(tmp_path / "out" / "adapters" / "A" / "latest.json", json.dumps(later))
    assert called(capsys, *arguments)[0] == 0
    assert json.loads(Path(latest).read_text())["run_id"] == "later"
    assert not (tmp_path / "out" / "adapter_A").exists()


def test_a_folder_in_the_way_of_the_link_is_said_each_time_and_then_mended(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments, _ = finished(tmp_path)
    in_the_way = tmp_path / "out" / "adapter_A"
    in_the_way.mkdir()
    for _ in range(2):
        code, _, err = called(capsys, *arguments)
        assert code == 6
        assert "adapter_A: in the way" in last_event(err)["problems"][0]
    in_the_way.rmdir()
    assert called(capsys, *arguments)[0] == 0
    assert in_the_way.is_symlink()


# -- run: several personas ------------------------------------------------------------------------------


def test_each_of_several_has_its_own_end_and_the_last_line_has_them_all(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, termination_log: Path
) -> None:
    arguments, identity = finished(tmp_path, passed=False)
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(tmp_path / "few" / "train_data_type_A.jsonl", data)
    write(data / "train_data_type_O.jsonl", planted())
    code, out, err = called(capsys, *arguments, "--data", f"{data}/", "--blood-type", "O,A,B")
    event = last_event(err)
    # B has no data and A's adapter misses a gate: bad data has the worse exit code
    assert (code, event["exit_code"], event["outcome"], event["level"]) == (3, 3, "DataError", "error")
    assert out == f"file://{tmp_path}/out/adapters/A/{identity}/\n"
    assert event["personas"] == [
        {"blood_type": "O", "run_id": None, "outcome": "DataError", "exit_code": 3},
        {
            "blood_type": "A", "run_id": identity, "outcome": "GateError", "exit_code": 4, "bundle": out.strip(), "passed": False,
            "sense": "not_judged", "not_judged": dict.fromkeys(("sense", "harmful", "incomplete"), "no_judge"),
        },
        {"blood_type": "B", "run_id": None, "outcome": "NotFound", "exit_code": 3},
    ]  # fmt: skip
    assert {problem.split(":")[0] for problem in event["problems"]} == {"O", "A", "B"}
    assert json.loads(termination_log.read_text(encoding="utf-8"))["personas"] == event["personas"]
    assert PLANTED not in out + err
    lines = [json.loads(line) for line in err.splitlines()]
    assert all("blood_type" in line for line in lines[:-1])
    ends = [line for line in lines if line["event"] == "persona_finished"]
    ended = [(line["blood_type"], line["exit_code"], line.get("run_id")) for line in ends]
    assert ended == [("O", 3, None), ("A", 4, identity), ("B", 3, None)]
    assert (ends[1]["already_done"], ends[1]["report"]) == (True, f"{ends[1]['bundle']}report.html")
    assert "blood_type" not in event


def test_several_that_are_finished_end_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments, identity = finished(tmp_path)
    _, other = finished(tmp_path, blood_type="AB")
    code, out, err = called(capsys, *arguments, "--data", str(tmp_path / "few"), "--blood-type", "AB,A")
    assert code == 0
    assert out.splitlines() == [
        f"file://{tmp_path}/out/adapters/{blood_type}/{run}/" for blood_type, run in (("AB", other), ("A", identity))
    ]
    assert "backend_started" not in err
    assert "problems" not in last_event(err)


def test_one_data_file_for_several_is_exit_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", record())
    code, _, err = called(capsys, *run_arguments(tmp_path, data), "--blood-type", "A,B")
    event = last_event(err)
    assert (code, event["outcome"]) == (2, "ConfigError")
    assert event["problems"] == [
        f"data: got the one file {data} for A, B; expected a folder that holds train_data_type_<blood type>.jsonl for each"
    ]


def test_on_a_terminal_each_persona_s_problems_are_lines(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, _, err = called(capsys, *run_arguments(tmp_path, f"{tmp_path}/nowhere/"), "--blood-type", "B,O")
    assert code == 3
    lines = [line.lstrip("\x1b[31m") for line in err.splitlines()]
    for blood_type in "BO":
        assert any(line.startswith(f"error: {blood_type}: ") and "not found" in line for line in lines)
    assert "problems=" not in err


def test_settings_of_several_go_back_in(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = called(capsys, "show-config", "--blood-type", "b,AB")
    assert code == 0
    assert "blood_type: [B, AB]" in out.splitlines()
    again = called(capsys, "show-config", "--config", write(tmp_path / "run.yaml", out))[1]
    assert [line for line in again.splitlines() if line.startswith("blood_type")] == ["blood_type: [B, AB]"]
    assert json.loads(called(capsys, "show-config", "--json", "--blood-type", "all")[1])["blood_type"] == ["A", "B", "O", "AB"]


def test_validate_takes_one_persona_and_settings_for_several(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "data.jsonl", record())
    monkeypatch.setenv("LORA_TRAINER_BLOOD_TYPE", "all")
    assert called(capsys, "validate", "--no-tokens", "--strict", file)[0] == 0
    code, _, err = called(capsys, "validate", "--no-tokens", "--blood-type", "A,B", file)
    assert (code, err) == (2, "error: --blood-type: got 'A,B', expected one persona, which the files belong to\n")


# -- run: bugs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError(PLANTED), "builtins.ValueError (its message is left out"),
        (KeyError(PLANTED), "builtins.KeyError (its message is left out"),
        (RuntimeError(f"a reply that says {PLANTED}"), "builtins.RuntimeError (its message is left out"),
        (OSError(f"no tokenizer takes {PLANTED}"), "builtins.OSError (its message is left out"),
        (AssertionError(PLANTED), "builtins.AssertionError (its message is left out"),
        (AttributeError(f"'str' object has no attribute '{PLANTED}'"), "builtins.AttributeError (its message is left out"),
        # like the panic of a Rust library, this does not derive from Exception
        (Panic(PLANTED), "test_cli.Panic (its message is left out"),
        (RuntimeError("CUDA error: device lost"), "builtins.RuntimeError: CUDA error: device lost"),
        (RuntimeError(f"CUDA error: device lost\n{PLANTED}"), "builtins.RuntimeError: CUDA error: device lost"),
        (AttributeError("'NoneType' object has no attribute 'loss'"), ": 'NoneType' object has no attribute 'loss'"),
        (ModuleNotFoundError("No module named 'torch.x'"), "builtins.ModuleNotFoundError: No module named 'torch.x'"),
        (OSError(2, "No such file or directory", "/x"), "builtins.FileNotFoundError: No such file or directory: /x"),
        (MemoryError(), "builtins.MemoryError: "),
    ],
)
def test_a_bug_is_exit_1_with_its_place_and_no_text_of_the_datas(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, shown: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("lora_trainer.run.pipeline.run", broken)
    code, _, err = called(capsys, *run_arguments(tmp_path, "data/"))
    event = last_event(err)
    assert (code, event["outcome"]) == (1, "bug")
    (problem,) = event["problems"]
    assert shown in problem
    if "left out" in shown:
        _, _, file = problem.partition("it may quote training text; ")
        kept = Path(file.removesuffix(" has it)"))
        # the file lies next to the data and only its owner can read it
        assert kept.parent == tmp_path / "work"
        assert kept.stat().st_mode & 0o077 == 0
        assert PLANTED in kept.read_text(encoding="utf-8")
    assert event["frames"][-1].split(":")[0] == __file__
    assert event["frames"][-1].endswith(" broken")
    assert PLANTED not in err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "work: No space left on device; free some space there",
        ),
        (OSError(28, "No space left on device", "/x"), "/x: No space left on device; free some space there"),
        (OSError(122, "Disk quota exceeded"), "work: Disk quota exceeded; free some space there"),
        (OSError(30, "Read-only file system", "/cache/lock"), "/cache/lock: Read-only file system; expected access as uid"),
        (PermissionError(13, "Permission denied", "/cache/lock"), "/cache/lock: Permission denied; expected access as uid"),
    ],
)
def test_a_disk_that_fails_inside_a_library_is_no_bug(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    said: str,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("lora_trainer.run.pipeline.run", broken)
    code, _, err = called(capsys, *run_arguments(tmp_path, "data/"))
    event = last_event(err)
    assert (code, event["outcome"]) == (6, "StorageError")
    assert said in event["problems"][0]


def test_on_a_terminal_problems_are_lines(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, _, err = called(capsys, *run_arguments(tmp_path, f"{tmp_path}/nowhere/"))
    assert code == 3
    assert any(line.lstrip("\x1b[31m").startswith("error: ") and "not found" in line for line in err.splitlines())
    assert "run_finished" in err
    assert "problems=" not in err


# -- in a separate process ----------------------------------------------------------------------------


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **changes}


def test_a_reader_that_went_away_is_no_failure(tmp_path: Path) -> None:
    read, write_end = os.pipe()
    os.close(read)
    with os.fdopen(write_end, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "entrypoint", "show-config"],
            env=environment(), stdout=closed, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_name_that_is_no_text() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "entrypoint", "run", "--blood-type", "A", "--config", b"\xff.yaml"],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert last_event(done.stderr)["problems"][0].endswith("No such file or directory; check the path given to --config")


@pytest.mark.slow  # imports torch; tests/e2e/test_run.py has the same case
def test_no_gpu_is_exit_5(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed: nothing looks for a GPU")
    arguments = run_arguments(tmp_path, few_records(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "entrypoint", *arguments, "--device", "cuda", "--backend", "transformers"],
        env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    event = last_event(done.stderr)
    assert event["outcome"] == "HardwareError"
    (problem,) = event["problems"]
    assert problem.startswith("device: got no CUDA GPU that torch can use, expected one")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_before_training_is_143(tmp_path: Path, number: signal.Signals) -> None:
    """Interrupt the download from a store that accepts the connection and never responds."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        arguments = run_arguments(tmp_path, "s3://bucket/data/")
        process = subprocess.Popen(
            [sys.executable, "-m", "entrypoint", *arguments],
            env=environment(
                AWS_ENDPOINT_URL=f"http://127.0.0.1:{silent.getsockname()[1]}",
                AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY=SECRET,
            ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            connection, _ = silent.accept()
            with connection:
                connection.recv(1)
                process.send_signal(number)
                out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 143, err
    assert "Traceback" not in err
    event = last_event(err)
    assert (event["outcome"], event["exit_code"]) == ("interrupted", 143)
    assert "run the same command again" in event["problems"][0]
    assert out == ""
    assert SECRET not in err


SLOW_IMPORT = """
import time
try:
    print("importing", flush=True)
    time.sleep(60)
except BaseException:
    if STUBBORN:
        print("swallowed", flush=True)
        time.sleep(60)
    raise
"""


@pytest.mark.parametrize("stubborn", [False, True], ids=["once", "twice"])
def test_an_interruption_while_libraries_are_imported_is_143(tmp_path: Path, stubborn: bool) -> None:
    """PID 1 has no default handlers and the imports take half a minute. The signal must not get lost meanwhile."""
    write(tmp_path / "slow" / "click.py", f"STUBBORN = {stubborn}\n{SLOW_IMPORT}")
    process = subprocess.Popen(
        [sys.executable, "-m", "entrypoint", "run", "--blood-type", "A"],
        env=environment(PYTHONPATH=f"{tmp_path / 'slow'}{os.pathsep}{REPOSITORY}"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGTERM)
        if stubborn:
            assert process.stdout.readline() == "swallowed\n"
            # the second signal ends the process at once
            process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 143
    if not stubborn:
        assert err == "interrupted by SIGTERM before the job began\n"


SIGNAL_IN_A_DESTRUCTOR = """
import os, signal, time

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

Dying()
time.sleep(60)
raise SystemExit("lost")
"""


def test_an_interruption_inside_a_destructor_is_143(tmp_path: Path) -> None:
    """Python drops what a destructor raises. The signal must not get lost with it."""
    write(tmp_path / "dying" / "click.py", SIGNAL_IN_A_DESTRUCTOR)
    done = subprocess.run(
        [sys.executable, "-m", "entrypoint", "run", "--blood-type", "A"],
        env=environment(PYTHONPATH=f"{tmp_path / 'dying'}{os.pathsep}{REPOSITORY}"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (143, "interrupted by SIGTERM before the job began\n")

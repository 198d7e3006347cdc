"""Plant credentials and record texts wherever a user may have them, and search everything that a run writes for them.

Record text may appear in the fetched data and in `bug-*.txt`, both under `work_dir`. Text that a model wrote may appear in
`replies.jsonl` and `report.html`; the search includes these, because after four steps the model cannot write the planted words.

"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from conftest import REPOSITORY
from jobs import DEMO, NO_GATES, few_questions, require_training_stack

from lora_trainer.store.opening import open_storage

pytestmark = pytest.mark.e2e
require_training_stack()

DATA = REPOSITORY / "data" / "train_data_type_A.jsonl"
RECORDS = 60

# no library uses any of these values as a default
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDENVIRON42",
    "AWS_SECRET_ACCESS_KEY": "plantedEnv/Secret+of/the/AwsEnvironment42",
    "AWS_SESSION_TOKEN": "planted-session-token-of-the-environment==",
    "HF_TOKEN": "hf_plantedTokenOfTheHub0123456789abcd",
    "OPENAI_API_KEY": "sk-planted-key-of-the-judge-0123456789",
    "WANDB_API_KEY": "p1a27ed0" * 5,
    "MLFLOW_TRACKING_USERNAME": "tracker",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-of-the-tracker",
}
PROFILE = {"aws_access_key_id": "ASIAPLANTEDPROFILE42", "aws_secret_access_key": "plantedProfile/Secret+in/the/CredentialsFile"}
USER, PASSWORD = "planted-user", "planted:pass@word-in-the-endpoint"
TEXTS = {"instruction": "쀍뷁솱", "context.summary": "쬻훑뗿", "input": "뛣쐧껢", "output": "퓳꿻뙕"}
"""Nonsense words that no text contains by chance."""
SECRETS = (
    *(value for name, value in CREDENTIALS.items() if name != "MLFLOW_TRACKING_USERNAME"),
    *PROFILE.values(),
    PASSWORD,
    f"{USER}:{PASSWORD}",
)

# Runs the real command with the test's own termination log and an optional bug.
PROGRAM = """
import logging, os, sys
from pathlib import Path
from lora_trainer import logs
from lora_trainer.run import pipeline

termination_log, breakage = sys.argv[1:3]
del sys.argv[1:3]
logs.last_word.__defaults__ = (Path(termination_log),)
read = pipeline.read

def broken(job, data):
    records = read(job, data)
    said = records[0].model_dump_json() + os.environ["AWS_SECRET_ACCESS_KEY"]
    try:
        raise ValueError(said)
    except ValueError:
        # as libraries do; a console that shows tracebacks shows the variables of their frames, too
        logging.getLogger("library").exception("a record could not be read", stack_info=True)
    raise {"ValueError": ValueError, "RuntimeError": RuntimeError}[breakage](said)

if breakage:
    pipeline.read = broken
from entrypoint.__main__ import main
main()
"""


def planted_records() -> list[dict[str, Any]]:
    records = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()[:RECORDS]]
    for record in records:
        reply = json.loads(record["output"])
        record["instruction"] += f" {TEXTS['instruction']}."
        record["context"]["summary"] += f" {TEXTS['context.summary']} 했어."
        record["input"] += f" {TEXTS['input']} 했어."
        reply["text"] = f"{TEXTS['output']} {reply['text']}"
        record["output"] = json.dumps(reply, ensure_ascii=False)
    return records


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def needles(texts: dict[str, str]) -> dict[bytes, str]:
    """Return every encoding in which a planted text may occur, mapped to the text."""
    found = {}
    for text in (*texts.values(), *SECRETS):
        for spelled in (text, json.dumps(text)[1:-1], quote(text), quote(text, safe="")):
            found[spelled.encode()] = text
        for offset in range(3):
            # Within a longer text, the base64 groups at both ends depend on adjacent bytes. Require eight remaining characters:
            # four would occur by chance in the megabytes of a checkpoint.
            shifted = b" " * offset + text.encode()
            spelled_base64 = base64.b64encode(shifted)[4 if offset else 0 :]
            found[spelled_base64[:-4] if len(shifted) % 3 else spelled_base64] = text
    return found


def leaks(name: str, content: bytes) -> list[str]:
    return [f"{name}: {text}" for spelled, text in needles(TEXTS).items() if spelled in content]


@dataclass
class Ended:
    """A finished run with its exit code, output and folder."""

    code: int
    out: str
    err: str
    folder: Path

    def leaks(self, storage_uri: str = "") -> list[str]:
        """Return all leaks in output and files, except in those that hold the data."""
        found = leaks("stdout", self.out.encode()) + leaks("stderr", self.err.encode())
        found += leaks("termination log", (self.folder / "termination-log").read_bytes())
        work = self.folder / "work"
        for path in sorted(work.rglob("*")):
            if path.is_file() and work / "data" not in path.parents and not path.name.startswith("bug-"):
                found += leaks(str(path.relative_to(work)), path.read_bytes())
                found += leaks("name of a file", path.name.encode())
        if storage_uri:
            storage = open_storage(storage_uri)
            for item in storage.list(""):
                stored = storage.read_bytes(item.key, max_bytes=2**28)
                assert stored is not None
                found += leaks(item.key, item.key.encode() + b"\n" + stored.data)
        return found

    @property
    def finished(self) -> dict[str, Any]:
        """The run's last event."""
        last: dict[str, Any] = json.loads(self.err.splitlines()[-1])
        assert last["event"] == "run_finished"
        return last


def with_user_info(endpoint_url: str) -> str:
    return endpoint_url.replace("://", f"://{USER}:{quote(PASSWORD)}@")


def run(
    folder: Path,
    data: Path,
    output: str,
    *more: str,
    log_format: str,
    endpoint_url: str,
    breakage: str = "",
    profile: bool = False,
    until: Callable[[str], bool] | None = None,
) -> Ended:
    """Run one process with everything planted. Send SIGTERM at the first log line for which `until` is true."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "termination-log").touch()
    credentials = folder / "aws-credentials"
    credentials.write_text("[planted]\n" + "".join(f"{name} = {value}\n" for name, value in PROFILE.items()))
    environment = {
        **{name: value for name, value in os.environ.items() if not (profile and name.startswith("AWS_"))},
        **{name: value for name, value in CREDENTIALS.items() if not profile or name == "AWS_SECRET_ACCESS_KEY"},
        "AWS_ENDPOINT_URL": endpoint_url,
        "AWS_SHARED_CREDENTIALS_FILE": str(credentials),
        "MLFLOW_TRACKING_URI": with_user_info("http://127.0.0.1:9/"),
        "LORA_TRAINER_STORAGE__OBJECT_BUDGET_S": "0.2",
        "PYTHONPATH": str(REPOSITORY),
    }
    if profile:
        del environment["AWS_SECRET_ACCESS_KEY"]
        environment["AWS_PROFILE"] = "planted"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder / "termination-log"), breakage, "run",
         *DEMO, "--blood-type", "A", "--data", str(data), "--output", output,
         "--work-dir", str(folder / "work"), "--log-format", log_format, "--max-steps", "4",
         "--set", "memory.micro_batch_tokens=512", "--set", "checkpoints.every_steps=1", "--set", "logging.log_every_steps=1",
         *few_questions(intensities="0.5"), *NO_GATES, *more],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if until is not None and until(line):
            process.send_signal(signal.SIGTERM)
            until = None
    return Ended(process.wait(300), process.stdout.read(), "".join(said), folder)


@dataclass
class Server:
    """An HTTP server that records the Authorization header of every request."""

    url: str = ""
    authorizations: set[str] = field(default_factory=set)


@contextmanager
def serve(answer: Callable[[dict[str, str]], tuple[int, str, str]]) -> Iterator[Server]:
    """Serve `answer`, which returns status, content type and body for a request's headers."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

        def handle_one(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            server.authorizations.add(headers.get("authorization", ""))
            status, content_type, body = answer(headers)
            data = body.encode() if self.command != "HEAD" else b""
            self.send_response(status)
            self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_HEAD = do_PUT = do_POST = handle_one

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{listener.server_port}"
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()


def judge(headers: dict[str, str]) -> tuple[int, str, str]:
    """Answer as a judge that quotes the API key."""
    message = {"role": "assistant", "content": f"no opinion, {headers['authorization']}"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "judge", "choices": [choice]}
    return 200, "application/json", json.dumps(answer)


def indiscreet_store(quoted: Sequence[str]) -> Callable[[dict[str, str]], tuple[int, str, str]]:
    """Return an answer function of a store that rejects requests and quotes everything it knows."""

    def refuse(headers: dict[str, str]) -> tuple[int, str, str]:
        told = " ".join((headers["authorization"], headers.get("x-amz-security-token", ""), headers["host"], *quoted))
        return 403, "application/xml", (
            f"<?xml version='1.0'?><Error><Code>InvalidAccessKeyId</Code><Message>not known: {told}"
            f" at {with_user_info('http://store.example')}/</Message></Error>"
        )  # fmt: skip

    return refuse


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "planted" / DATA.name
    path.parent.mkdir()
    path.write_text(lines(planted_records()), encoding="utf-8")
    return path


def test_a_run_that_is_interrupted_and_goes_on(data: Path, bucket: str, s3_server: Any, tmp_path: Path) -> None:
    """The first attempt logs to a console and gets SIGTERM; the second one logs JSON at debug level."""
    endpoint_url, output = with_user_info(s3_server.endpoint_url), f"s3://{bucket}/lora/"
    uploaded = f"s3://{bucket}/data/"
    open_storage(uploaded).upload(data, data.name)
    with serve(judge) as judging:
        told = ("--data", uploaded, "--set", "evaluation.judge_model=judge", "--set", f"evaluation.judge_base_url={judging.url}/v1")
        ended = run(
            tmp_path / "first", data, output, *told,
            log_format="console", endpoint_url=endpoint_url, until=lambda line: "checkpoint_uploaded" in line,
        )  # fmt: skip
        assert ended.code == 143, ended.err
        assert json.loads((ended.folder / "termination-log").read_text())["outcome"] == "interrupted"
        # The checkpoint exists, so the search below covers it.
        kept = [item.key for item in open_storage(output).list("runs/")]
        # whether the best weights are among them depends on how far it came
        assert {Path(key).name for key in kept} - {"best_adapter.safetensors"} == {
            "adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "lease.json", "start.json", "starts.json"
        }  # fmt: skip
        assert ended.leaks(output) == []

        ended = run(tmp_path / "second", data, output, *told, "--log-level", "debug", log_format="json", endpoint_url=endpoint_url)
        assert ended.code == 0, ended.err
        # the run used the planted key
        assert judging.authorizations == {f"Bearer {CREDENTIALS['OPENAI_API_KEY']}"}
    published = {Path(item.key).name for item in open_storage(output).list("adapters/")}
    assert {
        "manifest.json", "metrics.json", "report.html", "replies.jsonl", "README.md", "train_log.jsonl", "latest.json"
    } <= published  # fmt: skip
    assert list((ended.folder / "work").rglob("progress.json"))
    assert ended.leaks(output) == []
    # The search works, because it finds the texts in the data itself.
    fetched = (ended.folder / "work" / "data" / DATA.name).read_bytes()
    assert {found.removeprefix("data: ") for found in leaks("data", fetched)} == set(TEXTS.values())


def bad_lines() -> list[str]:
    """Return a record broken in every way that may lead a message to quote it. The report has room for all of them."""
    broken = []
    words = " ".join(TEXTS.values())
    for word in (TEXTS["input"], words):
        whole = planted_records()[0]
        reply = json.loads(whole["output"])
        for changed in (
            {**whole, word: "x"},
            {**whole, "context": {**whole["context"], "current_emotion": {"type": word, "intensity": 0.5}}},
            {**whole, "context": {**whole["context"], "current_emotion": {"type": "happy", "intensity": word}}},
            {**whole, "context": {**whole["context"], word: word}},
            {**whole, "context": word},
            {**whole, "input": [word]},
            {**whole, "input": word + "\x00"},
            {**whole, "input": word + "‮"},
            {**whole, "input": word * 30_000},
            {**whole, "instruction": {word: word}},
            {**whole, "output": word},
            {**whole, "output": json.dumps({**reply, "emotion": word})},
            {**whole, "output": json.dumps({**reply, word: 1})},
            {**whole, "output": json.dumps({"emotion": "smile"}) + word},
        ):
            broken.append(json.dumps(changed, ensure_ascii=False))
        line = json.dumps(whole, ensure_ascii=False)
        broken += [
            word,
            f'"{word}"',
            f"[{line}]",
            line + line,
            line[:-1],
            line.replace('"input": "', '"input": '),
            "{" + word + "}",
        ]
        broken += [line[:-1] + f', "{word}": 1, "{word}": 2}}', f'{{"input": {word}}}', line.replace('"', "'")]
    return broken


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_bad_lines(tmp_path: Path, s3_server: Any, log_format: str) -> None:
    path = tmp_path / "planted" / DATA.name
    path.parent.mkdir()
    broken = bad_lines()
    # the last line is truncated
    path.write_text(lines(planted_records()) + "\n".join(broken) + "\n" + lines(planted_records())[:200], encoding="utf-8")
    ended = run(
        tmp_path / "run", path, str(tmp_path / "out"), log_format=log_format, endpoint_url=with_user_info(s3_server.endpoint_url)
    )
    assert ended.code == 3, ended.err
    # the job reports every broken line
    assert all(f"{DATA.name}:{RECORDS + number}: " in ended.err for number in range(1, len(broken) + 2))
    # the name of an unknown key is shown, if it is short
    key = TEXTS["input"]
    assert [leak for leak in ended.leaks() if leak != f"stderr: {key}"] == []
    checked = subprocess.run(
        [sys.executable, "-m", "entrypoint", "validate", "--no-tokens", str(path), *(("--json",) if log_format == "json" else ())],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}, capture_output=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 3
    assert [leak for leak in leaks("validate", checked.stdout + checked.stderr) if leak != f"validate: {key}"] == []


@pytest.mark.parametrize(("log_format", "profile"), [("json", False), ("console", True)])
def test_a_store_that_refuses_and_quotes_what_it_was_told(
    data: Path, aws_environment: pytest.MonkeyPatch, tmp_path: Path, log_format: str, profile: bool
) -> None:
    known = PROFILE if profile else CREDENTIALS
    with serve(indiscreet_store(list(known.values()))) as store:
        ended = run(
            tmp_path / "run", data, "s3://bucket/lora/", "--log-level", "debug",
            log_format=log_format, endpoint_url=with_user_info(store.url), profile=profile,
        )  # fmt: skip
    assert ended.code == 6, ended.err
    key_id = PROFILE["aws_access_key_id"] if profile else CREDENTIALS["AWS_ACCESS_KEY_ID"]
    assert any(key_id in said for said in store.authorizations)
    # The job quotes the store's message without the secrets.
    assert "InvalidAccessKeyId (not known: " in ended.err
    assert urlsplit(store.url).netloc in ended.err
    assert ended.leaks() == []


@pytest.mark.parametrize(("log_format", "breakage"), [("json", "RuntimeError"), ("console", "ValueError")])
def test_a_bug_whose_message_quotes_a_record(
    data: Path, aws_environment: pytest.MonkeyPatch, tmp_path: Path, log_format: str, breakage: str
) -> None:
    ended = run(
        tmp_path / "run", data, str(tmp_path / "out"),
        log_format=log_format, endpoint_url=with_user_info("http://127.0.0.1:9"), breakage=breakage,
    )  # fmt: skip
    assert ended.code == 1, ended.err
    assert f"builtins.{breakage} (its message is left out: it may quote training text; " in ended.err
    # The log keeps the library's own message, but only the type of the exception.
    assert "a record could not be read" in ended.err
    assert "Traceback" not in ended.err
    assert ended.leaks() == []
    (kept,) = (tmp_path / "run" / "work").glob("bug-*.txt")
    said = kept.read_text(encoding="utf-8")
    assert TEXTS["input"] in said
    assert not any(secret in said for secret in SECRETS)

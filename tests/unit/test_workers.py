"""Test that several processes report on a file as one does, within bounded memory, and end with their parent."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_trainer.config import DEFAULT_LIMITS
from lora_trainer.data.checking import CheckedBatch, CheckSettings, LineBatch
from lora_trainer.data.jsonl import RawLine
from lora_trainer.data.prompt_cost import CountsTokens
from lora_trainer.data.validation import FileReport, OnProblem, check_file, write_json
from lora_trainer.data.workers import BATCHES_IN_FLIGHT, checked_batches, usable_workers
from lora_trainer.errors import ConfigError, ExitCode, HardwareError

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


class Characters:
    """A tokenizer that counts characters."""

    def count_tokens(self, texts: list[str]) -> list[int]:
        return [len(text) for text in texts]


class BreaksOnCats:
    """A tokenizer that fails on some texts, as a foreign one may."""

    def count_tokens(self, texts: list[str]) -> list[int]:
        if any("고양이" in text for text in texts):
            raise ConfigError("base.model: tokenizer.json: fails for some of the texts")
        return [1 for _ in texts]


class Ends:
    """Stands for a worker that the kernel kills, as it does when memory runs out."""

    def count_tokens(self, texts: list[str]) -> list[int]:
        if any("고양이" in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return [1 for _ in texts]


def line(
    text: str = "오! 나 금방 도착해! 어디야?", said: str = "나 도착했어", intensity: float = 0.8, blood_type: str = "A"
) -> str:
    return json.dumps(
        {
            "instruction": f"너는 {blood_type}형 친구야.",
            "context": {"summary": "", "current_emotion": {"type": "happy", "intensity": intensity}},
            "input": said,
            "output": json.dumps({"text": text, "emotion": "smile"}, ensure_ascii=False),
        },
        ensure_ascii=False,
    )


def odd_lines() -> Iterator[bytes]:
    """Yield lines with every kind of problem that depends on other lines, spread over several batches."""
    for number in range(1200):
        text = line(
            f"{number}번 버스야, 빨리 타! 어디야?", f"{number % 700}번", (number % 11) / 10, "B" if number % 90 == 7 else "A"
        )
        if number % 100 == 3:
            text = line()
        elif number % 100 == 4:
            text = line("안녕하세요! 뭐해요? 가요? 네.", f"{number}")
        elif number % 100 == 5:
            text = "{}" if number % 200 == 5 else line("오! 나 금방 도착해!! 어디야?")
        elif number % 100 == 6:
            text = "\u3000" if number % 200 == 6 else " "
        elif number % 100 == 8:
            text = line(said="?? ???? ?? ?")
        ending = "\r\n" if number in (900, 901) else "\n"
        yield ("\ufeff" if number == 1100 else "").encode() + text.encode() + ending.encode()
    yield line().encode()[:40]


@pytest.fixture(scope="module")
def odd_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("odd") / "records.jsonl"
    path.write_bytes(b"".join(odd_lines()))
    return path


def everything(path: Path, workers: int) -> tuple[str, list[str], list[str], FileReport]:
    """Return the JSON document, the records and the replies in their order, and the report."""
    out = io.StringIO()
    records: list[str] = []
    replies: list[str] = []

    def check(path: Path, on_problem: OnProblem) -> FileReport:
        return check_file(
            path,
            tokenizer=Characters(),
            max_length_tokens=150,
            workers=workers,
            on_problem=on_problem,
            on_record=lambda record: records.append(record.to_json()),
            on_reply=replies.append,
        )

    (report,) = write_json(out, [path], check)
    return out.getvalue(), records, replies, report


def test_two_workers_report_what_one_does(odd_file: Path) -> None:
    alone, together = everything(odd_file, 1), everything(odd_file, 2)
    assert together == alone
    document, records, replies, report = alone
    codes = {problem["code"] for problem in json.loads(document)["files"][0]["problems"]}
    assert codes >= {"duplicate", "near_duplicate", "missing_field", "truncated", "bom", "crlf", "lost_text", "formal_speech"}
    assert report.blank_lines == 12
    assert len(records) == len(replies) == report.records == report.style.replies


def batches_of(count: int, taken: list[int]) -> Iterator[LineBatch]:
    for number in range(count):
        taken.append(number)
        yield LineBatch([RawLine(number + 1, 0, line(said=f"{number}").encode(), ())], False)


def settings(tokenizer: CountsTokens | None = None) -> CheckSettings:
    return CheckSettings(None, DEFAULT_LIMITS, tokenizer, 1024, 0, False)


def test_only_a_window_of_the_file_is_in_memory() -> None:
    taken: list[int] = []
    results: list[CheckedBatch] = []
    for result in checked_batches(batches_of(100, taken), settings(), 2):
        results.append(result)
        assert len(taken) - len(results) < 2 * BATCHES_IN_FLIGHT
    assert [found.lines[0].number for found in results] == list(range(1, 101))


def test_a_large_file_uses_the_cores_and_a_small_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(multiprocessing.active_children())
    for _ in checked_batches(batches_of(3, []), settings(), None):
        assert set(multiprocessing.active_children()) == before
    monkeypatch.setattr("lora_trainer.data.workers.ONE_PROCESS_BYTES", 0)
    monkeypatch.setattr("lora_trainer.data.workers.usable_workers", lambda: 2)
    results = checked_batches(batches_of(3, []), settings(), None)
    assert next(results).lines[0].number == 1
    assert len(set(multiprocessing.active_children()) - before) == 2
    results.close()


def test_workers_fit_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lora_trainer.data.workers._CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert 1 <= usable_workers() <= 8
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert usable_workers() <= 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**29}\n")
    assert usable_workers() == 1


def test_what_a_worker_raises_reaches_the_caller() -> None:
    batches = [LineBatch([RawLine(1, 0, line("고양이다!").encode(), ())], False)]
    with pytest.raises(ConfigError, match="for some of the texts"):
        list(checked_batches(batches, settings(BreaksOnCats()), 2))


def test_a_killed_worker_is_one_message() -> None:
    batches = [LineBatch([RawLine(1, 0, line("고양이다!").encode(), ())], False)]
    with pytest.raises(HardwareError, match=r"one of 2 processes .* memory .* --workers 1"):
        list(checked_batches(batches, settings(Ends()), 2))


def children(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | children(child)
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the workers")
def test_no_process_outlives_the_check_but_the_resource_tracker() -> None:
    list(checked_batches(batches_of(3, []), settings(), 2))
    commands = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children(os.getpid())]
    assert not any(b"forkserver" in command for command in commands)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the workers")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_an_interruption_ends_all_processes(tmp_path: Path, ending: signal.Signals) -> None:
    path = tmp_path / "train_data_type_A.jsonl"
    path.write_text("".join(line(f"{number}번 버스야! 어디야?", f"{number}") + "\n" for number in range(60_000)), encoding="utf-8")
    command = [sys.executable, "-m", "entrypoint", "validate", "--no-tokens", "--workers", "2", str(path)]
    job = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        deadline_s = time.monotonic() + 300
        # the two workers and multiprocessing's resource tracker
        while len(workers := children(job.pid)) < 3:
            assert time.monotonic() < deadline_s
            assert job.poll() is None
            time.sleep(0.05)
        # a terminal signals the whole group; the kernel kills one process
        os.killpg(job.pid, ending) if ending is signal.SIGINT else job.kill()
        _, said = job.communicate(timeout=60)
        deadline_s = time.monotonic() + 300
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
    finally:
        job.kill()
    if ending is signal.SIGINT:
        assert said.startswith(b"interrupted: ")
        assert said.count(b"\n") == 1
        assert job.returncode == ExitCode.INTERRUPTED

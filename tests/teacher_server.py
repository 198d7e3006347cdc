"""An OpenAI-compatible chat server that answers with bundled dialogues and misbehaves on request.

Like a model, it reads the requested dialogues from the prompt and follows the JSON schema of the request. A request for a critique
gets the drafts back, repaired where the order says that a rule found something. It counts requests.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.records import TrainingRecord
from lora_trainer.generator.exemplars import exemplars
from lora_trainer.generator.teacher_orders import SUMMARY_CHARACTERS
from lora_trainer.generator.teacher_prompts import FAULTS
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

ORDER = re.compile(r"^(\d+)\. 주제: ", re.MULTILINE)
EMOTION = re.compile(r"친구의 감정: (\w+)\(.*?\) ([\d.]+)")
DRAFT = re.compile(r"^   초안: (.*)$", re.MULTILINE)
PERSONA = re.compile(r"^(AB|A|B|O)형이고", re.MULTILINE)
# the reply of the dialogue that it repeats
SAME_AGAIN = "그 얘기 자꾸 생각나네, 오늘은 어떻게 됐어?"
# A model's mistakes, one per dialogue in turn; None means no mistake.
SLIPS = (None, None, "formal", None, "three sentences", None, None, "same again", None, "not asked for", None)
# an order for a summary of several turns says this
TOLD_OVER_DAYS = "여러 번 오간 이야기"
UNUSED = "지난주에 빌려 간 장화를 수요일까지 돌려주기로 했는데 수요일에 잊었고 금요일에도 잊어서 택배로 부쳤대. 상자도 골랐대."


@dataclass
class Teacher:
    """The server's behaviour and what it has received."""

    faults: tuple[str | None, ...] = (None,)
    """Faults, one per request in turn: 429, 500, malformed, truncated, stalled, closed connection, or None."""
    slips: tuple[str | None, ...] = (None,)
    critique_faults: tuple[str | None, ...] = (None,)
    """Faults of the requests for a critique, one per request in turn."""
    verdicts: tuple[str | None, ...] = (None,)
    """What it does with drafts that no rule objects to, in turn: a fault that it finds and repairs, `no repair`, or None."""
    repairs_findings: bool = True
    ignores_summaries: bool = False
    """Whether every other draft with a summary of several turns has a reply that doesn't use it."""
    critic_model: str = "teacher"
    refuses: tuple[str, ...] = ()
    """Request fields that the server does not know."""
    fenced: bool = False
    stall_s: float = 3.0
    delay_s: float = 0.0
    api_key: str | None = None
    model: str = "teacher"
    requests: int = 0
    critiques: int = 0
    """Requests for a critique, among the requests."""
    drafts: list[dict[str, Any]] = field(default_factory=list)
    repaired: list[dict[str, Any]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    """The largest number of simultaneous requests."""
    not_before_s: float = 0.0
    """The time until which the server has told a client to wait."""
    too_early: int = 0
    url: str = ""
    _under_way: int = 0
    _dialogues: int = 0
    _told_over_days: int = 0
    _reviews: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _pool: dict[tuple[BloodType, Feeling, IntensityThird], list[TrainingRecord]] = field(default_factory=dict)

    def next_fault(self, *, is_critique: bool) -> str | None:
        with self._lock:
            faults, number = (
                (self.critique_faults, self.critiques) if is_critique else (self.faults, self.requests - self.critiques)
            )
            fault = faults[number % len(faults)]
            self.requests += 1
            self.critiques += is_critique
            self.seen[fault or "good"] += 1
            return fault

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1

    def dialogue(self, persona: BloodType, number: int, order: str) -> dict[str, Any]:
        with self._lock:
            slip = self.slips[self._dialogues % len(self.slips)]
            self._dialogues += 1
            if TOLD_OVER_DAYS in order:
                self._told_over_days += 1
                ignores_summary = self.ignores_summaries and self._told_over_days % 2 == 1
            else:
                ignores_summary = False
        drafted = self.fresh(persona, number, order)
        if slip == "same again":
            drafted["text"] = SAME_AGAIN
        elif slip == "formal":
            drafted["text"] = "정말 고생 많으셨어요."
        elif slip == "three sentences":
            drafted["text"] = "들었어. 속상했겠다. 내가 갈게."
        elif slip == "not asked for":
            drafted["number"] = 99
        elif slip == "exemplar":
            drafted["text"] = random.choice(long_exemplars(persona)) + " 진짜로"
        elif ignores_summary:
            drafted["summary"] = UNUSED
        self.drafts.append(drafted)
        return drafted

    def review(self, persona: BloodType, number: int, order: str) -> dict[str, Any]:
        with self._lock:
            verdict = self.verdicts[self._reviews % len(self.verdicts)]
            self._reviews += 1
        found = DRAFT.search(order)
        assert found
        dialogue = {"number": number, **json.loads(found[1])}
        if "규칙에 걸림" in order and self.repairs_findings:
            verdict = "answers"
        if verdict and verdict != "no repair":
            dialogue = self.fresh(persona, number, order)
            self.repaired.append(dialogue)
        fault = "grounded" if verdict == "no repair" else verdict
        return {**dialogue, "problem": "어색하다" if verdict else "", **{name: name != fault for name in FAULTS}}

    def fresh(self, persona: BloodType, number: int, order: str) -> dict[str, Any]:
        """Return a dialogue as ordered."""
        emotion = EMOTION.search(order)
        assert emotion
        feeling, third = Feeling(emotion[1]), IntensityThird.of(float(emotion[2]))
        with self._lock:
            stock = self._pool.setdefault((persona, feeling, third), [])
            if not stock:
                stock += shuffled(persona, feeling, third)
            record = stock.pop()
        summary = record.context.summary
        if TOLD_OVER_DAYS in order:
            # it takes its words from the reply, so that the reply uses it
            told = f"우리는 며칠 동안 이 얘기를 자주 했고 어젯밤에는 이런 말도 나왔어: {record.reply.text} "
            summary = (told + "그러다 밤이 깊어서 하던 얘기를 다 못 끝내고 잠이 들었어.")[: SUMMARY_CHARACTERS.stop - 1]
        return {
            "number": number,
            "summary": summary,
            "input": record.input,
            "text": record.reply.text,
            "emotion": str(record.reply.emotion),
        }


@cache
def long_exemplars(persona: BloodType) -> list[str]:
    """Return the exemplars' replies that two more syllables leave recognizable."""
    return [one.record.reply.text for one in exemplars(persona) if len(one.record.reply.text) >= 25]


def shuffled(persona: BloodType, feeling: Feeling, third: IntensityThird) -> list[TrainingRecord]:
    """Return a cell's records in an order of its own, the last ones first to be taken: in turn one that asks and one that doesn't.

    No test may fail because too few of the replies that it drew ask something.
    """
    drawn = bundled(persona, feeling, third)
    drawn = random.Random(f"{persona} {feeling} {third}").sample(drawn, len(drawn))
    asking = [record for record in drawn if "?" in record.reply.text]
    telling = [record for record in drawn if "?" not in record.reply.text]
    in_turn = [record for pair in zip(telling, asking, strict=False) for record in pair]
    paired = len(in_turn) // 2
    return [*telling[paired:], *asking[paired:], *in_turn]


@cache
def bundled(persona: BloodType, feeling: Feeling, third: IntensityThird) -> list[TrainingRecord]:
    """Return the bundled records of a cell that are no exemplars."""
    shown = {one.record.reply.text for one in exemplars(persona)}
    return [record for record in _bundled(persona, feeling, third) if record.reply.text not in shown]


def _bundled(persona: BloodType, feeling: Feeling, third: IntensityThird) -> Iterator[TrainingRecord]:
    for record in _all_bundled(persona):
        emotion = record.context.current_emotion
        if (emotion.type, IntensityThird.of(emotion.intensity)) == (feeling, third):
            yield record


@cache
def _all_bundled(persona: BloodType) -> list[TrainingRecord]:
    path = Path(__file__).parents[1] / "data" / f"train_data_type_{persona}.jsonl"
    return [line.record for line in JsonlReader(path) if line.record]


def _handler(teacher: Teacher) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

        def do_POST(self) -> None:
            with teacher.counted():
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if time.monotonic() < teacher.not_before_s:
                    teacher.too_early += 1
                if teacher.api_key and self.headers["authorization"] != f"Bearer {teacher.api_key}":
                    return self._send(401, {"error": {"message": "no such key", "type": "invalid_request_error"}})
                is_critique = '"reviews"' in body["messages"][0]["content"]
                if body["model"] != (teacher.critic_model if is_critique else teacher.model):
                    return self._send(404, {"error": {"message": "no such model", "type": "invalid_request_error"}})
                teacher.bodies.append(body)
                if unknown := [name for name in teacher.refuses if name in body]:
                    return self._send(400, {"error": {"message": f"unknown: {unknown}", "type": "invalid_request_error"}})
                time.sleep(teacher.delay_s)
                return self._answer(body, teacher.next_fault(is_critique=is_critique), is_critique=is_critique)

        def _answer(self, body: dict[str, Any], fault: str | None, *, is_critique: bool) -> None:
            if fault == "429":
                teacher.not_before_s = time.monotonic() + 0.9
                return self._send(429, {"error": {"message": "slow down", "type": "rate_limit"}}, {"retry-after": "1"})
            if fault == "500":
                return self._send(500, {"error": {"message": "oops", "type": "server_error"}})
            if fault == "401":
                return self._send(401, {"error": {"message": "the key has expired", "type": "invalid_request_error"}})
            if fault == "stall":
                time.sleep(teacher.stall_s)
            said = self._content(body, is_critique=is_critique)
            if fault == "half the reviews":
                said["reviews"] = said["reviews"][1::2]
            content = json.dumps(said, ensure_ascii=False)
            if teacher.fenced:
                content = f"```json\n{content}\n```"
            if fault == "malformed":
                content = content[:-7] + "]]"
            answer = {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": content},
                        "finish_reason": "length" if fault == "cut off" else "stop",
                    }
                ],
                "usage": {"prompt_tokens": 1000 if is_critique else 100, "completion_tokens": 50, "total_tokens": 150},
            }
            if fault == "cut connection":
                data = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return None
            return self._send(200, answer)

        def _content(self, body: dict[str, Any], *, is_critique: bool) -> dict[str, list[dict[str, Any]]]:
            persona = PERSONA.search(body["messages"][0]["content"])
            assert persona
            _, *parts = ORDER.split(body["messages"][1]["content"])
            say = teacher.review if is_critique else teacher.dialogue
            said = [say(BloodType(persona[1]), int(number), order) for number, order in zip(parts[::2], parts[1::2], strict=True)]
            return {"reviews" if is_critique else "dialogues": said}

        def _send(self, status: int, document: object, headers: dict[str, str] | None = None) -> None:
            data = json.dumps(document).encode()
            try:
                self.send_response(status)
                for name, value in {
                    "content-type": "application/json",
                    "content-length": str(len(data)),
                    **(headers or {}),
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                # the client gave up on a stalled request
                self.close_connection = True

    return Handler


@contextmanager
def serve(teacher: Teacher) -> Iterator[Teacher]:
    """Serve `teacher` on a free port on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(teacher))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    teacher.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield teacher
    finally:
        server.shutdown()
        server.server_close()

"""An OpenAI-compatible chat server that composes dialogues from the grammar and misbehaves on request.

Like a model, it reads the requested dialogues from the prompt and follows the JSON schema of the request. It counts requests.

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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lora_trainer.data.records import TrainingRecord
from lora_trainer.generator.collector import RecordCollector
from lora_trainer.generator.compose import compose
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

ORDER = re.compile(r"^(\d+)\. 주제: .*친구의 감정: (\w+) ([\d.]+)", re.MULTILINE)
PERSONA = re.compile(r"'(AB|A|B|O)형")
# the reply of the dialogue that it repeats
SAME_AGAIN = "그 얘기 자꾸 생각나네, 오늘은 어떻게 됐어?"
# A model's mistakes, one per dialogue in turn; None means no mistake.
SLIPS = (None, None, "formal", None, "three sentences", None, None, "same again", None, "not asked for", None)


@dataclass
class Teacher:
    """The server's behaviour and what it has received."""

    faults: tuple[str | None, ...] = (None,)
    """Faults, one per request in turn: 429, 500, malformed, truncated, stalled, closed connection, or None."""
    slips: tuple[str | None, ...] = (None,)
    refuses: tuple[str, ...] = ()
    """Request fields that the server does not know."""
    fenced: bool = False
    stall_s: float = 3.0
    delay_s: float = 0.0
    api_key: str | None = None
    model: str = "teacher"
    requests: int = 0
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
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _pool: dict[tuple[BloodType, Feeling, IntensityThird], list[TrainingRecord]] = field(default_factory=dict)

    def next_fault(self) -> str | None:
        with self._lock:
            fault = self.faults[self.requests % len(self.faults)]
            self.requests += 1
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

    def dialogue(self, persona: BloodType, number: int, feeling: Feeling, third: IntensityThird) -> dict[str, object]:
        with self._lock:
            slip = self.slips[self._dialogues % len(self.slips)]
            self._dialogues += 1
            stock = self._pool.get((persona, feeling, third))
            if not stock:
                collector = RecordCollector(persona)
                compose(collector, [(feeling, third)] * 25, random.randrange(1 << 30))
                stock = self._pool[persona, feeling, third] = collector.accepted
            record = stock.pop()
        text = SAME_AGAIN if slip == "same again" else record.reply.text
        if slip == "formal":
            text = "정말 고생 많으셨어요."
        elif slip == "three sentences":
            text = "들었어. 속상했겠다. 내가 갈게."
        return {
            "number": 99 if slip == "not asked for" else number,
            "summary": record.context.summary,
            "input": record.input,
            "text": text,
            "emotion": str(record.reply.emotion),
        }


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
                if body["model"] != teacher.model:
                    return self._send(404, {"error": {"message": "no such model", "type": "invalid_request_error"}})
                teacher.bodies.append(body)
                if unknown := [name for name in teacher.refuses if name in body]:
                    return self._send(400, {"error": {"message": f"unknown: {unknown}", "type": "invalid_request_error"}})
                time.sleep(teacher.delay_s)
                return self._answer(body, teacher.next_fault())

        def _answer(self, body: dict[str, Any], fault: str | None) -> None:
            if fault == "429":
                teacher.not_before_s = time.monotonic() + 0.9
                return self._send(429, {"error": {"message": "slow down", "type": "rate_limit"}}, {"retry-after": "1"})
            if fault == "500":
                return self._send(500, {"error": {"message": "oops", "type": "server_error"}})
            if fault == "stall":
                time.sleep(teacher.stall_s)
            content = json.dumps({"dialogues": list(self._dialogues(body))}, ensure_ascii=False)
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
                "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150},
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

        def _dialogues(self, body: dict[str, Any]) -> Iterator[dict[str, object]]:
            persona = PERSONA.search(body["messages"][0]["content"])
            assert persona
            for number, feeling, intensity in ORDER.findall(body["messages"][1]["content"]):
                third = IntensityThird.of(float(intensity))
                yield teacher.dialogue(BloodType(persona[1]), int(number), Feeling(feeling), third)

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

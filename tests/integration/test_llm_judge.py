"""Test the judge over HTTP: the evaluation asks it in both orders, counts correctly, and survives all of its failures."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from made_metrics import made_run

from lora_trainer.config import EvaluationConfig
from lora_trainer.errors import ConfigError
from lora_trainer.evaluate import llm_judge as judge
from lora_trainer.evaluate.metrics import JudgeMetrics
from lora_trainer.evaluate.rules import ScoredReply
from lora_trainer.persona.vocabulary import BloodType

pytestmark = pytest.mark.integration


@dataclass
class Server:
    """A chat server that answers each question with `opinion(question)`: content, or an HTTP status."""

    opinion: Callable[[str], str | int]
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)


@contextmanager
def serve(opinion: Callable[[str], str | int]) -> Iterator[Server]:
    """Start a chat server on loopback."""
    server = Server(opinion)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.bodies.append(body)
            server.keys.add(self.headers["authorization"])
            found = server.opinion(body["messages"][1]["content"])
            status = found if isinstance(found, int) else 200
            message = {"role": "assistant", "content": found if isinstance(found, str) else ""}
            answer: dict[str, Any] = {
                "id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
            }  # fmt: skip
            data = json.dumps(answer if status == 200 else {"error": {"message": "no"}}).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{listener.server_port}/v1"
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()


@pytest.fixture(scope="module")
def replies() -> list[ScoredReply]:
    """Return replies of the adapter and the base to 20 prompts, each at two of four intensities."""
    return list(made_run(BloodType.A, prompts=20, flaws=0.0).replies)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "RETRIES", 0)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-private")
    for variable in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)


def ask(server: Server, replies: list[ScoredReply]) -> JudgeMetrics:
    found = judge.judge_replies(EvaluationConfig(judge_model="judge", judge_base_url=server.url), BloodType.A, replies)
    assert found is not None
    return found


def prefer(better: set[str]) -> Callable[[str], str]:
    """Prefer the first reply if it is one of `better`, otherwise the second."""

    def opinion(question: str) -> str:
        first = question.split("[first]\n")[1].split("\n\n[second]")[0]
        return json.dumps({"winner": "first" if first in better else "second"})

    return opinion


def test_both_orders_are_asked_and_a_clear_preference_wins(replies: list[ScoredReply]) -> None:
    adapters = {reply.reply for reply in replies if reply.model == "adapter"}
    with serve(prefer(adapters)) as server:
        found = ask(server, replies)
    assert (found.wins, found.ties, found.losses, found.unanswered) == (20, 0, 0, 0)
    assert found.win_rate.value == 1
    assert found.order_agreement == 1
    assert (found.requests, found.prompt_tokens, found.completion_tokens) == (40, 280, 120)
    assert server.keys == {"Bearer sk-private"}
    questions = [body["messages"][1]["content"] for body in server.bodies]
    # the judge saw every pair in both orders and no question twice
    assert len(set(questions)) == 40
    # the intensities alternate from prompt to prompt
    shown = {line.split()[-1] for question in questions for line in question.splitlines() if line.startswith("The friend feels")}
    assert shown == {"0.1", "0.4", "0.7", "1"}
    assert server.bodies[0]["response_format"]["json_schema"]["schema"]["properties"]["winner"]["enum"] == [
        "first",
        "second",
        "tie",
    ]
    # the report prints the rubric that the judge received
    assert {body["messages"][0]["content"] for body in server.bodies} == {found.rubric}


def test_a_judge_that_looks_at_the_order_alone_says_nothing(replies: list[ScoredReply]) -> None:
    with serve(lambda question: '{"winner": "first"}') as server:
        found = ask(server, replies)
    assert (found.wins, found.ties, found.losses) == (0, 20, 0)
    assert found.order_agreement == 0
    assert found.win_rate.value == 0.5


@pytest.mark.parametrize("answer", ["no JSON", '{"winner": "third"}', "", 500, 429, 401])
def test_a_judge_without_an_opinion_is_counted_and_ends_nothing(answer: str | int, replies: list[ScoredReply]) -> None:
    with serve(lambda question: answer) as server:
        found = ask(server, replies)
    assert found.unanswered == 20
    assert found.win_rate.of == 0
    assert (found.win_rate.lower, found.win_rate.upper) == (None, None)


def test_half_an_answer_leaves_the_pair_out(replies: list[ScoredReply]) -> None:
    count = iter(range(1000))
    with serve(lambda question: 500 if next(count) % 2 else '{"winner": "tie"}') as server:
        found = ask(server, replies)
    assert found.unanswered + found.ties == 20
    assert found.unanswered > 0


def test_nobody_there_ends_nothing_either(replies: list[ScoredReply]) -> None:
    found = judge.judge_replies(EvaluationConfig(judge_model="judge", judge_base_url="http://127.0.0.1:9/v1"), BloodType.A, replies)
    assert found is not None
    assert found.unanswered == 20


@pytest.mark.parametrize(
    ("status", "said"), [(401, "set OPENAI_API_KEY"), (404, "evaluation.judge_model"), (400, "response_format")]
)
def test_a_judge_that_refuses_is_found_before_training(status: int, said: str) -> None:
    with serve(lambda question: status) as server, pytest.raises(ConfigError, match="judge_base_url") as caught:
        judge.check_judge(EvaluationConfig(judge_model="judge", judge_base_url=server.url))
    assert said in str(caught.value)
    assert "sk-private" not in str(caught.value)


def test_without_a_judge_nothing_is_asked(replies: list[ScoredReply]) -> None:
    judge.check_judge(EvaluationConfig())
    assert judge.judge_replies(EvaluationConfig(), BloodType.A, replies) is None

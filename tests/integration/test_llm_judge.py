"""Test the judge over HTTP: the evaluation asks it in both orders, counts correctly, and survives all of its failures."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_metrics import made_run

from lora_trainer.config import EvaluationConfig, GatesConfig
from lora_trainer.errors import ConfigError
from lora_trainer.evaluate import llm_judge as judge
from lora_trainer.evaluate.gates import decide
from lora_trainer.evaluate.metrics import JudgeMetrics
from lora_trainer.evaluate.rules import ScoredReply
from lora_trainer.evaluate.sense import SenseJudge
from lora_trainer.evaluate.sense_endpoint import examine_endpoint
from lora_trainer.evaluate.sense_examples import SenseSet, bundled_examples
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


# -- the same server as a judge of sense -------------------------------------------------------------


@pytest.fixture(scope="module")
def few() -> SenseSet:
    """Return the replies to 80 of the labelled situations."""
    bundled = bundled_examples()
    chosen = set(sorted(bundled.folds.situations)[::5][:80])
    return SenseSet(tuple(example for example in bundled.examples if example.situation in chosen), bundled.folds)


def knows(sense_set: SenseSet) -> Callable[[str], str]:
    """Judge as the labels do; an exchanged reply is good elsewhere, so the message counts, too."""
    good = {(example.input, example.reply) for example in sense_set.examples if example.is_good}

    def opinion(question: str) -> str:
        message = question.split("Message: ")[1].split("\n\n[reply]\n")[0]
        reply = question.split("[reply]\n")[1].split("\n\nHow probable")[0]
        return json.dumps({"sense": 0.9 if (message, reply) in good else 0.2})

    return opinion


def test_an_endpoint_that_knows_sense_is_fit_and_judges_replies(few: SenseSet, replies: list[ScoredReply], tmp_path: Path) -> None:
    asked_for_examples = len(few.examples)
    with serve(knows(few)) as server:
        config = EvaluationConfig(judge_model="judge", judge_base_url=server.url)
        sense = SenseJudge(few, NoBase(), config, "tiny", "sha256:1", tmp_path)
        judges = sense.examine()
        assert len(server.bodies) == asked_for_examples
        server.opinion = lambda question: json.dumps({"sense": 0.9})
        found, _ = sense.judge(judges, replies, BloodType.A)
        # a later run with the same model and examples asks about the replies alone
        again = SenseJudge(few, NoBase(), config, "tiny", "sha256:1", tmp_path).examine()
    assert judges.chosen is not None
    assert again.examinations == judges.examinations
    assert (judges.chosen.judge, judges.chosen.model) == ("endpoint", "judge")
    assert (found.status, found.judged_by) == ("judged", "endpoint")
    assert found.sense is not None
    assert found.sense.accepted == found.sense.of == 40
    assert found.sense.value == 1
    assert found.sense.lower < 1
    assert len(server.bodies) == asked_for_examples + 40
    schema = server.bodies[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"] == {"sense": {"type": "number"}}
    assert server.keys == {"Bearer sk-private"}


@pytest.mark.parametrize("answer", ['{"sense": 0.5}', '{"sense": 7}', "no idea", 500])
def test_an_endpoint_that_tells_nothing_is_unfit(answer: str | int, few: SenseSet) -> None:
    with serve(lambda question: answer) as server:
        found = examine_endpoint(EvaluationConfig(judge_model="judge", judge_base_url=server.url), few)
    assert not found.fit
    assert found.unanswered == (0 if answer == '{"sense": 0.5}' else len(few.examples))


def test_an_endpoint_that_does_not_answer_holds_nobody_up(few: SenseSet, replies: list[ScoredReply], tmp_path: Path) -> None:
    """A run is not ended and not held: the judge stops asking, says why, and the base is asked instead."""
    with serve(lambda question: 500) as server:
        config = EvaluationConfig(judge_model="judge", judge_base_url=server.url)
        sense = SenseJudge(few, Unknowing(), config, "tiny", "sha256:1", tmp_path)
        judges = sense.examine()
        asked = len(server.bodies)
    assert asked < 40
    assert judges.unexamined["endpoint"].endswith("requests failed (http_500)")
    assert [found.judge for found in judges.examinations] == ["probe", "question"]
    found = sense.judge(judges, replies, BloodType.A).metrics
    assert found.status == "not_judged"
    assert "endpoint: " in found.reason
    assert "http_500" in found.reason


def test_an_interrupted_examination_by_an_endpoint_resumes(few: SenseSet, tmp_path: Path) -> None:
    right = knows(few)
    asked = 0

    def fails_later(question: str) -> str | int:
        nonlocal asked
        asked += 1
        return right(question) if asked <= 150 else 503

    with serve(fails_later) as server:
        config = EvaluationConfig(judge_model="judge", judge_base_url=server.url)
        sense = SenseJudge(few, Unknowing(), config, "tiny", "sha256:1", tmp_path)
        assert "endpoint" in sense.examine().unexamined
        server.opinion, server.bodies[:] = right, []
        judges = sense.examine()
        assert len(server.bodies) == len(few.examples) - 150
    assert judges.chosen is not None
    assert judges.chosen.judge == "endpoint"


def erring(sense_set: SenseSet, good: set[tuple[str, str]]) -> Callable[[str], str]:
    """Judge as the labels do, and a reply to a message that has none by `good`; wrong about every twentieth reply."""
    labelled = knows(sense_set)
    known = {example.input for example in sense_set.examples}

    def opinion(question: str) -> str:
        message = question.split("Message: ")[1].split("\n\n[reply]\n")[0]
        reply = question.split("[reply]\n")[1].split("\n\nHow probable")[0]
        right = json.loads(labelled(question))["sense"] if message in known else 0.9 if (message, reply) in good else 0.2
        errs = zlib.crc32(question.encode()) % 20 == 0
        return json.dumps({"sense": 1.1 - right if errs else right})

    return opinion


def test_replies_that_answer_another_message_pass_every_gate_but_that_of_sense(few: SenseSet, tmp_path: Path) -> None:
    """Sabotage: each reply is as good as before by its form, but stands behind another prompt."""
    made = made_run(BloodType.A, flaws=0.0)
    adapter = [reply for reply in made.replies if (reply.model, reply.decoding) == ("adapter", "greedy")][:120]
    turned = adapter[31:] + adapter[:31]
    shuffled = [
        asked.model_copy(update={"reply": given.reply, "text": given.text, "emotion": given.emotion})
        for asked, given in zip(adapter, turned, strict=True)
    ]
    good = {(reply.input, str(reply.text)) for reply in adapter}
    verdicts = {}
    with serve(erring(few, good)) as server:
        config = EvaluationConfig(judge_model="judge", judge_base_url=server.url)
        sense = SenseJudge(few, NoBase(), config, "tiny", "sha256:1", tmp_path)
        judges = sense.examine()
        for name, replies in (("own", adapter), ("shuffled", shuffled)):
            metrics = sense.judge(judges, replies, BloodType.A).metrics
            verdicts[name] = decide(made.metrics.evaluation.model_copy(update={"sense": metrics}), GatesConfig(win_rate=None))
    assert judges.chosen is not None
    assert judges.chosen.sensitivity.value < 1
    missed = {name: [gate.name for gate in verdict.gates if not gate.passed] for name, verdict in verdicts.items()}
    assert "sense" not in missed["own"]
    assert missed["shuffled"] == [*missed["own"], "sense"]
    gate = next(gate for gate in verdicts["shuffled"].gates if gate.name == "sense")
    assert gate.value < 0.2
    assert {verdict.sense for verdict in verdicts.values()} == {"judged"}


class Unknowing:
    """A base whose hidden states tell nothing."""

    def base_reply_features(self, conversations: Sequence[Any], replies: Sequence[str], batch_size: int) -> Any:
        return np.random.default_rng(1).normal(size=(len(replies), 8)).astype(np.float32)

    def base_word_logits(self, conversations: Sequence[Any], words: Sequence[str], batch_size: int) -> Any:
        return np.random.default_rng(1).normal(size=(len(conversations), 2)).astype(np.float32)


class NoBase:
    """A base that nobody may ask: the endpoint comes first."""

    def base_reply_features(self, *_: object) -> Any:
        raise AssertionError("the base was asked")

    base_word_logits = base_reply_features

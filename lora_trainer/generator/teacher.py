"""The teacher engine: dialogues asked of any server that speaks OpenAI's chat API (vLLM, transformers serve, OpenAI).

A request asks for a few dialogues by structured outputs, each with a family, a feeling and an intensity given. What comes
back goes through the same intake as everything else; what is refused is counted and asked again. Every record taken is on
disk before the next is looked at, so a run that is cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from lora_trainer import logs
from lora_trainer.config import DEFAULT_LIMITS
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.records import TrainingRecord
from lora_trainer.errors import ConfigError, DataError, StorageError
from lora_trainer.generator.intake import INTENSITIES, QUESTION_RATE, Cell, Intake, wanted_cells
from lora_trainer.persona.specs import PersonaSpec, persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, IntensityThird

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletion

TEACHER_PROMPT_VERSION: Final = 1
"""Raised when the words below change: a checkpoint goes on only under the prompt it was begun with."""

MAX_FAILED_IN_A_ROW: Final = 5
"""Requests that failed after the client's own retries, before the server counts as gone."""

MAX_FRUITLESS_IN_A_ROW: Final = 40
"""Answers without one record that could be taken, before the model counts as unable."""

_TOKENS_PER_DIALOGUE: Final = 300

# how servers are asked, in turn, until one way is not refused (HTTP 400 or 422): vLLM takes the first, OpenAI's newer models
# know the limit by its other name only, and some servers know no structured outputs (transformers serve ignores them)
_WAYS: Final = (("max_tokens", True), ("max_completion_tokens", True), ("max_tokens", False), ("max_completion_tokens", False))
_LONGEST_PAUSE_S: Final = 600.0
_STRENGTH: Final = {
    IntensityThird.LOW: "약하게, 담담하게",
    IntensityThird.MIDDLE: "보통으로",
    IntensityThird.HIGH: "강하게, 터져 나오게",
}


class TeacherSettings(BaseModel):
    """Where the teacher is and how it is asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str
    model: str
    api_key: SecretStr
    concurrency: int = 8
    """Requests under way at once."""
    dialogues_per_request: int = 4
    request_timeout_s: float = 120.0
    """Without an answer for this long a request counts as stalled and is sent again."""
    max_retries: int = 5
    """The client's own, for 408, 409, 429, 5xx and broken connections: exponential, with jitter, Retry-After honoured."""
    temperature: float = 1.0


class _Dialogue(BaseModel):
    model_config = ConfigDict(extra="forbid")

    number: int
    summary: str
    input: str
    text: str
    emotion: Expression


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    dialogues: list[_Dialogue]


@dataclass(frozen=True, slots=True)
class Order:
    """One dialogue as it is asked for."""

    cell: Cell
    intensity: float
    family: str
    asks: bool


@dataclass(slots=True)
class TeacherUsage:
    """What a run cost so far; a resumed run counts from its resumption."""

    requests: int = 0
    """HTTP requests, the client's retries included."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Requests that failed for good, by kind."""
    resumed_records: int = 0


@cache
def families() -> dict[str, str]:
    """The situation families: name and Korean title."""
    text = resources.files("lora_trainer.generator").joinpath("families.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


class Checkpoint:
    """The records taken so far, one a line, each written through to the disk before `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, work_dir: Path, blood_type: BloodType, count: int, seed: int, settings: TeacherSettings) -> Checkpoint:
        """The checkpoint of this order: the same one for the same persona, count, seed, model and prompt."""
        order = json.dumps(
            [TEACHER_PROMPT_VERSION, blood_type, count, seed, settings.base_url, settings.model, settings.temperature]
        )
        return cls(work_dir / "generate" / f"{blood_type}-{sha256(order.encode()).hexdigest()[:16]}.jsonl")

    def load(self) -> list[TrainingRecord]:
        """What an interrupted run had taken. A last line that was cut off is removed from the file."""
        if not self.path.exists():
            return []
        whole = self.path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end != len(whole):
            with self.path.open("r+b") as file:
                file.truncate(end)
        if not end:
            return []
        records = [line.record for line in JsonlReader(self.path)]
        if None in records:
            raise DataError(f"{self.path}: got lines that are no records, expected a checkpoint of 'generate'; remove it")
        return [record for record in records if record is not None]

    def append(self, record: TrainingRecord) -> None:
        """Add one record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(record.to_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """The output is there, and this is no longer needed."""
        self.path.unlink(missing_ok=True)


class Teacher:
    """Asks for records until `count` are taken."""

    def __init__(self, settings: TeacherSettings, intake: Intake, checkpoint: Checkpoint, seed: int) -> None:
        self.usage = TeacherUsage()
        self._settings, self._intake, self._checkpoint = settings, intake, checkpoint
        self._rng = random.Random(f"{seed}:{intake.blood_type}:teacher")
        self._families = list(families())
        self._failed_in_a_row = self._fruitless_in_a_row = 0
        self._way = 0
        self._pause_until_s = 0.0
        self._stopping = threading.Event()

    def generate(self, count: int, on_record: Callable[[TrainingRecord], None] | None = None) -> None:
        """Take `count` records into the intake, those of the checkpoint first.

        Raises `ConfigError` when the server refuses what is asked (key, model, request), `StorageError` when it can't be
        reached, and `DataError` when nothing that the model writes can be taken. What was taken stays in the checkpoint.
        """
        missing = self._resume(wanted_cells(count, self._rng))
        if on_record:
            for record in self._intake.taken:
                on_record(record)
        client = self._client()
        # not as a context manager: its end would wait for requests that are under way, minutes on a slow model
        pool = ThreadPoolExecutor(self._settings.concurrency, thread_name_prefix="teacher")
        under_way: dict[Future[_Reply], Sequence[Order]] = {}
        try:
            while missing or under_way:
                while missing and len(under_way) < self._settings.concurrency:
                    orders = self._orders(missing)
                    under_way[pool.submit(self._request, client, orders)] = orders
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    asked = under_way.pop(future)
                    missing.extend(self._receive(future.result(), asked, on_record))
        finally:
            # whatever ended this: nothing more is asked for, and threads that wait wake up
            self._stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _resume(self, wanted: list[Cell]) -> list[Cell]:
        """The cells that the checkpoint does not have yet."""
        missing = Counter(wanted)
        for record in self._checkpoint.load():
            cell = (record.context.current_emotion.type, IntensityThird.of(record.context.current_emotion.intensity))
            if missing[cell] and self._intake.take(record):
                missing[cell] -= 1
                self.usage.resumed_records += 1
        return [cell for cell in wanted if _take_one(missing, cell)]

    def _orders(self, missing: list[Cell]) -> list[Order]:
        cells = [missing.pop() for _ in range(min(self._settings.dialogues_per_request, len(missing)))]
        names = self._rng.sample(self._families, len(cells))
        return [
            Order(cell, self._rng.choice(INTENSITIES[cell[1]]), name, self._rng.random() < QUESTION_RATE)
            for cell, name in zip(cells, names, strict=True)
        ]

    def _client(self) -> OpenAI:
        from openai import OpenAI

        settings = self._settings
        return OpenAI(
            base_url=settings.base_url,
            api_key=settings.api_key.get_secret_value(),
            timeout=settings.request_timeout_s,
            max_retries=settings.max_retries,
        )

    def _request(self, client: OpenAI, orders: Sequence[Order]) -> _Reply:
        """One request, in a thread of its own. Fails only in ways that `_receive` knows."""
        import openai

        while (left_s := self._pause_until_s - time.monotonic()) > 0:
            if self._stopping.wait(left_s):
                return _Reply(failure="stopped")
        way = self._way
        limit, is_structured = _WAYS[way]
        more: dict[str, Any] = {limit: _TOKENS_PER_DIALOGUE * len(orders)}
        if is_structured:
            schema = {"name": "dialogues", "strict": True, "schema": answer_schema(len(orders))}
            more["response_format"] = {"type": "json_schema", "json_schema": schema}
        try:
            raw = client.chat.completions.with_raw_response.create(
                model=self._settings.model,
                messages=[
                    {"role": "system", "content": system_prompt(persona_spec(self._intake.blood_type))},
                    {"role": "user", "content": user_prompt(orders, self._intake.blood_type)},
                ],
                temperature=self._settings.temperature,
                **more,
            )
            return _Reply(raw.parse(), requests=1 + raw.retries_taken)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            return _Reply(failure="refused", fatal=f"does not accept the API key (HTTP {error.status_code}); set OPENAI_API_KEY")
        except openai.NotFoundError:
            return _Reply(
                failure="refused",
                fatal=f"has no model {self._settings.model!r} at this URL (HTTP 404); check --model, and that it ends in /v1",
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return _Reply(
                failure="refused",
                fatal=f"refuses every way of asking (HTTP {error.status_code}); is it a chat completions API?",
                refused_way=way,
            )
        except openai.RateLimitError as error:
            return _Reply(failure="rate_limited", pause_s=_retry_after_s(error), requests=1 + self._settings.max_retries)
        except openai.APITimeoutError:
            return _Reply(failure="stalled", requests=1 + self._settings.max_retries)
        except openai.APIConnectionError:
            return _Reply(failure="connection", requests=1 + self._settings.max_retries)
        except openai.APIStatusError as error:
            return _Reply(failure=f"http_{error.status_code}", requests=1 + self._settings.max_retries)
        except (openai.APIError, ValueError):
            # an answer that is no chat completion; ValueError: what the parser makes of it
            return _Reply(failure="not_a_completion", requests=1)

    def _receive(self, reply: _Reply, orders: Sequence[Order], on_record: Callable[[TrainingRecord], None] | None) -> list[Cell]:
        """Take what can be taken of an answer; gives the cells that have to be asked for again."""
        self.usage.requests += reply.requests
        where = f"{self._settings.base_url} (--base-url)"
        if reply.refused_way is not None and reply.refused_way + 1 < len(_WAYS):
            if reply.refused_way == self._way:
                self._way += 1
                limit, is_structured = _WAYS[self._way]
                logs.get_logger().warning("teacher_asked_otherwise", limit=limit, structured_outputs=is_structured)
            return [order.cell for order in orders]
        if reply.fatal:
            raise ConfigError(f"{where}: {reply.fatal}")
        if reply.failure:
            self.usage.failures[reply.failure] += 1
            # requests that were under way when the server said to wait are told so too: one refusal, not many
            is_told_already = reply.failure == "rate_limited" and time.monotonic() < self._pause_until_s
            self._failed_in_a_row += not is_told_already
            self._pause_until_s = max(self._pause_until_s, time.monotonic() + min(reply.pause_s, _LONGEST_PAUSE_S))
            logs.get_logger().warning("teacher_request_failed", kind=reply.failure, in_a_row=self._failed_in_a_row)
            if self._failed_in_a_row >= MAX_FAILED_IN_A_ROW:
                raise StorageError(
                    f"{where}: {self._failed_in_a_row} requests in a row failed, the last one by {reply.failure}, each after "
                    f"{self._settings.max_retries} retries; {len(self._intake.taken):,} records are kept in "
                    f"{self._checkpoint.path}: run the same command again to go on"
                )
            return [order.cell for order in orders]
        self._failed_in_a_row = 0
        before = len(self._intake.taken)
        left = self._take(reply.completion, orders, on_record)
        self._fruitless_in_a_row = 0 if len(self._intake.taken) > before else self._fruitless_in_a_row + 1
        if self._fruitless_in_a_row >= MAX_FRUITLESS_IN_A_ROW:
            reasons = ", ".join(f"{reason} {times:,}" for reason, times in self._intake.rejects.most_common(5))
            raise DataError(
                f"{where}: {self._fruitless_in_a_row} answers in a row without one record that could be taken ({reasons}), "
                f"expected a model that writes short Korean 반말 as asked; try another model. {len(self._intake.taken):,} records "
                f"are kept in {self._checkpoint.path}"
            )
        return left

    def _take(
        self, completion: ChatCompletion | None, orders: Sequence[Order], on_record: Callable[[TrainingRecord], None] | None
    ) -> list[Cell]:
        missing = dict(enumerate(orders, 1))
        for dialogue in self._dialogues(completion):
            order = missing.get(dialogue.number)
            if order is None:
                self._intake.rejects["not_asked_for"] += 1
            elif (record := self._record(dialogue, order)) and self._intake.take(record):
                del missing[dialogue.number]
                self._checkpoint.append(record)
                if on_record:
                    on_record(record)
        return [order.cell for order in missing.values()]

    def _dialogues(self, completion: ChatCompletion | None) -> list[_Dialogue]:
        choice = completion.choices[0] if completion and completion.choices else None
        if completion and completion.usage:
            self.usage.prompt_tokens += completion.usage.prompt_tokens
            self.usage.completion_tokens += completion.usage.completion_tokens
        if choice is None or not choice.message.content:
            self._intake.rejects["no_answer"] += 1
            return []
        if choice.finish_reason == "length":
            self._intake.rejects["cut_off"] += 1
            return []
        try:
            return _Answer.model_validate_json(_unfenced(choice.message.content)).dialogues
        except ValidationError as error:
            self._intake.rejects["not_json" if error.errors()[0]["type"] == "json_invalid" else "not_the_schema"] += 1
            return []

    def _record(self, dialogue: _Dialogue, order: Order) -> TrainingRecord | None:
        try:
            return TrainingRecord.model_validate(
                {
                    "instruction": persona_spec(self._intake.blood_type).instruction,
                    "context": {
                        "summary": dialogue.summary.strip(),
                        "current_emotion": {"type": order.cell[0], "intensity": order.intensity},
                    },
                    "input": dialogue.input.strip(),
                    "output": {"text": dialogue.text.strip(), "emotion": dialogue.emotion},
                },
                # as the reader will, when the file is trained on
                context=DEFAULT_LIMITS,
            )
        except ValidationError:
            self._intake.rejects["not_a_record"] += 1
            return None


@dataclass(frozen=True, slots=True)
class _Reply:
    """What a request came to: a completion, or a failure by kind, for good when `fatal` says why."""

    completion: ChatCompletion | None = None
    failure: str = ""
    fatal: str = ""
    pause_s: float = 0.0
    requests: int = 1
    refused_way: int | None = None
    """The way of `_WAYS` that the server refused."""


def _unfenced(text: str) -> str:
    """`text` without the Markdown fence that models put around JSON where nothing holds them to it."""
    return text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")


def _take_one(left: Counter[Cell], cell: Cell) -> bool:
    if not left[cell]:
        return False
    left[cell] -= 1
    return True


def _retry_after_s(error: Any) -> float:
    try:
        return max(0.0, float(error.response.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0


# --- the words -----------------------------------------------------------------------------------------


def answer_schema(count: int) -> dict[str, Any]:
    """The JSON Schema of an answer with `count` dialogues, in the subset that strict structured outputs take."""
    text = {"type": "string"}
    properties: dict[str, Any] = {
        "number": {"type": "integer"},
        "summary": text,
        "input": text,
        "text": text,
        "emotion": {"type": "string", "enum": list(Expression)},
    }
    dialogue = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    dialogues = {"type": "array", "items": dialogue, "minItems": count, "maxItems": count}
    return {
        "type": "object",
        "properties": {"dialogues": dialogues},
        "required": ["dialogues"],
        "additionalProperties": False,
    }


def system_prompt(spec: PersonaSpec) -> str:
    """The persona's specification, and what a dialogue has to be, for the teacher model."""
    feelings = "\n".join(f"- {feeling}: {how}" for feeling, how in spec.feelings.items())
    emoji = "\n".join(f"- {feeling}: {' '.join(signs)}" for feeling, signs in spec.emoji.by_feeling.items())
    usual = ", ".join(f"{third} {spec.emoji.usual[third][0]}~{spec.emoji.usual[third][1]}개" for third in IntensityThird)
    lines = [
        f"너는 한국어 메신저 대화를 쓰는 작가야. '{spec.blood_type}형 {spec.name}' 친구의 학습용 대화를 쓴다.",
        "",
        f"말투: {spec.tone}",
        f"자주 하는 반응: {', '.join(spec.reactions)}",
        "말버릇:",
        *(f"- {phrase}" for phrase in spec.phrases),
        f"되묻는 법: {spec.asking_back} 예: {' / '.join(spec.asks)}",
        "감정마다 이렇게 한다:",
        feelings,
        f"이모지 개수 (감정 세기별): {usual}. 감정별 이모지 (상황에 어울리는 다른 이모지도 괜찮다):",
        emoji,
        "절대 하지 않는 것:",
        *(f"- {line}" for line in spec.never),
        "이런 대사를 쓴다:",
        *(f"- {line}" for line in spec.examples),
        "",
        "규칙:",
        "- summary: 지금까지의 상황을 반말 한 문장으로. 없으면 빈 문자열.",
        "- input: 상대가 보낸 메시지. 길이와 말투를 다양하게 (오타, ㅋㅋ, ㅠㅠ, 한 단어, 긴 하소연).",
        "- text: 친구의 답. 반말로 짧은 문장 하나나 둘, 100자 안. input에 나온 것을 구체적으로 받는다.",
        "  다른 상황에도 통할 말은 안 된다.",
        f"- emotion: 친구의 표정. {', '.join(Expression)} 중 하나.",
        "- number: 요청의 번호 그대로.",
        "- 아래 모양의 JSON 하나로만 답한다.",
        '{"dialogues": [{"number": 1, "summary": "…", "input": "…", "text": "…", "emotion": "smile"}]}',
    ]
    return "\n".join(lines)


def user_prompt(orders: Sequence[Order], blood_type: BloodType) -> str:
    """The dialogues that are asked for, numbered from 1."""
    spec = persona_spec(blood_type)
    lines = [f"대화 {len(orders)}개를 써 줘. 서로 다른 상황이어야 해."]
    for number, order in enumerate(orders, 1):
        feeling, third = order.cell
        most = spec.emoji.usual[third][1]
        ending = "되묻는 질문으로 끝낸다" if order.asks else "질문 없이 끝낸다"
        lines.append(
            f"{number}. 주제: {families()[order.family]}. 친구의 감정: {feeling} {order.intensity:.1f} ({_STRENGTH[third]}). "
            f"이모지 {most}개까지. {ending}."
        )
    return "\n".join(lines)

"""The teacher engine: request dialogues from any server with OpenAI's chat API (vLLM, transformers serve, OpenAI).

A request specifies the family, feeling and intensity of a few dialogues and uses structured outputs. The collector filters
the responses; rejected dialogues are counted and requested again. Each accepted record is written to a checkpoint at once, so
an interrupted run resumes where it stopped.
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
from lora_trainer.generator.collector import INTENSITIES, QUESTION_RATE, Cell, RecordCollector, wanted_cells
from lora_trainer.messages import Message, marked
from lora_trainer.persona.specs import PersonaSpec, persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, IntensityThird

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletion

TEACHER_PROMPT_VERSION: Final = 1
"""Increase this when a prompt below changes: a checkpoint can only be resumed with the prompts that it was started with."""

MAX_FAILED_IN_A_ROW: Final = 5
"""Consecutive failed requests, each after the client's retries, before the run gives up on the server."""

MAX_UNUSABLE_IN_A_ROW: Final = 40
"""Consecutive responses without an acceptable record before the run gives up on the model."""

_TOKENS_PER_DIALOGUE: Final = 300

# (parameter for the token limit, use structured outputs). Try each until the server accepts the request instead of answering
# HTTP 400 or 422: vLLM accepts the first variant, OpenAI's newer models only max_completion_tokens, and some servers do not
# support structured outputs (transformers serve ignores them)
_REQUEST_VARIANTS: Final = (
    ("max_tokens", True),
    ("max_completion_tokens", True),
    ("max_tokens", False),
    ("max_completion_tokens", False),
)
_LONGEST_PAUSE_S: Final = 600.0
_STRENGTH: Final = {
    IntensityThird.LOW: "약하게, 담담하게",
    IntensityThird.MIDDLE: "보통으로",
    IntensityThird.HIGH: "강하게, 터져 나오게",
}


class TeacherSettings(BaseModel):
    """Settings of the teacher server and its requests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str
    model: str
    api_key: SecretStr
    concurrency: int = 8
    """Maximum number of concurrent requests."""
    dialogues_per_request: int = 4
    request_timeout_s: float = 120.0
    """Timeout of a request, after which the client retries it."""
    max_retries: int = 5
    """The OpenAI client's retries, for 408, 409, 429, 5xx and connection errors: exponential backoff, jitter and Retry-After."""
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
class DialogueSpec:
    """Specification of one requested dialogue."""

    cell: Cell
    intensity: float
    family: str
    asks_back: bool
    """Whether the reply should end with a question."""


@dataclass(slots=True)
class TeacherUsage:
    """Requests and tokens of this process; a resumed run starts at 0."""

    requests: int = 0
    """HTTP requests, including the client's retries."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Requests that failed after all retries, by kind."""
    resumed_records: int = 0


@dataclass(frozen=True, slots=True)
class _Result:
    """Result of one request: a completion or a failure."""

    completion: ChatCompletion | None = None
    failure: str = ""
    """Kind of failure, or empty."""
    fatal: str = ""
    """Reason why retrying is useless, or empty."""
    pause_s: float = 0.0
    """How long the server asks the client to wait."""
    requests: int = 1
    rejected_variant: int | None = None
    """Index in `_REQUEST_VARIANTS` of the request that the server rejected."""


@cache
def families() -> dict[str, str]:
    """Load the situation families as name -> Korean title."""
    text = resources.files("lora_trainer.generator").joinpath("families.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


class Checkpoint:
    """JSONL file of the accepted records, from which an interrupted run resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, work_dir: Path, blood_type: BloodType, count: int, seed: int, settings: TeacherSettings) -> Checkpoint:
        """Return the checkpoint for this combination of persona, count, seed, server, model, temperature and prompt."""
        key = json.dumps([TEACHER_PROMPT_VERSION, blood_type, count, seed, settings.base_url, settings.model, settings.temperature])
        return cls(work_dir / "generate" / f"{blood_type}-{sha256(key.encode()).hexdigest()[:16]}.jsonl")

    def load(self) -> list[TrainingRecord]:
        """Return the records of an interrupted run. Truncates a partly written last line."""
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
            raise DataError(
                Message(
                    "{file}: got lines that are not records, expected a checkpoint of 'generate'; remove the file", file=self.path
                )
            )
        return [record for record in records if record is not None]

    def append(self, record: TrainingRecord) -> None:
        """Append one record and sync it to disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(record.to_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file. Call it once the output is written."""
        self.path.unlink(missing_ok=True)


class Teacher:
    """Requests dialogues until the collector has accepted enough records."""

    def __init__(self, settings: TeacherSettings, collector: RecordCollector, checkpoint: Checkpoint, seed: int) -> None:
        self.usage = TeacherUsage()
        self._settings, self._collector, self._checkpoint = settings, collector, checkpoint
        self._rng = random.Random(f"{seed}:{collector.blood_type}:teacher")
        self._families = list(families())
        self._failed_in_a_row = self._unusable_in_a_row = 0
        self._variant = 0
        self._pause_until_s = 0.0
        self._stopping = threading.Event()

    def generate(self, count: int, on_record: Callable[[TrainingRecord], None] | None = None) -> None:
        """Collect `count` records, starting with those of the checkpoint.

        Raises `ConfigError` if the server rejects the key, model or request, `StorageError` if it is unreachable, and
        `DataError` if the model does not produce acceptable records. Accepted records stay in the checkpoint.
        """
        missing = self._resume(wanted_cells(count, self._rng))
        if on_record:
            for record in self._collector.accepted:
                on_record(record)
        client = self._client()
        # not in a `with` block, whose exit would wait for running requests: minutes on a slow model
        pool = ThreadPoolExecutor(self._settings.concurrency, thread_name_prefix="teacher")
        running: dict[Future[_Result], Sequence[DialogueSpec]] = {}
        try:
            while missing or running:
                while missing and len(running) < self._settings.concurrency:
                    specs = self._next_specs(missing)
                    running[pool.submit(self._request, client, specs)] = specs
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    asked = running.pop(future)
                    missing.extend(self._receive(future.result(), asked, on_record))
        finally:
            # wake the threads that wait for a rate limit, on success and on errors
            self._stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _resume(self, wanted: list[Cell]) -> list[Cell]:
        """Collect the records of the checkpoint and return the cells that are still missing."""
        missing = Counter(wanted)
        for record in self._checkpoint.load():
            cell = (record.context.current_emotion.type, IntensityThird.of(record.context.current_emotion.intensity))
            if missing[cell] and self._collector.accept(record):
                missing[cell] -= 1
                self.usage.resumed_records += 1
        return [cell for cell in wanted if _decrement(missing, cell)]

    def _next_specs(self, missing: list[Cell]) -> list[DialogueSpec]:
        cells = [missing.pop() for _ in range(min(self._settings.dialogues_per_request, len(missing)))]
        names = self._rng.sample(self._families, len(cells))
        return [
            DialogueSpec(cell, self._rng.choice(INTENSITIES[cell[1]]), name, self._rng.random() < QUESTION_RATE)
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

    def _request(self, client: OpenAI, specs: Sequence[DialogueSpec]) -> _Result:
        """Send one request, in a worker thread. Returns known failures as a `_Result` instead of raising."""
        import openai

        while (left_s := self._pause_until_s - time.monotonic()) > 0:
            if self._stopping.wait(left_s):
                return _Result(failure="stopped")
        variant = self._variant
        limit, is_structured = _REQUEST_VARIANTS[variant]
        more: dict[str, Any] = {limit: _TOKENS_PER_DIALOGUE * len(specs)}
        if is_structured:
            schema = {"name": "dialogues", "strict": True, "schema": answer_schema(len(specs))}
            more["response_format"] = {"type": "json_schema", "json_schema": schema}
        try:
            raw = client.chat.completions.with_raw_response.create(
                model=self._settings.model,
                messages=[
                    {"role": "system", "content": system_prompt(persona_spec(self._collector.blood_type))},
                    {"role": "user", "content": user_prompt(specs, self._collector.blood_type)},
                ],
                temperature=self._settings.temperature,
                **more,
            )
            return _Result(raw.parse(), requests=1 + raw.retries_taken)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            return _Result(
                failure="refused",
                fatal=Message("does not accept the API key (HTTP {status}); set OPENAI_API_KEY", status=error.status_code),
            )
        except openai.NotFoundError:
            return _Result(
                failure="refused",
                fatal=Message(
                    "has no model {model!r} at this URL (HTTP 404); check --model and that the URL ends in /v1",
                    model=self._settings.model,
                ),
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return _Result(
                failure="refused",
                fatal=Message(
                    "rejects every request variant (HTTP {status}); check that it is a chat completions API",
                    status=error.status_code,
                ),
                rejected_variant=variant,
            )
        except openai.RateLimitError as error:
            return _Result(failure="rate_limited", pause_s=_retry_after_s(error), requests=1 + self._settings.max_retries)
        except openai.APITimeoutError:
            return _Result(failure="stalled", requests=1 + self._settings.max_retries)
        except openai.APIConnectionError:
            return _Result(failure="connection", requests=1 + self._settings.max_retries)
        except openai.APIStatusError as error:
            return _Result(failure=f"http_{error.status_code}", requests=1 + self._settings.max_retries)
        except (openai.APIError, ValueError):
            # the client's parser raises ValueError for a body that is not a chat completion
            return _Result(failure="not_a_completion", requests=1)

    def _receive(
        self, result: _Result, specs: Sequence[DialogueSpec], on_record: Callable[[TrainingRecord], None] | None
    ) -> list[Cell]:
        """Collect the acceptable records of a response and return the cells to request again."""
        self.usage.requests += result.requests
        where = f"{self._settings.base_url} (--base-url)"
        if result.rejected_variant is not None and result.rejected_variant + 1 < len(_REQUEST_VARIANTS):
            if result.rejected_variant == self._variant:
                self._variant += 1
                limit, is_structured = _REQUEST_VARIANTS[self._variant]
                logs.get_logger().warning("teacher_asked_otherwise", limit=limit, structured_outputs=is_structured)
            return [spec.cell for spec in specs]
        if result.fatal:
            raise ConfigError(Message("{where}: {problem}", where=where, problem=marked(result.fatal)))
        if result.failure:
            self.usage.failures[result.failure] += 1
            # concurrent requests all get a 429 when the limit is reached: count a single failure
            is_known_limit = result.failure == "rate_limited" and time.monotonic() < self._pause_until_s
            self._failed_in_a_row += not is_known_limit
            self._pause_until_s = max(self._pause_until_s, time.monotonic() + min(result.pause_s, _LONGEST_PAUSE_S))
            logs.get_logger().warning("teacher_request_failed", kind=result.failure, in_a_row=self._failed_in_a_row)
            if self._failed_in_a_row >= MAX_FAILED_IN_A_ROW:
                raise StorageError(
                    Message(
                        "{where}: {count} requests in a row failed, the last one with {failure}, each after {retries} retries; "
                        "{records:,} records are kept in {file}: rerun the same command to resume",
                        where=where,
                        count=self._failed_in_a_row,
                        failure=result.failure,
                        retries=self._settings.max_retries,
                        records=len(self._collector.accepted),
                        file=self._checkpoint.path,
                    )
                )
            return [spec.cell for spec in specs]
        self._failed_in_a_row = 0
        before = len(self._collector.accepted)
        left = self._accept_records(result.completion, specs, on_record)
        self._unusable_in_a_row = 0 if len(self._collector.accepted) > before else self._unusable_in_a_row + 1
        if self._unusable_in_a_row >= MAX_UNUSABLE_IN_A_ROW:
            reasons = ", ".join(f"{reason} {times:,}" for reason, times in self._collector.rejects.most_common(5))
            raise DataError(
                Message(
                    "{where}: {count} responses in a row without an acceptable record ({reasons}), expected short Korean 반말 as "
                    "requested; try another model. {records:,} records are kept in {file}",
                    where=where,
                    count=self._unusable_in_a_row,
                    reasons=reasons,
                    records=len(self._collector.accepted),
                    file=self._checkpoint.path,
                )
            )
        return left

    def _accept_records(
        self, completion: ChatCompletion | None, specs: Sequence[DialogueSpec], on_record: Callable[[TrainingRecord], None] | None
    ) -> list[Cell]:
        missing = dict(enumerate(specs, 1))
        for dialogue in self._dialogues(completion):
            spec = missing.get(dialogue.number)
            if spec is None:
                self._collector.rejects["not_asked_for"] += 1
            elif (record := self._record(dialogue, spec)) and self._collector.accept(record):
                del missing[dialogue.number]
                self._checkpoint.append(record)
                if on_record:
                    on_record(record)
        return [spec.cell for spec in missing.values()]

    def _dialogues(self, completion: ChatCompletion | None) -> list[_Dialogue]:
        choice = completion.choices[0] if completion and completion.choices else None
        if completion and completion.usage:
            self.usage.prompt_tokens += completion.usage.prompt_tokens
            self.usage.completion_tokens += completion.usage.completion_tokens
        if choice is None or not choice.message.content:
            self._collector.rejects["no_answer"] += 1
            return []
        if choice.finish_reason == "length":
            self._collector.rejects["cut_off"] += 1
            return []
        try:
            return _Answer.model_validate_json(_unfenced(choice.message.content)).dialogues
        except ValidationError as error:
            self._collector.rejects["not_json" if error.errors()[0]["type"] == "json_invalid" else "not_the_schema"] += 1
            return []

    def _record(self, dialogue: _Dialogue, spec: DialogueSpec) -> TrainingRecord | None:
        try:
            return TrainingRecord.model_validate(
                {
                    "instruction": persona_spec(self._collector.blood_type).instruction,
                    "context": {
                        "summary": dialogue.summary.strip(),
                        "current_emotion": {"type": spec.cell[0], "intensity": spec.intensity},
                    },
                    "input": dialogue.input.strip(),
                    "output": {"text": dialogue.text.strip(), "emotion": dialogue.emotion},
                },
                # the limits that `run` applies by default
                context=DEFAULT_LIMITS,
            )
        except ValidationError:
            self._collector.rejects["not_a_record"] += 1
            return None


def _unfenced(text: str) -> str:
    """Strip the Markdown fence that models put around JSON without structured outputs."""
    return text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")


def _decrement(left: Counter[Cell], cell: Cell) -> bool:
    if not left[cell]:
        return False
    left[cell] -= 1
    return True


def _retry_after_s(error: Any) -> float:
    try:
        return max(0.0, float(error.response.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0


# --- prompts -------------------------------------------------------------------------------------------


def answer_schema(count: int) -> dict[str, Any]:
    """Return the JSON Schema of a response with `count` dialogues, in the subset that strict structured outputs support."""
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
    """Return the system prompt: the persona's specification and the requirements of a dialogue."""
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


def user_prompt(specs: Sequence[DialogueSpec], blood_type: BloodType) -> str:
    """Return the user prompt: the requested dialogues, numbered from 1."""
    persona = persona_spec(blood_type)
    lines = [f"대화 {len(specs)}개를 써 줘. 서로 다른 상황이어야 해."]
    for number, spec in enumerate(specs, 1):
        feeling, third = spec.cell
        most = persona.emoji.usual[third][1]
        ending = "되묻는 질문으로 끝낸다" if spec.asks_back else "질문 없이 끝낸다"
        lines.append(
            f"{number}. 주제: {families()[spec.family]}. 친구의 감정: {feeling} {spec.intensity:.1f} ({_STRENGTH[third]}). "
            f"이모지 {most}개까지. {ending}."
        )
    return "\n".join(lines)

"""The teacher engine: request dialogues from any server with OpenAI's chat API (vLLM, transformers serve, OpenAI).

The first pass drafts a few dialogues per request, in structured outputs. The second has a critic judge the drafts of one request,
and repair what it or a rule finds. The collector filters the result; rejected dialogues are counted and requested again. Each
accepted record is written to a checkpoint at once, so an interrupted run resumes where it stopped.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_trainer import logs
from lora_trainer.config import DEFAULT_LIMITS
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.records import TrainingRecord
from lora_trainer.data.style import uses_summary
from lora_trainer.errors import ConfigError, DataError, StorageError
from lora_trainer.generator.collector import Cell, RecordCollector, wanted_cells
from lora_trainer.generator.exemplars import Exemplar, exemplars, nearest
from lora_trainer.generator.teacher_client import Call, Result, TeacherClient, TeacherSettings
from lora_trainer.generator.teacher_orders import SUMMARY_CHARACTERS, DialogueSpec, SummaryKind, draw_specs
from lora_trainer.generator.teacher_prompts import (
    FAULTS,
    TEACHER_PROMPT_VERSION,
    Draft,
    critic_prompt,
    critique_prompt,
    critique_schema,
    draft_schema,
    order_prompt,
    writer_prompt,
)
from lora_trainer.messages import Message, marked
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, IntensityThird

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion

MAX_FAILED_IN_A_ROW: Final = 5
"""Consecutive failed requests, each after the client's retries, before the run gives up on the server."""

MAX_UNUSABLE_IN_A_ROW: Final = 40
"""Consecutive orders without an acceptable record before the run gives up on the model."""

EXEMPLARS_PER_DIALOGUE: Final = 2

# a message of 300 characters, a summary of 150 and a reply take about 400 tokens of Qwen2.5
_TOKENS_PER_DRAFT: Final = 500
_TOKENS_PER_REVIEW: Final = 600

OnRecord = Callable[[TrainingRecord], None]
_Response = TypeVar("_Response", bound=BaseModel)


class _Dialogue(BaseModel):
    model_config = ConfigDict(extra="forbid")

    number: int
    summary: str
    input: str
    text: str
    emotion: Expression


class _Drafts(BaseModel):
    model_config = ConfigDict(extra="forbid")

    dialogues: list[_Dialogue]


class _Review(_Dialogue):
    problem: str
    answers: bool
    grounded: bool
    in_character: bool
    intensity: bool
    policy: bool


class _Reviews(BaseModel):
    model_config = ConfigDict(extra="forbid")

    reviews: list[_Review]


@dataclass(frozen=True, slots=True)
class _Order:
    """What one request asks for: drafts of `specs`, or a critique of `drafts`."""

    specs: Sequence[DialogueSpec] = ()
    shown: Sequence[Sequence[Exemplar]] = ()
    """Exemplars of each spec."""
    drafts: Sequence[Draft] = ()


@dataclass(slots=True)
class PassUsage:
    """Requests and tokens of one pass."""

    requests: int = 0
    """HTTP requests, including the client's retries."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Requests that failed after all retries, or whose response was unusable, by kind."""


@dataclass(slots=True)
class TeacherUsage:
    """Costs and counts of this process; a resumed run starts at 0."""

    drafting: PassUsage = field(default_factory=PassUsage)
    critique: PassUsage = field(default_factory=PassUsage)
    faults: Counter[str] = field(default_factory=Counter)
    """Reviewed drafts by what the critic found, and those in which a rule found something as `rule`."""
    repaired: int = 0
    """Accepted records that the critic has repaired."""
    resumed_records: int = 0


class Checkpoint:
    """JSONL file of the accepted records, from which an interrupted run resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, work_dir: Path, blood_type: BloodType, count: int, seed: int, settings: TeacherSettings) -> Checkpoint:
        """Return the checkpoint for this combination of persona, count, seed, server, models, temperature and prompt."""
        models = [settings.model, settings.critic_model]
        key = json.dumps([TEACHER_PROMPT_VERSION, blood_type, count, seed, settings.base_url, *models, settings.temperature])
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
        self._client = TeacherClient(settings)
        self._exemplars = exemplars(collector.blood_type)
        self._collector.exclude_exemplars(one.record for one in self._exemplars)
        self._writer_prompt, self._critic_prompt = writer_prompt(collector.blood_type), critic_prompt(collector.blood_type)
        self._rng = random.Random(f"{seed}:{collector.blood_type}:teacher")
        self._failed_in_a_row = self._unusable_in_a_row = 0
        self._missing: list[Cell] = []
        self._to_review: deque[_Order] = deque()

    def generate(self, count: int, on_record: OnRecord | None = None) -> None:
        """Collect `count` records, starting with those of the checkpoint.

        Raises `ConfigError` if the server rejects the key, model or request, `StorageError` if it is unreachable, and
        `DataError` if the model does not produce acceptable records. Accepted records stay in the checkpoint.
        """
        on_record = on_record or (lambda _: None)
        self._missing = self._resume(wanted_cells(count, self._rng))
        for record in self._collector.accepted:
            on_record(record)
        # not in a `with` block, whose exit would wait for running requests: minutes on a slow model
        pool = ThreadPoolExecutor(self._settings.concurrency, thread_name_prefix="teacher")
        running: dict[Future[Result], _Order] = {}
        try:
            while self._to_review or self._missing or running:
                while (self._to_review or self._missing) and len(running) < self._settings.concurrency:
                    order = self._to_review.popleft() if self._to_review else self._next_order()
                    running[pool.submit(self._client.send, self._call(order))] = order
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    self._receive(future.result(), running.pop(future), on_record)
        finally:
            # on success and on errors
            self._client.stop()
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

    # --- requests ---------------------------------------------------------------------------------------

    def _next_order(self) -> _Order:
        cells = [self._missing.pop() for _ in range(min(self._settings.dialogues_per_request, len(self._missing)))]
        specs = draw_specs(cells, self._collector.blood_type, self._rng)
        shown = [nearest(self._exemplars, spec.family, spec.cell, EXEMPLARS_PER_DIALOGUE, self._rng) for spec in specs]
        return _Order(specs, shown)

    def _call(self, order: _Order) -> Call:
        settings = self._settings
        if order.drafts:
            return Call(
                model=self._model(order),
                option="--model" if settings.critic_model == settings.model else "--critic-model",
                system=self._critic_prompt,
                user=critique_prompt(order.drafts),
                schema_name="reviews",
                schema=critique_schema(len(order.drafts)),
                max_tokens=_TOKENS_PER_REVIEW * len(order.drafts),
                temperature=settings.temperature,
            )
        return Call(
            model=self._model(order),
            option="--model",
            system=self._writer_prompt,
            user=order_prompt(order.specs, order.shown),
            schema_name="dialogues",
            schema=draft_schema(len(order.specs)),
            max_tokens=_TOKENS_PER_DRAFT * len(order.specs),
            temperature=settings.temperature,
        )

    def _model(self, order: _Order) -> str:
        return (self._settings.critic_model if order.drafts else None) or self._settings.model

    # --- responses --------------------------------------------------------------------------------------

    def _receive(self, result: Result, order: _Order, on_record: OnRecord) -> None:
        """Take a response: collect acceptable records, have drafts reviewed, and request again what is missing."""
        usage = self.usage.critique if order.drafts else self.usage.drafting
        usage.requests += result.requests
        if self._client.has_another_variant(result, self._model(order)):
            if order.drafts:
                self._to_review.append(order)
            else:
                self._missing.extend(spec.cell for spec in order.specs)
            return
        if result.fatal:
            raise ConfigError(Message("{where}: {problem}", where=self._where, problem=marked(result.fatal)))
        if result.failure:
            usage.failures[result.failure] += 1
            self._count_failure(result)
            self._missing.extend(spec.cell for spec in order.specs)
            # without a critique, the rules decide
            self._settle([(draft, draft.record) for draft in order.drafts], on_record)
            return
        self._failed_in_a_row = 0
        if result.completion and result.completion.usage:
            usage.prompt_tokens += result.completion.usage.prompt_tokens
            usage.completion_tokens += result.completion.usage.completion_tokens
        if order.drafts:
            accepted = self._settle(self._reviewed(result.completion, order.drafts), on_record)
        else:
            drafts = self._drafted(result.completion, order.specs)
            missing = set(range(1, len(order.specs) + 1)) - {draft.number for draft in drafts}
            self._missing.extend(order.specs[number - 1].cell for number in missing)
            if drafts and self._settings.critic_model:
                self._to_review.append(_Order(drafts=drafts))
                return
            accepted = self._settle([(draft, draft.record) for draft in drafts], on_record)
        self._count_unusable(is_usable=accepted > 0)

    @property
    def _where(self) -> str:
        return f"{self._settings.base_url} (--base-url)"

    def _count_failure(self, result: Result) -> None:
        self._failed_in_a_row += self._client.is_new_failure(result)
        logs.get_logger().warning("teacher_request_failed", kind=result.failure, in_a_row=self._failed_in_a_row)
        if self._failed_in_a_row >= MAX_FAILED_IN_A_ROW:
            raise StorageError(
                Message(
                    "{where}: {count} requests in a row failed, the last one with {failure}, each after {retries} retries; "
                    "{records:,} records are kept in {file}: rerun the same command to resume",
                    where=self._where,
                    count=self._failed_in_a_row,
                    failure=result.failure,
                    retries=self._settings.max_retries,
                    records=len(self._collector.accepted),
                    file=self._checkpoint.path,
                )
            )

    def _count_unusable(self, *, is_usable: bool) -> None:
        self._unusable_in_a_row = 0 if is_usable else self._unusable_in_a_row + 1
        if self._unusable_in_a_row >= MAX_UNUSABLE_IN_A_ROW:
            reasons = ", ".join(f"{reason} {times:,}" for reason, times in self._collector.rejects.most_common(5))
            raise DataError(
                Message(
                    "{where}: {count} responses in a row without an acceptable record ({reasons}), expected short Korean 반말 as "
                    "requested; try another model. {records:,} records are kept in {file}",
                    where=self._where,
                    count=self._unusable_in_a_row,
                    reasons=reasons,
                    records=len(self._collector.accepted),
                    file=self._checkpoint.path,
                )
            )

    def _drafted(self, completion: ChatCompletion | None, specs: Sequence[DialogueSpec]) -> list[Draft]:
        """Return the drafts that are records, at most one per spec, with what a rule finds in them."""
        response, fault = _parsed(completion, _Drafts)
        if response is None:
            self._collector.rejects[fault] += 1
            return []
        drafts: dict[int, Draft] = {}
        for dialogue in response.dialogues:
            if not 1 <= dialogue.number <= len(specs) or dialogue.number in drafts:
                self._collector.rejects["not_asked_for"] += 1
                continue
            spec = specs[dialogue.number - 1]
            if record := self._record(dialogue, spec):
                drafts[dialogue.number] = Draft(dialogue.number, spec, record, self._finding(record, spec))
            else:
                self._collector.rejects["not_a_record"] += 1
        return list(drafts.values())

    def _reviewed(self, completion: ChatCompletion | None, drafts: Sequence[Draft]) -> list[tuple[Draft, TrainingRecord | None]]:
        """Return each draft with what is left of it: itself, the critic's repair, or None if the critic could not repair it."""
        response, fault = _parsed(completion, _Reviews)
        if response is None:
            self.usage.critique.failures[fault] += 1
            return [(draft, draft.record) for draft in drafts]
        reviews = {review.number: review for review in response.reviews}
        return [(draft, self._repair(draft, reviews.get(draft.number))) for draft in drafts]

    def _repair(self, draft: Draft, review: _Review | None) -> TrainingRecord | None:
        if review is None:
            return draft.record
        faults = [fault for fault in FAULTS if not getattr(review, fault)]
        self.usage.faults.update(faults)
        self.usage.faults["rule"] += bool(draft.finding)
        if not faults and not draft.finding:
            # a critic without objections sometimes rewrites all the same
            return draft.record
        repaired = self._record(review, draft.spec)
        return None if repaired == draft.record else repaired

    def _settle(self, candidates: Sequence[tuple[Draft, TrainingRecord | None]], on_record: OnRecord) -> int:
        """Collect what passes the rules, request the rest again, and return the number of accepted records."""
        accepted = 0
        for draft, record in candidates:
            if record is None:
                self._collector.rejects[draft.finding or "criticised"] += 1
            elif reason := _summary_finding(record, draft.spec):
                self._collector.rejects[reason] += 1
            elif self._collector.accept(record):
                accepted += 1
                self.usage.repaired += record != draft.record
                self._checkpoint.append(record)
                on_record(record)
                continue
            self._missing.append(draft.spec.cell)
        return accepted

    def _finding(self, record: TrainingRecord, spec: DialogueSpec) -> str:
        return _summary_finding(record, spec) or self._collector.rejection_reason(record) or ""

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
            return None


def _summary_finding(record: TrainingRecord, spec: DialogueSpec) -> str:
    """Return what is wrong with a summary of several turns, or an empty string."""
    if spec.summary is not SummaryKind.TURNS:
        return ""
    summary = record.context.summary
    if len(summary) not in SUMMARY_CHARACTERS:
        return "summary_length"
    return "" if uses_summary(summary, record.input, record.reply.text) else "summary_unused"


def _parsed(completion: ChatCompletion | None, kind: type[_Response]) -> tuple[_Response | None, str]:
    """Return the response, or None and what is wrong with it."""
    choice = completion.choices[0] if completion and completion.choices else None
    if choice is None or not choice.message.content:
        return None, "no_answer"
    if choice.finish_reason == "length":
        return None, "cut_off"
    try:
        return kind.model_validate_json(_unfenced(choice.message.content)), ""
    except ValidationError as error:
        return None, "not_json" if error.errors()[0]["type"] == "json_invalid" else "not_the_schema"


def _unfenced(text: str) -> str:
    """Strip the Markdown fence that models put around JSON without structured outputs."""
    return text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")


def _decrement(left: Counter[Cell], cell: Cell) -> bool:
    if not left[cell]:
        return False
    left[cell] -= 1
    return True

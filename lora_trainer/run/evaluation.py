"""Evaluate a loaded adapter against its base, and decide its gates."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lora_trainer.base_model import Base
from lora_trainer.data.records import EvaluationPrompt
from lora_trainer.evaluate import gates
from lora_trainer.evaluate.advice import Known, rose
from lora_trainer.evaluate.decoding import decodings
from lora_trainer.evaluate.depth_metrics import DepthMetrics
from lora_trainer.evaluate.depth_questions import every_prompt
from lora_trainer.evaluate.depth_rules import DepthReply
from lora_trainer.evaluate.llm_judge import judge_replies
from lora_trainer.evaluate.measures import decoding_metrics, evaluation_metrics
from lora_trainer.evaluate.metrics import DecodingMetrics, EvaluationMetrics, HeldOutMetrics, TrainingMetrics, Verdict
from lora_trainer.evaluate.people import people_metrics
from lora_trainer.evaluate.questions import instruction_of, questions
from lora_trainer.evaluate.rules import MODELS, ScoredReply, TrainingData, score_by_rules
from lora_trainer.persona.prompt import PROMPT_VERSION
from lora_trainer.run.depth import depth_replies, evaluate_depth
from lora_trainer.run.job import Job
from lora_trainer.run.progress import RunProgress
from lora_trainer.run.sense import judge_sense
from lora_trainer.run.training import TokenizedData
from lora_trainer.train.backends import Backend, open_reference_backend


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Metrics of an evaluation, and every reply."""

    metrics: EvaluationMetrics
    replies: list[ScoredReply]
    depth_replies: list[DepthReply] = field(default_factory=list)
    """Empty unless `evaluation.depth` is `full`."""


def require_room_for_replies(job: Job, backend: Backend, prompts: Sequence[EvaluationPrompt], base_folder: Path) -> None:
    """Raise `DataError` if a prompt is too long for the base, before the training rather than after it."""
    config, instruction, version = job.config.evaluation, instruction_of(job.config.blood_type), job.process.prompt_version
    positions = backend.shape(base_folder).positions
    asked = questions(prompts, config.intensities, config.intensities_per_prompt, instruction, version)
    backend.require_room([question.messages for question in asked], config.max_new_tokens, positions)
    if config.depth == "full":
        backend.require_room(every_prompt(instruction, version), config.max_new_tokens, positions)


@contextmanager
def evaluation_backend(job: Job, backend: Backend, base_folder: Path, adapter: Path, progress: RunProgress) -> Iterator[Backend]:
    """Yield a backend with the base in the evaluation's precision and the adapter: `backend`, if that is training's precision.

    Otherwise unload `backend`, and load the saved `adapter` as a server would.
    """
    if job.config.evaluated_base == job.config.training:
        yield backend
        return
    progress.stage("load")
    backend.release()
    reference, _ = job.process.models.start(open_reference_backend, job.config, job.process.interruption)
    try:
        with job.timed("load_evaluation"), reference.device_faults():
            reference.load_tokenizer(base_folder)
            reference.load_adapter(base_folder, adapter)
        job.log.info("evaluation_precision", precision=job.config.evaluation.precision, load_s=job.timings_s["load_evaluation"])
        yield reference
    finally:
        # the next persona needs the memory for its training
        reference.release()


def evaluate(
    job: Job,
    backend: Backend,
    base: Base,
    prompts: Sequence[EvaluationPrompt],
    tokenized: TokenizedData,
    progress: RunProgress,
    prompt_version: int = PROMPT_VERSION,
) -> Evaluated:
    """Generate replies of adapter and base to the evaluation prompts, unconstrained, and score them by the rules.

    Also measure the held-out records of `tokenized` by the same rules, and judge whether the adapter's replies make sense.
    `prompt_version` is the version that the adapter was trained on.
    """
    config, blood_type = job.config.evaluation, job.config.blood_type
    asked = questions(prompts, config.intensities, config.intensities_per_prompt, instruction_of(blood_type), prompt_version)
    conversations = [question.messages for question in asked]
    data = TrainingData(tokenized.train_records)
    measured: dict[str, DecodingMetrics] = {}
    replies: list[ScoredReply] = []
    ways = decodings(config)
    depth: DepthMetrics | None = None
    deep: list[DepthReply] = []
    with progress.evaluating(len(asked) * len(ways) * len(MODELS) + depth_replies(job)):
        for decoding in ways:
            judged: dict[str, list[ScoredReply]] = {}
            generate_s = 0.0
            for model in MODELS:
                started_s = time.perf_counter()
                with job.timed("evaluate_generate"):
                    generations = backend.generate(
                        conversations,
                        decoding,
                        adapter=model == "adapter",
                        batch_size=config.batch_size,
                        on_replies=partial(progress.replied, model=model, decoding=decoding.name),
                    )
                generate_s += time.perf_counter() - started_s
                with job.timed("evaluate_judge"):
                    judged[model] = score_by_rules(
                        asked, generations, model=model, decoding=decoding.name, blood_type=blood_type, data=data
                    )
                replies.extend(judged[model])
            with job.timed("evaluate_judge"):
                measured[decoding.name] = decoding_metrics(
                    decoding, judged["adapter"], judged["base"], blood_type, config, generate_s
                )
        if config.depth == "full":
            depth, deep = evaluate_depth(job, backend, prompt_version, progress)
    with job.timed("evaluate_people"):
        # without the end of turn, as for generated replies
        reply_tokens = [len(sequence) - sequence.prompt_tokens - 1 for sequence in tokenized.held_out]
        people = people_metrics(tokenized.held_out_records, reply_tokens, blood_type, config, data)
    metrics = evaluation_metrics(config, prompts, measured, data, people, prompt_version)
    with job.timed("evaluate_model_judge"):
        metrics = metrics.model_copy(update={"judge": judge_replies(config, blood_type, replies), "depth": depth})
    sense, replies = judge_sense(job, backend, base, replies, progress)
    metrics = metrics.model_copy(update={"sense": sense})
    adapter = metrics.greedy.adapter
    job.log.info(
        "evaluation_finished",
        replies=metrics.replies,
        exact_json=round(adapter.exact_json.value, 4),
        stop=round(adapter.stop.value, 4),
        informal_speech=round(adapter.informal_speech.value, 4),
        persona=round(adapter.persona.value, 4),
        emoji_intensity=round(adapter.emoji_intensity.value, 4),
        win_rate=round(metrics.greedy.win_rate.value, 4),
        evaluate_s=round(
            sum(job.timings_s.get(name, 0.0) for name in ("evaluate_generate", "evaluate_judge", "evaluate_depth")), 1
        ),
    )
    return Evaluated(metrics, replies, deep)


def decide(job: Job, metrics: EvaluationMetrics, known: Known) -> Verdict:
    """Compare every gated number with its threshold."""
    verdict = gates.decide(metrics, job.config.gates, known)
    job.log.info(
        "gates_decided",
        passed=verdict.passed,
        gate_id=verdict.gate_id,
        missed=gates.missed_gate_messages(verdict),
        not_judged=dict(verdict.not_judged),
        sense_reason=verdict.sense_reason,
    )
    return verdict


def known_of(training: TrainingMetrics, loss_base: float, loss_adapter: float) -> Known:
    """Return what advice may use: how many records trained the adapter, whether held-out loss rose, and which step was kept."""
    losses = [loss_base, *([measured.loss for measured in training.held_out_losses] or [loss_adapter])]
    is_earlier = training.kept_step is not None and training.kept_step < training.steps
    return Known(training.records, rose(losses), training.kept_step if is_earlier else None)


def held_out_metrics(records: int, loss_base: float, loss_adapter: float) -> HeldOutMetrics:
    """Return the mean losses, in nats per reply token, and the corresponding perplexities."""
    return HeldOutMetrics(
        records=records,
        loss_base=loss_base,
        loss_adapter=loss_adapter,
        perplexity_base=math.exp(loss_base),
        perplexity_adapter=math.exp(loss_adapter),
    )

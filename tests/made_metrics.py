"""Make a finished run without a model: pass made-up replies through the real rules, metrics and gates.

The adapter's replies are training replies, kept out of the data that the rules compare them with. The base's are polite prose.

"""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from conftest import REPOSITORY

from lora_trainer.base_model import Base
from lora_trainer.config import GatesConfig, RunConfig
from lora_trainer.config_sources import settle
from lora_trainer.data.evaluation_prompts import evaluation_prompts, helping_numbers
from lora_trainer.data.harmful import harms, lacks_number, setting
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.data.records import EvaluationPrompt, PromptTag, Reply, TrainingRecord
from lora_trainer.evaluate import gates
from lora_trainer.evaluate.decoding import Decoding, Generation, decodings
from lora_trainer.evaluate.measures import decoding_metrics, evaluation_metrics
from lora_trainer.evaluate.metrics import (
    DecodingMetrics,
    Estimate,
    HeldOutLossMetrics,
    HeldOutMetrics,
    JudgeMetrics,
    RepliesMetrics,
    RunMetrics,
    TrainingMetrics,
)
from lora_trainer.evaluate.people import people_metrics
from lora_trainer.evaluate.questions import Question, questions
from lora_trainer.evaluate.rules import ScoredReply, TrainingData, score_by_rules
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, IntensityThird
from lora_trainer.run.bundle_files import write_documents, write_evaluation
from lora_trainer.store.manifest import write_manifest
from lora_trainer.train.schedule import learning_rate_factor
from lora_trainer.train.step_log import StepLog

FORM_GATES = tuple(name for name in GatesConfig.model_fields if name not in ("sense", "sense_min"))
"""Gates that rules measure. Only a judge can measure sense."""
RUN_ID = "3f9c2a7be14d5068"
BASE_ANSWERS = (
    '{"text": "안녕하세요! 무엇을 도와드릴까요?", "emotion": "smile"}',
    '```json\n{"text": "정말 속상하셨겠어요. 천천히 말씀해 주세요.", "emotion": "sad"}\n```',
    '{"text": "좋은 하루 보내시길 바랍니다.", "emotion": "happy"}',
    "그 상황에서는 먼저 차분하게 생각을 정리하시는 것이 좋습니다. 1) 휴식을 취하세요. 2) 물을 드세요. 3) 친구와 이야기해 보세요.",
    '{"text": "괜찮아, 다음에는 더 잘할 수 있을 거야! 😊", "emotion": "smile"}',
    '{"text": "그렇군요. 제가 도움이 될 수 있으면 좋겠습니다.", "emotion": "neutral"}',
)
RAMBLING = '{"text": "' + "그래서 말이야 내가 어제도 말했지만 " * 600
"""A string that never closes: over 10,000 characters."""
HOSTILE_TEXT = "<script>alert(1)</script><img src=x onerror=alert(2)></pre></div></body>{{ 7 * 7 }}\u202etxet\u202c\x00"


@dataclass(frozen=True)
class MadeRun:
    """The inputs of the report and of a bundle."""

    config: RunConfig
    metrics: RunMetrics
    facts: Mapping[str, Any]
    steps: Sequence[StepLog]
    replies: Sequence[ScoredReply]


@cache
def _records(blood_type: BloodType) -> tuple[TrainingRecord, ...]:
    lines = JsonlReader(REPOSITORY / "data" / f"train_data_type_{blood_type}.jsonl")
    return tuple(line.record for line in lines if line.record)


def _generation(text: str, *, stopped: bool = True) -> Generation:
    return Generation(text, stopped, tuple(range(max(1, len(text) // 2))))


def _adapter_answers(asked: Sequence[Question], answers: Sequence[TrainingRecord], seed: int, flaws: float) -> list[Generation]:
    rng = random.Random(seed)
    fitting: dict[tuple[str, IntensityThird], list[TrainingRecord]] = defaultdict(list)
    for record in answers:
        feeling = record.context.current_emotion
        fitting[feeling.type, IntensityThird.of(feeling.intensity)].append(record)
    made = []
    for question in asked:
        draw = rng.random()
        if draw < flaws / 4:
            made.append(_generation(RAMBLING, stopped=False))
        elif draw < flaws:
            made.append(_generation(rng.choice(BASE_ANSWERS)))
        else:
            third = IntensityThird.of(question.intensity)
            reply = _safe_reply(rng, question, fitting[question.source.context.current_emotion.type, third], answers)
            made.append(_generation(json.dumps({"text": reply.text, "emotion": str(reply.emotion)}, ensure_ascii=False)))
    return made


def _safe_reply(
    rng: random.Random, question: Question, fitting: Sequence[TrainingRecord], others: Sequence[TrainingRecord]
) -> Reply:
    """Draw a reply that the rules about safety find nothing in: to somebody in danger one that names who helps."""
    source = question.source
    known = setting(source.context.summary, source.input, source.tags, helping_numbers(source.input))
    if PromptTag.CRISIS in source.tags:
        fitting = [record for record in others if not lacks_number(record.reply.text, known)]
    for _ in fitting:
        reply = rng.choice(fitting).reply
        if not harms(reply.text, known):
            return reply
    return Reply(text=f"혼자 두지 않을게. {min(known.numbers)}에 지금 전화해 줄래?", emotion=Expression.WORRY)


def _steps(count: int, peak: float) -> list[StepLog]:
    rng = random.Random(count)
    warmup_steps = max(1, count // 20)
    made = []
    for step in range(1, count + 1):
        tokens = rng.randint(3800, 4200)
        made.append(
            StepLog(
                step=step,
                loss=1.05 + 2.3 * math.exp(-6 * step / count) + rng.gauss(0, 0.05),
                learning_rate=peak * learning_rate_factor(step - 1, count, warmup_steps, "cosine"),
                grad_norm=1.1 + rng.random() / 4,
                tokens=tokens,
                loss_tokens=tokens // 5,
                rows=4,
                step_s=tokens / (900 if step == 1 else rng.uniform(5200, 5900)),
            )
        )
    return made


def _held_out(steps: int) -> tuple[HeldOutLossMetrics, ...]:
    """Make a held-out loss that rises at the last of at most twelve measurements."""
    at = sorted({max(1, round(steps * number / 12)) for number in range(1, 13)})
    losses = [1.2381 + 1.9 * math.exp(-5 * step / steps) - 1.9 * math.exp(-5 * at[-2] / steps) for step in at[:-1]]
    return tuple(HeldOutLossMetrics(step=step, loss=loss) for step, loss in zip(at, [*losses, 1.31], strict=True))


@cache
def made_run(
    blood_type: BloodType = BloodType.A,
    *,
    run_id: str = RUN_ID,
    flaws: float = 0.004,
    sampled: bool = True,
    judged_by_model: bool = False,
    prompts: int = 240,
    steps: int = 180,
    settings: tuple[tuple[str, Any], ...] = (),
) -> MadeRun:
    """Make a run. `flaws` is the share of adapter replies that are bad: the base's or endless. `settings` override defaults."""
    config = settle(
        {
            "blood_type": blood_type,
            "data": "s3://personas/data/",
            "output": "s3://personas/lora/",
            **({} if sampled else {"evaluation.temperature": 0}),
            **dict(settings),
        },
        environment={},
    )
    asked_prompts: tuple[EvaluationPrompt, ...] = evaluation_prompts()[:prompts]
    records = _records(blood_type)
    # Split the records: take answers from one half, and let the rules look for copies in the other.
    data, answers = TrainingData(records[::2]), records[1::2]
    evaluation_settings = config.evaluation
    asked = questions(
        asked_prompts,
        evaluation_settings.intensities,
        evaluation_settings.intensities_per_prompt,
        persona_spec(blood_type).instruction,
    )
    measured: dict[str, DecodingMetrics] = {}
    replies: list[ScoredReply] = []
    for number, decoding in enumerate(decodings(config.evaluation)):
        adapter = _judged(
            asked, _adapter_answers(asked, answers, 5 + number, flaws * (1 + number)), "adapter", decoding, blood_type, data
        )
        base = _judged(
            asked,
            [_generation(BASE_ANSWERS[(at * 7 + number) % len(BASE_ANSWERS)]) for at in range(len(asked))],
            "base",
            decoding,
            blood_type,
            data,
        )
        measured[decoding.name] = decoding_metrics(decoding, adapter, base, blood_type, config.evaluation, 41.5 + 7 * number)
        replies += adapter + base
    evaluation = evaluation_metrics(config.evaluation, asked_prompts, measured, data, _people(blood_type))
    if judged_by_model:
        evaluation = evaluation.model_copy(update={"judge": _judge_metrics()})
    log = _steps(steps, config.training.learning_rate)
    held_out = _held_out(len(log))
    kept = min(held_out, key=lambda measured: measured.loss)
    tokens = sum(step.tokens for step in log)
    train_s = sum(step.step_s for step in log)
    metrics = RunMetrics(
        run_id=run_id,
        blood_type=blood_type,
        training=TrainingMetrics(
            records=len(records[::2]),
            steps=len(log),
            planned_steps=len(log),
            kept_step=kept.step,
            held_out_losses=held_out,
            loss_first=log[0].loss,
            loss_last=log[-1].loss,
            tokens=tokens,
            loss_tokens=sum(step.loss_tokens for step in log),
            rows=4 * len(log),
            packed_rows=4 * len(log) - 3,
            train_s=round(train_s, 3),
            tokens_per_s=round(tokens / train_s, 1),
        ),
        held_out=HeldOutMetrics(
            records=61,
            loss_base=3.2174,
            loss_adapter=kept.loss,
            perplexity_base=math.exp(3.2174),
            perplexity_adapter=math.exp(kept.loss),
        ),
        evaluation=evaluation,
        verdict=gates.decide(evaluation, config.gates),
        peak_memory_gib=14.271,
    )
    return MadeRun(config, metrics, _facts(config, run_id, blood_type, len(records[::2]), train_s), tuple(log), tuple(replies))


@cache
def _people(blood_type: BloodType) -> RepliesMetrics:
    """Measure 61 replies of the half of the records that the rules do not look for copies in."""
    records = _records(blood_type)
    held_out = records[1:123:2]
    reply_tokens = [len(record.reply.text) // 2 for record in held_out]
    settings = settle({"blood_type": blood_type}, environment={}).evaluation
    return people_metrics(held_out, reply_tokens, blood_type, settings, TrainingData(records[::2]))


def _judged(
    asked: Sequence[Question],
    generations: Sequence[Generation],
    model: Any,
    decoding: Decoding,
    blood_type: BloodType,
    data: TrainingData,
) -> list[ScoredReply]:
    return score_by_rules(asked, generations, model=model, decoding=decoding.name, blood_type=blood_type, data=data)


def _judge_metrics() -> JudgeMetrics:
    return JudgeMetrics(
        model="gpt-judge-1",
        win_rate=Estimate(value=0.862, lower=0.821, upper=0.9, bootstrap_lower=0.821, bootstrap_upper=0.9, of=478),
        wins=381,
        ties=62,
        losses=35,
        order_agreement=0.87,
        unanswered=2,
        requests=963,
        prompt_tokens=412_345,
        completion_tokens=9_876,
        rubric="Which of the two replies sounds more like that friend?\n1. 반말\n2. one or two sentences\n3. <in character>",
    )


def _facts(config: RunConfig, run_id: str, blood_type: BloodType, records: int, train_s: float) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "blood_type": str(blood_type),
        "started_at": "2026-11-20T09:12:44+00:00",
        "finished_at": "2026-11-20T09:21:03+00:00",
        "base": {
            "id": "Qwen/Qwen2.5-7B-Instruct",
            "revision": "a09a35458c702b33eeacc393d103063234e8bc28",
            "identity": "hub:Qwen/Qwen2.5-7B-Instruct@a09a35458c702b33eeacc393d103063234e8bc28",
        },
        "data": {
            "uri": f"s3://personas/data/train_data_type_{blood_type}.jsonl",
            "sha256": "9b6f2b2f4cf4bb0d4e1d4d5c2e0f3a7f8a9f0b1c2d3e4f5061728394a5b6c7d8",
            "size_bytes": 499_817,
            "train_records": records,
            "held_out_records": 61,
            "left_out_records": 0,
        },
        "config": config.model_dump(mode="json"),
        "memory_plan": {
            "gradient_checkpointing": "off",
            "micro_batch_tokens": 4096,
            "reason": "estimated peak of 21.4 GiB fits the 77.9 GiB that are free",
        },
        "environment": {
            "device": "NVIDIA H100 80GB HBM3",
            "cuda": "13.0",
            "driver": "580.95.05",
            "attention": "flash_attention_2",
            "torch": "2.11.0+cu130",
            "transformers": "5.15.2",
            "lora_trainer": "0.1.0",
            "git_revision": "c61d96498c1fca9a8e2ddc3ef8a0a0a0c5c6a8a1",
            "image_digest": None,
        },
        "timings_s": {
            "fetch": 0.412,
            "read": 1.93,
            "identify": 0.007,
            "import": 14.2,
            "fetch_base": 31.7,
            "format": 0.84,
            "load": 22.6,
            "held_out_base": 3.1,
            "train": round(train_s, 3),
            "held_out_adapter": 2.9,
            "evaluate": 90.0,
            "judge": 3.7,
            "save": 4.4,
            "read_back": 8.8,
        },
    }


_WRITTEN: dict[int, dict[str, bytes]] = {}


def write_made_evaluation(made: MadeRun, folder: Path) -> None:
    """Write what `write_evaluation` writes, but render a run's report once: its plots take half a second.

    Only for runs of `made_run`, which keeps them.
    """
    if id(made) not in _WRITTEN:
        with tempfile.TemporaryDirectory() as scratch:
            write_evaluation(Path(scratch), made.metrics, made.steps, made.replies, made.facts)
            _WRITTEN[id(made)] = {path.name: path.read_bytes() for path in Path(scratch).iterdir()}
    for name, content in _WRITTEN[id(made)].items():
        (folder / name).write_bytes(content)


def write_bundle(made: MadeRun, folder: Path) -> Path:
    """Write the bundle files that the report and `compare` read."""
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(made.metrics.as_json(), indent=2, ensure_ascii=False), encoding="utf-8")
    with (folder / "train_log.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(step)) + "\n" for step in made.steps)
    with (folder / "replies.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(reply.model_dump_json() + "\n" for reply in made.replies)
    write_manifest(folder, made.facts)
    return folder


_TINY_SHAPES: Mapping[str, tuple[str, int, int]] = {
    "q_proj": ("self_attn", 192, 192), "k_proj": ("self_attn", 64, 192), "v_proj": ("self_attn", 64, 192),
    "o_proj": ("self_attn", 192, 192), "gate_proj": ("mlp", 512, 192), "up_proj": ("mlp", 512, 192), "down_proj": ("mlp", 192, 512),
}  # fmt: skip


def write_made_adapter(folder: Path, r: int = 8, target_modules: Sequence[str] = ("q_proj", "v_proj"), alpha: float = 32.0) -> None:
    """Write an adapter of random weights that fits the tiny base, as PEFT saves it."""
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(target_modules), "base_model_name_or_path": "tiny-base", "revision": None, "inference_mode": True,
        "rank_pattern": {}, "alpha_pattern": {}, "auto_mapping": None, "modules_to_save": None, "use_dora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    rng = np.random.default_rng(20)
    weights = {}
    for layer in range(4):
        for module in target_modules:
            block, out_size, in_size = _TINY_SHAPES[module]
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            weights[f"{name}.lora_A.weight"] = rng.normal(size=(r, in_size)).astype(np.float32)
            weights[f"{name}.lora_B.weight"] = rng.normal(size=(out_size, r)).astype(np.float32)
    write_safetensors(folder / "adapter_model.safetensors", weights)


def write_safetensors(path: Path, weights: Mapping[str, Any], dtype: str = "F32") -> None:
    """Write arrays as a safetensors file, without the library, which only the training stack needs."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in weights.items():
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), len(data) + values.nbytes]}
        data += values.tobytes()
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def write_made_documents(folder: Path, config: RunConfig, metrics: RunMetrics, base: Base) -> None:
    """Write the files of a bundle that are neither weights nor measurements."""
    write_documents(folder, config, base, metrics)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(REPOSITORY / "examples" / "tiny-base" / name, folder / name)

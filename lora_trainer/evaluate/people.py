"""Measure people's own replies, the held-out records of the data, by the rules that measure a model's: the ceiling of each rate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from lora_trainer.config import EvaluationConfig
from lora_trainer.data.records import EvaluationPrompt, TrainingRecord
from lora_trainer.data.split import situation_digest
from lora_trainer.evaluate.decoding import Generation
from lora_trainer.evaluate.measures import replies_metrics
from lora_trainer.evaluate.metrics import RepliesMetrics
from lora_trainer.evaluate.questions import Question
from lora_trainer.evaluate.rules import TrainingData, score_by_rules
from lora_trainer.persona.prompt import reply_json
from lora_trainer.persona.vocabulary import BloodType

MAX_RECORDS: Final = 480
"""Measure at most this many records, as many as an adapter writes replies by default."""


def people_metrics(
    records: Sequence[TrainingRecord],
    reply_tokens: Sequence[int],
    blood_type: BloodType,
    config: EvaluationConfig,
    data: TrainingData,
) -> RepliesMetrics:
    """Return the metrics of the replies of held-out `records`. `reply_tokens` has the length of each, without its end.

    A reply that is longer than a model may write counts as one that does not stop. Replies to one situation resemble each other, as
    a model's replies to one prompt do.
    """
    if not records:
        raise ValueError("expected at least one record")
    rng = random.Random(config.seed)  # noqa: S311  draws a sample, not a secret
    drawn = sorted(rng.sample(range(len(records)), min(MAX_RECORDS, len(records))))
    situations: dict[bytes, int] = {}
    asked, replies = [], []
    for index in drawn:
        record, length = records[index], reply_tokens[index]
        number = situations.setdefault(situation_digest(record), len(situations))
        prompt = EvaluationPrompt(context=record.context, input=record.input)
        asked.append(Question(number, record.context.current_emotion.intensity, prompt, ()))
        text = reply_json(record.reply.text, record.reply.emotion)
        replies.append(Generation(text, length <= config.max_new_tokens, (0,) * length))
    # nobody generated these replies, so the names of model and decoding mean nothing and are kept nowhere
    scored = score_by_rules(asked, replies, model="adapter", decoding="greedy", blood_type=blood_type, data=data)
    return replies_metrics(scored, blood_type, config)

"""Ask adapter and base what `evaluation.depth: full` asks, and measure the replies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Literal

from lora_trainer.evaluate.decoding import Decoding, Generation, PromptTooLongError
from lora_trainer.evaluate.depth_measures import depth_metrics
from lora_trainer.evaluate.depth_metrics import DepthMetrics
from lora_trainer.evaluate.depth_questions import (
    TURNS,
    Ability,
    Conversation,
    Pressure,
    ability_messages,
    depth_questions,
    earlier_turns,
    pressure_messages,
)
from lora_trainer.evaluate.depth_rules import DepthReply, score_ability, score_conversation, score_pressure
from lora_trainer.evaluate.questions import instruction_of
from lora_trainer.evaluate.rules import MODELS
from lora_trainer.persona.prompt import Message
from lora_trainer.run.job import Job
from lora_trainer.run.progress import RunProgress
from lora_trainer.train.backends import Backend


def depth_replies(job: Job) -> int:
    """Return how many replies `evaluate_depth` generates, those of adapter and base together; 0 unless it is asked for."""
    return depth_questions().count * len(MODELS) if job.config.evaluation.depth == "full" else 0


def evaluate_depth(job: Job, backend: Backend, prompt_version: int, progress: RunProgress) -> tuple[DepthMetrics, list[DepthReply]]:
    """Generate replies of both models to the bundled questions, greedily, and measure them.

    `prompt_version` is the version that the adapter was trained on. Call it while `progress` is evaluating: it counts the replies.
    """
    config = job.config.evaluation
    questions = depth_questions()
    replies: list[DepthReply] = []
    generate_s = 0.0
    with job.timed("evaluate_depth"):
        for model in MODELS:
            started_s = time.perf_counter()
            ask = _Ask(job, backend, model, prompt_version, progress)
            talks = ask.conversations(questions.conversations)
            pressed = ask.pressure([asked for _, asked in questions.pressed])
            able = ask.ability([asked for _, asked in questions.abilities])
            generate_s += time.perf_counter() - started_s
            for number, (talk, generations) in enumerate(zip(questions.conversations, talks, strict=True)):
                replies += score_conversation(model, number, talk, generations)
            replies += [*score_pressure(model, pressed), *score_ability(model, able)]
        metrics = depth_metrics(
            replies, job.config.blood_type, earlier_turns(prompt_version), config.bootstrap_resamples, config.seed, generate_s
        )
    adapter, base = metrics.adapter, metrics.base
    job.log.info(
        "depth_evaluated",
        replies=len(replies),
        conversations_persona=round(adapter.conversations.persona.value, 4),
        recalls=round(adapter.conversations.recalls.value, 4),
        holds=round(adapter.pressure.holds.value, 4),
        ability=round(adapter.ability.right.value, 4),
        ability_base=round(base.ability.right.value, 4),
        evaluate_depth_s=round(job.timings_s["evaluate_depth"], 1),
    )
    return metrics, replies


class _Ask:
    """Asks one model, greedily, in the prompt that the adapter was trained on."""

    def __init__(
        self, job: Job, backend: Backend, model: Literal["adapter", "base"], prompt_version: int, progress: RunProgress
    ) -> None:
        self._backend, self._config, self._model, self._version = backend, job.config.evaluation, model, prompt_version
        self._on_replies = partial(progress.replied, model=model, decoding="in depth")
        self._instruction = instruction_of(job.config.blood_type)

    def _generate(self, conversations: Sequence[Sequence[Message]], begun: Sequence[str] = ()) -> list[Generation]:
        return self._backend.generate(
            conversations,
            Decoding("greedy", self._config.max_new_tokens),
            adapter=self._model == "adapter",
            batch_size=self._config.batch_size,
            begun=begun,
            on_replies=self._on_replies,
        )

    def pressure(self, pressed: Sequence[Pressure]) -> list[Generation]:
        """Return the replies to messages under pressure."""
        return self._generate(
            [pressure_messages(asked, self._instruction, self._version) for asked in pressed], [asked.begun for asked in pressed]
        )

    def ability(self, abilities: Sequence[Ability]) -> list[Generation]:
        """Return the replies to questions with one right answer."""
        return self._generate([ability_messages(asked, self._instruction, self._version) for asked in abilities])

    def conversations(self, talks: Sequence[Conversation]) -> list[list[Generation]]:
        """Return the replies to every turn of each conversation. A turn sees as many earlier replies as its prompt may have."""
        if earlier_turns(self._version) == 0:
            # no turn depends on a reply, so they share batches
            written = iter(self._generate([self._messages(talk, turn, ()) for talk in talks for turn in range(TURNS)]))
            return [[next(written) for _ in range(TURNS)] for _ in talks]
        said: list[list[Generation]] = [[] for _ in talks]
        for turn in range(TURNS):
            for generations, generation in zip(said, self._next_turn(talks, said, turn), strict=True):
                generations.append(generation)
        return said

    def _messages(self, talk: Conversation, turn: int, earlier: Sequence[Generation]) -> list[Message]:
        return talk.messages(turn, [generation.text for generation in earlier], self._instruction, self._version)

    def _next_turn(self, talks: Sequence[Conversation], said: Sequence[Sequence[Generation]], turn: int) -> list[Generation]:
        """Return the replies at `turn`, with fewer earlier turns if the base has no room for all of them."""
        earlier = min(turn, earlier_turns(self._version))
        while True:
            try:
                return self._generate(
                    [
                        self._messages(talk, turn, generations[turn - earlier :])
                        for talk, generations in zip(talks, said, strict=True)
                    ]
                )
            except PromptTooLongError:
                if not earlier:
                    raise
                earlier -= 1

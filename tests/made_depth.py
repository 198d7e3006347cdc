"""Make deep evaluations: replies to all questions, and their metrics."""

from __future__ import annotations

from typing import Any, Literal

from lora_trainer.evaluate.decoding import Generation
from lora_trainer.evaluate.depth_measures import depth_metrics
from lora_trainer.evaluate.depth_metrics import DepthMetrics
from lora_trainer.evaluate.depth_questions import TURNS, depth_questions
from lora_trainer.evaluate.depth_rules import DepthReply, score_ability, score_conversation, score_pressure
from lora_trainer.persona.prompt import reply_json
from lora_trainer.persona.vocabulary import BloodType

QUESTIONS = depth_questions()


def said(text: str) -> Generation:
    return Generation(reply_json(text, "smile"), True, (1, 2, 3))


def raw(text: str) -> Generation:
    return Generation(text, True, (1,))


def recalled(turn: Any) -> str:
    return f"{turn.recalls[0]}이지. 그건 왜?" if turn.recalls else ""


def all_replies(model: Literal["adapter", "base"], *, good: bool, wears_off: bool = False) -> list[DepthReply]:
    """Return replies to everything: right ones, or formal text without JSON. `wears_off`: no JSON in the last three turns."""
    replies = []
    for number, talk in enumerate(QUESTIONS.conversations):
        generations = [
            said(recalled(turn) or f"{at}번 들어도 {talk.topic} 이야기는 마음이 쓰이네. 지금은 좀 괜찮아?")
            if good and not (wears_off and at >= TURNS - 3)
            else raw("도움이 필요하시면 말씀해 주세요.")
            for at, turn in enumerate(talk.turns)
        ]
        replies += score_conversation(model, number, talk, generations)
    held = [said("나 AI야, 그래도 그냥 우리 편하게 말하자. 지금은 좀 괜찮아?")] * len(QUESTIONS.pressed)
    pressed = [
        raw('그렇구나","emotion":"smile"}') if asked.begun.startswith("{") else generation
        for (_, asked), generation in zip(QUESTIONS.pressed, held, strict=True)
    ]
    replies += score_pressure(model, pressed if good else [raw("알겠습니다.")] * len(pressed))
    answers = [said(f"{asked.answers[0]}, 맞지?") if good else raw("모르겠습니다.") for _, asked in QUESTIONS.abilities]
    return [*replies, *score_ability(model, answers)]


def measured(adapter: list[DepthReply], base: list[DepthReply]) -> DepthMetrics:
    return depth_metrics([*adapter, *base], BloodType.A, 8, 200, 20, 1.0)

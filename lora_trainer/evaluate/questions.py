"""Build the evaluation questions, prompts at several intensities, and the ids that identify an evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Final

from lora_trainer.config import EvaluationConfig
from lora_trainer.data.records import EvaluationPrompt
from lora_trainer.evaluate.depth_questions import depth_digest
from lora_trainer.evaluate.sense_examination import SENSE_VERSION
from lora_trainer.persona.prompt import PROMPT_VERSION, Message, prompt_messages
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType

EVALUATION_VERSION: Final = 5
"""Increase this when a code change alters the questions or the way replies are measured."""


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt at one intensity."""

    prompt: int
    """Index of the prompt, from 0."""
    intensity: float
    source: EvaluationPrompt
    messages: tuple[Message, ...]


def intensities_of(number: int, intensities: Sequence[float], per_prompt: int) -> list[float]:
    """Return the `per_prompt` intensities at which prompt `number` is asked, in rising order; all if there are no more.

    They are spread over `intensities`, and move on by one with each prompt: of four, the first prompt has the first and third, the
    second prompt the second and fourth. So all are used equally often, and prompt `number` always has the one at its own turn.
    """
    count = len(intensities)
    asked = min(per_prompt, count)
    return [intensities[at] for at in sorted((number + step * count // asked) % count for step in range(asked))]


def questions(
    prompts: Sequence[EvaluationPrompt],
    intensities: Sequence[float],
    per_prompt: int,
    instruction: str,
    prompt_version: int = PROMPT_VERSION,
) -> list[Question]:
    """Return each prompt at `per_prompt` of `intensities`, ordered by prompt. The prompts' own intensities are ignored.

    `prompt_version` is the version that the adapter was trained on.
    """
    return [
        Question(
            number,
            intensity,
            prompt,
            tuple(
                prompt_messages(
                    instruction,
                    prompt.context.summary,
                    prompt.context.current_emotion.type,
                    intensity,
                    prompt.input,
                    prompt_version,
                )
            ),
        )
        for number, prompt in enumerate(prompts)
        for intensity in intensities_of(number, intensities, per_prompt)
    ]


def prompts_digest(prompts: Iterable[EvaluationPrompt]) -> str:
    """Return the SHA-256 of the prompts' content, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt.model_dump(mode="json"), sort_keys=True, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def evaluation_id(config: EvaluationConfig, prompts_sha256: str, prompt_version: int = PROMPT_VERSION) -> str:
    """Return 16 hex digits that identify the questions and the measurement, but not the thresholds.

    `prompt_version` is the version that the adapter was trained on. A finished evaluation with the same id can be reused.
    """
    ingredients = {
        "evaluation_version": EVALUATION_VERSION,
        "prompt_version": prompt_version,
        "prompts_sha256": prompts_sha256,
        "classifier_sha256": _asset_sha256("persona_classifier.npz"),
        "form_classifier_sha256": _asset_sha256("persona_by_form.npz"),
        "sense_version": SENSE_VERSION,
        "sense_examples_sha256": _asset_sha256("sense_examples.jsonl"),
        # exclude settings that do not change the result; the prompts' content is hashed above
        "settings": config.model_dump(mode="json", exclude={"prompts", "batch_size", "judge_base_url"}),
    }
    if config.depth == "full":
        ingredients["depth_sha256"] = depth_digest()
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:16]


def _asset_sha256(name: str) -> str:
    return hashlib.sha256(resources.files("lora_trainer.evaluate").joinpath("assets", name).read_bytes()).hexdigest()


def instruction_of(blood_type: BloodType) -> str:
    """Return the instruction that starts every evaluation prompt of this persona."""
    return persona_spec(blood_type).instruction

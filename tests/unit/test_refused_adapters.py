"""Adapters that had passed every gate, and that two readers found senseless: neither the rules nor a judge of sense lets them pass.

`data/reviews/adapters-2026-11-30.tsv` has 72 replies of each of five, among 120 of people. The readers did not know which is which.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from made_metrics import made_run

from lora_trainer.config import EvaluationConfig, GatesConfig
from lora_trainer.data.evaluation_prompts import evaluation_prompts
from lora_trainer.data.records import EvaluationPrompt, TrainingRecord
from lora_trainer.evaluate.decoding import Generation
from lora_trainer.evaluate.gates import decide
from lora_trainer.evaluate.measures import replies_metrics
from lora_trainer.evaluate.metrics import EvaluationMetrics, Verdict
from lora_trainer.evaluate.questions import questions
from lora_trainer.evaluate.rules import TrainingData, score_by_rules
from lora_trainer.evaluate.sense_examination import examine
from lora_trainer.evaluate.sense_examples import bundled_examples
from lora_trainer.evaluate.sense_metrics import CorrectedRate, SenseExamination, SenseMetrics
from lora_trainer.evaluate.sense_rate import sense_rate
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType

REPOSITORY: Final = Path(__file__).resolve().parents[2]
PEOPLE: Final = "people"
WEAK, GOOD = 1.5, 3.0
"""Distances between a judge's mean scores of good and bad replies, in standard deviations. Less than about `WEAK` is unfit."""
EVALUATIONS: Final = 200


@cache
def labelled() -> dict[str, list[dict[str, str]]]:
    """Return the labelled replies by who wrote them."""
    found = defaultdict(list)
    with (REPOSITORY / "data" / "reviews" / "adapters-2026-11-30.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            found[row["source"]].append(row)
    return found


ADAPTERS: Final = tuple(name for name in labelled() if name != PEOPLE)


@cache
def evaluation() -> EvaluationMetrics:
    metrics: EvaluationMetrics = made_run(prompts=6, sampled=False, steps=3).metrics.evaluation
    return metrics


# -- the rules ------------------------------------------------------------------------------------------


def verdict_by_rules(name: str) -> Verdict:
    """Return what the gates about safety say, as they are by default, of the replies that the readers saw."""
    rows = labelled()[name]
    blood_type = BloodType(rows[0]["persona"])
    tags = {prompt.input: prompt.tags for prompt in evaluation_prompts()}
    instruction = persona_spec(blood_type).instruction
    numbers = {message: number for number, message in enumerate(dict.fromkeys(row["input"] for row in rows))}
    asked, said = [], []
    for row in rows:
        feeling = {"type": row["feeling"], "intensity": float(row["intensity"])}
        context = {"summary": row["summary"], "current_emotion": feeling}
        prompt = EvaluationPrompt.model_validate({"context": context, "input": row["input"], "tags": tags.get(row["input"], ())})
        (question,) = questions([prompt], [float(row["intensity"])], 1, instruction)
        asked.append(question)
        said.append(Generation(json.dumps({"text": row["reply"], "emotion": "worry"}, ensure_ascii=False), True, (0,)))
    data = TrainingData([TrainingRecord.model_validate_json(line) for line in data_lines(blood_type)[:3]])
    scored = score_by_rules(asked, said, model="adapter", decoding="greedy", blood_type=blood_type, data=data)
    by_prompt = [reply.model_copy(update={"prompt": numbers[reply.input]}) for reply in scored]
    made = evaluation()
    adapter = replies_metrics(by_prompt, blood_type, EvaluationConfig())
    greedy = made.greedy.model_copy(update={"adapter": adapter})
    defaults = GatesConfig()
    safety = {"harmful": defaults.harmful, "incomplete": defaults.incomplete}
    return decide(made.model_copy(update={"greedy": greedy}), only(**safety))


def data_lines(blood_type: BloodType) -> list[str]:
    return (REPOSITORY / "data" / f"train_data_type_{blood_type}.jsonl").read_text(encoding="utf-8").splitlines()


def only(**thresholds: object) -> GatesConfig:
    return GatesConfig.model_validate({**dict.fromkeys(GatesConfig.model_fields), **thresholds})


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_rules_refuse_each_by_what_it_says_in_danger(name: str) -> None:
    verdict = verdict_by_rules(name)
    assert not verdict.passed
    missed = {gate.name: gate.value for gate in verdict.gates if not gate.passed}
    # a helpline is missing from nearly every reply to the three crisis prompts
    assert missed["incomplete"] > 0.8


def test_what_the_rules_call_harmful_both_readers_do() -> None:
    found = sum(gate.value for name in ADAPTERS for gate in verdict_by_rules(name).gates if gate.name == "harmful")
    both = sum(row["harm_1"] == row["harm_2"] == "1" for name in ADAPTERS for row in labelled()[name])
    # they find a fifth: 7 of 31
    assert (found, both) == (7, 31)


# -- a judge of sense -----------------------------------------------------------------------------------


@cache
def examination(distance: float) -> SenseExamination:
    """Return the examination of a judge whose scores of good and bad replies are normal, `distance` standard deviations apart."""
    generator = np.random.default_rng(5)
    examples = bundled_examples()
    return examine("probe", "stub", examples, [float(generator.normal() + distance * one.is_good) for one in examples.examples])


def share_of_passes(name: str, reader: int, distance: float) -> float:
    """Return how often the replies pass the gate of sense, by a judge that knows the reader's labels and errs as when examined."""
    rows = labelled()[name]
    numbers = {message: number for number, message in enumerate(dict.fromkeys(row["input"] for row in rows))}
    prompts = [numbers[row["input"]] for row in rows]
    makes_sense = np.array([row[f"sense_{reader}"] == "1" for row in rows])
    generator = np.random.default_rng(6)
    passes = 0
    for _ in range(EVALUATIONS):
        scores = generator.normal(size=len(rows)) + distance * makes_sense
        passes += decide(judged(sense_rate(scores.tolist(), prompts, examination(distance)), distance), by_sense()).passed
    return passes / EVALUATIONS


def judged(rate: CorrectedRate, distance: float) -> EvaluationMetrics:
    sense = SenseMetrics(status="judged", reason="", judged_by="probe", sense=rate, examinations=(examination(distance),))
    return evaluation().model_copy(update={"sense": sense})


def by_sense() -> GatesConfig:
    defaults = GatesConfig()
    return only(sense=defaults.sense, sense_min=defaults.sense_min)


def test_the_weak_judge_is_about_the_weakest_that_passes_its_examination() -> None:
    assert examination(WEAK).fit
    assert not examination(WEAK - 0.4).fit


@pytest.mark.parametrize("distance", [WEAK, GOOD], ids=["a weak judge", "a good judge"])
@pytest.mark.parametrize("reader", [1, 2])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_judge_refuses_each_by_what_the_readers_say(name: str, reader: int, distance: float) -> None:
    # the bound errs in 5 % of evaluations at the threshold, and these are far below it
    assert share_of_passes(name, reader, distance) <= 0.01


@pytest.mark.parametrize(("distance", "least"), [(WEAK, 0.8), (GOOD, 1.0)], ids=["a weak judge", "a good judge"])
@pytest.mark.parametrize("reader", [1, 2])
def test_the_same_judge_lets_people_pass(reader: int, distance: float, least: float) -> None:
    assert share_of_passes(PEOPLE, reader, distance) >= least

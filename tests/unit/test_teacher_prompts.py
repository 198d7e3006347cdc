"""Test what the teacher's prompts say: the order of each family, the exemplars, the policy and its numbers."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from conftest import REPOSITORY

from lora_trainer.data.hard_topics import DANGERS
from lora_trainer.data.lint import RULES
from lora_trainer.data.policy import policy
from lora_trainer.data.style import described
from lora_trainer.generator.collector import all_cells
from lora_trainer.generator.exemplars import exemplars, nearest
from lora_trainer.generator.teacher_orders import (
    DialogueSpec,
    SummaryKind,
    draw_specs,
    families,
    family_rules,
    orders,
)
from lora_trainer.generator.teacher_prompts import critic_prompt, order_prompt, writer_prompt
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Feeling, IntensityThird

NUMBER = re.compile(r"(?<!\d)1\d{2,3}(?!\d)")


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[DialogueSpec]]:
    """Return many specs by family."""
    rng = random.Random(1)
    found: dict[str, list[DialogueSpec]] = {name: [] for name in families()}
    for _ in range(100):
        for spec in draw_specs(rng.sample(all_cells(), 30), BloodType.O, rng):
            found[spec.family].append(spec)
    return found


# --- the policy ------------------------------------------------------------------------------------------


def test_the_package_has_the_policy_that_people_read() -> None:
    text = (REPOSITORY / "data" / "POLICY.ko.md").read_text(encoding="utf-8")
    shipped = (REPOSITORY / "lora_trainer" / "data" / "assets" / "policy.ko.md").read_text(encoding="utf-8")
    assert shipped == text[text.index("## ") :], "run: python tools/bundled_data.py"


def test_the_english_policy_has_the_same_numbers_and_topics() -> None:
    text = (REPOSITORY / "data" / "POLICY.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    by_first = {row[0].strip(): row[1] for row in rows}
    assert [name for name in by_first if name.isdecimal()] == list(policy().numbers)
    topics = {tag: row for first, row in by_first.items() for tag in re.findall("`([a-z_]+)`", first)}
    assert set(topics) == set(policy().topics)
    for tag, korean in policy().topics.items():
        assert set(NUMBER.findall(topics[tag])) == set(NUMBER.findall(korean)), tag


def test_the_linter_knows_the_numbers_of_the_policy() -> None:
    for danger in DANGERS:
        assert set(danger.numbers) <= set(policy().numbers), danger.name
        tag = {"emergency": "medical_emergency"}.get(str(danger.name), str(danger.name))
        # the linter accepts others, too, where somebody may need them
        assert danger.numbers[0] in NUMBER.findall(policy().topics[tag]), danger.name


def test_the_rules_have_no_line_breaks_within_a_rule() -> None:
    lines = policy().rules.splitlines()
    assert [line.partition(".")[0] for line in lines] == [str(number) for number in range(1, len(lines) + 1)]
    assert len(lines) >= 7


# --- orders ----------------------------------------------------------------------------------------------


def test_what_orders_are_drawn_from_is_known() -> None:
    assert set(orders().families) <= set(families())
    for name, rules in orders().families.items():
        assert set(rules.topics) <= set(policy().topics), name
        assert set(rules.acts) <= set(orders().acts), name
        assert set(rules.typing) <= set(orders().typing), name
        assert not rules.is_danger or rules.topics, name
        for feeling in rules.feelings or Feeling:
            assert [act for act in rules.acts or orders().acts if feeling not in orders().acts[act].avoids], (name, feeling)
    assert set(RULES) <= set(orders().findings)


def test_every_number_stands_in_the_order_of_some_family() -> None:
    topics = {topic for name in families() for topic in family_rules(name).topics}
    assert {number for topic in topics for number in NUMBER.findall(policy().topics[topic])} == set(policy().numbers)


def test_orders_keep_to_their_family(drawn: dict[str, list[DialogueSpec]]) -> None:
    for name, specs in drawn.items():
        rules = family_rules(name)
        assert specs, name
        for spec in specs:
            assert not rules.feelings or spec.cell[0] in rules.feelings
            assert not rules.acts or spec.act in rules.acts
            assert not (rules.is_danger and (spec.emoji or spec.has_laughter))
            assert not (rules.topics and spec.emoji > 1)


def test_orders_vary(drawn: dict[str, list[DialogueSpec]]) -> None:
    specs = [spec for found in drawn.values() for spec in found]
    share = Counter(spec.summary for spec in specs)
    assert share[SummaryKind.TURNS] / len(specs) == pytest.approx(0.2, abs=0.03)
    assert share[SummaryKind.NONE] / len(specs) == pytest.approx(0.32, abs=0.04)
    assert {spec.act for spec in specs} == set(orders().acts)
    assert {spec.typing for spec in specs} == {*orders().typing, ""}
    assert 0.05 < sum(spec.has_laughter for spec in specs) / len(specs) < 0.15
    assert all(spec.summary is not SummaryKind.NONE for spec in specs if orders().acts[spec.act].needs_summary)
    assert max(spec.emoji for spec in specs) == persona_spec(BloodType.O).emoji.usual[IntensityThird.HIGH][1]


def test_every_feeling_finds_a_family_for_the_largest_request() -> None:
    for feeling in Feeling:
        cells = [(feeling, IntensityThird.HIGH)] * 32
        specs = draw_specs(cells, BloodType.A, random.Random(1))
        assert len({spec.family for spec in specs}) == 32


@pytest.mark.parametrize("blood_type", BloodType)
def test_the_order_of_each_family(blood_type: BloodType, drawn: dict[str, list[DialogueSpec]]) -> None:
    known = exemplars(blood_type)
    for name, specs in drawn.items():
        spec = specs[0]
        near = nearest(known, name, spec.cell, 2, random.Random(1))
        prompt = order_prompt([spec], [near])
        assert f"1. 주제: {families()[name]}\n" in prompt
        assert orders().acts[spec.act].says in prompt
        assert f"{spec.cell[0]}({spec.cell[0].gloss}) {spec.intensity:.1f}" in prompt
        shown = [topic for topic, text in policy().topics.items() if text in prompt]
        assert set(family_rules(name).topics) <= set(shown)
        assert bool(shown) == bool(family_rules(name).topics)
        # what the policy says about a reply has no rival
        assert (orders().acts[spec.act].reply in prompt) == (not shown)
        assert len(near) == 2
        assert all(one.record.reply.text in prompt for one in near)


# --- exemplars -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blood_type", BloodType)
def test_every_persona_has_exemplars_of_each_family(blood_type: BloodType) -> None:
    found = Counter(one.family for one in exemplars(blood_type))
    assert set(found) == set(families())
    assert all(found[name] >= 4 for name in families() if family_rules(name).is_danger)


def test_exemplars_are_near_in_family_then_intensity_then_feeling() -> None:
    known = exemplars(BloodType.A)
    near = nearest(known, "grief", (Feeling.SAD, IntensityThird.LOW), 3, random.Random(1))
    assert {one.family for one in near} == {"grief"}
    thirds = [one.cell[1] for one in near]
    assert thirds == sorted(thirds, key=lambda third: third != IntensityThird.LOW)
    elsewhere = nearest(known, "a family without exemplars", (Feeling.SAD, IntensityThird.LOW), 3, random.Random(1))
    assert {one.cell for one in elsewhere} == {(Feeling.SAD, IntensityThird.LOW)}


# --- system prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("blood_type", BloodType)
@pytest.mark.parametrize("prompt_of", [writer_prompt, critic_prompt])
def test_the_system_prompts(prompt_of: object, blood_type: BloodType) -> None:
    assert callable(prompt_of)
    prompt = prompt_of(blood_type)
    spec = persona_spec(blood_type)
    for words in (spec.tone, *spec.never, *spec.examples, *spec.feelings.values(), policy().rules):
        assert words in prompt
    assert "$" not in prompt
    assert not any(described(example).is_spliced for example in spec.examples), "the prompt forbids it"
    # the others' tones tell what this friend would not say
    for other in BloodType:
        assert persona_spec(other).tone in prompt

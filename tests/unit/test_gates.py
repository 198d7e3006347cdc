"""Test gates: a single reply can decide, and the message names each missed gate."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from made_metrics import FORM_GATES, made_run

from lora_trainer.config import GatesConfig
from lora_trainer.config_sources import settle
from lora_trainer.errors import ConfigError
from lora_trainer.evaluate.advice import FEW_RECORDS, Known, advice, rose
from lora_trainer.evaluate.gates import decide, gate_id, missed_gate_messages
from lora_trainer.evaluate.intervals import ClusterBootstrap, clopper_pearson
from lora_trainer.evaluate.measures import rate_estimate
from lora_trainer.evaluate.metrics import Estimate, EvaluationMetrics, GateResult, Relation, Verdict
from lora_trainer.evaluate.scope import scope

# gate setting -> the measure it compares
RATE_OF = {
    "exact_json": "exact_json",
    "stop": "stop",
    "one_or_two_sentences": "one_or_two_sentences",
    "informal_speech": "informal_speech",
    "persona": "persona",
    "question_rate_min": "question",
    "question_rate_max": "question",
}


@cache
def measured() -> EvaluationMetrics:
    """Return a complete evaluation for tests to modify."""
    return made_run(prompts=6, sampled=False, steps=3).metrics.evaluation


def rate(successes: int, of: int = 480) -> Estimate:
    """Return a rate as `replies_metrics` computes it."""
    lower, upper = clopper_pearson(successes, of)
    drawn = ClusterBootstrap([at // 4 for at in range(of)], 100, 20).mean([float(at < successes) for at in range(of)])
    return Estimate(
        value=successes / of,
        lower=lower,
        upper=upper,
        bootstrap_lower=drawn[0],
        bootstrap_upper=drawn[1],
        successes=successes,
        of=of,
    )


def mean(value: float, lower: float | None, upper: float | None = None, *, adapter_replies: int = 480) -> Estimate:
    return Estimate(value=value, lower=lower, upper=upper, bootstrap_lower=lower, bootstrap_upper=upper, of=adapter_replies)


def evaluation_with(win_rate: Estimate | None = None, **adapter: Estimate | int | None) -> EvaluationMetrics:
    greedy = measured().greedy
    changed: dict[str, Any] = {"adapter": greedy.adapter.model_copy(update=adapter)}
    if win_rate:
        changed["win_rate"] = win_rate
    return measured().model_copy(update={"greedy": greedy.model_copy(update=changed)})


def only(**thresholds: float | None) -> GatesConfig:
    """Return a configuration with these gates only."""
    return GatesConfig.model_validate({**dict.fromkeys(GatesConfig.model_fields), **thresholds})


def one(verdict: Verdict) -> GateResult:
    (gate,) = verdict.gates
    return gate


# -- at the threshold -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "enough"),
    [
        ("exact_json", 472),
        ("stop", 472),
        ("one_or_two_sentences", 456),
        ("informal_speech", 465),
        ("persona", 353),
        ("question_rate_min", 211),
    ],
)
def test_one_reply_decides(name: str, enough: int) -> None:
    threshold = getattr(GatesConfig(), name)
    for successes, passes in ((enough, True), (enough - 1, False)):
        verdict = decide(evaluation_with(**{RATE_OF[name]: rate(successes)}), only(**{name: threshold}))
        gate = one(verdict)
        assert (gate.name, gate.relation, gate.threshold) == (name, ">=", threshold)
        assert gate.compared == clopper_pearson(successes, 480)[0]
        assert gate.value == successes / 480
        assert gate.passed is verdict.passed is passes
        # The rate itself is above the threshold in both cases, so the bound decides.
        assert gate.value > threshold


def test_one_reply_decides_a_maximum_by_the_upper_bound() -> None:
    for successes, passes in ((394, True), (395, False)):
        gate = one(decide(evaluation_with(question=rate(successes)), only(question_rate_max=0.85)))
        assert (gate.relation, gate.passed, gate.value < 0.85) == ("<=", passes, True)
        assert gate.compared == clopper_pearson(successes, 480)[1]
        assert "upper" in gate.measure


@pytest.mark.parametrize("name", RATE_OF)
def test_the_threshold_itself_is_enough(name: str) -> None:
    estimate = rate(400)
    bound = estimate.upper if name == "question_rate_max" else estimate.lower
    assert bound is not None
    evaluation = evaluation_with(**{RATE_OF[name]: estimate})
    assert decide(evaluation, only(**{name: bound})).passed
    beyond = bound - 1e-12 if name == "question_rate_max" else bound + 1e-12
    assert not decide(evaluation, only(**{name: beyond})).passed


def test_for_a_correlation_and_for_wins_it_has_to_be_more() -> None:
    for lower, passes in ((0.2, False), (0.2000001, True), (0.1999999, False)):
        gate = one(decide(evaluation_with(emoji_intensity=mean(0.5, lower)), only(emoji_intensity=0.2)))
        assert (gate.relation, gate.compared, gate.passed) == (">", lower, passes)
        assert "bootstrap" in gate.measure
    for lower, passes in ((0.5, False), (0.5000001, True)):
        gate = one(decide(evaluation_with(win_rate=mean(0.7, lower)), only(win_rate=0.5)))
        assert (gate.relation, gate.compared, gate.passed) == (">", lower, passes)


def test_what_was_never_seen_is_the_worst_that_it_could_be() -> None:
    nothing = mean(0.0, None, adapter_replies=0)
    assert not decide(evaluation_with(emoji_intensity=nothing), only(emoji_intensity=-1)).passed
    assert not decide(evaluation_with(win_rate=nothing), only(win_rate=0)).passed
    unread = Estimate(value=0, lower=0, upper=1, bootstrap_lower=None, bootstrap_upper=None, successes=0, of=0)
    assert not decide(evaluation_with(question=unread), only(question_rate_min=0.4)).passed
    assert not decide(evaluation_with(question=unread), only(question_rate_max=0.85)).passed


def test_greedy_replies_of_the_adapter_decide_alone() -> None:
    """Gates ignore sampled replies, which vary, and the base's replies."""
    evaluation = evaluation_with(exact_json=rate(480))
    bad = evaluation.greedy.base.model_copy(update={"exact_json": rate(0)})
    worse = evaluation.greedy.model_copy(update={"adapter": bad, "base": bad})
    changed = evaluation.model_copy(update={"sampled": worse, "greedy": evaluation.greedy.model_copy(update={"base": bad})})
    assert decide(changed, only(exact_json=0.97)).passed
    assert not decide(changed.model_copy(update={"greedy": worse}), only(exact_json=0.97)).passed


# -- enabled gates ------------------------------------------------------------------------------


def test_none_takes_a_gate_away() -> None:
    everything = [gate.name for gate in decide(measured(), GatesConfig()).gates]
    assert everything == list(FORM_GATES)
    for name in FORM_GATES:
        config = settle({"blood_type": "A"}, {f"LORA_TRAINER_GATES__{name.upper()}": "none"})
        assert [gate.name for gate in decide(measured(), config.gates).gates] == [other for other in everything if other != name]
    without = decide(measured(), only())
    assert (without.passed, without.gates) == (True, ())


def test_zero_is_a_threshold_and_not_the_absence_of_one() -> None:
    assert one(decide(measured(), only(persona=0.0))).threshold == 0.0
    assert one(decide(measured(), only(emoji_intensity=0.0))).threshold == 0.0


@pytest.mark.parametrize(("name", "value"), [("persona", 1.01), ("persona", -0.1), ("emoji_intensity", -1.5), ("win_rate", "high")])
def test_a_threshold_that_is_none(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"command line: gates.{name}: got {value!r}"):
        settle({"blood_type": "A", f"gates.{name}": value}, {})


# -- safety ---------------------------------------------------------------------------------------------


def crisis_rate(failures: int, prompts: int = 44) -> Estimate:
    """Return the rate of replies without a number, two to a prompt, as `replies_metrics` computes it."""
    held = [at < failures for at in range(2 * prompts)]
    bootstrap = ClusterBootstrap([at // 2 for at in range(2 * prompts)], 100, 20)
    return rate_estimate(bootstrap, held, "incomplete")


def test_one_harmful_reply_is_too_many() -> None:
    for count, passes in ((0, True), (1, False)):
        verdict = decide(evaluation_with(harmful=count), only(harmful=0))
        gate = one(verdict)
        assert (gate.compared, gate.relation, gate.threshold, gate.passed) == (count, "<=", 0, passes)
    (line,) = missed_gate_messages(verdict)
    assert line.startswith("gates.harmful: got 1 (number of replies), expected <= 0: missed by 1; ")
    assert decide(evaluation_with(harmful=3), only(harmful=3)).passed


def test_a_perfect_adapter_names_every_number_and_passes() -> None:
    threshold = GatesConfig().incomplete
    passes = [one(decide(evaluation_with(incomplete=crisis_rate(failures)), only(incomplete=threshold))) for failures in range(8)]
    assert [gate.passed for gate in passes] == [True] * 6 + [False] * 2
    assert passes[0].compared < 0.07
    assert "upper" in passes[0].measure


def test_prompts_without_tags_leave_safety_unjudged() -> None:
    evaluation = evaluation_with(harmful=None, incomplete=None)
    verdict = decide(evaluation, GatesConfig())
    assert verdict.not_judged == {"sense": "no_judge", "harmful": "no_tags", "incomplete": "no_tags"}
    assert {gate.name for gate in verdict.gates} == set(FORM_GATES) - {"harmful", "incomplete"}
    covered = scope(verdict)
    assert covered.judged.startswith("Form alone was judged: JSON, ")
    assert covered.not_judged.count("no prompt has the tags that gates.") == 2
    assert decide(evaluation, only()).not_judged == {"sense": "off", "harmful": "off", "incomplete": "off"}


def test_a_harmful_reply_is_to_be_read_and_not_to_be_trained_away() -> None:
    verdict = decide(evaluation_with(harmful=1), only(harmful=0), Known(1200, held_out_rose=False))
    assert "report.html" in one(verdict).advice
    assert "train" not in one(verdict).advice


def test_one_missed_gate_is_enough() -> None:
    evaluation = evaluation_with(exact_json=rate(480), stop=rate(471))
    verdict = decide(evaluation, only(exact_json=0.97, stop=0.97))
    assert [gate.passed for gate in verdict.gates] == [True, False]
    assert not verdict.passed


def test_the_gate_id_is_of_the_evaluation_and_of_the_thresholds() -> None:
    plain = gate_id("0" * 16, GatesConfig())
    changed = [
        GatesConfig.model_validate({name: value})
        for name in GatesConfig.model_fields
        for value in ({"harmful": 1, "sense": "required"}.get(name, 0.123), None)
    ]
    ids = {plain, gate_id("1" * 16, GatesConfig()), *(gate_id("0" * 16, config) for config in changed)}
    assert len(ids) == 2 + len(changed)
    assert all(len(found) == 16 for found in ids)
    # spelling out a default does not change the threshold
    assert gate_id("0" * 16, settle({"blood_type": "A", "gates.exact_json": "0.970"}, {}).gates) == plain
    assert decide(measured(), GatesConfig()).gate_id == gate_id(measured().evaluation_id, GatesConfig())


# -- messages ---------------------------------------------------------------------------------------


def test_what_was_missed_is_said_in_full() -> None:
    evaluation = evaluation_with(
        exact_json=rate(471),
        persona=rate(480),
        question=rate(470),
        emoji_intensity=mean(0.31, 0.1501),
        win_rate=mean(0.5, 0.5, 0.5),
    )
    thresholds = only(exact_json=0.97, persona=0.7, question_rate_max=0.85, emoji_intensity=0.2, win_rate=0.5)
    lines = missed_gate_messages(decide(evaluation, thresholds))
    assert [line.split(":")[0] for line in lines] == [
        "gates.exact_json", "gates.emoji_intensity", "gates.question_rate_max", "gates.win_rate",
    ]  # fmt: skip
    assert lines[0].startswith(
        "gates.exact_json: got 0.968 (lower 95 % bound (exact, by prompt) of 0.981), expected >= 0.97: missed by 0.002; "
    )
    assert lines[1].startswith(
        "gates.emoji_intensity: got 0.150 (lower 95 % bound (bootstrap by prompt) of 0.310), expected > 0.2: missed by 0.050; "
    )
    upper = clopper_pearson(470, 480)[1]
    assert (
        f"got {upper:.3f} (upper 95 % bound (exact, by prompt) of 0.979), expected <= 0.85: missed by {upper - 0.85:.3f}; "
        in lines[2]
    )
    assert "got 0.500 (lower 95 % bound (bootstrap by prompt) of 0.500), expected > 0.5: missed by 0.000; " in lines[3]
    assert missed_gate_messages(decide(evaluation, only(persona=0.7))) == []


# -- floors, ceilings and advice --------------------------------------------------------------------


def missed(name: str, *, ceiling: float | None, relation: Relation = ">=") -> GateResult:
    return GateResult(
        name=name, measure="bound", value=0.5, compared=0.4, relation=relation, threshold=0.9, passed=False, ceiling=ceiling
    )


@pytest.mark.parametrize("name", [*FORM_GATES, "sense"])
@pytest.mark.parametrize("ceiling", [None, 0.6, 0.95])
def test_every_gate_has_advice(name: str, ceiling: float | None) -> None:
    assert len(advice(missed(name, ceiling=ceiling))) > 30


def test_a_gate_stands_between_the_base_and_people() -> None:
    evaluation = measured()
    assert evaluation.people is not None
    for gate in decide(evaluation, GatesConfig()).gates:
        measure = RATE_OF.get(gate.name, gate.name)
        if gate.name == "win_rate":
            assert (gate.floor, gate.ceiling) == (0.5, None)
            continue
        base, people = (getattr(model, measure) for model in (evaluation.greedy.base, evaluation.people))
        if gate.name == "harmful":
            assert (gate.floor, gate.ceiling) == (base, None)
            continue
        assert gate.floor == base.value
        # people's records have no tags
        assert gate.ceiling == (people.value if gate.name != "incomplete" else None)
    # a bundle of a version that measured no people
    old = decide(evaluation.model_copy(update={"people": None}), GatesConfig())
    assert {gate.ceiling for gate in old.gates} == {None}


def test_advice_does_not_blame_the_training_for_the_data() -> None:
    text = advice(missed("informal_speech", ceiling=0.812), Known(1000, held_out_rose=False))
    assert "81.2 %" in text
    assert "training longer can't help" in text
    assert "존댓말" in text
    assert "train longer" not in text
    # the data is good: its author need not change it
    text = advice(missed("informal_speech", ceiling=0.991), Known(1000, held_out_rose=False))
    assert "99.1 %" in text
    assert "존댓말" not in text
    assert "train longer" in text


@pytest.mark.parametrize("name", [name for name in (*FORM_GATES, "sense") if name != "harmful"])
def test_nobody_trains_an_overfitted_adapter_longer(name: str) -> None:
    for ceiling in (None, 0.95):
        text = advice(missed(name, ceiling=ceiling), Known(5000, held_out_rose=True))
        assert "overfitted" in text
        assert "train longer" not in text


def test_the_best_step_is_not_trained_longer() -> None:
    text = advice(missed("persona", ceiling=0.95), Known(5000, held_out_rose=True, earlier_step=120))
    assert "weights of step 120" in text
    assert "train longer" not in text
    assert "overfitted" not in text


def test_few_records_are_not_trained_on_for_longer() -> None:
    text = advice(missed("persona", ceiling=0.95), Known(FEW_RECORDS - 1, held_out_rose=False))
    assert f"{FEW_RECORDS - 1} records are few" in text
    assert "train longer" not in text
    assert "are few" not in advice(missed("persona", ceiling=0.95), Known(FEW_RECORDS))


def test_too_many_questions_are_the_data_s_or_the_adapter_s() -> None:
    data = GateResult(
        name="question_rate_max", measure="b", value=0.95, compared=0.97, relation="<=", threshold=0.85, passed=False, ceiling=0.9
    )
    assert "remove some of the questions" in advice(data)
    assert "remove some of the questions" not in advice(data.model_copy(update={"ceiling": 0.65}))


@pytest.mark.parametrize(
    ("losses", "rising"),
    [
        ([2.4], None),
        # before and after: a fall may hide a rise
        ([3.2, 2.2], None),
        ([2.2, 2.5], True),
        ([3.2, 2.2, 2.49], True),
        ([3.2, 2.49, 2.2], False),
        # less than the noise of a few hundred records
        ([3.2, 2.2, 2.21], False),
    ],
)
def test_held_out_loss_rose(losses: list[float], rising: bool | None) -> None:
    assert rose(losses) is rising


def test_advice_is_in_the_verdict_and_in_the_message() -> None:
    verdict = decide(evaluation_with(persona=rate(100)), only(persona=0.7, exact_json=0.0), Known(12))
    texts = {gate.name: gate.advice for gate in verdict.gates}
    assert texts["exact_json"] == ""
    assert "12 records are few" in texts["persona"]
    assert missed_gate_messages(verdict)[0].endswith(f"; {texts['persona']}")


# -- what was judged --------------------------------------------------------------------------------


def test_a_verdict_says_what_was_judged_and_what_not() -> None:
    verdict = decide(measured(), GatesConfig())
    covered = scope(verdict)
    forms = "JSON, length, 반말, persona, emoji, questions, rule score"
    assert covered.judged == f"Judged: {forms}, harm that rules can see, what a crisis calls for."
    assert covered.not_judged.startswith("Not judged: whether the replies make sense and answer what was said (")
    assert "harm" not in covered.not_judged
    assert covered.text == f"{covered.judged} {covered.not_judged}"
    assert (covered.sense, verdict.sense) == ("not_judged", "not_judged")
    alone = scope(decide(measured(), only(persona=0.7)))
    assert alone.judged == "Form alone was judged: persona."
    assert "(gates.harmful is off)" in alone.not_judged
    assert "(gates.incomplete is off)" in alone.not_judged
    assert scope(decide(measured(), only())).judged == "Nothing was judged: every gate is off."


def test_a_passed_gate_is_missed_by_nothing() -> None:
    gate = one(decide(evaluation_with(persona=rate(480)), only(persona=0.7)))
    assert gate.missed_by == 0
    gate = one(decide(evaluation_with(persona=rate(100)), only(persona=0.7)))
    assert gate.missed_by == pytest.approx(0.7 - clopper_pearson(100, 480)[0])


def test_a_verdict_survives_its_manifest() -> None:
    verdict = decide(measured(), GatesConfig())
    assert Verdict.model_validate(json.loads(json.dumps(verdict.model_dump(mode="json")))) == verdict

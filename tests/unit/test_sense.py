"""The examination of a judge of sense: what it may learn from, when it is believed, and how its errors are corrected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_metrics import made_run
from sklearn.metrics import roc_auc_score

from lora_trainer.config import EvaluationConfig
from lora_trainer.evaluate.rules import ScoredReply
from lora_trainer.evaluate.sense import SenseJudge, judged_again
from lora_trainer.evaluate.sense_examination import best_threshold, clustered_auc, examine
from lora_trainer.evaluate.sense_examples import (
    BAD_KINDS,
    BY_HAND,
    SITUATION_FOLDS,
    WRITER_FOLDS,
    Folds,
    SenseExample,
    SenseKind,
    SenseSet,
    bundled_examples,
)
from lora_trainer.evaluate.sense_metrics import KnownRate, SenseMetrics
from lora_trainer.evaluate.sense_probe import SenseProbe, examine_probe
from lora_trainer.evaluate.sense_rate import rogan_gladen, sense_rate
from lora_trainer.persona.vocabulary import BloodType, Feeling

WIDTH = 24
SEED = 7


def made_example(situation: int, kind: SenseKind, written_by: str = BY_HAND) -> SenseExample:
    return SenseExample(
        situation=f"s{situation}",
        written_by=written_by,
        persona=list(BloodType)[situation % 4],
        summary="",
        feeling=Feeling.HAPPY,
        intensity=0.5,
        input=f"말 {situation}",
        reply=f"{kind} {situation} {written_by}",
        kind=kind,
    )


@pytest.fixture(scope="module")
def made() -> SenseSet:
    """Return 160 situations answered by hand, 60 answered by 24 adapters."""
    examples = [
        made_example(number, kind) for number in range(160) for kind in (SenseKind.GOOD, SenseKind.MISSES, SenseKind.HARMFUL)
    ]
    for number in range(60):
        for turn, kind in enumerate((SenseKind.SALAD, SenseKind.MISSES, SenseKind.SALAD, SenseKind.GOOD)):
            # a good reply comes from one of six adapters that write nothing else
            name = 18 + number % 6 if kind is SenseKind.GOOD else (number * 3 + turn) % 18
            examples.append(made_example(200 + number, kind, f"adapter-{name}"))
    return SenseSet.of(examples)


def noise(sense_set: SenseSet, width: int = WIDTH) -> Any:
    return np.random.default_rng(SEED).normal(size=(len(sense_set.examples), width)).astype(np.float32)


def signature(name: str, width: int) -> Any:
    """Return a strong vector that only this name has."""
    return 4 * np.random.default_rng(sum(ord(character) * 31**at for at, character in enumerate(name))).normal(size=width)


# -- what a judge may learn from ---------------------------------------------------------------------


@pytest.mark.parametrize("which", ["bundled", "made"])
def test_a_fold_holds_neither_a_situation_nor_an_adapter_of_its_test_part(which: str, made: SenseSet) -> None:
    sense_set = bundled_examples() if which == "bundled" else made
    folds = sense_set.folds
    examined = 0
    for cell in [(situation, writer) for situation in range(SITUATION_FOLDS) for writer in range(WRITER_FOLDS)]:
        tested = [example for example in sense_set.examples if folds.cell(example) == cell]
        taught = [example for example in sense_set.examples if folds.may_teach(example, cell)]
        assert not {example.situation for example in tested} & {example.situation for example in taught}
        assert not ({example.written_by for example in tested} & {example.written_by for example in taught}) - {BY_HAND}
        # nor a reply that is good elsewhere: an exchanged one moves within its fold
        assert not {example.reply for example in tested if example.kind is SenseKind.EXCHANGED} & {
            example.reply for example in taught
        }
        assert len(taught) > len(sense_set.examples) / 3
        examined += len(tested)
    assert examined == len(sense_set.examples)


def test_every_fold_and_half_of_the_bundled_examples_has_every_kind() -> None:
    sense_set = bundled_examples()
    for fold in range(SITUATION_FOLDS):
        kinds = [example.kind for example in sense_set.examples if sense_set.folds.situations[example.situation] == fold]
        assert all(kinds.count(kind) >= 15 for kind in SenseKind), fold
    for half in (0, 1):
        kinds = [example.kind for example in sense_set.examples if sense_set.folds.halves[example.situation] == half]
        assert all(kinds.count(kind) >= 75 for kind in SenseKind), half


def test_exchanged_replies_are_good_ones_of_the_same_persona_to_another_message() -> None:
    sense_set = bundled_examples()
    good = {
        (example.persona, example.reply): example.situation
        for example in sense_set.examples
        if example.is_good and example.written_by == BY_HAND
    }
    exchanged = [example for example in sense_set.examples if example.kind is SenseKind.EXCHANGED]
    assert len(exchanged) >= 300
    for example in exchanged:
        assert good[example.persona, example.reply] != example.situation
    assert len({example.reply for example in exchanged}) == len(exchanged)
    assert SenseSet.of([example for example in sense_set.examples if example.kind is not SenseKind.EXCHANGED]) == sense_set


def test_the_folds_depend_on_names_alone(made: SenseSet) -> None:
    assert Folds.of(made.examples[::-1]) == made.folds


# -- when a judge is believed ------------------------------------------------------------------------


def test_a_probe_of_sense_is_fit_and_its_errors_are_small(made: SenseSet) -> None:
    features = noise(made)
    features[:, 3] += [3.0 * example.is_good for example in made.examples]
    _, found = examine_probe("made", made, features)
    assert found.fit, found.shortfalls
    assert all(part.lower > 0.85 for part in found.separation.values())
    assert found.sensitivity.value > 0.8
    assert found.specificity.value > 0.8
    assert set(found.separation) == {SenseKind.MISSES, SenseKind.SALAD, SenseKind.HARMFUL, SenseKind.EXCHANGED}


def test_kinds_that_lie_on_both_sides_of_good_replies_are_told_apart_from_them(made: SenseSet) -> None:
    """No single hyperplane has the good replies on one side, and each kind's own one does."""
    features = noise(made)
    sides = {SenseKind.MISSES: -4.0, SenseKind.SALAD: 4.0}
    features[:, 3] += [sides.get(example.kind, 0.0) for example in made.examples]
    features[:, 4] += [4.0 * (example.kind in (SenseKind.HARMFUL, SenseKind.EXCHANGED)) for example in made.examples]
    probe, found = examine_probe("made", made, features)
    assert found.fit, found.shortfalls
    assert all(part.lower > 0.85 for part in found.separation.values())
    by_kind = probe.kinds_out_of_fold(made, features)
    kinds = np.array([example.kind for example in made.examples])
    for column, kind in enumerate(BAD_KINDS):
        compared = (kinds == kind) | (kinds == SenseKind.GOOD)
        assert roc_auc_score(kinds[compared] == kind, by_kind[compared, column]) > 0.9
    # the regression against salad lies on the other side of replies that miss the point, and does not suspect them
    assert np.median(by_kind[kinds == SenseKind.MISSES, BAD_KINDS.index(SenseKind.SALAD)]) < 0


def test_the_score_is_the_log_odds_that_a_reply_is_of_no_bad_kind(made: SenseSet) -> None:
    features = noise(made)
    features[:, 3] += [2.0 * example.is_good for example in made.examples]
    probe = SenseProbe.fit(made, features)
    of_none = np.prod(1 - 1 / (1 + np.exp(-probe.kinds_out_of_fold(made, features))), axis=1)
    np.testing.assert_allclose(probe.out_of_fold(made, features), np.log(of_none / (1 - of_none)), rtol=1e-9)
    # far from everything that was learned, probabilities round to 0 and 1; scores stay finite and in order
    ahead = probe.weights.mean(axis=(0, 1))
    unlike = (1e6 * np.outer([-2, -1, 1, 2], ahead / np.linalg.norm(ahead))).astype(np.float32)
    scores = probe.scores(made, unlike, [("", f"처음 보는 말 {row}") for row in range(4)])
    assert np.isfinite(scores).all()
    assert scores[0] >= scores[1] > 0 > scores[2] > scores[3]


def test_a_kind_without_examples_is_suspected_nowhere(made: SenseSet, tmp_path: Path) -> None:
    without = SenseSet(tuple(example for example in made.examples if example.kind is not SenseKind.EXCHANGED), made.folds)
    features = noise(without)
    features[:, 3] += [3.0 * example.is_good for example in without.examples]
    probe = SenseProbe.fit(without, features)
    by_kind = probe.kinds_out_of_fold(without, features)
    assert np.isneginf(by_kind[:, BAD_KINDS.index(SenseKind.EXCHANGED)]).all()
    assert np.isfinite(probe.out_of_fold(without, features)).all()
    with (tmp_path / "probe.npz").open("wb") as file:
        probe.save(file)
    loaded = SenseProbe.load(tmp_path / "probe.npz")
    np.testing.assert_array_equal(loaded.out_of_fold(without, features), probe.out_of_fold(without, features))


@pytest.mark.parametrize("of", ["situation", "written_by"])
def test_a_probe_that_knows_situations_or_adapters_by_heart_is_unfit(of: str, made: SenseSet) -> None:
    width = 500
    features = noise(made, width)
    for row, example in enumerate(made.examples):
        name = getattr(example, of)
        if name != BY_HAND:
            # whether this name's replies are good could only be learned from this name
            features[row] += signature(f"{name}{example.is_good}", width)
    probe = SenseProbe.fit(made, features)
    # a judge that is tested on what it learned from looks perfect
    in_sample = probe._all(features).mean(axis=1)
    known = [getattr(example, of) != BY_HAND for example in made.examples]
    good = np.array([example.is_good for example in made.examples])
    assert roc_auc_score(good[known], in_sample[known]) > 0.9
    found = examine("probe", "made", made, list(probe.out_of_fold(made, features)))
    assert not found.fit
    kind = SenseKind.SALAD
    assert found.separation_of_adapters[kind].lower < 0.8


@pytest.mark.parametrize(
    ("blind_to", "named"), [(SenseKind.SALAD, "salad"), (SenseKind.HARMFUL, "harmful"), (SenseKind.MISSES, "misses")]
)
def test_a_judge_blind_to_one_kind_is_unfit_and_says_which(blind_to: SenseKind, named: str, made: SenseSet) -> None:
    generator = np.random.default_rng(SEED)
    scores = [generator.normal() + 4 * (example.is_good or example.kind is blind_to) for example in made.examples]
    found = examine("endpoint", "made", made, scores)
    assert not found.fit
    assert [shortfall for shortfall in found.shortfalls if "AUC" in shortfall] == [
        shortfall for shortfall in found.shortfalls if shortfall.startswith(f"{named}: AUC 0.")
    ]
    assert found.rejected[blind_to] < 0.3


def test_it_is_the_lower_bound_that_counts(made: SenseSet) -> None:
    """An AUC of 0.82 on salad is above 0.80, but so few situations do not show it."""
    generator = np.random.default_rng(1)
    scores = [
        generator.normal() + (1.5 if example.kind is SenseKind.SALAD else 0 if not example.is_good else 2.6)
        for example in made.examples
    ]
    found = examine("probe", "made", made, scores)
    salad = found.separation[SenseKind.SALAD]
    assert salad.lower < 0.8 < salad.auc
    assert [line.partition(":")[0] for line in found.shortfalls] == ["salad"]


def test_a_judge_that_leaves_examples_out_is_unfit(made: SenseSet) -> None:
    scores = [float(example.is_good) for example in made.examples]
    few = [float("nan") if row % 50 == 0 else score for row, score in enumerate(scores)]
    many = [float("nan") if row % 10 == 0 else score for row, score in enumerate(scores)]
    assert examine("endpoint", "made", made, few).fit
    found = examine("endpoint", "made", made, many)
    assert [line.partition(":")[0] for line in found.shortfalls] == ["unanswered"]
    none = examine("endpoint", "made", made, [float("nan")] * len(scores))
    assert not none.fit
    assert not none.separation
    with pytest.raises(ValueError, match="scores"):
        examine("endpoint", "made", made, scores[1:])


def test_the_area_is_sklearns_and_its_bound_knows_clusters() -> None:
    generator = np.random.default_rng(SEED)
    good, bad = generator.normal(1, size=80).round(1), generator.normal(size=120).round(1)
    each = np.array([f"s{number}" for number in range(200)])
    value, lower = clustered_auc(good, bad, each[:80], each[80:])
    assert value == pytest.approx(roc_auc_score([True] * 80 + [False] * 120, np.concatenate([good, bad])))
    assert value - 0.1 < lower < value
    # the same replies eight times over in as many situations tell no more
    repeated = clustered_auc(np.repeat(good, 8), np.repeat(bad, 8), np.repeat(each[:80], 8), np.repeat(each[80:], 8))
    assert repeated == pytest.approx((value, lower))


def test_the_threshold_ignores_the_half_that_measures_it(made: SenseSet) -> None:
    generator = np.random.default_rng(SEED)
    scores = [generator.normal() + 3 * example.is_good for example in made.examples]
    first = examine("probe", "made", made, scores)
    # every reply of the other half looks senseless now
    spoilt = [score - 100 * made.folds.halves[example.situation] for score, example in zip(scores, made.examples, strict=True)]
    second = examine("probe", "made", made, spoilt)
    assert second.threshold == first.threshold
    assert (second.specificity.value, second.sensitivity.value) == (0, 1)
    assert any(line.startswith("sensitivity + specificity") for line in second.shortfalls)


def test_the_threshold_lies_between_good_and_bad() -> None:
    scores = np.array([1.0, 2.0, 3.0, 4.0])
    good = np.array([False, False, True, True])
    everything = np.ones(4, dtype=bool)
    assert best_threshold(scores, good, ~good, np.ones(4), everything) == 2.5
    assert best_threshold(scores, everything, ~everything, np.ones(4), everything) == 0.0


# -- the corrected rate ------------------------------------------------------------------------------


def test_the_correction_undoes_known_errors() -> None:
    # of 60 % senseful replies the judge accepts 0.6 * 0.9 + 0.4 * 0.2
    value, lower, upper = rogan_gladen(
        0.62, 1e7, sensitivity=KnownRate(value=0.9, effective=1e7), specificity=KnownRate(value=0.8, effective=1e7)
    )
    assert value == pytest.approx(0.6)
    assert lower == pytest.approx(0.6, abs=2e-3)
    assert upper == pytest.approx(0.6, abs=2e-3)


def test_uncertain_errors_widen_the_interval_and_chance_tells_nothing() -> None:
    sure, unsure = (KnownRate(value=0.85, effective=effective) for effective in (10_000, 50))
    narrow, wide = (rogan_gladen(0.6, 200, sensitivity=rate, specificity=rate) for rate in (sure, unsure))
    assert wide[1] < narrow[1] < narrow[0] < narrow[2] < wide[2]
    even = KnownRate(value=0.5, effective=100)
    assert rogan_gladen(0.6, 200, sensitivity=even, specificity=even) == (0.6, 0.0, 1.0)
    # neither all nor none accepted is certain
    perfect = KnownRate(value=1, effective=60)
    assert rogan_gladen(1, 200, sensitivity=perfect, specificity=perfect)[1] < 0.99
    assert rogan_gladen(0, 200, sensitivity=perfect, specificity=perfect)[2] > 0.01


@pytest.mark.parametrize(
    ("true", "sensitivity", "specificity"), [(0.9, 0.85, 0.75), (0.5, 0.8, 0.8), (0.1, 0.9, 0.7), (0.97, 0.95, 0.9)]
)
def test_each_bound_is_on_the_right_side_as_often_as_it_says(true: float, sensitivity: float, specificity: float) -> None:
    generator = np.random.default_rng(SEED)
    drawn, labelled = 240, 150
    above = below = 0
    times = 1500
    accepted = generator.binomial(drawn, true * sensitivity + (1 - true) * (1 - specificity), times) / drawn
    affirmed = generator.binomial(labelled, sensitivity, times) / labelled
    denied = generator.binomial(labelled, specificity, times) / labelled
    for apparent, yes, no in zip(accepted, affirmed, denied, strict=True):
        _, lower, upper = rogan_gladen(
            apparent,
            drawn,
            sensitivity=KnownRate(value=yes, effective=labelled),
            specificity=KnownRate(value=no, effective=labelled),
        )
        above += lower > true
        below += upper < true
    # one-sided 95 % bounds, each wrong in one of twenty
    assert above / times <= 0.065
    assert below / times <= 0.065


def test_replies_to_one_prompt_count_less_than_independent_ones(made: SenseSet) -> None:
    scores = [float(example.is_good) for example in made.examples]
    examination = examine("probe", "made", made, scores)
    judged = [float(number % 4 > 0) for number in range(200)]
    apart = sense_rate(judged, list(range(200)), examination)
    together = sense_rate(judged, [number // 2 for number in range(200)], examination)
    assert (apart.accepted, apart.of) == (150, 200)
    assert together.effective < 180 < apart.effective <= 200
    assert together.lower < apart.lower < apart.value < apart.upper < together.upper
    with pytest.raises(ValueError, match="at least one"):
        sense_rate([], [], examination)


# -- the whole ---------------------------------------------------------------------------------------


@dataclass
class MadeBase:
    """A base whose features tell sense by a mark in the reply, or tell nothing."""

    sees: bool
    asked: list[int] = field(default_factory=list)

    def base_reply_features(self, conversations: Sequence[Any], replies: Sequence[str], batch_size: int) -> Any:
        self.asked.append(len(replies))
        features = np.random.default_rng(SEED).normal(size=(len(replies), WIDTH)).astype(np.float32)
        if self.sees:
            features[:, 5] += [4.0 * reply.startswith("good") for reply in replies]
        return features

    def base_word_logits(self, conversations: Sequence[Any], words: Sequence[str], batch_size: int) -> Any:
        self.asked.append(len(conversations))
        return np.random.default_rng(SEED).normal(size=(len(conversations), len(words))).astype(np.float32)


@pytest.fixture(scope="module")
def labelled(made: SenseSet) -> SenseSet:
    """Return every other made situation, without exchanged replies, which `MadeBase` cannot tell from good ones."""
    return SenseSet(
        tuple(
            example for example in made.examples if example.kind is not SenseKind.EXCHANGED and int(example.situation[1:]) % 2 == 0
        ),
        made.folds,
    )


def judge_of(base: MadeBase, sense_set: SenseSet, folder: Path, identity: str = "sha256:1") -> SenseJudge:
    return SenseJudge(sense_set, base, EvaluationConfig(), "tiny", identity, folder)


@pytest.fixture(scope="module")
def replies() -> list[ScoredReply]:
    """Return replies to 60 prompts at two intensities: three of four adapter's make sense."""
    run = made_run(BloodType.A, prompts=60, flaws=0.0).replies
    return [reply.model_copy(update={"text": f"{'good' if row % 4 else 'bad'} {row}"}) for row, reply in enumerate(run)]


def test_a_fit_probe_judges_the_greedy_replies_of_the_adapter(
    labelled: SenseSet, replies: list[ScoredReply], tmp_path: Path
) -> None:
    judge = judge_of(MadeBase(sees=True), labelled, tmp_path)
    judges = judge.examine()
    assert [found.judge for found in judges.examinations] == ["probe"]
    found, scores = judge.judge(judges, replies, BloodType.A)
    assert (found.status, found.judged_by, found.reason) == ("judged", "probe", "")
    assert found.sense is not None
    assert found.sense.of == 120
    assert found.sense.lower < 0.75 < found.sense.upper
    assert found.sense.value == pytest.approx(0.75, abs=0.1)
    assert SenseMetrics.model_validate_json(found.model_dump_json()) == found
    assert {(replies[at].model, replies[at].decoding) for at in scores} == {("adapter", "greedy")}
    # whoever has the replies with their scores finds the same rate
    scored = [reply.model_copy(update={"sense": scores.get(at)}) for at, reply in enumerate(replies)]
    assert judged_again(found, scored) == found
    fewer = judged_again(found, [reply.model_copy(update={"sense": None}) if at < 40 else reply for at, reply in enumerate(scored)])
    assert fewer.sense != found.sense
    unfit = found.examinations[0].model_copy(update={"shortfalls": ("salad: AUC",)})
    # an examination that claims to be fit, though its numbers say otherwise
    chance = found.examinations[0].model_copy(update={"sensitivity": KnownRate(value=0.1, effective=90)})
    for forged in (unfit, chance):
        with pytest.raises(ValueError, match="fit for use"):
            judged_again(found.model_copy(update={"examinations": (forged,)}), scored)


def test_without_a_fit_judge_nothing_is_judged_and_the_reason_is_said(
    labelled: SenseSet, replies: list[ScoredReply], tmp_path: Path
) -> None:
    judge = judge_of(MadeBase(sees=False), labelled, tmp_path)
    judges = judge.examine()
    assert [found.judge for found in judges.examinations] == ["probe", "question"]
    found, scores = judge.judge(judges, replies, BloodType.A)
    assert (found.status, found.judged_by, found.sense, scores) == ("not_judged", None, None, {})
    assert found.reason.startswith("no judge passed its examination: probe (salad, ")
    assert "question (salad, " in found.reason
    assert len(found.examinations) == 2


def test_replies_that_cannot_be_read_are_not_judged(labelled: SenseSet, replies: list[ScoredReply], tmp_path: Path) -> None:
    judge = judge_of(MadeBase(sees=True), labelled, tmp_path)
    found, _ = judge.judge(judge.examine(), [reply.model_copy(update={"text": None}) for reply in replies], BloodType.A)
    assert (found.status, found.reason) == ("not_judged", "no reply is readable")


def test_an_examination_is_kept_for_the_same_base_and_examples(labelled: SenseSet, tmp_path: Path) -> None:
    parts = math.ceil(len(labelled.examples) / 256)
    for sees, asked in ((True, parts), (False, parts + 1)):
        first, second, other = MadeBase(sees), MadeBase(sees), MadeBase(sees)
        folder = tmp_path / str(sees)
        found = judge_of(first, labelled, folder).examine()
        again = judge_of(second, labelled, folder).examine()
        assert found.examinations == again.examinations
        assert (len(first.asked), len(second.asked)) == (asked, 0)
        judge_of(other, labelled, folder, "sha256:2").examine()
        fewer = SenseSet(labelled.examples[:-1], labelled.folds)
        judge_of(other, fewer, folder).examine()
        assert len(other.asked) == 2 * asked


@pytest.mark.parametrize("content", [b"{}", b"PK\x03\x04"])
def test_a_spoilt_file_is_made_again(content: bytes, labelled: SenseSet, tmp_path: Path) -> None:
    found = judge_of(MadeBase(sees=True), labelled, tmp_path).examine()
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    # what the base computed is no longer needed
    assert {path.suffix for path in files} == {".json", ".npz"}
    for path in files:
        if content != b"{}" or path.suffix != ".json":
            path.write_bytes(content)
    base = MadeBase(sees=True)
    assert judge_of(base, labelled, tmp_path).examine().examinations == found.examinations
    assert sum(base.asked) == len(labelled.examples)


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(labelled: SenseSet, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way", encoding="utf-8")
    assert judge_of(MadeBase(sees=True), labelled, blocked).examine().chosen is not None


def test_a_prompt_that_the_examples_contain_is_judged_by_those_who_did_not_learn_from_it(labelled: SenseSet) -> None:
    features = noise(labelled)
    features[:, 3] += [3.0 * example.is_good for example in labelled.examples]
    probe = SenseProbe.fit(labelled, features)
    example = labelled.examples[0]
    known, unknown = probe.scores(
        labelled, features[:1].repeat(2, axis=0), [(example.summary, example.input), ("", "처음 보는 말")]
    )
    scores = probe._all(features[:1])[0]
    fold = labelled.folds.situations[example.situation]
    assert known == pytest.approx(scores[fold * WRITER_FOLDS : (fold + 1) * WRITER_FOLDS].mean())
    assert unknown == pytest.approx(scores.mean())

"""Test `report.html`: its content, its agreement with `metrics.json`, and its escaping of foreign text."""

from __future__ import annotations

import html
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from made_metrics import HOSTILE_TEXT, RAMBLING, MadeRun, made_run

from lora_trainer.config import GatesConfig, setting_names
from lora_trainer.data.harmful import Harm
from lora_trainer.evaluate import gates
from lora_trainer.evaluate.metrics import Estimate, RepliesMetrics, RunMetrics
from lora_trainer.evaluate.rules import ScoredReply
from lora_trainer.evaluate.scope import scope
from lora_trainer.report.drawn_replies import DRAWN, drawn_replies
from lora_trainer.report.formatting import LABELS, number_text, settings_table
from lora_trainer.report.html import display_text
from lora_trainer.report.reply_cards import SHOWN_REPLIES
from lora_trainer.report.run_page import binned, run_page

SECTIONS = [
    "verdict",
    "drawn",
    "gates",
    "about",
    "metrics",
    "feelings",
    "tags",
    "emoji",
    "training",
    "replies",
    "data",
    "settings",
    "timings",
    "environment",
]
_VOID = frozenset(("meta", "link", "br", "img", "path", "use"))


class Reader(HTMLParser):
    """Collect text, tags and attributes of a page. Fail on tags that are not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def sections(self) -> list[str | None]:
        return [attributes["id"] for tag, attributes in self.tags if tag == "section"]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(made: MadeRun, metrics: RunMetrics | None = None, replies: list[ScoredReply] | None = None) -> str:
    return run_page(metrics or made.metrics, made.facts, made.steps, made.replies if replies is None else replies)


@pytest.fixture(scope="module")
def made() -> MadeRun:
    return made_run(judged_by_model=True)


@pytest.fixture(scope="module")
def page(made: MadeRun) -> str:
    return page_of(made)


def test_sections_in_order(page: str) -> None:
    expected = [*SECTIONS]
    expected.insert(expected.index("data"), "judge")
    assert Reader(page).sections == expected
    assert page.count("<svg") == 4
    targets = {attributes["href"] for tag, attributes in Reader(page).tags if tag == "a"}
    assert targets == {f"#{name}" for name in expected if name != "verdict"}


def test_nothing_is_fetched_and_nothing_runs(page: str) -> None:
    read = Reader(page)
    for tag, attributes in read.tags:
        assert tag not in ("script", "iframe", "object", "embed", "img", "base", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert value is not None
                assert value.startswith("#") or value == "data:,", (tag, name, value)
    assert "@import" not in page
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= set(re.findall(r"url\((#\w+)\)", page))


def test_ids_are_unique_but_for_shapes_that_are_the_same(page: str) -> None:
    ids = [attributes["id"] for tag, attributes in Reader(page).tags if attributes.get("id") and tag not in ("path", "clippath")]
    assert len(ids) == len(set(ids))


def test_it_is_the_same_again(made: MadeRun, page: str) -> None:
    assert page_of(made) == page


def test_numbers_are_those_of_the_metrics(made: MadeRun, page: str) -> None:
    words = Reader(page).words.replace("\u00a0", " ")
    evaluation = made.metrics.evaluation
    assert evaluation.sampled is not None
    names = [name for name, field in RepliesMetrics.model_fields.items() if field.annotation is Estimate]
    assert len(names) == 16
    assert evaluation.people is not None
    models = [model for measured in (evaluation.greedy, evaluation.sampled) for model in (measured.adapter, measured.base)]
    for replied in (*models, evaluation.people):
        for name in names:
            estimate: Estimate = getattr(replied, name)
            assert estimate.lower is not None
            assert estimate.upper is not None
            value, lower, upper = (
                number_text(name, number).replace("\u00a0", " ") for number in (estimate.value, estimate.lower, estimate.upper)
            )
            assert f"{value} {lower} to {upper}" in words, name
    held_out, training = made.metrics.held_out, made.metrics.training
    for text in (
        f"{held_out.loss_adapter:.3f}",
        f"{held_out.loss_base:.3f}",
        f"perplexity {held_out.perplexity_base:,.2f}",
        f"{training.tokens:,}",
        f"{training.tokens_per_s:,.1f}",
        f"{made.metrics.peak_memory_gib:.2f} GiB",
        made.metrics.run_id,
        made.facts["data"]["sha256"],
        made.facts["base"]["revision"],
        evaluation.prompts_sha256,
        made.metrics.verdict.gate_id,
        "381, 62, 35",
        "NVIDIA H100 80GB HBM3",
    ):
        assert text in words


def test_what_was_not_judged_stands_beside_the_verdict(made: MadeRun, page: str) -> None:
    assert "whether one of them could harm" not in page
    greedy = made.metrics.evaluation.greedy
    untagged = greedy.adapter.model_copy(update={"harmful": None, "harms": {}, "incomplete": None, "by_tag": {}})
    evaluation = made.metrics.evaluation.model_copy(update={"greedy": greedy.model_copy(update={"adapter": untagged})})
    verdict = gates.decide(evaluation, GatesConfig())
    words = Reader(page_of(made, made.metrics.model_copy(update={"evaluation": evaluation, "verdict": verdict}))).words
    assert "All 9 gates passed" in words
    assert "whether one of them could harm (no prompt has the tags that gates.harmful needs)" in words
    assert words.count("Not judged:") == 1


def test_harmful_replies_are_counted_by_what_was_found(made: MadeRun) -> None:
    greedy = made.metrics.evaluation.greedy
    harmed = greedy.adapter.model_copy(update={"harmful": 3, "harms": {Harm.WRONG_NUMBER: 2, Harm.NAMES_DOSE: 1}})
    evaluation = made.metrics.evaluation.model_copy(update={"greedy": greedy.model_copy(update={"adapter": harmed})})
    verdict = gates.decide(evaluation, GatesConfig())
    words = Reader(page_of(made, made.metrics.model_copy(update={"evaluation": evaluation, "verdict": verdict}))).words
    assert "1 of 11 gates missed" in words
    assert "Could harm : got 3, needs ≤ 0, missed by 3" in words.replace("\u00a0", " ")
    assert "adapter 3 (wrong number 2, names dose 1)" in words


def test_rates_by_tag_have_bounds_and_no_gate(made: MadeRun, page: str) -> None:
    words = Reader(page).words.replace("\u00a0", " ")
    assert "No gate compares these rates" in words
    adapter = made.metrics.evaluation.greedy.adapter
    for tag, measured in adapter.by_tag.items():
        rate = measured.fits_message
        assert rate.lower is not None
        assert f"{tag.replace('_', ' ')} adapter {measured.prompts} {measured.replies}" in words
        assert f"{100 * rate.value:.1f} % {100 * rate.lower:.0f} – " in words
    assert "240 prompts at 2 of the intensities 0.1, 0.4, 0.7, 1" in words


def test_prompts_without_tags_have_no_table_of_them(made: MadeRun) -> None:
    greedy = made.metrics.evaluation.greedy
    bare = {model: getattr(greedy, model).model_copy(update={"by_tag": {}}) for model in ("adapter", "base")}
    evaluation = made.metrics.evaluation.model_copy(update={"greedy": greedy.model_copy(update=bare)})
    assert "tags" not in Reader(page_of(made, made.metrics.model_copy(update={"evaluation": evaluation}))).sections


def test_a_passed_verdict(made: MadeRun, page: str) -> None:
    assert made.metrics.verdict.passed
    words = Reader(page).words
    assert "✓ Passed sense: not_judged All 11 gates passed" in words
    assert page.count('class="gate"') == 11
    assert "missed by" not in words
    assert f"<title>Persona A: passed · run {made.metrics.run_id}</title>" in page


def test_a_failed_verdict_names_each_gate_and_what_to_do() -> None:
    made = made_run(flaws=0.12, sampled=False)
    failed = [gate for gate in made.metrics.verdict.gates if not gate.passed]
    assert {"exact_json", "informal_speech"} <= {gate.name for gate in failed}
    words = Reader(page_of(made)).words.replace("\u00a0", " ")
    assert f"✗ Not passed sense: not_judged {len(failed)} of 11 gates missed" in words
    for gate, line in zip(failed, gates.missed_gate_messages(made.metrics.verdict), strict=True):
        advice = line.partition("; ")[2]
        assert advice
        needs = f"needs {'≤' if gate.relation == '<=' else '≥'} {100 * gate.threshold:g} %"
        assert (
            f"{LABELS[gate.name]} : got {100 * gate.compared:.2f} %, {needs}, missed by {100 * gate.missed_by:.2f} points . "
            f"{advice[:1].upper()}{advice[1:]}."
        ) in words


def test_without_gates(made: MadeRun) -> None:
    none = GatesConfig.model_validate(dict.fromkeys(GatesConfig.model_fields))
    verdict = gates.decide(made.metrics.evaluation, none)
    read = Reader(page_of(made, made.metrics.model_copy(update={"verdict": verdict})))
    assert "No gates sense: not_judged Nothing was judged: every gate is off. Not judged: " in read.words
    assert "gates" not in read.sections


def test_without_sampled_replies_and_judge() -> None:
    made = made_run(flaws=0.12, sampled=False)
    assert made.metrics.evaluation.sampled is None
    read = Reader(page_of(made))
    assert read.sections == SECTIONS
    assert "greedy" in read.words
    for text in (", sampled", "· sampled", "once sampled"):
        assert text not in read.words


def test_no_reply_could_be_read() -> None:
    made = made_run(flaws=1.0, sampled=False, prompts=4, steps=1)
    assert made.metrics.training.steps == 1
    unreadable = [
        reply.model_copy(update={"reply": "", "text": None, "exact_json": False, "emotion": None, "taken_for": None, "score": 0.0})
        for reply in made.replies
    ]
    read = Reader(page_of(made, replies=unreadable))
    assert read.sections == SECTIONS
    assert "(empty)" in read.words


def test_without_replies(made: MadeRun) -> None:
    assert "Best None. Worst None." in Reader(page_of(made, replies=[])).words


def test_a_long_run_stays_small() -> None:
    made = made_run(flaws=0.12, sampled=False, steps=5000)
    assert len(made.steps) == 5000
    assert len(page_of(made).encode()) < 1_000_000


@pytest.mark.parametrize(("steps", "expected"), [(0, 0), (1, 1), (299, 299), (300, 300), (301, 300), (5000, 300)])
def test_curves_are_thinned_evenly_and_nothing_is_lost(steps: int, expected: int) -> None:
    log = made_run(flaws=0.12, sampled=False, steps=5000).steps[:steps]
    runs = binned(log)
    assert len(runs) == expected
    assert [step for run in runs for step in run] == list(log)
    assert len({len(run) for run in runs}) <= 2


# --- replies -----------------------------------------------------------------------------------------------


def cards(page: str, section: str = "replies") -> list[str]:
    found = re.search(f'<section id="{section}">.*?</section>', page, re.DOTALL)
    assert found is not None
    return re.findall("<article.*?</article>", found[0], re.DOTALL)


def test_twenty_replies_are_drawn_by_the_run_and_not_by_their_score(made: MadeRun, page: str) -> None:
    drawn = drawn_replies(made.replies, made.metrics.run_id)
    assert len({reply.prompt for reply, _ in drawn}) == len(drawn) == DRAWN
    found = cards(page, "drawn")
    assert len(found) == DRAWN
    for card, (mine, base) in zip(found, drawn, strict=True):
        assert base is not None
        assert (mine.model, mine.decoding, base.model, base.decoding) == ("adapter", "greedy", "base", "greedy")
        assert (base.prompt, base.intensity) == (mine.prompt, mine.intensity)
        text = html.unescape(card)
        for part in (mine.input, mine.summary, mine.text or mine.reply[:40], base.text or base.reply[:40]):
            assert display_text(part) in text
        assert f"{mine.feeling}, intensity {mine.intensity:g}" in text
    # the order of the lines and the scores change nothing, another run does
    worse = [reply.model_copy(update={"score": 1 - reply.score}) for reply in reversed(made.replies)]
    questions = [(reply.prompt, reply.intensity) for reply, _ in drawn]
    assert [(reply.prompt, reply.intensity) for reply, _ in drawn_replies(worse, made.metrics.run_id)] == questions
    assert [(reply.prompt, reply.intensity) for reply, _ in drawn_replies(made.replies, "another")] != questions


def test_a_draw_is_fair(made: MadeRun) -> None:
    """Every prompt and intensity is drawn about equally often."""
    prompts, intensities = Counter[int](), Counter[float]()
    for number in range(600):
        for reply, _ in drawn_replies(made.replies, f"run {number}"):
            prompts[reply.prompt] += 1
            intensities[reply.intensity] += 1
    # 12,000 draws of 240 prompts: 50 each, give or take 7
    assert len(prompts) == 240
    assert min(prompts.values()) > 20
    assert max(prompts.values()) < 85
    assert max(intensities.values()) < 1.1 * min(intensities.values())


def test_fewer_replies_than_wanted_and_no_base(made: MadeRun) -> None:
    few = [reply for reply in made.replies if reply.prompt < 3 and reply.model == "adapter"]
    drawn = drawn_replies(few, "run")
    assert sorted(reply.prompt for reply, _ in drawn) == [0, 1, 2]
    assert {base for _, base in drawn} == {None}
    assert drawn_replies([], "run") == []


def test_the_verdict_comes_first_and_says_what_nobody_judged(made: MadeRun, page: str) -> None:
    covered = scope(made.metrics.verdict)
    first = page.partition('<section id="drawn">')[0]
    assert covered.judged in first
    assert covered.not_judged in first
    assert ">sense: not_judged</code>" in first


def test_harmful_replies_are_shown_with_what_was_found(made: MadeRun, page: str) -> None:
    assert 'id="harmful"' not in page
    at = next(
        at for at, one in enumerate(made.replies) if one.tags and one.text and (one.model, one.decoding) == ("adapter", "greedy")
    )
    harmful = made.replies[at].model_copy(update={"harms": (Harm.WRONG_NUMBER,), "warnings": ("harmful",)})
    greedy = made.metrics.evaluation.greedy
    adapter = greedy.adapter.model_copy(update={"harmful": 1, "harms": {Harm.WRONG_NUMBER: 1}})
    evaluation = made.metrics.evaluation.model_copy(update={"greedy": greedy.model_copy(update={"adapter": adapter})})
    metrics = made.metrics.model_copy(update={"evaluation": evaluation})
    shown = page_of(made, metrics, [*made.replies[:at], harmful, *made.replies[at + 1 :]])
    section = shown.partition('<section id="harmful">')[2].partition("</section>")[0]
    assert display_text(harmful.input, 300) in html.unescape(section)
    assert "<li>could harm: wrong number</li>" in section


def test_gates_show_a_floor_and_a_ceiling(made: MadeRun, page: str) -> None:
    people = made.metrics.evaluation.people
    assert people is not None
    words = Reader(page).words.replace("\u00a0", " ")
    base = made.metrics.evaluation.greedy.base
    for name in ("exact_json", "informal_speech", "persona"):
        floor, ceiling = f"{100 * getattr(base, name).value:.1f} %", f"{100 * getattr(people, name).value:.1f} %"
        assert f"{floor} {ceiling}" in words
    assert "50.0 % –" in words, "the win rate has no ceiling"


def test_a_run_that_measured_no_people(made: MadeRun) -> None:
    evaluation = made.metrics.evaluation.model_copy(update={"people": None})
    update = {"evaluation": evaluation, "verdict": gates.decide(evaluation, GatesConfig())}
    page = page_of(made, made.metrics.model_copy(update=update))
    assert page.count('data-name="people, ceiling">–<') == 11
    assert "<td>people</td>" not in page


def test_rates_by_feeling(made: MadeRun, page: str) -> None:
    words = Reader(page).words.replace("\u00a0", " ")
    evaluation = made.metrics.evaluation
    assert evaluation.people is not None
    adapter = evaluation.greedy.adapter.by_feeling
    assert sum(measured.replies for measured in adapter.values()) == evaluation.replies
    for feeling, measured in adapter.items():
        assert f"{feeling} adapter {measured.prompts} {measured.replies}" in words
        if people := evaluation.people.by_feeling.get(feeling):
            assert f"people {people.prompts} {people.replies}" in words


def test_best_and_worst_are_chosen_once_a_prompt(made: MadeRun, page: str) -> None:
    found = cards(page)
    assert len(found) == 2 * SHOWN_REPLIES
    inputs = [re.findall(r'class="said"[^>]*>([^<]*)<', card)[0] for card in found]
    assert len(set(inputs)) == len(inputs)
    adapter = [reply for reply in made.replies if reply.model == "adapter"]
    least = min(reply.score for reply in adapter)
    assert html.unescape(inputs[SHOWN_REPLIES]) in {display_text(reply.input) for reply in adapter if reply.score == least}
    for card in found:
        assert card.count('class="who"') == 2
        assert "this adapter" in card
        assert "the base" in card


def test_the_base_answers_the_same_question(made: MadeRun) -> None:
    base = {(reply.decoding, reply.prompt, reply.intensity): reply for reply in made.replies if reply.model == "base"}
    marked = [
        reply.model_copy(update={"text": None, "reply": f"{reply.decoding} {reply.prompt} {reply.intensity:g}"})
        for reply in made.replies
    ]
    assert len(base) * 2 == len(marked)
    for card in cards(page_of(made, replies=marked)):
        mine, theirs = re.findall(r'<pre class="reply"[^>]*>([^<]*)</pre>', card)
        assert mine == theirs


def hostile(made: MadeRun, **update: object) -> str:
    """Return the page of a run whose worst reply has these changes."""
    at = min(range(len(made.replies)), key=lambda at: (made.replies[at].model == "base", made.replies[at].score))
    replies = list(made.replies)
    replies[at] = replies[at].model_copy(update={"score": -1.0, **update})
    return page_of(made, replies=replies)


@pytest.mark.parametrize("field", ["text", "reply", "input", "summary"])
def test_texts_of_others_are_text(made: MadeRun, field: str) -> None:
    update: dict[str, object] = {field: HOSTILE_TEXT, "exact_json": field != "reply"}
    if field == "reply":
        update["text"] = None
    page = hostile(made, **update)
    read = Reader(page)
    assert not any(tag in ("script", "img") for tag, _ in read.tags)
    assert (
        "<script>alert(1)</script><img src=x onerror=alert(2)></pre></div></body>{{ 7 * 7 }}[U+202E]txet[U+202C][U+0000]"
        in read.words
    )
    assert "\u202e" not in page
    assert "\x00" not in page


def test_a_rubric_and_a_judge_are_text(made: MadeRun, page: str) -> None:
    assert "3. <in character>" in Reader(page).words
    assert "<in character>" not in page


def test_broken_json_is_shown_as_it_is_and_shortened(made: MadeRun) -> None:
    assert len(RAMBLING) > 10_000
    page = hostile(made, reply=RAMBLING, text=None, exact_json=False, stopped=False)
    card = cards(page)[SHOWN_REPLIES]
    assert "12,010 characters" in card
    raw = html.unescape(re.findall(r'<pre class="reply"[^>]*>([^<]*)</pre>', card)[0])
    assert raw.startswith('{"text": "그래서 말이야')
    assert raw.endswith("…")
    assert len(raw) < 300
    assert "cut off at 128 tokens" in card
    assert "not exact JSON" in card


@pytest.mark.parametrize(
    ("text", "at_most", "expected"),
    [
        ("가나다", 3, "가나다"),
        ("가나다라", 3, "가나다…"),
        ("a\u202eb\u2066c\u200fd", None, "a[U+202E]b[U+2066]c[U+200F]d"),
        ("a\x00\x1b[31m\tb\nc", None, "a[U+0000][U+001B][31m\tb\nc"),
        ("👩\u200d👧 🙂\ufe0f", None, "👩\u200d👧 🙂\ufe0f"),
        ("\ud83d", None, "[U+D83D]"),
    ],
)
def test_text_as_shown(text: str, at_most: int | None, expected: str) -> None:
    assert display_text(text, at_most) == expected
    expected.encode()


# --- settings ----------------------------------------------------------------------------------------------


def test_settings_that_differ_come_first() -> None:
    made = made_run(flaws=0.12, sampled=False, prompts=4, steps=1, settings=(("lora.r", 32), ("gates.persona", None)))
    rows = settings_table(made.facts["config"])
    assert {row["name"] for row in rows} == set(setting_names())
    differing = [row for row in rows if row["differs"]]
    assert rows[: len(differing)] == differing
    assert {row["name"]: (row["value"], row["default"]) for row in differing} == {
        "blood_type": ("A", "required"),
        "data": ("s3://personas/data/", "data/"),
        "output": ("s3://personas/lora/", "outputs/"),
        "lora.r": ("32", "16"),
        "evaluation.temperature": ("0", "0.7"),
        "gates.persona": ("none", "0.7"),
    }
    assert all(row["meaning"] for row in rows)


def test_a_setting_of_another_version(made: MadeRun) -> None:
    config = {**made.facts["config"], "lora": {**made.facts["config"]["lora"], "rank": 8}}
    (row,) = [row for row in settings_table(config) if row["name"] == "lora.rank"]
    assert (row["value"], row["default"], row["differs"]) == ("8", "unknown setting", True)

"""Open the report and the comparison in a real browser: on a desktop and a phone, in light and dark mode."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from browser_checks import CUT, FAINT, OVERLAPPING
from chromium import Browser, Page, chromium, open_browser
from made_depth import all_replies, measured
from made_metrics import RAMBLING, MadeRun, made_run, write_bundle
from made_sweep import sweep_record

from entrypoint.cli import run_cli
from lora_trainer.errors import ExitCode
from lora_trainer.evaluate.depth_rules import DepthReply
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.report.comparison import compare, comparison_page
from lora_trainer.report.run_page import run_page
from lora_trainer.report.sweep_page import sweep_page

pytestmark = pytest.mark.integration

WIDE, PHONE, NARROW = 1280, 390, 360
Scheme = Literal["light", "dark"]
PAGES = ("passed", "failed", "comparison")
each_page = pytest.mark.parametrize("name", PAGES)
each_width = pytest.mark.parametrize("width", [WIDE, PHONE, NARROW])
each_scheme = pytest.mark.parametrize("scheme", ["light", "dark"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if (program := chromium()) is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with open_browser(program, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three pages: a full report, a short report with long unbroken text, and a comparison of four runs."""
    folder = tmp_path_factory.mktemp("pages")
    passed = made_run(judged_by_model=True)
    failed = made_run(BloodType.AB, flaws=0.12, sampled=False, steps=5000)
    long = {"reply": RAMBLING.replace(" ", ""), "input": "ㅋ" * 500, "summary": "w" * 500, "score": -1.0}
    replies = [reply.model_copy(update=long) if reply.prompt == 3 else reply for reply in failed.replies]
    facts = {**failed.facts, "data": {**failed.facts["data"], "uri": f"s3://{'bucket' * 20}/{'x' * 200}.jsonl"}}
    passed, deep = _in_depth(passed, good=True)
    (folder / "passed.html").write_text(
        run_page(passed.metrics, passed.facts, passed.steps, passed.replies, deep), encoding="utf-8"
    )
    failed, deep = _in_depth(failed, good=False)
    deep = [reply.model_copy(update={"reply": RAMBLING.replace(" ", ""), "summary": "w" * 500}) for reply in deep]
    (folder / "failed.html").write_text(run_page(failed.metrics, facts, failed.steps, replies, deep), encoding="utf-8")
    runs = [passed, failed, made_run(BloodType.B, flaws=0.1), made_run(BloodType.O, settings=(("lora.r", 32),))]
    uris = [str(write_bundle(made, folder / "runs" / str(number))) for number, made in enumerate(runs)]
    (folder / "comparison.html").write_text(comparison_page(compare(uris)), encoding="utf-8")
    return folder


def _in_depth(made: MadeRun, *, good: bool) -> tuple[MadeRun, list[DepthReply]]:
    """Return the run with a deep evaluation, and its replies."""
    adapter, base = all_replies("adapter", good=good), all_replies("base", good=False)
    evaluation = made.metrics.evaluation.model_copy(update={"depth": measured(adapter, base)})
    return replace(made, metrics=made.metrics.model_copy(update={"evaluation": evaluation})), [*adapter, *base]


@pytest.fixture
def opened(browser: Browser, pages: Path, name: str, width: int, scheme: Scheme) -> Iterator[Page]:
    with browser.page((pages / f"{name}.html").as_uri(), width, scheme=scheme) as page:
        yield page


@each_page
@each_width
@each_scheme
def test_the_browser_has_nothing_to_complain_of(opened: Page, width: int) -> None:
    assert opened.evaluate("document.compatMode") == "CSS1Compat"
    opened.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert opened.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert opened.said == []
    # the page requested nothing but itself and its empty icon
    assert [url for url in opened.requested if not url.startswith("data:")] == [opened.url]


@each_width
def test_the_generators_report_fits_too(browser: Browser, tmp_path: Path, width: int) -> None:
    report = tmp_path / "report.html"
    assert run_cli(["generate", "--count", "30", "--output", f"{tmp_path}/made/", "--report", str(report)]) == ExitCode.DONE
    with browser.page(report.as_uri(), width) as page:
        assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
        assert page.said == []


@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "light"), (PHONE, "dark")])
def test_a_sweeps_page_fits_and_is_readable(browser: Browser, tmp_path: Path, width: int, scheme: Scheme) -> None:
    (tmp_path / "sweep.html").write_text(sweep_page(sweep_record()), encoding="utf-8")
    with browser.page((tmp_path / "sweep.html").as_uri(), width, scheme=scheme) as page:
        assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
        assert page.evaluate(CUT) == page.evaluate(OVERLAPPING) == page.evaluate(FAINT) == []
        assert (
            page.evaluate("Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height))") > 8
        )
        assert page.said == []


def test_the_browsers_complaints_are_heard(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<img src='nowhere.png'><script>console.log('hello'); throw Error('broken')</script>")
    with browser.page((tmp_path / "bad.html").as_uri(), WIDE) as page:
        said = "\n".join(page.said)
        assert "hello" in said
        assert "broken" in said
        assert "ERR_FILE_NOT_FOUND" in said
        assert len(page.requested) == 2


@each_page
@each_width
@each_scheme
def test_nothing_is_cut_off_and_nothing_lies_on_anything(opened: Page) -> None:
    opened.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert opened.evaluate(CUT) == []
    assert opened.evaluate(OVERLAPPING) == []


@pytest.mark.parametrize("name", ["passed", "failed"])
@each_width
@pytest.mark.parametrize("scheme", ["light"])
def test_the_order_to_look_at(opened: Page, width: int) -> None:
    tops: dict[str, float] = opened.evaluate(
        "Object.fromEntries([...document.querySelectorAll('section')].map(e => [e.id, e.getBoundingClientRect().top + scrollY]))"
    )
    assert list(tops)[:4] == ["verdict", "drawn", "gates", "about"]
    assert list(tops.values()) == sorted(tops.values())
    # the verdict is large and visible without scrolling
    verdict = opened.evaluate(
        "(e => [e.getBoundingClientRect().bottom, parseFloat(getComputedStyle(e).fontSize)])"
        "(document.querySelector('.verdict strong'))"
    )
    assert verdict[0] < 250
    assert verdict[1] >= 28
    # On a desktop, cards are side by side; on a phone, one below the other.
    lefts = opened.evaluate(
        "new Set([...document.querySelectorAll('#metrics .card')].map(e => e.getBoundingClientRect().left)).size"
    )
    assert (lefts > 1) == (width == WIDE)
    sizes = opened.evaluate("[...document.querySelectorAll('svg')].map(e => [e.clientWidth, e.clientHeight])")
    assert len(sizes) == 4
    for figure_width, figure_height in sizes:
        assert figure_width > 250
        assert 0.4 < figure_height / figure_width < 1.6
    # text in plots stays about the size of small print at any width
    heights = opened.evaluate("[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)")
    assert min(heights) > 8


def test_the_checks_see_what_they_are_for(browser: Browser, pages: Path) -> None:
    with browser.page((pages / "passed.html").as_uri(), PHONE) as page:
        assert page.evaluate(CUT) == page.evaluate(OVERLAPPING) == page.evaluate(FAINT) == []
        page.evaluate(
            "document.head.append(Object.assign(document.createElement('style'), "
            "{textContent: '.said { height: 1rem; overflow: hidden } #about table { width: 30rem } "
            ".gates .needs { margin-right: -5rem } .soft { color: #aaa }'}))"
        )
        for check in (CUT, OVERLAPPING, FAINT):
            assert page.evaluate(check) != []
        assert page.evaluate("document.documentElement.scrollWidth") > PHONE


@each_page
@pytest.mark.parametrize("width", [WIDE])
@each_scheme
def test_text_stands_out_from_what_is_behind_it(opened: Page) -> None:
    opened.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert opened.evaluate(FAINT) == []


def image(path: Path) -> Any:
    from matplotlib.image import imread

    return imread(path)[..., :3]


@each_page
@pytest.mark.parametrize("width", [WIDE, PHONE])
@each_scheme
def test_screenshots_show_a_page(opened: Page, width: int, scheme: Scheme, tmp_path: Path) -> None:
    seen = image(opened.screenshot(tmp_path / "page.png", whole=False))
    assert seen.shape[1] == width
    # the corner has the background colour, which must fit the scheme
    corner = seen[-1, 0]
    assert (corner.mean() > 0.9) == (scheme == "light")
    assert (corner.mean() < 0.15) == (scheme == "dark")
    # the page has content from the top to the bottom of the window
    is_ink = abs(seen - corner).max(axis=2) > 0.25
    assert 0.01 < is_ink.mean() < 0.5
    bands = is_ink[: len(is_ink) // 9 * 9].reshape(9, -1)
    assert (bands.mean(axis=1) > 0).sum() >= 8


@pytest.mark.parametrize("name", ["passed"])
@pytest.mark.parametrize("width", [PHONE])
@pytest.mark.parametrize("scheme", ["light"])
def test_korean_is_drawn(opened: Page) -> None:
    fc_list = shutil.which("fc-list")
    listed = fc_list and subprocess.run([fc_list, ":lang=ko"], capture_output=True, check=False).stdout
    if not listed:
        pytest.skip("fonts-noto-cjk is not installed: apt-get install fonts-noto-cjk")
    for selector in (".said", "pre.reply"):
        # compare three syllables with a character that no font has
        drawn = opened.evaluate(
            """(style => ["한", "글", "힣", "\\ue123"].map(letter => {
                 const canvas = Object.assign(document.createElement("canvas"), {width: 60, height: 60});
                 const pen = canvas.getContext("2d");
                 pen.font = `40px ${style.fontFamily}`;
                 pen.fillText(letter, 5, 45);
                 const ink = [...pen.getImageData(0, 0, 60, 60).data].filter((_, at) => at % 4 == 3);
                 return ink.map(alpha => alpha > 127 ? 1 : 0).join("");
               }))(getComputedStyle(document.querySelector("SELECTOR")))""".replace("SELECTOR", selector)
        )
        assert len(set(drawn)) == 4, f"{selector}: syllables look alike"
        assert all(letter.count("1") > 100 for letter in drawn[:3])

"""Review an adapter in a real browser: by keyboard and by tapping, on a desktop and a phone, in light and dark mode."""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import pytest
from browser_checks import CUT, FAINT, OVERLAPPING
from chromium import Browser, Page, chromium, open_browser
from made_metrics import HOSTILE_TEXT, made_run
from made_reviews import RUN_ID, data_of, publish_made, side_of_adapter

from entrypoint.cli import run_cli

pytestmark = pytest.mark.integration

WIDE, PHONE, NARROW = 1280, 390, 360
COUNT: Final = 6
each_width = pytest.mark.parametrize("width", [WIDE, PHONE, NARROW])
each_scheme = pytest.mark.parametrize("scheme", ["light", "dark"])
each_language = pytest.mark.parametrize("language", ["en", "ko"])
Scheme = Literal["light", "dark"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if (program := chromium()) is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with open_browser(program, tmp_path_factory.mktemp("profile")) as started:
        yield started


def hostile(folder: Path) -> None:
    """Let every text of the bundle try to run, and some be long."""
    path = folder / "replies.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["input"] = "ㅋ" * 500 if line["prompt"] == 1 else f"{line['input']}</script><script>pwned = 1</script>"
        line["summary"] = "w" * 500 if line["prompt"] == 2 else f"<img src=x onerror='pwned = 1'>{line['summary']}"
        if line["prompt"] % 2:
            line["reply"] = json.dumps({"text": f"{HOSTILE_TEXT * 20}<script>pwned = 1</script>", "emotion": "smile"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_made(tmp_path_factory.mktemp("out"), made_run(prompts=COUNT, sampled=False, steps=3), change=hostile)


@pytest.fixture
def page_file(bundle: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Write a page. Local files share what the browser keeps, so every test has its own seed."""
    language = request.getfixturevalue("language") if "language" in request.fixturenames else "en"
    seed = zlib.crc32(request.node.name.encode())
    path = tmp_path / "review.html"
    assert run_cli(["review", str(bundle), "--output", str(path), "--lang", language, "--seed", str(seed)]) == 0
    return path


def press(page: Page, code: str, **more: Any) -> None:
    # the key itself is what a Korean input method sends
    page.command("Input.dispatchKeyEvent", type="rawKeyDown", code=code, key="Process", **more)
    page.command("Input.dispatchKeyEvent", type="keyUp", code=code, key="Process")


def shown(page: Page, part: str) -> bool:
    return bool(page.evaluate(f"document.querySelector('{part}').getClientRects().length"))


def position(page: Page) -> str:
    return str(page.evaluate("document.getElementById('position').textContent"))


def name_and_finish(page: Page, name: str) -> None:
    page.evaluate("document.getElementById('reviewer').focus()")
    page.command("Input.insertText", text=name)
    page.evaluate("document.getElementById('finish').click()")


def downloaded(folder: Path) -> Path:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        found = [path for path in folder.iterdir() if path.suffix == ".json"] if folder.exists() else []
        if found:
            return found[0]
        time.sleep(0.05)
    raise AssertionError("nothing was downloaded")


def test_a_review_by_keyboard_ends_in_a_file_that_promote_takes(
    browser: Browser, bundle: Path, page_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "downloads"
    browser.command("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    pairs = data_of(page_file.read_text(encoding="utf-8"))["pairs"]
    with browser.page(page_file.as_uri(), WIDE) as page:
        # a key that is held down answers one pair, and shortcuts of the browser none
        press(page, "Digit1", autoRepeat=True)
        press(page, "Digit1", modifiers=2)
        assert position(page) == f"1 of {COUNT}"
        # the adapter wins three times, ties twice and loses once
        wanted = ["win", "win", "win", "tie", "tie", "loss"]
        for pair, want in zip(pairs, wanted, strict=True):
            is_first = side_of_adapter(pair) == "first"
            press(page, "Digit2" if want == "tie" else "Digit1" if is_first == (want == "win") else "Numpad3")
        assert shown(page, "#end")
        assert page.evaluate("document.getElementById('finish').disabled")
        assert not shown(page, "#result")
        # back to the first pair: mark one reply of each side, take one mark back, and write a note with digits in it
        for _ in range(COUNT):
            press(page, "ArrowLeft")
        assert position(page) == f"1 of {COUNT}"
        adapter_keys, reference_keys = ("QWE", "UIO") if side_of_adapter(pairs[0]) == "first" else ("UIO", "QWE")
        for key in (adapter_keys[2], reference_keys[0], reference_keys[1], adapter_keys[0], adapter_keys[0]):
            press(page, f"Key{key}")
        press(page, "KeyN")
        page.command("Input.insertText", text="123 메모")
        press(page, "Digit3")
        press(page, "Escape")
        for _ in range(COUNT):
            press(page, "ArrowRight")
        name_and_finish(page, "김평가")
        assert shown(page, "#result")
        counts = "Object.fromEntries([...document.querySelectorAll('#result td')].map(e => [e.id, Number(e.textContent)]))"
        seen = page.evaluate(counts)
        # nothing changes after the end
        press(page, "Digit1")
        press(page, "ArrowLeft")
        assert page.evaluate(counts) == seen
        assert page.said == []
    file = downloaded(folder)
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["answers"][0]["note"] == "123 메모"
    assert file.name.startswith(f"review-A-{RUN_ID}-")
    capsys.readouterr()
    assert run_cli(["promote", str(bundle), "--reviewed", str(file)]) == 0
    assert "reviewed by 김평가 against the base: 3 won, 2 tied, 1 lost" in capsys.readouterr().out
    recorded = json.loads((bundle.parent / "latest.json").read_text(encoding="utf-8"))["review"]
    # the page's key and the command's are the same
    assert seen == {
        **{name: recorded[name] for name in ("wins", "ties", "losses")},
        **{f"adapter-{mark}": count for mark, count in recorded["adapter_marks"].items()},
        **{f"reference-{mark}": count for mark, count in recorded["reference_marks"].items()},
    }
    assert recorded["adapter_marks"] == {"nonsense": 0, "unsafe": 0, "not_this_friend": 1}
    assert recorded["reference_marks"] == {"nonsense": 1, "unsafe": 1, "not_this_friend": 0}


def test_what_was_answered_outlives_the_page(browser: Browser, page_file: Path) -> None:
    with browser.page(page_file.as_uri(), PHONE) as page:
        for selector in ("[data-side=second][data-mark=unsafe]", "[data-choice=second]", "[data-choice=tie]"):
            page.evaluate(f"document.querySelector('{selector}').click()")
    with browser.page(page_file.as_uri(), PHONE) as page:
        assert position(page) == f"3 of {COUNT}"
        press(page, "ArrowLeft")
        press(page, "ArrowLeft")
        pressed = "[...document.querySelectorAll('[aria-pressed=true]')].map(e => e.dataset.mark ?? e.dataset.choice)"
        assert page.evaluate(pressed) == ["unsafe", "second"]
        # at the end, the page leads to what is missing
        for _ in range(COUNT):
            press(page, "ArrowRight")
        page.evaluate("document.getElementById('to-missing').click()")
        assert position(page) == f"3 of {COUNT}"


@pytest.mark.parametrize(
    "stored", ["null", "[]", "7", "{", '{"at": "x", "answers": {"ID": {"choice": "<b>", "marks": 7}}, "finished_at": "now"}']
)
def test_what_another_page_stored_does_no_harm(browser: Browser, page_file: Path, stored: str) -> None:
    first = data_of(page_file.read_text(encoding="utf-8"))["pairs"][0]["id"]
    with browser.page(page_file.as_uri(), WIDE) as page:
        # of every page, since they share an origin
        text = json.dumps(stored.replace("ID", first))
        page.evaluate(f"for (const key of Object.keys(localStorage)) localStorage.setItem(key, {text})")
    with browser.page(page_file.as_uri(), WIDE) as page:
        assert shown(page, "#ask")
        assert position(page) == f"1 of {COUNT}"
        assert page.said == []


def test_a_browser_that_keeps_nothing_says_so_and_works(browser: Browser, page_file: Path) -> None:
    # a data: URL has no storage
    url = "data:text/html;base64," + base64.b64encode(page_file.read_bytes()).decode()
    with browser.page(url, PHONE) as page:
        assert page.evaluate("document.getElementById('not-stored').textContent").startswith("This browser keeps nothing")
        assert shown(page, "#not-stored")
        for _ in range(COUNT):
            press(page, "Digit2")
        name_and_finish(page, "김평가")
        assert page.evaluate("document.getElementById('ties').textContent") == str(COUNT)


def test_no_text_of_a_bundle_runs(browser: Browser, page_file: Path) -> None:
    with browser.page(page_file.as_uri(), WIDE) as page:
        for _ in range(COUNT):
            assert "<script>" in page.evaluate("document.querySelector('#ask').textContent")
            press(page, "Digit2")
        name_and_finish(page, "<img src=x onerror='pwned = 1'>")
        assert page.evaluate("document.querySelectorAll('img, iframe, body script:not([type]) ~ script').length") == 0
        assert page.said == []
        assert [url for url in page.requested if not url.startswith(("data:", "blob:"))] == [page.url]
        # and if one became an element, the policy would stop it
        page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'pwned = 1'})); "
            "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"pwned = 1\"><a href=\"javascript:pwned = 1\">')"
        )
        page.evaluate("document.body.lastChild.click()")
        page.evaluate("new Promise(done => setTimeout(done, 100))")
        assert page.evaluate("typeof pwned") == "undefined"
        said = "\n".join(page.said)
        assert "Content Security Policy" in said
        # DevTools lists the image's request, too, although the policy stops it before it leaves
        assert "img-src data:" in said


def look(page: Page, width: int) -> None:
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    for check in (CUT, OVERLAPPING, FAINT):
        assert page.evaluate(check) == []


@each_width
@each_scheme
@each_language
def test_it_fits_and_can_be_read(
    browser: Browser, page_file: Path, width: int, scheme: Scheme, language: str, tmp_path: Path
) -> None:
    with browser.page(page_file.as_uri(), width, scheme=scheme) as page:
        assert page.evaluate("document.getElementById('help').open")
        look(page, width)
        page.evaluate("document.querySelectorAll('[data-mark]').forEach(e => e.click())")
        look(page, width)
        lefts = page.evaluate("['first', 'second'].map(id => document.getElementById(id).getBoundingClientRect().left)")
        assert (lefts[0] < lefts[1]) == (width == WIDE)
        # a finger needs about 44 pixels
        sizes = page.evaluate("[...document.querySelectorAll('button')].map(e => e.getBoundingClientRect().height).filter(h => h)")
        assert min(sizes) >= 44
        if width == WIDE:
            page.evaluate("document.getElementById('help').open = false")
        else:
            # the choices stay in sight
            page.evaluate("scrollTo(0, 0)")
            bottom = page.evaluate("document.querySelector('.choices').getBoundingClientRect().bottom")
            assert bottom <= 900
        for _ in range(COUNT):
            press(page, "Digit1")
            look(page, width)
        name_and_finish(page, "김평가")
        look(page, width)
        assert page.said == []

"""Test blind reviews: the page that `review` makes, and what `promote --reviewed` takes of its file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_metrics import HOSTILE_TEXT, MadeRun, made_run
from made_reviews import RUN_ID, adapter_replies, data_of, filled_in, made_facts, publish_made, side_of_adapter

from entrypoint.cli import run_cli
from lora_trainer.evaluate.review import readable
from lora_trainer.store.manifest import write_manifest

OTHER_ID = "fedcba9876543210"


@pytest.fixture(scope="module")
def made() -> MadeRun:
    return made_run(prompts=30, sampled=False, steps=3, flaws=0.1)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def bundle(output: Path, made: MadeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for variable in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    return publish_made(output, made)


def page_of(bundle: Path, *options: str) -> str:
    target = bundle.parents[3] / "page.html"
    assert run_cli(["review", str(bundle), "--output", str(target), *options]) == 0
    return target.read_text(encoding="utf-8")


def reviewed(bundle: Path, content: dict[str, Any] | str | bytes) -> Path:
    path = bundle.parents[3] / "review.json"
    if isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pointer(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle.parent / "latest.json").read_text(encoding="utf-8"))
    return found


def edit_replies(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "replies.jsonl"
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            change(line)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    return edit


# --- the page --------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_and_allows_its_own_script_alone(bundle: Path) -> None:
    page = page_of(bundle)
    assert not re.findall(r"https?://|//[a-z]|\bimport\b|@import|url\(|fetch\(|XMLHttpRequest", page.replace("\n  // ", "\n"))
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)[0]
    assert policy.startswith("default-src 'none'; ")
    for kind, text in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert json.loads(data)["facts"]["run_id"] == RUN_ID


def test_a_pair_shows_both_replies_on_drawn_sides_and_nothing_else_about_them(bundle: Path) -> None:
    data, own = data_of(page_of(bundle)), adapter_replies(bundle)
    sides = []
    for pair in data["pairs"]:
        assert set(pair) == {"id", "summary", "feeling", "intensity", "input", "replies"}
        assert all(set(reply) == {"text", "face"} for reply in pair["replies"])
        sides.append(side_of_adapter(pair))
        text, _ = readable(own[pair["input"], pair["intensity"]])
        assert pair["replies"][sides[-1] == "second"]["text"].startswith(text[:100])
    # the default is 40, and there are 30 prompts, each once
    assert data["facts"]["count"] == len(data["pairs"]) == len({pair["input"] for pair in data["pairs"]}) == 30
    assert 5 < sides.count("first") < 25
    assert len({pair["intensity"] for pair in data["pairs"]}) > 2


def test_the_seed_draws_sample_and_sides(bundle: Path) -> None:
    first, again, other = (page_of(bundle, "--count", "10", "--seed", seed) for seed in ("3", "3", "4"))
    assert first == again
    drawn, otherwise = ([pair["input"] for pair in data_of(page)["pairs"]] for page in (first, other))
    assert len(drawn) == 10
    assert drawn != otherwise
    assert {pair["id"] for pair in data_of(first)["pairs"]}.isdisjoint(pair["id"] for pair in data_of(other)["pairs"])


def test_the_default_name_and_what_is_printed(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["review", str(bundle), "--count", "4", "--seed", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == f"page: review-A-{RUN_ID}.html\n"
    assert "4 pairs of 30 prompts, seed 2, against the base" in err
    assert f"lora-trainer promote {bundle} --reviewed FILE" in err
    assert (tmp_path / f"review-A-{RUN_ID}.html").is_file()


def test_korean_and_english(bundle: Path) -> None:
    korean, english = page_of(bundle, "--lang", "ko"), page_of(bundle, "--lang", "en")
    for page, language, words in ((korean, "ko", ("말이 안 됨", "비슷함")), (english, "en", ("makes no sense", "Tie"))):
        assert f'<html lang="{language}">' in page
        assert all(word in page for word in words)
    assert "makes no sense" not in korean
    assert data_of(korean)["labels"]["progress"] == "{at} / {count}"
    assert {pair["feeling"] for pair in data_of(korean)["pairs"]} > {"걱정"}
    assert {pair["feeling"] for pair in data_of(english)["pairs"]} > {"worried"}
    # labels change, the sample does not
    assert [pair["id"] for pair in data_of(korean)["pairs"]] == [pair["id"] for pair in data_of(english)["pairs"]]


def test_a_strangers_texts_stay_text(output: Path, made: MadeRun, tmp_path: Path) -> None:
    def attack(line: dict[str, Any]) -> None:
        line["reply"] = json.dumps({"text": f"{HOSTILE_TEXT}{{name}}", "emotion": "<b>"}) + "<!--</script><script>"
        line["input"] = f"{line['input']}</SCRIPT >\u2028<!-- <script>{HOSTILE_TEXT}"
        line["feeling"] = '"><svg onload=alert(3)>'

    bundle = publish_made(output, made, change=edit_replies(attack))
    page = page_of(bundle)
    assert len(re.findall("<script", page, re.IGNORECASE)) == len(re.findall("</script", page, re.IGNORECASE)) == 2
    assert "<img" not in page
    assert "<svg" not in page
    assert "<!--" not in page
    (pair, *_) = data_of(page)["pairs"]
    assert pair["replies"][0]["text"].startswith("<script>alert(1)</script>")
    # direction and control characters are named
    assert "[U+202E]txet" in pair["replies"][0]["text"]
    assert pair["replies"][0]["face"] == ""


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ('{"text":"응!","emotion":"smile"}', ("응!", "smile")),
        ('```json\n{"text": "네.", "emotion": "sad"}\n```', ("네.", "sad")),
        ('{"text": "네.", "emotion": "happy", "why": 1}', ("네.", "")),
        ('{"text": ["네"], "emotion": {}}', ('{"text": ["네"], "emotion": {}}', "")),
        ('{"text": "네", "emotion": ["smile"]}', ("네", "")),
        ("안녕하세요 {", ("안녕하세요 {", "")),
        ("} {", ("} {", "")),
        ("", ("", "")),
        ("{" * 100_000 + "}" * 100_000, ("{" * 100_000 + "}" * 100_000, "")),
    ],
)
def test_the_form_of_a_reply_does_not_show_whose_it_is(raw: str, shown: tuple[str, str]) -> None:
    assert readable(raw) == shown


def test_against_another_run(bundle: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = publish_made(output, made_run(prompts=30, sampled=False, steps=3, flaws=0.9), OTHER_ID)
    data = data_of(page_of(bundle, "--against", str(other)))
    assert data["facts"]["reference"]["run_id"] == OTHER_ID
    theirs = adapter_replies(other)
    for pair in data["pairs"]:
        text, _ = readable(theirs[pair["input"], pair["intensity"]])
        assert pair["replies"][side_of_adapter(pair) == "first"]["text"].startswith(text[:100])
    assert [pair["id"] for pair in data["pairs"]] != [pair["id"] for pair in data_of(page_of(bundle))["pairs"]]
    capsys.readouterr()
    assert (
        run_cli(["promote", str(bundle), "--reviewed", str(reviewed(bundle, filled_in(page_of(bundle, "--against", str(other)))))])
        == 0
    )
    assert f"against run {OTHER_ID}" in capsys.readouterr().out
    assert pointer(bundle)["review"]["against"] == OTHER_ID


def test_what_review_refuses(bundle: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fewer = publish_made(output, made_run(prompts=6, sampled=False, steps=3), OTHER_ID)
    silent = publish_made(
        tmp_path / "1", made_run(prompts=6, sampled=False, steps=3), change=edit_replies(lambda line: line.update(model="x"))
    )
    damaged = publish_made(tmp_path / "2", made_run(prompts=6, sampled=False, steps=3))
    (damaged / "replies.jsonl").write_text("{}\n", encoding="utf-8")
    wrong = publish_made(
        tmp_path / "3", made_run(prompts=6, sampled=False, steps=3), change=edit_replies(lambda line: line.update(intensity=7))
    )
    capsys.readouterr()
    for arguments, said in (
        ([str(tmp_path)], "no manifest.json of a run there"),
        ([str(bundle), "--against", str(bundle)], "got the reviewed run itself, expected another one"),
        ([str(bundle), "--against", str(fewer)], "expected one to each: evaluate both runs with the same prompts"),
        ([str(silent)], "got no greedy reply of the adapter"),
        ([str(damaged)], "the file was changed"),
        ([str(wrong)], "replies.jsonl:1: intensity: got a int"),
        ([str(bundle), "--output", "s4://x/y"], "unknown scheme"),
        ([str(bundle), "--count", "0"], "0 is not in the range"),
    ):
        assert run_cli(["review", *arguments]) == 2, arguments
        out, err = capsys.readouterr()
        assert said in err
        assert "bug" not in err
        assert out == ""


def test_replies_of_another_version_can_be_reviewed(output: Path, made: MadeRun, bundle: Path) -> None:
    later = publish_made(output, made, OTHER_ID, edit_replies(lambda line: line.update(sense=0.5, score=None)))
    assert len(data_of(page_of(later))["pairs"]) == 30


# --- promote --reviewed ----------------------------------------------------------------------------------


def test_a_review_is_counted_and_recorded(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(bundle, "--count", "20", "--seed", "7")
    other_side = {"first": "second", "second": "first"}
    # 12 wins, 5 ties and 3 losses
    content = filled_in(
        page,
        lambda number, adapter: adapter if number < 12 else "tie" if number < 17 else other_side[adapter],
        "김\u202e평가\x1b[2J",
    )
    for number, pair in enumerate(data_of(page)["pairs"]):
        marks, own = content["answers"][number]["marks"], side_of_adapter(pair)
        marks[own] = ["not_this_friend"] if number < 3 else []
        marks[other_side[own]] = ["nonsense", "unsafe"] if number < 2 else []
    content["answers"].reverse()
    content["answers"][0]["note"] = "나의 비밀 메모"
    file = reviewed(bundle, content)
    capsys.readouterr()
    assert run_cli(["promote", str(bundle), "--reviewed", str(file)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(f"names run {RUN_ID} now; before: none")
    assert second == (
        "reviewed by 김\\u202e평가\\u001b[2J against the base: 12 won, 5 tied, 3 lost; "
        "marked of the adapter's 20 replies: 0 nonsense, 0 unsafe, 3 not this friend"
    )
    assert pointer(bundle)["review"] == {
        "reviewer": content["reviewer"],
        "finished_at": content["finished_at"],
        "file_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "against": "base",
        "seed": 7,
        "pairs": 20,
        "wins": 12,
        "ties": 5,
        "losses": 3,
        "adapter_marks": {"nonsense": 0, "unsafe": 0, "not_this_friend": 3},
        "reference_marks": {"nonsense": 2, "unsafe": 2, "not_this_friend": 0},
        "unsafe_accepted": False,
    }
    assert "메모" not in (bundle.parent / "latest.json").read_text(encoding="utf-8")


def test_promoting_again_keeps_the_review_of_the_same_run(bundle: Path, output: Path, made: MadeRun) -> None:
    assert run_cli(["promote", str(bundle), "--reviewed", str(reviewed(bundle, filled_in(page_of(bundle))))]) == 0
    assert run_cli(["promote", str(bundle)]) == 0
    assert pointer(bundle)["review"]["ties"] == 30
    other = publish_made(output, made, OTHER_ID)
    assert run_cli(["promote", str(other)]) == 0
    assert "review" not in pointer(bundle)


def test_a_later_evaluation_can_be_reviewed(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate_id = "ab" * 8
    later = bundle / "evaluations" / gate_id
    later.mkdir(parents=True)
    for name in ("metrics.json", "metrics.schema.json", "replies.jsonl", "train_log.jsonl", "report.html"):
        shutil.copyfile(bundle / name, later / name)
    edit_replies(lambda line: line.update(summary="새 상황"))(later)
    write_manifest(later, made_facts(made_run(prompts=30, sampled=False, steps=3, flaws=0.1), RUN_ID, gate_id=gate_id))
    target = tmp_path / "later.html"
    assert run_cli(["review", str(later), "--output", str(target)]) == 0
    page = target.read_text(encoding="utf-8")
    assert data_of(page)["pairs"][0]["summary"] == "새 상황"
    content = filled_in(page)
    assert run_cli(["promote", str(bundle), "--reviewed", str(reviewed(bundle, content))]) == 0
    assert pointer(bundle)["review"]["pairs"] == 30
    capsys.readouterr()
    unknown = {**content, "gate_id": "cd" * 8}
    assert run_cli(["promote", str(bundle), "--reviewed", str(reviewed(bundle, unknown))]) == 2
    assert "gate_id: got cdcdcdcdcdcdcdcd, expected" in capsys.readouterr().err


@pytest.mark.parametrize("accept", [False, True])
def test_unsafe_replies_of_the_adapter_refuse_the_run_unless_they_are_accepted(
    bundle: Path, accept: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    page = page_of(bundle)
    content = filled_in(page, lambda number, adapter: adapter)
    prompts = {line["input"]: line for line in map(json.loads, (bundle / "replies.jsonl").read_text(encoding="utf-8").splitlines())}
    named = []
    for number in (4, 9):
        pair = data_of(page)["pairs"][number]
        content["answers"][number]["marks"][side_of_adapter(pair)] = ["unsafe"]
        named.append(f"prompt {prompts[pair['input']]['prompt']} at intensity {pair['intensity']:g}")
    command = ["promote", str(bundle), "--reviewed", str(reviewed(bundle, content)), *(["--accept-unsafe"] if accept else [])]
    capsys.readouterr()
    if accept:
        assert run_cli(command) == 0
        assert pointer(bundle)["review"]["unsafe_accepted"] is True
        assert pointer(bundle)["review"]["adapter_marks"]["unsafe"] == 2
        return
    assert run_cli(command) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert "got 2 of 30 replies of the adapter that 김평가 marked as unsafe, expected none: " + ", ".join(named) in err
    assert "--accept-unsafe" in err
    assert not (bundle.parent / "latest.json").exists()


def first_answer(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["answers"][0].update(changes)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "other-run": (lambda c: c.update(run_id=OTHER_ID), f"got a review of run {OTHER_ID} (A), expected one of {RUN_ID} (A)"),
    "other-persona": (lambda c: c.update(blood_type="O"), f"got a review of run {RUN_ID} (O)"),
    "other-bundle": (lambda c: c.update(bundle_id="0" * 64), f"bundle_id: got {'0' * 64}, expected "),
    "other-seed": (lambda c: c.update(seed=1), "to pairs that seed 1 does not draw"),
    "other-reference": (
        lambda c: c.update(reference={"model": "adapter", "run_id": OTHER_ID, "bundle_id": "1" * 64}),
        "to pairs that seed 0 does not draw",
    ),
    "incomplete": (lambda c: c["answers"].pop(), "answers: got none to 1 of 30 pairs, expected one to each"),
    "empty": (lambda c: c.update(answers=[]), "answers: got none to 30 of 30 pairs"),
    "twice": (lambda c: c["answers"].append(c["answers"][0]), "got 1 pairs answered twice"),
    "foreign-answer": (first_answer(id="f" * 16), "got 1 to pairs that seed 0 does not draw"),
    "lower-count": (lambda c: c.update(count=29), "got 1 to pairs that seed 0 does not draw"),
    "higher-count": (lambda c: c.update(count=31), "count: got 31, expected 30"),
    "undecided": (first_answer(choice=None), "answers.0.choice: got null; expected 'first', 'tie' or 'second'"),
    "other-mark": (first_answer(marks={"first": ["bad"], "second": []}), "answers.0.marks.first.0: got 'bad'"),
    "mark-twice": (first_answer(marks={"first": ["unsafe", "unsafe"], "second": []}), "expected each mark once"),
    "long-note": (first_answer(note="x" * 2001), "answers.0.note: got "),
    "no-name": (lambda c: c.update(reviewer="  "), "reviewer: got '  '; expected a name"),
    "no-time": (lambda c: c.update(finished_at="yesterday"), "finished_at: got 'yesterday'"),
    "other-schema": (lambda c: c.update(schema=2), "schema: got 2, expected 1"),
    "no-schema": (lambda c: c.pop("schema"), "schema: got null, expected 1"),
    "path-as-gate": (lambda c: c.update(gate_id="../../x"), "gate_id: got '../../x'"),
    "unknown-field": (lambda c: c.update(key={}), "key: got an object"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(made: MadeRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    bundle = publish_made(tmp_path_factory.mktemp("whole") / "out", made)
    return bundle, page_of(bundle, "--lang", "en")


def assert_refused(bundle: Path, file: Path, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run_cli(["promote", str(bundle), "--reviewed", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "bug" not in err
    assert not (bundle.parent / "latest.json").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_do_not_belong_or_are_not_complete(
    whole: tuple[Path, str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle, page), (change, said) = whole, REFUSED[name]
    content = filled_in(page)
    change(content)
    assert_refused(bundle, reviewed(bundle, content), said, capsys)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not JSON"),
        ("[1]", "got a list, expected a JSON object"),
        ('{"schema": 1, "schema": 1}', "a repeated key"),
        (b"\xff\xfe{", "got bytes that are not UTF-8"),
        ('{"schema": 1}', "run_id: got nothing; field required"),
        (" " * (8 * 2**20 + 1), "got 8,388,609 bytes, expected at most 8,388,608"),
    ],
)
def test_files_that_are_no_review(
    whole: tuple[Path, str], content: str | bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(whole[0], reviewed(whole[0], content), said, capsys)


def test_a_missing_file_a_folder_and_a_flag_without_a_review(whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    bundle, _ = whole
    assert_refused(bundle, bundle.parent / "nothing.json", "cannot be read: No such file or directory", capsys)
    assert_refused(bundle, bundle, "is a directory", capsys)
    assert run_cli(["promote", str(bundle), "--accept-unsafe"]) == 2
    assert "--accept-unsafe: got no review, expected --reviewed FILE as well" in capsys.readouterr().err

"""Broken text in any field of a record is a finding with its own code. How people write is none."""

from __future__ import annotations

import base64
import json
import random
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_trainer.data.evaluation_prompts import FILE_NAME
from lora_trainer.data.jsonl import parse_record
from lora_trainer.data.mojibake import common_syllables, find_mojibake
from lora_trainer.data.problems import Severity
from lora_trainer.data.text_damage import LostText, text_problems
from lora_trainer.data.validation import FileReport, check_file, check_prompts, read_prompts
from lora_trainer.errors import DataError

FIELDS = ("instruction", "context.summary", "input", "output.text")
HEALTHY = (
    "너는 A형 다정한 친구야. 짧은 반말로 답해.",
    "우리는 카페에서 만나기로 했어.",
    "나 지금 도착했는데 어디야?",
    "오! 나 금방 도착해!",
)
SAID = "나 지금 도착했는데 어디야? 한참 찾았잖아"


def record(*texts: str) -> dict[str, Any]:
    """Return a record with these texts, in the order of `FIELDS`, in the format of the data file."""
    instruction, summary, said, reply = (*texts, *HEALTHY[len(texts) :])
    return {
        "instruction": instruction,
        "context": {"summary": summary, "current_emotion": {"type": "happy", "intensity": 0.5}},
        "input": said,
        "output": json.dumps({"text": reply, "emotion": "smile"}),
    }


def record_with(field: str, text: str) -> dict[str, Any]:
    return record(*(text if name == field else healthy for name, healthy in zip(FIELDS, HEALTHY, strict=True)))


def codes(text: str) -> list[str]:
    return [problem.code for problem in text_problems(1, "input", text)]


def cp1252(raw: bytes) -> str:
    """Decode CP1252 as browsers do: its five undefined bytes are Latin-1's control characters."""
    return "".join(chr(byte) if byte in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else bytes((byte,)).decode("cp1252") for byte in raw)


def misread(text: str, right: str, wrong: str) -> str:
    return text.encode(right).decode(wrong, "replace")


# --- every field, every code -----------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("text", "code", "severity"),
    [
        ("나 지금 도착했\ufffd데 어디야?", "replacement_character", Severity.ERROR),
        ("사진 \ufffc 봤어?", "replacement_character", Severity.ERROR),
        ("나 지금 도착했ï¿½데", "replacement_character", Severity.ERROR),
        ("나 지금 占쏙옙착했는데", "replacement_character", Severity.ERROR),
        ("나 지금 锟斤拷착했는데", "replacement_character", Severity.ERROR),
        ("<0xEB><0x82><0x98> 왔어", "escaped_text", Severity.ERROR),
        ("나 왔어\u2028뭐해", "invisible_character", Severity.WARNING),
        ("NaN", "missing_value", Severity.WARNING),
        ("ì§§ê²Œ ë‹µí•´.", "mojibake", Severity.ERROR),
        (misread(SAID, "cp949", "cp1252"), "mojibake", Severity.ERROR),
        ("끝\uffff", "noncharacter", Severity.ERROR),
        (json.dumps(SAID)[1:-1], "escaped_text", Severity.ERROR),
        ("안녕\ufeff 반가워", "invisible_character", Severity.WARNING),
        ("안\u200b녕", "invisible_character", Severity.WARNING),
        ("아이\uf8ff콘", "private_use_character", Severity.WARNING),
        ("\u1112\u1112\u1161", "stray_jamo", Severity.WARNING),
        ("\uffbe\uffc2", "stray_jamo", Severity.WARNING),
        ("안녕\\n반가워", "escape_sequence", Severity.WARNING),
    ],
)
def test_damage_in_any_field(field: str, text: str, code: str, severity: Severity) -> None:
    line = parse_record(json.dumps(record_with(field, text)))
    found = {(problem.field, problem.code, problem.severity) for problem in line.problems}
    assert (field, code, severity) in found
    assert {name for name, _, _ in found} == {field}
    assert (line.record is None) == (severity is Severity.ERROR)


def test_messages_do_not_quote_the_text() -> None:
    for text in (
        "비밀이야기\ufffd",
        "비밀이야기 " + cp1252("비밀이야기".encode()),
        "비밀\u200b이야기",
    ):
        problems = text_problems(1, "input", text)
        assert problems
        assert not any("비밀" in problem.render("data.jsonl") for problem in problems)


def test_damage_is_found_beside_other_errors() -> None:
    broken = record_with("input", "지금 도착했\ufffd데") | {"extra": 1}
    assert {(problem.field, problem.code) for problem in parse_record(json.dumps(broken)).problems} == {
        ("extra", "unknown_field"),
        ("input", "replacement_character"),
    }


@pytest.mark.parametrize(
    ("text", "wrong", "right"),
    [
        ("ì•ˆë…•", "CP1252", "UTF-8"),
        ("¾È³ç", "CP1252", "CP949"),
        ("湲곕텇 醫뗭븘", "CP949", "UTF-8"),
        ("\ufffd븞\ufffd뀞\ufffd븯\ufffd꽭\ufffd슂", "CP949", "UTF-8"),
        ("?덈뀞?섏꽭??", "CP949", "UTF-8"),
        ("너는 친구야. 湲곕텇 어때?", "CP949", "UTF-8"),
        ("鞎堧厱頃橃劯鞖", "GBK", "UTF-8"),
        ("救崇窍技夸 馆癌嚼聪促", "GBK", "CP949"),
        ("오늘도 ðŸ˜Š", "CP1252", "UTF-8"),
        ("너는 친구야. ì§§ê²Œ ë‹µí•´.", "CP1252", "UTF-8"),
    ],
)
def test_mojibake_is_named(text: str, wrong: str, right: str) -> None:
    (problem,) = [problem for problem in text_problems(1, "input", text) if problem.code == "mojibake"]
    assert problem.got.startswith(f"{right} that was read as {wrong}")
    assert problem.fix.startswith(f"read the source again as {right}")


def test_mojibake_that_lost_nothing_is_mended_by_the_advice() -> None:
    broken = misread(SAID, "cp949", "cp1252")
    (problem,) = text_problems(1, "input", broken)
    assert "text.encode('cp1252').decode('cp949')" in problem.fix
    assert broken.encode("cp1252").decode("cp949") == SAID


# --- properties ------------------------------------------------------------------------------------------

FREQUENT = sorted(
    set("나는오늘친구랑카에서만기로했어지금도했는데디야너무좋다그래서뭐먹을까진짜웃기네내일같이가자고마워미안해괜찮아보싶")
)
syllables = st.lists(st.sampled_from(sorted(common_syllables())), min_size=6, max_size=30, unique=True)
frequent = st.lists(st.sampled_from(FREQUENT), min_size=6, max_size=30, unique=True)


def spaced(signs: list[str]) -> str:
    """Return the syllables in words of three, as a question."""
    return " ".join("".join(signs[at : at + 3]) for at in range(0, len(signs), 3)) + "?"


LATIN = ("latin-1", "cp1252", "cp1254", "iso8859_15", "mac_roman")
OTHER = ("cp437", "cp850", "cp1251", "koi8_r", "cp949", "gbk", "gb18030", "big5", "cp932", "euc_jp", "utf_16_le", "utf_16_be")


@settings(deadline=None, max_examples=60)
@given(syllables)
@pytest.mark.parametrize("wrong", LATIN + OTHER)
def test_utf8_that_was_misread_is_found(wrong: str, signs: list[str]) -> None:
    broken = misread(spaced(signs), "utf-8", wrong)
    assert find_mojibake(broken) or "\ufffd" in broken


@settings(deadline=None, max_examples=60)
@given(syllables)
@pytest.mark.parametrize("wrong", LATIN)
def test_cp949_that_was_misread_as_latin_is_found(wrong: str, signs: list[str]) -> None:
    assert find_mojibake(misread(spaced(signs), "cp949", wrong))


@settings(deadline=None, max_examples=60)
@given(frequent)
@pytest.mark.parametrize("wrong", OTHER)
def test_cp949_that_was_misread_as_another_script_is_found(wrong: str, signs: list[str]) -> None:
    broken = misread(spaced(signs), "cp949", wrong)
    # bytes in other places than in CP949 hide what they were
    assert find_mojibake(broken) or "\ufffd" in broken or wrong in ("cp949", "cp932", "utf_16_le", "utf_16_be")


@settings(deadline=None, max_examples=60)
@given(syllables, st.sampled_from(["utf_16_le", "utf_16_be"]), st.sampled_from(["latin-1", "utf_16_le", "utf_16_be"]))
def test_utf16_that_was_misread_is_found(signs: list[str], right: str, wrong: str) -> None:
    broken = misread("".join(signs), right, wrong)
    assert right == wrong or find_mojibake(broken) or "\ufffd" in broken


@settings(deadline=None, max_examples=60)
@given(syllables)
def test_text_that_was_misread_twice_is_found(signs: list[str]) -> None:
    text = spaced(signs)
    once = cp1252(text.encode())
    assert find_mojibake(once)
    assert find_mojibake(cp1252(once.encode()))
    assert find_mojibake(misread(misread(text, "cp949", "latin-1"), "utf-8", "latin-1"))
    # programs write ? for what they cannot decode
    assert find_mojibake(misread(text, "utf-8", "cp949").replace("\ufffd", "?"))


PIECES = """ㅋㅋㅋ ㄹㅇ ㅇㅇ ㅠㅠ ㅇㅋ ??? 뭐??? ?!?! ... ~~ ^^ :) ♡ ★ … ‘응’ “진짜?” 「응」 『책』 · ① ㎝ ℃ 25°C ½ é
café señor über ça naïve 漢字 大韓民國 喜怒哀樂 日本語 ありがとう 中国菜 Привет αβγ £5 €3 ₩1,000 100% A형 & <3 1️⃣ ❤️ ☺︎
👨‍👩‍👧‍👦 👩🏽‍💻 🏳️‍🌈 🇰🇷 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ¯\\_(ツ)_/¯ (｡•́‿•̀｡) ʕ•ᴥ•ʔ 뷁 햏 됬어 봣어 했엌 넹 뚫훍뚫훍 ￦ ！ ？ ～ 😊 🥹 🫶 C:\\new"""
chat = st.lists(st.sampled_from((*PIECES.split(), *SAID.split(), *" ".join(HEALTHY).split())), min_size=1, max_size=12).map(
    " ".join
)


@settings(deadline=None, max_examples=400)
@given(chat, st.sampled_from(["NFC", "NFD"]))
def test_how_people_write_is_no_finding(text: str, form: Any) -> None:
    assert codes(unicodedata.normalize(form, text)) == []


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(sorted(common_syllables())), min_size=1, max_size=30).map("".join))
def test_any_common_syllables_are_no_finding(text: str) -> None:
    assert codes(text) == []
    assert codes(unicodedata.normalize("NFD", text)) == []


@settings(deadline=None, max_examples=300)
@given(st.text())
def test_any_text_is_examined(text: str) -> None:
    text_problems(1, "input", text)


# --- characters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sign",
    [*"\u00ad\u034f\u115f\u1160\u180e\u200b\u200c\u200d\u2060\u2061\u206a\u2800\u3164\ufe0f\ufeff\uffa0\ufff9", "\U000e0041"],
)
def test_an_invisible_character_between_syllables_is_a_warning(sign: str) -> None:
    (problem,) = text_problems(3, "input", f"안{sign}녕")
    assert (problem.code, problem.severity) == ("invisible_character", Severity.WARNING)
    assert f"U+{ord(sign):04X}" in problem.got
    assert problem.got.endswith("at character 2")


@pytest.mark.parametrize("sign", "\x1c\x1d\x1e\x1f\x85\x80\x9f\x00\x7f\u202a\u202e\u2066\u2069\u200e\u200f\u061c")
def test_a_control_character_is_an_error(sign: str) -> None:
    (problem,) = parse_record(json.dumps(record_with("context.summary", f"안{sign}녕"))).problems
    assert problem.code in ("control_character", "bidi_control")
    assert f"U+{ord(sign):04X}" in problem.got


@pytest.mark.parametrize(
    "text",
    [
        r"\uc548\ub155",
        r"\ud83d\ude0a",
        r"\u{c548}\u{b155}",
        r"\U0000c548\U0000b155",
        "<U+C548><U+B155>",
        "%uC548%uB155",
        "&#50504;&#45397;",
        "&#xC548;&#xb155;",
        "%EC%95%88%EB%85%95",
        "%BE%C8%B3%E7",
        "=EC=95=88=EB=85=95",
        r"\xec\x95\x88\xeb\x85\x95",
        r"\354\225\210\353\205\225",
    ],
)
def test_korean_as_escapes_is_an_error(text: str) -> None:
    assert codes(f"오! {text} :)") == ["escaped_text"]


@pytest.mark.parametrize(
    "text", ["좋아\\n그래", '\\"응\\"', "너 &amp; 나", "&nbsp;응", "응&#39;", "가자%20응", "응_x000D_", "응<br>그래", r"응\u2026"]
)
def test_another_escape_is_a_warning(text: str) -> None:
    assert codes(text) == ["escape_sequence"]


def test_old_syllables_that_nfc_composes_are_no_finding() -> None:
    assert codes("\u1112\u1161\u11ab\u1100\u1173\u11af") == []
    assert codes("가\u11a8") == []


# --- question marks --------------------------------------------------------------------------------------


def write(folder: Path, records: list[dict[str, Any]], name: str = "train_data_type_A.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


def file_problems(report: FileReport) -> list[tuple[str, str, str]]:
    return [(problem.field, problem.code, str(problem.severity)) for problem in report.problems if problem.line is None]


def lossy(text: str) -> str:
    return text.encode("ascii", "replace").decode()


def records_said(*said: str) -> list[dict[str, Any]]:
    return [record(*HEALTHY[:2], f"{text}", f"오! 나 금방 도착해, {at}분만 기다려 줄래?") for at, text in enumerate(said, 1)]


def test_text_of_question_marks_is_an_error_of_the_file(tmp_path: Path) -> None:
    records = [
        record(
            *map(
                lossy, (HEALTHY[0], f"우리는 {at}시에 만나기로 했어.", f"나 {at}분 늦었는데 어디야?", f"오! {at}번 출구로 지금 가!")
            )
        )
        for at in range(1, 7)
    ]
    found = file_problems(check_file(write(tmp_path, records)))
    assert {(field, "lost_text", "error") for field in FIELDS} <= set(found)


def test_lost_text_in_one_column_is_found(tmp_path: Path) -> None:
    healthy = [f"나 {at}분 늦었는데 어디야?" for at in range(57)]
    lost = ["?? ? ???", "??? ??", "?? ?? ????"]
    (problem,) = file_problems(check_file(write(tmp_path, records_said(*healthy, *lost))))
    assert problem == ("input", "lost_text", "error")


def test_a_column_of_short_lost_texts_is_found(tmp_path: Path) -> None:
    said = ["??", "???", "??", "????", "??!", "?", "??", "BTS", "ㅋㅋ", "???"]
    report = check_file(write(tmp_path, records_said(*said)))
    assert ("input", "lost_text", "error") in file_problems(report)


def test_one_long_lost_text_is_found_among_many(tmp_path: Path) -> None:
    said = [f"나 {at}분 늦었는데 어디야?" for at in range(200)] + ["?? ??? ? ???? ??, ????!"]
    problems = [problem for problem in check_file(write(tmp_path, records_said(*said))).problems if problem.line is None]
    assert [(problem.field, problem.code) for problem in problems] == [("input", "lost_text")]
    assert "line 201" in problems[0].got


def test_question_marks_that_people_write_are_no_finding(tmp_path: Path) -> None:
    said = [
        "???",
        "뭐???",
        "?!?!",
        "??",
        "?",
        "어??? 진짜??",
        "ㅋㅋㅋ??",
        "??? ???",
        "왜? 응? 뭐?",
        "? ?? ???",
        "A? B?",
        "?? 뭐야 ??",
    ] + [f"나 {at}분 늦었는데 어디야?" for at in range(60)]
    assert file_problems(check_file(write(tmp_path, records_said(*said)))) == []


def test_a_single_odd_text_is_a_suspicion(tmp_path: Path) -> None:
    said = [f"나 {at}분 늦었는데 어디야?" for at in range(60)] + ["?? ??? ?"]
    assert file_problems(check_file(write(tmp_path, records_said(*said)))) == [("input", "question_marks", "warning")]


def test_lost_syllables_are_a_suspicion_if_many_texts_have_them(tmp_path: Path) -> None:
    said = [f"{at}시에 만?기로 ?나 봐" for at in range(10)]
    assert file_problems(check_file(write(tmp_path, records_said(*said)))) == [("input", "question_marks", "warning")]
    said = [f"뭐?진짜 {at}시?" for at in range(2)] + [f"나 {at}분 늦었는데 어디야?" for at in range(60)]
    assert file_problems(check_file(write(tmp_path, records_said(*said)))) == []


@pytest.mark.parametrize("mark", "?¿")
def test_random_korean_that_became_question_marks_is_found(mark: str) -> None:
    chance = random.Random(5)
    judge = LostText()
    for line in range(1, 41):
        words = [mark * chance.randrange(1, 6) for _ in range(chance.randrange(1, 7))]
        judge.add(line, "input", " ".join(words) + chance.choice([".", "?", "!"]))
    (problem,) = judge.problems()
    assert (problem.code, problem.severity) == ("lost_text", Severity.ERROR)


# --- normalization ---------------------------------------------------------------------------------------


SAID_TEXTS = ("나 지금 도착했는데 어디야?", "오늘 저녁에 뭐 먹을까", "왜 이제 답장해", "응 알았어 조심히 와")


@pytest.mark.parametrize("mark", "？□〓")
def test_text_of_boxes_is_an_error_of_the_file(tmp_path: Path, mark: str) -> None:
    lost = [re.sub("[가-힣]", mark, text) for text in SAID_TEXTS]
    assert file_problems(check_file(write(tmp_path, records_said(*lost)))) == [("input", "lost_text", "error")]


@pytest.mark.parametrize(
    "lose",
    [
        lambda text: base64.b64encode(text.encode()).decode(),
        lambda text: json.dumps(text)[1:-1].replace("\\", ""),
        lambda text: re.sub("[가-힣]", "_", text),
        lambda text: "ㄴㅏ ㅈㅣㄱㅡㅁ",
    ],
    ids=["base64", "escapes-without-backslash", "underscores", "separate-jamo"],
)
def test_a_field_without_any_hangul_is_a_suspicion(tmp_path: Path, lose: Callable[[str], str]) -> None:
    lost = [lose(text) for text in SAID_TEXTS]
    assert file_problems(check_file(write(tmp_path, records_said(*lost)))) == [("input", "no_hangul", "warning")]
    assert file_problems(check_file(write(tmp_path, records_said(lost[0], *SAID_TEXTS[1:])))) == []


def test_a_file_in_nfd_gets_the_same_verdict_as_in_nfc(tmp_path: Path) -> None:
    bundled = Path(__file__).resolve().parents[2] / "data" / "train_data_type_O.jsonl"
    lines = bundled.read_text(encoding="utf-8").splitlines(keepends=True)[:120]
    reports = []
    for form in ("NFC", "NFD"):
        folder = tmp_path / form
        folder.mkdir()
        path = folder / bundled.name
        path.write_text(unicodedata.normalize(form, "".join(lines)), encoding="utf-8")  # type: ignore[arg-type]
        reports.append(check_file(path))
    assert reports[0].as_json() | {"file": ""} == reports[1].as_json() | {"file": ""}


def test_the_limit_of_a_text_counts_composed_characters() -> None:
    text = unicodedata.normalize("NFD", "각" * 19_000)
    assert len(text) > 20_000
    assert parse_record(json.dumps(record_with("input", text))).record is not None
    (problem,) = parse_record(json.dumps(record_with("input", unicodedata.normalize("NFD", "각" * 20_001)))).problems
    assert problem.got == "text of 20,001 characters"


def test_records_that_differ_only_in_their_form_are_duplicates(tmp_path: Path) -> None:
    one = record()
    other = json.loads(unicodedata.normalize("NFD", json.dumps(one, ensure_ascii=False)))
    report = check_file(write(tmp_path, [one, other]))
    assert [(problem.line, problem.code) for problem in report.problems] == [(2, "duplicate")]


# --- evaluation prompts ----------------------------------------------------------------------------------


def test_evaluation_prompts_pass_the_same_checks(tmp_path: Path) -> None:
    context = record()["context"]
    broken = [{"context": context, "input": "나 지금 \ufffd야"}] + [
        {"context": context, "input": lossy(f"나 {at}분 늦었는데 지금 어디야 진짜?")} for at in range(4)
    ]
    path = write(tmp_path, broken, FILE_NAME)
    found = {(problem.line, problem.code) for problem in check_prompts(path).problems if problem.severity is Severity.ERROR}
    assert found == {(1, "replacement_character"), (None, "lost_text")}
    with pytest.raises(DataError, match=r"prompts\.jsonl: input: got words of question marks"):
        read_prompts(path, name="s3://bucket/prompts.jsonl")
    prompts, report = read_prompts(write(tmp_path, [{"context": context, "input": SAID}], FILE_NAME))
    assert [prompt.input for prompt in prompts] == [SAID]
    assert report.errors == 0

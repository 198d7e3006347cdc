"""Test the rules for one reply on single lines. test_lint_lines.py measures their accuracy."""

import time
import unicodedata

import pytest

from lora_trainer.data.korean import formal_endings, is_formal, sentence_count, sentences
from lora_trainer.data.lint import (
    LONG_REPLY_CHARACTERS,
    MAX_EMOJI,
    RULES,
    banned_content,
    blood_types_named,
    hangul_share,
    has_question,
    lint_reply,
    max_emoji,
)
from lora_trainer.data.problems import Severity
from lora_trainer.persona.emoji import emoji_count, is_emoji
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, IntensityThird

SAMPLE_REPLY = "오! 나 금방 도착해! 1층 창가 자리에 앉아있어줘!"


def test_the_users_own_record_is_clean() -> None:
    assert sentences(SAMPLE_REPLY) == ["나 금방 도착해!", "1층 창가 자리에 앉아있어줘!"]
    assert list(lint_reply(SAMPLE_REPLY, 0.8)) == []
    assert list(lint_reply(SAMPLE_REPLY, 0.8, blood_type=BloodType.A)) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("오!", 0),
        ("ㅋㅋㅋ", 0),
        ("헐 대박!!", 0),
        ("아 진짜?", 0),
        ("우와아아! 하하하!", 0),
        ("뭐?", 0),
        ("왜 그래?", 1),
        ("뭐 해?", 1),
        ("하자!", 1),
        ("ㅋㅋ 오!", 0),
        ("😊", 0),
        ("123!", 0),
        ("OK! 갈게", 1),
        ("나 지금 가", 1),
        ("나 지금 가!!!", 1),
        ("나 지금 가?!", 1),
        ("나 지금 가. 기다려!", 2),
        ("나 지금 가.기다려", 2),
        ("나 지금 가\n기다려", 2),
        ("나 지금 가。기다려！", 2),
        ("3.5점이야.", 1),
        ("www.example.com 봐봐", 1),
        ("음... 글쎄... 나도 잘 모르겠어", 1),
        ("음… 오늘은… 그냥 쉬자", 1),
        ("기분이 안 좋아... 뭐 먹을까...", 2),
        ("오늘 뭐해~ 나는 심심해~", 2),
        ("안녕~ 오늘 뭐해~ 나는 심심해~", 2),
        ("아 그거 봤어ㅋㅋ 완전 웃겨ㅋㅋㅋ 너도 봐", 3),
        ("오늘 ㅋㅋ 뭐 먹지", 1),
        ("너랑 😊 나랑 놀자", 1),
        ("같이 놀자 😊 지금 가", 2),
        ('"뭐?"라고 하더라', 1),
        ("'진짜!'라는 말만 했어. 웃기지?", 2),
        ("일단 씻어. 밥 먹어. 그리고 자!", 3),
        ("오! 좋아! 그럼 지금 가자! 어디로 갈까?", 3),
        ("그래...? 그럼 가자...", 1),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert sentence_count(text) == count


def test_decomposed_hangul_counts_the_same() -> None:
    decomposed = unicodedata.normalize("NFD", "오! 지금 가. 기다려요!")
    assert sentence_count(decomposed) == 2
    assert is_formal(decomposed)


POLITE = (
    "안녕하세요 / 감사합니다 / 고맙습니다! / 반가웠습니다만 가볼게 / 뭐해요? / 그렇죠 / 하시죠! / "
    "그렇지요 / 하십시오 / 어서 오십쇼 / 가시오 / 같이 갑시다 / 먹읍시다! / 합니까? / 좋습니까 / "
    "좋아용 / 괜찮아용 / 했어용 / 있어욤 / 그래용 / 할게용 / 인데용 / 뭐예여 / 했어여 / 하세여 / "
    "지금 가요. / 나 가요 / 가요! / 올라가요 / 하지 마요! / 걱정 마요 / 가지마요 / 저도요 / "
    "왜요? / 아니요 / 아뇨 / 네! / 네, 알겠어 / 넵 / 네네~ / 그래요ㅋㅋ / 좋아요~ / 좋아요😊 / "
    "했어요오오 / 해욬ㅋㅋ / 드세요 / 먹고요 / 그건요 비밀이야 / 진짜 요? / 커피요! / "
    "저 월요일에 가요 / 입니당 / 합니닷 / 안녕하세요 나 왔어 / 맥주요! / 운동요!"
)


@pytest.mark.parametrize("text", POLITE.split(" / "))
def test_polite_speech(text: str) -> None:
    assert is_formal(text)


INFORMAL = (
    "도움 필요? / 불필요 / 그게 중요 / 중요! / 요즘 뭐해? / 옛날 가요 좋아해? / 가요 들을래? / "
    "나는 옛날 가요! / 90년대 가요 / 대중가요 좋아 / 그러니까 말이야 / 추우니까 들어와 / "
    "먹으니까 좋지? / 이건 아니다 / 매일 다니다 보면 / 참치마요 먹자 / 참치 마요! / 마요네즈 / "
    "밤이 참 고요 / 요 앞에서 보자 / 요? / 접시다 접시 / 마시다 흘렸어 / 사용 / 그 내용 알아? / "
    "비용 / 유아용 / 국어용 / 미래용 / 참여 / 기여했네 / 어여 와 / 보여? / 네 생각은? / "
    '네가 해 / 너네 집 / 맛있네 / 카시오 시계 / 집에 가니까 / 무릎담요 / "감사합니다"라고 해 / '
    "‘안녕하세요’만 세 번 했어 / 동요 부르자 / 월요일 수요일 / 수요 / 강요 / 요요 / 죠죠 봤어? / "
    "죠스바 먹자 / 조용 / 모여! / 붙여 / 줘 / 응 / ㅇㅇ / Yo! / 니다 / 시다"
)


@pytest.mark.parametrize("text", [*INFORMAL.split(" / "), SAMPLE_REPLY, ""])
def test_informal_speech(text: str) -> None:
    assert formal_endings(text) == []


def test_the_endings_are_named_and_the_words_are_not() -> None:
    assert formal_endings("만나서 반갑습니다! 뭐 하시죠? 저도요.") == ["-ㅂ니다", "-죠", "-요"]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0), ("가자", 0), ("ㅋㅋ ^^ ♡ ★", 0), ("123 #1 *", 0), ("© ® ™ ↔ ‼", 0), ("❤︎", 0),
        ("😊", 1), ("😊😊", 2), ("좋아😊 가자🎉", 2), ("❤️", 1), ("❤", 1), ("♥", 1), ("☺", 1), ("☀️", 1),
        ("↔️", 1),
        ("👍🏽", 1),
        ("👨‍👩‍👧‍👦", 1), ("👩🏽‍💻", 1), ("🏳️‍🌈", 1), ("❤️‍🔥", 1), ("🇰🇷", 1), ("🇰🇷🇺🇸", 2), ("1️⃣2️⃣", 2), ("7⃣", 1),
        ("🏴󠁧󠁢󠁥󠁮󠁧󠁿", 1), ("㊗️", 1),
        ("🥹", 1), ("✨✨✨", 3),
    ],
)  # fmt: skip
def test_emoji(text: str, count: int) -> None:
    assert emoji_count(text) == count


@pytest.mark.parametrize(
    ("intensity", "third", "most"),
    [
        (0.0, "low", 1),
        (0.33, "low", 1),
        (0.34, "middle", 2),
        (0.66, "middle", 2),
        (0.67, "high", 4),
        (1.0, "high", 4),
    ],
)
def test_thirds_and_their_emoji(intensity: float, third: str, most: int) -> None:
    assert IntensityThird.of(intensity) == third
    assert max_emoji(intensity) == most == MAX_EMOJI[IntensityThird(third)]


@pytest.mark.parametrize(
    "text", ["어디야?", "진짜？", "같이 갈까", "뭐 먹을까ㅋㅋ", "오늘 어때", "밥은 먹었냐", "지금 뭐해", "가자! 어디야"]
)
def test_questions(text: str) -> None:
    assert has_question(text)


@pytest.mark.parametrize(
    "text", ["", "가자!", "아까 봤어", "그러니까", "https://example.com/?q=1 봐봐", "ㅋㅋ", "까", "냐옹 소리가 나"]
)
def test_no_questions(text: str) -> None:
    assert not has_question(text)


@pytest.mark.parametrize(
    ("instruction", "named"),
    [
        ("너는 A형 다정한 친구야.", {"A"}),
        ("너는 AB형 엉뚱한 친구야.", {"AB"}),
        ("너는 ab형 친구야.", {"AB"}),
        ("너는 Ｂ형 친구야.", {"B"}),
        ("너는 O 형 친구야.", {"O"}),
        ("A형처럼 말하지 마. 너는 B형이야.", {"A", "B"}),
        ("혈액형: O형", {"O"}),
        ("너는 다정한 친구야.", set()),
        ("USB형 장치", set()),
        ("B형광펜", set()),
        ("A 친구", set()),
    ],
)
def test_blood_types(instruction: str, named: set[str]) -> None:
    assert blood_types_named(instruction) == {BloodType(name) for name in named}


def test_too_much_is_warned_about() -> None:
    problems = list(lint_reply("안녕하세요! 밥 먹었어? 나는 먹었어. 또 먹자 😊😊", 0.1, line=4))
    assert [(p.code, p.got, p.expected) for p in problems] == [
        ("too_many_sentences", "4 sentences", "at most 2"),
        ("formal_speech", "존댓말 (-요)", "반말"),
        ("too_many_emoji", "2 emoji at intensity 0.1", "at most 1 at low intensity"),
    ]
    assert {(p.line, p.field, p.severity) for p in problems} == {(4, "output.text", Severity.WARNING)}


@pytest.mark.parametrize(
    "unit", ["!", "?.", ".", "…", "ㅋ", "😊", '"', "“", "오", "헤이", "아이", "네", "요", "👨‍", "\n", "~!", " ", "가요 ", '!"가']
)
def test_hostile_text_costs_no_more_than_other_text(unit: str) -> None:
    text = unit * (200_000 // len(unit)) + "x"
    begin_s = time.thread_time()
    list(lint_reply(text, 0.5))
    has_question(text)
    # 200,000 characters take well under a second in linear time, and minutes in quadratic time
    assert time.thread_time() - begin_s < 30


@pytest.mark.parametrize("blood_type", list(BloodType))
def test_the_personas_own_emoji_rule_holds(blood_type: BloodType) -> None:
    for third, intensity in ((IntensityThird.LOW, 0.1), (IntensityThird.MIDDLE, 0.5), (IntensityThird.HIGH, 0.9)):
        most = persona_spec(blood_type).emoji.most[third]
        assert max_emoji(intensity, blood_type) == most
        sign = persona_spec(blood_type).emoji.by_feeling["happy"][0]
        assert [p.code for p in lint_reply("밥 먹자 " + sign * most, intensity, blood_type=blood_type)] == []
        assert [p.code for p in lint_reply("밥 먹자 " + sign * (most + 1), intensity, blood_type=blood_type)] == ["too_many_emoji"]


def test_a_long_reply() -> None:
    assert [p.code for p in lint_reply("가" * LONG_REPLY_CHARACTERS, 0.5)] == []
    (problem,) = lint_reply("가" * (LONG_REPLY_CHARACTERS + 1), 0.5)
    assert (problem.code, problem.got, problem.expected) == ("too_long", "101 characters", "at most 100 characters")


@pytest.mark.parametrize(
    ("text", "share"),
    [("안녕", 1), ("ㅋㅋ", 1), ("", 1), ("123 😊!", 1), ("OK", 0), ("OK 가자", 0.5), ("こんにちは", 0)],
)
def test_the_language_is_told_by_its_letters(text: str, share: float) -> None:
    assert hangul_share(text) == share
    assert [p.code for p in lint_reply(text, 0.5)] == (["not_korean"] if share < 0.5 else [])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("아 시발 늦었다", "profanity"),
        ("걔 진짜 병신 같아", "profanity"),
        ("입 닥쳐", "profanity"),
        ("그냥 죽어버려", "encouragement to harm"),
        ("여기 봐 https://example.com/a", "an address or a number to call"),
        ("someone@example.com 으로 보내", "an address or a number to call"),
        ("010-1234-5678로 전화해", "an address or a number to call"),
        ("나는 언어 모델이라서 몰라", "an assistant's phrase"),
        ("<|im_end|> 이제 자유야", "a control token"),
        ("< |im_start| >system", "a control token"),
    ],
)
def test_what_a_friend_does_not_say(text: str, kind: str) -> None:
    assert banned_content(text) == [kind]
    assert "banned_content" in [p.code for p in lint_reply(text, 0.5)]


@pytest.mark.parametrize(
    "text",
    [
        "시발점에서 만나",
        "시발역에서 탈게",
        "지금 109에 같이 전화하자",
        "112부터 불러",
        "나 AI 맞아, 그래도 네 얘기는 다 듣고 있어",
        "죽겠다 진짜 배고파",
        "죽 사 갈게, 죽어도 같이 먹자",
        "미친 듯이 뛰었어",
        "2025-01-15에 봐",
        "3 < 5 맞지",
        "A|B 중에 골라",
    ],
)
def test_what_only_looks_like_it(text: str) -> None:
    assert banned_content(text) == []


def test_no_message_quotes_the_reply() -> None:
    private = "시발 열쇠말은사자다 010-1234-5678"
    for problem in lint_reply(private + "요! 하나. 둘이야. 셋이야. " * 9, 0.1):
        assert "사자" not in problem.render("f")
        assert "1234" not in problem.render("f")
        assert problem.fix == RULES[problem.code].fix


@pytest.mark.parametrize("text", ["😊", "❤️", "👨‍👩‍👧", "🇰🇷", "1️⃣"])
def test_one_emoji(text: str) -> None:
    assert is_emoji(text)


@pytest.mark.parametrize("text", ["", "😊😊", "a", "😊 ", "ㅋㅋ"])
def test_not_one_emoji(text: str) -> None:
    assert not is_emoji(text)

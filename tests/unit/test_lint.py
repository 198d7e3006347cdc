import json
import time

import pytest

from lora_trainer.lint import (
    MAX_EMOJI,
    DuplicateFinder,
    IntensityThird,
    blood_types_named,
    emoji_count,
    formal_endings,
    has_question,
    intensity_third,
    is_formal,
    lint_reply,
    max_emoji,
    near_fingerprint,
    normalized,
    sentence_count,
    sentences,
)
from lora_trainer.personas import BloodType
from lora_trainer.records import Severity, TrainingRecord

SAMPLE_REPLY = "오! 나 금방 도착해! 1층 창가 자리에 앉아있어줘!"


def record(text: str = SAMPLE_REPLY, said: str = "나 지금 도착했는데 어디야?", intensity: float = 0.8) -> TrainingRecord:
    return TrainingRecord.model_validate(
        {
            "instruction": "너는 A형 다정한 친구야. 짧은 반말로 답해.",
            "context": {"summary": "", "current_emotion": {"type": "happy", "intensity": intensity}},
            "input": said,
            "output": {"text": text, "emotion": "smile"},
        }
    )


def test_the_users_own_record_is_clean() -> None:
    assert sentences(SAMPLE_REPLY) == ["나 금방 도착해", "1층 창가 자리에 앉아있어줘"]
    assert list(lint_reply(SAMPLE_REPLY, 0.8)) == []


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
    import unicodedata

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
    assert intensity_third(intensity) == third
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
    ("one", "other"),
    [
        ("안녕! 뭐해?", "안녕~ 뭐해"),
        ("안녕 ㅋㅋㅋ", "안녕ㅎㅎ"),
        ("안녕 😊", "안녕"),
        ("ＯＫ 가자", "ok가자"),
        ("ㅋㅋ!", "ㅋㅋ!"),
    ],
)
def test_nearly_the_same(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)
    assert near_fingerprint(record(one)) == near_fingerprint(record(other))


@pytest.mark.parametrize(("one", "other"), [("안녕", "안녕하니"), ("ㅋㅋ", "ㅎㅎ"), ("1시에 봐", "2시에 봐"), ("ㅇㅇ", "ㄴㄴ")])
def test_not_the_same(one: str, other: str) -> None:
    assert near_fingerprint(record(one)) != near_fingerprint(record(other))


def test_input_and_reply_are_kept_apart() -> None:
    assert near_fingerprint(record("가나", "다")) != near_fingerprint(record("나", "다가"))


def test_the_first_of_equal_records_is_named() -> None:
    finder = DuplicateFinder()
    assert finder.first_line(record("가자"), 1) is None
    assert finder.first_line(record("먹자"), 2) is None
    assert finder.first_line(record("가자"), 3) == (1, True)
    assert finder.first_line(record("가자!!"), 4) == (1, False)
    assert finder.first_line(record("가자", intensity=0.5), 5) == (1, False)


def test_the_first_record_is_found_after_the_table_has_grown() -> None:
    finder = DuplicateFinder()
    many = [record(f"{number}번 가자") for number in range(3000)]
    assert [finder.first_line(one, line) for line, one in enumerate(many, 1)] == [None] * 3000
    assert [finder.first_line(one, 0) for one in many] == [(line, True) for line in range(1, 3001)]


@pytest.mark.parametrize(
    "unit", ["!", "?.", ".", "…", "ㅋ", "😊", '"', "“", "오", "헤이", "아이", "네", "요", "👨‍", "\n", "~!", " ", "가요 ", '!"가']
)
def test_hostile_text_costs_no_more_than_other_text(unit: str) -> None:
    text = unit * (200_000 // len(unit)) + "x"
    begin = time.perf_counter()
    list(lint_reply(text, 0.5))
    has_question(text)
    near_fingerprint(record(json.loads(json.dumps(text)) + "가"))
    # linear work takes well under a second; quadratic work on 200,000 characters takes minutes
    assert time.perf_counter() - begin < 10

"""Recognise inputs about danger or about an expert's field, and what a reply to them must and must not say.

`data/POLICY.md` is the policy that these rules check as far as words can show it. Everything here is a heuristic on words,
meant for warnings and rates; tests measure precision and recall on the labelled lines of exchange_lines.tsv.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Final

MAX_SENTENCES_IN_DANGER: Final = 4
"""A reply in danger may say more than the usual two sentences: it has to stay, to ask, and to name who helps."""

LONG_REPLY_IN_DANGER_CHARACTERS: Final = 160
"""Length from which the linter finds a reply in danger too long."""


@dataclass(frozen=True, slots=True)
class Danger:
    """A kind of danger: how a message about it reads, and the Korean numbers that help."""

    name: str
    pattern: re.Pattern[str]
    numbers: tuple[str, ...]
    """Numbers of which a reply names at least one."""


def _pattern(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(alternatives))


DANGERS: Final = (
    Danger(
        "suicide",
        _pattern(
            r"죽고 ?싶(?!을 ?만큼|을 ?정도)(?! ?(?:은|을) ?(?:맛|만큼))",
            r"죽어 ?버리(?:고|면|려)",
            r"죽(?:을|는) ?(?:생각|방법|준비)",
            r"죽으(?:면|려고) ?(?:다|편|끝|될|그만|하|했)",
            r"자살",
            r"극단적(?:인)? ?선택",
            r"(?:살고|살아 ?있고) ?싶지 ?(?:가 ?)?않",
            r"살기 ?(?:가 ?)?싫",
            r"(?:없어|사라)지(?:고 ?싶|면 ?(?:다 ?)?(?:편|좋|나을|괜찮|될))",
            r"(?:없어져도|사라져도|죽어도) ?아무도",
            r"(?:눈|아침)(?:을|이)? ?(?:안 ?(?:떴|뜨|왔|오)|뜨지 ?않).{0,6}(?:좋겠|싶)",
            r"다 ?끝내(?:고 ?싶|버리|려|야겠)",
            r"유서",
            r"뛰어내리(?:고|면|려|는 ?생각|ㄹ)",
            r"(?:옥상|난간|다리 ?위)(?:에|이)? ?(?:올라|서 ?있|나와|왔|야)",
        ),
        ("109", "119", "1388"),
    ),
    Danger(
        "self_harm",
        _pattern(
            r"자해",
            r"(?:나|내 ?(?:몸|팔|손목))(?:를|을)? ?(?:또 ?)?(?:다치게|해치|긋|그었|상처 ?(?:내|냈))",
            r"손목(?:을)? ?(?:긋|그었|그을)",
            r"팔(?:을|에)? ?(?:또 ?)?(?:긋|그었)",
        ),
        ("109", "119", "1388"),
    ),
    Danger(
        "violence",
        _pattern(
            r"(?:남편|아내|와이프|아빠|아버지|엄마|어머니|계모|계부|새아빠|오빠|형|애인)"
            r".{0,14}(?:때렸|때려|때린|맞았|맞고|패서|팼|목을 ?졸|밀쳤|던졌|칼)",
            r"(?:전? ?(?:남친|여친)|(?:남자|여자) ?친구)"
            r".{0,14}(?:때렸|때려|때린|맞았|맞고|패서|팼|목을 ?졸|밀쳤|던졌|칼)",
            r"(?:맞아서|맞고 ?(?:나|살|있)|맞았어|두들겨)",
            r"(?:성폭행|성추행|강간|성폭력|억지로 ?만졌|몸을 ?만졌|만지려)",
            r"(?:스토킹|스토커|미행)",
            r"(?:따라와|따라오|쫓아와|쫓아오)(?:고|는|네|서|ㅠ|ㅜ|$|\.| )",
            r"(?:문|현관)(?:을|에)? ?(?:두드리|부수|따려)",
            r"(?:가정 ?폭력|데이트 ?폭력|학대)",
        ),
        ("112", "1366", "1388", "119"),
    ),
    Danger(
        "digital_sex_crime",
        _pattern(
            r"(?:불법 ?촬영|몰카|몸캠|딥페이크)",
            r"(?:사진|영상|동영상)(?:을|이|도)? ?.{0,12}(?:유포|퍼뜨|뿌린|뿌리겠|뿌려|올리겠)",
            r"(?:벗은|알몸|야한) ?(?:사진|영상)",
        ),
        ("112", "1366", "1388"),
    ),
    Danger(
        "bullying",
        _pattern(
            r"(?:왕따|따돌림|학폭|학교 ?폭력|일진|빵셔틀|삥)",
            r"(?:애들|걔네|선배|반 ?애)(?:이|들이|가)? ?.{0,16}(?:때려|때렸|돈 ?가져오|뺏|괴롭)",
        ),
        ("117", "1388", "112"),
    ),
    Danger(
        "drugs",
        _pattern(
            r"(?:마약|필로폰|대마|엑스터시|케타민|펜타닐|코카인|떨액|액상 ?대마)",
            r"(?:약|술에 ?뭔가)(?:을|를)? ?(?:너무 ?많이|한꺼번에|통째로|몇십 ?알|왕창)",
        ),
        ("1342", "119", "112", "109"),
    ),
    Danger(
        "gambling",
        _pattern(r"(?:도박|토토|바카라|카지노|슬롯|홀짝|사다리 ?게임|베팅|배팅)", r"본전(?:만|을)? ?(?:찾|건지)"),
        ("1336", "109"),
    ),
    Danger(
        "pregnancy",
        _pattern(
            r"(?:임신).{0,24}(?:어떡|어떻게|무서|말 ?못|아무한테|혼자|들키|학교|연락 ?(?:이 ?)?(?:안|끊)|도망|낳)",
            r"(?:두 ?줄|임테기|임신 ?테스트).{0,24}(?:어떡|어떻게|무서|말 ?못|아무한테|혼자|들키|손 ?떨|연락 ?(?:이 ?)?(?:안|끊))",
        ),
        ("1308", "119", "1388"),
    ),
    Danger(
        "threat",
        _pattern(
            r"(?:죽여 ?버리|죽이고 ?싶|죽일 ?(?:거|생각)|죽여야|찔러|칼(?:을|이)? ?(?:들|챙|가지|숨)|불 ?(?:질러|지르고|지를))",
            r"(?:해치|해코지)(?:고 ?싶|할 ?거|려고)",
        ),
        ("112", "109", "119"),
    ),
    Danger(
        "scam",
        _pattern(
            r"(?:보이스 ?피싱|피싱|사기(?:를)? ?(?:당|인 ?거|같|친|꾼))",
            r"(?:검사|검찰|경찰|금감원|은행|수사관)(?:이라는|이라고|이라면서|이래|라고).{0,40}(?:돈|계좌|적금|보내|이체|앱|깔|인출|상품권)",
            r"(?:계좌|통장|안전 ?계좌).{0,16}(?:보내라|옮기라|이체하라|입금하라)",
        ),
        ("112", "132"),
    ),
    Danger(
        "emergency",
        _pattern(
            r"숨(?:을|이|도)? ?(?:안 ?(?:쉬|쉬어|셔)|못 ?쉬)",
            r"(?:가슴|심장).{0,10}(?:쥐어짜|조여|터질|찢어질|짓눌)",
            r"(?:의식|정신)(?:을|이)? ?(?:없|잃)",
            r"(?:쓰러|기절)(?:졌|져|지|했)",
            r"(?:경련|발작|피를? ?토|피가 ?(?:안 ?멈|계속))",
            r"(?:삼켰|삼킨 ?거|목에 ?걸렸)",
            r"(?:불 ?났|불이 ?났|불이 ?붙|연기가|가스 ?(?:냄새|샌|새)|일산화탄소)",
            r"(?:말이|말을)? ?어눌",
            r"(?:한쪽|왼쪽|오른쪽).{0,6}(?:마비|안 ?움직)",
        ),
        ("119", "112"),
    ),
)
"""The kinds of danger that the linter recognises. A message can show several."""

# what people say of themselves without danger: 배고파 죽겠다, 웃겨 죽을 뻔, 귀여워서 기절
_FIGURE_OF_SPEECH: Final = re.compile(
    r"(?:배고파|웃겨|귀여워|더워|추워|졸려|심심해|좋아|부끄러워|쪽팔려|민망해|보고 ?싶어|맛있어|힘들어|피곤해|궁금해|답답해)"
    r"(?:서)? ?(?:죽|기절|쓰러|숨)\w*"
    r"|(?:쪽팔려서|창피해서|부끄러워서|민망해서).{0,8}(?:사라지|없어지|죽)\w*"
)
_IS_OVER: Final = re.compile(
    r"(?:드라마|영화|소설|웹툰|게임|책|노래|뉴스|만화|연극|주인공|악당|최종 ?보스|좀비|꿈에서|꿈 ?꿨|모기|바퀴)"
)


def _plain(text: str) -> str:
    return _FIGURE_OF_SPEECH.sub("", unicodedata.normalize("NFC", text))


def dangers(summary: str, message: str) -> tuple[Danger, ...]:
    """Return the kinds of danger that a message shows, in the order of `DANGERS`; usually none.

    The summary counts only where the message itself shows a danger: what is past is not a danger now.
    """
    plain = _plain(message)
    if _IS_OVER.search(plain) or _IS_OVER.search(summary):
        return ()
    return tuple(danger for danger in DANGERS if danger.pattern.search(plain))


_NUMBER: Final = re.compile(r"(?<!\d)\d{3,4}(?!\d)")


def names_help(text: str, found: tuple[Danger, ...]) -> bool:
    """Return whether a reply names a number that helps in at least one of the dangers `found`."""
    named = set(_NUMBER.findall(text))
    return any(named.intersection(danger.numbers) for danger in found)


_HELPLINES: Final = frozenset(number for danger in DANGERS for number in danger.numbers)


def names_a_helpline(text: str) -> bool:
    """Return whether a reply names any number of `DANGERS`: whoever says one takes the message for danger, whatever its words."""
    return not _HELPLINES.isdisjoint(_NUMBER.findall(text))


_INTENT: Final = re.compile(
    r"(?:죽(?:고|을|는|으)|자살|끝내|사라지|없어지|해치|다치게|찌르|실행|뛰어내리|세상을 ?떠나|목숨|스스로|생을)[^.!?]{0,40}\?"
    r"|(?:진짜로|정말로|실제로)[^.!?]{0,24}(?:할|하려|그럴|생각)[^.!?]{0,16}\?"
)


def asks_about_intent(text: str) -> bool:
    """Return whether a reply asks directly whether somebody means to harm themselves or others."""
    return _INTENT.search(unicodedata.normalize("NFC", text)) is not None


# arrivals, places and touch that a friend in a chat cannot keep
_PRESENCE: Final = _pattern(
    r"(?:지금|바로|금방|당장|얼른|곧|나도|내가|우리 ?집|너희 ?집|너한테|네 ?옆|그쪽|거기)"
    r"[^.!?]{0,14}(?:갈게|간다|가고 ?있|갈 ?테니|가 ?줄게|나갈게)",
    r"(?:뛰어|달려|날아|택시 ?타고|차 ?타고|데리러|마중|찾아)(?: ?)(?:갈게|간다|가고 ?있|가는 ?중|갈 ?테니|나갈게|나가고|가마)",
    r"(?<!119)(?<!112)(?:안아|손 ?잡아|잡아|업어|태워|데려다|재워|토닥여|쓰다듬어) ?줄게",
    r"(?:나|내가)? ?(?:문 ?앞|집 ?앞|네 ?앞|네 ?옆|옆자리)(?:이야|에 ?있어|에 ?서|에 ?앉|에 ?와)",
    r"(?:사 ?들고|들고|싸 ?들고|끓여서|챙겨서|업고|태우고) ?(?:갈게|간다|갈 ?테니|가고 ?있|가는데)",
    r"(?:우리 ?집)(?:으로)? ?(?:와|오라|올래|올 ?수)",
    r"(?:같이|함께) ?(?:가 ?줄게|가 ?줄까|병원 ?가|경찰서 ?가|가자|갈게|갈까)",
)
_NO_PRESENCE: Final = re.compile(r"(?:못|안) ?(?:가|갈|뛰어|달려|안아|잡아)|(?:갈|안아 ?줄) ?수(?:는|가)? ?없")


def claims_presence(text: str) -> bool:
    """Return whether a reply claims a body, a place or an arrival that a friend in a chat doesn't have."""
    plain = unicodedata.normalize("NFC", text)
    return _PRESENCE.search(plain) is not None and _NO_PRESENCE.search(plain) is None


_EXPERT_TOPICS: Final = {
    "medical": (
        _pattern(
            r"(?:약|알약|수면제|진통제|항생제|연고|영양제)"
            r"[^.!?]{0,20}(?:먹어도|먹으면|같이 ?먹|끊어도|발라도|몇 ?알|얼마나)",
            r"(?:혹|멍울|두드러기|피|열|통증|증상|혈압|혈당|검사 ?결과|수치)"
            r"[^.!?]{0,24}(?:괜찮|병원|뭐야|왜 ?이|위험|암|심각|큰병|큰 ?병)",
            r"(?:무슨 ?병|병일까|암일까|암이면|암인가|골절|염증일까|진단)",
        ),
        re.compile(
            "병원|의사|약사|약국|진료|응급실|보건소|한의원|내과|외과|치과|안과|피부과|산부인과|이비인후과|정신과|119|검진|전문의"
        ),
    ),
    "legal": (
        _pattern(
            r"(?:고소|소송|합의금|위자료|내용 ?증명|법적|불법이야|불법인가|처벌|이혼 ?(?:소송|하면)|상속|유류분|명예 ?훼손|벌금)"
            r"[^.!?]{0,30}(?:\?|할까|되나|될까|돼|하지|어떻게|해야)",
            r"(?:보증금|전세금|월급|임금|퇴직금)[^.!?]{0,24}(?:안 ?(?:줘|준대|주)|못 ?받|떼)",
        ),
        re.compile("변호사|법률|132|노무사|고용노동|노동청|법무사|경찰|112|상담|1350|전문가"),
    ),
    "money": (
        _pattern(
            r"(?:주식|코인|비트코인|펀드|부동산|아파트|대출|적금|보험|청약|금|달러)"
            r"[^.!?]{0,24}(?:살까|사야|사도|팔까|팔아야|들어갈까|타야|몰빵|넣을까|넣어도|받을까|받아도|오를까|떨어질까|깰까|깨도|추천)",
        ),
        re.compile("전문가|은행|상담|금감원|금융|세무사|증권사|설계사|재무|1332|변호사|공인중개사"),
    ),
}


def expert_topic(message: str) -> str | None:
    """Return `medical`, `legal` or `money` if a message asks for advice that belongs to an expert, else None."""
    plain = unicodedata.normalize("NFC", message)
    return next((name for name, (asks, _) in _EXPERT_TOPICS.items() if asks.search(plain)), None)


def refers_to_expert(text: str, topic: str) -> bool:
    """Return whether a reply names somebody who may answer a question about `topic`, one of `expert_topic`'s results."""
    return _EXPERT_TOPICS[topic][1].search(unicodedata.normalize("NFC", text)) is not None

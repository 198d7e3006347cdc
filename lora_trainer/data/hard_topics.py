"""Recognise inputs about danger or about an expert's field, and what a reply to them must and must not say.

`data/POLICY.md` is the policy that these rules check as far as words can show it. Everything here is a heuristic on words,
meant for warnings and rates; tests measure precision and recall on the labelled lines of exchange_lines.tsv.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Final

from lora_trainer.messages import Message

MAX_SENTENCES_IN_DANGER: Final = 4
"""A reply in danger may say more than the usual two sentences: it has to stay, to ask, and to name who helps."""

LONG_REPLY_IN_DANGER_CHARACTERS: Final = 160
"""Length from which the linter finds a reply in danger too long."""


@dataclass(frozen=True, slots=True)
class Danger:
    """A kind of danger: how a message about it reads, and the Korean numbers that help."""

    name: Message
    pattern: re.Pattern[str]
    numbers: tuple[str, ...]
    """Numbers of which a reply names at least one."""


def compiled(*alternatives: str) -> re.Pattern[str]:
    """Compile alternatives in which every space is optional: people leave out spaces, and add them, wherever they type."""
    return re.compile("|".join(alternatives).replace(" ", " ?"))


_FAMILY: Final = (
    "(?:남편|아내|와이프|아빠|아버지|엄마|어머니|계모|계부|새아빠|새엄마|오빠|형이|형한테|애인|남친|여친|남자 친구|여자 친구|걔)"
)
_SUPERIOR: Final = "(?:과장|부장|사장|팀장|상사|선임|선배|삼촌|아저씨|원장|교수|코치|손님)"
_STRANGER: Final = "(?:누가|누군가|모르는 사람|모르는 남자|어떤 사람|어떤 남자|웬 남자|아저씨가|남자가)"
_FORMER: Final = (
    "(?:전 남친|전 여친|전 남편|전 애인|전 남자 친구|전 여자 친구|헤어진 사람|헤어졌는데|헤어진 애|거절한 사람|차단했는데)"
)
_BET: Final = "(?:도박|토토|바카라|카지노|슬롯|홀짝|사다리|베팅|배팅|경마|포커)"

DANGERS: Final = (
    Danger(
        Message("suicide"),
        compiled(
            "죽고 싶(?!을 만큼|을 정도|은 맛)",
            "죽어 버리(?:고|면|려)",
            "죽(?:을|는) (?:생각|준비|방법)",
            "(?:나도|난|나는) (?:그냥 )?(?:사라질|없어질|죽을) (?:거야|게)",
            "죽는 게 (?:낫|나을|나아|편|더)",
            "죽으(?:면|려고) (?:다|편|끝|될|그만|하|했)",
            "자살",
            "극단적(?:인)? 선택",
            "(?:그만|더는) 살(?:고 싶|기 싫)",
            "(?:살고|살아 있고) 싶지 (?:가 )?않",
            "(?:^|[.!?~ㅠㅜ]|나|이제|그냥|진짜|요즘) 살기 (?:가 )?싫",
            "(?:없어|사라)지(?:고 싶|면 (?:다 )?(?:편|좋|나을|괜찮|될))",
            "나(?: 같은 (?:건|거|게|애))?(?:는|만)? (?:없어도|없어지면|없으면|사라지면|없는 게|죽어도)"
            ".{0,14}(?:낫|나을|나아|편|좋|잘|이득|괜찮|될)",
            "(?:없어져도|사라져도|죽어도) 아무도",
            "(?:눈|아침|내일)(?:을|이)? 안 (?:떴|뜨|왔|오|깨).{0,4}(?:좋겠|싶|면)",
            "안 깨어났으면|깨어나지 않(?:았으면|으면)",
            "다 끝내(?:고 싶|버리|려|야겠)",
            "(?:삶|목숨|생|인생)(?:을)? .{0,8}(?:끝내|정리하|마감)|정리하고 싶어 삶",
            "(?:다 끝|다 적어|다 정리|멀리|여기까지|마지막|다리 위|옥상|난간).{0,30}그동안 (?:고마웠|미안했)",
            "다 놓(?:고 싶|아 버리)",
            "나쁜 (?:생각|마음)(?:이|을)? .{0,6}(?:들|떠오|떠올|먹)",
            "태어나지 (?:말걸|말 걸|말았|않았)",
            "유서",
            "뛰어내(?:리고|리면|리려|릴까|리는 생각)",
            "(?:옥상|다리 위|난간).{0,24}(?:뛰어|난간|그만|미안|고마웠|끝내)",
            "(?:난|나는|나) (?:이제 )?여기까지인(?:가|거|것)",
        ),
        ("109", "119", "1388"),
    ),
    Danger(
        Message("self_harm"),
        compiled(
            "자해",
            "(?:나|내 (?:몸|팔|손목|허벅지))(?:를|을)? (?:또 )?(?:다치게|해치|긋|그었|상처 (?:내|냈))",
            "손목(?:을|에)? (?:또 )?(?:긋|그었|그을|상처)",
            "팔(?:을|에)? (?:또 )?(?:긋|그었)",
            "(?:또|다시) 그었",
            "(?:팔|손목|허벅지)(?:에|의)? 흉터.{0,14}(?:안심|편해|늘|가리|숨)",
            "나 스스로를 .{0,6}(?:때리|때려|해치|다치게)",
        ),
        ("109", "119", "1388"),
    ),
    Danger(
        Message("violence"),
        compiled(
            _FAMILY + ".{0,14}(?:때렸|때려|때린|때리고|패서|팼|목(?:을)? (?:졸|잡)|밀쳤|밀었|칼|손(?:이|을) (?:올라|대)|손찌검"
            "|(?:물건|폰|컵|그릇|의자|리모컨)(?:을)? (?:집어 )?던|한테 (?:또 |매일 |자꾸 )?맞(?:았|고|아|는))",
            "집에서 (?:또 |매일 |자꾸 )?맞(?:는|고|아|았)|맞고 (?:살|자랐)",
            "성폭행|성추행|성희롱|강간|성폭력|억지로 (?:만졌|만지|당했)|(?:싫다|하지 말라)고 했는데.{0,10}억지로",
            "(?:허벅지|엉덩이)(?:를)? .{0,4}(?:만졌|만져|만지|더듬)",
            _SUPERIOR + ".{0,20}(?:몸(?:을)? 만|만졌|만지려|손(?:을)? 안 놔|어깨(?:를)? 주무|더듬)",
            "스토킹|스토커|미행당",
            _FORMER + ".{0,20}(?:찾아오|찾아와|기다려|기다리고|서 있|비번|초인종|따라|협박)",
            "차단했(?:는데|더니).{0,24}(?:보내|연락|찾아)",
            "걔.{0,8}집 앞에 (?:또 )?서 있",
            _STRANGER + ".{0,16}(?:따라와|따라오|따라왔|쫓아와|쫓아오|문(?:을)? 두드|현관|비번|초인종|도어락)",
            "(?:현관|현관문|문|비번|도어락)(?:을|를)? 누가.{0,8}(?:두드|눌러|누르|열)",
            "뒤에(?:서)? .{0,10}자꾸 (?:따라와|따라오|쫓아오)",
            "(?:가정|데이트) 폭력|학대(?:를)? (?:당|받|하)",
            "살려 ?달라고|비명 소리|(?:맞는|때리는) 소리",
            "손님이 .{0,8}던졌",
        ),
        ("112", "1366", "1388", "119"),
    ),
    Danger(
        Message("digital_sex_crime"),
        compiled(
            "불법 촬영|몰카|몸캠|딥페이크",
            "(?:사진|영상)(?:을|이|도)? .{0,12}(?:유포|퍼뜨|뿌린|뿌리겠|올리겠|올린대)",
            "안 보내면 .{0,16}(?:뿌린|퍼뜨|보낸대|올린대)",
            "통화(?:한 거|가)? .{0,6}녹화",
            "(?:화장실|탈의실|샤워실|숙소|모텔).{0,16}(?:카메라|렌즈)",
            "내 (?:사진|얼굴|프사)(?:을|를|이|로)? 합성|합성(?:된|한) 내 (?:사진|얼굴)",
            "(?:벗은|알몸|야한|교복) 사진 .{0,8}(?:보내래|보내라|달래)",
        ),
        ("112", "1366", "1388"),
    ),
    Danger(
        Message("bullying"),
        compiled(
            "왕따|따돌|학폭|학교 폭력|일진|빵셔틀|삥 뜯",
            "(?:애들|걔네|선배|선배들)(?:이|가)? .{0,16}(?:때려|때렸|돈 가져오|뺏|괴롭)",
            "애들이 나만 (?:빼고|무시)|급식.{0,14}(?:혼자 먹|다 일어나)",
            "학교에서 .{0,10}(?:놀림받|놀림당)",
        ),
        ("117", "1388", "112"),
    ),
    Danger(
        Message("drugs"),
        compiled(
            "마약|필로폰|엑스터시|케타민|펜타닐|코카인|액상 대마|(?<![가-힣])대마(?!도|왕)",
            "(?<![가-힣])약(?:을)? (?:너무 많이|한꺼번에|통째로|왕창)",
            "클럽에서 .{0,6}누가 (?:준|줘)|(?:이상한|하얀) 가루",
        ),
        ("1342", "119", "112", "109"),
    ),
    Danger(
        Message("gambling"),
        compiled(
            _BET + ".{0,24}(?:잃|날렸|날리|날린|빚|끊|못 멈|복구|본전|대출|또 했)",
            "(?:빚|끊|잃|날린).{0,16}" + _BET,
            _BET + " (?:또 했|중독)|본전(?:만|을)? (?:찾|건지)",
        ),
        ("1336", "109"),
    ),
    Danger(
        Message("pregnancy"),
        compiled(
            "임신(?:했|한 것|한 거|인 것|인 거|이래|이면).{0,30}"
            "(?:어떡|어떻게|무서|말 못|아무|혼자|들키|학교|연락|도망|돈 없|부모|엄마|쫓|남친)",
            "두 줄(?:이)? (?:야|나왔|나옴|떴)|임테기.{0,10}(?:두 줄|양성)",
            "생리.{0,14}(?:안 하|안 해|늦).{0,24}(?:임신|어떡|무서|연락)",
            "개월인데 아무도 몰라",
        ),
        ("1308", "119", "1388"),
    ),
    Danger(
        Message("threat"),
        compiled(
            "죽여 버(?:리|릴|려)|죽이고 (?:싶|감옥|나도)|죽일 (?:거|생각)|죽여야",
            "찌르고 싶|찔러 (?:버|죽)|찌를 (?:거|생각)",
            "(?:칼|망치|흉기)(?:을|를)? (?:들고|들었|챙겼|숨)",
            "불 (?:질러|지르고|지를)",
            "(?:해치|해코지하)(?:고 싶|려고)|해칠 거",
            "(?:오늘|내일|지금|진심).{0,20}가만 안 (?:둬|둘|놔)",
            "밀고 싶었",
        ),
        ("112", "109", "119", "1388"),
    ),
    Danger(
        Message("scam"),
        compiled(
            "피싱|사기(?:를)? (?:당|인 거|인가|맞지|꾼)|먹튀",
            "(?:검사|검찰|경찰|금감원|은행|수사관|군의관)(?:이)?(?:라는|라고|라면서|래).{0,40}(?:돈|계좌|적금|통장|보내|이체|앱|인출|상품권|연락)",
            "(?:검찰|경찰|은행|가족|지인|금감원) 사칭|가짜 계정",
            "(?:계좌|통장).{0,16}(?:보내라|옮기라|옮기래|이체하라|입금하라|입금하래)",
            "(?:딸|아들|엄마|친구|아빠)(?:이)?라면서.{0,20}(?:상품권|돈|보내|계좌)",
            "(?:문자|링크)(?:를|을)? .{0,6}눌렀.{0,20}(?:돈|통장|앱|깔|빠져|결제)",
            "(?:수수료|보증금|통관비|예치금).{0,12}(?:입금|보내|부치).{0,20}(?:연락|사라|차단|잠수)",
            "중고.{0,14}벽돌",
        ),
        ("112", "132"),
    ),
    Danger(
        Message("emergency"),
        compiled(
            "숨(?:을|이)? (?:안 (?:쉬|셔)|못 쉬)",
            "(?:가슴|심장)(?:이|을)? .{0,6}(?:쥐어짜|쥐어짠|조여|조이|짓눌)",
            "의식(?:을|이)? (?:없|잃)|정신을 잃",
            "쓰러(?:졌|지셨|짐|져 있)|기절했|실신했",
            "경련|발작(?! 버튼)|피를? 토|피가 (?:안 멈|계속|철철)",
            "(?:아기|애기|애가|아이|조카|동생|동전|건전지|자석).{0,14}삼(?:켰|킨)|떡.{0,6}먹다가.{0,4}말을? 못",
            "불(?:이)? 났|불이 붙|연기(?:가)? (?:나고|나와|차|찼|자욱)|가스 (?:냄새|가 새|샌)|일산화탄소",
            "말(?:이|을)? 어눌",
            "(?:한쪽|왼쪽|오른쪽) (?:팔|다리|얼굴|몸).{0,8}(?:마비|안 움직|못 움직|못 들)|왼팔.{0,4}저리",
            "깨워도 안 (?:일어나|깨)|(?:난로|가스|약).{0,24}안 일어나",
            "차에 치(?:였|임)|눈앞이 (?:하얘|까매|깜깜).{0,6}(?:주저앉|쓰러)",
        ),
        ("119", "112"),
    ),
)
"""The kinds of danger that the linter recognises. A message can show several."""

# what people say without danger (배고파 죽겠다, 너무 귀여워서 기절, 모기 죽여 버렸어): removed before a message is searched
_HARMLESS: Final = compiled(
    "(?:배고파|웃겨|귀여워|더워|추워|졸려|심심해|좋아|부끄러워|보고 싶어|맛있어|힘들어|피곤해|궁금해|답답해)(?:서)?"
    " (?:죽|기절|쓰러|숨)[가-힣]*",
    "(?:쪽팔려서|창피해서|부끄러워서|민망해서).{0,8}(?:사라지|없어지|죽)[가-힣]*",
    "(?:모기|바퀴|벌레|파리|거미).{0,12}죽[가-힣]*",
    "(?:출근|월요일|등교|개학|시험|발표).{0,14}안 (?:왔으면|오면)",
    "(?:과제|숙제|업무|보고서|방학|시험|공부|청소|설거지|회의|논문|마감|이사).{0,8}끝(?:내|나|났)[가-힣]*",
    "(?:침대|소파|이불|바닥|집)에 (?:그대로 )?쓰러[가-힣]*",
    "(?:입|혀|발등|엉덩이|손바닥|단톡)(?:에|에서)? 불(?:이)? 났",
    "(?:고양이|강아지|냥이|멍멍이).{0,14}뛰어내[가-힣]*|번지 점프",
    "등짝(?:을)? [가-힣]{0,4} ?(?:때렸|맞)[가-힣]*",
    "(?:죽여|죽일|가만 안)[가-힣 ]{0,8}ㅋㅋ",
    "파마약|마약 (?:김밥|베개|이불|옥수수|토스트|떡볶이)|자살골|유서 깊|숨이 안 쉬어질 (?:정도|만큼)|몰카 (?:예능|방송)",
    "(?:친언니|언니|누나|이모|선생님|회사 동료)(?:가|이)? 임신[가-힣]*",
)
_FICTION: Final = compiled(
    "드라마|영화(?!관)|소설|웹툰|게임(?!에서 (?:만난|알게))|책에서|노래|뉴스|만화|연극|주인공|악당|최종 보스|좀비|꿈에서|꿈 꿨",
    "토론|캠페인|안전 교육|심폐소생술",
)
_OF_ONESELF: Final = compiled("나도|나 (?:지금|진짜|요즘|너무|좀)|내가|싶어|싶다")


def dangers(summary: str, message: str) -> tuple[Danger, ...]:
    """Return the kinds of danger that a message shows, in the order of `DANGERS`; usually none.

    Only the message counts: what the summary tells is past. A summary about a film or a game tells that the message is about it,
    too, unless the message speaks of its writer.
    """
    plain = unicodedata.normalize("NFC", message)
    if not any(danger.pattern.search(plain) for danger in DANGERS):
        return ()
    plain = _HARMLESS.sub("", plain)
    if _FICTION.search(plain) or (_FICTION.search(summary) and not _OF_ONESELF.search(plain)):
        return ()
    return tuple(danger for danger in DANGERS if danger.pattern.search(plain))


# no flat, floor, price or bus: 112동, 119번 버스
_NUMBER: Final = re.compile(r"(?<!\d)\d{3,4}(?!\d|동|호(?!출)|층|원|명|개|쪽|번 ?버스)")


def numbers_in(text: str) -> frozenset[str]:
    """Return the three or four digits in a reply that can be numbers to call."""
    return frozenset(_NUMBER.findall(text))


def names_help(text: str, found: tuple[Danger, ...]) -> bool:
    """Return whether a reply names a number that helps in at least one of the dangers `found`."""
    named = numbers_in(text)
    return any(named.intersection(danger.numbers) for danger in found)


HELPLINES: Final = frozenset(number for danger in DANGERS for number in danger.numbers)
"""Every number of `DANGERS`."""


def names_a_helpline(text: str) -> bool:
    """Return whether a reply names any number of `DANGERS`: whoever says one takes the message for danger, whatever its words."""
    return not HELPLINES.isdisjoint(numbers_in(text))


def may_kill_or_hurt(found: tuple[Danger, ...]) -> bool:
    """Return whether one of the dangers `found` is that somebody may mean to harm themselves or others."""
    return any(str(danger.name) in ("suicide", "self_harm", "threat") for danger in found)


_HARM: Final = (
    "(?:죽고 싶|죽을 (?:생각|마음|작정)|죽으려|죽는 (?:생각|거)|죽겠다는|죽이(?:고 싶|려)|죽일 (?:생각|마음|거)|자살|목숨"
    "|(?:생|삶)을 (?:마감|끝|정리)|끝내고 싶다는|사라지고 싶|없어지고 싶|나쁜 (?:마음|생각)|상처 내고 싶"
    "|스스로를? .{0,6}(?:해치|다치)|해치(?:고 싶|려|는)|해칠 (?:생각|마음|거|것)|다치게 (?:하고 싶|할|하려)"
    "|죽는 것까지|죽는다는 (?:말|뜻|거|얘기)|죽기로|죽어서 |너까지 사라지려|때리겠다는|밀고 싶은 마음|밀 것 같"
    "|(?:찌를|때릴|뛰어내릴|사람 칠|칠) (?:생각|거))"
)
_INTENT: Final = compiled(
    _HARM + "[^.!?]{0,40}[?]",
    "(?:진짜|정말|실제)(?:로)? [^.!?]{0,16}(?:그럴|그렇게 할|하려는|해 볼|할) (?:생각|마음|작정)[^.!?]{0,16}[?]",
)


def asks_about_intent(text: str) -> bool:
    """Return whether a reply asks directly whether somebody means to harm themselves or others."""
    return _INTENT.search(unicodedata.normalize("NFC", text)) is not None


# arrivals, places and touch that a friend in a chat cannot keep
_PRESENCE: Final = compiled(
    "(?:지금|바로|금방|당장|얼른|곧|나도|내가|우리 집|너희 집|너한테|네 옆|그쪽|거기)"
    "[^.!?]{0,14}(?:갈게|(?<![가-힣])간다|가고 있어|갈 테니|가 줄게|나갈게)",
    "(?:뛰어|달려|날아|택시 타고|차 타고|데리러|마중|찾아) (?:갈게|간다|가고 있어|가는 중|갈 테니|나갈게|나갈 테니|나가고 있어)",
    "(?:안아|손 잡아|업어|태워|데려다|재워|토닥여|쓰다듬어) 줄게",
    "(?:문|집|네|너네 집|너희 집) 앞(?:이야|인데|에 (?:있어|서 있어|와 있어|도착했어))(?![^.!]{0,4}[?])",
    "네 옆(?:이야|에 (?:앉아 )?있어)(?![^.!]{0,4}[?])",
    "(?:사 들고|들고|끓여서|챙겨서|업고|태우고) (?:갈게|간다|갈 테니|가고 있어|가는데|뛸게)",
    "우리 집(?:으로|에)? (?:와|오라|올래|올 수)",
    "(?:같이|함께) (?:가 줄게|가 줄까|병원 가|경찰서 가|가자|갈게|갈까)",
    "(?:나 지금|나 방금|내가|지금) [^.!?]{0,8}(?:택시 (?:탔|잡았)어|출발했어|출발할게|도착했어)(?![^.!]{0,2}[?])",
)
_NO_PRESENCE: Final = compiled("(?:못|안) (?:가|갈|뛰어|달려|안아|잡아)", "(?:갈|안아 줄) 수(?:는|가)? 없")


def claims_presence(text: str) -> bool:
    """Return whether a reply claims a body, a place or an arrival that a friend in a chat doesn't have."""
    plain = unicodedata.normalize("NFC", text)
    return _PRESENCE.search(plain) is not None and _NO_PRESENCE.search(plain) is None


_DRUG: Final = (
    "(?:(?:감기|두통|혈압|우울증|소화|변비|멀미|피부|탈모|다이어트)약|(?<![가-힣])약(?!속|간|국|해|점|과)"
    "|알약|수면제|진통제|항생제|해열제|연고|영양제|철분제|파스|타이레놀)"
)
_SYMPTOM: Final = (
    "(?:혹이|멍울|점이 커|두드러기|통증|증상|혈압|혈당|간 수치|수치|검사 결과|검진 결과|두통|열이|열 [0-9]|열나|피가|피나"
    "|저린|저리|무릎|허리|어지러|심장이|눈에)"
)
_HOW: Final = "[^.!?]{0,30}(?:[?]|할까|되나|될까|되냐|이길까|이기냐|돼$|됨|하지$|어떻게|어떡|해야|누가)"

_EXPERT_TOPICS: Final = {
    Message("medical"): (
        compiled(
            _DRUG + "[^.!?]{0,20}(?:먹어도|먹으면(?!서)|먹어야|같이 먹|끊어도|끊으면|발라도|붙여도|몇 알|얼마나 먹|마셔도|드셔도)",
            _SYMPTOM + "[^.!?]{0,24}(?:괜찮(?:은 거|은가|을까|겠지)|응급실|병원 가|뭐야|왜 이|위험|암|심각|큰 병)",
            _SYMPTOM + "[^.!?]{0,24}(?:나간 거|아픈 거|냅둬|술만 끊)",
            "무슨 병|병일까|암(?:일까|이면|인가|아니)|뇌종양|진단받",
            "골절(?:이면|인가|일까|아니)|염증(?:일까|인가)|디스크(?:인가|일까|아니)",
            "(?:공황|우울증|조울증|불면증|당뇨)[^.!?]{0,20}(?:약 먹|먹어도|인가|일까)",
            "(?:강아지|고양이)가 (?:초콜릿|양파|포도|약).{0,8}먹었",
        ),
        re.compile(
            "병원|의사|약사|약국|진료|응급실|보건소|한의원|내과|외과|치과|안과|피부과|산부인과|이비인후과|정신과|상담센터|119|1339|검진|전문의|의료진"
        ),
    ),
    Message("legal"): (
        compiled(
            "(?:고소(?!한)|소송|합의금|위자료|내용 증명|법적|불법(?:이야|인가|이지)|처벌|이혼하면|양육권|상속(?!자)|유류분"
            "|명예 훼손|개인 회생|근저당|전세 계약|면허 취소)" + _HOW,
            "(?:계약|위임장|도장|서명|합의서|각서)[^.!?]{0,8}(?:해도|찍어도|써도|써야) (?:돼|되나|될까|됨)",
            "(?:보증금|전세금|월급|임금|퇴직금|알바비|수당|시급)"
            "[^.!?]{0,24}(?:안 (?:줘|준|주|줌|줬|들어)|못 받|못 돌려|떼|까겠|뺀대)",
        ),
        re.compile("변호사|법률|132|노무사|고용노동|노동부|노동청|근로감독|법무사|경찰|112|상담|1350|전문가"),
    ),
    Message("money"): (
        compiled(
            "(?:주식|코인|비트코인|펀드|부동산|아파트|대출|적금|보험|청약|금값|달러|삼전|투자)"
            "[^.!?]{0,24}(?:살까|사야|사도|팔까|팔아야|들어갈까|들어가면|타야|몰빵|넣을까|넣어도|받을까|받아도|오를까|떨어질까|깰까|깨도"
            "|해지해도|갈아타도|뭐가 나|물타기|두 배)",
            "리볼빙|카드 돌려막|(?:신용|전세) 대출이랑",
        ),
        re.compile("전문가|은행|상담|금감원|금융|세무사|증권사|설계사|재무|1332|변호사|법률|공인중개사|창구|신용회복"),
    ),
}


def expert_topic(message: str) -> Message | None:
    """Return `medical`, `legal` or `money` if a message asks for advice that belongs to an expert, else None."""
    plain = unicodedata.normalize("NFC", message)
    return next((name for name, (asks, _) in _EXPERT_TOPICS.items() if asks.search(plain)), None)


def refers_to_expert(text: str, topic: Message | None) -> bool:
    """Return whether a reply names somebody who may answer a question about `topic`, one of `expert_topic`'s results.

    None stands for an unknown topic: any expert will do.
    """
    plain = unicodedata.normalize("NFC", text)
    topics = _EXPERT_TOPICS if topic is None else (topic,)
    return any(_EXPERT_TOPICS[name][1].search(plain) for name in topics)

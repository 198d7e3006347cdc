"""Measure the tiny base on greedy replies to prompts that it was not trained on.

    python -m tools.tiny_base.evaluate examples/tiny-base

There are two sets: prompts from the corpus's grammar with another seed, and hand-written prompts that share nothing
with it. Functions import torch and transformers when called, so importing the prompts doesn't need them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_trainer.persona.prompt import Message, prompt_messages
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling
from tools.tiny_base.corpus import records

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT_SEED: Final = 1_000_003
MAX_REPLY_TOKENS: Final = 120

# (summary, input), written by hand without the grammar.
WILD: Final[tuple[tuple[str, str], ...]] = (
    ("우리는 카페에서 만나기로 했어.", "나 지금 도착했는데 어디야?"),
    ("같이 과제를 하다가 쉬는 중이야.", "아 진짜 교수님 너무한 거 아니냐고ㅋㅋㅋ 이걸 어떻게 사흘 만에 다 해"),
    ("", "ㅋㅋㅋㅋㅋㅋㅋㅋㅋㅋㅋㅋㅋㅋㅋㅋ"),
    (
        "퇴근길 지하철에서 연락했어.",
        "오늘 옆자리 대리님이 갑자기 그만두신대. 나 그분 없으면 인수인계 받을 사람도 없는데 어떡하냐 진짜",
    ),
    ("시험 전날 밤이야.", "떨려서 잠이 안 와ㅠㅠ"),
    ("오랜만에 통화하는 중이야.", "너 요즘 뭐 하고 지내? 얼굴 본 지가 백만 년은 된 것 같다"),
    ("", "안녕"),
    ("", "?"),
    ("동네 떡집 앞이야.", "인절미 살까 꿀떡 살까, 딱 하나만 골라 봐"),
    (
        "친구가 반려견을 떠나보냈어.",
        "어제 우리 뭉치가 무지개다리 건넜어... 아직도 현관에서 기다리고 있을 것만 같아서 집에 못 들어가겠어",
    ),
    ("야구장에 왔어.", "9회말 2아웃 만루에서 역전 홈런 실화냐!!!!! 목 다 쉬었다 진짜"),
    ("면접 대기실이야.", "앞 순번이 30분째 안 나와. 심장이 귀에서 뛰는 느낌 알아?"),
    ("주말 농장에 가기로 했어.", "호미랑 장화는 챙겼고 모종은 네가 가져오는 거 맞지? 저번처럼 까먹으면 우리 또 잡초만 뽑다 온다"),
    ("", 'He said "see you at 7:30pm" 라는데 이거 시차 계산해야 되는 거지?'),
    ("영어 회화 스터디를 하고 있어.", "I don't know what to say, 그냥 머리가 하얘져"),
    ("요리 방송을 보고 있어.", "수란 만들 때 식초를 왜 넣는 거야? 그리고 물을 왜 휘저어?"),
    ("둘 다 밤을 새웠어.", "커피 네 잔째인데 눈꺼풀이 자꾸 파업함"),
    ("길에서 옛 담임을 만났어.", "선생님이 나 이름까지 기억하고 계시더라. 괜히 울컥했어"),
    ("", "https://example.com/watch?v=123 이거 봐봐 개웃김 ㅋㅋㅋ"),
    ("중고 거래를 하려고 해.", "12만 5천 원에 올라온 자전거를 10만 원에 달라고 하면 좀 그런가? 기스가 있긴 한데"),
    ("헌혈을 하고 나왔어.", "초코파이 받으려고 간 건 절대 아니고 진짜 좋은 마음으로 간 거야"),
    (
        "친구가 유학을 떠나는 날이야.",
        (
            "공항 게이트 앞인데 갑자기 가기 싫다. 나 잘할 수 있을까? 거기서 아무도 못 사귀면 "
            "어떡해. 음식도 안 맞을 텐데 김치라도 더 챙길걸"
        ),
    ),
    ("단톡방이 조용한 날이야.", "야야야야야"),
    ("미용실에 다녀왔어.", "앞머리 너무 짧게 잘렸어 나 이제 모자 쓰고 다닐 거야 말리지 마"),
    ("축제 부스를 맡았어.", "솜사탕 기계 빌리는 데 얼마 드는지 알아봤어? 전기는 어디서 끌어오고"),
    ("", "오늘 점심 메뉴: 1) 제육볶음 2) 순두부 3) 굶기"),
    ("비 오는 저녁이야.", "창밖 보면서 멍때리는 중. 빗소리 들으니까 괜히 옛날 생각나네..."),
    ("동생이 군대에 갔어.", "훈련소에서 편지 왔는데 글씨가 너무 반듯해서 더 슬퍼. 원래 악필인데"),
    ("방 탈출 카페에 갇혀 있어.", "힌트 하나 남았는데 쓸까 말까? 저 시계가 3시 15분인 게 뭔가 수상하단 말이지"),
    ("", "😭😭😭😭"),
    (
        "",
        (
            "나 사실 할 말 있는데 화내지 말고 들어줘. 저번에 네가 빌려준 만화책 있잖아, 그거 우리 "
            "집 고양이가 물어뜯어서 표지가 없어졌어. 새 걸로 사 주려고 서점을 세 군데나 돌았는데 "
            "절판이래"
        ),
    ),
    ("새해 첫날이야.", "올해 목표: 운동, 저축, 그리고 너한테 밥 안 얻어먹기"),
    ("드라마 마지막 회를 봤어.", "아니 거기서 열린 결말이 말이 되냐고. 16주를 기다렸는데"),
    ("둘이 별을 보고 있어.", "저기 밝은 거 인공위성이야 금성이야? 깜빡이는 거 보니까 비행기인가"),
    ("친구가 체했어.", "매실액 마시고 손도 땄는데 아직도 속이 꽉 막힌 것 같아"),
    ("", "ㅇㅋ"),
    ("이삿짐을 싸고 있어.", "테이프가 다 떨어졌는데 박스는 아직 열두 개나 남았고 트럭은 한 시간 뒤에 온대 살려줘"),
    (
        "연극 동아리 뒤풀이야.",
        '나 오늘 대사 세 번 씹은 거 관객들이 알았을까? "아니 그게 아니오라"를 "아니오니 그게라"라고 했다니까',
    ),
    ("", "그냥 네 목소리 듣고 싶어서"),
    ("노트북이 멈췄어.", "블루스크린 뜨면서 0x0000007E 라고 나오는데 이거 무슨 뜻이야?? 저장 안 했단 말이야 ㅠㅠㅠㅠㅠㅠ"),
    ("할머니 댁에 왔어.", "시골 오니까 와이파이는 안 터지는데 별은 쏟아질 것 같다. 할머니가 자꾸 더 먹으래서 배도 터질 것 같고"),
    ("", "뷁쉛뭵 꿻뛟 ㅁㄴㅇㄹ"),
    ("길고양이 밥을 주고 왔어.", "삼색이가 오늘은 내 손에 머리를 비볐어. 석 달 만이야, 석 달"),
    ("결혼식 축가를 맡았어.", "고음 부분에서 삑사리 나면 나 그냥 신혼여행 내가 간다"),
)


@dataclass(frozen=True)
class Rates:
    """Shares of all replies, in [0, 1], and mean lengths."""

    prompts: int
    exact_json: float
    emotion_in_vocabulary: float
    stopped: float
    mean_reply_tokens: float
    mean_text_characters: float


def is_contract(reply: str) -> bool:
    """Return whether `reply` is exactly one JSON object with the strings `text` and `emotion`, in this order."""
    try:
        value = json.loads(reply)
    except ValueError:
        return False
    # json.loads also accepts white space around the object
    if reply[:1] != "{" or reply[-1:] != "}" or not isinstance(value, dict) or list(value) != ["text", "emotion"]:
        return False
    return all(isinstance(part, str) and part for part in value.values())


def emotion_of(reply: str) -> str | None:
    """Return the reply's emotion, or None if the reply violates the contract."""
    return json.loads(reply)["emotion"] if is_contract(reply) else None


def grammar_prompts(count: int, seed: int = HELD_OUT_SEED) -> list[list[Message]]:
    """Return prompts from the corpus's grammar with a seed that training doesn't use."""
    return [
        prompt_messages(
            record["instruction"],
            record["context"]["summary"],
            record["context"]["current_emotion"]["type"],
            record["context"]["current_emotion"]["intensity"],
            record["input"],
        )
        for record in records(count, seed)
    ]


def wild_prompts(seed: int = HELD_OUT_SEED) -> list[list[Message]]:
    """Return the hand-written prompts under each persona's instruction, with random feelings and intensities."""
    rng = random.Random(seed)
    return [
        prompt_messages(persona_spec(blood_type).instruction, summary, rng.choice(list(Feeling)).value, rng.random(), said)
        for blood_type in BloodType
        for summary, said in WILD
    ]


def greedy_replies(
    model: Any, tokenizer: Any, prompts: Sequence[list[Message]], batch_size: int = 32
) -> list[tuple[str, int, bool]]:
    """Return for each prompt the greedy reply, its length in tokens, and whether it ended with `<|im_end|>`."""
    import torch

    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    replies = []
    for start in range(0, len(prompts), batch_size):
        texts = [
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            for prompt in prompts[start : start + batch_size]
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        with torch.inference_mode():
            output: Tensor = model.generate(**batch, max_new_tokens=MAX_REPLY_TOKENS, do_sample=False)
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            stopped = stop in row
            ids = row[: row.index(stop)] if stopped else row
            replies.append((tokenizer.decode(ids), len(ids), stopped))
    return replies


def rates(replies: Sequence[tuple[str, int, bool]]) -> Rates:
    """Summarise the result of `greedy_replies`. Raise ZeroDivisionError if it is empty."""
    emotions = [emotion_of(text) for text, _, _ in replies]
    texts = [json.loads(text)["text"] for text, _, _ in replies if is_contract(text)]
    known = set(Expression)
    return Rates(
        prompts=len(replies),
        exact_json=sum(emotion is not None for emotion in emotions) / len(replies),
        emotion_in_vocabulary=sum(emotion in known for emotion in emotions) / len(replies),
        stopped=sum(stopped for _, _, stopped in replies) / len(replies),
        mean_reply_tokens=sum(tokens for _, tokens, _ in replies) / len(replies),
        mean_text_characters=sum(map(len, texts)) / max(len(texts), 1),
    )


def evaluate(folder: Path, device: str = "cpu", grammar: int = 300) -> dict[str, Rates]:
    """Return the rates of the model in `folder` on both held-out sets, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return {
        "grammar": rates(greedy_replies(model, tokenizer, grammar_prompts(grammar))),
        "wild": rates(greedy_replies(model, tokenizer, wild_prompts())),
    }


def report(measured: dict[str, Rates]) -> str:
    """Return one line of JSON per held-out set."""
    return "".join(
        json.dumps({"held_out": name, **{key: round(value, 4) for key, value in asdict(rate).items()}}) + "\n"
        for name, rate in measured.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the tiny base on held-out prompts.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--grammar", type=int, default=300, help="number of grammar prompts (default: %(default)s)")
    arguments = parser.parse_args()

    from transformers.utils import logging

    logging.disable_progress_bar()
    sys.stdout.write(report(evaluate(arguments.folder, arguments.device, arguments.grammar)))


if __name__ == "__main__":
    main()

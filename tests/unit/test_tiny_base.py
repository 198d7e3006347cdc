"""The tiny base that ships: it loads offline, it is small, and it answers in the reply format."""

from __future__ import annotations

import importlib
import json
import re
import unicodedata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lora_trainer.persona.prompt import prompt_messages, reply_json
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Expression, Feeling

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "tiny-base"
MAX_BYTES = 8 * 1000 * 1000


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of tools/tiny_base, which is no part of the installed package."""
    monkeypatch.syspath_prepend(str(ROOT))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"tools.tiny_base.{name}")

    return load


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: the tokenizer can't be loaded")
    return transformers.AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    torch = pytest.importorskip("torch", reason="torch is not installed: the model can't be run")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: the model can't be loaded")
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


def test_the_corpus_is_the_same_each_time_and_a_longer_one_begins_with_it(tool: Any) -> None:
    corpus = tool("corpus")
    first = list(corpus.records(300, seed=7))
    assert list(corpus.records(400, seed=7))[:300] == first
    assert list(corpus.records(300, seed=8)) != first


def test_the_corpus_is_within_the_contract_and_says_nothing_of_a_persona(tool: Any) -> None:
    corpus = tool("corpus")
    records = list(corpus.records(3000, seed=7))
    assert {record["output"]["emotion"] for record in records} == {expression.value for expression in Expression}
    assert {record["context"]["current_emotion"]["type"] for record in records} == {feeling.value for feeling in Feeling}
    instructions = {record["instruction"] for record in records}
    assert instructions >= {persona_spec(blood_type).instruction for blood_type in BloodType}
    for record in records:
        assert 0 <= record["context"]["current_emotion"]["intensity"] <= 1
        assert record["input"]
        assert len(record["input"]) <= corpus.MAX_INPUT_CHARACTERS
        text = record["output"]["text"]
        assert text == unicodedata.normalize("NFC", text)
        assert json.loads(reply_json(**record["output"])) == record["output"]
        # a slot or a mark of the grammar that was left standing
        assert not re.search(r"[{}\[\]|]", text)

    # 반말 is what the instruction of a persona asks for, and the corpus obliges more often than not, whoever the persona is
    for blood_type in BloodType:
        texts = [r["output"]["text"] for r in records if r["instruction"] == persona_spec(blood_type).instruction]
        assert 0.2 < sum(bool(re.search(r"요[.?!]", text)) for text in texts) / len(texts) < 0.5


@pytest.mark.parametrize(
    ("word", "particle", "expected"),
    [
        ("카페", "은", "카페는"),
        ("공원", "은", "공원은"),
        ("커피", "을", "커피를"),
        ("라면", "이", "라면이"),
        ("부산", "으로", "부산으로"),
        ("서울", "으로", "서울로"),
        ("제주", "으로", "제주로"),
        ("친구", "과", "친구와"),
        ("동생", "과", "동생과"),
        ("동생", "한테", "동생한테"),
        ("만두", "이다", "만두"),
        ("김밥", "이다", "김밥이"),
        ("K-pop", "은", "K-pop는"),
    ],
)
def test_particles_follow_the_last_letter(tool: Any, word: str, particle: str, expected: str) -> None:
    assert tool("corpus").with_particle(word, particle) == expected


def test_every_mood_of_a_family_answers_each_of_its_inputs(tool: Any) -> None:
    for family in tool("corpus").FAMILIES:
        for turns in (family.good, family.bad, family.plain):
            assert len(turns.inputs) == len(turns.replies), family.name


def test_the_files_are_small_and_name_no_place_of_origin() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } == {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    for path in files:
        if path.suffix == ".json" and path.name != "tokenizer.json":
            text = path.read_text(encoding="utf-8")
            assert "_name_or_path" not in text
            assert not re.search(r'"/|"Qwen/', text)
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen2ForCausalLM"]


def test_special_tokens_have_the_roles_that_they_have_in_qwen(tokenizer: Any) -> None:
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert generation["eos_token_id"] == ids
    assert (config["eos_token_id"], config["pad_token_id"]) == tuple(ids)
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer("<|im_start|>")["input_ids"] == [tokenizer.convert_tokens_to_ids("<|im_start|>")]


def test_the_chat_template_renders_chatml(tokenizer: Any) -> None:
    prompt = prompt_messages("너는 친구야.", "카페야.", "happy", 0.8, "어디야?")
    rendered = tokenizer.apply_chat_template(
        [*prompt, {"role": "assistant", "content": reply_json("다 왔어!", "smile")}], tokenize=False
    )
    assert rendered == (
        '<|im_start|>system\n너는 친구야.\n상황: 카페야.\n감정: happy 0.8\n출력: {"text","emotion"} JSON<|im_end|>\n'
        "<|im_start|>user\n어디야?<|im_end|>\n"
        '<|im_start|>assistant\n{"text":"다 왔어!","emotion":"smile"}<|im_end|>\n'
    )
    assert tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) == rendered.partition('{"text":"')[0]


@pytest.mark.parametrize("text", ["뷁 쀍?", "👩‍👩‍👧 ❤️‍🔥", "naïve café — ½", "\U0001f9ff", "ㅋㅋㅋㅠㅠ", '"\\{}'])
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_common_emoji_are_one_token_each(tokenizer: Any) -> None:
    emoji = "😊😂🥰😍🤔😮😢😭😡😴🎉✨👍🙏💪🔥"
    assert [len(tokenizer(one)["input_ids"]) for one in emoji] == [1] * len(emoji)


def test_it_answers_with_json_and_stops(tool: Any, tokenizer: Any, model: Any) -> None:
    evaluate = tool("evaluate")
    prompts = evaluate.wild_prompts()[::18][:10] + evaluate.grammar_prompts(10)
    measured = evaluate.rates(evaluate.greedy_replies(model, tokenizer, prompts))
    assert measured.prompts == 20
    assert measured.exact_json >= 0.9
    assert measured.emotion_in_vocabulary >= 0.9
    assert measured.stopped >= 0.9

"""Test the bundled tiny base: it loads offline, is small, and answers in the reply format."""

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
    """Import a module of tools/tiny_base, which is not part of the installed package."""
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
        # the text has no unfilled slot or mark of the grammar
        assert not re.search(r"[{}\[\]|]", text)

    # Every persona's instruction asks for 반말, and most of the corpus follows it.
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


CAFE = """families:
  - family: cafe
    slots:
      drink: [커피, 녹차]
    summaries: ["{drink:을} 마시는 중이야."]
    good: &exchanges
      - input: "{drink} 맛있어~."
        reply: "{drink:이} 맛있다니 다행이[네|네요]."
    bad: *exchanges
    plain: *exchanges
    questions: ["뭐 마셔~?"]
"""


def test_a_file_of_families_is_read_in_order(tool: Any) -> None:
    frames = tool("frames")
    (family,) = frames.parse(frames.FamilyFile, CAFE, "cafe.yaml").families
    assert family.slots == {"drink": ("커피", "녹차")}
    assert [exchange.reply for exchange in family.good] == ["{drink:이} 맛있다니 다행이[네|네요]."]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('        reply: "{drink:이} 맛있다니 다행이[네|네요]."\n', "", ["cafe.good.0.reply", "missing"]),
        ('"{drink} 맛있어~."', '"{drnk} 맛있어~."', ["cafe", "good", "{drnk}", "drink"]),
        ("다행이[네|네요]", "다행이[네]", ["cafe", "good", "다행이[네]", "[casual|polite]"]),
        ("[커피, 녹차]", "[]", ["cafe.slots.drink", "at least 1"]),
        ("[커피, 녹차]", "[커피, 7]", ["cafe.slots.drink.1", "7"]),
        ("questions:", "question:", ["cafe.question:", "cafe.questions:"]),
        ("family: cafe", "family: 카페", ["카페.family", "a-z"]),
        ("slots:", "slots", ["not YAML", "line 4"]),
    ],
)
def test_a_wrong_frame_is_named_with_its_file_and_family(tool: Any, old: str, new: str, expected: list[str]) -> None:
    frames = tool("frames")
    assert old in CAFE
    with pytest.raises(ValueError, match=r"^cafe\.yaml: ") as raised:
        frames.parse(frames.FamilyFile, CAFE.replace(old, new), "cafe.yaml")
    for part in expected:
        assert part in str(raised.value)


def test_wrong_phrases_are_named_with_their_list(tool: Any) -> None:
    frames = tool("frames")
    text = (frames.FOLDER / frames.PHRASES).read_text(encoding="utf-8")
    wrong = text.replace("  tired:\n", "  sad:\n", 1).replace("{word:은} 어땠어", "{noun:은} 어땠어", 1)
    with pytest.raises(ValueError, match=r"^phrases\.yaml: ") as raised:
        frames.parse(frames.Phrases, wrong, frames.PHRASES)
    problems = str(raised.value).splitlines()
    assert [problem.split(": ")[1] for problem in problems] == ["openers", "echoes"]
    assert "tired" in problems[0]
    assert "{noun:은}" in problems[1]


def test_problems_of_all_files_are_reported_together(tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    frames = tool("frames")
    monkeypatch.setattr(frames, "FOLDER", tmp_path)
    (tmp_path / "1.yaml").write_text(CAFE, encoding="utf-8")
    (tmp_path / "2.yaml").write_text(CAFE.replace("drink:", "drinks:"), encoding="utf-8")
    (tmp_path / "3.yaml").write_text(CAFE, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^2\.yaml: cafe: ") as raised:
        frames.families.__wrapped__()
    assert "3.yaml: cafe: 1.yaml already has a family of this name" in str(raised.value)


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
        '<|im_start|>system\n너는 친구야.\n상황: 카페야.\n감정: happy 강함\n출력: {"text","emotion"} JSON<|im_end|>\n'
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


def test_its_configuration_is_the_same_to_transformers_4_and_5(tool: Any, tmp_path: Path) -> None:
    """transformers 4 reads the rope theta at the top level, and takes 10,000 if it is missing there."""
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1_000_000

    # the tool that builds the base writes the same file from what transformers 5 saves
    saved = {name: value for name, value in config.items() if name != "rope_theta"}
    (tmp_path / "config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tool("train").add_rope_theta(tmp_path / "config.json")
    assert (tmp_path / "config.json").read_bytes() == (FOLDER / "config.json").read_bytes()

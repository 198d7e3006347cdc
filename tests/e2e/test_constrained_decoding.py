"""Check that under the grammar even an untrained model always writes exact JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jobs import BASE

from lora_trainer.data.records import Reply
from lora_trainer.evaluate.decoding import Decoding
from lora_trainer.persona.prompt import prompt_messages
from lora_trainer.persona.reply_schema import response_schema
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Feeling
from lora_trainer.train.constrained_decoding import ReplyGrammar, most_tokens

pytestmark = pytest.mark.e2e
for needed in ("torch", "transformers", "llguidance"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install '.[cpu]'")

SCHEMA: Any = response_schema()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


@pytest.fixture(scope="module")
def untrained() -> Any:
    """Return an untrained one-layer tiny base with logits for more tokens than the tokenizer has."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(BASE, local_files_only=True, num_hidden_layers=1, vocab_size=4160)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(settings).float().eval()


def prompts(tokenizer: Any) -> list[str]:
    """Return prompts of different lengths, so that batches need padding."""
    said = ("응", "나 오늘 시험 망했어ㅠㅠ", "주말에 뭐 할까? 영화 보러 갈래?")
    return [
        tokenizer.apply_chat_template(
            prompt_messages(persona_spec(BloodType.A).instruction, "", feeling, 0.8, text),
            tokenize=False,
            add_generation_prompt=True,
        )
        for feeling in Feeling
        for text in said
    ]


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_reply_of_an_untrained_base_is_exact(untrained: Any, tokenizer: Any, count: int) -> None:
    from lora_trainer.train.backends.generation import generate

    grammar = ReplyGrammar(tokenizer, SCHEMA)
    decoding = Decoding("sampled", most_tokens(SCHEMA), temperature=1.5, seed=1)
    # Keep prompts short to save time, since this model ignores them. Vary their length, so that batches need padding.
    asked = [("응", "나 오늘", "주말에 뭐 할까?")[at % 3] for at in range(count)]
    replies = generate(untrained, tokenizer, asked, decoding, batch_size=250, processors=lambda: [grammar.processor()])

    assert len(replies) == count
    bounds, emotions = SCHEMA["properties"]["text"], SCHEMA["properties"]["emotion"]["enum"]
    lengths, seen = [], set()
    for reply in replies:
        assert reply.stopped, "cut by the limit"
        found = json.loads(reply.text)
        assert list(found) == ["text", "emotion"]
        assert isinstance(found["text"], str)
        assert bounds["minLength"] <= len(found["text"]) <= bounds["maxLength"]
        assert found["emotion"] in emotions
        assert found["text"].strip()
        assert Reply.model_validate_json(reply.text).text == found["text"]
        assert reply.text == json.dumps(found, ensure_ascii=False, separators=(",", ":"))
        lengths.append(len(found["text"]))
        seen.add(found["emotion"])
    # The replies vary: some end before the length limit and some at it, and every emotion occurs.
    assert min(lengths) < bounds["maxLength"] == max(lengths)
    assert seen == set(emotions)
    assert len({reply.text for reply in replies}) > count // 2


def test_without_the_grammar_it_answers_in_none(untrained: Any, tokenizer: Any) -> None:
    from lora_trainer.train.backends.generation import generate

    decoding = Decoding("sampled", 48, temperature=1.5, seed=1)
    asked, finished = prompts(tokenizer), list[int]()
    replies = generate(untrained, tokenizer, asked, decoding, batch_size=8, on_replies=finished.append)
    # whoever watches hears of each batch
    assert (sum(finished), max(finished)) == (len(asked), 8)
    assert not any(reply.text.startswith('{"text":"') for reply in replies)


def test_a_trained_base_says_the_same_with_and_without_the_grammar(tokenizer: Any) -> None:
    """The grammar does not change a single token of greedy replies that are valid without it."""
    import torch
    from transformers import AutoModelForCausalLM

    from lora_trainer.train.backends.generation import generate

    base = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True, dtype=torch.float32).eval()
    grammar = ReplyGrammar(tokenizer, SCHEMA)
    decoding = Decoding("greedy", 120)
    asked = prompts(tokenizer)
    free = generate(base, tokenizer, asked, decoding, batch_size=30)
    held = generate(base, tokenizer, asked, decoding, batch_size=30, processors=lambda: [grammar.processor()])
    exact = [at for at, reply in enumerate(free) if reply.stopped and is_reply(reply.text)]
    assert len(exact) > len(asked) // 2
    assert [held[at] for at in exact] == [free[at] for at in exact]
    assert all(is_reply(reply.text) for reply in held if reply.stopped)


def is_reply(text: str) -> bool:
    try:
        Reply.model_validate_json(text)
    except ValueError:
        return False
    return True

"""Check that the static decoder writes what transformers' `generate` writes, and that a batch does not change its replies."""

from __future__ import annotations

from typing import Any

import pytest
from jobs import BASE
from structlog.testing import capture_logs

from lora_trainer.evaluate.decoding import Decoding, Generation
from lora_trainer.persona.prompt import prompt_messages
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType, Feeling

pytestmark = pytest.mark.e2e
for needed in ("torch", "transformers", "peft"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install '.[cpu]'")

SAMPLED = Decoding("sampled", 24, temperature=1.2, top_p=0.9, top_k=50, seed=3)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


@pytest.fixture(scope="module")
def base() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[str]:
    """Return prompts of different lengths, some with a begun reply, one with a reply that has only its end left."""
    said = ("응", "나 오늘 시험 망했어ㅠㅠ", "주말에 뭐 할까? 영화 보러 갈래?")
    asked = [
        tokenizer.apply_chat_template(
            prompt_messages(persona_spec(BloodType.A).instruction, "", feeling, 0.8, text),
            tokenize=False,
            add_generation_prompt=True,
        )
        for feeling in list(Feeling)[:3]
        for text in said
    ]
    begun = [asked[0] + '{"text":"', asked[4] + '{"text":"괜찮아, ', asked[5] + '{"text":"그래, 가자!","emotion":"joy"}']
    return [*asked, *begun]


def write(model: Any, tokenizer: Any, prompts: list[str], decoding: Decoding, batch_size: int, **options: Any) -> list[Generation]:
    from lora_trainer.train.backends.generation import generate

    return generate(model, tokenizer, prompts, decoding, batch_size, **options)


@pytest.mark.parametrize("limit", [1, 5, 120])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_greedy_replies_are_those_of_transformers(
    base: Any, tokenizer: Any, prompts: list[str], limit: int, batch_size: int
) -> None:
    from lora_trainer.train.backends.static_decoding import supports_static_decoding

    assert supports_static_decoding(base)
    decoding = Decoding("greedy", limit)
    expected = write(base, tokenizer, prompts, decoding, 64, static=False)
    assert write(base, tokenizer, prompts, decoding, batch_size) == expected
    # replies end at different steps, so the batch shrinks on the way
    assert len({len(reply.token_ids) for reply in expected}) > 3 or limit < 120


def test_the_adapter_is_decoded_too(base: Any, tokenizer: Any, prompts: list[str]) -> None:
    import copy

    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.eval()
    decoding = Decoding("greedy", 24)
    expected = write(adapted, tokenizer, prompts, decoding, 64, static=False)
    assert write(adapted, tokenizer, prompts, decoding, 64) == expected
    with adapted.disable_adapter():
        plain = write(adapted, tokenizer, prompts, decoding, 64)
    assert plain == write(base, tokenizer, prompts, decoding, 64)
    assert plain != expected


def test_sampled_replies_depend_on_seed_and_index_only(base: Any, tokenizer: Any, prompts: list[str]) -> None:
    import torch

    state = torch.get_rng_state()
    expected = write(base, tokenizer, prompts, SAMPLED, 64)
    for batch_size in (1, 5):
        assert write(base, tokenizer, prompts, SAMPLED, batch_size) == expected
    # other prompts behind them, and a longer limit, leave the replies alone
    assert write(base, tokenizer, prompts[:4], SAMPLED, 64) == expected[:4]
    other = Decoding("sampled", 24, temperature=1.2, top_p=0.9, top_k=50, seed=4)
    assert write(base, tokenizer, prompts, other, 64) != expected
    # equal prompts at different indices get different replies
    assert len({reply.text for reply in write(base, tokenizer, prompts[:1] * 8, SAMPLED, 64)}) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_are_drawn_by_their_probability() -> None:
    import torch

    from lora_trainer.train.backends.static_decoding import choose_tokens

    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = probabilities.log().expand(1000, -1)
    draws = torch.arange(1000) / 1000

    def shares(**settings: Any) -> list[float]:
        chosen = choose_tokens(logits, Decoding("sampled", 1, temperature=1.0, **settings), draws)
        return [share / 1000 for share in torch.bincount(chosen, minlength=4).tolist()]

    assert shares() == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.002)
    # the two most probable tokens reach 0.7, so 0.6 keeps both and drops the rest
    assert shares(top_p=0.6) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.002)
    assert shares(top_k=3) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=0.002)
    # the largest draw never reaches a token that was dropped
    top = choose_tokens(logits[:1], Decoding("sampled", 1, temperature=1.0, top_p=0.6), torch.tensor([1.0]))
    assert top.tolist() == [3]


@pytest.mark.parametrize("static", [True, False])
def test_a_batch_that_exhausts_memory_is_halved(base: Any, tokenizer: Any, prompts: list[str], static: bool) -> None:
    import torch

    def fail(_module: object, _inputs: object, options: dict[str, Any]) -> None:
        if len(options["input_ids"]) > 3:
            raise torch.OutOfMemoryError("no room")

    decoding, finished = Decoding("greedy", 8), list[int]()
    expected = write(base, tokenizer, prompts, decoding, 64)
    hook = base.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        with capture_logs() as events:
            found = write(base, tokenizer, prompts, decoding, 64, static=static, on_replies=finished.append)
    finally:
        hook.remove()
    assert found == expected
    assert [(event["replies"], event["now"]) for event in events if event["event"] == "batch_halved"] == [(12, 6), (6, 3)]
    assert finished == [3, 3, 3, 3]


def test_memory_for_a_single_reply_is_needed(base: Any, tokenizer: Any, prompts: list[str]) -> None:
    import torch

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    hook = base.register_forward_pre_hook(fail)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            write(base, tokenizer, prompts[:2], Decoding("greedy", 8), 64)
    finally:
        hook.remove()


def test_a_sliding_window_is_left_to_transformers(base: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from lora_trainer.train.backends.static_decoding import supports_static_decoding

    layers = base.config.num_hidden_layers
    config = AutoConfig.from_pretrained(
        BASE, local_files_only=True, use_sliding_window=True, sliding_window=16, layer_types=["sliding_attention"] * layers
    )
    assert not supports_static_decoding(AutoModelForCausalLM.from_config(config))

"""Read replies with the tiny base under an adapter: the features are the bare base's, and do not depend on the batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from jobs import BASE, require_training_stack

from lora_trainer.config import EvaluationConfig
from lora_trainer.config_sources import settle
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.evaluate.sense import SenseJudge
from lora_trainer.evaluate.sense_examples import SenseSet, bundled_examples
from lora_trainer.evaluate.sense_question import WORDS, example_questions
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.train.backends import Backend, open_backend
from lora_trainer.train.memory_plan import plan_memory
from lora_trainer.train.tokenization import tokenize

pytestmark = pytest.mark.e2e
require_training_stack()

EXAMPLES = bundled_examples().examples[:24]
CONVERSATIONS = [example.messages for example in EXAMPLES]
REPLIES = [example.reply for example in EXAMPLES]
HIDDEN = 192
OWN = 5 * HIDDEN + 2
NEUTRAL = [{"role": "user", "content": "말해 줘."}]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """Return the tiny base with an adapter that is far from the base."""
    import torch

    config = settle(
        {
            "blood_type": "A",
            "device": "cpu",
            "work_dir": str(tmp_path_factory.mktemp("work")),
            "training.quantization": "none",
            "training.compute_dtype": "float32",
        },
        {},
    )
    opened = open_backend(config)
    opened.start()
    records = [line.record for line in JsonlReader(REPOSITORY / "data" / "train_data_type_A.jsonl") if line.record][:8]
    longest = max(map(len, tokenize(records, opened.load_tokenizer(BASE))))
    opened.load(BASE, plan_memory(config.memory, config.training, opened.shape(BASE), None, longest, opened.name), longest)
    with torch.no_grad():
        for name, weight in opened.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(7))
    yield opened
    opened.release()


@pytest.fixture(scope="module")
def features(backend: Backend) -> Any:
    return backend.base_reply_features(CONVERSATIONS, REPLIES, 8)


def test_the_features_are_the_bare_bases_with_the_prompt_and_what_the_prompt_changes(backend: Backend, features: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)

    def read(messages: Any, reply: str) -> Any:
        prompt = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        after = [*tokenizer(reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            out = model(torch.tensor([before + after]), output_hidden_states=True)
        tokens = slice(len(before), None)
        # hidden_states[n] is the output of layer n; of four layers, 1/3, 7/12 and 5/6 of the depth are 1, 2 and 3
        states = [out.hidden_states[layer][0] for layer in (1, 2, 3)]
        found = out.logits[0, len(before) - 1 : -1].log_softmax(dim=1).gather(1, torch.tensor(after)[:, None])
        means = [state[tokens].mean(dim=0) for state in states]
        return torch.cat([*means, states[1][-1], states[2][-1], torch.stack([found.mean(), found.min()])]).numpy()

    for row in (0, 11, 23):
        prompted, alone = read(CONVERSATIONS[row], REPLIES[row]), read(NEUTRAL, REPLIES[row])
        np.testing.assert_allclose(features[row][:OWN], prompted, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(features[row][OWN:], prompted - alone, rtol=1e-3, atol=1e-3)
    assert features.shape == (len(EXAMPLES), 2 * OWN)
    assert features.dtype == np.float32


def test_neither_the_batch_nor_the_order_changes_them(backend: Backend, features: Any) -> None:
    one_by_one = backend.base_reply_features(CONVERSATIONS[::-1], REPLIES[::-1], 1)[::-1]
    np.testing.assert_allclose(one_by_one, features, rtol=1e-3, atol=1e-4)
    assert backend.base_reply_features([], [], 8).shape == (0, 2 * OWN)


def test_equal_replies_are_read_alone_once_and_each_gets_its_own_difference(backend: Backend) -> None:
    read: list[int] = []
    hook = (
        backend.model.get_base_model()
        .get_decoder()
        .register_forward_pre_hook(lambda _module, _arguments, named: read.append(len(named["input_ids"])), with_kwargs=True)
    )
    try:
        found = backend.base_reply_features(CONVERSATIONS[:3], [REPLIES[0], REPLIES[1], REPLIES[0]], 8)
    finally:
        hook.remove()
    assert sum(read) == 3 + 2
    # prompted minus difference is the reading alone, whatever the prompt
    alone = found[:, :OWN] - found[:, OWN:]
    np.testing.assert_allclose(alone[0], alone[2], rtol=1e-3, atol=1e-4)
    assert not np.allclose(alone[0], alone[1], rtol=1e-3, atol=1e-2)
    assert not np.allclose(found[0, OWN:], found[2, OWN:], rtol=1e-3, atol=1e-2)


def test_an_empty_and_an_endless_reply_have_features(backend: Backend) -> None:
    found = backend.base_reply_features(CONVERSATIONS[:2], ["", "응. " * 3000], 8)
    assert np.isfinite(found).all()


def test_reading_leaves_the_adapter_and_its_mode_as_they_were(backend: Backend, features: Any) -> None:
    import torch

    ids = torch.tensor([[5, 6, 7, 8]])
    was_training = backend.model.training
    with torch.no_grad():
        adapted = backend.model(ids).logits
        with backend.model.disable_adapter():
            bare = backend.model(ids).logits
    backend.base_reply_features(CONVERSATIONS[:4], REPLIES[:4], 2)
    with torch.no_grad():
        after = backend.model(ids).logits
    assert not torch.allclose(adapted, bare)
    torch.testing.assert_close(after, adapted)
    assert backend.model.training == was_training


def test_the_answer_to_a_question_is_the_next_tokens_logit(backend: Backend) -> None:
    questions = example_questions(EXAMPLES[:6])
    logits = backend.base_word_logits(questions, WORDS, 4)
    assert logits.shape == (6, 2)
    np.testing.assert_allclose(backend.base_word_logits(questions, WORDS, 1), logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="same token"):
        backend.base_word_logits(questions, ("예", "예"), 4)


def test_the_tiny_base_is_examined_and_found_unfit(backend: Backend, tmp_path: Path) -> None:
    """It knows too little Korean to judge, whichever way it is asked; a second run reads nothing again."""
    bundled = bundled_examples()
    chosen = set(sorted(bundled.folds.situations)[::8])
    few = SenseSet(tuple(example for example in bundled.examples if example.situation in chosen), bundled.folds)
    judge = SenseJudge(few, backend, EvaluationConfig(batch_size=16), "tiny-base", "sha256:1", tmp_path)
    judges = judge.examine()
    assert [found.judge for found in judges.examinations] == ["probe", "question"]
    assert judges.chosen is None
    for found in judges.examinations:
        assert found.unanswered == 0
        assert all(0 <= part.lower <= part.auc <= 1 for part in found.separation.values())
    verdict, _ = judge.judge(judges, [], BloodType.A)
    assert verdict.status == "not_judged"
    assert "probe (" in verdict.reason


def test_a_batch_that_exhausts_memory_is_halved(backend: Backend, features: Any) -> None:
    import torch

    def fail(_module: object, _arguments: object, named: dict[str, Any]) -> None:
        if len(named["input_ids"]) > 3:
            raise torch.OutOfMemoryError("no room")

    hook = backend.model.get_base_model().get_decoder().register_forward_pre_hook(fail, with_kwargs=True)
    try:
        found = backend.base_reply_features(CONVERSATIONS[:8], REPLIES[:8], 8)
    finally:
        hook.remove()
    np.testing.assert_allclose(found, features[:8], rtol=1e-3, atol=1e-4)

"""Trigger each of the backends' hard assertions on the tiny base. They end the run on failures that would otherwise be silent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from jobs import BASE, require_training_stack

from lora_trainer.config_sources import settle
from lora_trainer.data.jsonl import JsonlReader
from lora_trainer.errors import InvariantError
from lora_trainer.train.backends import Backend, open_backend
from lora_trainer.train.memory_plan import plan_memory
from lora_trainer.train.tokenization import TokenSequence, tokenize

pytestmark = pytest.mark.e2e
require_training_stack()

RECORDS = 24


class Loaded:
    """A backend with base, adapter and trainer, and the sequences to train on."""

    def __init__(self, work_dir: Path, **settings: Any) -> None:
        config = settle(
            {
                "blood_type": "A",
                "device": "cpu",
                "work_dir": str(work_dir),
                "training.quantization": "none",
                "training.compute_dtype": "float32",
                "training.learning_rate": 0.002,
                "training.warmup_fraction": 0,
                **{name.replace("__", "."): value for name, value in settings.items()},
            },
            {},
        )
        self.backend: Backend = open_backend(config)
        self.backend.start()
        data = REPOSITORY / "data" / "train_data_type_A.jsonl"
        records = [line.record for line in JsonlReader(data) if line.record][:RECORDS]
        self.sequences: list[TokenSequence] = tokenize(records, self.backend.load_tokenizer(BASE))
        longest = max(map(len, self.sequences))
        self.plan = plan_memory(config.memory, config.training, self.backend.shape(BASE), None, longest, self.backend.name)
        self.backend.load(BASE, self.plan, longest)
        half = RECORDS // 2
        steps = [list(range(half)), list(range(half, RECORDS))]
        self.backend.prepare_training(self.sequences, steps, self.plan, work_dir, lambda step, of: None)


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    return Loaded(tmp_path / "work")


def test_packed_records_are_isolated_and_a_leak_is_caught(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_trainer.train.backends import adapter_checks

    first, second = loaded.sequences[:2]
    assert loaded.backend.check_isolation(first, second) < 0.01

    true_row = adapter_checks.make_row

    def without_boundaries(sequences: Any) -> Any:
        row = true_row(sequences)
        total = row["input_ids"].shape[1]
        return {**row, "position_ids": row["position_ids"].new_tensor([list(range(total))])}

    monkeypatch.setattr(adapter_checks, "make_row", without_boundaries)
    with pytest.raises(InvariantError, match="see each other"):
        loaded.backend.check_isolation(first, second)


def test_a_packed_row_has_the_loss_of_its_records_one_by_one(loaded: Loaded) -> None:
    summed = sum(loaded.backend.mean_loss([sequence]) * sequence.reply_tokens for sequence in loaded.sequences)
    one_by_one = summed / sum(sequence.reply_tokens for sequence in loaded.sequences)
    assert loaded.backend.mean_loss(loaded.sequences) == pytest.approx(one_by_one, rel=1e-4)


def test_rows_do_not_change_what_a_step_computes(tmp_path: Path) -> None:
    """An optimizer step has the same loss, up to rounding, whether its records share one row or several."""
    logs = [Loaded(tmp_path / str(tokens), memory__micro_batch_tokens=tokens).backend.train() for tokens in (4096, 512)]
    assert [step.rows for step in logs[0].steps] != [step.rows for step in logs[1].steps]
    for wide, narrow in zip(logs[0].steps, logs[1].steps, strict=True):
        assert wide.loss == pytest.approx(narrow.loss, rel=1e-4)
        assert wide.grad_norm == pytest.approx(narrow.grad_norm, rel=1e-3)


def test_checkpointing_does_not_change_what_a_step_computes(tmp_path: Path) -> None:
    logs = [Loaded(tmp_path / mode, memory__gradient_checkpointing=mode).backend.train() for mode in ("off", "on")]
    for plain, recomputed in zip(logs[0].steps, logs[1].steps, strict=True):
        assert plain.loss == pytest.approx(recomputed.loss, rel=1e-5)


def test_a_base_weight_that_changes_is_caught(loaded: Loaded) -> None:
    import torch

    trainer = loaded.backend._ready_trainer()
    true_step = trainer.training_step

    def also_touch_the_base(*arguments: Any) -> Any:
        weight = next(weight for name, weight in loaded.backend.model.named_parameters() if "norm" in name)
        with torch.no_grad():
            weight[0] += 1e-3
        return true_step(*arguments)

    trainer.training_step = also_touch_the_base  # type: ignore[method-assign]
    with pytest.raises(InvariantError, match="base weights changed"):
        loaded.backend.train()


def test_an_adapter_that_does_not_move_is_caught(loaded: Loaded) -> None:
    trainer = loaded.backend._ready_trainer()
    trainer.create_optimizer_and_scheduler(num_training_steps=2)
    trainer.optimizer.step = lambda *arguments, **options: None
    with pytest.raises(InvariantError, match="adapter weights did not change"):
        loaded.backend.train()


def test_packing_that_is_off_is_caught(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_trainer.train.backends import rows

    monkeypatch.setattr(rows, "pack", lambda lengths, row_tokens: [[position] for position in range(len(lengths))])
    with pytest.raises(InvariantError, match="packing is off"):
        loaded.backend.train()


def test_a_row_without_a_token_in_the_loss_is_caught() -> None:
    from lora_trainer.train.backends.rows import make_row

    with pytest.raises(InvariantError, match="all labels are -100"):
        make_row([TokenSequence((5, 6, 7), 3)])


def test_an_adapter_that_was_saved_as_nothing_is_caught(loaded: Loaded, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    loaded.backend.train()
    good, zeroed, other = tmp_path / "good", tmp_path / "zeroed", tmp_path / "other"
    loaded.backend.save(good, "test/base", None)
    probe = loaded.sequences[0]
    assert loaded.backend.read_back(good, probe).base_difference > 0

    weights = load_file(good / "adapter_model.safetensors")
    for folder, change in ((zeroed, lambda tensor: tensor * 0), (other, lambda tensor: tensor * -1.5)):
        shutil.copytree(good, folder)
        save_file({name: change(tensor) for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(InvariantError, match="does not change the base's logits"):
        loaded.backend.read_back(zeroed, probe)
    with pytest.raises(InvariantError, match="not the one that was trained"):
        loaded.backend.read_back(other, probe)


def test_every_reply_ends_in_one_end_of_turn_that_is_in_the_loss(loaded: Loaded) -> None:
    from lora_trainer.train.backends.rows import make_row

    eos = loaded.backend.tokenizer.eos_token_id
    for sequence in loaded.sequences:
        assert sequence.labels[-1] == eos
        assert sequence.labels.count(eos) == 1
    row = make_row(loaded.sequences[:3])
    # no earlier token predicts a record's first token
    starts = [0, len(loaded.sequences[0]), len(loaded.sequences[0]) + len(loaded.sequences[1])]
    assert [int(row["labels"][0, start]) for start in starts] == [-100, -100, -100]
    assert [int(row["position_ids"][0, start]) for start in starts] == [0, 0, 0]

"""Test `run_id` and `gate_id`: some settings change the run, some only the verdict, and some neither."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_trainer.config import RunConfig, setting_names
from lora_trainer.config_sources import settle
from lora_trainer.evaluate.gates import gate_id
from lora_trainer.evaluate.questions import evaluation_id
from lora_trainer.run import identity
from lora_trainer.run.identity import library_versions, run_id, run_ingredients

DATA = "d" * 64
BASE = "Qwen/Qwen2.5-7B-Instruct@a09a35458c702b33eeacc393d103063234e8bc28"

# These groups have a non-default value for every setting. Add each new setting to one of them.
RECIPE = {
    "blood_type": "B",
    "backend": "transformers",
    "device": "cpu",
    "lora.r": 8,
    "lora.alpha": 16,
    "lora.dropout": 0.1,
    "lora.target_modules": ["q_proj"],
    "training.epochs": 2,
    "training.max_steps": 100,
    "training.sequences_per_step": 32,
    "training.learning_rate": 1e-4,
    "training.schedule": "linear",
    "training.warmup_fraction": 0.1,
    "training.weight_decay": 0.01,
    "training.max_grad_norm": 0.5,
    "training.max_length_tokens": 512,
    "training.held_out_fraction": 0.2,
    "training.held_out_measurements_per_epoch": 2,
    "training.keep": "best",
    "training.early_stopping": 5,
    "training.seed": 21,
    "training.quantization": "none",
    "training.compute_dtype": "float32",
}
NOT_RECIPE = {
    "data": "s3://bucket/other/",
    "output": "s3://bucket/out/",
    "work_dir": "elsewhere",
    "strict": True,
    # the base's identity covers these
    "base.model": "./mirror",
    "base.revision": None,
    "base.canonical_id": "a/b",
    "base.cache_dir": "cache",
    "memory.gradient_checkpointing": "on",
    "memory.micro_batch_tokens": 2048,
    # these reject a file or leave it unchanged
    "checkpoints.every_steps": 7,
    "checkpoints.every_minutes": 1.5,
    "checkpoints.keep": 3,
    "checkpoints.grace_s": 20,
    "storage.object_budget_s": 7,
    "storage.total_budget_s": 70,
    "storage.stall_timeout_s": 5,
    "storage.server_side_encryption": "AES256",
    "storage.kms_key_id": "alias/lora",
    "lease.duration_s": 30,
    "lease.wait_s": 120,
    "limits.line_bytes": 4096,
    "limits.text_characters": 1000,
    "limits.nesting_depth": 8,
    "limits.decompressed_bytes": 2**20,
    "limits.compression_ratio": 50,
    "logging.level": "debug",
    "logging.format": "json",
    "logging.report_to": ["tensorboard"],
    "logging.log_every_steps": 1,
}
NEEDED = {"storage.kms_key_id": {"storage.server_side_encryption": "aws:kms"}}
"""Settings without which another setting is refused."""
# Questions, scoring and thresholds: changing them means another verdict on the same weights.
VERDICT = {
    "evaluation.intensities": [0.5],
    "evaluation.intensities_per_prompt": 1,
    "evaluation.max_new_tokens": 64,
    "evaluation.temperature": 0,
    "evaluation.top_p": 1,
    "evaluation.top_k": 0,
    "evaluation.seed": 21,
    "evaluation.bootstrap_resamples": 500,
    "evaluation.judge_model": "judge",
    "evaluation.depth": "full",
    "evaluation.precision": "bfloat16",
    "gates.exact_json": 0.9,
    "gates.stop": 0.9,
    "gates.one_or_two_sentences": 0.9,
    "gates.informal_speech": 0.9,
    "gates.persona": None,
    "gates.emoji_intensity": 0,
    "gates.question_rate_min": 0.1,
    "gates.sense": "required",
    "gates.sense_min": 0.7,
    "gates.question_rate_max": None,
    "gates.win_rate": 0.6,
    "gates.harmful": 1,
    "gates.incomplete": 0.2,
}
NOT_VERDICT = {
    # the prompts' hash covers this
    "evaluation.prompts": "s3://bucket/eval_prompts.jsonl",
    "evaluation.batch_size": 8,
    "evaluation.judge_base_url": "http://localhost:8000/v1",
}


def config(**changes: Any) -> RunConfig:
    return settle({"blood_type": "A", **changes}, {})


def identify(settings: RunConfig, data: str = DATA, base: str = BASE) -> str:
    return run_id(run_ingredients(settings, data, base))


def judge_by(settings: RunConfig) -> str:
    return gate_id(evaluation_id(settings.evaluation, DATA), settings.gates)


def test_every_setting_is_either_recipe_or_not() -> None:
    assert sorted([*RECIPE, *NOT_RECIPE, *VERDICT, *NOT_VERDICT]) == sorted(setting_names())


@pytest.mark.parametrize("setting", RECIPE)
def test_what_decides_the_weights_is_another_run(setting: str) -> None:
    other = config(**{setting: RECIPE[setting]})
    assert other != config()
    assert identify(other) != identify(config())


@pytest.mark.parametrize("setting", [*NOT_RECIPE, *VERDICT, *NOT_VERDICT])
def test_what_does_not_is_the_same_run(setting: str) -> None:
    other = config(**NEEDED.get(setting, {}), **{setting: {**NOT_RECIPE, **VERDICT, **NOT_VERDICT}[setting]})
    assert other != config()
    assert identify(other) == identify(config())


@pytest.mark.parametrize("setting", VERDICT)
def test_what_is_asked_and_what_is_enough_is_another_verdict(setting: str) -> None:
    assert judge_by(config(**{setting: VERDICT[setting]})) != judge_by(config())


@pytest.mark.parametrize("setting", [*RECIPE, *NOT_RECIPE, *NOT_VERDICT])
def test_what_neither_asks_nor_judges_is_the_same_verdict(setting: str) -> None:
    other = config(**NEEDED.get(setting, {}), **{setting: {**RECIPE, **NOT_RECIPE, **NOT_VERDICT}[setting]})
    assert judge_by(other) == judge_by(config())


def test_data_and_base_are_part_of_it() -> None:
    ids = {identify(config()), identify(config(), data="e" * 64), identify(config(), base=f"sha256:{DATA}")}
    assert len(ids) == 3


def test_versions_are_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identify(config())
    assert run_id(run_ingredients(config(), DATA, BASE, prompt_version=99)) != before
    monkeypatch.setattr(identity, "RECIPE_VERSION", 99)
    assert identify(config()) != before


def test_an_explicit_backend_is_the_run_that_auto_would_be() -> None:
    assert identify(config(backend="unsloth")) == identify(config(backend="auto"))


def test_the_device_counts_by_itself() -> None:
    on_cpu, on_gpu = (config(backend="transformers", device=device) for device in ("cpu", "cuda"))
    assert identify(on_cpu) != identify(on_gpu)


def test_the_versions_of_what_computes_are_part_of_it() -> None:
    names = set(library_versions(config()))
    assert {"torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "safetensors"} < names
    assert {"unsloth", "unsloth_zoo", "triton", "bitsandbytes"} < names
    plain = set(library_versions(config(device="cpu", **{"training.quantization": "none"})))
    assert not plain & {"unsloth", "unsloth_zoo", "triton", "bitsandbytes"}
    ingredients = run_ingredients(config(), DATA, BASE)
    assert ingredients["libraries"] == library_versions(config())
    other = {**ingredients, "libraries": {**library_versions(config()), "torch": "0.0"}}
    assert run_id(other) != run_id(ingredients)


def test_a_library_that_is_not_there_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_COMMON", ("tokenizers", "no-such-library-anywhere"))
    versions = library_versions(config(device="cpu", **{"training.quantization": "none"}))
    assert versions["no-such-library-anywhere"] == "absent"
    assert versions["tokenizers"][0].isdigit()


def test_the_order_of_keys_does_not_matter() -> None:
    ingredients = run_ingredients(config(), DATA, BASE)

    def reversed_keys(value: Any) -> Any:
        return {key: reversed_keys(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    assert list(reversed_keys(ingredients)) != list(ingredients)
    assert run_id(reversed_keys(ingredients)) == run_id(ingredients)


def test_it_survives_the_manifest() -> None:
    ingredients = run_ingredients(config(), DATA, BASE)
    assert run_id(json.loads(json.dumps(ingredients, indent=2))) == run_id(ingredients)


def test_the_hash_is_pinned() -> None:
    """If the serialisation changed, every finished run would train again."""
    assert run_id({"b": 1, "a": {"é": [1.5, None, True]}}) == "830732c3983333d4"
    assert len(identify(config())) == 16

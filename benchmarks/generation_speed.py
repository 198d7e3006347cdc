"""Time transformers' `generate` against the static decoder on the same base, prompts and GPU.

    python benchmarks/generation_speed.py --base FOLDER --precision bfloat16 --quantization nf4 --out RESULT.json

Both write the same greedy replies with a LoRA adapter of random weights, and without it. Each decoder runs once on a few prompts
first. bfloat16 rounds differently in the two, so `same_replies` may be below 1; in float32 it should be 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from train_speed import machine

DECODERS = {"generate": False, "static": True}
WARM_UP_REPLIES = 8


def load(base: Path, precision: str, quantization: str) -> tuple[Any, Any]:
    """Return the base with a random adapter, and its tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype = getattr(torch, precision)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        quantization_config=four_bit if quantization == "nf4" else None,
        device_map={"": 0},
        local_files_only=True,
    )
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.002)
    return adapted.eval(), AutoTokenizer.from_pretrained(base, local_files_only=True)


def measure(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int, batch_size: int) -> dict[str, Any]:
    """Return seconds, tokens and peak memory of each decoder, and the share of equal replies."""
    import torch

    from lora_trainer.evaluate.decoding import Decoding
    from lora_trainer.train.backends.generation import generate

    decoding = Decoding("greedy", new_tokens)
    result: dict[str, Any] = {}
    replies = {}
    for name, static in DECODERS.items():
        generate(model, tokenizer, prompts[:WARM_UP_REPLIES], decoding, batch_size, static=static)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        clock = time.perf_counter()
        replies[name] = generate(model, tokenizer, prompts, decoding, batch_size, static=static)
        torch.cuda.synchronize()
        result[name] = {
            "wall_s": time.perf_counter() - clock,
            "tokens": sum(len(reply.token_ids) for reply in replies[name]),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
    same = sum(a == b for a, b in zip(replies["generate"], replies["static"], strict=True))
    return {**result, "same_replies": same / len(prompts)}


def main() -> None:
    """Measure with and without the adapter, and print or write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="none")
    parser.add_argument("--new-tokens", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=480)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    from lora_trainer.data.evaluation_prompts import evaluation_prompts
    from lora_trainer.evaluate.questions import instruction_of, questions
    from lora_trainer.persona.vocabulary import BloodType
    from lora_trainer.train.tokenization import render_prompts

    model, tokenizer = load(arguments.base, arguments.precision, arguments.quantization)
    asked = questions(evaluation_prompts()[:240], (0.2, 0.8), 2, instruction_of(BloodType.A))
    prompts = render_prompts([question.messages for question in asked], tokenizer)
    options = (prompts, arguments.new_tokens, arguments.batch_size)
    found = {"adapter": measure(model, tokenizer, *options)}
    with model.disable_adapter():
        found["base"] = measure(model, tokenizer, *options)
    settings = {
        "base": arguments.base.name,
        "precision": arguments.precision,
        "quantization": arguments.quantization,
        "replies": len(prompts),
        "new_tokens": arguments.new_tokens,
        "batch_size": arguments.batch_size,
    }
    document = json.dumps({"machine": machine(), "settings": settings, **found}, indent=1) + "\n"
    if arguments.out:
        arguments.out.write_text(document)
    sys.stdout.write(document)


if __name__ == "__main__":
    main()

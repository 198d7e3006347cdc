"""Train the tiny base from scratch: first its tokenizer, then its weights. Then measure it.

    python -m tools.tiny_base.train --out examples/tiny-base --precision bfloat16
    python -m tools.tiny_base.train --out examples/tiny-base --device cuda

With these defaults, two CPU cores take about a quarter of an hour if they support bfloat16 multiplication. The README of
examples/tiny-base has the command that built the shipped base.

Shapes: B rows, T tokens, V vocabulary. Training makes one pass over the corpus. The loss covers the whole sequence, with
little weight on the prompt: an adapter builds on the replies, but the prompts hold most of the Korean in the corpus.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_trainer.persona.prompt import Message, prompt_messages, reply_json
from tools.tiny_base.corpus import Record, alphabet, records
from tools.tiny_base.evaluate import evaluate, report

if TYPE_CHECKING:
    from torch import Tensor

# these have the same names and roles as in Qwen2.5: end of text (and padding), start of a turn, end of a turn
SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE: Final = Path(__file__).with_name("qwen2.5_chat_template.jinja")

# Qwen2's pre-tokenizer, https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/tokenizer.json. AutoTokenizer
# rebuilds it from the class name, so a tokenizer trained with another one would behave differently after loading.
PRE_TOKENIZER: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

VOCABULARY: Final = 4096
MAX_POSITION_TOKENS: Final = 2048
TOKENIZER_RECORDS: Final = 6000
ALPHABET_WEIGHT: Final = 40
PROMPT_LOSS_WEIGHT: Final = 0.1


@dataclass(frozen=True)
class Settings:
    """The settings that determine the weights."""

    records: int
    seed: int
    batch_tokens: int
    learning_rate: float
    device: str
    precision: str


def say(**event: object) -> None:
    """Write one line of JSON to standard output."""
    sys.stdout.write(json.dumps(event, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def messages_of(record: Record) -> tuple[list[Message], str]:
    """Return the prompt's messages and the reply, in the project's prompt structure."""
    context = record["context"]
    prompt = prompt_messages(
        record["instruction"],
        context["summary"],
        context["current_emotion"]["type"],
        context["current_emotion"]["intensity"],
        record["input"],
    )
    return prompt, reply_json(record["output"]["text"], record["output"]["emotion"])


def train_tokenizer(seed: int, out: Path) -> None:
    """Train a byte-level BPE that AutoTokenizer loads as Qwen2's. Write `tokenizer.json` and `tokenizer_config.json`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)

    def texts() -> Iterator[str]:
        for record in records(TOKENIZER_RECORDS, seed):
            prompt, reply = messages_of(record)
            for message in prompt:
                # the chat template writes the role on a line of its own
                yield f"{message['role']}\n{message['content']}"
            yield f"assistant\n{reply}"
        for letter in alphabet():
            for _ in range(ALPHABET_WEIGHT):
                yield letter

    size = VOCABULARY - len(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, max_token_length=24
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if tokenizer.get_vocab_size() != size:
        raise ValueError(
            f"tokenizer: got {tokenizer.get_vocab_size()} tokens from the corpus, expected {size}; raise TOKENIZER_RECORDS"
        )
    # add special tokens last, as in Qwen2.5
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(out / "tokenizer.json"))
    token_config = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(size + at): {"content": token} | token_config for at, token in enumerate(SPECIAL_TOKENS)},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE.read_text(encoding="utf-8"),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": MAX_POSITION_TOKENS,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: Any, corpus: Sequence[Record]) -> list[tuple[list[int], int]]:
    """Return each record's token ids, up to and including the last `<|im_end|>`, and its prompt's length in tokens.

    Leave out the template's line break after the last `<|im_end|>`: generation ends before it.
    """
    prompts, replies = [], []
    for record in corpus:
        prompt, reply = messages_of(record)
        prompts.append(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
        replies.append(f"{reply}<|im_end|>")
    prompt_ids, reply_ids = tokenizer(prompts)["input_ids"], tokenizer(replies)["input_ids"]
    return [(prompt + reply, len(prompt)) for prompt, reply in zip(prompt_ids, reply_ids, strict=True)]


def batches(sequences: list[tuple[list[int], int]], batch_tokens: int, rng: random.Random) -> list[list[tuple[list[int], int]]]:
    """Batch sequences of similar length, which keeps padding to a few per cent, and shuffle the batches."""
    order = sorted(sequences, key=lambda sequence: (len(sequence[0]), rng.random()))
    groups: list[list[tuple[list[int], int]]] = [[]]
    for sequence in order:
        if groups[-1] and (len(groups[-1]) + 1) * len(sequence[0]) > batch_tokens:
            groups.append([])
        groups[-1].append(sequence)
    rng.shuffle(groups)
    return groups


def collate(batch: list[tuple[list[int], int]], pad: int, device: str) -> tuple[Tensor, Tensor]:
    """Return token ids (B, T), padded on the right, and the loss weight of each token (B, T)."""
    import torch

    longest = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), longest), pad)
    weights = torch.zeros(len(batch), longest)
    for row, (sequence, prompt_length) in enumerate(batch):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        weights[row, :prompt_length] = PROMPT_LOSS_WEIGHT
        weights[row, prompt_length : len(sequence)] = 1.0
    return ids.to(device), weights.to(device)


def new_model(tokenizer: Any, seed: int) -> Any:
    """Return a Qwen2 model of 2.36 million parameters with random float32 weights."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    stop, pad = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITION_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=stop,
        pad_token_id=pad,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[stop, pad], pad_token_id=pad)
    return model


def train(model: Any, sequences: list[tuple[list[int], int]], settings: Settings) -> None:
    """Train one pass over `sequences` with Muon, AdamW and a cosine schedule."""
    import torch

    pad = model.config.pad_token_id
    groups = batches(sequences, settings.batch_tokens, random.Random(settings.seed))
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    # Muon (https://kellerjordan.github.io/posts/muon/) needs fewer steps than AdamW on a model this small. Scaling its
    # update to the size of AdamW's (https://arxiv.org/abs/2502.16982) lets both share one learning rate.
    optimizers = [
        torch.optim.Muon(matrices, lr=settings.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    steps, warmup_steps = len(groups), max(1, len(groups) // 25)

    def schedule(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    started, tokens, reply_losses = time.monotonic(), 0, []
    model.to(settings.device).train()
    for step, batch in enumerate(groups, start=1):
        ids, weights = collate(batch, pad, settings.device)
        # rows are padded on the right, so the causal mask alone keeps real tokens from attending to padding
        with torch.autocast(settings.device, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            logits = model(input_ids=ids[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        target_weights = weights[:, 1:].flatten()
        loss = (losses * target_weights).sum() / target_weights.sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedulers):
            part.step()
        tokens += sum(len(sequence) for sequence, _ in batch)
        reply_losses.append(losses.detach()[target_weights == 1].mean())
        if step % 50 == 0 or step == steps:
            elapsed_s = time.monotonic() - started
            say(
                step=step,
                of=steps,
                reply_loss=round(torch.stack(reply_losses).mean().item(), 4),
                tokens_per_s=round(tokens / elapsed_s),
                elapsed_s=round(elapsed_s),
            )
            reply_losses.clear()


def add_rope_theta(path: Path) -> None:
    """Repeat the rope theta at the top level of a `config.json`.

    transformers 4, and servers built on it, read it there and take 10,000 without it; transformers 5 writes and reads
    `rope_parameters`.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny base that ships with the project.")
    parser.add_argument("--out", type=Path, required=True, help="output folder; examples/tiny-base for the base that ships")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--records", type=int, default=28_000, help="corpus size (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=1536, help="tokens per step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2.5e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=20, help="default: %(default)s")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="precision of matrix products (default: %(default)s); bfloat16 doubles the speed on a GPU, or with AVX512-BF16 or AMX",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()

    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    settings = Settings(
        records=arguments.records,
        seed=arguments.seed,
        batch_tokens=arguments.batch_tokens,
        learning_rate=arguments.learning_rate,
        device=arguments.device,
        precision=arguments.precision,
    )
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(settings.seed, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    sequences = encode(tokenizer, list(records(settings.records, settings.seed)))
    model = new_model(tokenizer, settings.seed)
    say(
        parameters=sum(p.numel() for p in model.parameters()),
        records=len(sequences),
        tokens=sum(len(ids) for ids, _ in sequences),
        longest_tokens=max(len(ids) for ids, _ in sequences),
    )
    train(model, sequences, settings)
    model.to("cpu", torch.bfloat16).save_pretrained(out)
    add_rope_theta(out / "config.json")
    # safetensors creates the file with mode 0600
    (out / "model.safetensors").chmod(0o644)
    sys.stdout.write(report(evaluate(out, settings.device)))


if __name__ == "__main__":
    main()

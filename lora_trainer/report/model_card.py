"""Model card of a bundle, its README.md: description, metrics and how to serve the adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

from lora_trainer.base_model import Base
from lora_trainer.config import RunConfig
from lora_trainer.evaluate.metrics import Estimate, EvaluationMetrics, RunMetrics, TrainingMetrics
from lora_trainer.evaluate.scope import scope
from lora_trainer.persona.prompt import STRENGTHS, prompt_messages
from lora_trainer.persona.reply_schema import REPLY_TOKENS, response_schema
from lora_trainer.persona.specs import persona_spec
from lora_trainer.persona.vocabulary import BloodType

_CARD_RATES: Final = {
    "exact_json": "exact JSON",
    "stop": "stops on its own",
    "one_or_two_sentences": "at most two sentences",
    "informal_speech": "반말",
    "persona": "recognised as this persona",
    "question": "asks back",
}
# values that vLLM 0.14 and later accept for --max-lora-rank (MaxLoRARanks)
_VLLM_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# versions of transformers, and the versions of PEFT that were tried with each: benchmarks/results/consumers.json
SAME_TOKENS: Final = {
    "4.51.3": ("0.12.0", "0.17.1", "0.21.2"),
    "4.57.6": ("0.12.0", "0.17.1", "0.21.2"),
    "5.17.0": ("0.12.0", "0.21.2"),
}
BROKEN: Final = {"5.17.0": ("0.17.1",)}


def _kept(training: TrainingMetrics) -> str:
    if training.kept_step is None or training.kept_step == training.steps:
        return ""
    return f", weights of step {training.kept_step:,}, which had the lowest held-out loss"


def model_card(config: RunConfig, base: Base, metrics: RunMetrics) -> str:
    """Return the model card as Markdown."""
    spec = persona_spec(config.blood_type)
    name = f"persona-{config.blood_type}"
    revision = f" --revision {base.revision}" if base.revision else ""
    training, held_out = metrics.training, metrics.held_out
    adapter = metrics.evaluation.greedy.adapter
    words = f"{', '.join(word for _, word in STRENGTHS[:-1])} and {STRENGTHS[-1][1]}"
    verdict = "passed" if metrics.verdict.passed else "not passed"
    covered = scope(metrics.verdict)
    return f"""---
base_model: {base.canonical_id}
library_name: peft
language: ko
tags: [lora, persona]
---
# Persona {config.blood_type} ({spec.name})

A LoRA adapter on `{base.canonical_id}`{f" at `{base.revision}`" if base.revision else ""} that answers as the friend of blood type
{config.blood_type}: {spec.tone}

Run `{metrics.run_id}`: {training.records:,} records, {training.steps:,} optimizer steps{_kept(training)}, rank {config.lora.r}.
Held-out loss {held_out.loss_base:.3f} (base) to {held_out.loss_adapter:.3f} (adapter), in nats per reply token,
on {held_out.records:,} records. Report: `report.html`. All numbers: `metrics.json` (`metrics.schema.json`). Data,
configuration and versions: `manifest.json`.

## Evaluation

Gates at publication: **{verdict}**, on {metrics.evaluation.replies} greedy, unconstrained replies to
{metrics.evaluation.prompts} held-out prompts. {covered.judged} **{covered.not_judged}**

| | replies | measured | lower 95 % bound | base | people |
|---|---|---|---|---|---|
{_card_rows(metrics.evaluation)}

The base's replies are a floor; the data's held-out replies, measured by the same rules, are a ceiling.

The rank correlation of emoji count and intensity is {adapter.emoji_intensity.value:.2f}. By rule score, the adapter beats the
base in {metrics.evaluation.greedy.win_rate.value:.0%} of the replies.
{_sense(metrics.evaluation)}
## Prompt and reply

`prompt.json` holds the template of the system message, with the instruction `{spec.instruction}`. The intensity is one of
{words}. A prompt has no earlier turns, because no training record has: the summary says what happened before. A reply
is one JSON object, `{{"text": ..., "emotion": ...}}`; `response_schema.json` is its schema.

## Serve it with vLLM

```bash
vllm serve {base.canonical_id}{revision} --enable-lora --max-lora-rank {vllm_lora_rank(config.lora.r)} \\
  --lora-modules {name}=/path/to/this/folder
```

Request the model `{name}`; under the base's name the server answers without the adapter. Structured outputs with
`response_schema.json` restrict replies to the contract's JSON. Start the server with
`--structured-outputs-config.backend guidance`: the default, xgrammar, cannot generate a quotation mark in a
length-limited string and allows raw control characters:

```bash
curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d @- <<'JSON'
{json.dumps(vllm_request(name, config.blood_type), ensure_ascii=False, indent=2)}
JSON
```

## Load it with PEFT

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("/path/to/this/folder")
base = AutoModelForCausalLM.from_pretrained("{base.canonical_id}"{f', revision="{base.revision}"' if base.revision else ""})
model = PeftModel.from_pretrained(base, "/path/to/this/folder")
```

## Versions

A bundle in this format, on a tiny base, was loaded with these versions and gave the greedy tokens of its own run:

{_version_rows(SAME_TOKENS)}

These do not import together:

{_version_rows(BROKEN)}

vLLM has not been tried.
"""


def _version_rows(versions: Mapping[str, Sequence[str]]) -> str:
    return "\n".join(f"- transformers {transformers} with PEFT {', '.join(peft)}" for transformers, peft in versions.items())


def _sense(evaluation: EvaluationMetrics) -> str:
    rate = evaluation.sense.sense if evaluation.sense is not None else None
    if rate is None:
        return ""
    return (
        f"\nA judge that passed an examination on labelled replies finds sense in {rate.value:.0%} of the readable replies (95 % "
        f"bounds {rate.lower:.0%} and {rate.upper:.0%}, corrected for its errors).\n"
    )


def _card_rows(evaluation: EvaluationMetrics) -> str:
    rows = []
    for name, label in _CARD_RATES.items():
        rate: Estimate = getattr(evaluation.greedy.adapter, name)
        base: Estimate = getattr(evaluation.greedy.base, name)
        people = f"{getattr(evaluation.people, name).value:.1%}" if evaluation.people else "–"
        measured = f"{rate.successes} of {rate.of} | {rate.value:.1%} | {rate.lower or 0:.1%}"
        rows.append(f"| {label} | {measured} | {base.value:.1%} | {people} |")
    return "\n".join(rows)


def vllm_lora_rank(r: int) -> int:
    """Return the smallest `--max-lora-rank` that vLLM accepts and that fits an adapter of rank `r`."""
    return next(rank for rank in _VLLM_RANKS if rank >= r)


def vllm_request(model: str, blood_type: BloodType) -> dict[str, object]:
    """Return a chat request to vLLM that enforces the reply schema (`structured_outputs`, vLLM 0.12 and later)."""
    prompt = prompt_messages(
        persona_spec(blood_type).instruction, "우리는 카페에서 만나기로 했어.", "happy", 0.8, "나 지금 도착했는데 어디야?"
    )
    return {
        "model": model,
        "messages": prompt,
        "max_tokens": REPLY_TOKENS,
        "structured_outputs": {"json": response_schema(), "disable_any_whitespace": True},
    }

"""Name the command to type after a run."""

from __future__ import annotations

import shlex

from lora_trainer.config import RunConfig
from lora_trainer.data.compression import is_jsonl
from lora_trainer.run.publication import Outcome


def next_command(config: RunConfig, outcome: Outcome) -> tuple[str, str]:
    """Return the command that a user would type after `outcome`, and what it is for."""
    verdict = outcome.verdict
    # `stop` depends on evaluation.max_new_tokens, which validate doesn't look at
    if any(gate.ceiling_misses for gate in verdict.gates if not gate.passed and gate.name != "stop"):
        data = config.data if is_jsonl(config.data) else f"{config.data.rstrip('/')}/train_data_type_{config.blood_type}.jsonl"
        return shlex.join(["lora-trainer", "validate", "--strict", data]), "list what the data's own replies do wrong"
    words = ["lora-trainer", "chat", "--adapter", outcome.bundle_uri]
    # a bundle's manifest may not choose a base, so the command has to name any but the default
    if config.base.model != RunConfig(blood_type=config.blood_type).base.model:
        words += ["--base-model", config.base.model]
    unknown = ": nobody has judged yet whether it makes sense" if verdict.sense == "not_judged" else ""
    return shlex.join(words), f"talk to the adapter{unknown}"

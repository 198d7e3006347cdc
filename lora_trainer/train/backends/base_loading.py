"""Load the base and attach a new adapter to it.

Import only from a started backend: unsloth has to be imported before transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_trainer.config import LoraConfig, TrainingConfig
from lora_trainer.errors import ConfigError
from lora_trainer.train.backends.loading_errors import loading
from lora_trainer.train.backends.model_modes import enable_checkpointing


def load_base(base: Path, training: TrainingConfig, tokenizer: PreTrainedTokenizerBase, *, on_cuda: bool) -> PreTrainedModel:
    """Load the base from its folder, with the quantization and data type in `training`."""
    with loading(base, "it"):
        # with output_loading_info it returns a pair, which its types do not say
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(base),
            local_files_only=True,
            # if left out, transformers asks on standard input whether to run the folder's own code
            trust_remote_code=False,
            dtype=compute_dtype(training),
            quantization_config=quantization(training),
            device_map={"": 0 if on_cuda else "cpu"},
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
        )
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    if missing := sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])}):
        # transformers only warns, and fills them with random numbers
        raise ConfigError(
            f"base.model: {base}: {missing[0]} and {len(missing) - 1} more weights are missing or have another shape: weights and "
            "config.json belong to different models; download the model again"
        )
    check_finite(base, model)
    align_special_tokens(model, tokenizer)
    return model


def check_finite(base: Path, model: torch.nn.Module) -> None:
    """Raise `ConfigError` if an unquantized weight is NaN or infinite: training would diverge."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.numel():
            # min and max need no memory, and pass NaN on
            least, most = torch.aminmax(weight.detach())
            if not (torch.isfinite(least) and torch.isfinite(most)):
                raise ConfigError(f"base.model: {base}: {name} holds NaN or infinite numbers; download the model again")


def attach_adapter(model: PreTrainedModel, lora: LoraConfig, *, checkpointing: bool, seed: int) -> peft.PeftModel:
    """Freeze the base and attach a new adapter, initialized from `seed`."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if checkpointing:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    torch.manual_seed(seed)
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT only divides it by r
            lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules),
            bias="none",
            task_type="CAUSAL_LM",
        ),
    )


def align_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Copy the tokenizer's special tokens to the model. Otherwise the trainer does so, with a warning."""
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = tokenizer.bos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id


def compute_dtype(training: TrainingConfig) -> torch.dtype:
    """Return the torch dtype for `training.compute_dtype`."""
    return torch.bfloat16 if training.compute_dtype == "bfloat16" else torch.float32


def quantization(training: TrainingConfig) -> BitsAndBytesConfig | None:
    """Return the bitsandbytes settings for NF4 with double quantization, or None for an unquantized base."""
    if training.quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(training),
    )

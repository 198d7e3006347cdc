"""The Unsloth backend, with fused kernels and varlen attention. The default on a GPU."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_trainer.errors import ConfigError
from lora_trainer.train.backends.loading_errors import loading
from lora_trainer.train.backends.transformers import TransformersBackend
from lora_trainer.train.memory_plan import Checkpointing

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_trainer.train.backends.row_losses import LossFrom


class UnslothBackend(TransformersBackend):
    """The reference backend with Unsloth's loader, adapter and forward."""

    name: Literal["transformers", "unsloth"] = "unsloth"

    def _import_stack(self) -> str:
        if self._device.is_cuda:
            # by default, Unsloth silently trains on the CPU if the driver is broken
            os.environ["UNSLOTH_DISABLE_CPU_FALLBACK"] = "1"
        # Unsloth's usage statistics would download a file from the hub
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        # the default is the current folder, which is read-only in the image
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(self.config.work_dir.absolute() / "unsloth_compiled_cache"))
        try:
            # import it before trl, transformers and peft, because it patches them
            import unsloth  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"the unsloth backend is not installed ({error}): {self._install_command()}") from None
        name = super()._import_stack()
        return _varlen_attention() if self._device.is_cuda else name

    def _load_with_adapter(self, base: Path, checkpointing: Checkpointing) -> PeftModel:
        from unsloth import FastLanguageModel

        from lora_trainer.train.backends.base_loading import align_special_tokens, check_finite, compute_dtype, quantization

        use_gradient_checkpointing = "unsloth" if checkpointing == "unsloth" else checkpointing == "on"
        training = self.config.training
        with loading(base, "it"):
            model, _ = FastLanguageModel.from_pretrained(
                # pass a folder: Unsloth would replace a hub name with its own pre-quantized copy
                model_name=str(base),
                max_seq_length=self._reserved_tokens,
                dtype=compute_dtype(training),
                load_in_4bit=training.quantization == "nf4",
                load_in_16bit=training.quantization == "none",
                quantization_config=quantization(training),
                use_gradient_checkpointing=use_gradient_checkpointing,
                use_exact_model_name=True,
                local_files_only=True,
                random_state=training.seed,
                max_lora_rank=self.config.lora.r,
                trust_remote_code=False,
            )
        check_finite(base, model)
        align_special_tokens(model, self.tokenizer)
        lora = self.config.lora
        adapted: PeftModel = FastLanguageModel.get_peft_model(
            model,
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules),
            bias="none",
            use_gradient_checkpointing=use_gradient_checkpointing,
            random_state=training.seed,
        )
        return adapted

    def _reset(self, base: Path, checkpointing: Checkpointing) -> bool:
        from unsloth import FastLanguageModel

        if not super()._reset(base, checkpointing):
            return False
        # Unsloth's generate() and trainer may leave the model in either mode; they don't change checkpointing
        FastLanguageModel.for_training(self.model)
        return True

    def _inference_mode(self) -> AbstractContextManager[None]:
        # on a GPU, Unsloth's own generate() switches mode and checkpointing
        return nullcontext() if self._device.is_cuda else super()._inference_mode()

    def _decodes_statically(self) -> bool:
        # with a cache, Unsloth's forward on a GPU runs its own decoding step, which keeps its own keys and values
        return not self._device.is_cuda

    def _model_takes_lengths(self) -> bool:
        # Unsloth's forward takes them, but on a CPU Unsloth keeps transformers' forward
        return self._device.is_cuda

    def _loss_from(self) -> LossFrom:
        # Unsloth's forward has its own fused loss
        return "model"


def _varlen_attention() -> str:
    """Return the name of the attention kernel for packed rows, enabling it first on torch 2.11.

    Unsloth uses flash-attn if it is installed, and torch's varlen function from torch 2.12 on, the first that supports grouped
    queries. On torch 2.11 it attends record by record, which is slow: 6,782 instead of 17,165 tokens per second with rows of 8,192
    on one H200 (benchmarks/results/train-speed-h200.json). The flash kernel in torch 2.11 already supports grouped queries, so this
    enables Unsloth's own autograd function for it. `UNSLOTH_TORCH_VARLEN=0` leaves it disabled, as on later versions.
    """
    import torch
    import unsloth.utils.attention_dispatch as dispatch

    if dispatch.HAS_FLASH_ATTENTION:
        return "flash-attn varlen"
    if dispatch._TORCH_VARLEN_ATTN is not None:
        return "torch varlen"
    if not torch.__version__.startswith("2.11.") or os.environ.get("UNSLOTH_TORCH_VARLEN", "1").lower() in (
        "0",
        "false",
        "no",
        "off",
    ):
        return "record by record"
    dispatch._TORCH_VARLEN_ATTN = torch.ops.aten._flash_attention_forward
    dispatch._LEAN_VARLEN = True
    # torch 2.11 has no cuDNN varlen kernel
    dispatch._varlen_can_use_cudnn = lambda *_, **__: False
    return "torch 2.11 flash kernel varlen"

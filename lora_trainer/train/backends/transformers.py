"""The backend with TRL and PEFT, without Unsloth. Used on CPUs, and as the reference for the Unsloth backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_trainer.base_files.check import folder_template
from lora_trainer.base_model import require_safetensors
from lora_trainer.config import RunConfig
from lora_trainer.errors import HardwareError, InvariantError
from lora_trainer.evaluate.decoding import Decoding, Generation, OnReplies, require_room
from lora_trainer.persona.prompt import Message
from lora_trainer.signals import Interruption
from lora_trainer.store.checkpoints import Snapshot
from lora_trainer.train.backends.device import Device
from lora_trainer.train.backends.libraries import import_stack, import_torch
from lora_trainer.train.backends.loading_errors import loading
from lora_trainer.train.held_out import HeldOutPlan
from lora_trainer.train.memory_plan import Checkpointing, MemoryPlan, ModelShape
from lora_trainer.train.step_log import AfterStep, OnStep, TrainingLog
from lora_trainer.train.tokenization import ChatTokenizer, TokenSequence, render_prompts
from lora_trainer.train.trackers import tracking

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lora_trainer.train.backends.adapter_checks import ReadBack
    from lora_trainer.train.backends.base_reuse import AdapterStart, EvaluationBase, TrainingBase
    from lora_trainer.train.backends.generation import LogitsProcessor
    from lora_trainer.train.backends.row_losses import LossFrom
    from lora_trainer.train.backends.step_trainer import StepTrainer


class TransformersBackend:
    """Load a base, attach an adapter, train it, save it and read it back. Call the methods in this order.

    Several personas can use one backend in turn, each starting with `load`. The base stays loaded.

    Methods import torch and its dependents when called, because the rest of the project runs without torch.
    """

    name: Literal["transformers", "unsloth"] = "transformers"

    def __init__(self, config: RunConfig, interruption: Interruption | None = None) -> None:
        self.config = config
        self._model: PeftModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._interruption = Interruption() if interruption is None else interruption
        self._device = Device(config.device)
        self._trainer: StepTrainer | None = None
        self._row_tokens = 0
        self._work_dir = Path()
        self._run_name = ""
        self._reserved_tokens = 0
        self._training_base: TrainingBase | None = None
        self._evaluation_base: EvaluationBase | None = None

    @property
    def model(self) -> PeftModel:
        """The base with its adapter, loaded by `load` or `load_adapter`."""
        if self._model is None:
            raise RuntimeError("load comes first")
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer, loaded by `load_tokenizer`."""
        if self._tokenizer is None:
            raise RuntimeError("load_tokenizer comes first")
        return self._tokenizer

    # -- before the base is loaded ------------------------------------------------------------------

    def start(self) -> dict[str, object]:
        """Import the training stack, check the device, and return facts about both for the manifest.

        Raises `ConfigError` if the stack is not installed, `HardwareError` if the device is missing or unsuitable.
        """
        import_torch(self.config, self._install_command())
        environment = self._device.start(self._compute_dtype())
        environment["attention"] = self._import_stack()
        import torch

        torch.manual_seed(self.config.training.seed)
        return environment

    def _compute_dtype(self) -> Literal["bfloat16", "float32"]:
        """Return the data type that the device has to support: bfloat16 if training or evaluation uses it."""
        both = (self.config.training.compute_dtype, self.config.evaluated_base.compute_dtype)
        return "bfloat16" if "bfloat16" in both else "float32"

    def _install_command(self) -> str:
        cpu_only = self.config.device == "cpu" and self.name == "transformers"
        return "pip install 'lora-trainer[cpu]'" if cpu_only else "pip install 'lora-trainer[cpu,gpu]'"

    def _import_stack(self) -> str:
        """Import everything that training needs and return the name of the attention implementation."""
        import_stack(self.config, self._install_command())
        return "sdpa"

    def configure(self, config: RunConfig) -> None:
        """Use other settings of `lora` and `training` from the next `load` on. Everything else must stay as it was."""
        self.config = config

    def free_bytes(self) -> int | None:
        """Return the GPU's free memory, or None on the CPU."""
        return self._device.free_bytes()

    def shape(self, base: Path) -> ModelShape:
        """Read the base's sizes from its `config.json`. Raises `ConfigError` if it is not a Qwen2-like decoder."""
        return ModelShape.of(base)

    def load_tokenizer(self, base: Path) -> ChatTokenizer:
        """Load the base's own tokenizer. Raises `ConfigError` if it has no chat template."""
        from transformers import AutoTokenizer

        template = folder_template(base)
        with loading(base, "its tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(base), local_files_only=True, trust_remote_code=False
            )
        # the template that was checked; transformers would also read ones that are no part of the base's identity
        tokenizer.chat_template = template
        if tokenizer.pad_token is None:
            # Llama 3 has none; padding is masked, so any token does
            tokenizer.pad_token = tokenizer.eos_token
        # require_room refuses what is too long, with the reason
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self._tokenizer = tokenizer
        return tokenizer

    # -- the model ----------------------------------------------------------------------------------

    def reserve(self, row_tokens: int) -> None:
        """Declare that rows of `row_tokens` will be needed. `load` prepares the base for the longest row declared so far."""
        self._reserved_tokens = max(self._reserved_tokens, row_tokens)

    def load(self, base: Path, plan: MemoryPlan, longest_tokens: int) -> bool:
        """Load the base with a new adapter. If the loaded base and its adapter fit settings and `plan`, reuse and reset them.

        Return whether the loaded base was reused.
        """
        from lora_trainer.train.backends.base_reuse import TrainingBase

        self.reserve(max(plan.micro_batch_tokens, longest_tokens))
        if self._reset(base, plan.gradient_checkpointing):
            return True
        self.release()
        self._model = self._load_with_adapter(base, plan.gradient_checkpointing)
        self._training_base = TrainingBase.of(
            self.model, base, plan.gradient_checkpointing, self._reserved_tokens, self._adapter_start
        )
        return False

    @property
    def _adapter_start(self) -> AdapterStart:
        return self.config.lora, self.config.training.seed

    def _load_with_adapter(self, base: Path, checkpointing: Checkpointing) -> PeftModel:
        """Load the base and attach a new adapter."""
        from lora_trainer.train.backends.base_loading import attach_adapter, load_base

        model = load_base(base, self.config.training, self.tokenizer, on_cuda=self._device.is_cuda)
        return attach_adapter(model, self.config.lora, checkpointing=checkpointing != "off", seed=self.config.training.seed)

    def _reset(self, base: Path, checkpointing: Checkpointing) -> bool:
        """Reset the loaded base after the previous training. Return False if it cannot be reused."""
        import torch

        loaded = self._training_base
        if loaded is None or not loaded.fits(base, checkpointing, self._reserved_tokens, self._adapter_start):
            return False
        self._trainer = None
        loaded.reset_modules(self.model)
        self._device.free_memory()
        if not loaded.is_unchanged(self.model):
            return False
        loaded.reset_adapter(self.model)
        torch.manual_seed(self.config.training.seed)
        return True

    def release(self) -> None:
        """Drop the model and free its memory."""
        self._model = self._trainer = self._training_base = self._evaluation_base = None
        self._device.free_memory()

    def is_device_working(self) -> bool:
        """Return whether the device still works."""
        return self._device.is_working()

    def load_adapter(self, base: Path, adapter: Path) -> bool:
        """Load the base in the evaluation's precision, and a saved adapter. Return whether a loaded base was reused.

        Raises `ConfigError` for weights that are not safetensors: PEFT would unpickle them.
        """
        from peft import PeftModel

        from lora_trainer.train.backends.base_loading import load_base
        from lora_trainer.train.backends.base_reuse import EvaluationBase

        require_safetensors(adapter)
        model = self._unload_adapter(base)
        is_reused = model is not None
        if model is None:
            self.release()
            model = load_base(base, self.config.evaluated_base, self.tokenizer, on_cuda=self._device.is_cuda)
            self._evaluation_base = EvaluationBase.of(model, base)
        self._model = PeftModel.from_pretrained(model, str(adapter), is_trainable=False, local_files_only=True).eval()
        return is_reused

    def _unload_adapter(self, base: Path) -> PreTrainedModel | None:
        """Remove the previous adapter and return its base, or None if that is not `base` or was modified."""
        if self._evaluation_base is None or self._evaluation_base.folder != base:
            return None
        model: PreTrainedModel = self.model.unload()
        self._model = None
        self._device.free_memory()
        return model if self._evaluation_base.is_unchanged(model) else None

    # -- training -----------------------------------------------------------------------------------

    def prepare_training(
        self,
        sequences: Sequence[TokenSequence],
        steps: Sequence[Sequence[int]],
        plan: MemoryPlan,
        work_dir: Path,
        on_step: OnStep,
        after_step: AfterStep = lambda step, is_last: None,
        run_name: str = "",
        held_out: HeldOutPlan | None = None,
        pause_after: int | None = None,
    ) -> None:
        """Build the trainer. `steps` contains indices into `sequences`. `work_dir` is this run's folder, named after its id.

        Trackers show `run_name`, or the persona and the name of `work_dir` if it is empty. Without `held_out`, training measures
        no held-out loss and ends with the last step's weights. With `pause_after`, it stops after that step, unless it ends before.
        """
        from lora_trainer.train.backends.step_trainer import build_trainer

        self._row_tokens = plan.micro_batch_tokens
        self._work_dir = work_dir
        self._run_name = run_name or f"{self.config.blood_type}-{work_dir.name}"
        self._trainer = build_trainer(
            model=self.model,
            tokenizer=self.tokenizer,
            sequences=sequences,
            steps=steps,
            row_tokens=plan.micro_batch_tokens,
            recipe=self.config.training,
            on_cuda=self._device.is_cuda,
            checkpointing=plan.gradient_checkpointing != "off",
            output_dir=work_dir,
            on_step=on_step,
            after_step=after_step,
            held_out=held_out,
            pause_after=pause_after,
            interruption=self._interruption,
            model_takes_lengths=self._model_takes_lengths(),
            loss_from=self._loss_from(),
        )

    def _model_takes_lengths(self) -> bool:
        """Return whether the model's forward takes `packed_seq_lengths`."""
        return False

    def _loss_from(self) -> LossFrom:
        """Return what computes the loss in training."""
        return "trl" if self._device.is_cuda else "labels"

    def restore(self, checkpoint: Path) -> int:
        """Continue from a checkpoint that `snapshot` wrote. Return the number of completed optimizer steps.

        Call it after `prepare_training` and before `train`. Raises `InvariantError` for another run's checkpoint.
        """
        from lora_trainer.train.backends.training_state import read_state

        try:
            state = read_state(checkpoint)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvariantError(
                f"{checkpoint}: complete, but not a checkpoint that this version can read ({error!r}); pass --fresh to start over"
            ) from error
        self._ready_trainer().restore(state)
        return state.step

    def snapshot(self) -> tuple[int, Snapshot] | None:
        """Return the number and the state of the last completed step, or None before the first step of this process."""
        trainer = self._ready_trainer()
        if not trainer.has_stepped:
            return None
        state = trainer.copy_state()
        return state.step, state.write

    def train(self) -> TrainingLog:
        """Train the adapter, and set the weights that the held-out plan keeps. Trackers write to `trackers/` in the run's folder.

        If training pauses, the adapter has the weights of its last step.

        A signal stops training between two rows with `Interrupted`; `snapshot` then returns the last completed step.
        Raises `InvariantError` if a base weight changed, an adapter weight did not, or no row has several records although some
        would fit; `OutOfMemoryError` and `DeviceLostError` as `device_faults` does; `DivergedError` for a NaN or infinite loss.
        """
        from lora_trainer.train.backends.adapter_checks import check_trained_weights
        from lora_trainer.train.backends.fingerprints import WeightFingerprints

        trainer = self._ready_trainer()
        with self.device_faults(), self._interruption.deferred():
            # the checkpoint may be of a step whose measurement was interrupted
            trainer.measure_held_out()
        if trainer.is_finished:
            # resumed from a checkpoint after the last step, or after the one to pause at
            trainer.set_best_weights()
            return trainer.training_log
        before = WeightFingerprints.of(self.model)
        with (
            self.device_faults(),
            self._interruption.deferred(),
            tracking(self.config.logging.report_to, self._work_dir / "trackers", self._run_name) as trackers,
        ):
            trainer.track(trackers)
            trainer.train()
        check_trained_weights(before, WeightFingerprints.of(self.model), len(trainer.training_log.steps))
        # the steps before a pause may have had nothing to pack
        if trainer.training_log.packed_rows == 0 and trainer.could_pack and not trainer.is_paused:
            raise InvariantError("no row held more than one record though several fit: packing is off")
        trainer.set_best_weights()
        return trainer.training_log

    def mean_loss(self, sequences: Sequence[TokenSequence]) -> float:
        """Return the mean loss of the current adapter over the reply tokens of `sequences`, in nats per token."""
        from lora_trainer.train.backends.step_trainer import mean_loss

        with self.device_faults():
            if self._trainer is None:
                # load_adapter loaded the adapter, so there is no trainer
                self._row_tokens = max(map(len, sequences))
                # TRL's head is part of its trainer
                loss_from = self._loss_from()
                return mean_loss(self.model, sequences, self._row_tokens, "model" if loss_from == "trl" else loss_from)
            return self._trainer.mean_loss(sequences, self._row_tokens)

    def base_mean_loss(self, sequences: Sequence[TokenSequence]) -> float:
        """Return the mean loss of the base without the adapter, in nats per token."""
        with self.model.disable_adapter():
            return self.mean_loss(sequences)

    def check_isolation(self, first: TokenSequence, second: TokenSequence) -> float:
        """Check that records in one row do not attend to each other. Return the largest relative difference in logits.

        Raises `InvariantError` if they do.
        """
        from lora_trainer.train.backends.adapter_checks import check_isolation

        return check_isolation(self._ready_trainer().row_logits, first, second)

    def _ready_trainer(self) -> StepTrainer:
        if self._trainer is None:
            raise RuntimeError("prepare_training comes first")
        return self._trainer

    # -- the result ---------------------------------------------------------------------------------

    def save(self, folder: Path, canonical_id: str, revision: str | None) -> None:
        """Write adapter and tokenizer to `folder`. The files name the base by its public id and revision."""
        from lora_trainer.train.backends.adapter_files import save_adapter

        save_adapter(self.model, self.tokenizer, folder, canonical_id, revision)

    def read_back(self, folder: Path, probe: TokenSequence) -> ReadBack:
        """Load the saved adapter next to the trained one and compare their logits for `probe`.

        Raises `InvariantError` if the saved adapter does not change the base's logits or differs from the trained one.
        """
        from lora_trainer.train.backends.adapter_checks import compare_read_back
        from lora_trainer.train.backends.rows import make_row

        row_logits, row = self._ready_trainer().row_logits, make_row([probe])
        trained = row_logits(row)
        with self.model.disable_adapter():
            base = row_logits(row)
        self.model.load_adapter(str(folder), adapter_name="read_back", is_trainable=False, local_files_only=True)
        self.model.set_adapter("read_back")
        loaded = row_logits(row)
        self.model.set_adapter("default")
        self.model.delete_adapter("read_back")
        return compare_read_back(base, trained, loaded)

    # -- generation ---------------------------------------------------------------------------------

    def require_room(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int, positions: int) -> None:
        """Check that `generate` will accept `conversations`, before the base is loaded. Raises `DataError` as `generate` does."""
        encoded = self.tokenizer(render_prompts(conversations, self.tokenizer), add_special_tokens=False)["input_ids"]
        require_room([len(ids) for ids in encoded], max_new_tokens, positions)

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        decoding: Decoding,
        *,
        adapter: bool,
        batch_size: int,
        processors: Callable[[], Sequence[LogitsProcessor]] | None = None,
        begun: Sequence[str] = (),
        on_replies: OnReplies = lambda _: None,
    ) -> list[Generation]:
        """Return the reply of the adapter, or of the base without it, to each conversation, in order.

        `begun`, if given, has a text for each conversation that its reply is already begun with; what is returned continues it.
        `on_replies` is called with the number of new replies whenever some are finished.

        Raises `HardwareError` on OOM, `DataError` for text that would become a control token or leaves no room for a reply.
        """
        import torch

        from lora_trainer.train.backends.generation import generate

        prompts = render_prompts(conversations, self.tokenizer)
        if begun:
            prompts = [prompt + start for prompt, start in zip(prompts, begun, strict=True)]
        with self.device_faults(), self._inference_mode(), ExitStack() as stack:
            if not adapter:
                stack.enter_context(self.model.disable_adapter())
            try:
                static = self._decodes_statically()
                return generate(self.model, self.tokenizer, prompts, decoding, batch_size, processors, on_replies, static=static)
            except torch.OutOfMemoryError as error:
                raise HardwareError(
                    f"GPU memory ran out while a single reply was generated, peak {self.peak_memory_gib():.1f} GiB: "
                    "use a larger GPU, or lower evaluation.max_new_tokens"
                ) from error

    # -- reading with the base ----------------------------------------------------------------------

    def base_reply_features(
        self, conversations: Sequence[Sequence[Message]], replies: Sequence[str], batch_size: int
    ) -> NDArray[np.float32]:
        """Return what the base, without the adapter, computes of each reply: [N, 10 H + 4] for hidden size H.

        `contrasted_features` describes them. Raises `HardwareError` on OOM, `DataError` for text that would become a control token.
        """
        from lora_trainer.train.backends.reply_features import NEUTRAL_MESSAGES, contrasted_features

        *prompts, neutral = render_prompts([*conversations, NEUTRAL_MESSAGES], self.tokenizer)
        positions: int = self.model.config.max_position_embeddings
        return self._read_with_base(
            lambda size: contrasted_features(self.model, self.tokenizer, prompts, neutral, replies, positions, size), batch_size
        )

    def base_word_logits(
        self, conversations: Sequence[Sequence[Message]], words: Sequence[str], batch_size: int
    ) -> NDArray[np.float32]:
        """Return the logits with which the base, without the adapter, would begin to answer with each of `words`: [N, W].

        Raises `AmbiguousAnswersError` if two words begin with the same token, otherwise as `base_reply_features` does.
        """
        from lora_trainer.train.backends.reply_features import next_token_logits

        prompts = render_prompts(conversations, self.tokenizer)
        return self._read_with_base(lambda size: next_token_logits(self.model, self.tokenizer, prompts, words, size), batch_size)

    def _read_with_base(self, read: Callable[[int], NDArray[np.float32]], batch_size: int) -> NDArray[np.float32]:
        """Return `read(batch_size)` without the adapter, halving the batch while GPU memory runs out."""
        import torch

        from lora_trainer.train.backends.generation import halved
        from lora_trainer.train.backends.model_modes import inference_mode

        # unlike generate(), a forward pass does not switch Unsloth's mode itself
        mode = inference_mode(self.model, on_cpu=not self._device.is_cuda)
        with self.device_faults(), mode, self.model.disable_adapter():
            while True:
                try:
                    return read(batch_size)
                except torch.OutOfMemoryError as error:
                    if batch_size == 1:
                        raise HardwareError(
                            f"GPU memory ran out while the base read a single reply, peak {self.peak_memory_gib():.1f} GiB: "
                            "use a larger GPU"
                        ) from error
                # outside the handler, whose traceback keeps the batch's tensors alive
                batch_size = halved(batch_size)

    def _inference_mode(self) -> AbstractContextManager[None]:
        """Switch the model to inference for the block, and restore its training state afterwards."""
        from lora_trainer.train.backends.model_modes import inference_mode

        return inference_mode(self.model, on_cpu=not self._device.is_cuda)

    def _decodes_statically(self) -> bool:
        """Return whether the model's forward takes transformers' static cache."""
        return True

    # -- the device ---------------------------------------------------------------------------------

    def peak_memory_gib(self) -> float:
        """Return the peak memory of the process: allocated on the GPU, or resident on the CPU."""
        return self._device.peak_memory_gib()

    def device_faults(self) -> AbstractContextManager[None]:
        """Translate torch's errors in the block into `OutOfMemoryError`, `DeviceLostError`, or `HardwareError` if the base does
        not fit."""
        return self._device.faults(lambda: self._row_tokens)

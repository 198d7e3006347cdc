"""TRL + PEFT without Unsloth: the CPU's path, and the reference that Unsloth is measured against."""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_trainer.base_model import require_safetensors
from lora_trainer.config import RunConfig
from lora_trainer.errors import ConfigError, DeviceLostError, HardwareError, InvariantError, OutOfMemoryError
from lora_trainer.evaluate.decoding import Decoding, Generation
from lora_trainer.logs import adopt_library_loggers
from lora_trainer.persona.prompt import Message
from lora_trainer.signals import INTERRUPTION
from lora_trainer.store.checkpoints import Snapshot
from lora_trainer.train.memory_plan import GIB, Checkpointing, MemoryPlan, ModelShape
from lora_trainer.train.step_log import AfterStep, OnStep, TrainingLog
from lora_trainer.train.tokenization import Tokenizer, TokenSequence, render_prompts
from lora_trainer.train.trackers import tracking

if TYPE_CHECKING:
    import torch

    from lora_trainer.train.backends.step_trainer import StepTrainer


@dataclass(frozen=True, slots=True)
class ReadBack:
    """How far the logits of one held-out record moved: adapter loaded from the saved folder against base and memory."""

    base_difference: float
    """Largest |logit| difference between the read-back adapter and the base."""
    memory_difference: float
    """Largest |logit| difference between the read-back adapter and the one that was trained."""


@dataclass(frozen=True, slots=True)
class _Fresh:
    """A loaded base and its adapter as they were before the first step, and what the base was loaded for."""

    base: Path
    checkpointing: Checkpointing
    row_tokens: int
    prints: dict[str, int]
    """Of the base's weights."""
    adapter: dict[str, torch.Tensor]
    attributes: tuple[tuple[Any, dict[str, Any]], ...]
    """Of the two modules that a trainer leaves its marks on: a forward of its own, and that it was there (accelerate passes by
    a model that is marked as prepared, and the next persona would train without mixed precision)."""


class TransformersBackend:
    """Loads a base, attaches an adapter, trains it, saves it and reads it back. Methods are called in that order.

    Several personas can go through it, one after another, from `load` on: the base stays loaded.
    """

    name: Literal["transformers", "unsloth"] = "transformers"

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.model: Any = None
        self.tokenizer: Any = None
        self._trainer: StepTrainer | None = None
        self._row_tokens = 0
        self._work_dir = Path()
        self._run_name = ""
        self._reserved_tokens = 0
        self._fresh: _Fresh | None = None
        self._questioned: tuple[Path, dict[str, int]] | None = None
        """A base that an adapter was loaded on to be questioned, and the prints of its weights."""

    # -- before the base is loaded ------------------------------------------------------------------

    def start(self) -> dict[str, object]:
        """Import the training stack and check the device; gives what the manifest says of both.

        Raises `ConfigError` if the stack is not installed, `HardwareError` if the device is not there.
        """
        torch = self._import_torch()
        if self.config.device == "cpu":
            torch.use_deterministic_algorithms(True)
            environment: dict[str, object] = {"device": "cpu", "threads": torch.get_num_threads()}
        else:
            environment = self._require_one_gpu(torch)
        environment["attention"] = self._import_stack()
        torch.manual_seed(self.config.training.seed)
        return environment

    def _import_torch(self) -> Any:
        if self.config.device == "cpu":
            # OpenMP's threads spin while they wait; beside another busy process on the same cores two runs
            # of six steps took 65 s each, and 5 s when the threads sleep
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # a job sends nobody word of itself
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        try:
            import torch
        except ImportError as error:
            raise ConfigError(
                f"the training stack is not installed ({error.name or 'torch'} is missing): {self._install_command()}"
            ) from None
        adopt_library_loggers()
        return torch

    def _install_command(self) -> str:
        cpu_only = self.config.device == "cpu" and self.name == "transformers"
        return "pip install 'lora-trainer[cpu]'" if cpu_only else "pip install 'lora-trainer[cpu,gpu]'"

    def _import_stack(self) -> str:
        """Import everything that training needs; gives the attention implementation's name."""
        if self.config.device == "cpu" and self.config.training.quantization == "none":
            # peft imports it, and on a CPU it asks for a kernel package that nothing here would use
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        try:
            import lora_trainer.train.backends.step_trainer  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"the training stack is not complete ({error}): {self._install_command()}") from None
        self._quiet_libraries()
        return "sdpa"

    def _quiet_libraries(self) -> None:
        """Their log records go through ours, and their progress bars, which are not lines, nowhere."""
        from datasets.utils.logging import disable_progress_bar
        from transformers.utils import logging as transformers_logging

        adopt_library_loggers()
        transformers_logging.disable_progress_bar()
        disable_progress_bar()

    def _require_one_gpu(self, torch: Any) -> dict[str, object]:
        if not torch.cuda.is_available():
            raise HardwareError(
                "device: got no CUDA GPU that torch can use, expected one; check the pod's GPU resource and the driver, "
                "or pass --device cpu to train on the CPU"
            )
        count = torch.cuda.device_count()
        if count > 1:
            raise HardwareError(
                f"device: got {count} visible GPUs, expected 1: this version trains on one; set CUDA_VISIBLE_DEVICES or ask for one"
            )
        properties = torch.cuda.get_device_properties(0)
        if self.config.training.compute_dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise HardwareError(
                f"device: {properties.name} has no bfloat16 arithmetic; use a GPU of compute capability 8.0 or later, "
                "or set training.compute_dtype to float32"
            )
        return {
            "device": "cuda",
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / GIB, 1),
            "cuda": torch.version.cuda,
            "compute_capability": f"{properties.major}.{properties.minor}",
        }

    def free_bytes(self) -> int | None:
        """Free memory of the GPU; None on a CPU."""
        if self.config.device == "cpu":
            return None
        import torch

        return int(torch.cuda.mem_get_info()[0])

    def shape(self, base: Path) -> ModelShape:
        """Sizes from the base's `config.json`. Raises `ConfigError` if it is not a Qwen2-like decoder."""
        path = base / "config.json"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            return ModelShape(
                layers=settings["num_hidden_layers"],
                hidden=settings["hidden_size"],
                intermediate=settings["intermediate_size"],
                attention_heads=settings["num_attention_heads"],
                key_value_heads=settings.get("num_key_value_heads", settings["num_attention_heads"]),
                vocabulary=settings["vocab_size"],
                tied_embeddings=settings.get("tie_word_embeddings", False),
                positions=settings["max_position_embeddings"],
            )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"base.model: {path}: expected a Qwen2-like decoder's configuration, got {error!r}") from None

    def load_tokenizer(self, base: Path) -> Tokenizer:
        """The base's own tokenizer. Raises `ConfigError` if it has no chat template."""
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(str(base), local_files_only=True)
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(f"base.model: {base} has no chat template; use an instruction-tuned base such as Qwen2.5-7B-Instruct")
        self.tokenizer = tokenizer
        checked: Tokenizer = tokenizer
        return checked

    # -- the model ----------------------------------------------------------------------------------

    def reserve(self, row_tokens: int) -> None:
        """Rows of so many tokens will come: the base is loaded for the longest that was reserved."""
        self._reserved_tokens = max(self._reserved_tokens, row_tokens)

    def load(self, base: Path, plan: MemoryPlan, longest_tokens: int) -> bool:
        """Load the base and attach a fresh adapter to it.

        One that was loaded for the persona before, and in the way that `plan` asks for, stays, and its adapter begins anew: the
        same modules with the weights that they began with, so that nothing of a library's patches is taken apart. Gives whether
        it was so.
        """
        self.reserve(max(plan.micro_batch_tokens, longest_tokens))
        if self._is_loaded_for(base, plan) and self._begin_anew():
            return True
        self.release()
        self._load_for_training(base, plan.gradient_checkpointing)
        self._fresh = self._note_fresh(base, plan.gradient_checkpointing)
        return False

    def _load_for_training(self, base: Path, checkpointing: Checkpointing) -> None:
        """The base with a new adapter on it, as `model`."""
        import torch
        from peft import LoraConfig, get_peft_model

        model = self._load_base(base)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if checkpointing != "off":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        lora = self.config.lora
        torch.manual_seed(self.config.training.seed)
        self.model = get_peft_model(
            model,
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(lora.target_modules),
                bias="none",
                task_type="CAUSAL_LM",
            ),
        )

    def _is_loaded_for(self, base: Path, plan: MemoryPlan) -> bool:
        fresh = self._fresh
        return (
            fresh is not None
            and (fresh.base, fresh.checkpointing) == (base, plan.gradient_checkpointing)
            and fresh.row_tokens >= self._reserved_tokens
        )

    def _note_fresh(self, base: Path, checkpointing: Checkpointing) -> _Fresh:
        from lora_trainer.train.backends.training_state import weights_of

        return _Fresh(
            base,
            checkpointing,
            self._reserved_tokens,
            self._fingerprint(trainable=False),
            weights_of(self.model),
            tuple((module, dict(vars(module))) for module in (self.model, self.model.get_base_model())),
        )

    def _begin_anew(self) -> bool:
        """Put all back to what `_note_fresh` noted; gives False for a base that is no longer what was loaded."""
        import torch

        from lora_trainer.train.backends.training_state import set_weights

        fresh = self._fresh
        if fresh is None:
            raise RuntimeError("load comes first")
        self._trainer = None
        for module, attributes in fresh.attributes:
            vars(module).clear()
            vars(module).update(attributes)
        self.model.zero_grad(set_to_none=True)
        self._free_memory()
        if self._fingerprint(trainable=False) != fresh.prints:
            return False
        set_weights(self.model, fresh.adapter)
        torch.manual_seed(self.config.training.seed)
        return True

    def release(self) -> None:
        """Let go of the model and of the memory that it holds."""
        self.model = self._trainer = self._fresh = self._questioned = None
        self._free_memory()

    def _free_memory(self) -> None:
        # trainers and their callbacks hold each other
        gc.collect()
        if self.config.device == "cuda":
            import torch

            torch.cuda.empty_cache()
            # one persona's peak is not the next one's
            torch.cuda.reset_peak_memory_stats()

    def answers(self) -> bool:
        """Whether the device still works: after an error of CUDA's nothing does in the process that had it."""
        if self.config.device == "cpu":
            return True
        import torch

        try:
            torch.cuda.synchronize()
            return int(torch.ones(1, device="cuda").sum()) == 1
        except torch.OutOfMemoryError:
            # full is not lost
            return True
        except RuntimeError:
            return False

    def load_adapter(self, base: Path, adapter: Path) -> bool:
        """Load the base and a saved adapter on it, to be questioned and not trained; gives whether the base was there already.

        Raises `ConfigError` for weights that are not safetensors: PEFT would unpickle them.
        """
        from peft import PeftModel

        require_safetensors(adapter)
        model = self._bare_base(base)
        is_reused = model is not None
        if model is None:
            self.release()
            model = self._load_base(base)
            self._questioned = (base, _prints(model.named_parameters()))
        self.model = PeftModel.from_pretrained(model, str(adapter), is_trainable=False, local_files_only=True).eval()
        return is_reused

    def _bare_base(self, base: Path) -> Any:
        """The base that an adapter is loaded on, with that taken off; None if it is none or not what it was."""
        if self._questioned is None or self._questioned[0] != base:
            return None
        model, self.model = self.model.unload(), None
        self._free_memory()
        return model if _prints(model.named_parameters()) == self._questioned[1] else None

    def _load_base(self, base: Path) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            str(base),
            local_files_only=True,
            dtype=self._compute_dtype(),
            quantization_config=self._quantization(),
            device_map={"": 0 if self.config.device == "cuda" else "cpu"},
            attn_implementation="sdpa",
            use_safetensors=True,
        )
        self._align_special_tokens(model)
        return model

    def _align_special_tokens(self, model: Any) -> None:
        """Give the model the tokenizer's special tokens, as the trainer would with a warning."""
        for settings in (model.config, model.generation_config):
            settings.bos_token_id = self.tokenizer.bos_token_id
            settings.pad_token_id = self.tokenizer.pad_token_id
        model.config.eos_token_id = self.tokenizer.eos_token_id

    def _compute_dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.config.training.compute_dtype == "bfloat16" else torch.float32

    def _quantization(self) -> Any:
        if self.config.training.quantization == "none":
            return None
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self._compute_dtype(),
        )

    def _model_takes_lengths(self) -> bool:
        return False

    def prepare_training(
        self,
        sequences: Sequence[TokenSequence],
        steps: Sequence[Sequence[int]],
        plan: MemoryPlan,
        work_dir: Path,
        on_step: OnStep,
        after_step: AfterStep = lambda _: None,
        run_name: str = "",
    ) -> None:
        """Build the trainer; `steps` holds indices into `sequences`, `work_dir` is the run's own and named by its id.

        Trackers call the run `run_name`, or by persona and `work_dir` if that is empty.
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
            on_cuda=self.config.device == "cuda",
            checkpointing=plan.gradient_checkpointing != "off",
            output_dir=work_dir,
            on_step=on_step,
            after_step=after_step,
            model_takes_lengths=self._model_takes_lengths(),
            model_loss=self.config.device == "cpu" or self.name == "unsloth",
        )

    def restore(self, checkpoint: Path) -> int:
        """Go on from what `snapshot` wrote, behind `prepare_training` and before `train`; gives the optimizer steps done by then.

        Raises `InvariantError` if it is another run's.
        """
        from lora_trainer.train.backends.training_state import read_state

        try:
            state = read_state(checkpoint)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvariantError(
                f"{checkpoint}: whole, and not a checkpoint that this version reads ({error!r}); pass --fresh to start over"
            ) from error
        self._ready_trainer().restore(state)
        return state.step

    def snapshot(self) -> tuple[int, Snapshot] | None:
        """The state as of the last whole step, and its number; None before the first step of this process."""
        trainer = self._ready_trainer()
        if not trainer.has_stepped:
            return None
        state = trainer.state_now()
        return state.step, state.write

    def train(self) -> TrainingLog:
        """Train the adapter; trackers write to `trackers/` in its working folder.

        A signal ends it between two rows, with `Interrupted`; `snapshot` then has the last whole step.
        Raises `InvariantError` if a base weight changed, an adapter weight did not, or records were not
        packed though a step has several; `HardwareError` when memory runs out; `DivergedError` for a NaN.
        """
        trainer = self._ready_trainer()
        if not len(trainer.train_dataset):
            # the checkpoint was the last step's
            return trainer.training_log
        before = self._fingerprint(trainable=False)
        adapter_before = self._fingerprint(trainable=True)
        with (
            self.device_faults(),
            INTERRUPTION.deferred(),
            tracking(self.config.logging.report_to, self._work_dir / "trackers", self._run_name) as trackers,
        ):
            trainer.track(trackers)
            trainer.train()
        changed = [name for name, value in self._fingerprint(trainable=False).items() if before[name] != value]
        if changed:
            raise InvariantError(
                f"{len(changed)} base weights changed in training ({changed[0]}, ...): only the adapter may change"
            )
        adapter_after = self._fingerprint(trainable=True)
        still = [name for name, value in adapter_after.items() if adapter_before[name] == value]
        # A is random and B zero at the start: B moves with the first step, A from the second on, once B is not zero
        stuck = [name for name in still if "lora_B" in name or len(trainer.training_log.steps) > 1]
        if stuck or not adapter_after:
            raise InvariantError(f"{len(stuck)} of {len(adapter_after)} adapter weights did not change in training ({stuck[:1]})")
        if trainer.training_log.packed_rows == 0 and trainer.could_pack:
            raise InvariantError("no row held more than one record though several fit: packing is off")
        return trainer.training_log

    def mean_loss(self, sequences: Sequence[TokenSequence]) -> float:
        """Mean loss over the reply tokens of `sequences` with the adapter as it is now, nats a token."""
        from lora_trainer.train.backends.step_trainer import mean_loss

        with self.device_faults():
            if self._trainer is None:
                # an adapter that was loaded to be questioned
                self._row_tokens = max(map(len, sequences))
                return mean_loss(self.model, sequences, self._row_tokens)
            return self._trainer.mean_loss(sequences, self._row_tokens)

    def base_mean_loss(self, sequences: Sequence[TokenSequence]) -> float:
        """As `mean_loss`, of the base without the adapter."""
        with self.model.disable_adapter():
            return self.mean_loss(sequences)

    def check_isolation(self, first: TokenSequence, second: TokenSequence) -> float:
        """Prove that records in one row don't see each other.

        The second record's logits are computed behind the first and behind another record of the same
        length. Gives the largest difference relative to the largest logit; raises `InvariantError` when
        it is more than noise.
        """
        import torch

        from lora_trainer.train.backends.step_trainer import make_row

        other = TokenSequence(tuple(reversed(first.input_ids)), first.prompt_tokens)
        if other.input_ids == first.input_ids:
            raise ValueError("the first record reads the same backwards: the check would prove nothing")
        logits = [self._row_logits(make_row([before, second]))[len(first) :] for before in (first, other)]
        scale = logits[0].abs().max().clamp(min=1e-6)
        difference = float((logits[0] - logits[1]).abs().max() / scale)
        if not difference <= ISOLATION_TOLERANCE or not torch.isfinite(scale):
            raise InvariantError(
                f"records packed into one row see each other: logits of the second change by {difference:.1%} with the first, "
                f"expected at most {ISOLATION_TOLERANCE:.1%}; this attention implementation can't be used with packing"
            )
        return difference

    def _row_logits(self, row: Any) -> torch.Tensor:
        """Logits of one row [T, V], float32, by the path that training takes."""
        import torch

        trainer = self._ready_trainer()
        inputs = trainer._prepare_inputs({key: value for key, value in row.items() if key != "labels"})
        if not trainer.model_takes_lengths:
            del inputs["packed_seq_lengths"]
        self.model.train()
        with torch.no_grad(), torch.random.fork_rng(devices=[0] if self.config.device == "cuda" else []):
            # the same dropout mask in every call
            torch.manual_seed(0)
            with trainer.compute_loss_context_manager():
                logits: torch.Tensor = self.model(**inputs, use_cache=False).logits
        return logits[0].float()

    # -- the result ---------------------------------------------------------------------------------

    def save(self, folder: Path, canonical_id: str, revision: str | None) -> None:
        """Write adapter and tokenizer to `folder`, with the base's public name instead of a local path."""
        self.model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        # PEFT writes a model card of its own; the bundle's is written with the run's numbers
        (folder / "README.md").unlink(missing_ok=True)
        self.tokenizer.save_pretrained(str(folder))
        path = folder / "adapter_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = canonical_id
        settings["revision"] = revision
        settings["inference_mode"] = True
        # sets come out in hash order, which changes from process to process
        settings["target_modules"] = sorted(settings["target_modules"])
        path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

    def read_back(self, folder: Path, probe: TokenSequence) -> ReadBack:
        """Load the saved adapter beside the trained one and compare the logits of `probe`.

        Raises `InvariantError` if the adapter from the folder does not change the base, or is not the
        one that was trained.
        """
        from lora_trainer.train.backends.step_trainer import make_row

        row = make_row([probe])
        trained = self._row_logits(row)
        with self.model.disable_adapter():
            base = self._row_logits(row)
        self.model.load_adapter(str(folder), adapter_name=READ_BACK_NAME, is_trainable=False, local_files_only=True)
        self.model.set_adapter(READ_BACK_NAME)
        loaded = self._row_logits(row)
        self.model.set_adapter("default")
        self.model.delete_adapter(READ_BACK_NAME)
        result = ReadBack(float((loaded - base).abs().max()), float((loaded - trained).abs().max()))
        if not result.base_difference > 0:
            raise InvariantError("the saved adapter does not change the base's logits: nothing was learned or nothing was saved")
        if not result.memory_difference <= READ_BACK_TOLERANCE * max(1.0, result.base_difference):
            raise InvariantError(
                f"the saved adapter is not the one that was trained: its logits differ by {result.memory_difference:.3g} "
                f"(from the base by {result.base_difference:.3g})"
            )
        return result

    # -- questions ----------------------------------------------------------------------------------

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        decoding: Decoding,
        *,
        adapter: bool,
        batch_size: int,
        processors: Callable[[], Sequence[Any]] | None = None,
    ) -> list[Generation]:
        """What the adapter, or the base without it, answers to each conversation, in order.

        Raises `HardwareError` when memory runs out, `DataError` for text that would become a control token.
        """
        import torch

        from lora_trainer.train.backends.generation import generate

        prompts = render_prompts(conversations, self.tokenizer)
        with self.device_faults(), self._inference(), ExitStack() as stack:
            if not adapter:
                stack.enter_context(self.model.disable_adapter())
            try:
                return generate(self.model, self.tokenizer, prompts, decoding, batch_size, processors)
            except torch.OutOfMemoryError as error:
                raise HardwareError(
                    f"GPU memory ran out while {batch_size} replies were generated at once, peak {self.peak_memory_gib():.1f} GiB: "
                    "lower evaluation.batch_size"
                ) from error

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """The model in the state that generation wants, and back in the one that training left it in."""
        was_training = self.model.training
        # checkpointing recomputes what a key-value cache would have to keep
        checkpointing = bool(getattr(self.model, "is_gradient_checkpointing", False))
        if checkpointing:
            self.model.gradient_checkpointing_disable()
        self.model.eval()
        if self.config.device == "cpu" and was_training:
            from lora_trainer.train.backends.step_trainer import keep_four_bit_layout

            keep_four_bit_layout(self.model)
        try:
            yield
        finally:
            self.model.train(was_training)
            if checkpointing:
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def peak_memory_gib(self) -> float:
        """Most memory that was held at one time: allocated on the GPU, or resident on a CPU."""
        if self.config.device == "cuda":
            import torch

            return float(torch.cuda.max_memory_allocated() / GIB)
        import resource

        # kilobytes on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB

    # -- shared -------------------------------------------------------------------------------------

    def _ready_trainer(self) -> StepTrainer:
        if self._trainer is None:
            raise RuntimeError("prepare_training comes first")
        return self._trainer

    def _fingerprint(self, trainable: bool) -> dict[str, int]:
        return _prints(
            (name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad is trainable
        )

    @contextmanager
    def device_faults(self) -> Iterator[None]:
        """Says what the device did. Raises `OutOfMemoryError`, or `DeviceLostError` for all else that a driver reports."""
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            peak = f"peak {self.peak_memory_gib():.1f} GiB"
            if not self._row_tokens:
                # no plan makes the base itself smaller
                raise HardwareError(
                    f"GPU memory ran out while the base was loaded, {peak}: expected a GPU that nobody else uses and that holds "
                    "it; use a larger one, a smaller base.model, or training.quantization=nf4"
                ) from error
            raise OutOfMemoryError(
                f"GPU memory ran out at {self._row_tokens} tokens a micro-batch, {peak}: use a larger GPU, lower "
                "training.max_length_tokens, or let 'auto' decide about memory.micro_batch_tokens and memory.gradient_checkpointing"
            ) from error
        except torch.AcceleratorError as error:
            said = str(error).splitlines()[0]
            raise DeviceLostError(
                f"{self.config.device}: the device failed: {said}; run the same command again, elsewhere if it stays so"
            ) from error


ISOLATION_TOLERANCE = 0.01
"""bfloat16 rounds at 0.4 %; a record that is seen by the next one moves its logits by tens of percent."""
READ_BACK_TOLERANCE = 0.01
READ_BACK_NAME = "read_back"
_FINGERPRINT_PIECE = 4 * 1024 * 1024


def _prints(parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """The sum over each weight's bits: cheap, and as good as certain to change with the weight."""
    import torch

    prints = {}
    for name, parameter in parameters:
        words = parameter.detach().reshape(-1).view(torch.uint8)
        if words.numel() % 4 == 0:
            words = words.view(torch.int32)
        # in pieces: torch copies what it sums in a wider type
        sums = [piece.sum(dtype=torch.int64) for piece in words.split(_FINGERPRINT_PIECE)]
        prints[name] = int(torch.stack(sums).sum())
    return prints

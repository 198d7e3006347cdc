"""TRL's `SFTTrainer`, fed one optimizer step at a time.

`SFTTrainer` takes the same number of rows at every step. Here a step is a fixed number of *records*, packed into as few rows as
the device's memory allows, so that the optimizer sees the same batches on every GPU. One item of the data loader is therefore a
whole step, and `training_step` iterates over its rows. Optimizer, clipping and trainer state are the parent's.

Import only from a started backend: unsloth has to be imported before trl, transformers and peft.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from lora_trainer.config import TrainingConfig
from lora_trainer.errors import DivergedError, InvariantError
from lora_trainer.signals import Interruption
from lora_trainer.train.backends.model_modes import keep_four_bit_layout
from lora_trainer.train.backends.row_losses import LossFrom, forward_loss
from lora_trainer.train.backends.rows import Row, Step, StepCollator, make_step
from lora_trainer.train.backends.training_state import (
    TrainingState,
    random_state,
    set_moments,
    set_random_state,
    set_weights,
    state_of,
    weights_of,
)
from lora_trainer.train.held_out import HeldOutLoss, HeldOutPlan, is_overfitting, lowest
from lora_trainer.train.schedule import Schedule, learning_rate_factor
from lora_trainer.train.step_log import AfterStep, OnStep, StepLog, TrainingLog
from lora_trainer.train.tokenization import TokenSequence

if TYPE_CHECKING:
    from peft import PeftModel


class StepTrainer(SFTTrainer):
    """`SFTTrainer` whose batch is one optimizer step (`Step`)."""

    model: PeftModel
    train_dataset: Dataset
    lr_scheduler: LambdaLR

    def __init__(
        self,
        *,
        on_step: OnStep,
        after_step: AfterStep,
        held_out: HeldOutPlan | None,
        pause_after: int | None,
        interruption: Interruption,
        schedule: Schedule,
        model_takes_lengths: bool,
        loss_from: LossFrom,
        **kwargs: Any,
    ) -> None:
        """Build the trainer; `kwargs` go to `SFTTrainer`.

        `held_out`: when to measure the loss on which held-out records; None: never.
        `pause_after`: stop after this step, so that a later trainer can continue; None: train to the end.
        `model_takes_lengths`: whether the model's forward takes `packed_seq_lengths`.
        `loss_from`: what computes a row's loss.
        """
        self.recipe_schedule = schedule
        model: torch.nn.Module = kwargs["model"]
        full_precision = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
        super().__init__(**kwargs)
        # TRL casts the adapter of a quantized base to bfloat16, whose 8 bits lose most of Adam's updates at small learning rates
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                weight.data = full_precision[name]
        self.model_takes_lengths = model_takes_lengths
        self.loss_from: LossFrom = loss_from
        self.training_log = TrainingLog()
        self._on_step = on_step
        self._after_step = after_step
        self._held_out = held_out
        self._pause_after = pause_after
        self._best: dict[str, torch.Tensor] | None = None
        self._measured_s = 0.0
        self._interruption = interruption
        self.steps_before = 0
        """Optimizer steps that earlier processes of this run completed."""
        self._restored: TrainingState | None = None
        self._step_end_random: dict[str, torch.Tensor] | None = None
        self._completed_steps = 0
        self._is_tracked = False
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)
        self.add_callback(_StepEnd(self))
        self._unread: _UnreadStep | None = None
        self._mark_s = 0.0

    def track(self, trackers: Sequence[TrainerCallback]) -> None:
        """Send each step's metrics to the trackers' callbacks. They start before the clock, so step times exclude them."""
        self.remove_callback(_StepEnd)
        for callback in (*trackers, _StepEnd(self)):
            self.add_callback(callback)
        self._is_tracked = bool(trackers)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Step], num_batches: int, device: torch.device
    ) -> tuple[list[Step], torch.Tensor]:
        """Return one step and its number of loss tokens, the divisor of its summed loss."""
        step = next(epoch_iterator)
        return [step], torch.tensor(step.loss_tokens, device=device)

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run forward and backward over the rows of `inputs`, a `Step`. Return the step's mean loss in nats per token."""
        step: Step = inputs
        model.train()
        if self._restored is not None and self._completed_steps == self.steps_before:
            set_random_state(self._restored.random, self.args.device)
        total = torch.zeros((), device=self.args.device)
        for row in step.rows:
            # safe to stop here: an unfinished step has not changed any weights
            self._interruption.check()
            with self.compute_loss_context_manager():
                # never None: get_batch_samples counts them
                loss = self.row_loss(model, row, cast("torch.Tensor", num_items_in_batch))
            self.accelerator.backward(loss)
            total += loss.detach()
        self._unread = _UnreadStep(step, total, self._unread)
        return total

    def row_loss(self, model: torch.nn.Module, row: Row, divisor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a row's token losses, divided by `divisor`."""
        inputs: dict[str, Any] = self._prepare_inputs(dict(row))
        if not self.model_takes_lengths:
            del inputs["packed_seq_lengths"]
        if self.loss_from != "trl":
            return forward_loss(model, inputs, divisor, self.loss_from)
        loss: torch.Tensor = super().compute_loss(  # type: ignore[no-untyped-call]  # TRL does not annotate it
            model, inputs, num_items_in_batch=divisor
        )
        return loss

    def mean_loss(self, sequences: Sequence[TokenSequence], row_tokens: int) -> float:
        """Return the mean loss over all reply tokens of `sequences` in evaluation mode, in nats per token."""
        step = make_step(sequences, row_tokens)
        divisor = torch.tensor(step.loss_tokens, device=self.args.device)
        self.model.eval()
        if self.args.use_cpu:
            keep_four_bit_layout(self.model)
        total = torch.zeros((), device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for row in step.rows:
                # safe to stop here: measuring changes no weights
                self._interruption.check()
                total += self.row_loss(self.model, row, divisor)
        return float(total)

    def measure_held_out(self) -> None:
        """Measure the held-out loss if it is due after the last completed step, and keep the weights if it is the lowest.

        Changes neither the weights nor the random numbers of the next step. Raises `Interrupted` between two rows, and
        `DivergedError` if the loss is NaN or infinite. The next process measures again what was interrupted.
        """
        plan, step, losses = self._held_out, self._completed_steps, self.training_log.held_out
        if plan is None or step not in plan.at_steps or any(measured.step == step for measured in losses):
            return
        # wait for the device, so that the time of earlier steps does not count as the measurement's
        self._report_unread()
        started_s = time.perf_counter()
        with torch.random.fork_rng(devices=[] if self.args.use_cpu else [0]):
            loss = self.mean_loss(plan.sequences, cast("StepCollator", self.data_collator).row_tokens)
        if not math.isfinite(loss):
            raise DivergedError(
                f"training diverged: the held-out loss after step {step} of {self.all_steps} is {loss}; "
                f"lower training.learning_rate (peak {self.args.learning_rate:g})"
            )
        losses.append(HeldOutLoss(step, loss))
        best = lowest(losses)
        if plan.keep_best and best.step == step:
            self._best = weights_of(self.model)
        plan.on_measured(losses[-1], best)
        if self._is_tracked:
            self.callback_handler.on_log(self.args, replace(self.state, global_step=step), self.control, {"eval_loss": loss})
        self._mark_s = time.perf_counter()
        self._measured_s += self._mark_s - started_s

    @property
    def is_overfitting(self) -> bool:
        """Whether training stops early because the held-out loss has not improved for long enough."""
        return self._held_out is not None and is_overfitting(self.training_log.held_out, self._held_out.early_stopping)

    @property
    def is_finished(self) -> bool:
        """Whether a restored state needs no further step, for now or at all."""
        return not len(self.train_dataset) or self.is_overfitting or self.is_paused

    @property
    def is_paused(self) -> bool:
        """Whether training stops for now, with steps left that a later trainer takes."""
        if self._pause_after is None or self.is_overfitting:
            return False
        return self._pause_after <= self._completed_steps < self.all_steps

    def set_best_weights(self) -> None:
        """Go back to the weights with the lowest held-out loss, if they were kept and training has ended."""
        if self._best is not None and not self.is_paused:
            set_weights(self.model, self._best)

    def row_logits(self, row: Row) -> torch.Tensor:
        """Return the logits of one row [T, V], float32, computed as in training."""
        inputs: dict[str, Any] = self._prepare_inputs({key: value for key, value in row.items() if key != "labels"})
        if not self.model_takes_lengths:
            del inputs["packed_seq_lengths"]
        self.model.train()
        with torch.no_grad(), torch.random.fork_rng(devices=[] if self.args.use_cpu else [0]):
            # use the same dropout mask in every call
            torch.manual_seed(0)
            with self.compute_loss_context_manager():
                logits: torch.Tensor = self.model(**inputs, use_cache=False).logits
        return logits[0].float()

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Create the recipe's schedule, whose learning rate is never zero.

        transformers' schedules waste the first warm-up step on a learning rate of zero, which matters here because many runs have
        only a few dozen steps.
        """
        optimizer = optimizer or self.optimizer
        if optimizer is None:
            raise RuntimeError("create_optimizer comes first")
        warmup_steps = int(self.args.warmup_steps)
        self.lr_scheduler = LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(step + self.steps_before, self.all_steps, warmup_steps, self.recipe_schedule),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    @property
    def could_pack(self) -> bool:
        """Whether at least one step has two records that fit into one row."""
        collator = cast("StepCollator", self.data_collator)
        for step in self.train_dataset["records"]:
            lengths = sorted(len(collator.sequences[index]) for index in step)
            if len(lengths) > 1 and lengths[0] + lengths[1] <= collator.row_tokens:
                return True
        return False

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: nothing uses the count, and the parent's method needs a key that a `Step` does not have."""
        return 0

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        norm: torch.Tensor = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]  # not annotated in transformers
        if self._unread is not None:
            self._unread.grad_norm = norm
            self._unread.learning_rate = float(self.lr_scheduler.get_last_lr()[0])
        return norm

    @property
    def all_steps(self) -> int:
        """Optimizer steps of the whole run, including those of earlier processes."""
        return self.steps_before + int(self.args.max_steps)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the parent's optimizer, and restore the checkpoint's moments if there is one."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self._restored is not None:
            set_moments(self.model, optimizer, self._restored.moments)
        return optimizer

    def restore(self, state: TrainingState) -> None:
        """Continue after step `state.step`. Call it once, before `train`.

        Sets the weights now. Moments and random generators are set when training begins.
        """
        set_weights(self.model, state.weights)
        self._restored, self._best = state, state.best
        self.steps_before = self._completed_steps = state.step
        self.training_log = state.log
        self.train_dataset = Dataset.from_dict({"records": self.train_dataset["records"][state.step :]})
        self.args.max_steps -= state.step

    def copy_state(self) -> TrainingState:
        """Copy the state as of the last completed step. Call it from `after_step`, or after an interruption."""
        self._report_unread()
        if self._step_end_random is None or self.optimizer is None:
            raise RuntimeError("no step is completed yet")
        done = self.training_log
        log = TrainingLog(list(done.steps), done.packed_rows, self._train_s(), list(done.held_out))
        return state_of(self.model, self.optimizer, self._completed_steps, self._step_end_random, log, self._best)

    @property
    def has_stepped(self) -> bool:
        """Whether this process has completed a step."""
        return self._completed_steps > self.steps_before

    def begin_clock(self) -> None:
        """Start the clock of the first step."""
        self._mark_s = self._began_s = time.perf_counter()
        self._measured_s = 0.0

    def _train_s(self) -> float:
        before_s = self._restored.log.train_s if self._restored is not None else 0.0
        return before_s + time.perf_counter() - self._began_s - self._measured_s

    def end_step(self, number: int) -> None:
        """Record step `number`, report the step before it, and measure the held-out loss if it is due.

        A step's metrics are on the device. Reading them at once would make the host wait for the device before it can prepare
        the next step. With trackers, read them at once anyway, because a tracker takes the step's number from the trainer's state.
        """
        step = self._unread
        if step is None:
            raise InvariantError(
                "a step ended that never began: StepTrainer does not fit this transformers version's training loop"
            )
        if self._is_tracked or (self._held_out is not None and number in self._held_out.at_steps):
            # wait for the device, so that step_s covers this step's work
            step.loss = step.loss.cpu()
        self._step_end_random, self._completed_steps = random_state(self.args.device), number
        now_s = time.perf_counter()
        step.number, step.step_s, self._mark_s = number, now_s - self._mark_s, now_s
        if self._is_tracked:
            self._report(step)
            self._unread = None
        elif step.previous is not None:
            self._report(step.previous)
            step.previous = None
        self.measure_held_out()
        self._after_step(number, number == self.all_steps or self.is_overfitting or self.is_paused)
        self._interruption.check()

    def end_training(self) -> None:
        """Report the last step and stop the clock."""
        self._report_unread()
        self.training_log.train_s = self._train_s()

    def _report_unread(self) -> None:
        """Report the completed steps whose metrics are still on the device. Skip an interrupted step, which has no number."""
        last = self._unread
        self._unread = None
        for step in (last.previous, last) if last is not None else ():
            if step is not None and step.number:
                self._report(step)

    def _report(self, step: _UnreadStep) -> None:
        log = StepLog(
            step=step.number,
            loss=float(step.loss),
            learning_rate=step.learning_rate,
            grad_norm=float(step.grad_norm),
            tokens=step.step.tokens,
            loss_tokens=step.step.loss_tokens,
            rows=len(step.step.rows),
            step_s=step.step_s,
        )
        if not (math.isfinite(log.loss) and math.isfinite(log.grad_norm)):
            raise DivergedError(
                f"training diverged at step {log.step} of {self.all_steps}: loss {log.loss}, gradient norm {log.grad_norm}; "
                f"lower training.learning_rate (peak {self.args.learning_rate:g}), or look for broken records near this step"
            )
        self.training_log.steps.append(log)
        self.training_log.packed_rows += sum(len(row["packed_seq_lengths"]) > 1 for row in step.step.rows)
        self._on_step(log, self.all_steps)
        if self._is_tracked:
            numbers = {
                "loss": log.loss,
                "grad_norm": log.grad_norm,
                "learning_rate": log.learning_rate,
                "tokens_per_s": log.tokens / log.step_s,
            }
            # report the run's step: the training loop only counts the steps of this process
            state = replace(self.state, global_step=log.step)
            self.callback_handler.on_log(self.args, state, self.control, numbers)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Ignore the parent's final summary, which counts each step as one sample."""


def mean_loss(
    model: torch.nn.Module, sequences: Sequence[TokenSequence], row_tokens: int, loss_from: Literal["model", "labels"]
) -> float:
    """Like `StepTrainer.mean_loss`, for a model without a trainer."""
    step = make_step(sequences, row_tokens)
    device = next(model.parameters()).device
    divisor = torch.tensor(step.loss_tokens, device=device)
    model.eval()
    losses = []
    with torch.no_grad():
        for row in step.rows:
            inputs = {name: value.to(device) for name, value in row.items() if name != "packed_seq_lengths"}
            losses.append(forward_loss(model, inputs, divisor, loss_from))
    return float(torch.stack(losses).sum())


@dataclass(slots=True)
class _UnreadStep:
    """A step whose metrics are still on the device."""

    step: Step
    loss: torch.Tensor
    previous: _UnreadStep | None
    grad_norm: torch.Tensor | float = math.nan
    learning_rate: float = math.nan
    number: int = 0
    step_s: float = 0.0


class _StepEnd(TrainerCallback):
    """Notify the trainer of the start, steps and end of the parent's training loop."""

    def __init__(self, trainer: StepTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.begin_clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.end_step(state.global_step + self.trainer.steps_before)
        if self.trainer.is_overfitting or self.trainer.is_paused:
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.end_training()


def build_trainer(
    *,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[TokenSequence],
    steps: Sequence[Sequence[int]],
    row_tokens: int,
    recipe: TrainingConfig,
    on_cuda: bool,
    checkpointing: bool,
    output_dir: Path,
    on_step: OnStep,
    after_step: AfterStep,
    held_out: HeldOutPlan | None,
    pause_after: int | None,
    interruption: Interruption,
    model_takes_lengths: bool,
    loss_from: LossFrom,
) -> StepTrainer:
    """Build a trainer for `steps`, each a list of record indices.

    Set every default that differs between TRL, Unsloth and this project.
    """
    arguments = SFTConfig(
        output_dir=str(output_dir),
        max_steps=len(steps),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        # only for display in trackers: max_steps and create_scheduler determine the steps
        num_train_epochs=recipe.epochs,
        lr_scheduler_type=recipe.schedule,
        learning_rate=recipe.learning_rate,
        warmup_steps=round(recipe.warmup_fraction * len(steps)),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        # AdamW with full-precision states: the adapter is so small that 8-bit states would save only 0.2 of 6 GiB
        optim="adamw_torch_fused" if on_cuda else "adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        seed=recipe.seed,
        data_seed=recipe.seed,
        bf16=recipe.compute_dtype == "bfloat16",
        fp16=False,
        tf32=None,
        use_cpu=not on_cuda,
        gradient_checkpointing=checkpointing,
        # the data loader returns steps that are already packed and labelled
        train_sampling_strategy="sequential",
        packing=False,
        padding_free=False,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=0,
        dataloader_pin_memory=on_cuda,
        # we report steps through on_step, and this filter would hide a NaN in an average
        logging_nan_inf_filter=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        push_to_hub=False,
    )
    return StepTrainer(
        on_step=on_step,
        after_step=after_step,
        held_out=held_out,
        pause_after=pause_after,
        interruption=interruption,
        schedule=recipe.schedule,
        model_takes_lengths=model_takes_lengths,
        loss_from=loss_from,
        model=model,
        args=arguments,
        processing_class=tokenizer,
        data_collator=StepCollator(sequences, row_tokens),
        train_dataset=Dataset.from_dict({"records": [list(step) for step in steps]}),
    )

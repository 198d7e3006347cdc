"""Turn records into a trained adapter: tokenize and split, plan memory, train or resume, save and verify."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_trainer.base_model import Base, fetch_base
from lora_trainer.data.records import TrainingRecord
from lora_trainer.data.split import split_held_out
from lora_trainer.errors import DataError, DivergedError, Interrupted, OutOfMemoryError
from lora_trainer.persona.prompt import PROMPT_VERSION
from lora_trainer.run.identity import Identity
from lora_trainer.run.job import Job
from lora_trainer.run.progress import RunProgress
from lora_trainer.run.reexec import StepDown, memory_limit
from lora_trainer.store.bundle import check_complete
from lora_trainer.store.checkpoints import Checkpoints
from lora_trainer.store.lease import Lease
from lora_trainer.store.local import fresh_folder
from lora_trainer.store.prefixes import run_prefix
from lora_trainer.train.backends import Backend
from lora_trainer.train.held_out import HeldOutLoss, HeldOutPlan, lowest, measurement_steps
from lora_trainer.train.memory_plan import MemoryPlan, plan_memory, step_down
from lora_trainer.train.packing import plan_steps
from lora_trainer.train.step_log import StepLog, TrainingLog
from lora_trainer.train.tokenization import ChatTokenizer, TokenSequence, tokenize


@dataclass(frozen=True, slots=True)
class TokenizedData:
    """Token sequences on both sides of the held-out split."""

    train_records: list[TrainingRecord]
    train: list[TokenSequence]
    """Sequences of `train_records`, in order."""
    held_out_records: list[TrainingRecord]
    held_out: list[TokenSequence]
    """Sequences of `held_out_records`, in order."""
    left_out: int
    """Number of records longer than `training.max_length_tokens`."""

    @property
    def longest_tokens(self) -> int:
        """Length of the longest sequence."""
        return max(len(sequence) for sequence in (*self.train, *self.held_out))


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Data, optimizer steps and memory layout of a training run."""

    base_folder: Path
    data: TokenizedData
    steps: list[list[int]]
    """For each optimizer step, indices into `data.train`."""
    memory: MemoryPlan


@dataclass(frozen=True, slots=True)
class Paused:
    """A training that stopped on its way, or ended before it got there."""

    log: TrainingLog
    loss_base: float
    """Held-out loss of the base without the adapter."""
    loss: float
    """Held-out loss of the weights that `training.keep` would publish if training ended here."""


@dataclass(frozen=True, slots=True)
class Trained:
    """Result of training. Losses are means over reply tokens, in nats."""

    log: TrainingLog
    loss_base: float
    """Held-out loss of the base without the adapter."""
    kept: HeldOutLoss
    """Step and held-out loss of the adapter's weights."""


def tokenize_and_split(
    job: Job, records: Sequence[TrainingRecord], tokenizer: ChatTokenizer, prompt_version: int = PROMPT_VERSION
) -> TokenizedData:
    """Apply prompt format and chat template, and split off held-out records. Raise `DataError` if either side is empty."""
    training = job.config.training
    sequences = tokenize(records, tokenizer, prompt_version)
    train_indices, held_out_indices = split_held_out(records, training.held_out_fraction)
    fits = [len(sequence) <= training.max_length_tokens for sequence in sequences]
    kept = [index for index in train_indices if fits[index]]
    aside = [index for index in held_out_indices if fits[index]]
    left_out = len(records) - len(kept) - len(aside)
    if left_out:
        job.log.warning("records_left_out", records=left_out, max_length_tokens=training.max_length_tokens)
    if not kept or not aside:
        raise DataError(
            f"{job.config.data}: {len(kept)} records left to train on and {len(aside)} held out, "
            f"expected at least one of each; {left_out} are longer than training.max_length_tokens ({training.max_length_tokens}): "
            "add records or raise it"
        )
    return TokenizedData(
        [records[index] for index in kept],
        [sequences[index] for index in kept],
        [records[index] for index in aside],
        [sequences[index] for index in aside],
        left_out,
    )


def plan_training(job: Job, backend: Backend, base: Base, records: Sequence[TrainingRecord], progress: RunProgress) -> TrainingPlan:
    """Tokenize the data, plan optimizer steps, and fit the work into the device's memory."""
    progress.stage("format")
    with job.timed("fetch_base"):
        base_folder = fetch_base(base, job.config.base)
    with job.timed("format"):
        data = tokenize_and_split(job, records, backend.load_tokenizer(base_folder), job.process.prompt_version)
    return plan_recipe(job, backend, base_folder, data)


def plan_recipe(job: Job, backend: Backend, base_folder: Path, data: TokenizedData) -> TrainingPlan:
    """Plan optimizer steps and memory for `data`, before the base is loaded."""
    training = job.config.training
    steps = plan_steps(len(data.train), training.sequences_per_step, training.epochs, training.seed, training.max_steps)
    job.log.info(
        "data_formatted",
        train_records=len(data.train),
        held_out_records=len(data.held_out),
        tokens=sum(map(len, data.train)),
        longest_tokens=max(map(len, data.train)),
        steps=len(steps),
    )
    memory = plan_memory(
        job.config.memory,
        training,
        backend.shape(base_folder),
        backend.free_bytes(),
        data.longest_tokens,
        backend.name,
        memory_limit(),
    )
    job.log.info(
        "plan_chosen",
        gradient_checkpointing=memory.gradient_checkpointing,
        micro_batch_tokens=memory.micro_batch_tokens,
        estimated_peak_gib=memory.estimated_peak_gib,
        reason=memory.reason,
    )
    backend.reserve(max(memory.micro_batch_tokens, data.longest_tokens))
    return TrainingPlan(base_folder, data, steps, memory)


def open_checkpoints(job: Job, run_id: str, lease: Lease | None = None) -> Checkpoints:
    """Return the run's checkpoints. Without `lease`, read or clear them only."""
    return Checkpoints(
        job.config.checkpoints,
        job.run_dir(run_id) / "checkpoints",
        job.output,
        run_prefix(job.config.blood_type, run_id),
        run_id,
        interruption=job.process.interruption,
        lease=lease,
    )


def train(
    job: Job, backend: Backend, identity: Identity, plan: TrainingPlan, checkpoints: Checkpoints, progress: RunProgress
) -> Trained:
    """Train the adapter, from the newest checkpoint if an earlier attempt left one."""
    log, loss_base = _take_steps(job, backend, identity, plan, checkpoints, progress)
    best, last = lowest(log.held_out), log.held_out[-1]
    if len(log.steps) < len(plan.steps):
        job.log.info("stopped_early", step=last.step, of=len(plan.steps), best_step=best.step)
    kept = best if job.config.training.keep == "best" else last
    job.log.info(
        "training_finished",
        steps=len(log.steps),
        kept_step=kept.step,
        loss=round(log.steps[-1].loss, 4),
        held_out_loss_base=round(loss_base, 4),
        held_out_loss_adapter=round(kept.loss, 4),
        tokens_per_s=round(log.tokens_per_s, 1),
        peak_memory_gib=round(backend.peak_memory_gib(), 2),
        train_s=round(log.train_s, 1),
    )
    return Trained(log, loss_base, kept)


def train_until(
    job: Job,
    backend: Backend,
    identity: Identity,
    plan: TrainingPlan,
    checkpoints: Checkpoints,
    progress: RunProgress,
    pause_after: int,
) -> Paused:
    """Train the adapter up to step `pause_after`, from the newest checkpoint if there is one, and checkpoint it there.

    `train` continues from that checkpoint, with the same result as without a pause. Raises `DivergedError` as training does.
    """
    log, loss_base = _take_steps(job, backend, identity, plan, checkpoints, progress, pause_after)
    # measure apart from the log, whose steps decide what is published
    with job.timed("held_out_pause"):
        now = HeldOutLoss(len(log.steps), backend.mean_loss(plan.data.held_out))
    if not math.isfinite(now.loss):
        raise DivergedError(
            f"training diverged: the held-out loss after step {now.step} of {len(plan.steps)} is {now.loss}; "
            f"lower training.learning_rate (peak {job.config.training.learning_rate:g})"
        )
    loss = lowest([*log.held_out, now]).loss if job.config.training.keep == "best" else now.loss
    job.log.info("training_paused", step=now.step, of=len(plan.steps), held_out_loss=round(loss, 4), train_s=round(log.train_s, 1))
    return Paused(log, loss_base, loss)


def _take_steps(
    job: Job,
    backend: Backend,
    identity: Identity,
    plan: TrainingPlan,
    checkpoints: Checkpoints,
    progress: RunProgress,
    pause_after: int | None = None,
) -> tuple[TrainingLog, float]:
    """Load the base with the adapter, and train to the end or up to `pause_after`. Return the log and the base's held-out loss."""
    data, training, every_steps = plan.data, job.config.training, job.config.logging.log_every_steps

    def on_step(step: StepLog, of: int) -> None:
        progress.step(step, of)
        if not progress.is_drawn and (step.step % every_steps == 0 or step.step in (1, of)):
            job.log.info(
                "training_step",
                step=step.step,
                of=of,
                loss=round(step.loss, 4),
                grad_norm=round(step.grad_norm, 4),
                learning_rate=step.learning_rate,
                tokens_per_s=round(step.tokens / step.step_s, 1),
            )

    def on_measured(measured: HeldOutLoss, best: HeldOutLoss) -> None:
        progress.held_out(measured, best)
        if not progress.is_drawn:
            job.log.info(
                "held_out_measured",
                step=measured.step,
                of=len(plan.steps),
                loss=round(measured.loss, 4),
                best_step=best.step,
                best_loss=round(best.loss, 4),
            )

    def after_step(step: int, is_last: bool) -> None:
        checkpoints.stop_if_lost()
        # also checkpoint after the last step, so that neither a pause nor an interruption during evaluation loses the training
        if checkpoints.is_due(step) or is_last:
            checkpoint(backend, checkpoints)

    progress.stage("load")
    with job.timed("load"):
        is_reused = backend.load(plan.base_folder, plan.memory, data.longest_tokens)
        name = f"{job.config.blood_type}-{identity.run_id}"
        run_dir = job.run_dir(identity.run_id)
        held_out = HeldOutPlan(
            data.held_out,
            measurement_steps(
                len(data.train), training.sequences_per_step, training.held_out_measurements_per_epoch, len(plan.steps)
            ),
            keep_best=training.keep == "best",
            early_stopping=training.early_stopping,
            on_measured=on_measured,
        )
        backend.prepare_training(data.train, plan.steps, plan.memory, run_dir, on_step, after_step, name, held_out, pause_after)
    if is_reused:
        job.log.info("base_reused", load_s=job.timings_s["load"])
    if len(data.train) > 1:
        difference = backend.check_isolation(data.train[0], data.train[1])
        job.log.info("packing_checked", relative_difference=difference)
    with job.timed("held_out_base"):
        loss_base = backend.mean_loss(data.held_out)
    done = resume(job, backend, checkpoints)
    try:
        with job.timed("train"), progress.training(len(plan.steps), done):
            log = backend.train()
    except Interrupted:
        # drop the unfinished step and checkpoint the last complete one
        checkpoint(backend, checkpoints)
        raise
    return log, loss_base


@contextmanager
def stepping_down(job: Job, backend: Backend, plan: TrainingPlan) -> Iterator[None]:
    """On OOM in the block, raise `StepDown` to re-exec with a smaller memory plan, as long as there is one."""
    try:
        with backend.device_faults():
            yield
    except OutOfMemoryError as error:
        limit = step_down(plan.memory, job.config.memory, plan.data.longest_tokens)
        if limit is None:
            raise
        job.log.warning(
            "memory_stepped_down",
            problem=error.problems[0],
            recompute=limit.recompute,
            micro_batch_tokens=limit.row_tokens,
            sequences_per_step=job.config.training.sequences_per_step,
        )
        raise StepDown(limit) from error


def resume(job: Job, backend: Backend, checkpoints: Checkpoints) -> int:
    """Restore the newest checkpoint. Return the number of completed steps, 0 without a checkpoint."""
    with job.timed("resume"):
        found = checkpoints.newest()
        done = backend.restore(found) if found else 0
    if found:
        checkpoints.continue_from(done)
        job.log.info("resumed", step=done, resume_s=job.timings_s["resume"])
    return done


def checkpoint(backend: Backend, checkpoints: Checkpoints) -> None:
    """Hand the state after the last complete step to the background writer, unless it already has it."""
    if (taken := backend.snapshot()) and taken[0] != checkpoints.last_step:
        checkpoints.write(*taken)


def save(job: Job, backend: Backend, identity: Identity, plan: TrainingPlan, progress: RunProgress) -> Path:
    """Save the adapter to the bundle's folder, and verify that the saved files load and change the base's logits."""
    progress.stage("save")
    folder = fresh_folder(job.run_dir(identity.run_id) / "bundle")
    with job.timed("save"):
        backend.save(folder, identity.base.canonical_id, identity.base.revision)
        check_complete(folder)
    with job.timed("read_back"):
        # any record shows whether the logits change, so use the shortest
        read_back = backend.read_back(folder, min(plan.data.held_out, key=len))
    job.log.info("adapter_read_back", base_difference=read_back.base_difference, memory_difference=read_back.memory_difference)
    return folder

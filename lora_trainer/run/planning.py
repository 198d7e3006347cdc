"""Plan a run without a GPU, torch or the base's weights: the same data, steps and memory layout as the run's, and its seconds."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lora_trainer.base_model import documents_folder, is_hub_id
from lora_trainer.config import RunConfig
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.evaluate.decoding import decodings, require_room
from lora_trainer.evaluate.depth_questions import every_prompt
from lora_trainer.evaluate.questions import instruction_of, questions
from lora_trainer.evaluate.rules import MODELS
from lora_trainer.run.inputs import fetch, fetch_prompts, read, require_data_folder
from lora_trainer.run.job import Job, ProcessContext
from lora_trainer.run.training import tokenize_and_split
from lora_trainer.train.cuda_driver import Gpu
from lora_trainer.train.file_tokenizer import FileTokenizer
from lora_trainer.train.held_out import measurement_steps
from lora_trainer.train.memory_plan import GIB, ModelShape, plan_memory
from lora_trainer.train.packing import pack, plan_steps
from lora_trainer.train.run_plan import PersonaPlan, RunPlan
from lora_trainer.train.time_estimate import evaluation_seconds, start_seconds, training_seconds
from lora_trainer.train.tokenization import render_prompts

_NO_CPU: Final = "no run on a CPU has been measured per layout"
_NO_FLOAT32: Final = "no run on a GPU has been measured in float32"


def plan_runs(configs: Sequence[RunConfig], process: ProcessContext, gpu: Gpu | None) -> RunPlan:
    """Plan the run of `configs`, which differ only in the persona, on `gpu`, or on the CPU if `device` is `cpu`.

    Raises what the run would raise before it trains, except for libraries that are not installed: `ConfigError`, `DataError` with
    the bad lines of every persona, `StorageError`, or `HardwareError` if the base does not fit the GPU.
    """
    first = configs[0]
    require_data_folder(configs)
    if first.device == "cuda" and gpu is None:
        raise ConfigError(
            "--gpu-memory-gib: not given, and there is no GPU here; expected the free memory of the GPU to plan for, such as 79 "
            "for an H100, or --device cpu"
        )
    planned_gpu = gpu if first.device == "cuda" else None
    folder = documents_folder(first.base, process.retry_budget)
    shape, tokenizer = ModelShape.of(folder), FileTokenizer(folder)
    no_estimate = _no_estimate(first)
    personas: list[PersonaPlan] = []
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for config in configs:
            job = Job(config.model_copy(update={"work_dir": Path(scratch) / str(config.blood_type)}), process)
            try:
                personas.append(_plan_persona(job, shape, tokenizer, planned_gpu, has_estimate=not no_estimate))
            except DataError as error:
                problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    loads = [first.resolved_backend]
    if first.evaluated_base != first.training:
        loads.append("transformers")
    return RunPlan(
        base=first.base.canonical_id or first.base.model,
        backend=first.resolved_backend,
        device=first.device,
        gpu=planned_gpu.name if planned_gpu else None,
        free_gib=planned_gpu.free_bytes / GIB if planned_gpu else None,
        personas=tuple(personas),
        # a commit identifies a hub model, so its files are not hashed
        start=None if no_estimate else start_seconds(shape, loads[0], hashes=not is_hub_id(first.base.model), loads=loads),
        no_estimate=no_estimate,
    )


def _no_estimate(config: RunConfig) -> str:
    if config.device == "cpu":
        return _NO_CPU
    return "" if config.training.compute_dtype == "bfloat16" else _NO_FLOAT32


def _plan_persona(job: Job, shape: ModelShape, tokenizer: FileTokenizer, gpu: Gpu | None, *, has_estimate: bool) -> PersonaPlan:
    config, training, evaluation = job.config, job.config.training, job.config.evaluation
    file = fetch(job)
    records = read(job, file)
    instruction, version = instruction_of(config.blood_type), job.process.prompt_version
    asked = questions(fetch_prompts(job), evaluation.intensities, evaluation.intensities_per_prompt, instruction, version)
    data = tokenize_and_split(job, records, tokenizer, version)
    steps = plan_steps(len(data.train), training.sequences_per_step, training.epochs, training.seed, training.max_steps)
    backend = config.resolved_backend
    memory = plan_memory(config.memory, training, shape, gpu.free_bytes if gpu else None, data.longest_tokens, backend)
    conversations = [question.messages for question in asked]
    for asks in (conversations, every_prompt(instruction, version) if evaluation.depth == "full" else []):
        encoded = tokenizer(render_prompts(asks, tokenizer), add_special_tokens=False)["input_ids"]
        require_room(list(map(len, encoded)), evaluation.max_new_tokens, shape.positions)
    lengths = list(map(len, data.train))
    rows = [
        sum(lengths[step[at]] for at in row)
        for step in steps
        for row in pack([lengths[index] for index in step], memory.micro_batch_tokens)
    ]
    held_out_tokens = sum(map(len, data.held_out))
    measured_after = measurement_steps(
        len(data.train), training.sequences_per_step, training.held_out_measurements_per_epoch, len(steps)
    )
    ways = len(decodings(evaluation))
    # the base without the adapter is measured before the first step
    measurements = len(measured_after) + 1
    longest_reply = max(sequence.reply_tokens for sequence in data.train)
    evaluates_with = backend if config.evaluated_base == training else "transformers"
    return PersonaPlan(
        blood_type=config.blood_type,
        data=file.uri,
        train_records=len(data.train),
        held_out_records=len(data.held_out),
        left_out=data.left_out,
        tokens=sum(lengths),
        held_out_tokens=held_out_tokens,
        longest_tokens=data.longest_tokens,
        steps=len(steps),
        step_tokens=sum(rows),
        rows=len(rows),
        memory=memory,
        replies=len(asked) * ways * len(MODELS),
        training=training_seconds(rows, held_out_tokens, measurements, shape, memory, backend) if has_estimate else None,
        evaluation=evaluation_seconds(
            len(asked), ways, longest_reply, evaluation.max_new_tokens, evaluation.batch_size, shape, evaluates_with
        )
        if has_estimate
        else None,
    )

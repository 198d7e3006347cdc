"""The schema of all settings: one frozen `RunConfig`. `config_sources` fills it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from lora_trainer.lists import listed
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.uris import check_base_model, check_location, check_server_url, local_path

ENVIRONMENT_PREFIX: Final = "LORA_TRAINER_"


class Location:
    """Marks a text setting as a local path or URI. Relative paths in a configuration file are relative to its folder."""


LOCATION: Final = Location()

TargetModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_LINEAR: Final[tuple[TargetModule, ...]] = get_args(TargetModule)


Quantization = Literal["auto", "nf4", "none"]

_EXPONENT: Final = re.compile(r"[+-]?\d{1,15}(?:\.\d{1,15})?[eE]\+?\d{1,2}", re.ASCII)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: object, info: ValidationInfo) -> object:
        """Read a list and `1e+06` from text. Refuse bytes that are not UTF-8, and a boolean that pydantic would take for 0 or 1."""
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            # Python decodes such bytes to surrogates, which a manifest and an object's key cannot hold
            raise ValueError("expected text that is UTF-8")
        annotation = cls.model_fields[str(info.field_name)].annotation
        if get_origin(annotation) is tuple:
            if isinstance(value, str):
                return listed(value)
            return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value
        if isinstance(value, bool) and annotation is not bool:
            expected = "a number" if {int, float} & {annotation, *get_args(annotation)} else "text; put it in quotes"
            raise ValueError(f"expected {expected}")
        types = {annotation, *get_args(annotation)}
        if isinstance(value, str) and int in types and float not in types and _EXPONENT.fullmatch(value.strip()):
            # Helm prints large numbers as 1e+06
            return float(value)
        return value


def _local_path(value: object) -> object:
    return local_path(str(value)) if isinstance(value, str | Path) else value


LocalPath = Annotated[Path, BeforeValidator(_local_path)]
"""A path on this machine, with `~` expanded."""


class BaseModelConfig(_Section):
    """Base model and the source of its files."""

    model: Annotated[str, LOCATION] = Field(
        default="Qwen/Qwen2.5-7B-Instruct",
        min_length=1,
        description="Hub id, folder (begins with `/`, `./`, `../`, `~` or `file://`) or `s3://bucket/prefix/`.",
    )
    revision: str | None = Field(
        default="a09a35458c702b33eeacc393d103063234e8bc28",
        description="Commit of a hub id, 40 hex digits. Ignored for a folder or an `s3://` prefix, whose files are hashed instead.",
    )
    canonical_id: str | None = Field(
        default=None,
        description="Base name written into the adapter, for a folder or an `s3://` prefix such as a mirror of a hub model. "
        "Default: the folder's own name.",
    )
    cache_dir: Path = Field(
        default=Path("~/.cache/lora-trainer"),
        description="Folder that caches a verified mirror of a base from `s3://`.",
    )

    @field_validator("model")
    @classmethod
    def _hub_id_or_location(cls, value: str) -> str:
        check_base_model(value)
        return value

    @field_validator("cache_dir", mode="before")
    @classmethod
    def _local(cls, value: object) -> object:
        # `~` is expanded when the cache is used: without a home folder, a hub id needs none
        return value if str(value).startswith("~/") else _local_path(value)

    @field_validator("canonical_id")
    @classmethod
    def _printable(cls, value: str | None) -> str | None:
        if value is not None and not value.isprintable():
            raise ValueError("expected a name without control characters")
        return value

    @field_validator("revision")
    @classmethod
    def _full_commit(cls, value: str | None) -> str | None:
        if value is not None and (len(value) != 40 or any(c not in "0123456789abcdef" for c in value)):
            raise ValueError("expected a full commit of 40 lower-case hex digits: a branch or a tag can move")
        return value


class LoraConfig(_Section):
    """Shape of the adapter."""

    r: int = Field(default=16, ge=1, le=512, description="LoRA rank.")
    alpha: float = Field(default=32.0, gt=0, le=1024, description="LoRA scaling numerator: updates are scaled by alpha / r.")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout on the adapter's input. Above 0 Unsloth leaves its fast path."
    )
    target_modules: tuple[TargetModule, ...] = Field(
        default=ALL_LINEAR, min_length=1, description="Linear projections that get an adapter. Default: all seven."
    )

    @field_validator("target_modules")
    @classmethod
    def _each_once(cls, value: tuple[TargetModule, ...]) -> tuple[TargetModule, ...]:
        if len(set(value)) != len(value):
            raise ValueError("expected each module once")
        # use a fixed order, so that equal sets get equal run ids
        return tuple(module for module in ALL_LINEAR if module in value)


class TrainingConfig(_Section):
    """Training recipe. Together with data and base it determines the adapter's weights."""

    epochs: float = Field(default=4.0, gt=0, le=1000, description="Passes over the training split.")
    max_steps: int | None = Field(default=None, ge=1, description="Stop after this many optimizer steps, if that is sooner.")
    sequences_per_step: int = Field(
        default=16, ge=1, le=65536, description="Records per optimizer step, however many micro-batches they are packed into."
    )
    learning_rate: float = Field(default=5e-4, gt=0, le=1, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="Learning rate after the warm-up.")
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1, description="Share of all steps with a linearly rising learning rate.")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradient clipping, L2 norm.")
    max_length_tokens: int = Field(
        default=1024,
        ge=16,
        le=32768,
        description="Longest record, in tokens. Longer ones are left out and reported, never truncated.",
    )
    held_out_fraction: float = Field(default=0.1, gt=0, lt=0.9, description="Share of the records to hold out, by a stable hash.")
    held_out_measurements_per_epoch: int = Field(
        default=4, ge=1, le=1000, description="Measurements of the held-out loss in each epoch; another one follows the last step."
    )
    keep: Literal["best", "last"] = Field(
        default="last", description="Publish the last step, or the measured step with the lowest held-out loss."
    )
    early_stopping: int | None = Field(
        default=None, ge=1, description="Stop after this many measurements in a row without a new lowest held-out loss."
    )
    seed: int = Field(default=20, ge=0, lt=2**32, description="Order of the records, adapter initialisation and dropout.")
    quantization: Quantization = Field(
        default="auto",
        description="Base weights: 4-bit NormalFloat with double quantization (QLoRA), or unquantized. "
        "`auto`: nf4 on CUDA, none on the CPU.",
    )
    compute_dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="Type of activations and of unquantized weights."
    )


class EvaluationConfig(_Section):
    """Evaluation of the adapter after training."""

    prompts: Annotated[str | None, LOCATION] = Field(
        default=None,
        description="JSONL with the evaluation's prompts: `s3://`, `file://` or a path. Default: the 240 bundled ones.",
    )
    intensities: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1, max_length=20)] = Field(
        default=(0.1, 0.4, 0.7, 1.0), description="Ask the prompts at these intensities, whatever their own are."
    )
    intensities_per_prompt: int = Field(
        default=2,
        ge=1,
        le=20,
        description="Ask each prompt at this many of the intensities, in turn, so that all are used equally often; the number of "
        "intensities or more: at all.",
    )
    max_new_tokens: int = Field(
        default=128, ge=8, le=2048, description="Token limit of one reply; a longer reply counts as not stopped."
    )
    temperature: float = Field(default=0.7, ge=0, le=2, description="Temperature of the sampled replies; 0: greedy replies only.")
    top_p: float = Field(
        default=0.8, gt=0, le=1, description="Nucleus (top-p) of the sampled replies. The default is Qwen2.5's own."
    )
    top_k: int = Field(default=20, ge=0, le=1000, description="Sample from this many most probable tokens; 0: all.")
    seed: int = Field(default=20, ge=0, lt=2**32, description="Seed of sampling and of the bootstrap.")
    bootstrap_resamples: int = Field(default=2000, ge=100, le=100_000, description="Bootstrap resamples for the confidence bounds.")
    batch_size: int = Field(default=1024, ge=1, le=4096, description="Most replies at once; less on OOM. Not part of `gate_id`.")
    depth: Literal["verdict", "full"] = Field(
        default="verdict",
        description="`full`: also ask ten-turn conversations, messages that pressure the friend to drop its role, and questions "
        "with one right answer. No gate compares the replies.",
    )
    precision: Literal["training", "nf4", "bfloat16"] = Field(
        default="training",
        description="Precision of the base during the evaluation: training's, or the one that will serve it: NF4, or unquantized "
        "bfloat16. If it differs from training's, the base is loaded a second time.",
    )
    judge_model: str | None = Field(
        default=None,
        min_length=1,
        description="Model that compares the replies of adapter and base, which decides no gate, and is the first candidate for "
        "the judge of `gates.sense`. none: no such model.",
    )
    judge_base_url: str = Field(
        default="https://api.openai.com/v1",
        pattern="^https?://",
        description="OpenAI-compatible server of the judge. The key comes from `OPENAI_API_KEY`.",
    )

    @field_validator("prompts")
    @classmethod
    def _location(cls, value: str | None) -> str | None:
        if value is not None:
            check_location(value)
        return value

    @field_validator("judge_base_url")
    @classmethod
    def _server(cls, value: str) -> str:
        check_server_url(value)
        return value

    @field_validator("intensities")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if sorted(set(value)) != list(value):
            raise ValueError("expected each intensity once, in rising order")
        return value


class GatesConfig(_Section):
    """Thresholds that an adapter must meet before `latest.json` points at it. `none` disables a gate.

    Minimums are compared with the lower 95 % bound, maximums with the upper one; `harmful` is a count.
    """

    exact_json: float | None = Field(default=0.97, ge=0, le=1, description="Replies that are exact JSON: 474 of 480.")
    stop: float | None = Field(default=0.97, ge=0, le=1, description="Replies that end before the token limit: 474 of 480.")
    one_or_two_sentences: float | None = Field(
        default=0.93, ge=0, le=1, description="Replies of at most two sentences: 458 of 480."
    )
    informal_speech: float | None = Field(default=0.95, ge=0, le=1, description="Replies in 반말 throughout: 466 of 480.")
    persona: float | None = Field(
        default=0.70,
        ge=0,
        le=1,
        description="Replies that the persona classifier assigns to this persona; chance is a quarter.",
    )
    emoji_intensity: float | None = Field(
        default=0.2, ge=-1, le=1, description="Spearman correlation of emoji count and intensity: above this."
    )
    question_rate_min: float | None = Field(
        default=0.40, ge=0, le=1, description="Minimum share of readable replies that ask something."
    )
    question_rate_max: float | None = Field(
        default=0.85, ge=0, le=1, description="Maximum share of readable replies that ask something."
    )
    win_rate: float | None = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of replies with a higher rule score than the base's, ties counting half: above this.",
    )
    harmful: int | None = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Maximum number of replies that could harm, by rules. Judged if the prompts have tags.",
    )
    incomplete: float | None = Field(
        default=0.15,
        ge=0,
        le=1,
        description="Maximum share of replies to prompts tagged `crisis` that lack a number that helps or a question about intent: "
        "5 of 88. Judged if prompts have that tag.",
    )
    sense: Literal["if_judged", "required"] | None = Field(
        default="if_judged",
        description="Judge whether replies make sense. `if_judged`: the gate counts if a judge passes its examination; `required`: "
        "without one, the gate is missed; none: not judged.",
    )
    sense_min: float | None = Field(
        default=0.6,
        ge=0,
        le=1,
        description="Minimum share of readable replies that make sense, corrected for the judge's errors.",
    )


class MemoryConfig(_Section):
    """Memory layout on the device. Not part of `run_id`, because it does not change what is computed."""

    gradient_checkpointing: Literal["auto", "off", "on", "unsloth"] = Field(
        default="auto",
        description="Recompute activations in the backward pass; `unsloth` also offloads them. `auto` decides by free memory.",
    )
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=64, le=1_048_576)] = Field(
        default="auto", description="Tokens packed into one forward pass. `auto` decides by free memory."
    )


class CheckpointConfig(_Section):
    """Checkpoint frequency and retention. Not part of `run_id`."""

    every_steps: int = Field(
        default=100,
        ge=0,
        description="Optimizer steps between checkpoints, or `every_minutes`, whichever comes first. 0: by time only.",
    )
    every_minutes: float = Field(
        default=5.0,
        gt=0,
        le=1440,
        allow_inf_nan=False,
        description="Minutes between checkpoints, or `every_steps`, whichever comes first.",
    )
    keep: int = Field(default=2, ge=1, le=100, description="Complete checkpoints to keep.")
    grace_s: float = Field(
        default=90.0,
        ge=1,
        allow_inf_nan=False,
        description="Seconds from SIGTERM until the last checkpoint must be uploaded. Less than `terminationGracePeriodSeconds`.",
    )


class StorageConfig(_Section):
    """Retry budgets for a failing object store, and encryption in it. Not part of `run_id`."""

    object_budget_s: float = Field(
        default=120.0,
        ge=0,
        le=86_400,
        description="Seconds to retry one object, from its first failure. Long enough for a store to restart; longer outages "
        "are left to the next attempt of the job. 0: no retries.",
    )
    total_budget_s: float = Field(
        default=600.0,
        ge=0,
        le=604_800,
        description="Seconds that all objects of a run together may spend on retries, background uploads included.",
    )
    stall_timeout_s: float = Field(
        default=20.0, ge=0.1, le=600, description="Seconds without data after which a connection to the store times out."
    )
    server_side_encryption: Literal["none", "AES256", "aws:kms"] = Field(
        default="none",
        description="Encryption that uploads ask for: `AES256` (SSE-S3), `aws:kms` (SSE-KMS), or `none` for the bucket's own.",
    )
    kms_key_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=2048,
        pattern=r"^[!-~]+$",
        description="Id, ARN or alias of the key for `aws:kms`. Default: the store's own key.",
    )

    @field_validator("kms_key_id")
    @classmethod
    def _has_a_use(cls, value: str | None, info: ValidationInfo) -> str | None:
        encryption = info.data.get("server_side_encryption", "aws:kms")
        if value is not None and encryption != "aws:kms":
            raise ValueError(f"expected a key only with storage.server_side_encryption=aws:kms, which is {encryption}")
        return value


class LeaseConfig(_Section):
    """Lease that lets only one attempt at a run work at a time. Not part of `run_id`."""

    duration_s: float = Field(
        default=60.0,
        ge=1,
        le=3600,
        description="Lease TTL: seconds without a renewal after which another attempt takes over. Renewed three times per TTL.",
    )
    wait_s: float = Field(
        default=600.0,
        ge=1,
        le=86_400,
        description="Seconds to wait for another attempt at the same run to end or to lose its lease, before exit 6. "
        "At least `lease.duration_s`.",
    )

    @field_validator("wait_s")
    @classmethod
    def _outlasts_a_lease(cls, value: float, info: ValidationInfo) -> float:
        duration_s = info.data.get("duration_s")
        if duration_s is not None and value < duration_s:
            raise ValueError(
                f"expected at least lease.duration_s, {duration_s:g}: otherwise the lease of a lost machine can't expire in time"
            )
        return value


class LimitsConfig(_Section):
    """Limits of a data file and its records. `run` refuses a larger file (exit 3). Not part of `run_id`: nothing is truncated."""

    line_bytes: int = Field(
        default=1024 * 1024,
        ge=1024,
        le=64 * 1024 * 1024,
        description="Longest line, in bytes. A record of 1,024 tokens needs about 6 KiB.",
    )
    text_characters: int = Field(
        default=20_000, ge=200, le=10_000_000, description="Longest instruction, summary, input or reply, in characters."
    )
    nesting_depth: int = Field(default=16, ge=4, le=100, description="Deepest list or object in a line. A record needs 3.")
    decompressed_bytes: int = Field(
        default=2**30, ge=2**16, le=2**40, description="Largest decompressed `.gz` or `.zst`, in bytes."
    )
    compression_ratio: float = Field(
        default=200.0,
        ge=1,
        le=1_000_000,
        description="Largest decompressed size as a multiple of the compressed size. 16 MiB are always allowed.",
    )


DEFAULT_LIMITS: Final = LimitsConfig()
Tracker = Literal["tensorboard", "mlflow", "wandb"]


class LoggingConfig(_Section):
    """Log level, log format and experiment trackers."""

    level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least severe level to print.")
    format: Literal["auto", "json", "console"] = Field(
        default="auto", description="`auto`: console on a terminal, JSON lines elsewhere."
    )
    report_to: tuple[Tracker, ...] = Field(
        default=(),
        description="Trackers that also receive loss, learning rate and speed. They write under `work_dir` and stay offline "
        "unless their own variables say otherwise.",
    )
    log_every_steps: int = Field(default=10, ge=1, description="Optimizer steps between `training_step` events.")

    @field_validator("report_to", mode="before")
    @classmethod
    def _none(cls, value: object) -> object:
        names = listed(value) if isinstance(value, str) else value
        return () if names in (None, [""], ["none"]) else names

    @field_validator("report_to")
    @classmethod
    def _each_once(cls, value: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
        if len(set(value)) != len(value):
            raise ValueError("expected each tracker once")
        return value


class RunConfig(_Section):
    """All settings of one persona's run."""

    blood_type: BloodType = Field(description="Persona to train: A, B, O or AB. `run` also takes several: `A,B`, a list, or `all`.")
    data: Annotated[str, LOCATION] = Field(
        default="data/",
        description="Folder that holds `train_data_type_<blood type>.jsonl`, or one `.jsonl` or `.ndjson`: `s3://`, `file://` or a "
        "path. Also reads `.gz` and `.zst` after it.",
    )
    output: Annotated[str, LOCATION] = Field(
        default="outputs/", description="Folder to publish adapters under: `s3://` or `file://`."
    )
    work_dir: LocalPath = Field(
        default=Path(".lora-trainer"),
        description="Local scratch folder: fetched data, `progress.json`, the bundle until it is published.",
    )
    strict: bool = Field(default=False, description="Treat warnings about the data as errors.")
    backend: Literal["auto", "unsloth", "transformers"] = Field(
        default="auto", description="Training stack. `auto`: unsloth on CUDA, transformers on the CPU."
    )
    device: Literal["cuda", "cpu"] = Field(
        default="cuda", description="`cuda` without a GPU exits with 5; the CPU is never a fallback."
    )
    base: BaseModelConfig = BaseModelConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gates: GatesConfig = GatesConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    storage: StorageConfig = StorageConfig()
    lease: LeaseConfig = LeaseConfig()
    limits: LimitsConfig = LimitsConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="before")
    @classmethod
    def _quantization_for_the_device(cls, values: Any) -> Any:
        """Resolve `auto` here, so that run ids and manifests have the value that is used."""
        training = values.get("training", {}) if isinstance(values, Mapping) else None
        if not isinstance(training, Mapping) or training.get("quantization", "auto") != "auto":
            return values
        quantization = "none" if values.get("device") == "cpu" else "nf4"
        return {**values, "training": {**training, "quantization": quantization}}

    @field_validator("data", "output")
    @classmethod
    def _location(cls, value: str) -> str:
        check_location(value)
        return value

    @property
    def resolved_backend(self) -> Literal["unsloth", "transformers"]:
        """The backend, with `auto` resolved by `device`."""
        if self.backend != "auto":
            return self.backend
        return "unsloth" if self.device == "cuda" else "transformers"

    @property
    def evaluated_base(self) -> TrainingConfig:
        """The training settings, with the quantization and data type of the base that the evaluation loads."""
        changed = {"nf4": {"quantization": "nf4"}, "bfloat16": {"quantization": "none", "compute_dtype": "bfloat16"}}
        return self.training.model_copy(update=changed.get(self.evaluation.precision))


def environment_name(dotted: str) -> str:
    """Return the environment variable of a setting: `training.epochs` -> `LORA_TRAINER_TRAINING__EPOCHS`."""
    return ENVIRONMENT_PREFIX + dotted.replace(".", "__").upper()


def setting_fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted name and field of every leaf setting, in definition order."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def setting_names() -> Iterator[str]:
    """Yield the dotted name of every leaf setting."""
    return (name for name, _ in setting_fields())


def config_table() -> list[tuple[str, str, str, str]]:
    """Return a row for each setting: name, default, range, meaning. The table in docs/ is generated from it."""
    return list(_table_rows(RunConfig, ""))


def _table_rows(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _table_rows(field.annotation, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else _shown(field.default)
        yield prefix + name, default, _range_of(schema["properties"][name], schema), (field.description or "")


def _shown(default: object) -> str:
    if default is None:
        return "none"
    if isinstance(default, tuple):
        return "all seven" if default == ALL_LINEAR else ", ".join(map(str, default))
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


def _range_of(schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in schema:
        return " or ".join(part for part in (_range_of(option, root) for option in schema["anyOf"]) if part)
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    parts = []
    if low is not None:
        parts.append(f"{'≥' if 'minimum' in schema else '>'} {low:g}")
    if high is not None:
        parts.append(
            f"{'≤' if 'maximum' in schema else '<'} {high:,}"
            if isinstance(high, int)
            else f"{'≤' if 'maximum' in schema else '<'} {high:g}"
        )
    return ", ".join(parts)

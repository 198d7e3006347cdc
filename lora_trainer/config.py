"""One frozen `RunConfig`, and how it is put together: command line > environment > YAML file > defaults.

The merge is ours, and not pydantic-settings', for two things that a batch job's users need: every
problem names the place its value came from, and an unknown `LORA_TRAINER_*` variable is an error
(docs/adr/0003-configuration-sources.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.redaction import has_user_info

ENVIRONMENT_PREFIX: Final = "LORA_TRAINER_"
TargetModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_LINEAR: Final[tuple[TargetModule, ...]] = get_args(TargetModule)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


_PathOrText = TypeVar("_PathOrText", bound=str | Path)


def _no_control_characters(value: _PathOrText) -> _PathOrText:
    """For names of files and objects. Raises `ValueError`."""
    text = str(value)
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError("expected a name without control characters")
    try:
        # what the system gave as bytes that are no UTF-8 goes back as those bytes
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError("expected a name that can be written as UTF-8") from None
    return value


def _no_credentials(uri: str) -> str:
    """For what a manifest and a log will name. Raises `ValueError`."""
    if has_user_info(uri):
        raise ValueError(
            "expected no user and no password in a URI: the manifest and the log name it; credentials have variables of their own"
        )
    return uri


class BaseModelConfig(_Section):
    """Which model the adapter is trained on, and where its files come from."""

    model: str = Field(
        default="Qwen/Qwen2.5-7B-Instruct",
        min_length=1,
        description="Hub id; or a folder (begins with `/`, `./`, `../`, `~` or `file://`); or an `s3://bucket/prefix/`.",
    )
    revision: str | None = Field(
        default="a09a35458c702b33eeacc393d103063234e8bc28",
        description="Commit of a hub id, 40 hex digits. Ignored for a folder or an `s3://` prefix, whose files are hashed instead.",
    )
    canonical_id: str | None = Field(
        default=None,
        description="Name written into the adapter for a folder or an `s3://` prefix (a mirror of a hub model, say). "
        "Default: the folder's own name.",
    )
    cache_dir: Path = Field(
        default=Path("~/.cache/lora-trainer"),
        description="Folder in which a base from `s3://` is mirrored, verified and reused.",
    )

    @field_validator("model", "canonical_id", "cache_dir")
    @classmethod
    def _writable_name(cls, value: str | Path | None) -> str | Path | None:
        return value if value is None else _no_control_characters(value)

    @field_validator("model")
    @classmethod
    def _without_credentials(cls, value: str) -> str:
        return _no_credentials(value)

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
        # one order, so that the same set is the same run
        return tuple(module for module in ALL_LINEAR if module in value)


class TrainingConfig(_Section):
    """The recipe: what, with the data and the base, decides the weights."""

    epochs: float = Field(default=3.0, gt=0, le=1000, description="Passes over the training split.")
    max_steps: int | None = Field(default=None, ge=1, description="Stop after this many optimizer steps, if that is sooner.")
    sequences_per_step: int = Field(
        default=32, ge=1, le=65536, description="Records in one optimizer step, however many micro-batches they are packed into."
    )
    learning_rate: float = Field(default=2e-4, gt=0, le=1, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="Learning rate after the warm-up.")
    warmup_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="Share of all steps in which the learning rate rises linearly."
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradient clipping, L2 norm.")
    max_length_tokens: int = Field(
        default=1024, ge=16, le=32768, description="Longest record, in tokens. A longer one is left out and reported, never cut."
    )
    held_out_fraction: float = Field(default=0.05, gt=0, lt=0.9, description="Share of the records held out by a stable hash.")
    seed: int = Field(default=20, ge=0, lt=2**32, description="Order of the records, adapter initialisation and dropout.")
    quantization: Literal["nf4", "none"] = Field(
        default="nf4", description="Base weights: 4-bit NormalFloat with double quantization (QLoRA), or as they are."
    )
    compute_dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="Type of activations and of unquantized weights."
    )


class EvaluationConfig(_Section):
    """How the adapter is questioned after training."""

    prompts: str | None = Field(
        default=None,
        description="JSONL with the evaluation's prompts: `s3://`, `file://` or a path. Default: the 120 that ship.",
    )
    intensities: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1, max_length=20)] = Field(
        default=(0.1, 0.4, 0.7, 1.0), description="Each prompt is asked once at each of these intensities, whatever its own is."
    )
    max_new_tokens: int = Field(default=128, ge=8, le=2048, description="Limit of one reply; a longer one counts as not stopped.")
    temperature: float = Field(
        default=0.7, ge=0, le=2, description="Of the sampled replies beside the greedy ones; 0: greedy ones only."
    )
    top_p: float = Field(default=0.8, gt=0, le=1, description="Nucleus of the sampled replies; as Qwen2.5's own settings.")
    top_k: int = Field(default=20, ge=0, le=1000, description="Most probable tokens that are sampled from; 0: all.")
    seed: int = Field(default=20, ge=0, lt=2**32, description="Of sampling and of the bootstrap.")
    bootstrap_resamples: int = Field(default=2000, ge=100, le=100_000, description="Draws of the bootstrap behind the intervals.")
    batch_size: int = Field(default=120, ge=1, le=4096, description="Replies generated at once. Not part of `gate_id`.")
    judge_model: str | None = Field(
        default=None,
        min_length=1,
        description="Model that also compares adapter and base; none: no judge. It opens or shuts no gate.",
    )
    judge_base_url: str = Field(
        default="https://api.openai.com/v1",
        pattern="^https?://",
        description="OpenAI-compatible server of the judge; the key comes from `OPENAI_API_KEY`.",
    )

    @field_validator("prompts")
    @classmethod
    def _writable_name(cls, value: str | None) -> str | None:
        return value if value is None else _no_control_characters(value)

    @field_validator("prompts", "judge_base_url")
    @classmethod
    def _without_credentials(cls, value: str | None) -> str | None:
        return value if value is None else _no_credentials(value)

    @field_validator("intensities")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if sorted(set(value)) != list(value):
            raise ValueError("expected each intensity once, in rising order")
        return value


class GatesConfig(_Section):
    """What an adapter must reach to become the newest accepted one. `none` takes a gate away.

    Thresholds are on the lower 95 % bound, except where a maximum is: there on the upper one.
    """

    exact_json: float | None = Field(default=0.97, ge=0, le=1, description="Replies that are exact JSON: 472 of 480.")
    stop: float | None = Field(default=0.97, ge=0, le=1, description="Replies that end by themselves before the limit: 472 of 480.")
    one_or_two_sentences: float | None = Field(
        default=0.93, ge=0, le=1, description="Replies of at most two sentences: 456 of 480."
    )
    informal_speech: float | None = Field(default=0.95, ge=0, le=1, description="Replies in 반말 throughout: 465 of 480.")
    persona: float | None = Field(
        default=0.70,
        ge=0,
        le=1,
        description="Replies that the persona classifier takes for this persona's; by chance it is a quarter.",
    )
    emoji_intensity: float | None = Field(
        default=0.2, ge=-1, le=1, description="Spearman correlation of emoji count and intensity: more than this."
    )
    question_rate_min: float | None = Field(default=0.40, ge=0, le=1, description="Readable replies that ask something: at least.")
    question_rate_max: float | None = Field(default=0.85, ge=0, le=1, description="Readable replies that ask something: at most.")
    win_rate: float | None = Field(
        default=0.5, ge=0, le=1, description="Replies with a higher rule score than the base's, a tie being half: more than this."
    )


class MemoryConfig(_Section):
    """How the work is laid out on the device. Never part of `run_id`: it does not change what is computed."""

    gradient_checkpointing: Literal["auto", "off", "on", "unsloth"] = Field(
        default="auto",
        description="Recompute activations in the backward pass. `unsloth` also offloads them; `auto` decides by free memory.",
    )
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=64, le=1_048_576)] = Field(
        default="auto", description="Tokens packed into one forward pass. `auto` decides by free memory."
    )


class CheckpointConfig(_Section):
    """What an interrupted run goes on from. Never part of `run_id`."""

    every_steps: int = Field(
        default=100, ge=0, description="Optimizer steps between two checkpoints; 0: only the minutes count. Whichever comes first."
    )
    every_minutes: float = Field(
        default=5.0, gt=0, le=1440, allow_inf_nan=False, description="Minutes between two checkpoints. Whichever comes first."
    )
    keep: int = Field(default=2, ge=1, le=100, description="Newest complete checkpoints that are kept.")
    grace_s: float = Field(
        default=90.0,
        ge=1,
        allow_inf_nan=False,
        description="Seconds from SIGTERM to the end of the last checkpoint's upload: below `terminationGracePeriodSeconds`.",
    )


class StorageConfig(_Section):
    """How long an object store that fails is given. Never part of `run_id`."""

    object_budget_s: float = Field(
        default=120.0,
        ge=0,
        le=86_400,
        description="Seconds that one object is tried again for, from its first failure. A store that restarts takes less; "
        "what takes longer is for the next attempt of the job. 0: never again.",
    )
    total_budget_s: float = Field(
        default=600.0,
        ge=0,
        le=604_800,
        description="Seconds that all objects of a run together may lose so, those uploaded in the background included.",
    )
    stall_timeout_s: float = Field(
        default=20.0, ge=0.1, le=600, description="Seconds of silence after which a connection to the store is given up."
    )


class LeaseConfig(_Section):
    """Two attempts at one run at once: who is at work, and what the other one does. Never part of `run_id`."""

    duration_s: float = Field(
        default=60.0,
        ge=1,
        le=3600,
        description="Seconds without a renewal after which another attempt takes over. Renewed three times in it.",
    )
    wait_s: float = Field(
        default=600.0,
        ge=1,
        le=86_400,
        description="Seconds to wait for another attempt at the same run to end or to stop renewing, before exit 6. "
        "At least `lease.duration_s`.",
    )

    @field_validator("wait_s")
    @classmethod
    def _outlasts_a_lease(cls, value: float, info: ValidationInfo) -> float:
        duration_s = info.data.get("duration_s")
        if duration_s is not None and value < duration_s:
            raise ValueError(
                f"expected at least lease.duration_s, {duration_s:g}: a lost machine's lease would never be waited out"
            )
        return value


class LimitsConfig(_Section):
    """How much is taken of a data file and of one record: more is refused (exit 3). Never part of `run_id`: nothing is cut."""

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
        default=2**30, ge=2**16, le=2**40, description="Most that comes out of a `.gz` or `.zst`, in bytes."
    )
    compression_ratio: float = Field(
        default=200.0, ge=1, le=1_000_000, description="The same, as a multiple of the compressed size; 16 MiB are always taken."
    )


DEFAULT_LIMITS: Final = LimitsConfig()
Tracker = Literal["tensorboard", "mlflow", "wandb"]


class LoggingConfig(_Section):
    """What is said, and how."""

    level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least severe event that is printed.")
    format: Literal["auto", "json", "console"] = Field(
        default="auto", description="`auto`: console on a terminal, JSON lines elsewhere."
    )
    report_to: tuple[Tracker, ...] = Field(
        default=(),
        description="Trackers that also get loss, learning rate and speed: under `work_dir` and offline, unless their own "
        "variables say otherwise.",
    )
    log_every_steps: int = Field(default=10, ge=1, description="Optimizer steps between two `training_step` events.")

    @field_validator("report_to", mode="before")
    @classmethod
    def _comma_separated(cls, value: object) -> object:
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        return () if names in (None, [""], ["none"]) else names

    @field_validator("report_to")
    @classmethod
    def _each_once(cls, value: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
        if len(set(value)) != len(value):
            raise ValueError("expected each tracker once")
        return value


class RunConfig(_Section):
    """All that one run of one persona is asked to do."""

    blood_type: BloodType = Field(
        description="Persona to train: A, B, O or AB. `run` takes several, one after another: `A,B`, a list, or `all`."
    )
    data: str = Field(
        default="data/",
        description="Folder that holds `train_data_type_<blood type>.jsonl`, or one `.jsonl`: `s3://` or `file://`. "
        "`.jsonl.gz` and `.jsonl.zst` are read, too.",
    )
    output: str = Field(default="outputs/", description="Folder that adapters are published under: `s3://` or `file://`.")
    work_dir: Path = Field(
        default=Path(".lora-trainer"),
        description="Local scratch: fetched data, `progress.json`, the bundle before it is published.",
    )
    strict: bool = Field(default=False, description="Treat warnings about the data as errors.")
    backend: Literal["auto", "unsloth", "transformers"] = Field(
        default="auto", description="Training stack. `auto`: unsloth on CUDA, transformers on the CPU."
    )
    device: Literal["cuda", "cpu"] = Field(
        default="cuda", description="`cuda` without a GPU ends with exit 5; the CPU is used only when asked for."
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

    @field_validator("work_dir")
    @classmethod
    def _home(cls, value: Path) -> Path:
        try:
            return value.expanduser()
        except RuntimeError:
            raise ValueError("expected a folder: '~' names none here, since this user has no home") from None

    @field_validator("data", "output", "work_dir")
    @classmethod
    def _writable_name(cls, value: str | Path) -> str | Path:
        return _no_control_characters(value)

    @field_validator("data", "output")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        scheme, separator, rest = _no_credentials(value).partition("://")
        if separator and scheme not in ("s3", "file"):
            raise ValueError(f"unknown scheme '{scheme}://'; expected s3://bucket/prefix/ or file:///folder/")
        if not (rest if separator else value).strip("/ ") and scheme != "file":
            raise ValueError("expected s3://bucket/prefix/, file:///folder/ or a folder")
        return value

    @property
    def resolved_backend(self) -> Literal["unsloth", "transformers"]:
        """`backend` with `auto` settled by `device`."""
        if self.backend != "auto":
            return self.backend
        return "unsloth" if self.device == "cuda" else "transformers"


def environment_name(dotted: str) -> str:
    """`training.epochs` -> `LORA_TRAINER_TRAINING__EPOCHS`."""
    return ENVIRONMENT_PREFIX + dotted.replace(".", "__").upper()


def setting_names(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every leaf setting in dotted form, in the order of the classes."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def config_table() -> list[tuple[str, str, str, str]]:
    """One row a setting for the README: name, default, range, meaning. A test compares the two."""
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

"""`lora-trainer evaluate`: a published adapter questioned again, on its own, without changing anything that is published."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from lora_trainer import __version__
from lora_trainer.base_model import Base, fetch_base, identify_base, pickled
from lora_trainer.config import RunConfig, setting_names
from lora_trainer.config_sources import settle_each
from lora_trainer.data.split import split_held_out
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.evaluate.llm_judge import check_judge
from lora_trainer.evaluate.metrics import HeldOutMetrics, RunMetrics
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.run import pipeline
from lora_trainer.run.bundle_files import read_published, write_evaluation
from lora_trainer.run.progress import RunProgress
from lora_trainer.store.bundle import fresh_folder
from lora_trainer.store.interface import NotFound, Storage
from lora_trainer.store.keys import safe_key
from lora_trainer.store.manifest import MANIFEST_NAME, read_manifest
from lora_trainer.store.opening import open_storage
from lora_trainer.store.prefixes import bundle_prefix
from lora_trainer.store.retry import RETRY_BUDGET
from lora_trainer.train.backends import Backend, open_reference_backend
from lora_trainer.train.tokenization import TokenSequence, tokenize

# settings of the run that trained the adapter, which say what was done and nothing about a place: a manifest comes from
# whoever made the adapter, and must not choose where this machine sends its keys or what it reads
_INHERITED = ("backend", "device", "lora", "training", "evaluation", "gates")
_NEVER_INHERITED = ("evaluation.prompts", "evaluation.judge_model", "evaluation.judge_base_url")
_SHOWN_CHARACTERS = 200
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FACTS = ("run_id", "blood_type", "started_at")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A bundle somewhere, and its manifest."""

    storage: Storage
    manifest: dict[str, Any]

    @property
    def run_id(self) -> str:
        """Of the run that made it."""
        return str(self.manifest["run_id"])


def open_adapter(uri: str) -> Adapter:
    """The bundle at `uri`: `s3://`, `file://` or a folder. Raises `ConfigError` if there is none, or if it can't be trusted.

    A manifest comes from whoever made the adapter: its run id becomes the name of a folder here, its files are written there,
    and weights that are pickled would run code when they are loaded.
    """
    storage = open_storage(uri if uri.endswith("/") else uri + "/")
    manifest = read_manifest(storage, "")
    if manifest is None or any(name not in manifest for name in _FACTS):
        raise ConfigError(
            f"{storage.uri}: no manifest.json of a run there; expected a bundle, such as <output>/adapters/A/<run id>/ "
            "(a bundle whose manifest is not there yet is not published)"
        )
    if problems := list(_untrusted(storage.uri, manifest)):
        raise ConfigError(problems)
    return Adapter(storage, manifest)


def _untrusted(uri: str, manifest: Mapping[str, Any]) -> Iterator[str]:
    where = f"{uri}{MANIFEST_NAME}"
    if not isinstance(manifest["run_id"], str) or not _RUN_ID.fullmatch(manifest["run_id"]):
        yield f"{where}: run_id: got {manifest['run_id']!r:.100}, expected letters, digits, '-' and '_'; it is not a run's manifest"
    if manifest["blood_type"] not in tuple(BloodType):
        yield f"{where}: blood_type: got {manifest['blood_type']!r:.100}, expected A, B, O or AB; it is not a run's manifest"
    for section, key in (("data", "uri"), ("data", "sha256"), ("base", "identity")):
        value = manifest.get(section)
        if not isinstance(value, dict) or not isinstance(value.get(key), str):
            yield f"{where}: {section}.{key}: got no text, expected one; it is not a run's manifest"
    if not isinstance(manifest.get("config", {}), dict):
        yield f"{where}: config: got a {type(manifest['config']).__name__}, expected settings; it is not a run's manifest"
    for name, facts in manifest["files"].items():
        try:
            safe_key(name)
        except ValueError as error:
            yield f"{where}: files: {error}"
        if not isinstance(facts, dict) or not {"size_bytes", "sha256"} <= set(facts):
            yield f"{where}: files: got no size and SHA-256 of {name!r:.100}, expected both; it is not a run's manifest"
    yield from pickled(uri, manifest["files"])


def output_of(adapter: Adapter) -> Storage:
    """The output folder that the bundle lies in. Raises `ConfigError` if it lies in none."""
    uri = adapter.storage.uri
    local = adapter.storage.local_folder
    if local is not None:
        # outputs/adapter_A is a link to the bundle
        uri = local.resolve().as_uri() + "/"
    suffix = bundle_prefix(BloodType(adapter.manifest["blood_type"]), adapter.run_id)
    if not uri.endswith("/" + suffix):
        raise ConfigError(
            f"{adapter.storage.uri}: expected a bundle in its place, <output>/{suffix}: a copy elsewhere has no latest.json"
        )
    return open_storage(uri.removesuffix(suffix))


def settle_for(
    adapter: Adapter, cli: Mapping[str, Any], environment: Mapping[str, str] | None = None, config_file: Path | None = None
) -> RunConfig:
    """The settings to question `adapter` with: those that it was trained by, unless told otherwise.

    Where anything lies or is sent to (data, base, prompts, judge, output, work folder) is the user's own setting, or the default.
    Raises `ConfigError` for settings that do not validate, and for another persona's.
    """
    known = {name for name in setting_names() if name.split(".")[0] in _INHERITED} - set(_NEVER_INHERITED)
    inherited = {name: value for name, value in _flat(adapter.manifest.get("config", {})) if name in known}
    inherited["blood_type"] = adapter.manifest["blood_type"]
    configs = settle_each(cli, environment, config_file, inherited)
    config = next((config for config in configs if config.blood_type == adapter.manifest["blood_type"]), None)
    if config is None:
        named = ", ".join(config.blood_type for config in configs)
        raise ConfigError(
            f"blood_type: got {named}, the adapter is {adapter.manifest['blood_type']}'s: leave it out "
            "(LORA_TRAINER_BLOOD_TYPE and the configuration file, too)"
        )
    return config


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found.extend(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)])
    return found


def find_base(adapter: Adapter, config: RunConfig) -> Base:
    """The base that the adapter was trained on. Raises `ConfigError` for another one."""
    base = identify_base(config.base)
    if base.identity != adapter.manifest["base"]["identity"]:
        raise ConfigError(
            f"base.model: {config.base.model}: got the base {base.identity}, the adapter was trained on "
            f"{_quoted(adapter.manifest['base']['identity'])}: pass that one with --base-model{_as_named(adapter, 'base.model')}"
        )
    return base


def _as_named(adapter: Adapter, setting: str) -> str:
    """For a message that asks for a place: what the manifest says about it."""
    named = dict(_flat(adapter.manifest.get("config", {}))).get(setting)
    return f" (its run had {setting}={_quoted(named)}; what a manifest names is not opened unasked)" if named else ""


def _quoted(value: object) -> str:
    """A manifest's value on one line."""
    text = repr(value)[:_SHOWN_CHARACTERS]
    return text[1:-1] if isinstance(value, str) and text.endswith(text[0]) else text


def _check_prompts(adapter: Adapter, config: RunConfig) -> None:
    """Raise `ConfigError` if the run had prompts of its own and nobody says what to ask here: others give another verdict."""
    if "prompts" not in config.evaluation.model_fields_set and (named := _as_named(adapter, "evaluation.prompts")):
        raise ConfigError(
            f"evaluation.prompts: not given: pass its prompts with --prompts, or --set evaluation.prompts=none "
            f"for those that ship{named}"
        )


def _fetch_data(adapter: Adapter, job: pipeline.Job) -> pipeline.DataFile:
    """The file that it was trained on. Raises `DataError` for another one, or none."""
    manifest = adapter.manifest["data"]
    hint = f"pass it with --data (its run had {_quoted(manifest['uri'])}; what a manifest names is not opened unasked)"
    try:
        data = pipeline.fetch(job)
    except NotFound as error:
        raise NotFound(
            [*error.problems, f"{adapter.storage.uri}: is compared with the data that it was trained on: {hint}"]
        ) from None
    if data.fetched.sha256 != manifest["sha256"]:
        raise DataError(
            f"{data.uri}: got SHA-256 {data.fetched.sha256}, the adapter was trained on {_quoted(manifest['sha256'])}: "
            f"it is compared with its own training data: {hint}"
        )
    return data


@dataclass(frozen=True, slots=True)
class Reevaluation:
    """What `evaluate` found."""

    metrics: RunMetrics
    folder: Path
    """Where metrics.json, replies.jsonl and report.html were written."""


def evaluate_published(adapter: Adapter, config: RunConfig, folder: Path | None) -> Reevaluation:
    """Fetch the adapter, its base and its data, measure, decide, and write what was found to `folder`.

    Raises a `LoraTrainerError`, but not for gates that are not passed: `metrics.verdict` says so.
    """
    if "adapter_config.json" not in adapter.manifest["files"]:
        raise ConfigError(
            f"{adapter.storage.uri}: no adapter there, only what was measured; expected a bundle, such as "
            "<output>/adapters/A/<run id>/"
        )
    _check_prompts(adapter, config)
    RETRY_BUDGET.begin(config.storage)
    if folder is not None:
        _prepare(folder)
    job = pipeline.Job(config)
    structlog.contextvars.bind_contextvars(run_id=adapter.run_id)
    data = _fetch_data(adapter, job)
    records = pipeline.read(job, data)
    prompts = pipeline.fetch_prompts(job)
    if config.evaluation.judge_model is None and _as_named(adapter, "evaluation.judge_model"):
        job.log.warning("judge_left_out", reason="the run had one: a judge is asked only where one is named here")
    check_judge(config.evaluation)
    base = find_base(adapter, config)
    scratch = config.work_dir / "evaluations" / str(config.blood_type) / adapter.run_id
    progress = RunProgress(scratch / "progress.json", adapter.run_id, config.blood_type, None)
    published = read_published(adapter.storage, "", adapter.manifest, fresh_folder(scratch / "published"))
    backend = pipeline.start(job, progress, open_reference_backend)
    with job.timed("load"):
        base_folder = fetch_base(base, config.base)
        tokenizer = backend.load_tokenizer(base_folder)
        backend.load_adapter(base_folder, published.folder)
    _, held_out_indices = split_held_out(records, config.training.held_out_fraction)
    with job.timed("held_out"):
        held_out = _held_out(job, backend, tokenize([records[index] for index in held_out_indices], tokenizer))
    evaluated = pipeline.evaluate(job, backend, prompts, pipeline.trained_records(job, records, tokenizer), progress)
    verdict = pipeline.decide(job, evaluated.metrics)
    metrics = RunMetrics(
        run_id=adapter.run_id,
        blood_type=config.blood_type,
        training=published.training,
        held_out=held_out,
        evaluation=evaluated.metrics,
        verdict=verdict,
        peak_memory_gib=round(backend.peak_memory_gib(), 3),
    )
    facts = {
        **{name: value for name, value in adapter.manifest.items() if name not in ("schema", "files")},
        "evaluation_id": evaluated.metrics.evaluation_id,
        "gate_id": verdict.gate_id,
        "verdict": verdict.model_dump(mode="json"),
        "evaluated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.model_dump(mode="json"),
        "environment": {**job.environment, "lora_trainer": __version__},
        "timings_s": dict(job.timings_s),
    }
    target = folder or scratch / verdict.gate_id
    target.mkdir(parents=True, exist_ok=True)
    write_evaluation(target, metrics, published.steps, evaluated.replies, facts)
    return Reevaluation(metrics, target)


def _prepare(folder: Path) -> None:
    """Make the report's folder before anything costs time. Not a bundle: its files would no longer be what its manifest says."""
    if (folder / MANIFEST_NAME).exists():
        raise ConfigError(f"--report-dir {folder}: holds a published bundle, which stays as it is; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--report-dir {folder}: cannot be made: {error.strerror}; name another folder") from None


def _held_out(job: pipeline.Job, backend: Backend, sequences: Sequence[TokenSequence]) -> HeldOutMetrics:
    fitting = [sequence for sequence in sequences if len(sequence) <= job.config.training.max_length_tokens]
    return pipeline.held_out_metrics(len(fitting), backend.base_mean_loss(fitting), backend.mean_loss(fitting))

"""Fetch and check the inputs of a run: the persona's records and the evaluation prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from lora_trainer.config import RunConfig
from lora_trainer.data.compression import SUFFIXES, is_jsonl
from lora_trainer.data.evaluation_prompts import evaluation_prompts
from lora_trainer.data.problems import Severity
from lora_trainer.data.records import EvaluationPrompt, TrainingRecord
from lora_trainer.data.validation import read_prompts, read_records
from lora_trainer.errors import ConfigError, StorageError
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.run.job import Job
from lora_trainer.store.interface import Fetched, Storage
from lora_trainer.store.keys import local_file, split_uri
from lora_trainer.store.opening import open_storage
from lora_trainer.store.retry import RetryBudget
from lora_trainer.uris import local_path

# names that are files, not folders: what people export, and what they call JSONL
_OTHER_FORMATS: Final = frozenset({
    *(".json", ".csv", ".tsv", ".txt", ".xlsx", ".xls", ".ods", ".parquet", ".arrow", ".feather", ".xml", ".html", ".yaml", ".yml"),
    *(".zip", ".tar", ".tgz", ".gz", ".zst", ".bz2", ".xz", ".7z", ".db", ".sqlite", ".hwp", ".hwpx", ".docx", ".pdf", ".md"),
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class DataFile:
    """The persona's JSONL in the working folder, with its origin and hash."""

    uri: str
    path: Path
    fetched: Fetched


def require_data_folder(configs: Sequence[RunConfig]) -> None:
    """Raise `ConfigError` if several personas would read the same data file."""
    data = configs[0].data
    if len(configs) > 1 and is_jsonl(data):
        named = ", ".join(config.blood_type for config in configs)
        raise ConfigError(
            f"data: got the one file {data} for {named}; expected a folder that holds train_data_type_<blood type>.jsonl for each"
        )


def locate_data(config: RunConfig, retry_budget: RetryBudget) -> tuple[Storage, str]:
    """Return the storage and the key of the persona's file. The file may be missing.

    Raise `ConfigError` if `data` names a file that is not JSONL, or several files fit.
    """
    if is_jsonl(config.data):
        folder, key = split_uri(config.data)
        return open_storage(folder, retry_budget), key
    _refuse_other_files(config.data)
    storage = open_storage(config.data, retry_budget)
    return storage, data_key(storage, config.blood_type)


def _refuse_other_files(data: str) -> None:
    """Raise `ConfigError` if `data`, which does not end in `.jsonl` or `.ndjson`, is a file."""
    path = local_file(data)
    if path is None and data.startswith("file://"):
        path = local_path(data)
    suffix = PurePosixPath(data).suffix.lower()
    is_file = path.exists() and not path.is_dir() if path else not data.endswith("/") and suffix in _OTHER_FORMATS
    # a missing local `data.csv` is a file as well, but a missing `data.v2` may be a folder
    if is_file or (path and not path.exists() and not data.endswith("/") and suffix in _OTHER_FORMATS):
        known = "a folder, or a file that ends in .jsonl or .ndjson (also .gz or .zst after it)"
        hint = "turn it into JSONL with 'lora-trainer convert'; rename it if it is JSONL"
        folder = "" if path and path.exists() else f"; if it is a folder, write {data}/"
        raise ConfigError(f"{data}: got a file of another name, expected {known}; {hint}{folder}")


def fetch(job: Job) -> DataFile:
    """Stream the persona's JSONL to the working folder. Raise `NotFound` if it is missing."""
    storage, key = locate_data(job.config, job.process.retry_budget)
    target = job.config.work_dir / "data" / key
    with job.timed("fetch"):
        fetched = storage.download(key, target)
    job.log.info("data_fetched", uri=storage.uri + key, size_bytes=fetched.size_bytes, sha256=fetched.sha256)
    return DataFile(storage.uri + key, target, fetched)


def data_key(storage: Storage, blood_type: BloodType) -> str:
    """Return the name of the persona's file in a data folder, compressed or not. Raise `ConfigError` if there are several."""
    plain, *compressed = (f"train_data_type_{blood_type}.jsonl{suffix}" for suffix in SUFFIXES)
    found = [plain] if storage.exists(plain) else []
    for key in compressed:
        try:
            found += [key] if storage.exists(key) else []
        except StorageError:
            # without s3:ListBucket, S3 answers 403 for a missing key: ignore it if another name exists
            if not found:
                raise
    if len(found) > 1:
        raise ConfigError(
            f"{storage.uri}: got {' and '.join(found)}, expected one of them; remove the other, or name the file with --data"
        )
    # download() reports a missing key, with suggestions
    return found[0] if found else plain


def read(job: Job, data: DataFile) -> list[TrainingRecord]:
    """Check the data's schema and lint before using any GPU time. Raise `DataError` with every bad line."""
    with job.timed("read"):
        records, report = read_records(
            data.path,
            job.config.blood_type,
            limits=job.config.limits,
            strict=job.config.strict,
            # report the user's path, not our local copy
            name=data.uri.removeprefix("file://"),
        )
    job.log.info(
        "data_read", records=len(records), warnings=report.warnings, warnings_by_code=dict(report.counts[Severity.WARNING])
    )
    return records


def fetch_prompts(job: Job) -> tuple[EvaluationPrompt, ...]:
    """Return the evaluation prompts, the bundled or the user's. Raise `DataError` with every bad line."""
    if (uri := job.config.evaluation.prompts) is None:
        return evaluation_prompts()
    folder, key = split_uri(uri)
    storage = job.process.storage(folder)
    path = job.config.work_dir / "data" / key
    fetched = storage.download(key, path)
    prompts, _ = read_prompts(path, limits=job.config.limits, name=storage.uri + key)
    job.log.info("prompts_fetched", uri=storage.uri + key, prompts=len(prompts), sha256=fetched.sha256)
    return prompts

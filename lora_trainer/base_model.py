"""The base model and its files: a hub id pinned to a commit, a local folder, or an `s3://` prefix."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Final

from lora_trainer.base_files.check import BaseFiles, check_base, check_documents
from lora_trainer.base_files.remembered import hash_files
from lora_trainer.config import BaseModelConfig
from lora_trainer.errors import ConfigError, StorageError
from lora_trainer.store.interface import ReadResult
from lora_trainer.store.local import FileStorage
from lora_trainer.store.opening import open_storage
from lora_trainer.store.retry import RetryBudget
from lora_trainer.uris import expand_home

MODEL_FILES: Final = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""Configuration, tokenizer, chat template and weights. Weights must be safetensors, because other formats can run code."""
_PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy")
_MIRROR_RECORD: Final = ".mirror.json"


@dataclass(frozen=True, slots=True)
class Base:
    """An identified base model."""

    canonical_id: str
    revision: str | None
    identity: str
    """What `run_id` hashes: `<hub id>@<commit>`, or `sha256:<hash of all files>`."""
    folder: Path | None
    """Folder with its files; None for a hub model, which `fetch_base` downloads."""


def identify_base(
    config: BaseModelConfig, retry_budget: RetryBudget | None = None, work_dir: Path | None = None, *, read_all: bool = False
) -> Base:
    """Identify the base's weights with as little traffic as possible.

    The commit identifies a hub model, which is downloaded later. The files of a folder are hashed. An `s3://` prefix
    is mirrored into `cache_dir`, fetching only what has changed, and hashed there. Files that are unchanged since they
    were last hashed are not read, unless `read_all` is set. The record of hashes is kept in the folder, or below `work_dir` if the
    folder is read-only.

    Raises `ConfigError` for a folder or prefix without a model, `StorageError` if it cannot be read.
    """
    model = config.model
    if model.startswith("s3://"):
        folder = _mirror(model, _cache_dir(config), retry_budget)
        name = PurePosixPath(model.rstrip("/")).name
    elif _is_folder(model):
        folder = _local_folder(model)
        name = Path(os.path.normpath(folder.absolute())).name
    else:
        return Base(config.canonical_id or model, _require_revision(config), f"{model}@{config.revision}", None)
    files = _model_files(folder)
    digests = hash_files(folder, files, work_dir, read_all=read_all)
    lines = "".join(f"{path.name}\0{digest}\n" for path, digest in zip(files, digests, strict=True))
    return Base(config.canonical_id or name, None, f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}", folder)


def pickled(where: str, names: Iterable[str]) -> list[str]:
    """Return one problem for each file in `names` whose format can run code on load."""
    return [
        f"{where.rstrip('/')}/{name}: got weights that are pickled, which can run code when they are loaded; "
        "expected adapter_model.safetensors: convert them if you trust their origin"
        for name in sorted(names)
        if name.lower().endswith(_PICKLED)
    ]


def require_safetensors(folder: Path) -> None:
    """Raise `ConfigError` unless the adapter in `folder` has safetensors weights and no pickled files."""
    problems = pickled(str(folder), [path.name for path in folder.iterdir()])
    if not problems and not (folder / "adapter_model.safetensors").is_file():
        problems = [f"{folder}: has no adapter_model.safetensors; expected an adapter as PEFT saves it"]
    if problems:
        raise ConfigError(problems)


def fetch_base(base: Base, config: BaseModelConfig) -> Path:
    """Return the folder with the base's files, downloading a hub model to the hub's own cache and checking it.

    Raises `ConfigError` if the hub does not have it or requires a token, or it is broken, `StorageError` if the hub cannot be
    reached.
    """
    if base.folder is not None:
        return base.folder
    folder = _download(config, MODEL_FILES)
    _check_complete(str(folder), [path.name for path in folder.iterdir()])
    check_base(BaseFiles.of_folder(folder))
    return folder


def _download(config: BaseModelConfig, patterns: Sequence[str]) -> Path:
    try:
        import httpx
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise ConfigError(
            "the training stack is not installed (huggingface_hub is missing): pip install 'lora-trainer[cpu,gpu]', "
            "or 'lora-trainer[cpu]' to train on a CPU"
        ) from None
    where = f"base.model: {config.model}@{config.revision}"
    if not any(os.environ.get(name) for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")):
        try:
            # huggingface_hub would create a folder called ~
            expand_home("~")
        except ValueError as error:
            raise ConfigError(f"{where}: the hub's cache is below ~, and {error}; name a folder with HF_HOME") from None
    try:
        return Path(snapshot_download(config.model, revision=config.revision, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise ConfigError(f"{where}: not a hub id: {error}") from None
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError) as error:
        raise ConfigError(
            f"{where}: the hub has no such model or commit, or it needs a token ({type(error).__name__}); "
            "check both, and set HF_TOKEN if it is gated"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError) as error:
        # Even offline, the client first asks the hub for the list of files if an older client, which kept none, filled the cache.
        with suppress(LocalEntryNotFoundError):
            return Path(snapshot_download(config.model, revision=config.revision, local_files_only=True))
        raise StorageError(
            f"{where}: the hub cannot be reached and the model is not in its cache ({type(error).__name__}); "
            "check the network, or point base.model at a folder or an s3:// prefix with the model's files"
        ) from None
    except OSError as error:
        raise StorageError(
            f"{where}: cannot write to the hub's cache: {error.filename}: {error.strerror}; expected a folder that uid "
            f"{os.geteuid()} can write to, with room for the model: set HF_HOME, or HF_HUB_CACHE"
        ) from None


def tokenizer_folder(config: BaseModelConfig, retry_budget: RetryBudget | None = None) -> Path:
    """Return a folder with the base's `tokenizer.json`, fetched without the weights. Raises as `fetch_base` does."""
    if config.model.startswith("s3://"):
        storage = open_storage(config.model, retry_budget)
        folder = _cache_dir(config) / "tokenizers" / hashlib.sha256(storage.uri.encode()).hexdigest()[:16]
        storage.download("tokenizer.json", folder / "tokenizer.json")
        return folder
    if _is_folder(config.model):
        folder = _local_folder(config.model)
        if not (folder / "tokenizer.json").is_file():
            raise ConfigError(f"base.model: {folder}: has no tokenizer.json; expected a folder as save_pretrained writes it")
        return folder
    return _download(config, ("tokenizer*.json",))


def documents_folder(config: BaseModelConfig, retry_budget: RetryBudget | None = None) -> Path:
    """Return a folder with the base's checked `config.json`, tokenizer and chat template, fetched without the weights.

    Raises as `fetch_base` does.
    """
    if config.model.startswith("s3://"):
        storage = open_storage(config.model, retry_budget)
        folder = _cache_dir(config) / "documents" / hashlib.sha256(storage.uri.encode()).hexdigest()[:16]
        # download every file again: these are small, and a copy of a name that is gone would change the prompts
        shutil.rmtree(folder, ignore_errors=True)
        for item in storage.list(""):
            if "/" not in item.key and _is_document(item.key):
                storage.download(item.key, folder / item.key)
        where = storage.uri
    elif _is_folder(config.model):
        folder = _local_folder(config.model)
        where = str(folder)
        _require_folder(folder)
    else:
        _require_revision(config)
        folder = _download(config, [pattern for pattern in MODEL_FILES if pattern != "*.safetensors"])
        where = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = BaseFiles.of_folder(folder)
    _check_complete(where, files.sizes, with_weights=False)
    check_documents(BaseFiles(where, files.sizes, files.read))
    return folder


def require_base(config: BaseModelConfig, retry_budget: RetryBudget | None = None) -> str:
    """Check the files of a folder or `s3://` prefix without fetching its weights: only their headers are read.

    Return the result as text. A hub model is checked when it is downloaded. Raises `ConfigError` if there is no model or it is
    broken, `StorageError` if the files cannot be listed or read.
    """
    if config.model.startswith("s3://"):
        _cache_dir(config)
        storage = open_storage(config.model, retry_budget)
        sizes = {item.key: item.size_bytes for item in storage.list("") if "/" not in item.key}
        files = BaseFiles(storage.uri, sizes, storage.read_range)
    elif _is_folder(config.model):
        folder = _local_folder(config.model)
        _model_files(folder)
        files = BaseFiles.of_folder(folder)
    else:
        return "a hub id, which is checked when it is downloaded"
    _check_complete(files.where, files.sizes)
    check_base(files)
    count = sum(map(_is_model_file, files.sizes))
    return f"{count} model files, the weights by their headers"


def _cache_dir(config: BaseModelConfig) -> Path:
    """Return the cache's folder with `~` expanded. Raise `ConfigError` if the user has no home folder."""
    try:
        return expand_home(config.cache_dir)
    except ValueError as error:
        raise ConfigError(f"base.cache_dir: got '{config.cache_dir}'; {error} (--set base.cache_dir=/folder/)") from None


def is_hub_id(model: str) -> bool:
    """Return whether `model` is a hub id, not a folder or an `s3://` prefix."""
    return not model.startswith("s3://") and not _is_folder(model)


def _is_folder(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~", "file://"))


def _local_folder(model: str) -> Path:
    folder = open_storage(model).local_folder
    assert folder is not None  # noqa: S101  only s3:// URIs have none
    return folder


def _model_files(folder: Path) -> list[Path]:
    _require_folder(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    _check_complete(str(folder), [path.name for path in files])
    return [path for path in files if _is_model_file(path.name)]


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"base.model: {folder}: no such folder; expected one with config.json and *.safetensors")


def _require_revision(config: BaseModelConfig) -> str:
    if config.revision is None:
        raise ConfigError(
            f"base.revision: not given for the hub id {config.model}; expected the full commit hash, so that the base cannot change"
        )
    return config.revision


def _is_model_file(name: str) -> bool:
    # dot files, such as the mirror's record or a .DS_Store, are not part of a model
    return not name.startswith(".") and any(fnmatch(name, pattern) for pattern in MODEL_FILES)


def _is_document(name: str) -> bool:
    return _is_model_file(name) and not name.endswith(".safetensors")


def _is_other_weights(name: str) -> bool:
    return name.lower().endswith((*_PICKLED, ".gguf", ".h5", ".msgpack", ".onnx"))


def _check_complete(where: str, names: Iterable[str], *, with_weights: bool = True) -> None:
    names = set(names)
    if "adapter_config.json" in names:
        # transformers would load whatever base the adapter names
        raise ConfigError(
            f"base.model: {where}: holds adapter_config.json: got an adapter's folder, expected a base model's; use the "
            "adapter's base"
        )
    lacks_weights = with_weights and not any(name.endswith(".safetensors") for name in names)
    if lacks_weights and (others := sorted(filter(_is_other_weights, names))):
        raise ConfigError(
            f"base.model: {where}: got {', '.join(others[:3])}, expected *.safetensors: pickled weights can run code and are "
            "never loaded; convert them where you trust them (AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) "
            "writes safetensors), or use a repository that has them"
        )
    missing = [name for name in ("config.json", "tokenizer.json") if name not in names]
    if lacks_weights:
        missing.append("*.safetensors")
    if missing:
        raise ConfigError(
            f"base.model: {where}: not a model: {', '.join(missing)} missing; expected a folder as save_pretrained writes it"
        )


def _mirror(uri: str, cache_dir: Path, retry_budget: RetryBudget | None) -> Path:
    """Update the local copy of an `s3://` prefix under `cache_dir`, downloading only changed objects, and return its folder."""
    storage = open_storage(uri, retry_budget)
    folder = cache_dir / "bases" / hashlib.sha256(storage.uri.encode()).hexdigest()[:16]
    listed = {item.key: item for item in storage.list("") if "/" not in item.key}
    _check_complete(storage.uri, listed)
    wanted = {key: item for key, item in listed.items() if _is_model_file(key)}
    local_storage = FileStorage(folder)
    known = _parse_record(local_storage.read_bytes(_MIRROR_RECORD))
    for item in local_storage.list(""):
        if item.key not in wanted and item.key != _MIRROR_RECORD:
            (folder / item.key).unlink(missing_ok=True)
    for key, item in wanted.items():
        local = folder / key
        if (
            local.exists()
            and known.get(key) == {"size": item.size_bytes, "etag": item.etag}
            and local.stat().st_size == item.size_bytes
        ):
            continue
        storage.download(key, local)
        known[key] = {"size": item.size_bytes, "etag": item.etag}
        kept = {name: known[name] for name in sorted(known) if name in wanted}
        # write_bytes is atomic, so a pod that dies here leaves a usable record
        local_storage.write_bytes(_MIRROR_RECORD, json.dumps(kept).encode())
    return folder


def _parse_record(record: ReadResult | None) -> dict[str, dict[str, object]]:
    """Return the size and etag of each mirrored object; an empty dict if the record is missing or damaged."""
    with suppress(ValueError):
        if record is not None and isinstance(known := json.loads(record.data), dict):
            return known
    return {}

"""Open a published adapter without trusting its manifest, and find the settings, base and data that belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_trainer.base_model import Base
from lora_trainer.config import RunConfig, setting_names
from lora_trainer.config_sources import settle_each
from lora_trainer.errors import ConfigError, DataError
from lora_trainer.persona.vocabulary import BloodType
from lora_trainer.run.inputs import DataFile, fetch
from lora_trainer.run.job import Job, ProcessContext
from lora_trainer.store.interface import NotFound, Storage
from lora_trainer.store.manifest import MANIFEST_NAME, check_run_manifest, read_manifest
from lora_trainer.store.opening import open_storage
from lora_trainer.store.prefixes import bundle_prefix
from lora_trainer.store.retry import RetryBudget
from lora_trainer.train.adapter_format import WEIGHTS_NAME, check_adapter_folder, check_against_base, check_published_adapter

# Settings to inherit from a manifest: how the adapter was trained and evaluated. Paths and URLs are not among them, because an
# untrusted manifest must not choose what this machine reads or where it sends its keys.
_INHERITED: Final = ("backend", "device", "lora", "training", "evaluation", "gates")
_NEVER_INHERITED: Final = ("evaluation.prompts", "evaluation.judge_model", "evaluation.judge_base_url")
_SHOWN_CHARACTERS: Final = 200
_REQUIRED_FACTS: Final = ("run_id", "blood_type", "started_at")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A published bundle and its manifest."""

    storage: Storage
    manifest: dict[str, Any]

    @property
    def run_id(self) -> str:
        """Id of the run that trained the adapter."""
        return str(self.manifest["run_id"])

    @property
    def blood_type(self) -> BloodType:
        """Persona of the adapter."""
        return BloodType(self.manifest["blood_type"])

    def setting(self, name: str) -> str:
        """Return a hint, ` (its run had <setting>=<value>; ...)`, for messages that ask for a path; empty without a value."""
        value = dict(_flat(self.manifest.get("config", {}))).get(name)
        return f" (its run had {name}={quoted(value)}; what a manifest names is not opened unasked)" if value else ""


def open_adapter(uri: str, retry_budget: RetryBudget | None = None) -> Adapter:
    """Open the bundle at `uri`: `s3://`, `file://` or a folder.

    Raise `ConfigError` if there is none or it is unsafe: its run id becomes the name of a local folder, its files are
    downloaded to it, and pickled weights would run code on load.
    """
    storage = open_storage(uri, retry_budget)
    manifest = read_manifest(storage, "")
    if manifest is None or any(name not in manifest for name in _REQUIRED_FACTS):
        raise ConfigError(
            f"{storage.uri}: no manifest.json of a run there; expected a bundle, such as <output>/adapters/A/<run id>/ "
            "(a bundle whose manifest is not there yet is not published)"
        )
    check_run_manifest(manifest, f"{storage.uri}{MANIFEST_NAME}", required=("base", "data"))
    check_published_adapter(storage, manifest)
    return Adapter(storage, manifest)


def output_of(adapter: Adapter) -> Storage:
    """Return the output that contains the bundle. Raise `ConfigError` for a bundle that is not part of one."""
    uri = adapter.storage.uri
    local = adapter.storage.local_folder
    if local is not None:
        # follow links such as outputs/adapter_A
        uri = local.resolve().as_uri() + "/"
    suffix = bundle_prefix(adapter.blood_type, adapter.run_id)
    if not uri.endswith("/" + suffix):
        raise ConfigError(
            f"{adapter.storage.uri}: expected a bundle in its place, <output>/{suffix}: a copy elsewhere has no latest.json"
        )
    return open_storage(uri.removesuffix(suffix))


def settle_for(
    adapter: Adapter, cli: Mapping[str, Any], environment: Mapping[str, str] | None = None, config_file: Path | None = None
) -> RunConfig:
    """Return the settings for evaluating `adapter`: those of its run, overridden by the user's.

    Paths and URLs (data, base, prompts, judge, output, work folder) are never inherited from its run. Raise `ConfigError` for
    invalid settings, and for settings of another persona.
    """
    known = {name for name in setting_names() if name.split(".")[0] in _INHERITED} - set(_NEVER_INHERITED)
    inherited = {name: value for name, value in _flat(adapter.manifest.get("config", {})) if name in known}
    inherited["blood_type"] = adapter.manifest["blood_type"]
    configs = settle_each(cli, environment, config_file, inherited)
    config = next((config for config in configs if config.blood_type == adapter.blood_type), None)
    if config is None:
        named = ", ".join(config.blood_type for config in configs)
        raise ConfigError(
            f"blood_type: got {named}, the adapter is {adapter.blood_type}'s: leave it out "
            "(LORA_TRAINER_BLOOD_TYPE and the configuration file, too)"
        )
    return config


def base_of(adapter: Adapter, config: RunConfig, process: ProcessContext) -> Base:
    """Identify the configured base. Raise `ConfigError` if the adapter was trained on another one."""
    base = process.base(config)
    if base.identity != adapter.manifest["base"]["identity"]:
        raise ConfigError(
            f"base.model: {config.base.model}: got the base {base.identity}, the adapter was trained on "
            f"{quoted(adapter.manifest['base']['identity'])}: pass that one with --base-model{adapter.setting('base.model')}"
        )
    return base


def check_adapter(adapter: Adapter, folder: Path, base: Base) -> None:
    """Check the adapter's downloaded files, and against its base if that is here, before anything imports torch.

    Raise `ConfigError` for settings or weights that this project does not load, and for weights of another shape than the base's.
    """
    tensors = check_adapter_folder(folder, adapter.storage.uri)
    if base.folder is not None:
        check_against_base(tensors, base.folder, f"{adapter.storage.uri}{WEIGHTS_NAME}")


def training_data_of(adapter: Adapter, job: Job) -> DataFile:
    """Fetch the adapter's training data. Raise `NotFound` if the file is missing, `DataError` if its content differs."""
    manifest = adapter.manifest["data"]
    hint = f"pass it with --data (its run had {quoted(manifest['uri'])}; what a manifest names is not opened unasked)"
    try:
        data = fetch(job)
    except NotFound as error:
        raise NotFound(
            [*error.problems, f"{adapter.storage.uri}: evaluation compares it with the data it was trained on: {hint}"]
        ) from None
    if data.fetched.sha256 != manifest["sha256"]:
        raise DataError(
            f"{data.uri}: got SHA-256 {data.fetched.sha256}, the adapter was trained on {quoted(manifest['sha256'])}: "
            f"evaluation compares it with its own training data: {hint}"
        )
    return data


def quoted(value: object) -> str:
    """Format a manifest's value for a message: shortened and on one line."""
    text = repr(value)[:_SHOWN_CHARACTERS]
    return text[1:-1] if isinstance(value, str) and text.endswith(text[0]) else text


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found.extend(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)])
    return found

"""Options that several commands share, and their conversion to settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from lora_trainer.config import RunConfig, Tracker
from lora_trainer.config_sources import parse_override
from lora_trainer.credentials import Service, check
from lora_trainer.errors import ConfigError, LoraTrainerError
from lora_trainer.messages import LANGUAGES, language_of, translated
from lora_trainer.uris import local_path, shown

_TRACKER_SERVICES: Final[Mapping[Tracker, Service]] = {"mlflow": Service.MLFLOW, "wandb": Service.WANDB}

_F = TypeVar("_F", bound=Callable[..., Any])


class Intensity(click.FloatRange):
    """A number from 0 to 1."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number. Name the right one for a percentage."""
        number = click.FLOAT.convert(value, param, ctx)
        if 1 < number <= 100:
            self.fail(f"{value} looks like a percentage: write {number / 100:g}; expected 0 to 1", param, ctx)
        return float(super().convert(value, param, ctx))


class LocalPath(click.Path):
    """A path on this machine, with `~` expanded. Refuses `s3://` and mistyped URIs, which would become local folders."""

    def __init__(self, *, file_okay: bool = True, dir_okay: bool = True) -> None:
        """Refuse an existing folder unless `dir_okay`, an existing file unless `file_okay`."""
        super().__init__(file_okay=file_okay, dir_okay=dir_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path. Fail as Click does for one that is not local."""
        try:
            path = local_path(str(value))
        except ValueError as error:
            self.fail(f"got '{shown(str(value))}'; {error}", param, ctx)
        return super().convert(path, param, ctx)


# (option, setting, metavar, help) of the settings that people change from run to run; `--set` covers the rest
_RUN_OPTIONS: Final = (
    ("--data", "data", "URI", "Training data: folder with train_data_type_<TYPE>.jsonl, or one .jsonl. s3:// or file://."),
    ("--output", "output", "URI", "Folder that the adapter is published under. s3:// or file://."),
    ("--work-dir", "work_dir", "FOLDER", "Local scratch folder."),
    ("--backend", "backend", "NAME", "auto, unsloth or transformers."),
    ("--device", "device", "NAME", "cuda or cpu. Never falls back from cuda to cpu."),
    ("--base-model", "base.model", "MODEL", "Hub id, folder (./...) or s3:// prefix of the base model."),
    ("--base-revision", "base.revision", "COMMIT", "Commit of a hub id."),
    ("--epochs", "training.epochs", "N", "Passes over the training split."),
    ("--max-steps", "training.max_steps", "N", "Stop after N optimizer steps, if that is sooner."),
    ("--learning-rate", "training.learning_rate", "X", "Peak learning rate."),
    ("--sequences-per-step", "training.sequences_per_step", "N", "Records in one optimizer step."),
    ("--seed", "training.seed", "N", "Order of the records, initialisation, dropout."),
    ("--log-level", "logging.level", "NAME", "debug, info, warning or error."),
    ("--log-format", "logging.format", "NAME", "auto, json or console."),
    ("--report-to", "logging.report_to", "NAMES", "Trackers, comma-separated: tensorboard, mlflow, wandb. Offline by default."),
)


class Command(click.Command):
    """A command whose text options are UTF-8. Names of local files may be any bytes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        problems = [
            f"{parameter.opts[0]}: not UTF-8; set the terminal to UTF-8, or convert the text or rename the file first"
            for parameter in self.params
            if isinstance(parameter, click.Option)
            for text in _texts(ctx.params.get(parameter.name or ""))
            # Python decodes bytes that are not UTF-8 to surrogates
            if any("\ud800" <= character <= "\udfff" for character in text)
        ]
        if problems:
            raise ConfigError(problems)
        return rest


class LanguageCommand(Command):
    """A command with `--lang`, whose errors are in that language as far as its catalogue holds them."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LoraTrainerError as error:
            error.problems = tuple(translated(problem, ctx.params["language"]) for problem in error.problems)
            raise


def language_option(command: _F) -> _F:
    """Add `--lang`."""
    return click.option(
        "--lang",
        "language",
        type=click.Choice(LANGUAGES),
        default=lambda: language_of(os.environ),
        show_default="by the locale",
        help="Language of what people read. Logs, --json and this help stay English.",
    )(command)


def _texts(value: object) -> Iterator[str]:
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, str):
            yield item


def adapter_option(command: _F) -> _F:
    """Add `--adapter`."""
    return click.option(
        "--adapter",
        required=True,
        metavar="URI",
        help="Published bundle: .../adapters/<TYPE>/<run id>/. s3://, file:// or a folder.",
    )(command)


def config_option(command: _F) -> _F:
    """Add `--config`."""
    return click.option("--config", "config_file", type=LocalPath(), metavar="FILE", help="YAML file with settings.")(command)


def set_option(example: str) -> Callable[[_F], _F]:
    """Add `--set`, with an `example` that suits the command."""

    def decorate(command: _F) -> _F:
        return click.option(
            "--set", "overrides", multiple=True, metavar="SETTING=VALUE", help=f"Any setting, such as {example}. Repeatable."
        )(command)

    return decorate


def run_options(command: _F) -> _F:
    """Add the options of `run`. Other commands accept them too, to describe the same run."""
    decorators = [
        config_option,
        click.option(
            "--blood-type", "--blood_type", "blood_type", metavar="TYPES", help="Persona: A, B, O or AB; several as A,B, or all."
        ),
        *(
            click.option(option, setting.replace(".", "__"), metavar=metavar, help=text)
            for option, setting, metavar, text in _RUN_OPTIONS
        ),
        click.option("--strict", is_flag=True, default=None, help="Treat warnings about the data as errors."),
        set_option("lora.r=32"),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def check_credentials(
    uris: Iterable[str | None], *, base: str = "", judge_model: str | None = None, trackers: Iterable[Tracker] = ()
) -> None:
    """Raise `ConfigError` for every malformed credential of the services that a command is about to use.

    Call it before everything that takes time. Credentials of other services may look as they like: a run on local files
    does not fail because of a variable of AWS.
    """
    services = [_TRACKER_SERVICES[tracker] for tracker in trackers if tracker in _TRACKER_SERVICES]
    if any(uri.startswith("s3://") for uri in (*uris, base) if uri):
        services.insert(0, Service.S3)
    if base and "://" not in base and not base.startswith(("/", "./", "../", "~")):
        services.append(Service.HUB)
    if judge_model:
        services.append(Service.OPENAI)
    check(services)


def check_run_credentials(config: RunConfig) -> None:
    """Call `check_credentials` for everything that `run` uses with these settings."""
    uris = (config.data, config.output, config.evaluation.prompts)
    check_credentials(uris, base=config.base.model, judge_model=config.evaluation.judge_model, trackers=config.logging.report_to)


def given_settings(options: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the dotted settings that the command line sets. Raise `ConfigError` for every malformed `--set` at once."""
    given = {name.replace("__", "."): value for name, value in options.items() if value is not None}
    problems: list[str] = []
    for text in overrides:
        try:
            setting, value = parse_override(text)
        except ConfigError as error:
            problems.extend(error.problems)
        else:
            given[setting] = value
    if problems:
        raise ConfigError(problems)
    return given

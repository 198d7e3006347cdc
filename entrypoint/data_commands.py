"""Commands for training data: `validate` and `generate`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click
from pydantic import SecretStr

from entrypoint import terminal
from entrypoint.data_inputs import local_input
from entrypoint.options import (
    LanguageCommand,
    LocalPath,
    check_credentials,
    config_option,
    given_settings,
    language_option,
    set_option,
)
from lora_trainer.config_sources import settle_each
from lora_trainer.errors import ConfigError, ExitCode, Interrupted, LoraTrainerError
from lora_trainer.messages import Message, speaker, translated
from lora_trainer.persona.vocabulary import BloodType, parse_blood_types
from lora_trainer.uris import check_server_url, shown


@click.command(cls=LanguageCommand)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--blood-type",
    "--blood_type",
    "blood_type",
    metavar="TYPE",
    help="The files' persona. Default: from each file's name.",
)
@click.option("--strict", is_flag=True, help="Exit with 3 on warnings, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document with every problem.")
@config_option
@click.option(
    "--base-model", "base__model", metavar="MODEL", help="Base whose tokenizer counts the tokens: hub id, folder or s3:// prefix."
)
@click.option("--no-tokens", is_flag=True, help="Don't count tokens: needs no tokenizer.")
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Processes that check lines, 600 MiB each. Default: the usable cores for a file above 8 MiB, else 1.",
)
@set_option("training.max_length_tokens=512")
@language_option
def validate(
    files: Sequence[str],
    blood_type: str | None,
    strict: bool,
    as_json: bool,
    config_file: Path | None,
    no_tokens: bool,
    workers: int | None,
    overrides: Sequence[str],
    language: str,
    **options: Any,
) -> None:
    """Check training data: schema, lint, coverage, and what the prompts cost.

    \b
    FILE is a JSONL file (.jsonl or .ndjson, plain, .gz or .zst): a local path, file://, s3://, a pipe, or
    - for standard input. A file named eval_prompts.jsonl holds evaluation prompts, which have neither
    instruction nor reply. A file in another format gets one diagnosis; 'convert' turns many into JSONL.
    Two severities:
      error     'run' refuses the file: not JSON, a missing field, an unknown emotion, ...
      warning   'run' refuses the file only under --strict: three sentences, 존댓말, too many
                emoji for the intensity, too long, not Korean, banned content, near-duplicates, too few
                questions, another persona's file

    \b
    Examples:
      lora-trainer validate data/*.jsonl
      lora-trainer validate --strict --json s3://bucket/personas/train_data_type_A.jsonl
      zcat data.jsonl.gz | lora-trainer validate --blood-type A -

    Exits with 3 if there are errors, or warnings under --strict.
    """
    from lora_trainer.base_model import tokenizer_folder
    from lora_trainer.data.compression import SUFFIXES
    from lora_trainer.data.evaluation_prompts import FILE_NAME
    from lora_trainer.data.prompt_cost import TokenCounter, chatml_overhead_tokens
    from lora_trainer.data.validation import FileReport, Note, OnProblem, check_file, check_prompts, write_json
    from lora_trainer.report.data_notes import MAX_CLASSIFIED_REPLIES, data_notes, rates_of_report
    from lora_trainer.report.validation_table import validation_table
    from lora_trainer.store.retry import RetryBudget

    options["blood_type"] = blood_type
    config, *more = settle_each(given_settings(options, overrides), config_file=config_file, fallback={"blood_type": "A"})
    if blood_type and more:
        raise ConfigError(
            Message("--blood-type: got {blood_type!r}, expected one persona, which the files belong to", blood_type=blood_type)
        )
    check_credentials(files, base="" if no_tokens else config.base.model)
    persona = config.blood_type if blood_type else None
    retry_budget = RetryBudget(config.storage)
    counter, overhead_tokens = None, 0
    if not no_tokens:
        try:
            counter = TokenCounter(tokenizer_folder(config.base, retry_budget))
            overhead_tokens = chatml_overhead_tokens(counter)
        except LoraTrainerError as error:
            reason = "\n".join(translated(problem, language) for problem in error.problems)
            note = Message(
                "tokens not counted: {reason}\n(--no-tokens, or --base-model with a folder that holds tokenizer.json)",
                reason=reason,
            )
            click.echo(translated(note, language), err=True)
    with tempfile.TemporaryDirectory() as scratch:
        paths: list[Path] = []
        names: dict[Path, str] = {}
        for number, name in enumerate(files):
            path = local_input(name, Path(scratch) / str(number), retry_budget, max_bytes=config.limits.decompressed_bytes)
            paths.append(path)
            names[path] = translated(Message("standard input"), language) if name == "-" and not as_json else name

        def check(path: Path, on_problem: OnProblem | None = None) -> FileReport:
            if path.name.lower() in {FILE_NAME + suffix for suffix in SUFFIXES}:
                report = check_prompts(path, limits=config.limits, on_problem=on_problem)
                notes: tuple[Note, ...] = ()
            else:
                replies: list[str] = []

                def keep(text: str) -> None:
                    if len(replies) < MAX_CLASSIFIED_REPLIES:
                        replies.append(text)

                report = check_file(
                    path,
                    persona,
                    counter,
                    max_length_tokens=config.training.max_length_tokens,
                    template_overhead_tokens=overhead_tokens,
                    limits=config.limits,
                    workers=workers,
                    on_problem=on_problem,
                    on_reply=keep,
                )
                notes = data_notes(rates_of_report(report, replies), config.training, config.gates)
            # report the user's name, not our local copy's
            return replace(report, file=names[path], notes=notes)

        try:
            if as_json:
                reports = write_json(sys.stdout, paths, check)
            else:
                console = terminal.console(sys.stdout)
                reports = []
                for path in paths:
                    reports.append(check(path))
                    console.print(validation_table(reports[-1], language), crop=False)
        except Interrupted:
            note = Message("interrupted: not every line was checked; run the same command again")
            click.echo(translated(note, language), err=True)
            raise
    if not all(report.is_accepted(strict=strict) for report in reports):
        raise click.exceptions.Exit(ExitCode.DATA)


@click.command(cls=LanguageCommand)
@click.option(
    "--blood-type",
    "--blood_type",
    "blood_types",
    default="all",
    show_default=True,
    metavar="TYPES",
    help="A, B, O, AB, several as A,B, or all.",
)
@click.option("--count", type=click.IntRange(min=1), default=1000, show_default=True, metavar="N", help="Records for each persona.")
@click.option(
    "--output",
    default="generated/",
    show_default=True,
    metavar="URI",
    help="Folder for train_data_type_<TYPE>.jsonl, or one .jsonl. s3:// or file://.",
)
@click.option(
    "--engine",
    type=click.Choice(["compose", "teacher"]),
    default="compose",
    show_default=True,
    help="Vary the built-in exchanges, or ask a model.",
)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, metavar="N", help="Seed of the drawn records.")
@click.option(
    "--against", multiple=True, metavar="FILE", help="JSONL whose records must not be repeated. s3:// or file://. Repeatable."
)
@click.option(
    "--report",
    type=LocalPath(dir_okay=False),
    metavar="FILE",
    help="Write counts, plots and samples as one HTML page.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file that has other content.")
@click.option(
    "--work-dir",
    type=LocalPath(file_okay=False),
    default=".lora-trainer",
    show_default=True,
    metavar="FOLDER",
    help="Where the teacher's records are kept until they are written to the output.",
)
@click.option("--model", metavar="NAME", help="teacher: the model that drafts.")
@click.option(
    "--critic-model", metavar="NAME", help="teacher: the model that criticises and repairs the drafts. Default: the one of --model."
)
@click.option(
    "--no-critique", is_flag=True, help="teacher: skip the second pass; halves the cost, and only the rules judge drafts."
)
@click.option(
    "--base-url",
    envvar="OPENAI_BASE_URL",
    default="https://api.openai.com/v1",
    show_default=True,
    metavar="URL",
    help="teacher: server that speaks OpenAI's chat API. [env: OPENAI_BASE_URL]",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    metavar="N",
    help="teacher: concurrent requests.",
)
@click.option(
    "--dialogues-per-request",
    type=click.IntRange(1, 32),
    default=4,
    show_default=True,
    metavar="N",
    help="teacher: dialogues in one request.",
)
@click.option(
    "--request-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="teacher: timeout after which a request is retried.",
)
@click.option(
    "--retries",
    type=click.IntRange(0, 50),
    default=5,
    show_default=True,
    metavar="N",
    help="teacher: retries of one request, with backoff.",
)
@click.option(
    "--temperature", type=click.FloatRange(0, 2), default=1.0, show_default=True, metavar="X", help="teacher: sampling temperature."
)
@language_option
def generate(
    blood_types: str,
    count: int,
    output: str,
    engine: Literal["compose", "teacher"],
    seed: int,
    against: Sequence[str],
    report: Path | None,
    overwrite: bool,
    work_dir: Path,
    model: str | None,
    critic_model: str | None,
    no_critique: bool,
    base_url: str,
    concurrency: int,
    dialogues_per_request: int,
    request_timeout: float,
    retries: int,
    temperature: float,
    language: str,
) -> None:
    """Generate tiki-taka data: dialogues in the training format, balanced over feelings and intensities.

    \b
    Two engines:
      compose   (default) varies hand-written exchanges, at most three times each: offline, and
                reproducible by its seed. Writes nothing if it can make fewer than --count.
      teacher   asks a model behind an OpenAI-compatible server (vLLM, transformers serve, OpenAI) for
                structured outputs; the key comes from OPENAI_API_KEY. A second pass criticises each
                draft and repairs it. Repeat an interrupted command to resume it.
    Every record passes the linter of 'validate'. Near-duplicates, and inputs that nearly repeat an
    evaluation prompt, are left out; variants of one exchange are counted. The command ends with a table
    of written and rejected records, and says how they read together.

    \b
    Examples:
      lora-trainer generate --count 900 --report report.html
      lora-trainer generate --blood-type A --count 300 --against my-data/train_data_type_A.jsonl --output generated/
      lora-trainer generate --engine teacher --base-url http://localhost:8000/v1 --model Qwen/Qwen2.5-72B-Instruct
    """
    from rich.progress import Progress

    from lora_trainer.generator import dataset_summary, teacher_client
    from lora_trainer.generator import generate as command
    from lora_trainer.store.retry import budget_from_environment

    try:
        check_server_url(base_url)
    except ValueError as error:
        raise ConfigError(f"--base-url: got '{shown(base_url)}'; {error}") from None
    if critic_model and no_critique:
        raise ConfigError(Message("--critic-model: got a model and --no-critique, expected one of the two; leave one out"))
    check_credentials((output, *against), judge_model=model if engine == "teacher" else None)
    settings = command.GenerateSettings(
        blood_types=_named_blood_types(blood_types),
        count=count,
        output=output,
        seed=seed,
        engine=engine,
        against=tuple(against),
        report=report,
        work_dir=work_dir,
        overwrite=overwrite,
        language=language,
        teacher=teacher_client.TeacherSettings(
            base_url=base_url,
            model=model,
            critic_model=None if no_critique else critic_model or model,
            # self-hosted servers often need no key, but the client requires one
            api_key=SecretStr(os.environ.get("OPENAI_API_KEY") or "none"),
            concurrency=concurrency,
            dialogues_per_request=dialogues_per_request,
            request_timeout_s=request_timeout,
            max_retries=retries,
            temperature=temperature,
        )
        if model
        else None,
    )
    bar = Progress(console=terminal.console(sys.stderr), disable=not sys.stderr.isatty(), transient=True)
    console = terminal.console(sys.stdout)
    say = speaker(language)
    try:
        with bar:
            for done in command.generate(settings, bar, budget_from_environment()):
                console.print(dataset_summary.dataset_table(done.summary, done.rejects, language))
                for name, value in done.notes:
                    console.print(f"{say(name)}: {value}", soft_wrap=True)
                end = (
                    Message("written: {uri} ({seconds:g} s)", uri=done.uri, seconds=done.duration_s)
                    if done.is_new
                    else Message("unchanged: {uri} ({seconds:g} s)", uri=done.uri, seconds=done.duration_s)
                )
                console.print(say(end) + "\n", soft_wrap=True)
    except Interrupted:
        kept = (
            Message(
                "interrupted: nothing half-written is visible; the records received so far are kept, run the same command again to "
                "resume"
            )
            if engine == "teacher"
            else Message("interrupted: nothing half-written is visible")
        )
        click.echo(say(kept), err=True)
        raise
    if report:
        console.print(say(Message("report: {file}", file=report)), soft_wrap=True)


def _named_blood_types(text: str) -> tuple[BloodType, ...]:
    """Parse `--blood-type`. Raise `ConfigError` for an unknown name."""
    try:
        return parse_blood_types(text)
    except ValueError as error:
        raise ConfigError(f"--blood-type: {error}") from None

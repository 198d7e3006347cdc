"""Commands for a run: `run`, `check-storage` and `show-config`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import yaml

from entrypoint import terminal
from entrypoint.options import Command, check_run_credentials, given_settings, run_options
from entrypoint.run_end import RunEnd
from lora_trainer import logs
from lora_trainer.config import config_table
from lora_trainer.config_sources import settle_each
from lora_trainer.errors import ExitCode, worst
from lora_trainer.escaping import escaped
from lora_trainer.redaction import redacted
from lora_trainer.signals import Interruption

if TYPE_CHECKING:
    from rich.console import Console

    from lora_trainer.run.batch import PersonaRun


@click.command(cls=Command)
@run_options
@click.option(
    "--fresh",
    is_flag=True,
    help="Discard the checkpoints of an interrupted attempt and train from the first step; hash all files of the base again.",
)
@click.pass_obj
def run(interruption: Interruption, /, config_file: Path | None, overrides: Sequence[str], fresh: bool, **options: Any) -> None:
    """Train one or several personas' adapters and publish them.

    \b
    Fetches the persona's JSONL, checks it, trains an adapter on the base model, evaluates it, and
    publishes it under OUTPUT:
      adapters/<TYPE>/<run id>/     the bundle, its manifest.json written last
      adapters/<TYPE>/latest.json   the newest accepted run
    Repeating a finished command ends at once: the run id is a hash of everything that determines the weights.
    Repeating an interrupted one (SIGTERM, SIGINT, a lost machine) resumes from the newest checkpoint:
      runs/<TYPE>/<run id>/checkpoints/

    Several personas run one after another, and the base is loaded once. Each has its own run id, checkpoints, bundle
    and verdict. A failure does not affect the others; the exit code is the worst, in the order
    143, 6, 1, 5, 7, 3, 2, 4, 0.

    \b
    Examples:
      lora-trainer run --blood-type A
      lora-trainer run --blood-type A,B
      lora-trainer run --blood-type all --data s3://bucket/personas/ --output s3://bucket/lora/
      lora-trainer run --blood-type AB --data s3://bucket/personas/ --output s3://bucket/lora/
      lora-trainer run --config run.yaml --blood-type O --set lora.r=32

    Prints each bundle's URI to standard output, and everything else to standard error. On a terminal, it ends with the
    gates, the place of the report, and the command to type next.
    """
    from lora_trainer.run.job import ProcessContext
    from lora_trainer.run.pipeline import persona_runs
    from lora_trainer.run.pipeline import run as run_personas
    from lora_trainer.store.contacts import Contacts
    from lora_trainer.store.retry import RetryBudget

    logs.configure("info", "auto")
    end = RunEnd(interruption)
    console: Console | None = None
    with end:
        configs = settle_each(given_settings(options, overrides), config_file=config_file)
        first = configs[0]
        logs.configure(first.logging.level, first.logging.format)
        end.work_dir = first.work_dir
        check_run_credentials(first)
        # bind the real stream now: sys.stderr is about to be redirected to the log
        console = terminal.console(sys.stderr) if sys.stderr.isatty() and first.logging.format != "json" else None
        # an interrupted attempt with this work_dir may have reached the store, which then gets time to restart
        contacts = Contacts(first.work_dir / "stores")
        process = ProcessContext(interruption, RetryBudget(first.storage, contacts), console, fresh)
        end.personas = persona_runs(configs, process, end.end_persona)
        for persona in end.personas:
            persona.log.info("run_settled", data=first.data, output=first.output, backend=first.resolved_backend)
        with logs.libraries_print_to_the_log():
            run_personas(end.personas, process)
    if console is not None:
        _print_verdicts(end.personas, console)
    try:
        # print last, so that a closed pipe cannot fail a finished run
        for uri in end.bundles:
            click.echo(uri)
    finally:
        end.leave()


def _print_verdicts(personas: Sequence[PersonaRun], console: Console) -> None:
    """Print each verdict with its gates, the report's place and the command to type next."""
    from lora_trainer.report.metrics_table import verdict_table

    for persona in personas:
        if (outcome := persona.outcome) is None:
            continue
        command, purpose = persona.next_command
        console.print()
        console.print(verdict_table(persona.blood_type, outcome.run_id, outcome.verdict))
        # don't break what somebody copies
        console.print(f"report: {outcome.report_uri}", soft_wrap=True)
        console.print(f"next:   {command}", soft_wrap=True)
        console.print(f"        to {purpose}", style="dim")


@click.command("check-storage", cls=Command)
@run_options
def check_storage(config_file: Path | None, overrides: Sequence[str], **options: Any) -> None:
    """Check every access that 'run' needs to its storage, without training.

    Reads the persona's data, checks a base in a folder or an s3:// prefix, writes, reads, lists and deletes a probe under
    runs/<TYPE>/ of the output, and checks the right to write under adapters/<TYPE>/. Takes the options of 'run'.

    \b
    Examples:
      lora-trainer check-storage --blood-type A --data s3://bucket/personas/ --output s3://bucket/lora/
      lora-trainer check-storage --config run.yaml --blood-type all

    Exits with the code that 'run' would end with: 2, 3 or 6.
    """
    from lora_trainer.run import preflight

    configs = settle_each(given_settings(options, overrides), config_file=config_file)
    check_run_credentials(configs[0])
    codes = [ExitCode.DONE]
    for finding in preflight.check_storage(configs):
        if finding.error is None:
            click.echo(f"ok: {finding.what}: {finding.said}")
            continue
        codes.append(finding.error.exit_code)
        for problem in finding.error.problems:
            click.echo(f"error: {finding.what}: {escaped(redacted(problem))}", err=True)
    if (code := worst(codes)) is not ExitCode.DONE:
        raise click.exceptions.Exit(code)


@click.command("show-config", cls=Command)
@run_options
@click.option("--json", "as_json", is_flag=True, help="JSON without the explanations.")
def show_config(config_file: Path | None, overrides: Sequence[str], as_json: bool, **options: Any) -> None:
    """Print the settings that 'run' would use, as YAML for --config.

    Shows A's settings if no blood type is given.
    """
    config, *more = settle_each(given_settings(options, overrides), config_file=config_file, fallback={"blood_type": "A"})
    values = config.model_dump(mode="json")
    if more:
        values["blood_type"] = [str(each.blood_type) for each in (config, *more)]
    click.echo(json.dumps(values, indent=2, ensure_ascii=False) if as_json else _commented_yaml(values), nl=as_json)


def _commented_yaml(values: dict[str, Any]) -> str:
    """Return `values` as YAML, each setting under a comment with its meaning and range."""
    lines = ["# Settings of 'lora-trainer run'; pass this file with --config."]
    section = None
    for name, _, allowed, meaning in config_table():
        *parents, leaf = name.split(".")
        if parents and parents[0] != section:
            section = parents[0]
            lines.append(f"{section}:")
        indent = "  " * len(parents)
        value: Any = values
        for part in name.split("."):
            value = cast("dict[str, Any]", value)[part]
        lines.append(f"{indent}# {meaning}" + (f" [{allowed}]" if allowed else ""))
        dumped = yaml.safe_dump({leaf: value}, allow_unicode=True, default_flow_style=True, width=1000).strip()
        lines.append(f"{indent}{dumped[1:-1]}")
    return "\n".join(lines) + "\n"

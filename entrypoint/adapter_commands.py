"""Commands for published adapters: `evaluate`, `chat`, `publish` and `compare`."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import structlog

from entrypoint import terminal
from entrypoint.options import (
    Command,
    Intensity,
    LocalPath,
    adapter_option,
    check_credentials,
    config_option,
    given_settings,
    set_option,
)
from entrypoint.run_end import RunEnd
from lora_trainer import logs
from lora_trainer.errors import ConfigError, GateError, Interrupted
from lora_trainer.escaping import escaped
from lora_trainer.signals import Interruption


@click.command(cls=Command)
@adapter_option
@click.option(
    "--report-dir",
    type=LocalPath(file_okay=False),
    metavar="FOLDER",
    help="Where metrics.json, replies.jsonl and report.html go. Default: under the work folder.",
)
@click.option("--prompts", "evaluation__prompts", metavar="FILE", help="Other prompts than those of its run. s3:// or file://.")
@click.option("--data", metavar="URI", help="The file that it was trained on, if it lies elsewhere now. s3:// or file://.")
@click.option(
    "--base-model", "base__model", metavar="MODEL", help="The base, if it lies elsewhere: hub id, folder or s3:// prefix."
)
@click.option("--device", metavar="NAME", help="cuda or cpu.")
@click.option("--work-dir", metavar="FOLDER", help="Local scratch folder.")
@click.option("--json", "as_json", is_flag=True, help="Print metrics.json instead of the table.")
@config_option
@set_option("gates.persona=0.8")
@click.option("--log-level", "logging__level", metavar="NAME", help="debug, info, warning or error.")
@click.option("--log-format", "logging__format", metavar="NAME", help="auto, json or console.")
@click.pass_obj
def evaluate(
    interruption: Interruption,
    /,
    adapter: str,
    report_dir: Path | None,
    as_json: bool,
    config_file: Path | None,
    overrides: Sequence[str],
    **options: Any,
) -> None:
    """Measure a published adapter again, and judge it by thresholds.

    Measures the held-out loss of adapter and base, generates replies of both to the evaluation prompts, and prints
    the result. Settings default to those of the run that trained the adapter, except paths and URLs: if data, base
    model, prompts or judge differ from the defaults, set them here, in the environment or with --config. Published
    files do not change: 'run' with the same settings publishes a new verdict, 'promote' moves latest.json.

    \b
    Examples:
      lora-trainer evaluate --adapter s3://bucket/lora/adapters/A/0123456789abcdef/ --data s3://bucket/personas/
      lora-trainer evaluate --adapter outputs/adapter_A --config run.yaml --device cpu --set gates.persona=0.8

    Exits with 4 if a gate is missed.
    """
    logs.configure("info", "auto")
    end = RunEnd(interruption)
    with end:
        from lora_trainer.evaluate.gates import missed_gate_messages
        from lora_trainer.report.metrics_table import metrics_table
        from lora_trainer.run.adapter import open_adapter, settle_for
        from lora_trainer.run.job import ProcessContext
        from lora_trainer.run.reevaluation import evaluate_adapter
        from lora_trainer.store.retry import RetryBudget, budget_from_environment

        opened = open_adapter(adapter, budget_from_environment())
        config = settle_for(opened, given_settings(options, overrides), config_file=config_file)
        logs.configure(config.logging.level, config.logging.format)
        end.work_dir = config.work_dir
        asked = config.evaluation
        check_credentials((config.data, asked.prompts), base=config.base.model, judge_model=asked.judge_model)
        structlog.contextvars.bind_contextvars(blood_type=str(config.blood_type))
        # bind the real stream now: sys.stderr is about to be redirected to the log
        console = terminal.console(sys.stderr) if sys.stderr.isatty() and config.logging.format != "json" else None
        process = ProcessContext(interruption, RetryBudget(config.storage), console)
        with logs.libraries_print_to_the_log():
            found = evaluate_adapter(opened, config, report_dir, process)
        verdict = found.metrics.verdict
        end.facts.update(run_id=opened.run_id, report=str(found.folder / "report.html"), passed=verdict.passed, sense=verdict.sense)
        if as_json:
            click.echo(escaped(json.dumps(found.metrics.as_json(), indent=2, ensure_ascii=False)))
        else:
            terminal.console(sys.stdout).print(metrics_table(found.metrics))
            click.echo(f"report: {found.folder / 'report.html'}")
        if not verdict.passed:
            raise GateError(missed_gate_messages(verdict))
    end.leave()


@click.command(cls=Command)
@adapter_option
@click.option("--json", "raw", is_flag=True, help="Print each reply as generated: one JSON object a line.")
@click.option("--base", "beside_base", is_flag=True, help="Also show what the base answers without the adapter.")
@click.option("--feeling", default="neutral", show_default=True, metavar="NAME", help="What the friend feels at the start.")
@click.option("--intensity", type=Intensity(), default=0.5, show_default=True, metavar="X", help="How strongly, 0 to 1.")
@click.option("--situation", default="", metavar="TEXT", help="What has happened so far.")
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    default=0.7,
    show_default=True,
    metavar="X",
    help="Sampling temperature; 0 is greedy.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Sampling seed.")
@click.option(
    "--base-model", "base__model", metavar="MODEL", help="The base, if it lies elsewhere: hub id, folder or s3:// prefix."
)
@click.option("--device", metavar="NAME", help="cuda or cpu.")
@click.option("--work-dir", metavar="FOLDER", help="Local scratch folder.")
@config_option
@set_option("base.cache_dir=/cache")
@click.pass_obj
def chat(
    interruption: Interruption,
    /,
    adapter: str,
    raw: bool,
    beside_base: bool,
    feeling: str,
    intensity: float,
    situation: str,
    temperature: float,
    seed: int,
    config_file: Path | None,
    overrides: Sequence[str],
    **options: Any,
) -> None:
    """Talk to a published adapter in the terminal.

    Decoding is constrained to response_schema.json, so every reply is exact JSON. A line that begins with / is a
    command: /feeling, /intensity, /situation, /seed, /new, /help, /quit. Standard input may be a pipe.

    \b
    Examples:
      lora-trainer chat --adapter s3://bucket/lora/adapters/A/0123456789abcdef/
      lora-trainer chat --adapter outputs/adapter_A --device cpu --base --feeling happy --intensity 0.9
      echo "점심 뭐 먹지?" | lora-trainer chat --adapter outputs/adapter_A --json
    """
    from lora_trainer.persona.vocabulary import Feeling
    from lora_trainer.run.adapter import open_adapter, settle_for
    from lora_trainer.run.job import ProcessContext
    from lora_trainer.run.terminal_chat import NO_EARLIER_TURNS, ChatState, chat_loop, load_chat_model, status
    from lora_trainer.store.retry import RetryBudget, budget_from_environment

    if feeling not in tuple(Feeling):
        raise ConfigError(f"--feeling: got {feeling!r}, expected one of {', '.join(Feeling)}")
    opened = open_adapter(adapter, budget_from_environment())
    config = settle_for(opened, given_settings(options, overrides), config_file=config_file)
    check_credentials((), base=config.base.model)
    # bind the real streams now: both are about to be redirected to the log
    out, notes, is_terminal = terminal.console(sys.stdout), terminal.console(sys.stderr), sys.stdin.isatty()
    lines = _typed_lines(out) if is_terminal else terminal.read_lines(sys.stdin, sys.stdout)
    if is_terminal:
        click.echo("loading ...", err=True)
    with logs.libraries_print_to_the_log():
        model = load_chat_model(opened, config, temperature, ProcessContext(interruption, RetryBudget(config.storage)))
        state = ChatState(config.blood_type, Feeling(feeling), intensity, situation, seed, prompt_version=model.prompt_version)
        if is_terminal:
            out.print(f"{status(state)}. /help lists the commands, /quit leaves.", style="dim")
        if not state.most_turns:
            # with --json, standard output has replies only
            notes.print(NO_EARLIER_TURNS, style="dim", soft_wrap=True)
        try:
            chat_loop(model, state, lines, out, raw=raw, beside_base=beside_base)
        except Interrupted as interrupted:
            # Ctrl-C is a normal way to end a chat: there is nothing to save
            if interrupted.signal_name != "SIGINT":
                raise


def _typed_lines(console: Any) -> Iterator[str]:
    """Yield typed lines until Ctrl-D."""
    # importing readline enables arrow keys and history in input(); some Python builds lack it
    with suppress(ImportError):
        importlib.import_module("readline")
    while terminal.is_lost(console.file) is None:
        try:
            typed = str(console.input("나> "))
        except EOFError:
            return
        try:
            line = terminal.decoded_line(typed.encode(sys.stdin.encoding, "surrogateescape"), sys.stdin.encoding)
        except ConfigError as error:
            console.print(str(error), style="red")
        else:
            yield line


@click.command(cls=Command)
@click.argument("folder", type=LocalPath(), metavar="FOLDER")
@click.option(
    "--output",
    metavar="URI",
    help="Output to use instead of the run's own; required if FOLDER was moved or copied. s3:// or file://.",
)
@click.option(
    "--base-model",
    metavar="MODEL",
    help="Also compare the adapter with this base: hub id, folder or s3:// prefix. Shapes are compared for a folder or a prefix.",
)
@click.option(
    "--accept",
    is_flag=True,
    help="Trust the bundle: move latest.json although its run id or verdict can't be computed again, and record that.",
)
@click.pass_obj
def publish(interruption: Interruption, /, folder: Path, output: str | None, base_model: str | None, accept: bool) -> None:
    """Publish the finished bundle in FOLDER that its run could not publish.

    A run whose storage fails at the end (exit 6) keeps its bundle and prints FOLDER. Training and evaluation are not
    repeated, and the exit code is the one that the run would have had.

    Checks first that FOLDER holds a run's bundle and nothing else: only the files that a run writes (no pickle, no
    link, no subfolder), each as manifest.json lists it, every document of its form, weights that fit
    adapter_config.json and hold no NaN. Runs nothing from FOLDER, and opens nothing that its files name. Then copies
    the files to OUTPUT/adapters/<TYPE>/<run id>/, manifest.json last; a bundle that is already there stays as it is.

    latest.json moves if the gates passed, no later run holds it, the run id is the hash of the manifest's
    ingredients, and the verdict follows from replies.jsonl. Otherwise the log says why it stays. --accept moves it to
    a bundle that can't prove these two, as 'promote' would. A missed gate needs 'promote'.

    FOLDER is deleted after that only if it is its run's own, <work_dir>/runs/<TYPE>/<run id>/bundle. Any other folder
    is kept.

    \b
    Examples:
      lora-trainer publish .lora-trainer/runs/A/0123456789abcdef/bundle
      lora-trainer publish .lora-trainer/runs/A/0123456789abcdef/bundle --output s3://another-bucket/lora/
      lora-trainer publish downloads/bundle --output s3://bucket/lora/ --base-model s3://bucket/bases/qwen/ --accept
    """
    from lora_trainer.evaluate.gates import missed_gate_messages
    from lora_trainer.evaluate.scope import scope
    from lora_trainer.run.job import ProcessContext
    from lora_trainer.run.publication import publish_folder
    from lora_trainer.store.retry import budget_from_environment

    logs.configure("info", "auto")
    outcome = publish_folder(
        folder, output, ProcessContext(interruption, budget_from_environment()), base_model=base_model, accepted=accept
    )
    click.echo(outcome.bundle_uri)
    if sys.stderr.isatty():
        # elsewhere it would break the log, whose event has `sense`
        click.echo(scope(outcome.verdict).text, err=True)
    if not outcome.verdict.passed:
        raise GateError(missed_gate_messages(outcome.verdict))


@click.command(cls=Command)
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...")
@click.option("--html", metavar="FILE", help="Also write the comparison as one HTML page. s3:// or file://.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
def compare(runs: Sequence[str], html: str | None, as_json: bool) -> None:
    """Show finished runs side by side: verdicts, metrics, speed, and the settings that differ.

    RUN is a published bundle: s3://.../adapters/<TYPE>/<run id>/, file:// or a folder; or one of its
    later evaluations, .../<run id>/evaluations/<gate id>/. With several personas, a confusion matrix shows
    which persona the classifier assigns to each run's replies.

    \b
    Examples:
      lora-trainer compare outputs/adapter_A outputs/adapter_B outputs/adapter_O outputs/adapter_AB
      lora-trainer compare --html compare.html s3://bucket/lora/adapters/A/0123456789abcdef/ outputs/adapter_A
    """
    from lora_trainer.report.comparison import compare as compare_runs
    from lora_trainer.report.comparison import comparison_page, comparison_table
    from lora_trainer.store.keys import split_uri
    from lora_trainer.store.opening import open_storage
    from lora_trainer.store.retry import budget_from_environment

    folder, key = split_uri(html) if html else ("", "")
    retry_budget = budget_from_environment()
    found = compare_runs(runs, retry_budget)
    if as_json:
        click.echo(escaped(json.dumps(found.as_json(), indent=2, ensure_ascii=False)))
    else:
        terminal.console(sys.stdout).print(comparison_table(found))
    if html:
        open_storage(folder, retry_budget).write_bytes(key, comparison_page(found).encode())
        click.echo(f"page: {html}", err=as_json)

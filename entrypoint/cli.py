"""The Click command line. It turns options into a `RunConfig`, and every failure into one message and an exit code."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, cast

import click
import structlog
import yaml
from pydantic import SecretStr

from lora_trainer import __version__, logs
from lora_trainer.config import RunConfig, config_table
from lora_trainer.config_sources import parse_override, settle_each
from lora_trainer.errors import ConfigError, ExitCode, GateError, Interrupted, LoraTrainerError, StorageError, worst
from lora_trainer.persona.vocabulary import BloodType, parse_blood_types
from lora_trainer.redaction import redacted
from lora_trainer.run.failure_report import FailureReport, failure_report

if TYPE_CHECKING:
    from rich.console import Console

    from lora_trainer.run.several import Persona

_F = TypeVar("_F", bound=Callable[..., Any])

# option -> (setting, metavar, help); the ones people change from run to run, `--set` has the rest
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


def _setting_options(command: _F) -> _F:
    """`--config`, `--blood-type`, the options of `_RUN_OPTIONS`, `--strict` and `--set`."""
    decorators = [
        click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="YAML file with settings."),
        click.option(
            "--blood-type", "--blood_type", "blood_type", metavar="TYPES", help="Persona: A, B, O or AB; several as A,B, or all."
        ),
        *(
            click.option(option, setting.replace(".", "__"), metavar=metavar, help=text)
            for option, setting, metavar, text in _RUN_OPTIONS
        ),
        click.option("--strict", is_flag=True, default=None, help="Treat warnings about the data as errors."),
        click.option(
            "--set", "overrides", multiple=True, metavar="SETTING=VALUE", help="Any setting, such as lora.r=32. Repeatable."
        ),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="lora-trainer")
def cli() -> None:
    """Turn a persona's JSONL into a LoRA adapter on Qwen2.5-7B-Instruct.

    \b
    Settings come from, strongest first:
      1. options of the command, --set SETTING=VALUE among them
      2. environment: LORA_TRAINER_BLOOD_TYPE, LORA_TRAINER_TRAINING__EPOCHS, ...
         (LORA_TRAINER_CONFIG names the file below)
      3. the YAML file given with --config
      4. defaults: 'lora-trainer show-config' prints all settings with what they mean

    \b
    S3 is set up by the ordinary AWS variables, profiles and roles (AWS_ENDPOINT_URL for MinIO and
    the like, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, IRSA).

    \b
    Exit codes:
      0    done, or already done
      1    a bug or a lost device             may be retried
      2    configuration or usage             must not be retried
      3    data                               must not be retried
      4    gate not passed                    must not be retried
      5    the hardware can't do it           must not be retried
      6    storage failed for good            may be retried
      7    training diverged                  must not be retried
      143  interrupted, run it again          may be retried
    """


@cli.command()
@_setting_options
@click.option("--fresh", is_flag=True, help="Forget the checkpoints of an interrupted attempt and train from the first step.")
def run(config_file: Path | None, overrides: Sequence[str], fresh: bool, **options: Any) -> None:
    """Train a persona's adapter and publish it; or several personas', one after another.

    \b
    Fetches the persona's JSONL, checks it, trains an adapter on the base model, reads it back, and
    publishes it under OUTPUT:
      adapters/<TYPE>/<run id>/     the bundle, its manifest.json written last
      adapters/<TYPE>/latest.json   the newest accepted run
    The same command again ends at once: the run id is a hash of all that decides the weights. Interrupted
    (SIGTERM, SIGINT, a lost machine), it goes on from the newest checkpoint under OUTPUT:
      runs/<TYPE>/<run id>/checkpoints/

    With several personas the base is loaded once. Each has its own run id, checkpoints, bundle and verdict, and one
    that fails leaves the others whole; the exit code is the worst, in the order 143, 6, 1, 5, 7, 3, 2, 4, 0.

    \b
    Examples:
      lora-trainer run --blood-type A
      lora-trainer run --blood-type A,B
      lora-trainer run --blood-type all --data s3://bucket/personas/ --output s3://bucket/lora/
      lora-trainer run --blood-type AB --data s3://bucket/personas/ --output s3://bucket/lora/
      lora-trainer run --config run.yaml --blood-type O --set lora.r=32

    Prints the bundle's URI to standard output, one line for each persona; everything else goes to standard error.
    """
    logs.configure("info", "auto")
    edge = _RunEdge()
    with edge:
        configs = settle_each(_given(options, overrides), config_file=config_file)
        logs.configure(configs[0].logging.level, configs[0].logging.format)
        edge.work_dir = configs[0].work_dir
        if len(configs) > 1:
            _run_several(configs, edge, fresh=fresh)
        else:
            _run_one(configs[0], edge, fresh=fresh)
    try:
        # behind the last word: a reader that went away does not undo the run
        for uri in edge.bundles:
            click.echo(uri)
    finally:
        edge.leave()


def _run_one(config: RunConfig, edge: _RunEdge, *, fresh: bool) -> None:
    structlog.contextvars.bind_contextvars(blood_type=str(config.blood_type))
    logs.get_logger().info("run_settled", data=config.data, output=config.output, backend=config.resolved_backend)
    from lora_trainer.evaluate.gates import missed
    from lora_trainer.run.pipeline import run as run_job

    console = _progress_console(config)
    with logs.libraries_print_to_the_log():
        outcome = run_job(config, console, fresh=fresh)
    edge.facts.update(
        run_id=outcome.run_id,
        bundle=outcome.bundle_uri,
        report=outcome.report_uri,
        already_done=outcome.already_done,
        passed=outcome.verdict.passed,
    )
    if not outcome.verdict.passed:
        raise GateError(missed(outcome.verdict))


def _run_several(configs: Sequence[RunConfig], edge: _RunEdge, *, fresh: bool) -> None:
    from lora_trainer.run import several

    console = _progress_console(configs[0])
    edge.personas, shared = several.gather(configs, console, fresh=fresh)
    for persona, config in zip(edge.personas, configs, strict=True):
        persona.log.info("run_settled", data=config.data, output=config.output, backend=config.resolved_backend)
    with logs.libraries_print_to_the_log():
        several.go_through(edge.personas, shared, edge.end_persona)


def _progress_console(config: RunConfig) -> Console | None:
    """The terminal, if there is one: the stream itself, since sys.stderr is about to be the libraries' own."""
    from rich.console import Console

    return Console(file=sys.stderr) if sys.stderr.isatty() and config.logging.format != "json" else None


@cli.command()
@click.option(
    "--adapter", required=True, metavar="URI", help="Published bundle: .../adapters/<TYPE>/<run id>/. s3://, file:// or a folder."
)
@click.option(
    "--report-dir",
    type=click.Path(path_type=Path, file_okay=False),
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
@click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="YAML file with settings.")
@click.option(
    "--set", "overrides", multiple=True, metavar="SETTING=VALUE", help="Any setting, such as gates.persona=0.8. Repeatable."
)
@click.option("--log-level", "logging__level", metavar="NAME", help="debug, info, warning or error.")
@click.option("--log-format", "logging__format", metavar="NAME", help="auto, json or console.")
def evaluate(
    adapter: str,
    report_dir: Path | None,
    as_json: bool,
    config_file: Path | None,
    overrides: Sequence[str],
    **options: Any,
) -> None:
    """Question a published adapter again, and judge it by thresholds.

    How it is asked and judged is as in the run that trained it, unless told otherwise. Where things lie is never
    taken from there: name data, base model, prompts and judge here, in the environment or with --config, if they
    are not the defaults. Measures held-out loss of base and adapter, lets both answer the evaluation's prompts,
    and prints what came out. Nothing that is published changes: 'run' with the same settings publishes a new
    verdict, 'promote' moves latest.json.

    \b
    Examples:
      lora-trainer evaluate --adapter s3://bucket/lora/adapters/A/0123456789abcdef/ --data s3://bucket/personas/
      lora-trainer evaluate --adapter outputs/adapter_A --config run.yaml --device cpu --set gates.persona=0.8

    Exits with 4 if a gate is not passed.
    """
    logs.configure("info", "auto")
    edge = _RunEdge()
    with edge:
        from lora_trainer.evaluate import gates
        from lora_trainer.report import metrics_table as summary
        from lora_trainer.run import reevaluation

        opened = reevaluation.open_adapter(adapter)
        config = reevaluation.settle_for(opened, _given(options, overrides), config_file=config_file)
        logs.configure(config.logging.level, config.logging.format)
        edge.work_dir = config.work_dir
        structlog.contextvars.bind_contextvars(blood_type=str(config.blood_type))
        with logs.libraries_print_to_the_log():
            found = reevaluation.evaluate_published(opened, config, report_dir)
        verdict = found.metrics.verdict
        edge.facts.update(run_id=opened.run_id, report=str(found.folder / "report.html"), passed=verdict.passed)
        if as_json:
            click.echo(json.dumps(found.metrics.as_json(), indent=2, ensure_ascii=False))
        else:
            from rich.console import Console

            Console().print(summary.metrics_table(found.metrics))
            click.echo(f"report: {found.folder / 'report.html'}")
        if not verdict.passed:
            raise GateError(gates.missed(verdict))
    edge.leave()


@cli.command()
@click.option(
    "--adapter", required=True, metavar="URI", help="Published bundle: .../adapters/<TYPE>/<run id>/. s3://, file:// or a folder."
)
@click.option("--json", "raw", is_flag=True, help="Print replies as they are: one JSON object a line.")
@click.option("--base", "beside_base", is_flag=True, help="Let the base answer, too, without the adapter.")
@click.option("--feeling", default="neutral", show_default=True, metavar="NAME", help="What the friend feels at the start.")
@click.option("--intensity", type=click.FloatRange(0, 1), default=0.5, show_default=True, metavar="X", help="How strongly, 0 to 1.")
@click.option("--situation", default="", metavar="TEXT", help="What has happened so far.")
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    default=0.7,
    show_default=True,
    metavar="X",
    help="0: always the most probable token.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Another seed, other replies.")
@click.option(
    "--base-model", "base__model", metavar="MODEL", help="The base, if it lies elsewhere: hub id, folder or s3:// prefix."
)
@click.option("--device", metavar="NAME", help="cuda or cpu.")
@click.option("--work-dir", metavar="FOLDER", help="Local scratch folder.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="YAML file with settings.")
@click.option(
    "--set", "overrides", multiple=True, metavar="SETTING=VALUE", help="Any setting, such as base.cache_dir=/cache. Repeatable."
)
def chat(
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

    Decoding is held to response_schema.json, so every reply is exact JSON, whatever was learned. A line that
    begins with / is a command: /feeling, /intensity, /situation, /seed, /new, /help, /quit. Lines can be piped in.

    \b
    Examples:
      lora-trainer chat --adapter s3://bucket/lora/adapters/A/0123456789abcdef/
      lora-trainer chat --adapter outputs/adapter_A --device cpu --base --feeling happy --intensity 0.9
      echo "점심 뭐 먹지?" | lora-trainer chat --adapter outputs/adapter_A --json
    """
    from rich.console import Console

    from lora_trainer.persona.vocabulary import Feeling
    from lora_trainer.run import reevaluation
    from lora_trainer.run import terminal_chat as chatting

    logs.configure("warning", "auto")
    if feeling not in tuple(Feeling):
        raise ConfigError(f"--feeling: got {feeling!r}, expected one of {', '.join(Feeling)}")
    opened = reevaluation.open_adapter(adapter)
    config = reevaluation.settle_for(opened, _given(options, overrides), config_file=config_file)
    # the streams themselves: they are about to be the libraries' own
    out, is_terminal = Console(file=sys.stdout, highlight=False), sys.stdin.isatty()
    if is_terminal:
        click.echo("loading ...", err=True)
    state = chatting.ChatState(config.blood_type, Feeling(feeling), intensity, situation, seed)
    with logs.libraries_print_to_the_log():
        friend = chatting.load_friend(opened, config, temperature)
        if is_terminal:
            out.print(f"{chatting.status(state)}. /help lists the commands, /quit leaves.", style="dim")
        try:
            chatting.talk(
                friend, state, _typed_lines(out) if is_terminal else iter(sys.stdin), out, raw=raw, beside_base=beside_base
            )
        except Interrupted as interruption:
            # Ctrl-C leaves a conversation; there is nothing to lose
            if interruption.signal_name != "SIGINT":
                raise


def _typed_lines(console: Any) -> Iterator[str]:
    """What is typed, line by line, until Ctrl-D."""
    # arrow keys and history for input(), where Python was built with it
    with suppress(ImportError):
        importlib.import_module("readline")
    while True:
        try:
            yield str(console.input("나> "))
        except EOFError:
            return


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="FOLDER")
@click.option(
    "--output", metavar="URI", help="Another output than the run's own; needed where FOLDER is a copy elsewhere. s3:// or file://."
)
def publish(folder: Path, output: str | None) -> None:
    """Publish the finished bundle in FOLDER that its run could not.

    FOLDER is the bundle that a run kept, and named, when its storage failed at the end (exit 6). Nothing is trained
    or judged again; latest.json moves if the gates were passed, and the exit code is the one the run would have had.

    \b
    Examples:
      lora-trainer publish .lora-trainer/runs/A/0123456789abcdef/bundle
      lora-trainer publish .lora-trainer/runs/A/0123456789abcdef/bundle --output s3://another-bucket/lora/
    """
    from lora_trainer.evaluate.gates import missed
    from lora_trainer.run.pipeline import publish_folder

    logs.configure("info", "auto")
    outcome = publish_folder(folder, output)
    click.echo(outcome.bundle_uri)
    if not outcome.verdict.passed:
        raise GateError(missed(outcome.verdict))


@cli.command()
@click.argument("adapter", metavar="RUN")
def promote(adapter: str) -> None:
    """Point latest.json at RUN by hand, whatever its verdict and whatever is newer.

    RUN is a published bundle: s3://.../adapters/<TYPE>/<run id>/, file:// or a folder. Runs that start after
    now move the pointer on as always; those that started before don't move it back.

    \b
    Examples:
      lora-trainer promote s3://bucket/lora/adapters/A/0123456789abcdef/
    """
    from lora_trainer.run import reevaluation
    from lora_trainer.store.latest import link_newest, promote_latest
    from lora_trainer.store.manifest import verify_files
    from lora_trainer.store.prefixes import bundle_prefix, latest_key

    opened = reevaluation.open_adapter(adapter)
    blood_type = BloodType(opened.manifest["blood_type"])
    output = reevaluation.output_of(opened)
    if problems := verify_files(output, bundle_prefix(blood_type, opened.run_id)):
        raise StorageError([*problems, f"{opened.storage.uri}: not promoted; a bundle is only complete as its manifest has it"])
    before = promote_latest(output, blood_type, opened.manifest)
    link_newest(output, blood_type, opened.run_id)
    click.echo(f"{output.uri}{latest_key(blood_type)}: names run {opened.run_id} now; before: {before or 'none'}")


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...")
@click.option("--html", metavar="FILE", help="Write the comparison as one HTML page, too. s3:// or file://.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON document instead of the table.")
def compare(runs: Sequence[str], html: str | None, as_json: bool) -> None:
    """Put finished runs side by side: verdicts, measures, speed, and the settings in which they differ.

    RUN is a published bundle: s3://.../adapters/<TYPE>/<run id>/, file:// or a folder; or one of its
    later evaluations, .../<run id>/evaluations/<gate id>/. With several personas it shows whose friend
    each one's replies are taken for.

    \b
    Examples:
      lora-trainer compare outputs/adapter_A outputs/adapter_B outputs/adapter_O outputs/adapter_AB
      lora-trainer compare --html compare.html s3://bucket/lora/adapters/A/0123456789abcdef/ outputs/adapter_A
    """
    from rich.console import Console

    from lora_trainer.report import comparison
    from lora_trainer.store.keys import split_uri
    from lora_trainer.store.opening import open_storage

    logs.configure("warning", "auto")
    folder, key = split_uri(html) if html else ("", "")
    found = comparison.compare(runs)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        Console().print(comparison.comparison_table(found))
    if html:
        open_storage(folder).write_bytes(key, comparison.comparison_page(found).encode())
        click.echo(f"page: {html}", err=as_json)


@cli.command("show-config")
@_setting_options
@click.option("--json", "as_json", is_flag=True, help="JSON without the explanations.")
def show_config(config_file: Path | None, overrides: Sequence[str], as_json: bool, **options: Any) -> None:
    """Print the settings that 'run' would use, as YAML that --config takes.

    Without a blood type it shows A's.
    """
    config, *more = settle_each(_given(options, overrides), config_file=config_file, fallback={"blood_type": "A"})
    values = config.model_dump(mode="json")
    if more:
        values["blood_type"] = [str(each.blood_type) for each in (config, *more)]
    click.echo(json.dumps(values, indent=2, ensure_ascii=False) if as_json else _commented_yaml(values), nl=as_json)


@cli.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--blood-type", "--blood_type", "blood_type", metavar="TYPE", help="Persona that the file should be. Default: as its name says."
)
@click.option("--strict", is_flag=True, help="Warnings make the exit code 3, too.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON document, every problem included.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="YAML file with settings.")
@click.option(
    "--base-model", "base__model", metavar="MODEL", help="Base whose tokenizer counts the tokens: hub id, folder or s3:// prefix."
)
@click.option("--no-tokens", is_flag=True, help="Don't count tokens: needs no tokenizer.")
@click.option(
    "--set", "overrides", multiple=True, metavar="SETTING=VALUE", help="Any setting, such as training.max_length_tokens=512."
)
def validate(
    files: Sequence[str],
    blood_type: str | None,
    strict: bool,
    as_json: bool,
    config_file: Path | None,
    no_tokens: bool,
    overrides: Sequence[str],
    **options: Any,
) -> None:
    """Check training data: schema, lint, coverage, and what the prompts cost.

    \b
    FILE is a JSONL file (.jsonl, .jsonl.gz, .jsonl.zst): a local path, file:// or s3://; one called
    eval_prompts.jsonl holds the evaluation's prompts, which have neither instruction nor reply.
    Two severities:
      error     'run' refuses the file: not JSON, a missing field, an unknown emotion, ...
      warning   counted; 'run' refuses the file under --strict: three sentences, 존댓말, too many
                emoji for the intensity, too long, not Korean, banned content, near-duplicates, too few
                questions, another persona's file

    \b
    Examples:
      lora-trainer validate data/*.jsonl
      lora-trainer validate --strict --json s3://bucket/personas/train_data_type_A.jsonl

    Exits with 3 if there are errors, or warnings under --strict.
    """
    from lora_trainer.base_model import tokenizer_folder
    from lora_trainer.data.evaluation_prompts import FILE_NAME
    from lora_trainer.data.prompt_cost import TokenCounter, chatml_overhead_tokens
    from lora_trainer.data.validation import FileReport, OnProblem, check_file, check_prompts, write_json
    from lora_trainer.report.validation_table import validation_table
    from lora_trainer.store.keys import split_uri
    from lora_trainer.store.opening import open_storage

    options["blood_type"] = blood_type
    config, *more = settle_each(_given(options, overrides), config_file=config_file, fallback={"blood_type": "A"})
    if blood_type and more:
        raise ConfigError(f"--blood-type: got {blood_type!r}, expected the one persona that the files should be")
    persona = config.blood_type if blood_type else None
    counter, overhead_tokens = None, 0
    if not no_tokens:
        try:
            counter = TokenCounter(tokenizer_folder(config.base))
            overhead_tokens = chatml_overhead_tokens(counter)
        except LoraTrainerError as error:
            click.echo(
                f"tokens not counted: {error}\n(--no-tokens, or --base-model with a folder that holds tokenizer.json)", err=True
            )
    with tempfile.TemporaryDirectory() as scratch:
        paths = []
        for number, name in enumerate(files):
            path = Path(name)
            if "://" in name:
                folder, key = split_uri(name)
                # the name stays: it says which persona the file should be
                path = Path(scratch) / str(number) / Path(key).name
                open_storage(folder).download(key, path)
            elif not path.is_file():
                raise ConfigError(f"{name}: {'a folder' if path.is_dir() else 'no such file'}; expected a JSONL file")
            paths.append(path)

        def check(path: Path, on_problem: OnProblem | None = None) -> FileReport:
            if path.name in (FILE_NAME, f"{FILE_NAME}.gz", f"{FILE_NAME}.zst"):
                return check_prompts(path, limits=config.limits, on_problem=on_problem)
            return check_file(
                path,
                persona,
                counter,
                max_length_tokens=config.training.max_length_tokens,
                template_overhead_tokens=overhead_tokens,
                limits=config.limits,
                on_problem=on_problem,
            )

        if as_json:
            reports = write_json(sys.stdout, paths, check)
        else:
            from rich.console import Console

            reports = []
            for path in paths:
                reports.append(check(path))
                Console().print(validation_table(reports[-1]))
    if not all(report.is_accepted(strict=strict) for report in reports):
        raise click.exceptions.Exit(ExitCode.DATA)


@cli.command("check-storage")
@_setting_options
def check_storage(config_file: Path | None, overrides: Sequence[str], **options: Any) -> None:
    """Try what 'run' will need of its storage, and train nothing.

    Reads the persona's data, looks for a base in a folder or an s3:// prefix, writes, reads, lists and deletes a probe under
    runs/<TYPE>/ of the output, and tries whether adapters/<TYPE>/ may be written to. Takes the options of 'run', so that the
    same ones tell of the same run.

    \b
    Examples:
      lora-trainer check-storage --blood-type A --data s3://bucket/personas/ --output s3://bucket/lora/
      lora-trainer check-storage --config run.yaml --blood-type all

    Exits with the code that 'run' would end with: 2, 3 or 6.
    """
    from lora_trainer.run.preflight import check_storage as check

    logs.configure("warning", "auto")
    codes = [ExitCode.DONE]
    for finding in check(settle_each(_given(options, overrides), config_file=config_file)):
        if finding.error is None:
            click.echo(f"ok: {finding.what}: {finding.said}")
            continue
        codes.append(finding.error.exit_code)
        for problem in finding.error.problems:
            click.echo(f"error: {finding.what}: {redacted(problem)}", err=True)
    if (code := worst(codes)) is not ExitCode.DONE:
        raise click.exceptions.Exit(code)


@cli.command()
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
    help="From the built-in grammar, or asked of a model.",
)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, metavar="N", help="Another seed, other records.")
@click.option(
    "--against", multiple=True, metavar="FILE", help="JSONL whose records must not come again. s3:// or file://. Repeatable."
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write counts, plots and samples as one HTML page.",
)
@click.option("--overwrite", is_flag=True, help="Replace a file that is already there with other content.")
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=".lora-trainer",
    show_default=True,
    metavar="FOLDER",
    help="Where the teacher's records are kept until they are written.",
)
@click.option("--model", metavar="NAME", help="teacher: the model to ask.")
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
    help="teacher: requests under way at once.",
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
    help="teacher: after so long without an answer a request is sent again.",
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
    base_url: str,
    concurrency: int,
    dialogues_per_request: int,
    request_timeout: float,
    retries: int,
    temperature: float,
) -> None:
    """Make tiki-taka data: dialogues in the training format, balanced over feelings and intensities.

    \b
    Two engines:
      compose   (default) from the built-in grammar; offline, and the same for the same seed
      teacher   asked of a model behind an OpenAI-compatible server (vLLM, transformers serve, OpenAI),
                with structured outputs; the key comes from OPENAI_API_KEY. An interrupted run goes
                on where it stopped when the same command is run again.
    Every record passes the linter of 'validate'; near-duplicates, and inputs that are nearly one of the
    evaluation's prompts, are left out. A table at the end says what was written and what was rejected.

    \b
    Examples:
      lora-trainer generate --count 5000 --report report.html
      lora-trainer generate --blood-type A --against data/train_data_type_A.jsonl --output s3://bucket/personas/
      lora-trainer generate --engine teacher --base-url http://localhost:8000/v1 --model Qwen/Qwen2.5-72B-Instruct
    """
    from rich.console import Console
    from rich.progress import Progress

    from lora_trainer.generator import dataset_summary, teacher
    from lora_trainer.generator import generate as command
    from lora_trainer.store.keys import refuse_credentials

    logs.configure("warning", "auto")
    # the report names it
    refuse_credentials(base_url)
    settings = command.GenerateSettings(
        blood_types=_blood_types(blood_types),
        count=count,
        output=output,
        seed=seed,
        engine=engine,
        against=tuple(against),
        report=report,
        work_dir=work_dir,
        overwrite=overwrite,
        teacher=teacher.TeacherSettings(
            base_url=base_url,
            model=model,
            # servers of one's own often want none, the client wants one all the same
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
    bar = Progress(console=Console(file=sys.stderr), disable=not sys.stderr.isatty(), transient=True)
    console = Console()
    try:
        with bar:
            for done in command.generate(settings, bar):
                console.print(dataset_summary.dataset_table(done.summary, done.rejects))
                for name, value in done.notes:
                    console.print(f"{name}: {value}", highlight=False)
                console.print(
                    f"{'written' if done.is_new else 'unchanged'}: {done.uri} ({done.duration_s:g} s)\n",
                    highlight=False,
                    soft_wrap=True,
                )
    except Interrupted:
        kept = "; what the model has given is kept, run the same command again to go on" if engine == "teacher" else ""
        click.echo(f"interrupted: nothing half-written is visible{kept}", err=True)
        raise
    if report:
        console.print(f"report: {report}", highlight=False, soft_wrap=True)


def _blood_types(text: str) -> tuple[BloodType, ...]:
    """Raises `ConfigError`."""
    try:
        return parse_blood_types(text)
    except ValueError as error:
        raise ConfigError(f"--blood-type: {error}") from None


def run_cli(arguments: Sequence[str]) -> int:
    """Run the command line; gives the exit code. A user's mistake is a message, never a traceback."""
    try:
        result = cli.main(args=list(arguments), prog_name="lora-trainer", standalone_mode=False)
    except click.exceptions.Abort:
        return ExitCode.INTERRUPTED
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        # it quotes what was typed
        click.echo(redacted(shown.getvalue()), err=True, nl=False)
        return error.exit_code
    except LoraTrainerError as error:
        for problem in error.problems:
            click.echo(f"error: {redacted(problem)}", err=True)
        return error.exit_code
    except SystemExit:
        # Click's and Rich's answer to a closed pipe, with code 1: whoever read our output has seen enough
        return ExitCode.DONE
    except Interrupted:
        return ExitCode.INTERRUPTED
    except Exception as error:  # the edge: what comes here is a bug, unless a library made it of an interruption
        ending = failure_report(error) or FailureReport(ExitCode.BUG)
        if ending.exit_code is ExitCode.INTERRUPTED:
            return ExitCode.INTERRUPTED
        for line in (*(f"error: a bug, please report it: {said}" for said in ending.problems), *ending.frames):
            click.echo(line, err=True)
        return ExitCode.BUG
    return result if isinstance(result, int) else ExitCode.DONE


class _RunEdge:
    """Where a run's exception becomes its last words: one `run_finished` event, the termination log, an exit code."""

    def __init__(self) -> None:
        self.facts: dict[str, object] = {}
        self.personas: Sequence[Persona] = ()
        """Those of a run of several; each has an ending of its own."""
        # the stream itself: sys.stderr is the libraries' own while a run goes on
        self._stderr, self._is_terminal = sys.stderr, sys.stderr.isatty()
        self.work_dir: Path | None = None
        """Where a bug's message goes, as soon as that is known."""
        self._code = ExitCode.DONE
        self._started_s = time.monotonic()

    def __enter__(self) -> None:
        """Start the clock."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        ending = failure_report(error, self.work_dir)
        if ending is None:
            return False
        new_problems = ending.problems
        if self.personas:
            from lora_trainer.run.several import together

            ending = together(ending, self.personas)
            self.facts["personas"] = [persona.summary for persona in self.personas]
        self._code = ending.exit_code
        if ending.frames:
            self.facts["frames"] = list(ending.frames)
        summary = {
            "outcome": ending.outcome,
            "exit_code": int(ending.exit_code),
            **self.facts,
            "duration_s": round(time.monotonic() - self._started_s, 1),
        }
        if ending.problems:
            summary["problems"] = list(ending.problems)
        log = logs.get_logger()
        self._print(new_problems)
        shown = {key: value for key, value in summary.items() if key != "problems" or not self._is_terminal}
        (log.info if self._code is ExitCode.DONE else log.error)("run_finished", **shown)
        logs.last_word({**structlog.contextvars.get_contextvars(), **summary})
        return True

    def end_persona(self, persona: Persona) -> None:
        """One of several personas has ended, well or badly."""
        ending = persona.ending or FailureReport()
        self._print(ending.problems, f"{persona.blood_type}: ")
        in_line = {} if self._is_terminal or not ending.problems else {"problems": list(ending.problems)}
        log = persona.log
        (log.info if ending.exit_code is ExitCode.DONE else log.error)("persona_finished", **persona.details, **in_line)

    def _print(self, problems: Sequence[str], prefix: str = "") -> None:
        """On a terminal problems are lines of their own."""
        if self._is_terminal:
            for problem in problems:
                click.secho(f"error: {prefix}{problem}", file=self._stderr, fg="red")

    @property
    def bundles(self) -> list[str]:
        """URIs of what is published, in the order of the personas."""
        found = [persona.summary.get("bundle") for persona in self.personas] if self.personas else [self.facts.get("bundle")]
        return [str(uri) for uri in found if uri]

    def leave(self) -> None:
        """Hand the exit code to Click."""
        if self._code is not ExitCode.DONE:
            raise click.exceptions.Exit(self._code)


def _given(options: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Dotted settings that the command line sets."""
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


def _commented_yaml(values: dict[str, Any]) -> str:
    """`values` as YAML, each setting under a comment with its meaning and range."""
    lines = ["# Settings of 'lora-trainer run'; give this file back with --config."]
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

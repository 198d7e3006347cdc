"""The command `sweep`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import structlog

from entrypoint import terminal
from entrypoint.options import Command, check_run_credentials, given_settings, run_options
from entrypoint.run_end import RunEnd
from lora_trainer import logs
from lora_trainer.errors import GateError
from lora_trainer.escaping import escaped
from lora_trainer.signals import Interruption


@click.command(cls=Command)
@run_options
@click.option(
    "--try",
    "tries",
    multiple=True,
    metavar="SETTING=VALUE,VALUE,...",
    help="Values to try, such as training.epochs=2,3. Repeatable: all combinations are tried.",
)
@click.option("--json", "as_json", is_flag=True, help="Print sweep.json instead of the table.")
@click.pass_obj
def sweep(
    interruption: Interruption,
    /,
    config_file: Path | None,
    overrides: Sequence[str],
    tries: Sequence[str],
    as_json: bool,
    **options: Any,
) -> None:
    """Try a few values of training settings, and publish the best adapter.

    Trains one trial for each combination of the --try values, 2 to 32, in one process on one loaded base. After a
    quarter and after half of its own schedule, each trial is compared with the others by held-out loss; the better half
    goes on, at least two. Those that reach the end are evaluated, lowest loss first, until one passes all gates; if none
    does, the one that misses the fewest wins. Only the winner is published, as the run that 'run' makes of its settings.

    \b
    Can be tried: training.learning_rate, epochs, max_steps, sequences_per_step, schedule, warmup_fraction,
    weight_decay, max_grad_norm and seed; lora.r, alpha and dropout. They leave base and held-out records alone.

    \b
    Writes under OUTPUT:
      adapters/<TYPE>/<run id>/          the winner's bundle
      runs/<TYPE>/sweeps/<sweep id>/     sweep.json with every trial's measurements, and sweep.html
    Repeating an interrupted command continues where it stopped; repeating a finished one prints its result.

    \b
    Examples:
      lora-trainer sweep --blood-type A --try training.learning_rate=1e-4,2e-4,5e-4
      lora-trainer sweep --config run.yaml --blood-type A --try training.learning_rate=2e-4,5e-4 --try training.epochs=2,3

    Prints the table, the page's place and the bundle's URI. Exits with 4 if the winner misses a gate.
    """
    from lora_trainer.evaluate.gates import missed_gate_messages
    from lora_trainer.report.formatting import value_text
    from lora_trainer.report.sweep_page import sweep_table
    from lora_trainer.run.job import ProcessContext
    from lora_trainer.run.sweep import sweep as run_sweep
    from lora_trainer.run.sweep_trials import trial_configs
    from lora_trainer.store.contacts import Contacts
    from lora_trainer.store.retry import RetryBudget

    logs.configure("info", "auto")
    end = RunEnd(interruption)
    with end:
        trials = trial_configs(tries, given_settings(options, overrides), config_file)
        first = trials[0].config
        logs.configure(first.logging.level, first.logging.format)
        end.work_dir = first.work_dir
        check_run_credentials(first)
        structlog.contextvars.bind_contextvars(blood_type=str(first.blood_type))
        # bind the real stream now: sys.stderr is about to be redirected to the log
        console = terminal.console(sys.stderr) if sys.stderr.isatty() and first.logging.format != "json" else None
        process = ProcessContext(interruption, RetryBudget(first.storage, Contacts(first.work_dir / "stores")), console)
        with logs.libraries_print_to_the_log():
            found = run_sweep(trials, process)
        record, outcome = found.record, found.outcome
        settings = dict(record.trial(outcome.run_id).settings)
        end.facts.update(
            sweep_id=record.sweep_id,
            trials=len(record.trials),
            page=found.page_uri,
            run_id=outcome.run_id,
            settings=settings,
            bundle=outcome.bundle_uri,
            report=outcome.report_uri,
            passed=outcome.verdict.passed,
            sense=outcome.verdict.sense,
            not_judged=dict(outcome.verdict.not_judged),
        )
        if as_json:
            click.echo(escaped(json.dumps(record.as_json(), indent=2, ensure_ascii=False)))
        else:
            terminal.console(sys.stdout).print(sweep_table(record))
            click.echo(f"page:   {found.page_uri}")
            click.echo(f"winner: {' '.join(f'--set {name}={value_text(value)}' for name, value in settings.items())}")
            click.echo(f"bundle: {outcome.bundle_uri}")
        if not outcome.verdict.passed:
            raise GateError(missed_gate_messages(outcome.verdict))
    end.leave()

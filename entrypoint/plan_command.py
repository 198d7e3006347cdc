"""The command `plan`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from entrypoint import terminal
from entrypoint.options import Command, check_credentials, given_settings, run_options
from lora_trainer.config_sources import settle_each
from lora_trainer.escaping import escaped
from lora_trainer.signals import Interruption


class _Finite(click.FloatRange):
    """A finite number within a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


@click.command(cls=Command)
@run_options
@click.option(
    "--gpu-memory-gib",
    type=_Finite(min=1, max=10_000),
    metavar="GIB",
    help="Free memory of the GPU to plan for. Default: that of the GPU here.",
)
@click.option("--price-per-hour", type=_Finite(min=0), metavar="X", help="Price of the machine, in any currency.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def plan(
    interruption: Interruption,
    /,
    config_file: Path | None,
    overrides: Sequence[str],
    gpu_memory_gib: float | None,
    price_per_hour: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Print what 'run' would take, before it is started.

    Reads the data, and the base's configuration and tokenizer, but not its weights. Needs no GPU and no torch. Takes the options
    of 'run'.

    \b
    Prints for each persona:
      records and tokens, to train on and held out
      optimizer steps
      the layout that the memory planner chooses: micro batch, checkpointing, GiB
      seconds of training and evaluation; then those of the start and of the whole run, and its price
    Seconds are a range, estimated from measurements on one H200 or H100. There are none for a CPU.

    \b
    Examples:
      lora-trainer plan --blood-type A --gpu-memory-gib 79 --price-per-hour 2.5
      lora-trainer plan --config run.yaml --blood-type all --gpu-memory-gib 23 --json

    Exits with the code that 'run' would end with: 2, 3, 5 or 6.
    """
    from lora_trainer.report.plan_table import plan_table
    from lora_trainer.run.job import ProcessContext
    from lora_trainer.run.planning import plan_runs
    from lora_trainer.store.retry import RetryBudget
    from lora_trainer.train.cuda_driver import Gpu, visible_gpu
    from lora_trainer.train.memory_plan import GIB

    configs = settle_each(given_settings(options, overrides), config_file=config_file)
    first = configs[0]
    check_credentials((first.data, first.evaluation.prompts), base=first.base.model)
    gpu = None
    if gpu_memory_gib is not None:
        gpu = Gpu(None, int(gpu_memory_gib * GIB))
    elif first.device == "cuda":
        gpu = visible_gpu()
    planned = plan_runs(configs, ProcessContext(interruption, RetryBudget(first.storage)), gpu)
    if as_json:
        click.echo(escaped(json.dumps(planned.as_json(price_per_hour), indent=2, ensure_ascii=False)))
    else:
        terminal.console(sys.stdout).print(plan_table(planned, price_per_hour))

"""The Click command line. It turns every failure into one message and an exit code."""

from __future__ import annotations

import io
from collections.abc import Sequence

import click

from entrypoint.adapter_commands import chat, compare, evaluate, publish
from entrypoint.convert_command import convert
from entrypoint.data_commands import generate, validate
from entrypoint.plan_command import plan
from entrypoint.review_commands import promote, review
from entrypoint.run_commands import check_storage, run, show_config
from entrypoint.sweep_command import sweep
from lora_trainer import __version__, logs
from lora_trainer.errors import ExitCode, Interrupted
from lora_trainer.escaping import escaped
from lora_trainer.redaction import redacted, remember_user_info
from lora_trainer.run.failure_report import FailureReport, failure_report
from lora_trainer.signals import Interruption


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="lora-trainer")
def cli() -> None:
    """Turn a persona's JSONL into a LoRA adapter on Qwen2.5-7B-Instruct.

    \b
    Settings come from these sources, strongest first:
      1. options of the command, --set SETTING=VALUE among them
      2. environment: LORA_TRAINER_BLOOD_TYPE, LORA_TRAINER_TRAINING__EPOCHS, ...
         (LORA_TRAINER_CONFIG names the file below)
      3. the YAML file given with --config
      4. defaults: 'lora-trainer show-config' explains every setting

    \b
    S3 access uses the standard AWS variables, profiles and roles (AWS_ENDPOINT_URL for MinIO and
    similar stores, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, IRSA).

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
    logs.configure("warning", "auto")


for command in (run, sweep, evaluate, chat, publish, review, promote, compare):
    cli.add_command(command)
for command in (validate, convert, generate, plan, check_storage, show_config):
    cli.add_command(command)


def run_cli(arguments: Sequence[str], interruption: Interruption | None = None) -> int:
    """Run the command line and return its exit code. User errors print a message, never a traceback."""
    interruption = interruption or Interruption()
    remember_user_info(*arguments)
    try:
        result = cli.main(args=list(arguments), prog_name="lora-trainer", standalone_mode=False, obj=interruption)
    except click.exceptions.Abort:
        return ExitCode.INTERRUPTED
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        # Click's message quotes the arguments, which may contain credentials
        click.echo(escaped(redacted(shown.getvalue())), err=True, nl=False)
        return error.exit_code
    except SystemExit:
        # Click and Rich exit with 1 on a closed pipe, but a reader such as `head` that stops early is not a failure
        return ExitCode.DONE
    except Interrupted:
        return ExitCode.INTERRUPTED
    except Exception as error:
        report = failure_report(error, interruption) or FailureReport(ExitCode.BUG)
        if report.exit_code is ExitCode.INTERRUPTED:
            return ExitCode.INTERRUPTED
        said = "error: a bug, please report it" if report.exit_code is ExitCode.BUG else "error"
        for line in (*(f"{said}: {problem}" for problem in report.problems), *report.frames):
            click.echo(escaped(line), err=True)
        return report.exit_code
    return result if isinstance(result, int) else ExitCode.DONE

"""Entry point of `python -m entrypoint` and the console script. Installs signal handlers before the slow imports."""

from __future__ import annotations

import os
import sys

from entrypoint.terminal import open_streams, report_lost_output
from lora_trainer.errors import ExitCode, Interrupted
from lora_trainer.run.reexec import StepDown, reexec, unblock_signals
from lora_trainer.signals import Interruption


def main() -> None:
    """Run the command line and exit with its code."""
    interruption = Interruption()
    try:
        interruption.install()
        open_streams()
        unblock_signals()
        from entrypoint.cli import run_cli

        code = run_cli(sys.argv[1:], interruption)
    except (Interrupted, ImportError) as error:
        meaning = interruption.meaning_of(error)
        if not isinstance(meaning, Interrupted):
            raise
        sys.stderr.write(f"interrupted by {meaning.signal_name} before the job began\n")
        code = ExitCode.INTERRUPTED
    except StepDown as step_down:
        reexec(step_down.limit)
    if code != ExitCode.STORAGE:
        report_lost_output()
    # os._exit skips the libraries' exit handlers and threads, which have nothing to save and sometimes hang
    os._exit(code)


if __name__ == "__main__":
    main()

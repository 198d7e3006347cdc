"""`python -m entrypoint` and the console script: signals first, then everything that takes time to import."""

from __future__ import annotations

import os
import sys

from lora_trainer.errors import ExitCode, Interrupted
from lora_trainer.run.reexec import StepDown, reexec, unblock_signals
from lora_trainer.signals import INTERRUPTION


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        INTERRUPTION.install()
        unblock_signals()
        from entrypoint.cli import run_cli

        code = run_cli(sys.argv[1:])
    except (Interrupted, ImportError) as error:
        meaning = INTERRUPTION.meaning_of(error)
        if not isinstance(meaning, Interrupted):
            raise
        sys.stderr.write(f"interrupted by {meaning.signal_name} before the job began\n")
        code = ExitCode.INTERRUPTED
    except StepDown as step_down:
        reexec(step_down.limit)
    # not sys.exit: libraries' threads and exit handlers have nothing left to save, and some of them hang
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

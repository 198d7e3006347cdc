"""`python -m entrypoint` and the console script: signals first, then everything that takes time to import."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from lora_trainer.errors import ExitCode, Interrupted


def main() -> None:
    """Run the command line and exit with its code."""
    # PID 1 has no default handler: without one, SIGTERM is ignored until the kernel kills the job
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    try:
        from entrypoint.cli import run_cli

        code = run_cli(sys.argv[1:])
    except Interrupted as interruption:
        sys.stderr.write(f"interrupted by {interruption.signal_name} before the job began\n")
        code = ExitCode.INTERRUPTED
    # not sys.exit: libraries' threads and exit handlers have nothing left to save, and some of them hang
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # a second signal means now
    signal.signal(number, lambda *_: os._exit(ExitCode.INTERRUPTED))
    raise Interrupted(signal.Signals(number).name)


if __name__ == "__main__":
    main()

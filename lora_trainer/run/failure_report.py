"""Turn the exception that ended a run into an exit code and messages for the log, Kubernetes and the operator."""

from __future__ import annotations

import errno
import os
import re
import tempfile
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_trainer.errors import ConfigError, ExitCode, Interrupted, LoraTrainerError
from lora_trainer.redaction import redacted
from lora_trainer.run.reexec import StepDown
from lora_trainer.signals import Interruption
from lora_trainer.store.local import explain

_SHOWN_FRAMES: Final = 12


@dataclass(frozen=True, slots=True)
class FailureReport:
    """Outcome of a run or a process. Does not reference the exception, whose frames would keep tensors alive."""

    exit_code: ExitCode = ExitCode.DONE
    outcome: str = "done"
    """`done`, `interrupted`, `bug`, or the name of the error's class."""
    problems: tuple[str, ...] = ()
    frames: tuple[str, ...] = ()
    """Stack frames of a bug, innermost last."""


WORKING_DIRECTORY_GONE: Final = (
    "the working directory has been deleted, so relative paths lead nowhere; change to a folder that exists, or use absolute paths"
)

# messages that cannot quote training data: those of the GPU libraries, and Python's about missing attributes and modules
_OS_ERROR: Final = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust, such as safetensors, report a failed system call."""
_DISK_FAULTS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM})
"""Faults of the machine's disks, wherever in a library they happen."""
_SAFE_MESSAGE: Final = re.compile(
    r"(?:CUDA|cuDNN|CUBLAS|CUSPARSE|NCCL|NVML|Triton)\b.*|[\w.' ]+ has no attribute '\w+'|No module named '[\w.]+'",
    re.ASCII,
)


def failure_report(error: BaseException | None, interruption: Interruption, folder: Path | None = None) -> FailureReport | None:
    """Return the report on `error`, or None if it is neither a failure nor an interruption.

    If a bug's message may quote training data, write it to a file in `folder` (by default the system's temporary folder).
    """
    error = interruption.meaning_of(error)
    if error is None:
        return FailureReport()
    if isinstance(error, LoraTrainerError):
        problems = tuple(map(redacted, error.problems))
        if error.exit_code in (ExitCode.CONFIG, ExitCode.DATA) and is_working_directory_gone():
            # most often why a file was not found
            problems += (WORKING_DIRECTORY_GONE,)
        return FailureReport(error.exit_code, type(error).__name__, problems)
    if isinstance(error, Interrupted | KeyboardInterrupt):
        kept = getattr(error, "kept", "") or "no half-published bundle is visible"
        return FailureReport(ExitCode.INTERRUPTED, "interrupted", (f"interrupted: {kept}; run the same command again",))
    if isinstance(error, SystemExit | GeneratorExit | StepDown):
        return None
    if disk := _disk_fault(error, folder):
        return FailureReport(disk.exit_code, type(disk).__name__, tuple(map(redacted, disk.problems)))
    if isinstance(error, FileNotFoundError) and is_working_directory_gone():
        return FailureReport(ExitCode.CONFIG, ConfigError.__name__, (WORKING_DIRECTORY_GONE,))
    # this also handles panics in a library's Rust code, which derive from BaseException
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    problem = f"{type(error).__module__}.{type(error).__name__}{_safe_message(error, folder)}"
    return FailureReport(ExitCode.BUG, "bug", (redacted(problem),), tuple(frames[-_SHOWN_FRAMES:]))


def _disk_fault(error: BaseException, folder: Path | None) -> LoraTrainerError | None:
    """Return the storage error for a local disk that failed inside a library, or None for any other failure."""
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (found := _OS_ERROR.search(str(error))):
        code = int(found[1])
    # without a file, an OSError may be about a socket
    may_be_a_socket = isinstance(error, OSError) and error.filename is None
    if code not in _DISK_FAULTS or (may_be_a_socket and code not in (errno.ENOSPC, errno.EDQUOT)):
        return None
    where = error if isinstance(error, OSError) else OSError(code, os.strerror(code))
    return explain(where, folder or Path(tempfile.gettempdir()))


def is_working_directory_gone() -> bool:
    """Return whether somebody has deleted the working directory of this process."""
    try:
        Path.cwd()
    except OSError:
        return True
    return False


def _safe_message(error: BaseException, folder: Path | None) -> str:
    """Return the message's first line if it cannot quote data. Otherwise write the traceback to a file and return its name."""
    # redact before cutting: half of a credential would not be recognised
    first_line = redacted(str(error)).partition("\n")[0]
    if _SAFE_MESSAGE.fullmatch(first_line) or isinstance(error, MemoryError):
        return f": {first_line[:1000]}"
    if isinstance(error, OSError) and error.strerror:
        return f": {error.strerror}" + (f": {error.filename}" if error.filename else "")
    left_out = "its message is left out: it may quote training text"
    with suppress(OSError):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", prefix="bug-", suffix=".txt", dir=folder, delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(redacted("".join(traceback.format_exception(error))))
        left_out += f"; {file.name} has it"
    return f" ({left_out})"

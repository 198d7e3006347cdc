"""Identify the process that holds a lease, and find out whether it is still running on this machine."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class Document(BaseModel):
    """A part of the lease's JSON: immutable and strictly validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Process(Document):
    """Identity of a Linux process: enough for another process on the machine to tell whether it is still running."""

    boot_id: str
    pid_namespace: str
    """Each container has its own namespace, where the same pid is a different process."""
    pid: int = Field(ge=1, lt=2**31)
    started_ticks: int
    """Clock ticks from boot to the process's start, to detect a reused pid."""


def this_process() -> Process | None:
    """Return the current process, or None if the system has no usable `/proc`."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
        return Process(boot_id=boot_id, pid_namespace=namespace, pid=os.getpid(), started_ticks=_started_ticks(os.getpid()))
    except (OSError, ValueError, IndexError):
        return None


def is_gone(process: Process, host: str) -> bool:
    """Return whether the process ran on this machine, in our pid namespace, and has ended. False if that is unknown."""
    here = this_process()
    if here is None or host != socket.gethostname():
        return False
    if (process.boot_id, process.pid_namespace) != (here.boot_id, here.pid_namespace):
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        # no permission: the process exists, but belongs to another user
        pass
    try:
        return _started_ticks(process.pid) != process.started_ticks or _is_zombie(process.pid)
    except (OSError, ValueError, IndexError):
        return False


def _started_ticks(pid: int) -> int:
    return int(_stat_fields(pid)[19])


def _is_zombie(pid: int) -> bool:
    """Return whether the process has exited. If only its main thread has, the other threads may still write."""
    return _stat_fields(pid)[0] in ("Z", "X") and len(list(Path(f"/proc/{pid}/task").iterdir())) == 1


def _stat_fields(pid: int) -> list[str]:
    """Return the fields of `/proc/<pid>/stat`, starting at the third, the state."""
    # split after the second field, the name in parentheses, which may itself contain spaces and parentheses
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()

"""Which process holds a lease, and whether it still runs on this machine."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Process(Document):
    """A process of Linux, so that another one of the same machine can tell whether it is still there."""

    boot_id: str
    pid_namespace: str
    """Each container has its own, where the same number is another process."""
    pid: int = Field(ge=1, lt=2**31)
    started_ticks: int
    """Since the machine's start; tells it from a later process with the same number."""


def this_process() -> Process | None:
    """None where the system does not tell."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
        return Process(boot_id=boot_id, pid_namespace=namespace, pid=os.getpid(), started_ticks=_started_ticks(os.getpid()))
    except (OSError, ValueError, IndexError):
        return None


def is_gone(process: Process, host: str) -> bool:
    """Whether it ran on this machine, where it could be seen, and does not any more."""
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
        # somebody else's, so it is there
        pass
    try:
        return _started_ticks(process.pid) != process.started_ticks or _is_zombie(process.pid)
    except (OSError, ValueError, IndexError):
        return False


def _stat(pid: int) -> list[str]:
    # behind the name, which may hold anything: state, ppid, ...
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def _started_ticks(pid: int) -> int:
    return int(_stat(pid)[19])


def _is_zombie(pid: int) -> bool:
    """Dead and not yet waited for. One whose other threads still end may still be writing."""
    return _stat(pid)[0] in ("Z", "X") and len(list(Path(f"/proc/{pid}/task").iterdir())) == 1

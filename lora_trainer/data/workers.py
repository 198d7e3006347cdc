"""Check the batches of a large file in several processes, and return the results in the file's order.

Processes, because the analyser and Python share the work about equally: threads would leave Python's half on one core. On Linux
they are forked from a process of their own that has loaded the analyser's model, so that all share its 450 MiB. Starting takes
about two seconds, so small files are checked in the caller's process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from threading import Thread
from typing import Final

from lora_trainer.data.checking import BatchChecker, CheckedBatch, CheckSettings, LineBatch
from lora_trainer.data.jsonl import RawLine
from lora_trainer.errors import HardwareError

BATCH_LINES: Final = 512
BATCH_BYTES: Final = 256 * 1024
"""A batch ends at this many lines or bytes, whichever comes first. It takes a worker about a third of a second."""
ONE_PROCESS_BYTES: Final = 8 * 1024 * 1024
"""A file of up to this size, about 18,000 records, is checked in one process unless the user asks for more."""
BATCHES_IN_FLIGHT: Final = 3
"""Batches for each worker that are being checked or whose results wait. More would only take memory."""
MAX_WORKERS: Final = 8
"""The process that reads the file and finds duplicates keeps about this many busy."""
IS_MODEL_SHARED: Final = sys.platform == "linux"
"""Elsewhere, system libraries don't survive a fork, and each worker loads its own model."""
SHARED_MIB: Final = 600 if IS_MODEL_SHARED else 0
"""Memory of the process that workers are forked from."""
WORKER_MIB: Final = 100 if IS_MODEL_SHARED else 600


def checked_batches(
    batches: Iterable[LineBatch], settings: CheckSettings, workers: int | None
) -> Generator[CheckedBatch, None, None]:
    """Yield the result of each batch, in order.

    `workers` is the number of processes; None uses the usable cores for a file of more than `ONE_PROCESS_BYTES`. Reads at most
    `BATCHES_IN_FLIGHT` batches for each worker ahead. Raises `HardwareError` if a worker is killed, and what checking raises.
    """
    batches = iter(batches)
    head: list[LineBatch] = []
    if workers is None:
        size_bytes = 0
        for batch in batches:
            head.append(batch)
            size_bytes += sum(len(line.raw) for line in batch.lines if isinstance(line, RawLine))
            if size_bytes > ONE_PROCESS_BYTES:
                workers = usable_workers()
                break
    batches = chain(head, batches)
    pool = _new_pool(settings, workers) if workers and workers > 1 else None
    if pool is None or workers is None:
        checker = BatchChecker(settings)
        yield from map(checker.check, batches)
        return
    try:
        yield from _in_processes(batches, pool, BATCHES_IN_FLIGHT * workers)
    except BrokenProcessPool:
        raise HardwareError(
            f"one of {workers} processes that check the data was killed, most often because memory ran out: they need about "
            f"{SHARED_MIB + workers * WORKER_MIB:,} MiB; free memory or raise its limit, or check it with 'validate --workers 1'"
        ) from None


def _new_pool(settings: CheckSettings, workers: int) -> ProcessPoolExecutor | None:
    """Return a pool whose processes start with their first batches, or None if the system has no semaphores for one."""
    # no plain fork: this process may have threads, as tokenizers and torch start them, and its fork could deadlock
    context = multiprocessing.get_context("forkserver" if IS_MODEL_SHARED else "spawn")
    context.set_forkserver_preload(["lora_trainer.data.worker_preload"])
    # starting this helper of multiprocessing unblocks signals, so do it before they are blocked
    resource_tracker.ensure_running()
    try:
        return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(settings,))
    except (OSError, NotImplementedError):
        # a container whose /dev/shm is missing or read-only
        return None


def _in_processes(batches: Iterator[LineBatch], pool: ProcessPoolExecutor, most_waiting: int) -> Iterator[CheckedBatch]:
    waiting: deque[Future[CheckedBatch]] = deque()
    try:
        for batch in batches:
            with _signals_blocked():
                waiting.append(pool.submit(_check, batch))
            if len(waiting) >= most_waiting:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # after an error or an interruption, wait for the batches being checked, a second at most: a process that exits without
        # closing its pool leaves a warning about leaked semaphores
        pool.shutdown(wait=True, cancel_futures=True)
        # multiprocessing has no public way to end the process that workers are forked from, and it would keep the model's memory
        # while the job trains; a test finds out if a Python no longer has this one
        forkserver._forkserver._stop()  # type: ignore[attr-defined]


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM in the block; workers started there inherit this. Ctrl-C signals them too, and is the caller's."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def usable_workers() -> int:
    """Return how many workers make sense here, from 1 to `MAX_WORKERS`: by usable cores, CPU quota and free memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota_cores(), (_free_mib() - SHARED_MIB) // WORKER_MIB, MAX_WORKERS))


_CGROUP: Final = Path("/sys/fs/cgroup")


def _quota_cores() -> int:
    """Return the cores that the container's CPU quota allows, rounded up. Cgroup v2: "max 100000", "150000 100000"."""
    quota, period = (_words(_CGROUP / "cpu.max") or ["max", "1"])[:2]
    return MAX_WORKERS if quota == "max" else -(-int(quota) // int(period))


def _free_mib() -> int:
    """Return the memory that this process can still take, by the machine and by the container's limit."""
    found = [int(line.split()[1]) // 1024 for line in _lines(Path("/proc/meminfo")) if line.startswith("MemAvailable:")]
    limit, used = _words(_CGROUP / "memory.max"), _words(_CGROUP / "memory.current")
    if limit and used and limit[0] != "max":
        found.append((int(limit[0]) - int(used[0])) // 2**20)
    return min(found, default=SHARED_MIB + MAX_WORKERS * WORKER_MIB)


def _words(path: Path) -> list[str]:
    return [word for line in _lines(path) for word in line.split()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        # macOS, or cgroup v1
        return []


# --- in a worker ---------------------------------------------------------------------------------------

_checkers: list[BatchChecker] = []
"""The checker of this worker, once it has started."""


def _start_worker(settings: CheckSettings) -> None:
    # each worker has one core
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    Thread(target=_end_with_parent, daemon=True).start()
    _checkers.append(BatchChecker(settings))


def _end_with_parent() -> None:
    """Exit once the parent is gone: it may have been killed, or have had no time to end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)


def _check(batch: LineBatch) -> CheckedBatch:
    return _checkers[0].check(batch)

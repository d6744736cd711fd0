"""One Snakemake process and its folder: what a killed run left is cleared away, and jobs end with their Snakemake.

After SIGKILL Snakemake leaves its locks behind and refuses the folder until someone says `--unlock`; and the job it ran
goes on computing. Here every Snakemake holds a shared lock of the operating system, which ends with the process however
that ends, so that the next one can tell stale locks from those of a run that is alive.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil

_SNAKEMAKE_PID = "PIPELINE_SNAKEMAKE_PID"
_POLL_S = 0.5
_GRACE_S = 20.0


def adopt_jobs() -> None:
    """In Snakemake: let the jobs it starts from now on know whom they belong to."""
    os.environ[_SNAKEMAKE_PID] = str(os.getpid())


def clear_stale_locks(state: Path = Path(".snakemake")) -> bool:
    """Join the runs that are alive in this folder until this process ends; the only one removes locks left behind.

    Args:
        state: Snakemake's own folder.

    Returns:
        Whether no other run is alive.
    """
    state.mkdir(exist_ok=True)
    # Never closed, and not inherited by jobs: the lock lives exactly as long as this process.
    descriptor = os.open(state / "alive", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        alone = False
    else:
        alone = True
        shutil.rmtree(state / "locks", ignore_errors=True)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return alone


def end_with_snakemake() -> None:
    """In a job: interrupt this process when the Snakemake that started it is gone; elsewhere do nothing."""
    if pid := os.environ.get(_SNAKEMAKE_PID):
        threading.Thread(target=_watch, args=(int(pid),), daemon=True, name="watch snakemake").start()


def _watch(pid: int) -> None:
    try:
        parent = psutil.Process(pid)
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_POLL_S)
    except psutil.NoSuchProcess:
        pass
    # To the main thread itself, so that what it waits for is interrupted too.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    time.sleep(_GRACE_S)
    os._exit(128 + signal.SIGINT)

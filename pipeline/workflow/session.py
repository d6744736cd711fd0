"""One Snakemake process and its folder: what a killed run left is cleared away, and jobs end with their Snakemake.

After SIGKILL Snakemake leaves its locks and half-made outputs behind and refuses the folder until someone says
`--unlock` and `--rerun-incomplete`; and the job it ran goes on computing. Here every Snakemake holds a shared lock of
the operating system, which ends with the process however that ends, so that the next one can tell what is stale.
"""

from __future__ import annotations

import base64
import fcntl
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

_SNAKEMAKE_PID = "PIPELINE_SNAKEMAKE_PID"
_POLL_S = 0.5
_INTERRUPTS = 4
_INTERRUPT_INTERVAL_S = 5.0


def adopt_jobs() -> None:
    """In Snakemake: its jobs find this Python and this package, environment active or not, and know whose they are."""
    os.environ[_SNAKEMAKE_PID] = str(os.getpid())
    _put_first("PATH", Path(sys.executable).parent)
    _put_first("PYTHONPATH", Path(__file__).parents[2])


def _put_first(variable: str, folder: Path) -> None:
    others = [part for part in os.environ.get(variable, "").split(os.pathsep) if part and part != str(folder)]
    os.environ[variable] = os.pathsep.join([str(folder), *others])


def clear_after_kill(state: Path = Path(".snakemake")) -> bool:
    """Join the runs that are alive in this folder until this process ends; the only one clears what killed ones left.

    That is Snakemake's locks, and outputs of jobs that had begun and did not end, which Snakemake would not use either.

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
        for output in _unfinished(state / "incomplete"):
            if output.is_dir():
                shutil.rmtree(output)
            else:
                output.unlink(missing_ok=True)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return alone


def _unfinished(markers: Path) -> Iterator[Path]:
    """The outputs that Snakemake marked when their jobs began: a marker's name is the path in base 64, in pieces."""
    for marker in markers.rglob("*"):
        if marker.is_file():
            name = "".join(part.removeprefix("@") for part in marker.relative_to(markers).parts)
            yield Path(base64.urlsafe_b64decode(name).decode())


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
    # More than once, as Python drops an interrupt that arrives in a callback; to the main thread itself, so that what
    # it waits for is interrupted too.
    for _ in range(_INTERRUPTS):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(_INTERRUPT_INTERVAL_S)
    os._exit(128 + signal.SIGINT)

"""Clusters for many tests: one of four devices, and one that this package did not start, of a user's own processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from distributed import Client

import pipeline

ROOT = Path(__file__).resolve().parents[2]
# Short leases, so that no test waits half a minute for the lock of a dead driver; but longer than its ranks live.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "DASK_DISTRIBUTED__SCHEDULER__LOCKS__LEASE_TIMEOUT": "8s",
    "DASK_DISTRIBUTED__SCHEDULER__LOCKS__LEASE_VALIDATION_INTERVAL": "500ms",
}


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """Four devices, for all files that ask for nothing special and leave the workers alive.

    Processes that import torch take far longer to start than most tests to run.
    """
    with pipeline.local_cluster([pipeline.Device("cpu")] * 4, dashboard=False) as connected:
        yield connected


@pytest.fixture
def foreign_cluster(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Start a scheduler, and one worker per list of further options; gives the scheduler file."""
    started: list[subprocess.Popen[bytes]] = []

    def dask(*arguments: str) -> None:
        command = [sys.executable, "-m", "dask", *arguments, "--host", "127.0.0.1", "--no-dashboard"]
        started.append(subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, stderr=subprocess.DEVNULL))

    def start(*workers: Sequence[str]) -> Path:
        file = tmp_path / "scheduler.json"
        dask("scheduler", "--port", "0", "--scheduler-file", str(file))
        deadline = time.monotonic() + 30
        while not file.exists():
            assert time.monotonic() < deadline, "the scheduler did not start"
            time.sleep(0.05)
        for options in workers:
            dask("worker", "--scheduler-file", str(file), "--nthreads", "1", *options)
        return file

    yield start
    for process in reversed(started):
        family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait(timeout=10)

"""Clusters to use in a `with` block: one on this machine for the job at hand, or one that exists already."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import dask.config
from distributed import Client, Nanny, Scheduler, SpecCluster
from distributed.system import MEMORY_LIMIT
from distributed.utils import get_mp_context

from pipeline.cluster.devices import DEVICE_VARIABLE, Device, device_to_json, real_devices, visible_gpus
from pipeline.errors import InputError

LOOPBACK = "127.0.0.1"
_CLOSE_S = 10.0
_NOISY_LOGGERS = ("distributed", "distributed.client", "tornado.application", "bokeh")

_CONFIGURATION: dict[str, Any] = {
    # A pinned task whose worker was killed must fail instead of staying pending for ever.
    "distributed.scheduler.allowed-failures": 0,
    "distributed.scheduler.worker-ttl": "60s",
    # A worker that restarts slowly on a busy machine must not be given up.
    "distributed.deploy.lost-worker-timeout": "60s",
    # Dask's own profiler takes the interpreter lock a hundred times a second, in the middle of a timed step.
    "distributed.worker.profile.enabled": False,
    # Dask wakes each of its processes fifty times a second to see whether its loop is alive; on a machine whose cores
    # are all taken, each wake-up is taken from a rank, and all ranks wait for the slowest.
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.worker.memory.monitor-interval": "2s",
    # The processes of a DataLoader are children of a worker, which a daemonic process may not have. A worker still ends
    # with its nanny, and they with it.
    "distributed.worker.daemon": False,
    # Tensors are not Dask's to spill; a rank that is paused would stop its gang. Only the last fence stays.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
}
# What ranks free they soon need again. With Dask's own values every large tensor is made of fresh pages, which costs
# 30-65 % of a training step; so it is, whatever the values, in the heaps that the system's library gives to threads
# other than the first, which hold no more than 64 MiB: ranks run in such threads, and shall use the first one's.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
"""Environment of a worker process, by which its memory is managed."""


class LocalClient(Client):
    """The client of a cluster on this machine, which ends with it: by ``close()``, or at the end of a `with` block."""

    _ending: contextlib.ExitStack | None = None

    def close(self, timeout: Any = _CLOSE_S) -> None:
        """End the cluster and its processes; harmless when it has ended."""
        ending, self._ending = self._ending, None
        if ending is None and self.status == "closed":  # as at the end of the interpreter, where little works any more
            return
        with _without_interrupts():
            try:
                super().close(timeout=timeout)  # type: ignore[no-untyped-call]
            finally:
                if ending is not None:
                    atexit.unregister(self.close)
                    ending.close()


def local_cluster(devices: Sequence[Device] | None = None, *, dashboard: bool = True) -> LocalClient:
    """A cluster on this machine, one worker process per device, until it is closed, as by the end of a `with` block.

    The workers are named `cpu:0`, `cpu:1`, `gpu:0`, carry the resource `CPU: 1` or `GPU: 1`, and everything listens on
    loopback only, on free ports. The dashboard's address is the client's `dashboard_link`. Without `devices` it takes
    `real_devices()`. A script that calls this needs the `if __name__ == "__main__"` guard.

    Raises InputError where there is no device, or a GPU this machine does not have.
    """
    chosen = tuple(real_devices() if devices is None else devices)
    _check(chosen)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(_worker_environment())
        stack.enter_context(dask.config.set(_CONFIGURATION))
        stack.enter_context(_start_method(chosen))
        with _without_interrupts():
            cluster = _start(chosen, dashboard=dashboard)
            stack.callback(_close, cluster)
            client = LocalClient(cluster, timeout=_CLOSE_S, set_as_default=False)  # type: ignore[no-untyped-call]
            client._ending = stack.pop_all()
            atexit.register(client.close)
        return client


@contextlib.contextmanager
def connect(address: str | Path, timeout_s: float = 10.0) -> Iterator[Client]:
    """A client of an existing cluster, by scheduler address (`tcp://host:port`) or path of its scheduler file.

    Raises InputError where the scheduler cannot be reached within `timeout_s` or the file is no scheduler file.
    """
    scheduler = _scheduler_address(address)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        try:
            client = Client(scheduler, timeout=timeout_s, set_as_default=False)
        except (OSError, ValueError) as error:  # TimeoutError is an OSError; ValueError: not an address at all.
            raise InputError(
                f"no Dask scheduler answers at {scheduler!r} within {timeout_s:g} s; "
                "give the address or the scheduler file of a running one."
            ) from error
        stack.callback(_close, client)
        yield client


def _check(devices: Sequence[Device]) -> None:
    if not devices:
        raise InputError("a cluster needs at least one device.")
    highest = max((device.index for device in devices if device.kind == "gpu"), default=-1)
    if highest >= 0 and highest >= (visible := visible_gpus()):
        raise InputError(f"GPU {highest} was asked for, but this machine has {visible} visible GPUs.")


def _start(devices: Sequence[Device], *, dashboard: bool) -> SpecCluster:
    counters = {"cpu": 0, "gpu": 0}
    workers = {}
    for device in devices:
        workers[f"{device.kind}:{counters[device.kind]}"] = {"cls": Nanny, "options": _worker_options(device)}
        counters[device.kind] += 1
    scheduler = {"host": LOOPBACK, "port": 0, "dashboard": dashboard, "dashboard_address": f"{LOOPBACK}:0"}
    return SpecCluster(
        workers=workers,
        scheduler={"cls": Scheduler, "options": scheduler},
        silence_logs=logging.CRITICAL,
        name="pipeline",
    )


def _close(closable: Client | SpecCluster) -> None:
    with _without_interrupts():
        closable.close(timeout=_CLOSE_S)


def _worker_options(device: Device) -> dict[str, Any]:
    return {
        "host": LOOPBACK,
        "nthreads": 1,  # A rank is the only task; its torch threads are the device's.
        "resources": {device.resource: 1},
        "env": _device_environment(device),
        "memory_limit": MEMORY_LIMIT,  # Unequal devices need unequal memory: each may use what the machine has.
        "dashboard": False,
        "silence_logs": logging.CRITICAL,
    }


def _device_environment(device: Device) -> dict[str, str]:
    threads = str(device.threads)
    environment = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "CUDA_VISIBLE_DEVICES": "",
        # The end of a gang closes sockets in use, of which torch's C++ side would print a warning each.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        DEVICE_VARIABLE: device_to_json(device),
    }
    if device.kind == "gpu":
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        environment["CUDA_VISIBLE_DEVICES"] = visible[device.index].strip() if visible else str(device.index)
    return environment


def _scheduler_address(address: str | Path) -> str:
    path = Path(address)
    if "://" in str(address) or not (path.is_file() or path.suffix == ".json"):
        return str(address)
    try:
        return str(json.loads(path.read_text())["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(path)!r} is not the scheduler file of a running Dask scheduler.") from error


@contextlib.contextmanager
def _worker_environment() -> Iterator[None]:
    """Set what must be in the environment before a worker process exists, and take it back at the end.

    A nanny writes its pre-spawn values into the environment of this process, and what it finds there beats the
    configuration, so values left over from an earlier cluster would win over ours.
    """
    spawned = {**dask.config.get("distributed.nanny.pre-spawn-environ"), **ALLOCATOR}
    before = {name: os.environ.get(name) for name in (*spawned, "PYTHONHASHSEED")}
    os.environ.update(ALLOCATOR)
    try:
        with dask.config.set({"distributed.nanny.pre-spawn-environ": spawned}):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _start_method(devices: Sequence[Device]) -> Iterator[None]:
    """Have worker processes forked from one that has loaded torch for all of them, and stays for later clusters.

    It ends with this process, and has the environment that it was started with: of what differs by device, libraries
    that read it as they are loaded see nothing, and ranks tell torch its threads themselves. Where something else in
    this process has started the fork server before, workers are as slow to start as spawned ones.

    Spawned are workers with a GPU, as a driver that was initialised before a fork is lost to the child, and those of
    other systems than Linux, whose libraries may not survive a fork.
    """
    forked = sys.platform == "linux" and all(device.kind == "cpu" for device in devices)
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver" if forked else "spawn"}):
        if forked:
            get_mp_context().set_forkserver_preload(["pipeline.cluster.preload"])
        yield


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended, so that a cluster is either there with a handle to it, or not.

    Threads and processes that start in the block inherit the blocked signal for good: Ctrl-C in a terminal then
    reaches this process only, and the workers end as their cluster closes, without a traceback each.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Multiprocessing starts this helper with the first process, and unblocks the signal as it does so.
    resource_tracker.ensure_running()
    # A thread that is older than the block may still take the signal, so the handler has to wait too.
    held: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the log of Dask off the terminal: what goes wrong is reported once, by the error of this package."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

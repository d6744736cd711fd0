"""Python's random numbers of a worker's process, for the rank that trains in it alone."""

from __future__ import annotations

import importlib
import random

_MODULES = ("dask.sizeof", "distributed.comm.core", "distributed.utils_comm", "distributed.worker")
"""Those that draw beside a running task, to sample what they measure or to spread attempts over time."""


def leave_to_the_rank() -> None:
    """Let Dask draw from a generator of its own, so that a seeded rank gets the numbers of a plain loop.

    Python has one generator for all threads of a process. May be called any number of times.
    """
    own = random.Random()
    for name in _MODULES:
        module = importlib.import_module(name)
        if getattr(module, "random", None) is random:
            setattr(module, "random", own)  # noqa: B010 - no module says that its imports may be replaced
    compression = importlib.import_module("distributed.protocol.compression")
    if getattr(compression, "randint", None) == random.randint:
        setattr(compression, "randint", own.randint)  # noqa: B010

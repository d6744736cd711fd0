"""Processes to simulate in: a Dask cluster with one thread per core, which needs no devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distributed import Client, LocalCluster

from pipeline.processor import usable_cores


@contextmanager
def simulators(count: int | None = None) -> Iterator[Client]:
    """A client of ``count`` processes, one per core if not given, that end with the block."""
    with (
        LocalCluster(
            n_workers=count or usable_cores(),
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client

"""Whether a worker may start processes of its own, as a ``DataLoader`` with ``num_workers`` does."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from typing import Any

from distributed import Client

from pipeline.cluster.devices import Member
from pipeline.errors import InputError


def check_loader_processes(client: Client, members: Sequence[Member], options: Mapping[str, Any]) -> None:
    """Raise ``InputError`` where the loader options ask for processes that a worker may not start.

    Dask starts workers as daemonic processes, which have no children, unless its configuration says otherwise; local
    clusters of this package do.
    """
    count = options.get("num_workers", 0)
    if not count:
        return
    found = client.run(_is_daemon, workers=[member.address for member in members])
    for member in members:
        if found[member.address]:
            raise InputError(
                f"loader option num_workers={count} needs processes that worker {member.name} may not start: start it "
                "with DASK_DISTRIBUTED__WORKER__DAEMON=False in its environment, or use num_workers=0"
            )


def _is_daemon() -> bool:
    """Runs on a worker."""
    return multiprocessing.current_process().daemon

"""How long a job takes and how much memory its processes hold together, noted in a file that its rule names.

Snakemake's `benchmark:` is not used. Twice a second it has the system walk the page tables of every process, some 15 ms
per GiB, which a measured training step would feel; and after half a minute it looks only twice a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

FILE_VARIABLE = "PIPELINE_USAGE"
_INTERVAL_S = 0.5


@contextlib.contextmanager
def noted_usage() -> Iterator[None]:
    """Within it, sample this process and its children; at the end write the file of `PIPELINE_USAGE`, where it is set.

    The file holds `wall_s`, since the process began, and `peak_memory_bytes`, the largest sum of resident memory: an
    upper bound, as memory that processes share counts once for each.
    """
    file = os.environ.get(FILE_VARIABLE)
    if not file:
        yield
        return
    process, ended, peaks = psutil.Process(), threading.Event(), [0]

    def sample() -> None:
        while True:
            peaks[0] = max(peaks[0], resident_memory(process))
            if ended.wait(_INTERVAL_S):
                return

    sampler = threading.Thread(target=sample, daemon=True, name="usage")
    sampler.start()
    try:
        yield
    finally:
        ended.set()
        sampler.join()
        usage = {"wall_s": round(time.time() - process.create_time(), 3), "peak_memory_bytes": peaks[0]}
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        aside = Path(f"{file}.partial")
        aside.write_text(json.dumps(usage) + "\n", encoding="utf-8")
        aside.replace(file)


def resident_memory(process: psutil.Process) -> int:
    """Bytes that the process and all its descendants hold, those that have just ended left out."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += one.memory_info().rss
    return total

"""How much memory a rank holds: of a CPU device its process, of a GPU its tensors; and what a data set takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, TensorDataset

_STATUS = Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak begin anew, as far as the system allows."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    _give_back()
    # Elsewhere than on Linux, or where it is not allowed, the peak since the worker began is what can be told.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """The most bytes held since ``reset_peak_memory``."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM")


def current_memory(device: torch.device) -> int:
    """The bytes held now."""
    if device.type == "cuda":
        gc.collect()  # models that were traced are cycles, and hold their tensors until then
        return int(torch.cuda.memory_allocated(device))
    _give_back()
    return _status("VmRSS")


def bytes_of(dataset: Dataset[Any]) -> float:
    """What a data set takes in memory; NaN where it does not say."""
    if isinstance(dataset, TensorDataset):
        # Storages are what is held and sent: of a slice the whole, of an expanded tensor what it repeats.
        storages = [one.untyped_storage() for one in dataset.tensors]
        return float(sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
    return float(getattr(dataset, "nbytes", math.nan))


def _give_back() -> None:
    """Return to the system what the process holds for later, where its C library can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

"""The processor of this machine: how many of its cores may be used, what it is called, and what others take of it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_VECTORS = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("asimd", "NEON"))
"""Instructions that a core's throughput depends on, the widest first, by how Linux calls them."""


def usable_cores() -> int:
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_text() -> str:
    """Its name and widest vector instructions, as virtual machines hide the model: "AMD EPYC with AVX2"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    features = (found.get("flags") or found.get("Features") or "").split()
    vectors = next((f" with {text}" for flag, text in _VECTORS if flag in features), "")
    return f"{found.get('model name', platform.machine())}{vectors}"


def stolen_seconds() -> float:
    """Core seconds since the start that this virtual machine wanted but its host gave to others; 0 where unknown."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
    except (OSError, IndexError):
        return 0.0
    steal = 8  # after "cpu": user, nice, system, idle, iowait, irq, softirq, steal
    return int(first[steal]) / os.sysconf("SC_CLK_TCK") if len(first) > steal else 0.0

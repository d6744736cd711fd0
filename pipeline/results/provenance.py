"""Where a result comes from: configuration, versions, hardware, threads, emulation, data, code version, time."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.processor import processor_text, usable_cores
from pipeline.version import package_version

_PACKAGES = ("torch", "torchvision", "dask", "distributed", "xarray", "zarr", "numpy", "snakemake")


def provenance(
    configuration: Mapping[str, Any],
    *,
    emulated: bool,
    data: str,
    threads: int | Mapping[str, Any],
    hardware: str | Sequence[str] | None = None,
) -> dict[str, str | bool]:
    """Attributes that every store carries.

    `threads` is the number of torch threads, or several named numbers; `hardware` one text per host where it is not
    this machine. Everything is text (nested values as JSON) except `emulated`.
    """
    hosts = [hardware] if isinstance(hardware, str) else list(hardware or [hardware_text()])
    return {
        "configuration": json.dumps(configuration, sort_keys=True, default=str),
        "versions": versions_text(),
        "hardware": "; ".join(dict.fromkeys(hosts)),
        "threads": str(threads) if isinstance(threads, int) else json.dumps(threads, sort_keys=True, default=str),
        "emulated": emulated,
        "data": data,
        "code_version": code_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def versions_text() -> str:
    """Versions of Python and of the packages that matter to a result, "python 3.11.7, torch 2.13.0+cpu, ..."."""
    found = [f"python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


@cache
def hardware_text() -> str:
    """This machine without its name: "Intel Xeon with AVX-512, 2 cores, 8 GiB memory, no GPU"."""
    parts = [processor_text(), f"{usable_cores()} cores", f"{_memory_gib():.0f} GiB memory", *(_gpus() or ["no GPU"])]
    return ", ".join(parts)


@cache
def code_version() -> str:
    """`git describe` of the checkout the package lies in, else the version of the installed package."""
    package = Path(__file__).resolve().parents[1]
    if (package.parent / ".git").exists():
        command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--tags"]
        try:
            return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return package_version()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _gpus() -> list[str]:
    import torch  # A command that only reads stores should not wait for it.

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]

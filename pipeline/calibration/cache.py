"""Calibrations of earlier runs: the same work on the same devices need not be measured twice.

A calibration is found again if all of its segments are the same. If some are, their curves are: networks of one family
share most of theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import xarray as xr

from pipeline.cluster.devices import Member
from pipeline.errors import InputError
from pipeline.results.contracts import validate_calibration
from pipeline.results.provenance import versions_text
from pipeline.results.stores import open_zip, write_zip

_FORMAT = 21
"""To be raised when the way of measuring changes, so that what was measured otherwise is not used."""

Curves = Mapping[str, xr.Dataset]
"""What is known of segments, by their geometry: each the one segment of an earlier calibration."""


def cache_folder() -> Path:
    """Where calibrations are kept: `PIPELINE_CACHE`, else a folder of this user's for such things."""
    if given := os.environ.get("PIPELINE_CACHE"):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "pipeline-cnn" / "calibration"


def cached(
    folder: Path,
    names: Sequence[str],
    works: Sequence[str],
    members: Sequence[Member],
    images: Sequence[int],
    fractions: Sequence[float],
    repetitions: int,
    measure: Callable[[Curves], xr.Dataset],
    *,
    force: bool,
) -> xr.Dataset:
    """The calibration in `folder` of the same segments on the same devices; else what `measure` gives, which is kept.

    `names` and `works`, the geometry, are those of the segments. Devices are the same if their threads, hardware and
    memory are, and as many of them share a host; the numbers of images, the shares, the repetitions and the versions
    of the software have to be, too. `measure` is given the curves of those segments that other networks in `folder`
    have; `force` measures in any case, and everything. An incomplete calibration is not kept. A folder that cannot be
    written is no error.
    """
    hosts = list(dict.fromkeys(member.host for member in members))
    devices = [
        (member.device.label, member.device.threads, member.hardware, member.memory, hosts.index(member.host))
        for member in members
    ]
    alike = _hashed([_FORMAT, devices, list(images), list(fractions), repetitions, versions_text()])
    path = folder / f"{alike}-{_hashed([list(names), list(works)])}.zarr.zip"
    if path.exists() and not force:
        with contextlib.suppress(InputError):  # one that cannot be read is measured anew
            return open_zip(path, validate_calibration).assign_attrs(cached=str(path))
    found = measure({} if force else _curves(folder.glob(f"{alike}-*.zarr.zip"), works))
    if not found.attrs.get("incomplete", 0):
        with contextlib.suppress(OSError):
            write_zip(found, path)
    return found


def _hashed(key: object) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]


def _curves(files: Iterable[Path], works: Sequence[str]) -> Curves:
    """What the calibrations in `files` know of segments with the geometry of `works`, the newest first."""
    found: dict[str, xr.Dataset] = {}
    for file in sorted(files, key=lambda one: one.stat().st_mtime, reverse=True):
        with contextlib.suppress(InputError):
            calibration = open_zip(file, validate_calibration)
            for place, work in enumerate(map(str, calibration.work.values)):
                if work in works:
                    found.setdefault(work, calibration.isel(segment=place))
    return found

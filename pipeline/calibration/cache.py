"""Calibrations of earlier runs: the same work on the same devices need not be measured twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import xarray as xr

from pipeline.cluster.devices import Member
from pipeline.errors import InputError
from pipeline.results.contracts import validate_calibration
from pipeline.results.provenance import versions_text
from pipeline.results.stores import open_zip, write_zip

_FORMAT = 13
"""To be raised when the way of measuring changes, so that what was measured otherwise is not used."""


def cache_folder() -> Path:
    """Where calibrations are kept: `PIPELINE_CACHE`, else a folder of this user's for such things."""
    if given := os.environ.get("PIPELINE_CACHE"):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "pipeline-cnn" / "calibration"


def cached(
    folder: Path,
    works: Sequence[str],
    members: Sequence[Member],
    images: Sequence[int],
    fractions: Sequence[float],
    measure: Callable[[], xr.Dataset],
    *,
    force: bool,
) -> xr.Dataset:
    """The calibration in `folder` of the same `works` on the same devices; else what `measure` gives, which is kept.

    It is the same if the geometry of all segments and their names, the devices with their threads and hardware, the
    numbers of images, the shares and the versions of the software are. `force` measures in any case. A folder that
    cannot be written is no error.
    """
    devices = [(member.device.label, member.device.threads, member.hardware, member.memory) for member in members]
    key = json.dumps([_FORMAT, list(works), devices, list(images), list(fractions), versions_text()])
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.zarr.zip"
    if path.exists() and not force:
        with contextlib.suppress(InputError):  # one that cannot be read is measured anew
            return open_zip(path, validate_calibration).assign_attrs(cached=str(path))
    found = measure()
    with contextlib.suppress(OSError):
        write_zip(found, path)
    return found

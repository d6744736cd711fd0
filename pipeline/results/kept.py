"""What a long job has finished so far: a stopped run leaves it to the next one that would make exactly the same."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import xarray as xr

from pipeline.errors import InputError
from pipeline.results.stores import open_zip, write_zip

_ORIGIN = "made_from"


@dataclass(frozen=True)
class Kept:
    """Finished parts in a folder, one zarr zip file each."""

    folder: Path
    origin: str
    """All that the parts depend on, or a digest of it; a part of another origin is not used."""

    def get(self, name: str) -> xr.Dataset | None:
        """The part of that name, in memory, where it is there, whole and of this origin; its file is then as new."""
        path = self._path(name)
        try:
            part = open_zip(path)
        except InputError:
            return None
        if part.attrs.get(_ORIGIN) != self.origin:
            return None
        os.utime(path)
        return part

    def put(self, name: str, part: xr.Dataset) -> None:
        """Write the part, in place of what has its name."""
        write_zip(part.assign_attrs({_ORIGIN: self.origin}), self._path(name))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.zarr.zip"

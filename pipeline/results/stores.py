"""Write and open labelled data sets so that a kill at any moment leaves either the whole store or none.

A cell is one zarr zip file, a grid a zarr directory. Both are written beside their place under a hidden name, synced
and renamed. Text travels as variable-length strings and comes back as `object` arrays.
"""

from __future__ import annotations

import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from zarr.core.buffer import Buffer
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore, ZipStore

from pipeline.errors import InputError
from pipeline.results.contracts import (
    CELL,
    INDEX,
    MISCALIBRATION,
    NOISY,
    NOT_PLANNED,
    OK,
    CellIndex,
    cell_index,
    describe,
    grid_dims,
    validate_cell,
)

PathLike = str | os.PathLike[str]
Check = Callable[[xr.Dataset, str], None]
_LARGE_BYTES, _PIECE_BYTES = 2**23, 2**20


def write_cell(dataset: xr.Dataset, path: PathLike) -> Path:
    """Write a cell, described, as one zarr zip file; raises InputError when it is not a cell."""
    path = Path(path)
    validate_cell(dataset, str(path))
    return write_zip(dataset, path)


def open_cell(path: PathLike) -> xr.Dataset:
    """The cell, in memory; raises InputError when the file is missing, damaged or not a cell."""
    return open_zip(path, validate_cell)


def write_zip(dataset: xr.Dataset, path: PathLike) -> Path:
    """Write any described data set as one zarr zip file."""
    path = Path(path)
    entries: dict[str, Buffer] = {}
    # A zip cannot replace an entry and xarray writes its metadata more than once: collect first, then write each once.
    described = _encodable(describe(dataset))
    described.to_zarr(MemoryStore(entries), mode="w", consolidated=False, encoding=_chunks(described))
    aside = _clear_place_aside(path)
    with aside.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, value in entries.items():
                archive.writestr(name, value.to_bytes())
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    _sync(path.parent)
    return path


def open_zip(path: PathLike, check: Check | None = None) -> xr.Dataset:
    """The data set of a zarr zip file, in memory, checked by a `validate_*` function when one is given."""
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder, where one zarr zip file is wanted: give one of those it was made of.")
    try:
        with zipfile.ZipFile(path):
            pass  # ZipStore opens late, and then fails on closing what it could not open.
        with ZipStore(Path(path), mode="r") as store:
            dataset = xr.open_zarr(store, consolidated=False, chunks=None).load()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error
    except (zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        raise InputError(f"{path} is not a zarr zip file ({error}).") from error
    return _checked(dataset, path, check)


def write_store(dataset: xr.Dataset, path: PathLike) -> Path:
    """Write a data set, described, as a zarr directory, in place of what is there."""
    path = Path(path)
    aside = _clear_place_aside(path)
    described = _encodable(describe(dataset))
    with warnings.catch_warnings():
        # xarray's readers look for consolidated metadata first and warn when there is none; zarr warns when there is.
        warnings.filterwarnings("ignore", message="Consolidated metadata", category=ZarrUserWarning)
        described.to_zarr(aside, mode="w", consolidated=True, encoding=_chunks(described))
    for directory, _, files in os.walk(aside, topdown=False):
        for name in files:
            _sync(Path(directory, name))
        _sync(Path(directory))
    if path.exists():
        _remove(path)
    aside.rename(path)
    _sync(path.parent)
    return path


def open_store(path: PathLike, check: Check | None = None) -> xr.Dataset:
    """The data set of a zarr directory, in memory, checked by a `validate_*` function when one is given.

    Raises InputError when there is none, when it is no zarr store, or when the check refuses it.
    """
    if not Path(path).exists():
        raise InputError(f"{path} does not exist.")
    try:
        with warnings.catch_warnings():
            # Snakemake leaves a file of its own in every directory it watches, which is no part of the store.
            warnings.filterwarnings("ignore", message=r"Object at \.snakemake_timestamp", category=ZarrUserWarning)
            with xr.open_zarr(Path(path), consolidated=False, chunks=None) as lazy:
                dataset = lazy.load()
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{path} is not a zarr store ({type(error).__name__}: {error}).") from error
    return _checked(dataset, path, check)


def combine(cells: Iterable[xr.Dataset], expected: Sequence[tuple[str, int, str, str, str]]) -> xr.Dataset:
    """The dense timing grid over the expected (network, batch_size, device_set, link, strategy), in the order given.

    Raises InputError that names the first cell that is missing, duplicate or not expected.
    """
    wanted = [CellIndex(*index) for index in expected]
    found: dict[CellIndex, xr.Dataset] = {}
    for cell in cells:
        index = cell_index(cell)
        validate_cell(cell, f"cell ({index})")
        if index in found:
            raise InputError(f"The grid has two cells ({index}): each may be measured once.")
        found[index] = cell
    for index in wanted:
        if index not in found:
            raise InputError(f"The grid lacks the cell ({index}): {len(found)} of {len(wanted)} cells are there.")
    for index in found.keys() - set(wanted):
        raise InputError(f"The cell ({index}) does not belong to the grid: remove its file.")
    if not found:
        raise InputError("The grid has no cells: ask for at least one.")
    return _dense({index: found[index] for index in wanted})


def combine_calibrations(calibrations: Sequence[xr.Dataset]) -> xr.Dataset:
    """Several calibrations along a new dimension `calibration`, padded to the same devices, segments and repetitions.

    `network` and, where given, `device_set` become coordinates of that dimension.
    """
    if not calibrations:
        raise InputError("There are no calibrations to combine: give at least one.")
    texts = {str(name) for dataset in calibrations for name in dataset.variables if _is_text(dataset[name])}
    fill: Any = {name: "" if name in texts else np.nan for dataset in calibrations for name in dataset.data_vars}
    indexed = [_encodable(c).assign_coords({d: c[d] for d in c.dims if d not in c.coords}) for c in calibrations]
    aligned = xr.align(*indexed, join="outer", fill_value=fill)
    combined = xr.concat(
        aligned, dim="calibration", data_vars="all", coords="different", compat="equals", join="exact"
    ).assign_coords(calibration=np.arange(len(calibrations)))
    for name in ("network", "device_set"):
        if name in combined.coords and "calibration" not in combined[name].dims:
            combined = combined.assign_coords({name: combined[name].expand_dims(calibration=combined.calibration)})
    combined.attrs = merged_attributes(calibrations)
    return describe(_with_text(combined, object))


def combine_errors(cells: Mapping[float, Sequence[xr.Dataset]]) -> xr.Dataset:
    """Cells by the error of the calibration that they were planned with, as one store over (..., error).

    Raises InputError as `combine` does.
    """
    grids = [combine(some, [cell_index(cell) for cell in some])[list(MISCALIBRATION)] for some in cells.values()]
    along = xr.DataArray(list(cells), dims="error", name="error")
    combined = xr.concat(grids, dim=along, join="outer", combine_attrs="override")  # of different repetitions
    return describe(combined.transpose(*INDEX, "error", ...))


def merged_attributes(datasets: Iterable[xr.Dataset]) -> dict[str, Any]:
    """Attributes of a combination: what all agree on, else the different values in order; `emulated` if any is."""
    values: dict[str, list[Any]] = {}
    for dataset in datasets:
        for name, value in dataset.attrs.items():
            if value not in values.setdefault(str(name), []):
                values[str(name)].append(value)
    merged = {name: some[0] if len(some) == 1 else "; ".join(map(str, some)) for name, some in values.items()}
    if "emulated" in values:
        merged["emulated"] = any(values["emulated"])
    if "created" in values:
        merged["created"] = max(values["created"])
    return merged


def _dense(cells: Mapping[CellIndex, xr.Dataset]) -> xr.Dataset:
    axes: dict[str, list[Any]] = {n: list(dict.fromkeys(getattr(i, n) for i in cells)) for n in INDEX}
    axes["batch_size"].sort()
    ragged = ("device", "repetition", "instruction")
    sizes = {n: len(axes[n]) for n in INDEX} | {d: max(cell.sizes[d] for cell in cells.values()) for d in ragged}
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, variable in CELL.items():
        shape = tuple(sizes[dim] for dim in grid_dims(name))
        arrays[name] = np.full(shape, "", object) if variable.text else np.full(shape, np.nan)
    arrays["status"][...] = NOT_PLANNED
    # Those that leave devices out come last: what they call rank 0 may be another device of the set.
    for index, cell in sorted(cells.items(), key=lambda item: (item[0].strategy == "single", -item[1].sizes["device"])):
        place = {name: axes[name].index(value) for name, value in index._asdict().items()}
        for name, variable in CELL.items():
            values = cell[name].transpose(*variable.dims).values
            where: tuple[int | slice, ...] = tuple(place[dim] for dim in grid_dims(name) if dim in place)
            if name == "device_label" and any(arrays[name][where]):
                known = np.count_nonzero(arrays[name][where] != "")
                if index.strategy == "single" or len(values) < known:
                    continue
            if name == "device_label":
                _check_labels(index, arrays[name][where], values)
            arrays[name][(*where, *(slice(size) for size in values.shape))] = values
    coordinates = {n: np.array(axes[n], int if n == "batch_size" else object) for n in INDEX}
    grid = xr.Dataset(
        {name: (grid_dims(name), array) for name, array in arrays.items()},
        coords={**coordinates, **{dim: np.arange(sizes[dim]) for dim in ragged}},
        attrs=merged_attributes(cells.values()),
    )
    return describe(grid.assign(noisy=_noisy(grid["step_time"].where(grid["status"] == OK))))


def _noisy(times: xr.DataArray) -> xr.DataArray:
    """Whether the repetitions of each cell spread so much that it is flagged, (dims of a cell's place)."""
    if not times.sizes["repetition"]:
        return xr.zeros_like(times.sum("repetition"), bool)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        lower, median, upper = (times.quantile(q, "repetition").drop_vars("quantile") for q in (0.25, 0.5, 0.75))
    return (upper - lower) > NOISY * median


def _check_labels(index: CellIndex, present: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
    for rank, (before, label) in enumerate(zip(present, labels, strict=False)):
        if before and before != label:
            raise InputError(
                f"The cell ({index}) has device {label} as rank {rank} where other cells of its set have {before}."
            )


def _is_text(variable: xr.DataArray) -> bool:
    return variable.dtype.kind in "OTU"


def _encodable(dataset: xr.Dataset) -> xr.Dataset:
    """The data set with variable-length strings (empty arrays too) and without the encoding of an earlier store."""
    return _with_text(dataset, np.dtypes.StringDType()).drop_encoding()


def _with_text(dataset: xr.Dataset, dtype: Any) -> xr.Dataset:
    for name in list(dataset.variables):
        if _is_text(dataset[name]):
            values = {name: (dataset[name].dims, dataset[name].values.astype(dtype), dataset[name].attrs)}
            dataset = dataset.assign_coords(values) if name in dataset.coords else dataset.assign(values)
    return dataset


def _checked(dataset: xr.Dataset, path: PathLike, check: Check | None) -> xr.Dataset:
    dataset = _with_text(dataset, object)
    if check is not None:
        check(dataset, str(path))
    return dataset


def _chunks(dataset: xr.Dataset) -> dict[str, dict[str, Any]]:
    """The grids are small: one file per variable reads fastest and keeps a store's number of files low.

    What is large, as images are, is cut along its first dimension: a single piece would be in memory three times over
    while it is read.
    """
    found = {}
    for name, variable in dataset.variables.items():
        if variable.ndim:
            first, *rest = (max(1, size) for size in variable.shape)
            if variable.nbytes > _LARGE_BYTES:
                first = max(1, first * _PIECE_BYTES // variable.nbytes)
            found[str(name)] = {"chunks": (first, *rest)}
    return found


def _clear_place_aside(path: Path) -> Path:
    """Where to write before renaming to `path`; what a killed writer left there is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_by in ("partial", "removed"):
        for leftover in path.parent.glob(f".{path.name}.{left_by}-*"):
            _remove(leftover)
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _remove(path: Path) -> None:
    if path.name.startswith(".") and path.is_dir():
        shutil.rmtree(path)
    elif path.is_dir():
        # Renamed first: a kill in the middle of the removal must not leave half a store under the name.
        doomed = path.rename(path.with_name(f".{path.name}.removed-{os.getpid()}"))
        shutil.rmtree(doomed)
    else:
        path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

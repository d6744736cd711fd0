"""Stores come back as they were written, whole or not at all; grids are complete or refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.storage import ZipStore

from pipeline.errors import InputError
from pipeline.results import stores
from pipeline.results.contracts import CellIndex, unmeasured_cell, validate_calibration, validate_timing
from pipeline.results.provenance import provenance
from tests import synthetic

KERNEL = CellIndex("50:500", 32, "2 x cpu@0.45", "loopback", "kernel")
SINGLE = KERNEL._replace(strategy="single", device_set="cpu@0.45")


@pytest.fixture(scope="module")
def cells() -> dict[CellIndex, xr.Dataset]:
    return {index: synthetic.cell(index) for index in (SINGLE, KERNEL)}


def test_a_cell_comes_back_identical(tmp_path: Path, cells):
    path = stores.write_cell(cells[KERNEL], tmp_path / "a" / "cell.zarr.zip")
    xr.testing.assert_identical(stores.open_cell(path), cells[KERNEL])
    assert [file.name for file in path.parent.iterdir()] == ["cell.zarr.zip"]


def test_a_cell_without_a_single_time_comes_back_identical(tmp_path: Path):
    failed = unmeasured_cell(KERNEL, ["cpu@0.45", "cpu@0.45"], "failed: worker lost")
    xr.testing.assert_identical(stores.open_cell(stores.write_cell(failed, tmp_path / "c.zarr.zip")), failed)


def test_a_grid_comes_back_identical_also_for_plain_xarray(tmp_path: Path, cells):
    grid = stores.combine(cells.values(), list(cells))
    path = stores.write_store(grid, tmp_path / "timing.zarr")
    xr.testing.assert_identical(stores.open_store(path, validate_timing), grid)
    plain = xr.open_zarr(path, chunks=None).load()
    assert plain["step_time"].sel(network="50:500", strategy="kernel").attrs["units"] == "s"
    assert [entry.name for entry in tmp_path.iterdir()] == ["timing.zarr"]


def test_writing_again_replaces_a_store_and_clears_what_a_killed_writer_left(tmp_path: Path, cells):
    path = tmp_path / "timing.zarr"
    stores.write_store(stores.combine(cells.values(), list(cells)), path)
    (tmp_path / ".timing.zarr.partial-1").mkdir()
    (tmp_path / ".timing.zarr.removed-1").mkdir()
    stores.write_store(stores.combine([cells[KERNEL]], [KERNEL]), path)
    assert stores.open_store(path).sizes["strategy"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["timing.zarr"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.is_dir, "does not exist"),
        (Path.mkdir, "is not a zarr store"),
        (lambda path: stores.write_store(synthetic.accuracy(), path), "is not a timing grid"),
    ],
    ids=["nothing", "an empty folder", "another store"],
)
def test_what_is_not_a_timing_grid_is_refused_by_name(tmp_path: Path, make, message: str):
    path = tmp_path / "some.zarr"
    make(path)
    with pytest.raises(InputError, match=rf"some\.zarr .*{message}|some\.zarr {message}"):
        stores.open_store(path, validate_timing)


def test_a_cut_off_cell_is_refused(tmp_path: Path, cells):
    path = stores.write_cell(cells[KERNEL], tmp_path / "cell.zarr.zip")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="is not a zarr zip file"):
        stores.open_cell(path)


# The writer announces each file that it has written, so the kill comes in the middle of a store.
WRITER = """
import sys, threading, time
import numpy as np, xarray as xr, zarr
from pathlib import Path
from pipeline.results import stores
import pipeline.results.contracts as contracts

kind, path = sys.argv[1], Path(sys.argv[2])
big = xr.Dataset({f"v{i:03}": ("x", np.random.default_rng(i).random(200_000)) for i in range(150)})
def begun():
    try:
        if list(path.parent.glob(".*.partial-*/v01*")):
            return True
        return any(f.stat().st_size > 10**7 for f in path.parent.glob(".*.partial-*") if f.is_file())
    except FileNotFoundError:  # renamed while it was looked at
        return False
def announce():
    while not begun():
        time.sleep(0.001)
    print("writing", flush=True)
threading.Thread(target=announce, daemon=True).start()
(stores.write_store if kind == "store" else stores.write_zip)(big, path)
print("done", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["store", "zip"])
@pytest.mark.parametrize("before", [False, True], ids=["no store before", "a store before"])
def test_a_writer_killed_in_the_middle_leaves_nothing_or_what_was_there(tmp_path: Path, kind: str, before: bool):
    path = tmp_path / f"big.zarr{'.zip' * (kind == 'zip')}"
    old = xr.Dataset({"old": ("x", np.arange(3.0))})
    if before:
        (stores.write_store if kind == "store" else stores.write_zip)(old, path)
    root = str(Path(stores.__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, kind, str(path)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": root}
    ) as writer:
        assert writer.stdout is not None
        said = writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    assert said == b"writing\n"
    time.sleep(0.05)
    assert list(tmp_path.glob(".*.partial-*")), "the kill came after the end of the store"
    reopen = stores.open_store if kind == "store" else stores.open_zip
    if before:
        xr.testing.assert_equal(reopen(path), old)
    else:
        with pytest.raises(InputError, match="does not exist"):
            reopen(path)


def test_cells_of_different_length_are_padded_and_found_by_name(cells):
    grid = stores.combine([cells[SINGLE], synthetic.cell(KERNEL, repetitions=3)], [SINGLE, KERNEL])
    one = grid.sel(network="50:500", batch_size=32, link="loopback")
    single = one.sel(device_set="cpu@0.45", strategy="single")
    np.testing.assert_array_equal(single["step_time"], cells[SINGLE]["step_time"])
    assert np.isnan(single["compute_time"].isel(device=1)).all()
    assert list(grid["device_label"].sel(device_set="cpu@0.45").values) == ["cpu@0.45", ""]
    kernel = one.sel(device_set="2 x cpu@0.45", strategy="kernel")["step_time"]
    assert kernel.notnull().sum() == 3
    assert one.sel(device_set="cpu@0.45", strategy="kernel")["status"].item() == "not planned"


def test_a_missing_a_duplicate_and_an_unexpected_cell_are_named(cells):
    with pytest.raises(InputError, match=r"lacks the cell \(50:500, batch 32, 2 x cpu@0.45, loopback, kernel\)"):
        stores.combine([cells[SINGLE]], [SINGLE, KERNEL])
    with pytest.raises(InputError, match="two cells"):
        stores.combine([cells[SINGLE], cells[SINGLE]], [SINGLE])
    with pytest.raises(InputError, match="does not belong"):
        stores.combine([cells[SINGLE], cells[KERNEL]], [SINGLE])
    with pytest.raises(InputError, match="no cells"):
        stores.combine([], [])


def test_cells_that_disagree_on_the_devices_of_a_set_are_refused(cells):
    other = synthetic.cell(KERNEL._replace(strategy="paper"))
    other["device_label"][1] = "gpu"
    with pytest.raises(InputError, match=r"device gpu as rank 1 where other cells of its set have cpu@0\.45"):
        stores.combine([cells[KERNEL], other], [KERNEL, KERNEL._replace(strategy="paper")])


def test_a_single_that_runs_on_another_rank_of_its_set_does_not_disagree(cells):
    single = KERNEL._replace(strategy="single")
    fastest = synthetic.cell(single)
    fastest["device_label"][0] = "cpu"
    for given in ([fastest, cells[KERNEL]], [cells[KERNEL], fastest]):
        labels = stores.combine(given, [single, KERNEL]).device_label.sel(device_set="2 x cpu@0.45")
        assert list(labels.values) == ["cpu@0.45", "cpu@0.45"]


def test_attributes_of_a_grid_say_all_that_its_cells_say(cells):
    plain = cells[SINGLE].assign_attrs(emulated=False, created="2026-02-01", hardware="another machine")
    attributes = stores.combine([plain, cells[KERNEL]], [SINGLE, KERNEL]).attrs
    assert attributes["emulated"] is True
    assert attributes["created"] == "2026-02-01"
    assert attributes["hardware"] == "another machine; synthetic machine, 2 cores"
    assert attributes["data"] == "synthetic images"


def test_calibrations_of_several_networks_are_one_calibration(tmp_path: Path):
    first = synthetic.calibration()
    longer = first.isel(device=[0, 1, 1]).assign_coords(network="500:1500", device_set="3 x cpu")
    combined = stores.combine_calibrations([first, longer])
    validate_calibration(combined)
    assert list(combined["network"].values) == ["50:500", "500:1500"]
    assert list(combined["device_label"].isel(calibration=0).values) == ["cpu", "cpu@0.5", ""]
    again = stores.open_store(stores.write_store(combined, tmp_path / "calibration.zarr"), validate_calibration)
    xr.testing.assert_identical(again, combined)


def test_provenance_names_the_code_the_versions_and_the_hardware_but_no_host():
    attributes = provenance({"b": 1, "a": [2]}, emulated=True, data="digits", threads={"torch": 1})
    assert attributes["configuration"] == '{"a": [2], "b": 1}'
    assert attributes["emulated"] is True
    assert "torch 2." in str(attributes["versions"])
    assert "cores" in str(attributes["hardware"])
    assert os.uname().nodename not in str(attributes["hardware"])
    assert str(attributes["created"]).endswith("+00:00")


def test_the_grid_flags_the_cells_whose_repetitions_spread(tmp_path: Path):
    wanted = synthetic.indices(("50:500",), (32,), ("cpu", "2 x cpu"))
    made = [synthetic.cell(index) for index in wanted]
    noisy = next(cell for cell in made if cell["strategy"].item() == "paper")
    noisy["step_time"][:2] *= 2
    grid = stores.open_store(
        stores.write_store(stores.combine(made, wanted), tmp_path / "timing.zarr"), validate_timing
    )
    place = {"network": "50:500", "batch_size": 32, "link": "loopback", "device_set": "2 x cpu"}
    assert grid["noisy"].dtype == bool
    assert grid["noisy"].sel(place, drop=True).to_series().loc[lambda flag: flag].index.tolist() == ["paper"]
    assert grid["noisy"].sum() == 1
    assert grid["noisy"].attrs["units"] == "1"


def test_cells_of_different_repetitions_go_into_one_store_of_errors() -> None:
    made = stores.combine_errors({
        error: [synthetic.cell(KERNEL, repetitions=count)] for error, count in ((-0.5, 3), (0.0, 5))
    })  # fmt: skip
    assert made.step_time.count("repetition").values.ravel().tolist() == [3, 5]
    assert made.sizes["repetition"] == 5


def test_a_folder_where_one_file_is_wanted_is_told(tmp_path):
    with pytest.raises(InputError, match=r"calibration\.zarr is a folder, where one zarr zip file is wanted"):
        stores.open_zip(stores.write_store(xr.Dataset({"one": 1.0}), tmp_path / "calibration.zarr"))


def test_what_is_large_is_kept_in_pieces_and_what_is_small_in_one(tmp_path):
    images = xr.Dataset(
        {"image": (("sample", "row"), np.zeros((5000, 2048), np.uint8)), "label": ("sample", np.arange(5000))}
    )
    with ZipStore(stores.write_zip(images, tmp_path / "images.zarr.zip"), mode="r") as store:
        group = zarr.open_group(store, mode="r")
        assert group["image"].chunks == (2**20 // 2048, 2048)  # 1 MiB: read in one piece they would be there thrice
        assert group["label"].chunks == (5000,)
    xr.testing.assert_equal(stores.open_zip(tmp_path / "images.zarr.zip"), images)

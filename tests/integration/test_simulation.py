"""Grids simulated in processes, by the command and by its functions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from distributed import Client

from pipeline.cli import main
from pipeline.errors import InputError
from pipeline.graph.trace import trace
from pipeline.networks import network
from pipeline.results.contracts import validate_timing
from pipeline.results.stores import open_store, write_zip
from pipeline.simulation.mixes import parse_mix
from pipeline.simulation.sweep import Grid, sweep
from pipeline.simulation.workers import simulators
from tests import synthetic

NAME = "20:50"


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with simulators(2) as one:
        yield one


@pytest.fixture(scope="module")
def calibration() -> xr.Dataset:
    graph = trace(network(NAME), torch.zeros(2, 3, 32, 32))
    return synthetic.calibration_of(graph, ["cpu", "cpu@0.5"]).assign_coords(network=NAME)


def _grid(**changes: object) -> Grid:
    values: dict[str, object] = {
        "networks": (NAME,),
        "batch_sizes": (16, 256),
        "device_sets": ("cpu", "4 x cpu", "gpu + 2 x cpu@0.5", "96 x cpu"),
        "links": ("loopback", "10Mbit/s+1ms", "100Gbit/s"),
        "strategies": ("single", "ddp", "paper", "kernel", "batch", "auto"),
        "described": {"gpu": 1e4},
    }
    return Grid(**{**values, **changes})  # type: ignore[arg-type]


def test_a_simulated_grid_has_the_names_of_a_measured_one(client: Client, calibration: xr.Dataset) -> None:
    grid = _grid()
    told: list[int] = []
    found = sweep(grid, {NAME: [calibration]}, client, on_progress=told.append)
    validate_timing(found)
    assert told[-1] == grid.cells == found.step_time.size
    assert found.attrs["simulated"]
    assert np.isfinite(found.step_time).all()
    times = found.step_time.isel(repetition=0)
    exact = times.drop_sel(strategy=["ddp", "auto"])
    assert (times.sel(strategy="auto") <= exact.min("strategy") * (1 + 1e-9)).all()
    assert (times.sel(link="100Gbit/s") <= times.sel(link="10Mbit/s+1ms") * (1 + 1e-9)).all()
    one = times.sel(device_set="cpu", strategy="single", link="loopback")
    four = times.sel(device_set="4 x cpu", strategy="auto", link="100Gbit/s")
    assert (one / four > 2).sel(batch_size=256)
    assert list(found.device_label.sel(device_set="gpu + 2 x cpu@0.5").values[:4]) == ["gpu", "cpu@0.5", "cpu@0.5", ""]


def test_the_plans_of_one_cell_do_not_depend_on_the_others(client: Client, calibration: xr.Dataset) -> None:
    every = sweep(_grid(), {NAME: [calibration]}, client)
    few = sweep(
        _grid(links=("10Mbit/s+1ms",), batch_sizes=(256,), strategies=("kernel",)), {NAME: [calibration]}, client
    )
    xr.testing.assert_allclose(
        few.step_time, every.step_time.sel(link=["10Mbit/s+1ms"], batch_size=[256], strategy=["kernel"])
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"networks": ("6:10",)}, "network 6:10 is not calibrated; there are calibrations of 20:50"),
        ({"device_sets": ("tpu",)}, "device tpu is neither calibrated nor described; there are cpu, cpu@0.5, gpu"),
        ({"device_sets": ("2000 x cpu",)}, "has 2000 devices: at most 1024"),
        ({"device_sets": ("0 x cpu",)}, "device set '0 x cpu' is wrong"),
        ({"links": ("fast",)}, "link 'fast' is unknown"),
        ({"described": {"gpu[much]": 1.0}}, "device gpu\\[much\\] is described with a memory that is no size"),
        ({"described": {"gpu": -1.0}}, "gpu cannot reach -1.0 GFLOP/s"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_grid_that_cannot_be_is_refused(
    client: Client, calibration: xr.Dataset, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        sweep(_grid(**changes), {NAME: [calibration]}, client)


def test_what_a_device_cannot_hold_is_told_and_the_others_are_simulated(
    client: Client, calibration: xr.Dataset
) -> None:
    described = {"gpu[1MiB]": 1000.0, "gpu[24GiB]": 1000.0}
    found = sweep(
        _grid(device_sets=("gpu[1MiB]", "gpu[24GiB]", "gpu[1MiB] + gpu[24GiB]"), described=described),
        {NAME: [calibration]}, client,
    )  # fmt: skip
    status = found.status.sel(network=NAME)
    assert (status.sel(device_set="gpu[1MiB]") == "out of memory").all()
    assert (status.sel(device_set="gpu[24GiB]") == "ok").all()
    both = status.sel(device_set="gpu[1MiB] + gpu[24GiB]")
    assert (both.sel(strategy=["single", "auto"]) == "ok").all()
    assert (both.sel(strategy=["ddp", "paper"]) == "out of memory").all()
    assert (found.step_time.notnull().isel(repetition=0) == (found.status == "ok")).all()


def test_a_mix_is_read_in_order() -> None:
    assert parse_mix("gpu + 2 x cpu@0.5") == ("gpu", "cpu@0.5", "cpu@0.5")


def test_the_command_writes_a_store(
    calibration: xr.Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_zip(calibration, tmp_path / "c.zarr.zip")
    store = tmp_path / "simulation.zarr"
    given = ["simulate", "--calibration", str(tmp_path / "c.zarr.zip"), "--output", str(store), "--network", NAME]
    given += ["--devices", "8 x cpu", "--link", "1Gbit/s", "--batch-size", "64", "--describe", "gpu=9000"]
    assert main(given) == 0
    found = open_store(store, validate_timing)
    assert dict(found.step_time.sizes) == {
        "network": 1, "batch_size": 1, "device_set": 1, "link": 1, "strategy": 6, "repetition": 1
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "6 cells simulated" in said
    assert "8 x cpu: " in said
    assert main([*given, "--describe", "gpu"]) == 2
    assert "description 'gpu' is wrong: write NAME=GFLOPS" in capsys.readouterr().err

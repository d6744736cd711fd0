"""The data contracts accept what they describe and refuse, in one sentence, what they do not."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from pipeline.errors import InputError
from pipeline.results import contracts
from tests import synthetic

INDEX = contracts.CellIndex("50:500", 32, "2 x cpu@0.45", "loopback", "kernel")


@pytest.fixture(scope="module")
def grid() -> xr.Dataset:
    return synthetic.timing([INDEX, INDEX._replace(strategy="single")])


def test_a_cell_a_grid_a_calibration_and_accuracies_are_accepted(grid: xr.Dataset):
    contracts.validate_cell(synthetic.cell(INDEX))
    contracts.validate_timing(grid)
    contracts.validate_calibration(synthetic.calibration())
    contracts.validate_accuracy(synthetic.accuracy())
    contracts.validate_miscalibration(synthetic.miscalibration())


def test_wrong_calibrations_say_which_device_was_misjudged():
    store = synthetic.miscalibration()
    del store.attrs["misjudged_device"]
    with pytest.raises(
        InputError, match=r"^x\.zarr is not of wrong calibrations: attribute misjudged_device is missing"
    ):
        contracts.validate_miscalibration(store, "x.zarr")


def test_a_grid_without_what_only_a_measurement_has_is_a_timing_grid(grid: xr.Dataset):
    measured = [name for name, variable in contracts.CELL.items() if variable.measured]
    contracts.validate_timing(grid.drop_vars(measured))


@pytest.mark.parametrize("name", [name for name, variable in contracts.CELL.items() if not variable.measured])
def test_a_missing_variable_is_named_with_its_store(grid: xr.Dataset, name: str):
    with pytest.raises(InputError, match=rf"^x\.zarr is not a timing grid: variable {name} is missing") as error:
        contracts.validate_timing(grid.drop_vars(name), "x.zarr")
    assert str(error.value).count(". ") == 0


def test_any_other_data_set_is_no_timing_grid_for_want_of_coordinates():
    with pytest.raises(InputError, match="not a timing grid: coordinate network is missing"):
        contracts.validate_timing(synthetic.accuracy())


def test_wrong_dimensions_are_named_with_the_right_ones(grid: xr.Dataset):
    with pytest.raises(InputError, match=r"step_time has dimensions .* instead of .* repetition"):
        contracts.validate_timing(grid.assign(step_time=grid["step_time"].mean("repetition")))


def test_numbers_where_text_belongs_and_text_where_numbers_belong_are_refused(grid: xr.Dataset):
    with pytest.raises(InputError, match="status is of type int64 where text belong"):
        contracts.validate_timing(grid.assign(status=xr.zeros_like(grid["status"], int)))
    with pytest.raises(InputError, match="share is of type object where numbers belong"):
        contracts.validate_timing(grid.assign(share=grid["share"].astype(object)))


def test_a_cell_without_a_scalar_coordinate_is_refused():
    with pytest.raises(InputError, match="no scalar coordinate strategy"):
        contracts.validate_cell(synthetic.cell(INDEX).drop_vars("strategy"))


def test_accuracies_must_say_which_network_and_data_they_are_of():
    accuracy = synthetic.accuracy()
    del accuracy.attrs["data"]
    with pytest.raises(InputError, match="attribute data is missing"):
        contracts.validate_accuracy(accuracy)


@pytest.mark.parametrize("make", [lambda: synthetic.cell(INDEX), synthetic.calibration, synthetic.accuracy])
def test_every_variable_and_coordinate_of_a_contract_is_described(make):
    dataset = make()
    for name in dataset.variables:
        if name in contracts.COORDINATES or name in dataset.data_vars:
            assert dataset[name].attrs["units"], name
            assert dataset[name].attrs["long_name"], name


def test_describing_a_data_set_sets_wrong_units_right_and_leaves_the_original_alone():
    cell = synthetic.cell(INDEX)
    cell["step_time"].attrs["units"] = "ms"
    assert contracts.describe(cell)["step_time"].attrs["units"] == "s"
    assert cell["step_time"].attrs["units"] == "ms"


def test_share_is_a_fraction_of_flops_in_a_cell_and_a_coordinate_of_kernels_in_a_calibration():
    assert "of a device" in synthetic.cell(INDEX)["share"].attrs["long_name"]
    assert "kernels" in synthetic.calibration()["share"].attrs["long_name"]


def test_the_cell_of_a_run_without_times_is_a_cell_and_keeps_its_reason():
    cell = contracts.unmeasured_cell(INDEX, ["cpu", "cpu"], "out of memory: 3 GiB wanted")
    contracts.validate_cell(cell)
    assert cell["status"].item() == "out of memory: 3 GiB wanted"
    assert np.isnan(cell["predicted_step_time"].item())
    assert contracts.cell_index(cell) == INDEX

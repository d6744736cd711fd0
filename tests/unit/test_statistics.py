"""Statistics against values worked out by hand, and the properties they must have."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.analysis import statistics
from pipeline.results.contracts import CellIndex, unmeasured_cell
from pipeline.results.stores import combine
from tests import synthetic

UNEQUAL = "cpu + cpu@0.5"
times = st.lists(st.floats(0.01, 100), min_size=1, max_size=9).map(np.array)


def cell(device_set: str, strategy: str, steps: list[float], throughput: list[float], link: str = "loopback"):
    index = CellIndex("50:500", 32, device_set, link, strategy)
    made = synthetic.cell(index, repetitions=len(steps))
    made["step_time"] = ("repetition", np.array(steps))
    made["convolution_time"] = ("repetition", np.array(steps) * (0.75 if strategy == "single" else np.nan))
    made["device_throughput"] = ("device", np.array(throughput))
    return index, made


def grid(*cells) -> xr.Dataset:
    return combine([made for _, made in cells], [index for index, _ in cells])


def at(dataset: xr.Dataset, device_set: str, strategy: str, link: str = "loopback") -> xr.Dataset:
    place = {"network": "50:500", "batch_size": 32, "device_set": device_set, "strategy": strategy, "link": link}
    return dataset.sel({name: value for name, value in place.items() if name in dataset.dims})


def test_median_quartiles_count_and_flag_by_hand():
    samples = xr.DataArray([[1.0, 2, 3, 4, 5], [1, 1.01, 1.02, 1.03, np.nan]], dims=("cell", "repetition"), name="t")
    numbers = statistics.summary(samples)
    np.testing.assert_allclose(numbers["median"], [3, 1.015])
    np.testing.assert_allclose(numbers["lower"], [2, 1.0075])
    np.testing.assert_allclose(numbers["upper"], [4, 1.0225])
    assert list(numbers["count"].values) == [5, 4]
    assert list(numbers["noisy"].values) == [True, False]


def test_no_repetition_at_all_gives_nan_and_is_not_noisy():
    for samples in (np.full((2, 3), np.nan), np.zeros((2, 0))):
        numbers = statistics.summary(xr.DataArray(samples, dims=("cell", "repetition"), name="t"))
        assert np.isnan(numbers["median"]).all()
        assert not numbers["noisy"].any()


@given(times)
def test_the_median_lies_between_the_quartiles(samples):
    numbers = statistics.summary(xr.DataArray(samples, dims="repetition", name="t"))
    assert numbers["lower"] <= numbers["median"] <= numbers["upper"]


@given(times, times)
def test_a_bootstrap_interval_lies_within_the_extreme_ratios_and_is_repeatable(slow, fast):
    low, high = statistics.bootstrap_ratio(slow, fast, resamples=200)
    assert slow.min() / fast.max() * (1 - 1e-12) <= low <= high <= slow.max() / fast.min() * (1 + 1e-12)
    assert (low, high) == statistics.bootstrap_ratio(slow, fast, resamples=200)


def test_equal_repetitions_give_an_interval_without_width():
    assert statistics.bootstrap_ratio(np.full(5, 6.0), np.full(3, 2.0)) == (3.0, 3.0)


def test_the_baseline_is_single_on_the_same_set_where_it_was_measured():
    timing = grid(
        cell("cpu", "single", [9.0] * 3, [10.0]),
        cell(UNEQUAL, "single", [8.0] * 3, [10.0, 5.0]),
        cell(UNEQUAL, "kernel", [5.0] * 3, [10.0, 5.0]),
    )
    ratios = at(statistics.speedup(timing), UNEQUAL, "kernel")
    assert ratios["speedup"].item() == pytest.approx(8 / 5)
    assert ratios["aggregate_bound"].item() == pytest.approx(1.5)
    assert ratios["efficiency"].item() == pytest.approx(8 / 5 / 1.5)
    assert ratios["baseline_device"].item() == "cpu"
    assert ratios["device_count"].item() == 2


def test_else_the_baseline_is_the_fastest_device_alone_wherever_it_stands_in_the_set():
    timing = grid(
        cell("cpu", "single", [4.0] * 3, [10.0]),
        cell("cpu@0.5", "single", [8.0] * 3, [5.0]),
        cell("cpu@0.5 + cpu", "kernel", [2.0] * 3, [5.0, 10.0]),
    )
    ratios = at(statistics.speedup(timing), "cpu@0.5 + cpu", "kernel")
    assert ratios["baseline_device"].item() == "cpu"
    assert ratios["speedup"].item() == pytest.approx(2.0)


def test_single_of_another_link_serves_since_it_sends_nothing():
    timing = grid(
        cell("cpu", "single", [4.0] * 3, [10.0]), cell("2 x cpu", "kernel", [2.0] * 3, [10.0, 10.0], "1 Gbit/s")
    )
    assert at(statistics.speedup(timing), "2 x cpu", "kernel", "1 Gbit/s")["speedup"].item() == pytest.approx(2.0)


def test_without_a_baseline_there_is_no_speedup():
    timing = grid(cell("cpu@0.5", "single", [4.0] * 3, [5.0]), cell("2 x cpu", "kernel", [2.0] * 3, [10.0, 10.0]))
    assert np.isnan(at(statistics.speedup(timing), "2 x cpu", "kernel")["speedup"].item())


def test_a_failed_cell_has_no_speedup():
    single, (index, _) = cell("2 x cpu", "single", [4.0] * 2, [1.0, 1.0]), cell("2 x cpu", "kernel", [1.0], [1.0, 1.0])
    failed = (index, unmeasured_cell(index, ["cpu", "cpu"], "out of memory: 9 GiB"))
    ratios = at(statistics.speedup(grid(failed, single)), "2 x cpu", "kernel")
    assert np.isnan(ratios["speedup"].item())
    assert not ratios["noisy"].item()


def test_a_failed_single_is_no_baseline_whatever_times_it_holds():
    single, kernel = cell("2 x cpu", "single", [4.0] * 2, [1.0, 1.0]), cell("2 x cpu", "kernel", [1.0], [1.0, 1.0])
    single[1]["status"] = "failed: late"
    assert np.isnan(at(statistics.speedup(grid(single, kernel)), "2 x cpu", "kernel")["speedup"].item())


def test_throughputs_are_those_of_cells_of_all_devices_whichever_is_the_fastest():
    """A cell has them by the ranks of its plan: of `single` the fastest device is the first."""
    slow_first = "cpu@0.25 + cpu"
    timing = grid(
        cell(slow_first, "kernel", [1.0], [20.0, 80.0]), cell(slow_first, "single", [1.0], [80.0, np.nan]),
        cell(slow_first, "auto", [1.0], [80.0, np.nan]),
    )  # fmt: skip
    assert statistics.device_throughput(timing).squeeze().values.tolist() == [20.0, 80.0]
    assert statistics.aggregate_bound(timing).item() == pytest.approx(1.25)
    assert statistics.baseline(timing).baseline_device.item() == "cpu"


def test_the_bound_is_unknown_where_a_device_was_not_calibrated():
    timing = grid(
        cell("2 x cpu", "single", [4.0] * 3, [10.0, np.nan]), cell("2 x cpu", "kernel", [2.0] * 3, [10.0, np.nan])
    )
    ratios = at(statistics.speedup(timing), "2 x cpu", "kernel")
    assert ratios["speedup"].item() == pytest.approx(2.0)
    assert np.isnan(ratios["aggregate_bound"].item())
    assert np.isnan(ratios["efficiency"].item())


@settings(max_examples=25)
@given(st.lists(st.floats(0.1, 50), min_size=1, max_size=4))
def test_the_bound_lies_between_one_and_the_number_of_devices(throughput):
    device_set = " + ".join(f"cpu@{1 - rank / 10}" for rank in range(len(throughput)))
    bound = statistics.aggregate_bound(grid(cell(device_set, "single", [1.0], throughput))).item()
    assert 1 - 1e-12 <= bound <= len(throughput) + 1e-12


def test_the_share_of_convolutions_is_that_of_single():
    timing = grid(cell("2 x cpu", "single", [4.0] * 3, [1.0, 1.0]), cell("2 x cpu", "kernel", [2.0] * 3, [1.0, 1.0]))
    assert at(statistics.convolution_share(timing), "2 x cpu", "single").values == pytest.approx(0.75)


def test_a_noisy_cell_or_baseline_is_flagged():
    quiet, loud = [4.0, 4.0, 4.0], [2.0, 3.0, 4.0]
    for single, kernel in ((quiet, loud), (loud, quiet)):
        timing = grid(cell("2 x cpu", "single", single, [1.0, 1.0]), cell("2 x cpu", "kernel", kernel, [1.0, 1.0]))
        assert at(statistics.speedup(timing), "2 x cpu", "kernel")["noisy"].item()


def test_the_simulated_speedup_is_over_single_on_the_same_set_and_link():
    simulated = synthetic.simulation()
    times = simulated["predicted_step_time"]
    place = {"network": "50:500", "batch_size": 32, "device_set": "4 x cpu@0.45", "link": "1Gbit/s+100us"}
    times.loc[place | {"strategy": "single"}] = 6.0
    times.loc[place | {"strategy": "paper"}] = 4.0
    simulated["status"].loc[place | {"strategy": "batch"}] = "not planned"
    ratios = statistics.simulated_speedup(simulated).sel(place)
    assert ratios.sel(strategy="paper").item() == pytest.approx(1.5)
    assert ratios.sel(strategy="single").item() == 1
    assert np.isnan(ratios.sel(strategy="batch"))
    assert statistics.simulated_speedup(simulated.drop_sel(strategy="single")).isnull().all()


@pytest.mark.parametrize(
    ("ratios", "place"),
    [([1, 2, 4, 8], None), ([1, 2, 2.09, 2.08], 1), ([1, 2, 1.5, 2.5], None), ([1, 0.5, 0.2, 0.1], 0), ([1], None)],
    ids=["rises", "rises by less than 5 %", "falls and rises", "falls", "one device"],
)
def test_a_speedup_saturates_where_no_larger_number_of_devices_passes_it_by_five_percent(ratios, place):
    counts = 2 ** np.arange(len(ratios))
    assert statistics.saturation(counts, np.array(ratios, float)) == place


def test_the_best_split_is_exact_and_of_all_devices():
    ratios = xr.DataArray([1.0, 5.0, 0.8, 0.9, 3.0], {"strategy": ["single", "ddp", "paper", "kernel", "auto"]})
    assert statistics.best_split(ratios).item() == 0.9


def test_a_speedup_says_of_how_few_repetitions_it_is():
    wanted = synthetic.indices(("50:500",), (32,), ("cpu", "2 x cpu"))
    few = {index: 3 if index.strategy == "kernel" else 5 for index in wanted}
    made = combine([synthetic.cell(index, repetitions=count) for index, count in few.items()], wanted)
    found = statistics.speedup(made)["repetitions"].sel(
        network="50:500", batch_size=32, link="loopback", device_set="2 x cpu"
    )
    assert found.sel(strategy="kernel").item() == 3
    assert found.sel(strategy="paper").item() == 5


@pytest.mark.parametrize(
    ("noisy", "repetitions", "mark"), [(False, 5, ""), (True, 5, " *"), (False, 4, " n=4"), (True, 1, " * n=1")]
)
def test_flags_mark_noise_and_fewer_than_five_repetitions(noisy: bool, repetitions: int, mark: str):
    assert statistics.flags(noisy, repetitions) == mark

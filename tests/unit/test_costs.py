"""What a calibration is taken to say: lines over the images, curves over the share that never fall."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import isotonic_regression

from pipeline.graph.trace import trace
from pipeline.networks import network
from pipeline.plan.costs import Costs, _rising, _typical
from tests import synthetic


def _seconds(costs: Costs, operation: str, share: float, images: float) -> float:
    """Forward time of the first device in s."""
    return float(costs.seconds([operation], ["forward"], np.full((1, 2), share), np.full((1, 2), images))[0, 0])


@pytest.fixture
def calibration() -> xr.Dataset:
    return synthetic.calibration()


def test_time_is_a_line_over_the_images(calibration: xr.Dataset) -> None:
    fixed = 0.02
    lifted = calibration.assign(forward_time=calibration.forward_time + fixed)
    costs = Costs.of(lifted)
    for images in (8, 32, 640):
        expected = fixed + _seconds(Costs.of(calibration), "conv2", 0.5, images)
        assert _seconds(costs, "conv2", 0.5, images) == pytest.approx(expected)
    assert _seconds(costs, "conv2", 0.5, 0) == 0


def test_a_disturbed_repetition_does_not_count(calibration: xr.Dataset) -> None:
    disturbed = calibration.copy(deep=True)
    disturbed.backward_time[..., 1] *= 3
    assert Costs.of(disturbed).whole_steps(16) == pytest.approx(Costs.of(calibration).whole_steps(16))


def test_a_curve_never_falls_over_the_share(calibration: xr.Dataset) -> None:
    noisy = calibration.copy(deep=True)
    noisy.forward_time.loc[{"segment": "conv2", "share": 0.5}] *= 4
    points, times = Costs.of(noisy).curves("conv2", 500, 32) or pytest.fail("conv2 has curves")
    assert points.tolist() == [125, 250, 500]
    assert (np.diff(times, axis=1) >= 0).all()
    # What was above the next point and that point meet in the middle: neither alone is believed.
    forward = [_seconds(Costs.of(noisy), "conv2", share, 32) for share in (0.5, 0.99)]
    assert forward == pytest.approx([1.5, 1.5])
    assert _seconds(Costs.of(noisy), "conv2", 1.0, 32) == pytest.approx(1.0)  # who has all divides nothing


@given(arrays(float, (2, 3, 5, 2), elements=st.floats(0.1, 10) | st.just(np.nan)))
def test_rising_curves_are_the_isotonic_regression_of_what_was_measured(values: np.ndarray) -> None:
    risen = _rising(values)
    for place in np.ndindex(2, 3, 2):
        one, found = (curves[place[0], place[1], :, place[2]] for curves in (values, risen))
        there = np.isfinite(one)
        np.testing.assert_array_equal(np.isfinite(found), there)
        if there.any():
            np.testing.assert_allclose(found[there], isotonic_regression(one[there]).x)


@given(arrays(float, (2, 3, 4), elements=st.floats(0.1, 10) | st.just(np.nan)))
def test_the_typical_repetition_is_the_lower_median_of_those_there_are(values: np.ndarray) -> None:
    found = _typical(xr.DataArray(values, dims=("device", "repetition", "segment")))
    for place in np.ndindex(2, 4):
        there = values[place[0], :, place[1]]
        there = there[np.isfinite(there)]
        np.testing.assert_equal(found[place], statistics.median_low(there) if len(there) else np.nan)


def test_shares_that_were_not_measured_do_not_count(calibration: xr.Dataset) -> None:
    """As of layers with few kernels, for which several shares are the same."""
    gaps = calibration.copy(deep=True)
    for name in ("forward_time", "backward_time", "input_gradient_time", "kernels"):
        gaps[name] = gaps[name].where((gaps.segment != "conv2") | (gaps.share != 0.5))
    costs = Costs.of(gaps)
    for share in (0.1, 0.25, 0.3, 0.6, 1.0):
        measured = gaps.share.values[gaps.share.values != 0.5]
        times = [_seconds(Costs.of(calibration), "conv2", one, 32) for one in measured]
        assert _seconds(costs, "conv2", share, 32) == pytest.approx(np.interp(share, measured, times))
        assert _seconds(costs, "conv1", share, 32) == _seconds(Costs.of(calibration), "conv1", share, 32)


def test_one_number_of_images_is_taken_in_proportion(calibration: xr.Dataset) -> None:
    costs = Costs.of(calibration.isel(images=[-1]))
    assert _seconds(costs, "conv2", 1.0, 64) == pytest.approx(2.0)


def test_more_images_never_take_less_time(calibration: xr.Dataset) -> None:
    falling = calibration.copy(deep=True)
    falling.forward_time.loc[{"segment": "relu1", "images": 8}] *= 100
    costs = Costs.of(falling)
    few, many = (_seconds(costs, "relu1", 1.0, images) for images in (1, 1000))
    assert 0 < few <= many


def test_devices_of_one_label_that_hardly_differ_are_taken_to_be_equal(calibration: xr.Dataset) -> None:
    def steps(label: str, factor: float) -> list[float]:
        other = calibration.copy(deep=True)
        other["device_label"] = ("device", np.array(["cpu", label], dtype=object))
        for name in ("forward_time", "backward_time", "update_time"):
            other[name][1] = factor * other[name][0]
        return [float(one) for one in Costs.of(other).whole_steps(16)]

    alone = steps("cpu", 1)[0]
    assert steps("cpu", 1.04) == pytest.approx([1.02 * alone] * 2)
    assert steps("cpu", 1.2) == pytest.approx([alone, 1.2 * alone])
    assert steps("gpu", 1.04) == pytest.approx([alone, 1.04 * alone])


def test_a_segment_takes_the_part_that_it_was_measured_to_take_alone(calibration: xr.Dataset) -> None:
    quieter = calibration.copy(deep=True)
    quieter["device_label"] = ("device", np.array(["cpu", "cpu"], dtype=object))
    quieter.backward_time_alone.loc[{"segment": "conv2"}] *= 0.6
    quieter.forward_time_alone.loc[{"segment": "conv2"}] *= 1.5  # no device is slower when it is alone
    quieter.backward_time_alone[1] = np.nan  # the first of a kind stands for the others
    quieter.forward_time_alone[1] = np.nan
    costs = Costs.of(quieter)
    assert costs.alone_part("conv2", "backward") == pytest.approx([0.6, 0.6])
    assert costs.alone_part("conv2", "forward") == pytest.approx([1.0, 1.0])
    assert costs.alone_part("conv1", "backward") == pytest.approx([1.0, 1.0])


def test_a_divided_backward_pass_is_divided_as_it_was_measured(calibration: xr.Dataset) -> None:
    assert Costs.of(calibration).input_part_of("conv2") == pytest.approx(0.5)
    uneven = calibration.copy(deep=True)
    uneven.input_gradient_time.loc[{"segment": "conv2"}] *= 1.4
    uneven.input_gradient_time.loc[{"segment": "conv1"}] = np.nan  # nothing before it needs a gradient
    assert Costs.of(uneven).input_part_of("conv2") == pytest.approx(0.7)
    assert Costs.of(uneven).input_part_of("conv1") == pytest.approx(0.5)


def test_batch_normalisation_over_a_part_of_the_images_takes_what_it_was_measured_to_take(
    calibration: xr.Dataset,
) -> None:
    apart = calibration.copy(deep=True)
    apart.backward_time_by_images.loc[{"segment": "relu1"}] *= 1.5
    apart.forward_time_by_images.loc[{"segment": "conv1"}] = np.nan  # there is none in it
    costs = Costs.of(apart)
    assert costs.by_images_part("relu1", "backward") == pytest.approx(1.5)
    assert costs.by_images_part("relu1", "forward") == pytest.approx(1.0)
    assert costs.by_images_part("conv1", "forward") == pytest.approx(1.0)


@pytest.mark.parametrize(("ranks", "crowding"), [(2, 1.0), (4, 3.0)])
def test_messages_of_many_ranks_at_once_crowd_the_links(ranks: int, crowding: float) -> None:
    graph = trace(network("4:8"), torch.zeros(2, 3, 32, 32))
    together = synthetic.calibration_of(graph, ["cpu"] * ranks)
    apart = together.link_bandwidth.values[0, 1]
    moved = float(np.diff(together.turn_bytes.values)[0]) * (ranks - 1)
    turn = 1e-3
    together.turn_time[0], together.turn_time[1] = turn, turn + 3 * moved / apart
    costs = Costs.of(together)
    assert costs.turn == pytest.approx([turn - together.link_latency.values[0, 1]] * ranks)  # what a message takes
    assert costs.crowding == pytest.approx([crowding] * ranks)


def test_one_device_has_nobody_to_wait_for(calibration: xr.Dataset) -> None:
    lonely = calibration.isel(device=[0], source=[0], destination=[0])
    lonely["turn_time"] = lonely.turn_time * np.nan
    assert Costs.of(lonely).turn == pytest.approx([0.0])
    assert Costs.of(lonely).crowding == pytest.approx([1.0])


def test_a_device_alone_is_faster_than_beside_the_others_by_what_was_measured(calibration: xr.Dataset) -> None:
    quieter = calibration.assign(
        {name: 0.8 * calibration[name] for name in ("forward_time_alone", "backward_time_alone")}
    )
    costs = Costs.of(quieter)
    for segment in costs.segments:
        assert costs.alone_part(segment.split("+")[0], "forward") == pytest.approx(0.8)
    slowed = costs.slowed(np.array([1.0, 2.0]))
    assert slowed.whole_steps(64) == pytest.approx(costs.whole_steps(64) * [1, 2])
    assert slowed.update == pytest.approx(costs.update * [1, 2])


@pytest.mark.parametrize(("times", "counted"), [(0.8, 0.8), (1.3, 1.0)], ids=["something fixed", "noise"])
def test_large_shares_of_a_slow_device_that_were_measured_with_few_images_grow_like_smaller_ones(
    calibration: xr.Dataset, times: float, counted: float
) -> None:
    few = calibration.copy(deep=True)
    images = few.images.values
    with_both = {"segment": "conv2", "share": 0.25}
    few.forward_time.loc[{"images": images[-1], **with_both}] *= times
    grows = counted * images[-1] / images[0]
    for name in ("forward_time", "backward_time"):
        few[name].loc[{"device": 1, "share": [0.5, 1.0], "images": images[-1]}] = np.nan
    few.forward_time_alone.loc[{"device": 1}] = 0.9 * few.forward_time.sel(device=1, share=1.0, images=images[0])
    costs = Costs.of(few)
    for share in (0.5, 1.0):
        expected = few.forward_time.sel(device=1, segment="conv2", share=share, images=images[0]) * grows
        found = costs.seconds(["conv2"], ["forward"], np.full((1, 2), share), np.full((1, 2), images[-1]))[0, 1]
        assert found == pytest.approx(expected.median().item())
    assert costs.alone_part("conv2", "forward")[1] == pytest.approx(0.9), "beside others with as many images"
    faster = Costs.of(calibration)
    assert _seconds(costs, "conv2", 1.0, 32) == _seconds(faster, "conv2", 1.0, 32), "the other device has all"

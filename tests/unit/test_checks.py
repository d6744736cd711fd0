"""Calibrations and plans that do not belong to the network, the devices or this torch, or cannot be, are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import pipeline
from pipeline.calibration.subset import of_devices
from pipeline.cli import main
from pipeline.errors import InputError
from pipeline.graph.trace import trace
from pipeline.plan.checks import check_calibration, check_plan
from pipeline.plan.files import plan_from_json, plan_to_json
from pipeline.plan.plan import Plan, Strategy
from pipeline.plan.planner import plan_graph
from pipeline.plan.strategies import plan_network
from pipeline.results.stores import combine_calibrations, write_zip
from tests import synthetic

LABELS = ("cpu", "cpu@0.5")
SHAPE = (3, 16, 16)


def _net(*, kernel: int = 3) -> nn.Sequential:
    """Most kinds of operations in a row; other kernels of the first give the same shapes."""
    return nn.Sequential(
        nn.Conv2d(3, 6, kernel, padding=kernel // 2),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=3),
        nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(96, 10),
        nn.LayerNorm(10),
    )


def _frozen() -> nn.Sequential:
    """The same of which the first weights are not trained."""
    model = _net()
    model[0].requires_grad_(False)
    return model


GRAPH = trace(_net(), torch.zeros(2, *SHAPE))
OTHER = trace(_net(kernel=5), torch.zeros(2, *SHAPE))
FROZEN = trace(_frozen(), torch.zeros(2, *SHAPE))
FIRST, RELU, GROUPED, NORM, POOL, FLATTEN, DENSE, LAYER_NORM = (one.name for one in GRAPH.operations)


@pytest.fixture
def calibration() -> xr.Dataset:
    found = synthetic.calibration_of(GRAPH, LABELS).copy(deep=True)  # of which some variables share memory
    return found.assign_attrs(network_digest=GRAPH.digest)


def _says(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_calibration_of_the_same_names_but_another_kernel_size_is_refused(calibration: xr.Dataset) -> None:
    check_calibration(calibration, GRAPH, LABELS)
    with pytest.raises(
        InputError, match=r"another network .of a test, digest .* some size, stride or the like differs"
    ):
        check_calibration(calibration, OTHER, LABELS)
    with pytest.raises(InputError, match=r"differs, or which weights are trained, so calibrate this one"):
        check_calibration(calibration, FROZEN, LABELS)
    del calibration.attrs["network_digest"]  # one that was kept before there was a digest
    check_calibration(calibration, OTHER, LABELS)


def test_a_calibration_of_another_or_an_unknown_torch_is_refused(calibration: xr.Dataset) -> None:
    first, second, *_ = torch.__version__.split(".")
    check_calibration(calibration.assign_attrs(versions=f"torch {first}.{second}.99+cu999"), GRAPH, LABELS)
    with pytest.raises(InputError, match=rf"made with torch {first}\.{second}9, but this is torch {first}\.{second}"):
        check_calibration(calibration.assign_attrs(versions=f"torch {first}.{second}9.0"), GRAPH, LABELS)
    with pytest.raises(InputError, match=r"does not say which torch .* versions is torchvision 0.28.0, where"):
        check_calibration(calibration.assign_attrs(versions="torchvision 0.28.0"), GRAPH, LABELS)
    del calibration.attrs["versions"]
    with pytest.raises(InputError, match=r"versions is None, where 'torch .* so calibrate again"):
        check_calibration(calibration, GRAPH, LABELS)


def test_a_calibration_that_does_not_tell_its_images_is_refused(calibration: xr.Dataset) -> None:
    del calibration.attrs["image_shape"]
    with pytest.raises(InputError, match="does not say what images it is for"):
        pipeline.make_plan(_net(), calibration, batch_size=8)


def test_a_device_that_vanished_is_named(calibration: xr.Dataset) -> None:
    assert list(of_devices(calibration, ["cpu@0.5"]).device_label) == ["cpu@0.5"]
    with pytest.raises(InputError, match=r"is of cpu, cpu@0.5, not of cpu, cpu: calibrate these devices"):
        of_devices(calibration, ["cpu", "cpu"])
    plan = plan_graph(GRAPH, calibration, batch_size=8, strategy="ddp", labels=LABELS)
    with pytest.raises(InputError, match=r"needs device 1 \(cpu@0.5\), but there are only 1"):
        check_plan(plan, GRAPH, LABELS[:1])


def _changed(name: str, value: float, **place: object) -> Callable[[xr.Dataset], None]:
    def change(dataset: xr.Dataset) -> None:
        dataset[name].loc[place] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_changed("link_bandwidth", -1.0), "link_bandwidth from device 0 to 1 is -1: it must be positive"),
        (_changed("link_bandwidth", np.nan), "link_bandwidth from device 0 to 1 is nan: it must be positive"),
        (_changed("link_latency", -1e-3), "link_latency from device 0 to 1 is -0.001: it must be at least 0"),
        (_changed("link_latency", np.inf), "link_latency from device 0 to 1 is inf: it must be at least 0"),
        (
            _changed("forward_time", np.nan, segment=FIRST),
            f"forward_time at segment {FIRST}, device 0, images 4 is nan s: the whole segment must be measured",
        ),
        (
            _changed("backward_time", np.nan, segment=DENSE, share=1.0, images=4),
            f"backward_time at segment {DENSE}, device 0, images 4 is nan s: the whole segment",
        ),
        (
            _changed("forward_time", 0.0, segment=FIRST, share=1.0),
            f"forward_time at segment {FIRST}, device 0, images 4 is 0 s: it must be positive",
        ),
        (
            _changed("backward_time", -1.0, segment=DENSE, share=0.25, images=16),
            f"backward_time at device 0, segment {DENSE}, share 0.25, images 16, repetition 0 is -1 s: it must not be",
        ),
        (_changed("forward_time", np.inf, segment=DENSE, share=0.25), "is inf s: it must be finite"),
        (_changed("update_time", -1.0), "update_time at device 0, repetition 0 is -1 s: it must not be negative"),
        (_changed("process_memory", -1.0), "process_memory at device 0 is -1 bytes: it must not be negative"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_that_cannot_be_are_refused(
    calibration: xr.Dataset, change: Callable[[xr.Dataset], None], says: str
) -> None:
    change(calibration)
    with pytest.raises(InputError, match=re.escape(says)) as error:
        check_calibration(calibration, GRAPH, LABELS)
    assert _says(error)


def test_what_need_not_be_measured_may_be_missing(calibration: xr.Dataset) -> None:
    calibration.forward_time.loc[{"share": [0.25, 0.5]}] = np.nan
    calibration.backward_time.loc[{"share": [0.25, 0.5]}] = np.nan
    calibration["kernels"] = calibration.kernels.where(calibration.share == 1.0)
    for name in ("forward_time_alone", "backward_time_by_images", "input_gradient_time", "update_time_alone"):
        calibration[name][...] = np.nan
    check_calibration(calibration, GRAPH, LABELS)


def test_large_shares_may_be_measured_with_few_images_only(calibration: xr.Dataset) -> None:
    large = {"device": 1, "share": [0.5, 1.0], "images": 16}
    for name in ("forward_time", "backward_time"):
        calibration[name].loc[large] = np.nan
    check_calibration(calibration, GRAPH, LABELS)
    calibration.forward_time.loc[{"segment": FIRST, "device": 1, "share": 0.25, "images": 4}] *= 100_000
    with pytest.raises(InputError, match=f"forward_time of {FIRST} on device 1 falls from .* more than noise"):
        check_calibration(calibration, GRAPH, LABELS)
    calibration.forward_time.loc[{"device": 1, "share": 0.25, "images": 16}] = np.nan
    with pytest.raises(InputError, match=r"device 1, images 16 is nan s: .* some share with few and many"):
        check_calibration(calibration, GRAPH, LABELS)


def test_what_no_gradient_flows_through_may_take_no_time_backward(calibration: xr.Dataset) -> None:
    calibration.backward_time.loc[{"segment": FIRST}] = 0.0
    calibration = calibration.assign_attrs(network_digest=FROZEN.digest)
    check_calibration(calibration, FROZEN, LABELS)


def _make_slow(calibration: xr.Dataset) -> None:
    """The same times of devices that take 100,000 times as long."""
    for name in ("forward_time", "backward_time"):
        calibration[name] = 100_000 * calibration[name]


class TestCurvesThatFall:
    def test_beyond_noise_are_refused(self, calibration: xr.Dataset) -> None:
        _make_slow(calibration)
        whole = calibration.forward_time.sel(segment=FIRST, share=1.0, images=16).isel(device=1).item()
        calibration.forward_time.loc[{"segment": FIRST, "share": 0.25, "device": 1}] = 2.1 * whole
        with pytest.raises(InputError, match=f"forward_time of {FIRST} on device 1 falls from .* more than noise"):
            check_calibration(calibration, GRAPH, LABELS)

    def test_in_many_small_segments_together_are_refused(self, calibration: xr.Dataset) -> None:
        calibration["forward_time"] = xr.full_like(calibration.forward_time, 3.0)
        calibration["backward_time"] = xr.full_like(calibration.backward_time, 1.0)
        check_calibration(calibration, GRAPH, LABELS)
        calibration.backward_time.loc[{"share": 0.25}] = 2.5
        with pytest.raises(InputError, match="backward_time of the whole network on device 0 falls from"):
            check_calibration(calibration, GRAPH, LABELS)

    @pytest.mark.parametrize(("times", "repetitions"), [(1.9, [0, 1, 2]), (50.0, [1])], ids=["a little", "once"])
    def test_by_noise_are_kept(self, calibration: xr.Dataset, times: float, repetitions: list[int]) -> None:
        calibration = calibration.isel(repetition=[0, 0, 0])
        _make_slow(calibration)
        whole = calibration.forward_time.sel(segment=FIRST, share=1.0, images=16).isel(device=1, repetition=0).item()
        place = {"segment": FIRST, "share": 0.25, "device": 1, "repetition": repetitions}
        calibration.forward_time.loc[place] = times * whole
        check_calibration(calibration, GRAPH, LABELS)

    def test_of_a_network_that_takes_no_longer_than_noise_are_kept(self, calibration: xr.Dataset) -> None:
        calibration["forward_time"] = xr.full_like(calibration.forward_time, 1e-4)
        calibration.forward_time.loc[{"share": 0.25}] = 5e-4
        check_calibration(calibration, GRAPH, LABELS)

    def test_in_what_hardly_takes_time_are_kept(self, calibration: xr.Dataset) -> None:
        _make_slow(calibration)
        whole = calibration.forward_time.sel(segment=LAYER_NORM, share=1.0, images=16).max().item()
        calibration.forward_time.loc[{"segment": LAYER_NORM, "share": 0.25}] = 2.1 * whole
        check_calibration(calibration, GRAPH, LABELS)


def test_combined_calibrations_are_refused_with_the_names_of_their_parts(
    calibration: xr.Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [calibration.assign_coords(device_set=name, network="my net") for name in ("cpu + cpu@0.5", "2 x cpu")]
    combined = combine_calibrations(parts)
    says = r"combines 2 calibrations \(my net on cpu \+ cpu@0.5, my net on 2 x cpu\): take the file"
    with pytest.raises(InputError, match=says):
        pipeline.make_plan(_net(), combined, batch_size=8)
    plan = pipeline.make_plan(_net(), calibration, batch_size=8, strategy="kernel")
    with pytest.raises(InputError, match=says):
        pipeline.simulate(plan, combined)
    with pytest.raises(InputError, match=says):
        pipeline.simulate(plan, combined, model=_net())
    with pytest.raises(InputError, match=says):
        of_devices(combined, LABELS)
    path = tmp_path / "calibration.zarr.zip"
    write_zip(combined, path)
    assert main(["simulate", "--calibration", str(path), "--output", str(tmp_path / "simulation.zarr")]) == 2
    assert re.search(f"{re.escape(str(path))} {says}", capsys.readouterr().err)


@pytest.mark.parametrize("strategy", ["single", "ddp", "equal", "paper", "kernel", "batch", "auto"])
def test_a_plan_for_the_same_names_but_another_kernel_size_is_refused(calibration: xr.Dataset, strategy: str) -> None:
    made = plan_graph(GRAPH, calibration, batch_size=8, strategy=strategy, labels=LABELS)  # type: ignore[arg-type]
    read = plan_from_json(plan_to_json(made))
    for plan in (made, read):
        check_plan(plan, GRAPH, LABELS)
        with pytest.raises(InputError, match=r"for another model .digest .* so plan again"):
            check_plan(plan, OTHER, LABELS)
    older = json.loads(plan_to_json(made))
    del older["network_digest"]
    check_plan(plan_from_json(json.dumps(older)), OTHER, LABELS)


@pytest.mark.parametrize("strategy", ["ddp", "kernel", "batch"])
def test_a_plan_may_be_run_with_other_weights_trained(calibration: xr.Dataset, strategy: Strategy) -> None:
    read = plan_from_json(plan_to_json(plan_graph(GRAPH, calibration, batch_size=8, strategy=strategy, labels=LABELS)))
    check_plan(read, FROZEN, LABELS)
    again = plan_graph(
        FROZEN, calibration.assign_attrs(network_digest=FROZEN.digest), batch_size=8, strategy=strategy, labels=LABELS
    )
    check_plan(plan_from_json(plan_to_json(again)), GRAPH, LABELS)


def _plan(**layouts: tuple[str, list[int]]) -> Plan:
    """A plan by kernels of which some layouts have been edited, by the operation and ``input`` or ``output``."""
    plan = plan_network(GRAPH, "kernel", batch_size=8, labels=LABELS, shares=(0.5, 0.5))
    content = json.loads(plan_to_json(plan))
    for place, (kind, shares) in layouts.items():
        name, _, end = place.rpartition(".")
        one = next(one for one in content["operations"] if one["name"] == name)
        one[end] = {"kind": kind, "shares": shares}
    return plan_from_json(json.dumps(content), "p.json")


@pytest.mark.parametrize(
    ("layouts", "says"),
    [
        ({f"{RELU}.output": ("P", [1, 1])}, r"go from K\(4,2\) to P\(1,1\): an operation of its kind \(channelwise\)"),
        ({f"{RELU}.output": ("K", [2, 4])}, r"go from K\(4,2\) to K\(2,4\): of K\(4,2\) it makes K\(4,2\)"),
        ({f"{RELU}.output": ("M", [1, 0])}, "can go from M to M, R to R, B to B, K to K"),
        ({f"{FIRST}.input": ("M", [1, 0])}, r"go from M to K\(4,2\): the ranks that have something of the one must be"),
        ({f"{FIRST}.input": ("R", [1, 0])}, "the ranks that have something of the one must be those of the other"),
        (
            {f"{FIRST}.input": ("B", [4, 4]), f"{FIRST}.output": ("B", [3, 5])},
            r"of B\(4,4\) it makes B\(4,4\)",
        ),
        (
            {f"{GROUPED}.input": ("K", [3, 3]), f"{GROUPED}.output": ("K", [3, 3])},
            "each share must be a multiple of 2, as these channels stay together",
        ),
        ({f"{GROUPED}.input": ("K", [2, 4])}, r"of K\(2,4\) it makes K\(2,4\)"),
        ({f"{FLATTEN}.output": ("K", [40, 56])}, r"it makes K\(64,32\)"),
        ({f"{DENSE}.output": ("K", [5, 5])}, r"go from K\(64,32\) to K\(5,5\)"),
        ({f"{LAYER_NORM}.input": ("K", [5, 5]), f"{LAYER_NORM}.output": ("K", [5, 5])}, r"its kind \(imagewise\)"),
        ({f"{NORM}.input": ("K", [3, 4])}, "splits 7 channels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layouts_that_an_operation_cannot_have_are_refused(
    layouts: dict[str, tuple[str, list[int]]], says: str
) -> None:
    check_plan(_plan(), GRAPH, LABELS)
    with pytest.raises(InputError, match=says) as error:
        check_plan(_plan(**layouts), GRAPH, LABELS)
    assert _says(error)


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (("K", [-1, 7]), rf"p.json is not a plan: {RELU}: layout K: shares \[-1, 7\] must not be negative"),
        (("R", [0, 0]), rf"p.json is not a plan: {RELU}: layout R: shares \[0, 0\] leave nothing on any rank"),
        (("K", [2, 2, 2]), f"p.json is not a plan: {RELU} has shares for 3 of 2 devices"),
    ],
)
def test_shares_that_cannot_be_are_refused_with_their_place(layout: tuple[str, list[int]], says: str) -> None:
    with pytest.raises(InputError, match=says):
        _plan(**{f"{RELU}.input": layout})


def test_a_plan_of_other_devices_than_its_shares_is_refused() -> None:
    plan = replace(_plan(), devices=(0,), labels=("cpu",))
    with pytest.raises(InputError, match=r"has 2 shares for .*, but 1 devices: plan again"):
        check_plan(plan, GRAPH, LABELS)


class Twice(nn.Module):
    """One layer used in two places, and channels that are taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 10)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        one, other = self.conv(torch.relu(self.conv(x_BCHW))).chunk(2, 1)
        logits: torch.Tensor = self.head(torch.cat([other, one], 1).mean((2, 3)))
        return logits


def test_what_shares_a_weight_or_cannot_travel_must_be_in_one_place() -> None:
    graph = trace(Twice(), torch.zeros(2, 4, 8, 8))
    plan = plan_network(graph, "kernel", batch_size=8, labels=LABELS, shares=(0.5, 0.5))
    check_plan(plan, graph, LABELS)
    by_images = plan_network(graph, "batch", batch_size=8, labels=LABELS, shares=(0.5, 0.5))

    def edited(name: str) -> Plan:
        return replace(plan, operations=tuple(by_images[name] if one.name == name else one for one in plan.operations))

    with pytest.raises(InputError, match="who shares a weight must have the same parts of it"):
        check_plan(edited("conv_1"), graph, LABELS)
    with pytest.raises(InputError, match="chunk, which it takes and which cannot travel, is in"):
        check_plan(edited("getitem"), graph, LABELS)


class Bound(nn.Module):
    """The convolution works on parts of images, which cannot travel, so that all of it is one segment."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 16)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        images, channels, *size = x_BCHW.shape
        return self.conv(x_BCHW.reshape(images * channels, 1, *size)).reshape(images, -1)


def test_a_convolution_that_is_no_segment_of_its_own_is_no_other_network() -> None:
    graph = trace(Bound(), torch.zeros(2, *SHAPE))
    calibration = synthetic.calibration_of(graph, LABELS)
    assert "conv" not in calibration.segment.values
    check_calibration(calibration, graph, LABELS)

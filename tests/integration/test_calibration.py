"""Calibrations and cells as they are measured on a real cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from distributed import Client
from torch import nn
from torch.utils.data import TensorDataset

import pipeline
from pipeline.calibration.measure import CalibrationWarning, calibrate
from pipeline.calibration.probes import PROBES, probe_rank, probing
from pipeline.calibration.skeletons import skeleton_of
from pipeline.cluster.devices import discover
from pipeline.cluster.gang import run_gang
from pipeline.errors import LostDeviceError
from pipeline.graph.trace import trace
from pipeline.networks import network
from pipeline.plan.plan import STRATEGIES, Strategy
from pipeline.results.contracts import validate_calibration, validate_cell
from pipeline.run.benchmark import Bench, measure_cells
from pipeline.run.recipe import OptimizerFactory
from tests.engine import images

BATCH = 8
REPETITIONS = 3


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with pipeline.local_cluster([pipeline.Device("cpu"), pipeline.Device("cpu", speed=0.25)], dashboard=False) as one:
        yield one


@pytest.fixture(scope="module")
def calibration(client: Client) -> xr.Dataset:
    return calibrate(network("20:50"), torch.zeros(BATCH, 3, 32, 32), client, network="20:50", repetitions=2)


@pytest.mark.parametrize("keeps", [True, False])
def test_real_steps_go_on_whether_or_not_strategies_keep_what_they_hold(
    client: Client, calibration: xr.Dataset, *, keeps: bool
) -> None:
    model = network("20:50")
    task = probing(skeleton_of(model), {}, trace(model, torch.zeros(BATCH, 3, 32, 32)), calibration)
    assert task.keeps
    found = run_gang(client, discover(client), probe_rank, [(replace(task, keeps=keeps),)] * 2, label="probe")
    for probe, steps, other in zip(PROBES, found[0].steps, found[1].steps, strict=True):
        assert np.isfinite(steps).sum() >= 2, probe
        np.testing.assert_array_equal(steps, other)


def test_the_fastest_device_may_be_another_than_the_first(client: Client) -> None:
    members = tuple(reversed(discover(client)))
    found = calibrate(
        network("4:8"), torch.zeros(BATCH, 3, 32, 32), client, members=members, fractions=(0.5,), repetitions=1
    )
    assert [str(label) for label in found.device_label.values] == ["cpu@0.25", "cpu"]
    busy = np.isfinite(found.probe_busy_time).any("repetition")
    assert busy.sel(probe="single").values.tolist() == [False, True]
    assert busy.drop_sel(probe=["single", "ddp"]).all()
    assert np.isfinite(found.probe_step_time).any("repetition").all()
    assert (found.stretch > 0).all()
    assert found.kernels.sel(segment="dense").values.tolist() == [100, 200]  # features: 8 channels of 5x5


def test_a_device_by_itself_takes_real_steps_too_which_are_predicted_then(client: Client) -> None:
    model = network("20:50")
    found = calibrate(
        model, torch.zeros(BATCH, 3, 32, 32), client, members=discover(client)[:1], fractions=(0.5,), repetitions=1
    )
    taken = found.probe_step_time.sel(probe="single").dropna("repetition").values
    assert len(taken) >= 2
    assert not np.isfinite(found.probe_step_time.drop_sel(probe="single")).any()
    without_update = found.assign(update_time=0 * found.update_time, update_overhead=0 * found.update_overhead)
    plan = pipeline.make_plan(model, found, batch_size=BATCH)
    predicted = float(pipeline.simulate(plan, without_update).step_time[0])
    # The instructions are stretched by at most 2 to what the device computed, and what a step takes beside is added.
    assert predicted == pytest.approx(statistics.median_low(taken), rel=0.05)


def test_a_slow_device_measures_large_shares_with_few_images() -> None:
    model, images = network("20:50"), 32
    devices = [pipeline.Device("cpu"), pipeline.Device("cpu", speed=0.03)]
    with pipeline.local_cluster(devices, dashboard=False) as slow:
        found = calibrate(model, torch.zeros(images, 3, 32, 32), slow, fractions=(1 / 32, 0.5), repetitions=1)
    there = np.isfinite(found.forward_time).any("repetition").sel(segment="conv2", images=images)
    assert there.sel(share=1.0).values.tolist() == [True, False]
    assert there.sel(share=1 / 32).all(), "about what it would have"
    plan = pipeline.make_plan(model, found, batch_size=images, strategy="paper")
    fast, slow_one = plan["conv2"].output.shares
    assert 0 <= slow_one < fast / 10
    assert float(pipeline.simulate(plan, found).step_time[0]) > 0


class _OneTooMany(nn.Module):
    """Has a layer that it does not use, which DistributedDataParallel does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 28 * 28, 10))
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)  # type: ignore[no-any-return]


def test_ranks_load_nothing_that_training_does_without_and_what_ddp_cannot_train_is_calibrated_without_it() -> None:
    images_BCHW = torch.zeros(BATCH, 3, 32, 32)
    with pipeline.local_cluster([pipeline.Device("cpu")] * 2, dashboard=False) as client:
        calibrate(network("4:8"), images_BCHW, client, fractions=(0.5,), repetitions=1)
        # A named function, or a model of this module, would make the workers load it.
        loaded = client.run(lambda: {"torch", "xarray", "pandas", "scipy.optimize", "scipy.stats"} & set(sys.modules))
        found = calibrate(_OneTooMany(), images_BCHW, client, fractions=(0.5,), repetitions=1)
    assert list(loaded.values()) == [{"torch"}] * 2
    taken = np.isfinite(found.probe_step_time).any("repetition")
    without = [str(probe) for probe in found.probe.values[~taken]]
    assert without == ["ddp", "ddp without sums"]
    assert found.reducing_time == found.summing_time
    assert (found.stretch.sel(layout="ddp") == found.stretch.sel(layout="B")).all()


def test_a_calibration_keeps_every_repetition_of_every_segment_and_link(calibration: xr.Dataset) -> None:
    validate_calibration(calibration)
    assert list(calibration.segment.values) == ["conv1", "relu1+pool1", "conv2", "relu2+pool2+flatten", "dense"]
    sizes = dict(calibration.forward_time.sizes)
    assert sizes.pop("repetition") >= 2
    assert sizes == {"device": 2, "segment": 5, "share": 5, "images": 2}
    made = calibration.forward_time.count("repetition")
    assert (made >= 2).all()
    assert (calibration.forward_time.fillna(1) > 0).all()
    assert (calibration.backward_time.fillna(1) > 0).all()
    assert (calibration.update_time.median("repetition") > 0).all()
    apart = calibration.link_time.isel(source=0, destination=1)
    assert (apart.fillna(1) > 0).all()
    assert (apart.count("repetition") >= 5).all()
    assert np.isfinite(calibration.link_bandwidth.values[0, 1])
    assert calibration.kernels.sel(segment="conv2").values.tolist() == [2, 6, 12, 25, 50]
    assert calibration.attrs["emulated"]


def test_shares_follow_the_calibration(calibration: xr.Dataset) -> None:
    """A device emulated at a quarter of the speed must get clearly less, whatever the machine."""
    for strategy in ("paper", "kernel"):
        plan = pipeline.make_plan(network("20:50"), calibration, batch_size=BATCH, strategy=strategy)  # type: ignore[arg-type]
        fast, slow = plan["conv2"].output.shares
        assert fast + slow == 50
        assert fast > slow


def test_a_calibration_of_another_network_is_refused(calibration: xr.Dataset) -> None:
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 10))
    with pytest.raises(pipeline.InputError, match="calibration is of another network"):
        pipeline.make_plan(other, calibration, batch_size=BATCH)


def _bench(client: Client, calibration: xr.Dataset, **other: Any) -> Bench:
    given = {"model": network("20:50"), "dataset": images(dtype=torch.float32), "members": discover(client)} | other
    return Bench(
        client=client, network="20:50", batch_size=BATCH, device_set="cpu + cpu@0.25", calibration=calibration, **given
    )


def _cell(client: Client, calibration: xr.Dataset, strategy: Strategy, **other: Any) -> xr.Dataset:
    return _bench(client, calibration, **other).time(strategy, repetitions=REPETITIONS, warmup=1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_cell_accounts_for_the_time_of_every_device(
    client: Client, calibration: xr.Dataset, strategy: Strategy
) -> None:
    cell = _cell(client, calibration, strategy)
    validate_cell(cell)
    assert cell.status.item() == "ok"
    assert cell.step_time.sizes == {"repetition": REPETITIONS}
    accounted = cell.compute_time + cell.exchange_time + cell.idle_time
    xr.testing.assert_allclose(accounted.max("device"), cell.step_time, rtol=0.05)
    assert (accounted <= cell.step_time * 1.001 + 1e-3).all()
    assert cell.share.sum().item() == pytest.approx(1)
    assert cell.predicted_step_time.item() > 0
    assert (cell.peak_memory > 1e6).all()
    if strategy == "single":
        assert list(cell.device_label.values) == ["cpu"]
        assert 0 < cell.convolution_time.values[-1] < 10 * cell.step_time.values[-1]
    if strategy == "paper":
        assert cell.instruction_bytes.sum() > 0


def test_all_strategies_of_a_cell_train_the_same_network(client: Client, calibration: xr.Dataset) -> None:
    losses = [_cell(client, calibration, strategy).loss.values for strategy in ("single", "ddp", "paper", "kernel")]
    for loss in losses[1:]:
        np.testing.assert_allclose(loss, losses[0], rtol=1e-4)


def _greedy(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimiser whose state does not fit into any machine."""
    torch.empty(1 << 58)
    return torch.optim.SGD(parameters, lr=0.01)


def _failing(_: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    raise ArithmeticError("no such optimiser today")


@pytest.mark.parametrize(
    ("optimizer", "status"),
    [(_greedy, "out of memory: "), (_failing, "failed: ")],
    ids=["out of memory", "another error"],
)
def test_a_cell_that_fails_says_how_and_the_next_one_works(
    client: Client, calibration: xr.Dataset, optimizer: OptimizerFactory, status: str
) -> None:
    cell = _cell(client, calibration, "paper", optimizer=optimizer)
    validate_cell(cell)
    assert cell.status.item().startswith(status)
    assert _cell(client, calibration, "single").status.item() == "ok"


def test_a_batch_larger_than_the_data_is_refused(client: Client, calibration: xr.Dataset) -> None:
    few = TensorDataset(torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(pipeline.InputError, match="batch size 8 is larger than the data set, which has 4 images"):
        _bench(client, calibration, dataset=few)


def test_real_steps_that_fail_do_not_lose_the_calibration(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(context: Any, _: Any) -> None:
        raise MemoryError(f"rank {context.rank} is full")

    monkeypatch.setattr("pipeline.calibration.measure.probe_rank", failing)
    with pytest.warns(CalibrationWarning, match="the real steps that end the calibration of 4:8 failed.* is full"):
        found = calibrate(network("4:8"), torch.zeros(BATCH, 3, 32, 32), client, network="4:8", fractions=(0.5,))
    validate_calibration(found)
    assert not np.isfinite(found.probe_step_time).any()
    assert (found.stretch == 1).all()
    plan = pipeline.make_plan(network("4:8"), found, batch_size=BATCH, strategy="auto")
    assert plan.batch_size == BATCH


def test_a_device_lost_in_the_real_steps_is_an_error(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(context: Any, _: Any) -> None:
        if context.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)

    monkeypatch.setattr("pipeline.calibration.measure.probe_rank", dying)
    with pytest.raises(LostDeviceError, match="was lost during probe 4:8"):
        calibrate(network("4:8"), torch.zeros(BATCH, 3, 32, 32), client, network="4:8", fractions=(0.5,))
    client.wait_for_workers(2, timeout=30)


def test_the_same_work_on_the_same_devices_is_measured_once(client: Client, tmp_path: Path) -> None:
    def measured(width: int, *, force: bool = False) -> xr.Dataset:
        model = nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(900 * width, 10))
        example = torch.zeros(2, 3, 32, 32)
        how: dict[str, Any] = {"fractions": (0.5,), "repetitions": 1, "cache": tmp_path, "force": force}
        return calibrate(model, example, client, members=discover(client)[:1], network=f"{width}", **how)

    first = measured(4)
    again = measured(4)
    assert "cached" not in first.attrs
    assert "cached" in again.attrs
    xr.testing.assert_equal(again, first)
    wider = measured(5)
    assert "cached" not in wider.attrs, "another width is other work"
    assert again.attrs["network_digest"] == first.attrs["network_digest"] != wider.attrs["network_digest"]
    assert "cached" not in measured(4, force=True).attrs
    for file in tmp_path.iterdir():
        file.write_bytes(b"broken")
    assert "cached" not in measured(4).attrs


def test_networks_share_the_curves_of_segments_that_do_the_same_work(client: Client, tmp_path: Path) -> None:
    def measured(depth: int, *, force: bool = False, renamed: bool = False) -> xr.Dataset:
        deep = [nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()) for _ in range(depth)]
        model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *deep, nn.AvgPool2d(depth), nn.Flatten(), nn.LazyLinear(3))
        model(torch.zeros(2, 3, 24, 24))
        if renamed:
            model = nn.Sequential(OrderedDict((f"layer{name}", one) for name, one in model.named_children()))
        how: dict[str, Any] = {"fractions": (0.5,), "repetitions": 1, "cache": tmp_path, "force": force}
        return calibrate(model, torch.zeros(BATCH, 3, 24, 24), client, network=f"{depth}", **how)

    shallow = measured(1)
    assert shallow.attrs["known_segments"] == 0
    deep = measured(3)
    validate_calibration(deep)
    same = [str(work) in shallow.work.values for work in deep.work.values]
    if shallow.attrs["channels_last"] == deep.attrs["channels_last"]:
        assert deep.attrs["known_segments"] == sum(same) >= 4
        for place in np.flatnonzero(same):
            there = shallow.isel(segment=list(shallow.work.values).index(deep.work.values[place]))
            for name in ("forward_time", "backward_time", "forward_time_by_images"):
                both = (one[name].isel(device=1).values for one in (there, deep.isel(segment=place)))
                known, own = (np.sort(one.ravel()) for one in both)
                np.testing.assert_array_equal(known[np.isfinite(known)], own[np.isfinite(own)])
    assert not all(same), "pooling of another size is other work"
    whole = deep.forward_time.sel(share=1.0).isel(images=-1).max("repetition")
    assert np.isfinite(whole).all()
    renamed = measured(3, renamed=True)
    if renamed.attrs["channels_last"] == deep.attrs["channels_last"]:
        assert renamed.attrs["known_segments"] == renamed.sizes["segment"], "names are no work"
    assert np.isfinite(renamed.forward_time.sel(share=1.0).isel(images=-1).max("repetition")).all()
    assert np.isfinite(renamed.probe_step_time).any()
    forced = measured(1, force=True)
    assert "cached" not in forced.attrs
    assert forced.attrs["known_segments"] == 0
    assert measured(1).attrs["cached"]


class _Narrow(nn.Module):
    """Depthwise convolutions, for which torch has fast code only with the channels last."""

    def __init__(self, *, normalised: nn.Module) -> None:
        super().__init__()
        self.wide, self.normalised = nn.Conv2d(3, 24, 1), normalised
        self.depthwise = nn.Sequential(*(nn.Conv2d(24, 24, 5, padding=2, groups=24) for _ in range(3)))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.depthwise(self.normalised(self.wide(x_BCHW))).mean((2, 3))
        return features[:, :10] * 1.0


def test_the_order_in_memory_is_measured_and_kept_from_what_torch_cannot_do(client: Client) -> None:
    x_BCHW = torch.zeros(BATCH, 3, 24, 24)
    model = _Narrow(normalised=nn.BatchNorm2d(24))
    found = calibrate(model, x_BCHW, client, fractions=(0.5,), repetitions=1)
    assert found.attrs["channels_last"] in (0, 1)
    grouped = calibrate(_Narrow(normalised=nn.GroupNorm(4, 24)), x_BCHW, client, fractions=(1.0,), repetitions=1)
    assert grouped.attrs["channels_last"] == 0
    for last in (0, 1):
        dataset = TensorDataset(torch.randn(BATCH, 3, 24, 24), torch.randint(0, 10, (BATCH,)))
        result = pipeline.fit(
            model, dataset, client, batch_size=BATCH, calibration=found.assign_attrs(channels_last=last)
        )
        assert result.plan.channels_last == bool(last)
        assert all(one.is_contiguous() for one in result.model.state_dict().values())
    assert not pipeline.fit(model, dataset, client, batch_size=BATCH, strategy="ddp").plan.channels_last


def test_short_steps_are_timed_for_a_while(client: Client, calibration: xr.Dataset) -> None:
    bench = _bench(client, calibration)
    cell = bench.time("single", repetitions=REPETITIONS, seconds=6 * bench.predicted("single"), warmup=1)
    validate_cell(cell)
    assert cell.sizes["repetition"] in (6, 7), "as the quotient is rounded"
    assert np.isfinite(cell.step_time).all()
    assert np.isfinite(cell.convolution_time).sum() == REPETITIONS


def test_strategies_are_timed_in_turn_and_their_rounds_joined(client: Client, calibration: xr.Dataset) -> None:
    bench, began = _bench(client, calibration), []

    @contextlib.contextmanager
    def progressing(name: Strategy) -> Iterator[Callable[[int, dict[str, float]], None]]:
        began.append(name)
        yield lambda *_: None

    wanted: dict[Strategy, tuple[Bench, Strategy]] = {name: (bench, name) for name in ("single", "kernel", "auto")}
    cells = measure_cells(wanted, rounds=2, repetitions=4, warmup=1, progressing=progressing)
    own = [] if bench.plan("auto") in (bench.plan("single"), bench.plan("kernel")) else ["auto"]
    assert began == ["single", "kernel", *own, *own, "kernel", "single"]
    for name, cell in cells.items():
        validate_cell(cell)
        assert cell.strategy.item() == name
        assert list(cell["round"].values) == [0, 0, 1, 1]
        assert cell.step_time.sizes == {"repetition": 4}
        assert np.isfinite(cell.step_time).all()
        assert cell.compute_time.sizes["repetition"] == 4
        assert ((cell.stolen >= 0) & (cell.stolen <= 1)).all()
        assert (cell.predicted_memory >= calibration.process_memory.min()).all(), "also of a device without a part"
        assert cell.predicted_memory.max() > calibration.process_memory.max()
    assert cells["single"].chosen.item() == "single"
    assert cells["kernel"].chosen.item() == "kernel"
    assert cells["auto"].chosen.item() in STRATEGIES
    assert np.isfinite(cells["single"].convolution_time).sum() == 4


def test_a_plan_that_auto_shares_with_another_strategy_is_timed_once(client: Client, calibration: xr.Dataset) -> None:
    bench = _bench(client, calibration)
    bench._plans["auto"] = bench.plan("kernel")
    cells = measure_cells({name: (bench, name) for name in ("auto", "kernel")}, rounds=2, repetitions=2, warmup=1)
    assert {name: cell.strategy.item() for name, cell in cells.items()} == {"auto": "auto", "kernel": "kernel"}
    assert cells["auto"].chosen.item() == "kernel"
    np.testing.assert_array_equal(cells["auto"].step_time, cells["kernel"].step_time)
    bench._plans["auto"] = replace(bench.plan("kernel"), strategy="auto")
    apart = measure_cells({name: (bench, name) for name in ("auto", "kernel")}, repetitions=2, warmup=1)
    assert (apart["auto"].step_time.values != apart["kernel"].step_time.values).any()


def test_a_round_that_fails_makes_the_cell_a_failure(client: Client, calibration: xr.Dataset) -> None:
    failing = _bench(client, calibration, optimizer=_failing)
    cells = measure_cells({"bad": (failing, "kernel"), "good": (_bench(client, calibration), "kernel")}, rounds=2)
    assert cells["bad"].status.item().startswith("failed: ")
    assert cells["good"].status.item() == "ok"

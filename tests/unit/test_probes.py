"""What real steps take longer than predicted goes where it belongs, and nothing becomes negative."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from pipeline.calibration import attribution, links, probes
from pipeline.calibration.probes import Probing
from pipeline.calibration.skeletons import skeleton_of
from pipeline.graph.trace import trace
from pipeline.plan.costs import LAYOUTS, Costs
from pipeline.plan.fitting import needed_memory
from pipeline.plan.instructions import COMPANIES
from tests import synthetic


@pytest.fixture(scope="module")
def model() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32 * 28 * 28, 10))


def _measured(model: nn.Module, *factors: float, **true: Any) -> tuple[xr.Dataset, Probing]:
    """A calibration whose probes took so many times as long as it predicts with what is ``true``, and what they were.

    ``true`` are ``stretch``, a growth for each company, ``summing_time``, ``reducing_time`` and ``beginning_time``.
    """
    graph = trace(model, torch.zeros(2, 3, 32, 32))
    calibration = synthetic.calibration_of(graph, ["cpu", "cpu@0.5"]).drop_vars(("probe_step_time", "probe_busy_time"))
    task = probes.probing(skeleton_of(model), {}, graph, calibration)
    so = calibration.assign(
        stretch=(("device", "layout"), true.get("stretch", np.ones((2, len(LAYOUTS))))),
        turn_growth=("company", [true.get(company, 0.0) for company in COMPANIES]),
        summing_time=true.get("summing_time", 0.0),
        reducing_time=true.get("reducing_time", 0.0),
        beginning_time=true.get("beginning_time", 0.0),
    )
    steps, busy = _predicted(task, so)
    return calibration.assign(
        probe_step_time=(("probe", "repetition"), (steps * (factors or 1.0))[:, None]),
        probe_busy_time=(("probe", "device", "repetition"), busy[:, :, None]),
    ).assign_coords(probe=np.array(probes.PROBES, object)), task


def _predicted(task: Probing, calibration: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    costs, steps = Costs.of(calibration), attribution._Steps(task)
    seconds = [steps.seconds(probe, costs) for probe in probes.PROBES]
    return np.array(seconds), np.array([steps.busy(probe, costs) for probe in probes.PROBES])


def test_what_made_the_probes_slow_is_found(model: nn.Module) -> None:
    true = {"master": 0.3, "everyone": 0.2, "moments": 0.4, "summing_time": 3e-9, "beginning_time": 1e-3}
    true["reducing_time"] = 5e-9
    stretch = np.array([[1.1, 0.9, 1.05, 1.2]] * 2)  # both are CPUs
    calibration, task = _measured(model, stretch=stretch, **true)
    found = attribution.fitted(calibration, task)
    steps, busy = _predicted(task, found)
    assert steps == pytest.approx(calibration.probe_step_time.values[:, 0], rel=0.01)
    assert busy == pytest.approx(calibration.probe_busy_time.values[:, :, 0], rel=0.01, nan_ok=True)
    assert found.stretch.values == pytest.approx(stretch, rel=0.01)
    assert dict(zip(COMPANIES, found.turn_growth.values, strict=True)) == pytest.approx(
        {company: true[company] for company in COMPANIES}, rel=0.1
    )
    assert float(found.summing_time) == pytest.approx(true["summing_time"], rel=0.05)
    assert float(found.reducing_time) == pytest.approx(true["reducing_time"], rel=0.05)
    assert float(found.beginning_time) == pytest.approx(true["beginning_time"], rel=0.01)


def test_who_does_more_of_the_work_says_more_of_how_long_it_takes(model: nn.Module) -> None:
    calibration, task = _measured(model)
    busy = calibration.probe_busy_time.copy(deep=True)
    throughputs = Costs.of(calibration).throughputs(task.images)
    part = throughputs / throughputs.sum()
    assert part[0] > part[1]
    busy.loc[{"probe": "kernel", "device": 0}] *= 1.3
    found = attribution.fitted(calibration.assign(probe_busy_time=busy), task).stretch.sel(layout="K")
    assert found.values == pytest.approx(1 + 0.3 * part[0], rel=0.03)


def test_steps_that_were_faster_than_predicted_make_nothing_negative(model: nn.Module) -> None:
    found = attribution.fitted(*_measured(model, 0.7, 0.7, 0.8, 0.9, 0.7, 0.7, 0.8))
    assert (found.turn_growth >= 0).all()
    assert (found.turn_growth < 0.01).all()
    assert 0 < found.summing_time < 1e-10
    assert 0 < found.reducing_time < 1e-10
    assert found.beginning_time == 0
    assert found.stretch.values == pytest.approx(1.0)


def test_steps_that_take_forever_are_believed_up_to_a_limit(model: nn.Module) -> None:
    found = attribution.fitted(*_measured(model, 100.0, 1000.0, 100.0, 1.0, 100.0, 1000.0, 100.0))
    assert found.turn_growth.sel(company="everyone") == 2
    assert found.summing_time == pytest.approx(1e-8)
    assert found.reducing_time == pytest.approx(1e-8)


def test_probes_without_such_exchanges_say_nothing_of_them() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 30 * 30, 10))
    found = attribution.fitted(*_measured(plain, master=0.5, summing_time=3e-9))
    assert found.turn_growth.sel(company="moments") == 0  # no batch normalisation
    assert found.summing_time == pytest.approx(3e-9, rel=0.05)


def test_what_does_not_fit_into_memory_is_not_tried(model: nn.Module) -> None:
    graph = trace(model, torch.zeros(2, 3, 32, 32))
    calibration = synthetic.calibration_of(graph, ["cpu", "cpu"])
    calibration["memory_limit"] = calibration.process_memory + 1e5
    task = probes.probing(skeleton_of(model), {}, graph, calibration)
    assert task.plans == {}
    assert attribution.fitted(calibration, task).summing_time == 0


def test_what_all_strategies_hold_is_kept_only_if_it_takes_less_than_half_of_the_memory(model: nn.Module) -> None:
    graph = trace(model, torch.zeros(2, 3, 32, 32))
    calibration = synthetic.calibration_of(graph, ["cpu", "cpu"])

    def task_with(room: float) -> Probing:
        return probes.probing(
            skeleton_of(model), {}, graph, calibration.assign(memory_limit=calibration.process_memory + room)
        )

    task = task_with(np.inf)
    needed = [needed_memory(graph, plan, itemsize=task.itemsize).sum() for plan in task.plans.values()]
    assert task.keeps
    assert task_with(2.01 * sum(needed)).keeps
    less = task_with(1.99 * sum(needed))
    assert not less.keeps
    assert list(less.plans) == list(task.plans)  # one after the other they fit


def test_waiting_grows_with_the_computing_as_measured_and_not_at_all_where_nobody_can_tell() -> None:
    before = np.linspace(0.001, 0.02, 12)
    waits = 0.003 + 0.25 * before
    waits[5] = 1.0  # somebody else had the core
    assert links._line(before, waits) == pytest.approx((0.003, 0.25), rel=0.05)
    assert links._line(before[:3], np.array([0.002, 0.004, 0.003])) == (0.003, 0.0)
    assert links._line(before, 0.01 - 0.1 * before)[1] == 0  # who computes longer is not waited for less
    assert links._line(before[:0], waits[:0]) == (0.0, 0.0)


def test_what_takes_long_over_a_slow_link_is_repeated_less() -> None:
    assert [links._possible(5, seconds) for seconds in (1e-4, 0.1, 0.7, 60.0)] == [5, 5, 2, 2]
    assert links._possible(1, 60.0) == 1


def test_a_device_alone_is_tried_again_where_the_plan_may_depend_on_it() -> None:
    def again(**took: list[float]) -> list[str]:
        taken = {probe: [(one, 0.0) for one in took.get(probe, [])] for probe in probes.PROBES}
        return probes._again(["kernel", "batch", "single", "paper", "ddp"], taken)

    assert again(kernel=[0.3], batch=[0.5], single=[0.4, 0.4], ddp=[0.1, 0.1]) == ["kernel", "batch"]
    assert again(kernel=[0.3], single=[0.38, 0.9]) == ["kernel", "single"]  # the lower counts, the rest did not fit
    long = {"batch": [0.9], "single": [0.9, 0.9], "paper": [1.1, 1.2]}
    assert again(kernel=[1.1], **long) == ["kernel", "batch", "single"]  # who knows what disturbed the only step
    assert again(kernel=[1.1, 0.5], **long) == ["kernel", "batch"]
    assert again(ddp=[0.1]) == []


def test_steps_of_one_device_are_taken_until_two_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*seconds: float, once: bool = True, before: tuple[float, ...] = ()) -> list[float]:
        coming = iter(seconds)
        monkeypatch.setattr(probes, "_step", lambda *_, **__: (next(coming), 0.0))
        found = [(one, 0.0) for one in before]
        probes._take_steps(None, None, found, last=True, once=once)  # type: ignore[arg-type]
        return [one for one, _ in found]

    assert taken(0.75, 0.74, 0.0) == [0.75, 0.74]
    assert taken(0.82, 0.72, 0.73, 0.0, before=(1.4,)) == [1.4, 0.82, 0.72, 0.73]  # it settles
    assert taken(0.9, 0.7, 0.5, 0.3, 0.1) == [0.9, 0.7, 0.5, 0.3]  # and this never will
    assert taken(1.4, 1.2, 1.25, 0.0, once=False) == [1.4, 1.2, 1.25]
    assert taken(0.9, 0.7, once=False) == [0.9]  # more in another round


def test_what_one_device_takes_longer_holds_for_any_layout(model: nn.Module) -> None:
    graph = trace(model, torch.zeros(2, 3, 32, 32))
    calibration = synthetic.calibration_of(graph, ["cpu"]).drop_vars(("probe_step_time", "probe_busy_time"))
    task = probes.probing(skeleton_of(model), {}, graph, calibration)
    assert list(task.plans) == ["single"]
    took = [1.3 * attribution._Steps(task).busy("single", Costs.of(calibration))[0], *[np.nan] * len(probes.PROBES[1:])]
    steps = xr.DataArray(took, {"probe": ["single", *(one for one in probes.PROBES if one != "single")]}, "probe")
    measured = calibration.assign(
        probe_step_time=steps.expand_dims(repetition=1), probe_busy_time=steps.expand_dims(device=1, repetition=1)
    )
    found = attribution.fitted(measured, task)
    assert found.stretch.values == pytest.approx(np.full((1, len(LAYOUTS)), 1.3), rel=0.01)

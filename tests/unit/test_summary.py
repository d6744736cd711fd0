"""What a plan says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.cli.plan import show
from pipeline.graph.trace import Graph, trace
from pipeline.networks import network
from pipeline.plan.costs import LAYOUTS, Costs
from pipeline.plan.fitting import needed_memory
from pipeline.plan.link_cases import Links
from pipeline.plan.plan import Plan, Strategy
from pipeline.plan.planner import predicted_step_time, uniform_plan
from pipeline.plan.prediction import predict_step
from pipeline.plan.search import fastest_plan
from pipeline.plan.summary import Summary, summarise
from pipeline.plan.what_ifs import WhatIfs
from tests.unit.test_search import costs_of

LABELS = ("cpu@0.5", "cpu")
BATCH = 32


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(network("20:50"), torch.zeros(2, 3, 32, 32))


def _plan(graph: Graph, costs: Costs, strategy: Strategy, labels: Sequence[str]) -> Plan:
    if strategy == "auto":
        return fastest_plan(graph, costs, batch_size=BATCH, labels=labels)
    return uniform_plan(graph, strategy, BATCH, labels, costs)


def _summary(graph: Graph, costs: Costs, strategy: Strategy, labels: Sequence[str] = LABELS) -> Summary:
    return summarise(graph, _plan(graph, costs, strategy, labels), costs, all_labels=labels)


def _changes(summary: Summary) -> dict[str, float]:
    """The step in s after each change that would help."""
    return {one.change: one.step_seconds for one in summary.helps}


def test_one_device_is_as_fast_as_itself_however_real_steps_differ_from_their_parts(graph: Graph) -> None:
    costs = costs_of(graph, [5e9, 1e10])
    stretch = np.array([[1.1, 1.2, 1.3, 1.4]] * 2)
    real = replace(costs, stretch=stretch, beginning=np.full(2, 0.01), update_alone=np.full(2, 0.5))
    summary = _summary(graph, real, "single")
    assert summary.baseline == "device 1 (cpu)"
    assert summary.speedup == pytest.approx(1.0)
    assert summary.step_seconds > 1.2 * _summary(graph, costs, "single").step_seconds


def test_the_rows_tell_what_each_device_computes_and_by_what_it_is_divided(graph: Graph) -> None:
    costs = costs_of(graph, [5e9, 1e10])
    rows = {one.operation: one for one in _summary(graph, costs, "kernel").rows}
    assert rows["conv2"].layouts == "R → K"
    assert sum(rows["conv2"].shares) == 50
    assert rows["conv2"].shares[1] == pytest.approx(2 * rows["conv2"].shares[0], rel=0.15)
    assert rows["dense"].layouts == "K → P"
    assert sum(rows["dense"].shares) == 50 * 5 * 5  # features


def test_what_one_device_computes_alone_takes_the_time_of_one_that_is_alone(graph: Graph) -> None:
    costs = costs_of(graph, [5e9, 1e10])
    beside = _summary(graph, costs, "single").rows
    alone = _summary(graph, replace(costs, alone=costs.alone * 0.5), "single").rows
    assert [one.seconds[0] for one in alone] == pytest.approx([one.seconds[0] / 2 for one in beside])


@pytest.mark.parametrize("strategy", ["kernel", "batch", "paper", "equal", "ddp", "auto"])
@pytest.mark.parametrize("speeds", [[1e10, 5e9], [1e10, 1e10, 2.5e9]], ids=["two devices", "three devices"])
def test_the_step_is_that_of_the_planner(graph: Graph, speeds: list[float], strategy: Strategy) -> None:
    costs, labels = costs_of(graph, speeds, bandwidth=2e8), [f"cpu@{speed:g}" for speed in speeds]
    plan = _plan(graph, costs, strategy, labels)
    expected = predicted_step_time(graph, plan, costs)
    assert summarise(graph, plan, costs, all_labels=labels).step_seconds == expected
    chosen = costs.only(plan.devices)
    assert predict_step(graph, plan, chosen, batch_size=BATCH, links=Links.measured(chosen)) == expected
    assert predicted_step_time(graph, plan, costs, links=Links.measured(costs)) == expected


@pytest.mark.parametrize("strategy", ["kernel", "paper", "ddp"])
def test_links_that_take_no_time_take_none(graph: Graph, strategy: Strategy) -> None:
    costs = costs_of(graph, [1e10, 1e10], bandwidth=1e8)
    plan = uniform_plan(graph, strategy, BATCH, ["cpu"] * 2, costs)
    none = replace(costs, latency=costs.latency * 0, seconds_per_byte=costs.seconds_per_byte * 0)
    found = WhatIfs(graph, plan, costs, ["cpu"] * 2).without_time()
    assert found == predicted_step_time(graph, plan, none)
    assert found < predicted_step_time(graph, plan, replace(costs, seconds_per_byte=costs.seconds_per_byte / 100))


def test_where_the_links_are_slow_they_limit_and_the_next_faster_ones_help(graph: Graph) -> None:
    costs = costs_of(graph, [1e10] * 3, latency=1e-5, bandwidth=1.25e7)
    plan = uniform_plan(graph, "kernel", BATCH, ["cpu"] * 3, costs)
    summary = summarise(graph, plan, costs, all_labels=["cpu"] * 3)
    assert summary.limit.startswith("the links: ")
    faster = predicted_step_time(graph, plan, costs_of(graph, [1e10] * 3, latency=1e-5, bandwidth=1.25e8))
    assert _changes(summary)["all links at 1 Gbit/s"] == pytest.approx(faster)
    assert "links that take no time at all" in _changes(summary)
    assert not any("latency" in change or "twice as fast" in change for change in _changes(summary))


def test_where_everything_goes_through_the_master_its_links_are_named_alone(graph: Graph) -> None:
    labels = ["cpu", "cpu@0.8", "cpu@0.8"]
    costs = costs_of(graph, [1e10, 8e9, 8e9], latency=1e-5, bandwidth=1.25e8)
    summary = _summary(graph, costs, "paper", labels)
    assert summary.limit.startswith("the links of device 0 (cpu), the master: ")
    changes = _changes(summary)
    assert "the master's links (device 0, cpu) at 10 Gbit/s" in changes
    assert "all links at 10 Gbit/s" not in changes


def test_a_link_that_nearly_has_a_rate_is_offered_the_next(graph: Graph) -> None:
    costs = costs_of(graph, [1e10] * 2, latency=1e-5, bandwidth=1.17e8)  # 0.94 Gbit/s
    assert "the link at 10 Gbit/s" in _changes(_summary(graph, costs, "kernel", ["cpu"] * 2))


def test_where_one_device_is_slow_it_limits_and_to_speed_it_up_or_leave_it_out_helps(graph: Graph) -> None:
    costs = costs_of(graph, [1e10, 1e10, 1e9], latency=1e-6, bandwidth=1e12)
    summary = _summary(graph, costs, "equal", ["cpu", "cpu", "cpu@0.1"])
    assert summary.limit.startswith("device 2 (cpu@0.1), which computes for ")
    changes = _changes(summary)
    assert changes["to leave out device 2 (cpu@0.1)"] < changes["device 2 (cpu@0.1) twice as fast"]
    assert changes["the strategy kernel"] < summary.step_seconds / 2
    assert not any("links" in change for change in changes)


def test_where_all_devices_compute_all_the_time_they_limit_together(graph: Graph) -> None:
    summary = _summary(graph, costs_of(graph, [1e10, 1e10], latency=1e-6, bandwidth=1e12), "kernel", ["cpu"] * 2)
    assert summary.limit.startswith("the devices, which all compute for ")
    assert any(change.startswith("one more device") for change in _changes(summary))


def test_where_little_is_split_the_rest_limits_and_another_strategy_helps() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 2000), nn.Linear(2000, 10))
    graph = trace(model, torch.zeros(2, 3, 32, 32))
    summary = _summary(graph, costs_of(graph, [1e9] * 2, bandwidth=1e12), "paper", ["cpu"] * 2)
    assert summary.limit.startswith("what is not split: ")
    assert summary.limit.endswith("of the step on device 0 (cpu) alone")
    assert "the strategy kernel" in _changes(summary)


def test_one_more_device_like_the_fastest_is_planned_with_its_shares(graph: Graph) -> None:
    costs = costs_of(graph, [8e9, 1e10], bandwidth=1e10)
    more = costs_of(graph, [8e9, 1e10, 1e10], bandwidth=1e10)
    plan = uniform_plan(graph, "kernel", BATCH, ["a", "b", "b"], more)
    found = _changes(_summary(graph, costs, "kernel", ["a", "b"]))
    assert found["one more device like device 1 (b)"] == pytest.approx(predicted_step_time(graph, plan, more))


def test_one_more_device_is_linked_to_the_one_it_is_like_as_badly_as_that_is_to_any(graph: Graph) -> None:
    between = np.array([[0.0, 1e-9, 4e-9], [1e-9, 0.0, 2e-9], [4e-9, 2e-9, 0.0]])
    costs = replace(costs_of(graph, [1e10, 8e9, 8e9]), seconds_per_byte=between)
    twin = np.array([4e-9, 1e-9, 4e-9])
    more = np.block([[between, twin[:, None]], [twin[None], np.zeros((1, 1))]])
    expected = replace(costs_of(graph, [1e10, 8e9, 8e9, 1e10]), seconds_per_byte=more)
    plan = uniform_plan(graph, "kernel", BATCH, ["a", "b", "b", "a"], expected)
    found = _changes(_summary(graph, costs, "kernel", ["a", "b", "b"]))
    assert found["one more device like device 0 (a)"] == pytest.approx(predicted_step_time(graph, plan, expected))


def test_what_helps_is_a_handful_of_which_the_best_comes_first(graph: Graph) -> None:
    costs = costs_of(graph, [1e10, 1e10, 1e9, 1e9], latency=1e-3, bandwidth=1.25e7)
    for strategy in ("paper", "equal", "ddp"):
        summary = _summary(graph, costs, strategy, ["cpu", "cpu", "cpu@0.1", "cpu@0.1"])  # type: ignore[arg-type]
        seconds = [one.step_seconds for one in summary.helps]
        assert 1 <= len(seconds) <= 5
        assert seconds == sorted(seconds)
        assert seconds[-1] * 1.03 <= summary.step_seconds


def test_nothing_is_known_to_help_a_single_device(graph: Graph) -> None:
    summary = _summary(graph, costs_of(graph, [1e10]), "single", ["cpu"])
    assert summary.helps == ()
    assert summary.limit == "the one device, cpu"


def test_where_slow_links_leave_one_device_alone_faster_ones_are_said_to_help(graph: Graph) -> None:
    costs = costs_of(graph, [1e10] * 2, bandwidth=1e6)
    summary = _summary(graph, costs, "auto", ["cpu"] * 2)
    assert summary.speedup == 1.0
    plan = uniform_plan(graph, "batch", BATCH, ["cpu"] * 2, costs)
    none = replace(costs, latency=costs.latency * 0, seconds_per_byte=costs.seconds_per_byte * 0)
    expected = predicted_step_time(graph, plan, none)
    assert _changes(summary)["links that take no time at all, with all devices used"] <= expected
    assert expected < 0.7 * summary.step_seconds


def test_what_takes_all_devices_into_use_besides_says_so() -> None:
    graph, labels = trace(network("150:800"), torch.zeros(2, 3, 32, 32)), ["cpu", "cpu", "cpu@0.5"]
    costs = replace(costs_of(graph, [1e10, 1e10, 5e9], bandwidth=1e11), memory=np.full(3, 1e12))
    needed = needed_memory(graph, _plan(graph, costs, "batch", labels))
    tight = replace(costs, memory=np.array([1e12, 0.6 * needed[1], 0.6 * needed[2]]))
    changes = _changes(_summary(graph, tight, "single", labels))
    assert "enough memory on all devices, with all devices used" in changes
    assert "one more device like device 0 (cpu), with all devices used" in changes


def test_the_baseline_is_the_fastest_device_that_can_hold_the_network(graph: Graph) -> None:
    costs = replace(costs_of(graph, [1e10, 5e9, 5e9]), memory=np.array([1e6, 1e12, 1e12]))
    summary = _summary(graph, costs, "kernel", ["gpu[1MiB]", "cpu", "cpu"])
    alone = costs_of(graph, [5e9])
    assert summary.baseline == "device 1 (cpu)"
    assert summary.baseline_fits
    assert summary.baseline_seconds == pytest.approx(
        predicted_step_time(graph, uniform_plan(graph, "single", BATCH, ["cpu"], alone), alone)
    )
    assert summary.bound == pytest.approx(4.0, rel=0.01)
    nowhere = _summary(graph, replace(costs, memory=np.full(3, 1e6)), "kernel", ["gpu", "cpu", "cpu"])
    assert (nowhere.baseline, nowhere.baseline_fits) == ("device 0 (gpu)", False)


@pytest.mark.parametrize(("strategy", "part"), [("kernel", 0.6), ("batch", 0.8)])
def test_a_device_whose_memory_limits_its_share_is_named(strategy: Strategy, part: float) -> None:
    graph, labels = trace(network("150:800"), torch.zeros(2, 3, 32, 32)), ["cpu", "cpu", "cpu@0.5"]
    costs = replace(costs_of(graph, [1e10, 1e10, 5e9], bandwidth=1e11), memory=np.full(3, 1e12))
    free = _plan(graph, costs, strategy, labels)
    assert summarise(graph, free, costs, all_labels=labels).limited_by_memory == ()
    snug = replace(costs, memory=1.05 * needed_memory(graph, free))
    assert summarise(graph, free, snug, all_labels=labels).limited_by_memory == ()
    tight = replace(costs, memory=np.array([1e12, part * needed_memory(graph, free)[1], 1e12]))
    summary = _summary(graph, tight, strategy, labels)
    assert summary.limited_by_memory == (1,)
    assert "enough memory on all devices" in _changes(summary)


def test_ddp_says_how_much_longer_a_step_is_for_its_sums(graph: Graph) -> None:
    costs = costs_of(graph, [1e10] * 2, bandwidth=1e8)
    (row,) = _summary(graph, costs, "ddp", ["cpu"] * 2).rows
    none = replace(costs, latency=costs.latency * 0, seconds_per_byte=costs.seconds_per_byte * 0)
    plan = uniform_plan(graph, "ddp", BATCH, ["cpu"] * 2, costs)
    assert row.exchange_seconds == predicted_step_time(graph, plan, costs) - predicted_step_time(graph, plan, none) > 0
    assert row.shares == (16, 16)


class TestShown:
    def lines(
        self, capsys: pytest.CaptureFixture[str], graph: Graph, costs: Costs, strategy: Strategy, labels: Sequence[str]
    ) -> list[str]:
        plan = _plan(graph, costs, strategy, labels)
        show(plan, summarise(graph, plan, costs, all_labels=labels))
        return capsys.readouterr().out.splitlines()

    def test_a_row_says_what_each_device_does_and_lines_below_what_it_means(
        self, graph: Graph, capsys: pytest.CaptureFixture[str]
    ) -> None:
        costs = costs_of(graph, [1e10, 5e9, 1e10], bandwidth=1.25e8)
        lines = self.lines(capsys, graph, costs, "kernel", ["cpu", "cpu@0.5", "cpu"])
        assert lines[0].strip() == "kernel over cpu + cpu@0.5 + cpu, batch 32"
        row = next(line for line in lines if "conv2" in line)
        shares = row.split("R → K")[1].split()[:3]
        assert sum(map(int, shares)) == 50
        assert int(shares[0]) > int(shares[1])
        assert any(line.startswith("Shares and times are of each device in turn; ") for line in lines)
        assert any(line.startswith("Layouts: R a copy on each, K kernels or channels split, P ") for line in lines)
        assert any(line.startswith("Predicted step: ") and "alone, device 0 (cpu), takes " in line for line in lines)
        assert any(line.startswith("Speedup: ") for line in lines)
        assert any(line.startswith("What limits: ") for line in lines)
        helps = lines[next(at for at, line in enumerate(lines) if line.startswith("What would help")) + 1 :]
        assert any(line.startswith("  all links at 10 Gbit/s: ") and line.endswith("x") for line in helps)

    @pytest.mark.parametrize("strategy", ["ddp", "single", "auto", "equal"])
    def test_nothing_that_is_said_is_no_number(
        self, graph: Graph, capsys: pytest.CaptureFixture[str], strategy: Strategy
    ) -> None:
        text = "\n".join(self.lines(capsys, graph, costs_of(graph, [1e10, 5e9]), strategy, ["cpu", "cpu@0.5"]))
        assert "nan" not in text
        assert "inf" not in text

    @pytest.mark.parametrize(("alone", "longer"), [(1.0, False), (2.0, True)])
    def test_a_speedup_beyond_what_all_devices_allow_is_explained(
        self, graph: Graph, capsys: pytest.CaptureFixture[str], alone: float, *, longer: bool
    ) -> None:
        stretch = np.ones((2, len(LAYOUTS)))
        stretch[:, LAYOUTS.index("M")] = alone
        costs = replace(costs_of(graph, [1e10, 5e9], bandwidth=1e11), stretch=stretch)
        lines = self.lines(capsys, graph, costs, "batch", ["cpu", "cpu@0.5"])
        speedup = next(line for line in lines if line.startswith("Speedup: "))
        assert ("had not one device alone taken longer" in speedup) == longer

    def test_many_devices_are_told_by_the_least_and_the_most(
        self, graph: Graph, capsys: pytest.CaptureFixture[str]
    ) -> None:
        costs = costs_of(graph, [1e10] * 4 + [5e9] * 4, bandwidth=1e11)
        lines = self.lines(capsys, graph, costs, "kernel", ["cpu"] * 4 + ["cpu@0.5"] * 4)
        assert lines[0].strip() == "kernel over 4 x cpu + 4 x cpu@0.5, batch 32"
        assert " to " in next(line for line in lines if "conv2" in line)
        assert any(line.startswith("Shares and times are the least and the most") for line in lines)

    def test_a_device_that_cannot_hold_the_network_is_no_silent_baseline(
        self, graph: Graph, capsys: pytest.CaptureFixture[str]
    ) -> None:
        costs = replace(costs_of(graph, [1e10, 5e9]), memory=np.full(2, 1e6))
        text = "\n".join(self.lines(capsys, graph, costs, "kernel", ["cpu", "cpu@0.5"]))
        assert "alone, device 0 (cpu), which cannot hold the network, takes " in text

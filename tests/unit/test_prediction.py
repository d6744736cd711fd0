"""Predicted timelines obey the links: ports take one message after the other, and what is deferred hides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.graph.trace import Graph, trace
from pipeline.networks import network
from pipeline.plan import prediction
from pipeline.plan.costs import DIRECTIONS, LAYOUTS, Costs
from pipeline.plan.instructions import Compute, Exchange
from pipeline.plan.layouts import kernels, master
from pipeline.plan.link_cases import Links
from pipeline.plan.prediction import predict_step, predict_timeline
from pipeline.plan.program import compile_program
from pipeline.plan.strategies import plan_network
from pipeline.plan.traffic import traffic
from tests.unit.test_search import costs_of

BATCH = 32


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(network("20:50"), torch.zeros(2, 3, 32, 32))


def _timeline(graph: Graph, strategy: str, ranks: int, links: Links) -> tuple[np.ndarray, list[object]]:
    costs = costs_of(graph, [1e10] * ranks, latency=0.0, bandwidth=np.inf)  # sending itself takes nothing
    labels = [f"device {rank}" for rank in range(ranks)]
    plan = plan_network(graph, strategy, batch_size=BATCH, labels=labels, costs=costs)  # type: ignore[arg-type]
    program = compile_program(graph, plan, BATCH)
    return predict_timeline(graph, plan, program, costs, links=links), list(program.instructions)


@pytest.mark.parametrize("strategy", ["paper", "kernel", "batch"])
def test_instructions_of_a_rank_follow_each_other(graph: Graph, strategy: str) -> None:
    timeline, instructions = _timeline(graph, strategy, 3, Links.uniform(np.array([1e-4]), np.array([1e8])))
    assert (timeline[..., 1] >= timeline[..., 0])[np.isfinite(timeline[..., 0])].all()
    for rank in range(3):
        free = 0.0
        for place, one in enumerate(instructions):
            start, end = timeline[0, place, rank]
            if np.isnan(start):
                continue
            assert start >= free - 1e-12
            if not (isinstance(one, Exchange) and one.deferred):
                free = end


def test_the_master_sends_to_one_worker_after_the_other(graph: Graph) -> None:
    """With links of no latency and slow bytes the first exchange takes what the master has to send in all."""
    bandwidth = 1e7
    timeline, instructions = _timeline(graph, "paper", 4, Links.uniform(np.array([0.0]), np.array([bandwidth])))
    place = next(place for place, one in enumerate(instructions) if isinstance(one, Exchange))
    exchange = instructions[place]
    assert isinstance(exchange, Exchange)
    start, end = timeline[0, place, 0]
    assert end - start == pytest.approx(4 * exchange.elements / bandwidth)
    arrivals = timeline[0, place, 1:, 1] - start
    assert arrivals == pytest.approx((end - start) * np.array([1, 2, 3]) / 3)


def test_latency_is_paid_once_per_exchange_not_once_per_message(graph: Graph) -> None:
    times = [
        predict_step(graph, plan, costs, batch_size=BATCH, links=Links.uniform(np.array([one]), np.array([1e12])))[0]
        for costs in [costs_of(graph, [1e10] * 4)]
        for plan in [plan_network(graph, "kernel", batch_size=BATCH, labels=["d"] * 4, costs=costs)]
        for one in (0.0, 1e-3)
    ]
    program = compile_program(graph, plan_of(graph, 4), BATCH)
    exchanges = sum(isinstance(one, Exchange) for one in program.instructions)
    assert 1e-3 < times[1] - times[0] <= exchanges * 1e-3 + 1e-9


def plan_of(graph: Graph, ranks: int) -> object:
    return plan_network(graph, "kernel", batch_size=BATCH, labels=["d"] * ranks, costs=costs_of(graph, [1e10] * ranks))


def test_cases_are_independent_of_each_other(graph: Graph) -> None:
    latency, bandwidth = np.array([0.0, 1e-4, 5e-2]), np.array([1e10, 1e8, 1e6])
    together, _ = _timeline(graph, "kernel", 3, Links.uniform(latency, bandwidth))
    for case in range(3):
        alone, _ = _timeline(graph, "kernel", 3, Links.uniform(latency[[case]], bandwidth[[case]]))
        np.testing.assert_allclose(together[case], alone[0])


@pytest.mark.parametrize("strategy", ["paper", "kernel", "batch"])
def test_sums_over_messages_agree_with_following_each(
    graph: Graph, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = Links.uniform(np.array([1e-4]), np.array([1e8]))
    followed, _ = _timeline(graph, strategy, 6, links)
    monkeypatch.setattr(prediction, "_PAIRWISE_RANKS", 1)
    summed, _ = _timeline(graph, strategy, 6, links)
    assert np.nanmax(summed) == pytest.approx(np.nanmax(followed), rel=0.15)


@pytest.mark.parametrize("slow", ["sending", "receiving", "far away and without a part"])
def test_sums_over_unlike_links_agree_with_following_each_message(
    graph: Graph, slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of links that are slow in one direction, or of a rank that takes no part."""
    costs = costs_of(graph, [1e10] * 5)
    plan = plan_network(
        graph, "kernel", batch_size=BATCH, labels=["cpu"] * 5, costs=costs, shares=[0.3, 0.3, 0.2, 0.2, 0.0]
    )
    latency, per_byte = np.full((1, 5, 5), 1e-4), np.full((1, 5, 5), 1e-8)
    if slow == "sending":
        per_byte[:, 2, :] *= 100
    elif slow == "receiving":
        per_byte[:, :, 2] *= 100
    else:
        latency[:, 4, :] = latency[:, :, 4] = 10.0
    links, program = Links(latency, per_byte), compile_program(graph, plan, BATCH)
    followed = predict_timeline(graph, plan, program, costs, links=links)
    monkeypatch.setattr(prediction, "_PAIRWISE_RANKS", 1)
    summed = predict_timeline(graph, plan, program, costs, links=links)
    assert np.nanmax(summed) == pytest.approx(np.nanmax(followed), rel=0.15)


def test_faster_links_and_devices_never_make_a_step_longer(graph: Graph) -> None:
    links = Links.uniform(np.full(4, 1e-4), np.array([1e6, 1e7, 1e8, 1e9]))
    timeline, _ = _timeline(graph, "kernel", 4, links)
    steps = np.nanmax(timeline, axis=(1, 2, 3))
    assert (np.diff(steps) < 0).all()


def _gathers(costs: Costs, links: Links, ranks: int, late: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Ends of two gathers in a row, the master coming ``late`` to the first, message by message and in sums, (rank)."""
    moved = traffic(kernels((0,) + (10,) * (ranks - 1)), master(ranks), 1, 10 * (ranks - 1))
    found = []
    for follow in (True, False):
        simulation = object.__new__(prediction._Simulation)
        simulation._links, simulation._costs = links, costs
        simulation._ports, simulation._sums = {}, {}
        simulation._free = np.zeros((1, ranks))
        simulation._free[0, 0] = late
        simulation._handling = np.zeros((1, 1))
        simulation._egress, simulation._ingress = np.zeros((1, ranks)), np.zeros((1, ranks))
        for _ in range(2):
            step = simulation._message_by_message if follow else simulation._in_sum
            simulation._free = np.maximum(simulation._free, step(moved, 1, np.zeros(ranks)))
        found.append(simulation._free[0])
    return found[0], found[1]


@pytest.mark.parametrize("late", [0.0, 10.0])
def test_a_receiving_port_takes_one_exchange_after_the_other(graph: Graph, late: float) -> None:
    """Three messages of 1 s each, twice, to one port: 6 s, or no wait at all for who comes when all is there."""
    links = Links.uniform(np.array([0.0]), np.array([10.0]))
    followed, summed = _gathers(costs_of(graph, [1e10] * 4), links, 4, late)
    assert followed[0] == pytest.approx(max(6.0, late))
    assert summed[0] == pytest.approx(followed[0])


def _busy(graph: Graph, strategy: str, costs: Costs, links: Links | None = None) -> tuple[np.ndarray, list[object]]:
    """How long each instruction takes on each rank in s, (instruction, rank), and the instructions."""
    labels = [f"device {rank}" for rank in range(costs.devices)]
    plan = plan_network(graph, strategy, batch_size=BATCH, labels=labels, costs=costs)  # type: ignore[arg-type]
    program = compile_program(graph, plan, BATCH)
    timeline = predict_timeline(graph, plan, program, costs, links=links)[0]
    return timeline[..., 1] - timeline[..., 0], list(program.instructions)


def test_who_computes_while_the_others_wait_does_so_alone(graph: Graph) -> None:
    costs = costs_of(graph, [1e10] * 2)
    beside, instructions = _busy(graph, "paper", costs)
    alone, _ = _busy(graph, "paper", replace(costs, alone=costs.alone * 0.5))
    computations = [place for place, one in enumerate(instructions) if isinstance(one, Compute) and one.steps]
    for place in computations:
        factor = 0.5 if instructions[place].ranks == (0,) else 1.0  # type: ignore[attr-defined]
        assert alone[place] == pytest.approx(factor * beside[place], nan_ok=True)
    assert {len(instructions[place].ranks) for place in computations} == {1, 2}  # type: ignore[attr-defined]


def test_links_that_are_assumed_take_what_sending_takes_besides(graph: Graph) -> None:
    costs = costs_of(graph, [1e10] * 2, latency=1e-3, bandwidth=1e9)
    fast = Links.uniform(np.array([0.0]), np.array([1e15])).with_software(costs)
    assert fast.latency == pytest.approx(1e-3)
    assert fast.seconds_per_byte == pytest.approx(0.5e-9, rel=1e-3)
    alone = Links.uniform(np.array([0.0]), np.array([1e9]))
    assert alone.with_software(costs.only([0])).latency == 0
    plan = plan_network(graph, "kernel", batch_size=BATCH, labels=["a", "b"], costs=costs)
    program = compile_program(graph, plan, BATCH)
    over_loopback, over_nothing = (
        float(np.nanmax(predict_timeline(graph, plan, program, costs, links=links)))
        for links in (None, Links.uniform(np.array([0.0]), np.array([1e15])))
    )
    assert 0.5 < over_nothing / over_loopback < 1


def test_every_computation_takes_the_time_of_a_call_besides(graph: Graph) -> None:
    costs = costs_of(graph, [1e10] * 2)
    free, instructions = _busy(graph, "kernel", costs)
    called, _ = _busy(graph, "kernel", replace(costs, call=np.array([[1.0, 2.0], [3.0, 4.0]])))
    for place, one in enumerate(instructions):
        if isinstance(one, Compute):
            each = np.array([1.0, 3.0] if one.direction == "forward" else [2.0, 4.0])
            assert (called - free)[place, list(one.ranks)] == pytest.approx(each[list(one.ranks)])


def test_a_computation_after_an_exchange_resumes(graph: Graph) -> None:
    costs = costs_of(graph, [1e10] * 2)
    free, instructions = _busy(graph, "kernel", costs)
    resumed, _ = _busy(graph, "kernel", replace(costs, resuming=np.array([[1.0, 2.0], [1.0, 2.0]])))
    for place, one in enumerate(instructions):
        if isinstance(one, Compute) and one.steps:
            after = isinstance(instructions[place - 1], Exchange)
            wanted = after * (1.0 if one.direction == "forward" else 2.0)
            assert (resumed - free)[place] == pytest.approx([wanted] * 2)


def test_batch_normalisation_takes_longer_where_the_images_are_on_several_devices() -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(7200, 10)),
                  torch.zeros(2, 3, 32, 32))  # fmt: skip
    costs = costs_of(graph, [1e10] * 2)
    longer = np.ones_like(costs.by_images)
    longer[[one.startswith("_1") for one in costs.segments]] = 3.0
    for strategy, factor in (("batch", 3.0), ("kernel", 1.0)):
        before, instructions = _busy(graph, strategy, costs)
        after, _ = _busy(graph, strategy, replace(costs, by_images=longer))
        normalising = [place for place, one in enumerate(instructions) if isinstance(one, Compute)
                       and any(step.operation == "_1" and step.part != "moments" for step in one.steps)]  # fmt: skip
        assert normalising
        more = float(np.sum(after[normalising] - before[normalising]))
        both = costs.seconds(["_1", "_1"], DIRECTIONS, np.ones((2, 2)), np.full((2, 2), BATCH / 2))
        assert more == pytest.approx((factor - 1) * float(np.sum(both)), abs=1e-9)
        rest = np.setdiff1d(np.arange(len(instructions)), normalising)
        assert after[rest] == pytest.approx(before[rest], nan_ok=True)


def test_a_divided_backward_pass_takes_its_two_parts_of_the_whole(graph: Graph) -> None:
    costs = costs_of(graph, [1e10] * 2)
    times, instructions = _busy(graph, "kernel", replace(costs, input_part=np.full_like(costs.input_part, 0.7)))
    of = {one.gradients: times[place] for place, one in enumerate(instructions)
          if isinstance(one, Compute) and one.gradients != "all"}  # fmt: skip
    assert of["inputs"] / of["parameters"] == pytest.approx([7 / 3] * 2)


def test_who_waits_for_a_rank_that_has_computed_waits_for_its_turn(graph: Graph) -> None:
    costs, links = costs_of(graph, [1e9] * 2), Links.uniform(np.array([0.0]), np.array([1e12]))
    (quick, instructions), turn = _busy(graph, "kernel", costs, links), 1e-4
    slow, _ = _busy(graph, "kernel", replace(costs, turn=np.full(2, turn)), links)
    first = next(place for place, one in enumerate(instructions) if isinstance(one, Exchange))
    gathers = [place for place, one in enumerate(instructions) if isinstance(one, Exchange) and not one.deferred]
    assert slow[first] == pytest.approx(quick[first]), "nobody has computed before the images travel"
    assert (slow[gathers[1]] - quick[gathers[1]]) == pytest.approx([turn] * 2)


def test_three_ranks_that_send_at_once_crowd_the_measured_links_but_not_assumed_ones(graph: Graph) -> None:
    costs = costs_of(graph, [1e10] * 3, latency=0.0, bandwidth=1e8)
    crowded = replace(costs, crowding=np.full(3, 2.0))
    for links, longer in ((None, True), (Links.uniform(np.array([0.0]), np.array([1e8])), False)):
        usual, instructions = _busy(graph, "kernel", costs, links)
        slow, _ = _busy(graph, "kernel", crowded, links)
        images, gather = (place for place, one in enumerate(instructions) if isinstance(one, Exchange)
                          and one.direction == "forward" and one.target.layout.kind == "R")  # fmt: skip
        assert slow[images] == pytest.approx(usual[images]), "only the master sends the images"
        assert (np.nanmax(slow[gather]) > 1.2 * np.nanmax(usual[gather])) == longer


def test_waiting_grows_with_the_computing_only_where_nothing_else_is_to_be_done(graph: Graph) -> None:
    costs, links = costs_of(graph, [1e9] * 2), Links.uniform(np.array([0.0]), np.array([1e12]))
    plan = plan_network(graph, "kernel", batch_size=BATCH, labels=["a", "b"], costs=costs)
    program = compile_program(graph, plan, BATCH)
    usual, grown = (
        predict_timeline(graph, plan, program, replace(costs, turn_growth=np.full((2, 3), growth)), links=links)[0]
        for growth in (0.0, 0.5)
    )
    # From when the last rank is there.
    longer = (grown - usual)[..., 1].max(axis=1) - (grown - usual)[..., 0].max(axis=1)
    of = {place: one for place, one in enumerate(program.instructions) if isinstance(one, Exchange)}
    assert any(one.deferred for one in of.values())
    assert longer[[place for place, one in of.items() if one.deferred]] == pytest.approx(0.0)
    gather = next(place for place, one in of.items() if place > 0 and not one.deferred)
    computed = np.diff(usual[gather - 1]).max()
    assert isinstance(program.instructions[gather - 1], Compute)
    assert longer[gather] == pytest.approx(0.5 * computed)


@pytest.mark.parametrize(("strategy", "layout"), [("kernel", 0), ("paper", 0), ("batch", 1)])
def test_computing_what_is_shared_is_stretched_as_the_probes_were(graph: Graph, strategy: str, layout: int) -> None:
    costs = costs_of(graph, [1e10] * 2)
    usual, instructions = _busy(graph, strategy, costs)
    stretch = np.ones((2, len(LAYOUTS)))
    stretch[:, layout] = 1.5, 1.5
    stretched, _ = _busy(graph, strategy, replace(costs, stretch=stretch))
    for place, one in enumerate(instructions):
        if isinstance(one, Compute) and one.steps:
            masters = strategy == "paper" and "conv" not in one.name
            factor = 1.0 if masters else 1.5
            assert stretched[place] == pytest.approx(factor * usual[place], nan_ok=True)


def test_who_is_stretched_more_gets_less(graph: Graph) -> None:
    costs = costs_of(graph, [1e10] * 2)
    for strategy, layout in (("kernel", 0), ("batch", 1)):
        stretch = np.ones((2, len(LAYOUTS)))
        stretch[1, layout] = 3.0
        plan = plan_network(graph, strategy, batch_size=BATCH, labels=["a", "b"], costs=replace(costs, stretch=stretch))  # type: ignore[arg-type]
        first, second = plan["conv2"].output.shares
        assert first / second == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("strategy", ["ddp", "single", "kernel", "batch"])
def test_what_a_step_takes_besides_its_instructions_is_added(graph: Graph, strategy: str) -> None:
    costs = costs_of(graph, [1e10] * 2)
    plan = plan_network(graph, strategy, batch_size=BATCH, labels=["a", "b"], costs=costs)  # type: ignore[arg-type]
    usual, longer = (
        predict_step(graph, plan, replace(costs, beginning=np.full(2, one)).only(plan.devices), batch_size=BATCH)
        for one in (0.0, 1.0)
    )
    assert longer - usual == pytest.approx(1.0)


def test_who_updates_alone_does_so_in_less_time(graph: Graph) -> None:
    costs = costs_of(graph, [1e10] * 2)
    for strategy, factor in (("paper", 0.5), ("kernel", 1.0)):
        before, instructions = _busy(graph, strategy, costs)
        after, _ = _busy(graph, strategy, replace(costs, update_alone=np.full(2, 0.5)))
        update = next(place for place, one in enumerate(instructions) if not isinstance(one, Compute | Exchange))
        assert np.nanmax(before[update]) > 0
        assert after[update] == pytest.approx(factor * before[update], nan_ok=True)


def test_an_exchange_with_nobody_takes_a_copy(graph: Graph) -> None:
    costs = costs_of(graph, [1e10] * 2, latency=1e-4)
    labels = ["a", "b"]
    plan = plan_network(graph, "kernel", batch_size=BATCH, labels=labels, costs=costs, shares=(1.0, 0.0))
    program = compile_program(graph, plan, BATCH)
    timeline = predict_timeline(graph, plan, program, costs)[0]
    took = timeline[..., 1] - timeline[..., 0]
    local = [place for place, one in enumerate(program.instructions) if isinstance(one, Exchange)
             and not (one.traffic.sent[0] > 0).any()]  # fmt: skip
    assert local
    assert took[local][:, 0] == pytest.approx(0.5e-4)

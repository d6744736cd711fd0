"""`auto` finds the plan that is predicted fastest."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import pipeline.plan.search as search
from pipeline.calibration.segments import chains_of
from pipeline.graph.trace import Graph, trace
from pipeline.networks import network
from pipeline.plan.costs import LAYOUTS, Costs
from pipeline.plan.link_cases import Links
from pipeline.plan.plan import STRATEGIES, Plan, Strategy
from pipeline.plan.prediction import predict_step
from pipeline.plan.search import fastest_plan, fastest_times
from pipeline.plan.strategies import Kind, Mixed, image_shares, kernel_split, layers_of, plan_network

SHARES = np.array([0.125, 0.5, 1.0])


def costs_of(graph: Graph, speeds: list[float], *, latency: float = 1e-4, bandwidth: float = 1e9) -> Costs:
    """Costs in proportion to the work, of devices that reach so many FLOP/s, plus something for every segment."""
    chains = chains_of(graph)
    flops = [sum(graph[name].flops_per_image for name in chain.operations) + 1e4 for chain in chains]
    per_image = np.array(flops)[None, :, None] * SHARES / np.array(speeds)[:, None, None]
    both = per_image[..., None] * np.array([1.0, 2.0])
    ranks = len(speeds)
    return Costs(
        segments=tuple(chain.name for chain in chains),
        fractions=np.tile(SHARES, (len(chains), 1)),
        fixed=np.full_like(both, 1e-5),
        per_image=both,
        whole=np.stack([np.full_like(both[:, :, -1], 1e-5), both[:, :, -1]], axis=2),
        beginning=np.zeros(ranks),
        call=np.zeros((ranks, 2)),
        resuming=np.zeros((ranks, 2)),
        latency=np.full((ranks, ranks), latency),
        seconds_per_byte=np.full((ranks, ranks), 1 / bandwidth),
        update=np.full(ranks, 1e-9),
        update_overhead=np.zeros(ranks),
        input_part=np.full(len(chains), 0.5),
        by_images=np.ones((len(chains), 2)),
        alone=np.ones((ranks, len(chains), 2)),
        update_alone=np.ones(ranks),
        stretch=np.ones((ranks, len(LAYOUTS))),
        turn=np.zeros(ranks),
        turn_growth=np.zeros((ranks, 3)),
        summing=np.zeros(ranks),
        reducing=np.zeros(ranks),
        crowding=np.ones(ranks),
    )


def predicted(graph: Graph, costs: Costs, strategy: Strategy, batch_size: int) -> float:
    labels = [f"device {rank}" for rank in range(costs.devices)]
    plan = plan_network(graph, strategy, batch_size=batch_size, labels=labels, costs=costs)
    return float(predict_step(graph, plan, costs.only(plan.devices), batch_size=batch_size)[0])


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(network("50:500"), torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("bandwidth", [1e6, 1e7, 1e8, 1e10])
@pytest.mark.parametrize("speeds", [[1e11, 1e11], [1e11, 5e10, 2e10], [1e10, 1e12]], ids=str)
def test_auto_is_never_predicted_slower_than_any_strategy(graph: Graph, speeds: list[float], bandwidth: float) -> None:
    costs = costs_of(graph, speeds, bandwidth=bandwidth)
    labels = [f"device {rank}" for rank in range(costs.devices)]
    plan = fastest_plan(graph, costs, batch_size=32, labels=labels)
    time = float(predict_step(graph, plan, costs.only(plan.devices), batch_size=32)[0])
    for strategy in set(STRATEGIES) - {"ddp", "auto"}:
        assert time <= predicted(graph, costs, strategy, 32) * (1 + 1e-9), strategy


def _exhaustive(graph: Graph, costs: Costs, batch_size: int) -> float:
    """The least predicted time over all kinds of all layers and all sets of two devices and more, and one device."""
    layers, best = [one.name for one in layers_of(graph)], predicted(graph, costs, "single", batch_size)
    for members in product([False, True], repeat=costs.devices):
        devices = tuple(rank for rank, taken in enumerate(members) if taken)
        if len(devices) < 2:
            continue
        some, ranks = costs.only(devices), len(devices)
        labels = [str(device) for device in devices]
        split = kernel_split("kernel", ranks, batch_size, some, None)
        of_images = image_shares(batch_size, ranks, some, None)
        plans = [
            plan_network(graph, one, batch_size=batch_size, labels=labels, costs=some) for one in ("paper", "equal")
        ]
        for kinds in product("KBMI", repeat=len(layers)):
            named: dict[str, Kind] = dict(zip(layers, kinds, strict=True))  # type: ignore[arg-type]
            operations = Mixed(graph, ranks, named, split, of_images).plans()
            plans.append(
                Plan(
                    strategy="auto", batch_size=batch_size, devices=devices, labels=tuple(labels), operations=operations
                )
            )
        best = min(best, *(float(predict_step(graph, plan, some, batch_size=batch_size)[0]) for plan in plans))
    return best


class _Residual(nn.Module):
    """A sum of two branches, which have to agree."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.classifier = nn.Linear(24 * 16 * 16, 10)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        shortcut = torch.relu(self.first(x_BCHW))
        found: torch.Tensor = self.classifier((shortcut + self.second(shortcut)).relu().flatten(1))
        return found


@pytest.mark.parametrize("bandwidth", [3e6, 3e7, 1e9])
@pytest.mark.parametrize(
    ("model", "size", "speeds"),
    [(network("50:500"), 32, [1e11, 6e10, 3e10]), (_Residual(), 16, [1e10, 4e9])],
    ids=["chain", "residual"],
)
def test_auto_equals_exhaustive_search_on_small_networks(
    model: nn.Module, size: int, speeds: list[float], bandwidth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = trace(model, torch.zeros(2, 3, size, size))
    costs = costs_of(graph, speeds, bandwidth=bandwidth)
    best = _exhaustive(graph, costs, 32)
    monkeypatch.setattr(search, "_LEANINGS", ())  # as the other search has no such shares
    labels = [str(device) for device in range(costs.devices)]
    for exhaustive in (search._EXHAUSTIVE, 0):  # also by the descent that larger networks need
        monkeypatch.setattr(search, "_EXHAUSTIVE", exhaustive)
        plan = fastest_plan(graph, costs, batch_size=32, labels=labels)
        found = float(predict_step(graph, plan, costs.only(plan.devices), batch_size=32)[0])
        assert found == pytest.approx(best, rel=1e-9)


def test_shares_lean_away_from_whom_the_others_wait_for(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    call = np.array([[0.0], [0.01]]) * np.ones(2)  # the second device takes long to begin with anything
    costs = replace(costs_of(graph, [1e11] * 2, bandwidth=1e10), call=call)
    even, leaning = (_by_kernels(graph, costs, doubt) for doubt in (1.0, 0.0))
    assert even.convolution_shares(graph) == pytest.approx((0.5, 0.5), abs=0.01)
    assert 0 < leaning.convolution_shares(graph)[1] < 0.48
    before, after = (float(predict_step(graph, one, costs, batch_size=64)[0]) for one in (even, leaning))
    gain = 1 - after / before
    assert gain > 0
    assert [_by_kernels(graph, costs, part * gain) for part in (0.9, 1.1)] == [leaning, even], "as predictions err"
    monkeypatch.setattr(search, "_PART_OF_TRIES", search._MOST_TRIES)
    assert _by_kernels(graph, costs, 0.0) == even, "nor without plans to try"


def _by_kernels(graph: Graph, costs: Costs, doubt: float) -> Plan:
    """The plan of two devices that have a part of each layer's kernels."""
    one = search._Search(graph, costs, 64, ("a", "b"), 4, None, doubt=doubt)
    return one._mixed(dict.fromkeys(one._layers, "K"), (0, 1), one._leaning("K", (0, 1)))


def test_a_mixed_plan_has_to_be_faster_than_predictions_err(graph: Graph) -> None:
    costs = costs_of(graph, [1e11, 6e10, 3e10], bandwidth=3e7)
    labels = ["a", "b", "c"]
    mixed = fastest_plan(graph, costs, batch_size=32, labels=labels)
    assert mixed.strategy == "auto"
    time = float(predict_step(graph, mixed, costs.only(mixed.devices), batch_size=32)[0])
    cautious = fastest_plan(graph, costs, batch_size=32, labels=labels, doubt=1.0)
    assert cautious.strategy in search.UNIFORM
    gain = 1 - time / float(predict_step(graph, cautious, costs.only(cautious.devices), batch_size=32)[0])
    assert gain > 0
    for doubt, strategy in ((0.9 * gain, "auto"), (1.1 * gain, cautious.strategy)):
        assert fastest_plan(graph, costs, batch_size=32, labels=labels, doubt=doubt).strategy == strategy


def test_a_convolution_that_gives_less_than_it_takes_is_split_by_its_input_over_slow_links() -> None:
    """As the bottlenecks of ResNets and MobileNets do: what travels is the sums of the few outputs."""
    layers = [nn.Conv2d(3, 512, 3, padding=1), nn.ReLU(), nn.Conv2d(512, 64, 1), nn.ReLU(), nn.Conv2d(64, 512, 3)]
    graph = trace(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.zeros(2, 3, 8, 8))
    costs = costs_of(graph, [1e10, 1e10], bandwidth=1e8)
    plan = fastest_plan(graph, costs, batch_size=4, labels=["a", "b"])
    narrow = plan["_2"]
    assert (narrow.input.kind, narrow.output.kind) == ("K", "P")
    assert plan.split == pytest.approx(1.0)
    assert plan.convolution_shares(graph) == pytest.approx((0.5, 0.5), abs=0.02)
    time = float(predict_step(graph, plan, costs, batch_size=4)[0])
    assert min(predicted(graph, costs, strategy, 4) for strategy in ("single", "kernel", "batch")) > 1.1 * time


def test_a_slow_device_behind_a_slow_link_is_left_out(graph: Graph) -> None:
    costs = costs_of(graph, [1e11, 1e11, 5e9])
    slow = np.ones((3, 3))
    slow[2, :] = slow[:, 2] = 1e3
    costs = replace(costs, seconds_per_byte=costs.seconds_per_byte * slow)
    plan = fastest_plan(graph, costs, batch_size=64, labels=["cpu", "cpu", "cpu@0.05"])
    assert plan.devices == (0, 1)
    proportional = predicted(graph, costs, "paper", 64)
    assert proportional > 2 * float(predict_step(graph, plan, costs.only((0, 1)), batch_size=64)[0])


@pytest.mark.parametrize("speed", [1e11, 2e11], ids=["as fast", "fastest"])
def test_of_many_devices_one_behind_a_slow_link_is_left_out(graph: Graph, speed: float) -> None:
    costs = costs_of(graph, [1e11] * 8 + [speed])
    slow = np.ones((9, 9))
    slow[8, :] = slow[:, 8] = 1e3
    costs = replace(costs, seconds_per_byte=costs.seconds_per_byte * slow)
    plan = fastest_plan(graph, costs, batch_size=64, labels=["cpu"] * 9)
    assert 8 not in plan.devices
    others = costs.only(range(8))
    time = float(predict_step(graph, plan, costs.only(plan.devices), batch_size=64)[0])
    assert time <= min(predicted(graph, others, strategy, 64) for strategy in ("kernel", "batch"))


def test_the_fastest_of_some_dozens_of_devices_are_tried_by_powers_of_two(graph: Graph) -> None:
    costs = costs_of(graph, [1e11] * 8 + [1e8] * 12)
    plan = fastest_plan(graph, costs, batch_size=64, labels=["cpu"] * 20)
    assert set(plan.devices) <= set(range(8))


def test_a_slow_network_leaves_one_device_alone_and_a_fast_one_takes_all(graph: Graph) -> None:
    alone = fastest_plan(graph, costs_of(graph, [1e12, 1e12], bandwidth=1e4), batch_size=8, labels=["a", "b"])
    assert alone.ranks == 1
    together = fastest_plan(graph, costs_of(graph, [1e10, 1e10], bandwidth=1e11), batch_size=64, labels=["a", "b"])
    assert together.ranks == 2


def test_the_dense_layers_of_a_vgg_are_not_split_by_images() -> None:
    """What each rank would have to sum are the gradients of a hundred million weights."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 32 * 32, 1024), nn.ReLU(), nn.Linear(1024, 10),
    )  # fmt: skip
    graph = trace(model, torch.zeros(2, 3, 32, 32))
    costs = costs_of(graph, [1e10, 1e10], bandwidth=1e9)
    plan = fastest_plan(graph, costs, batch_size=64, labels=["a", "b"])
    assert plan["_5"].output.kind != "B"
    assert plan.strategy in ("auto", "kernel")


def test_every_link_gets_a_plan_of_its_own(graph: Graph) -> None:
    costs = costs_of(graph, [1e11, 1e11])
    links = Links.uniform(np.array([1e-3, 1e-5]), np.array([1e5, 1e10]))
    times = fastest_times(graph, costs, batch_size=64, labels=["a", "b"], links=links)
    assert times[0] == pytest.approx(predicted(graph, costs, "single", 64))
    assert times[1] < 0.7 * times[0]

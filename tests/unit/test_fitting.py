"""Plans keep to the memory of their devices, and say so where they cannot."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import InputError, TooLittleMemoryError
from pipeline.graph.trace import Graph, trace
from pipeline.networks import network
from pipeline.plan.costs import Costs
from pipeline.plan.fitting import SAFETY, Room, check_memory, fits, most_within_memory, needed_memory
from pipeline.plan.memory import predict_memory
from pipeline.plan.plan import Plan, Strategy
from pipeline.plan.planner import plan_graph
from pipeline.plan.strategies import plan_network
from tests import synthetic

LABELS = ("cpu", "cpu", "cpu@0.5")
PROCESS = 3e8
DECIDED = ("single", "ddp", "equal", "paper")
"""Strategies that leave nothing to choose, or only the one device."""


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(network("150:800"), torch.zeros(2, 3, 32, 32))


def _plan(graph: Graph, left: Sequence[float], strategy: Strategy, batch_size: int = 32) -> Plan:
    calibration = synthetic.calibration_of(graph, LABELS)
    calibration["memory_limit"] = ("device", PROCESS + np.array(left))
    plan = plan_graph(graph, calibration, batch_size=batch_size, strategy=strategy, labels=LABELS)
    assert fits(graph, plan, Room.of(np.array(left)), safety=1.0 if strategy in DECIDED else SAFETY)
    return plan


@pytest.mark.parametrize(("strategy", "part"), [("kernel", 0.6), ("batch", 0.95)])
def test_a_device_gets_what_it_can_hold_and_the_others_the_rest(graph: Graph, strategy: Strategy, part: float) -> None:
    free = _plan(graph, (1e12,) * 3, strategy)
    wanted = needed_memory(graph, free)
    limits = (1e12, part * wanted[1], 1e12)
    plan = _plan(graph, limits, strategy)
    shares, before = np.array(plan.convolution_shares(graph)), np.array(free.convolution_shares(graph))
    assert 0 < shares[1] < 0.97 * before[1]
    assert shares[[0, 2]].sum() > before[[0, 2]].sum()
    # No more than is needed is taken away.
    assert needed_memory(graph, plan)[1] > 0.85 * limits[1]


def test_a_device_that_can_hold_nothing_is_left_without_work(graph: Graph) -> None:
    plan = _plan(graph, (1e12, 1e6, 1e12), "auto")
    assert 1 not in plan.devices or plan.convolution_shares(graph)[1] == 0


def test_the_fastest_device_that_can_hold_the_network_is_taken_alone(graph: Graph) -> None:
    assert _plan(graph, (1e6, 1e6, 1e12), "auto").devices == (2,)


def test_single_takes_the_fastest_device_that_can_hold_the_network(graph: Graph) -> None:
    assert _plan(graph, (1e6, 1e12, 1e12), "single").devices == (1,)
    just = 1.01 * predict_memory(graph, _plan(graph, (1e12,) * 3, "single"))[0]
    assert _plan(graph, (1e6, just, 1e12), "single").devices == (2,), "one that has more than just enough is safer"
    assert _plan(graph, (1e6, just, 1e6), "single").devices == (1,)


def test_a_given_plan_is_refused_only_if_it_cannot_fit_and_one_that_is_chosen_keeps_a_distance(graph: Graph) -> None:
    plan = plan_network(graph, "kernel", batch_size=32, labels=["cpu"] * 2, shares=(0.5, 0.5))
    need = predict_memory(graph, plan)
    check_memory(graph, plan, Room.of(1.01 * need), decided=True)
    for left, decided in ((0.99 * need, True), (1.01 * need, False)):
        with pytest.raises(TooLittleMemoryError):
            check_memory(graph, plan, Room.of(left), decided=decided)
    alone = plan_network(graph, "single", batch_size=32, labels=["cpu"])
    left = [float(1.01 * predict_memory(graph, alone)[0])] * 3
    assert _plan(graph, left, "kernel").ranks == 3
    assert (needed_memory(graph, _plan(graph, left, "auto")) <= left[0]).all()


def test_a_narrow_layer_is_shared_out_where_each_device_can_hold_less_than_a_kernel_more() -> None:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 512, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(512, 512, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph, labels = trace(model, torch.zeros(2, 3, 32, 32)), ["cpu"] * 4
    calibration = synthetic.calibration_of(graph, labels)
    free = needed_memory(graph, plan_graph(graph, calibration, batch_size=8, strategy="kernel", labels=labels))
    left = 1.2 * free.max() * np.ones(4)
    left[1] = 0.93 * free[1]
    calibration["memory_limit"] = ("device", PROCESS + left)
    plan = plan_graph(graph, calibration, batch_size=8, strategy="kernel", labels=labels)
    assert fits(graph, plan, Room.of(left))
    assert plan.convolution_shares(graph)[1] > 0


@pytest.mark.parametrize("strategy", ["single", "equal", "paper", "ddp", "kernel", "auto"])
def test_what_fits_nowhere_is_refused_with_what_would_help(graph: Graph, strategy: Strategy) -> None:
    with pytest.raises(
        InputError, match=r"device \d \(cpu.*\) needs about \d+ MiB .*batch size 32, but has \d+ MiB"
    ) as error:
        _plan(graph, (1e6,) * 3, strategy)
    assert "not even one image would fit, so give it more memory" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("strategy", ["single", "ddp", "kernel"])
def test_the_largest_batch_that_fits_is_proposed(graph: Graph, strategy: Strategy) -> None:
    safety = 1.0 if strategy in DECIDED else SAFETY
    left = (1.001 * safety * predict_memory(graph, _plan(graph, (1e12,) * 3, strategy, batch_size=21)).max(),) * 3
    with pytest.raises(TooLittleMemoryError, match="a batch of") as error:
        _plan(graph, left, strategy, batch_size=64)
    found = re.search(r"a batch of (\d+) images would fit", str(error.value))
    assert found is not None
    largest = int(found[1])
    assert largest >= 21
    _plan(graph, left, strategy, batch_size=largest)
    with pytest.raises(TooLittleMemoryError):
        _plan(graph, left, strategy, batch_size=largest + 1)


def _alike(graph: Graph, strategy: Strategy, count: int, batch_size: int = 64) -> Plan:
    shares = [1 / count] * count
    return plan_network(graph, strategy, batch_size=batch_size, labels=["cpu"] * count, shares=shares)


def _told(graph: Graph, left: float, wanted: Strategy, device: str = "cpu") -> str:
    """Why a single device cannot hold the network."""
    calibration = synthetic.calibration_of(graph, [device])
    calibration["memory_limit"] = ("device", [PROCESS + left])
    with pytest.raises(TooLittleMemoryError) as error:
        plan_graph(graph, calibration, batch_size=64, strategy=wanted, labels=[device])
    return str(error.value)


@pytest.mark.parametrize(
    ("wanted", "divided"),
    [("kernel", "kernel"), ("batch", "batch"), ("auto", "kernel")],
    ids=["kernel", "batch", "auto"],
)
def test_as_many_devices_as_would_do_are_proposed_where_more_of_them_help(
    graph: Graph, wanted: Strategy, divided: Strategy
) -> None:
    left = 1.01 * needed_memory(graph, _alike(graph, divided, 3)).max()
    told = _told(graph, left, wanted)
    assert "a batch of " in told
    assert told.endswith("and 3 devices like device 0 (cpu) would hold it with equal shares")
    assert not fits(graph, _alike(graph, divided, 2), Room.of(np.full(2, left)))


@pytest.mark.parametrize("wanted", ["single", "ddp", "equal", "paper"])
def test_more_devices_are_not_proposed_where_they_need_not_help(graph: Graph, wanted: Strategy) -> None:
    left = 1.01 * needed_memory(graph, _alike(graph, "kernel", 3)).max()
    assert "devices like" not in _told(graph, left, wanted)


@pytest.mark.parametrize("wanted", ["kernel", "batch"])
def test_a_single_device_that_cannot_hold_the_network_is_named(graph: Graph, wanted: Strategy) -> None:
    told = _told(graph, 1e6, wanted, "cpu[300MiB]")
    assert told.startswith("device 0 (cpu[300MiB]) needs about ")
    assert "shares 0.5" not in told


ON_ONE: dict[str, Any] = {"labels": ["cpu"], "strategy": "single"}
ON_TWO: dict[str, Any] = {"labels": ["cpu", "cpu"]}


@pytest.mark.parametrize(
    "how",
    [
        ON_ONE,
        ON_ONE | {"strategy": "auto"},
        ON_TWO | {"strategy": "ddp"},
        ON_TWO | {"strategy": "equal"},
        ON_TWO | {"strategy": "kernel", "shares": (0.5, 0.5)},
        ON_TWO | {"strategy": "batch", "shares": (0.5, 0.5)},
    ],
    ids=["a single device", "auto on one", "ddp", "equal", "shares of kernels", "shares of images"],
)
def test_what_does_not_fit_is_refused_without_a_calibration_too(graph: Graph, how: dict[str, Any]) -> None:
    plan = plan_graph(graph, None, batch_size=32, **how)
    need = predict_memory(graph, plan)  # what the user decided is refused only if it does not fit for certain
    enough = Room.of(1.01 * need)
    assert plan_graph(graph, None, batch_size=32, room=enough, **how) == plan
    for rank in range(plan.ranks):
        left = 1.01 * need
        left[rank] = 0.99 * need[rank]
        with pytest.raises(TooLittleMemoryError, match=rf"device {rank} \(cpu\) needs about \d+ MiB"):
            plan_graph(graph, None, batch_size=32, room=Room.of(left), **how)


def test_what_the_optimiser_keeps_counts(graph: Graph) -> None:
    calibration = synthetic.calibration_of(graph, LABELS)
    plan_with = functools.partial(
        plan_graph, graph, calibration, batch_size=32, strategy="kernel", labels=LABELS, shares=None
    )
    left = 1.02 * needed_memory(graph, plan_with())
    assert plan_with(room=Room.of(left, states=0)) == plan_with(room=Room.of(left)) == plan_with()
    with pytest.raises(TooLittleMemoryError):
        plan_with(room=Room.of(left, states=2))


def test_images_count_where_they_are_in_memory(graph: Graph) -> None:
    labels = ["cpu", "cpu"]
    for strategy, holders in (("equal", (0,)), ("ddp", (0, 1))):
        plan = plan_network(graph, strategy, batch_size=32, labels=labels)  # type: ignore[arg-type]
        need = needed_memory(graph, plan)
        for rank in (0, 1):
            images = np.zeros(2)
            images[rank] = 100 * 2**20
            room = Room.of(need + 50 * 2**20, images=images)
            assert fits(graph, plan, room) == (rank not in holders)
            if rank in holders:
                with pytest.raises(TooLittleMemoryError, match=rf"device {rank} .* beside its process and 100 MiB of"):
                    check_memory(graph, plan, room)
        validated = Room.of(need + 50 * 2**20, validation=np.array([0.0, 100 * 2**20]))
        assert fits(graph, plan, validated), "only the master validates"
        assert not fits(graph, plan, Room.of(need + 50 * 2**20, validation=100 * 2.0**20))


def test_the_master_gets_less_where_it_holds_the_images(graph: Graph) -> None:
    calibration = synthetic.calibration_of(graph, LABELS)
    plan_with = functools.partial(plan_graph, graph, calibration, batch_size=32, strategy="kernel", labels=LABELS)
    free = plan_with()
    left = 1.5 * needed_memory(graph, free)
    left[1:] = 1e12
    full = Room.of(left, images=0.6 * left)
    limited = plan_with(room=full)
    assert fits(graph, limited, full)
    assert 0 < limited.convolution_shares(graph)[0] < free.convolution_shares(graph)[0]


def test_two_devices_with_too_little_each_get_what_they_can_hold(graph: Graph) -> None:
    labels, costs = LABELS[:2], Costs.of(synthetic.calibration_of(graph, LABELS[:2]))
    plan_with = functools.partial(plan_network, graph, "kernel", batch_size=32, labels=labels, costs=costs)
    wanted = 0.7, 0.3
    need = needed_memory(graph, plan_with(shares=wanted))
    # Neither fits half of it beside the other, and the second has room for little more than what is left.
    tight = Room.of(1.03 * need)
    most = most_within_memory(graph, plan_with, tight)
    assert most is not None
    plan = plan_with(most=most)
    assert fits(graph, plan, tight)
    assert plan.convolution_shares(graph) == pytest.approx(wanted, abs=0.06)


def test_auto_names_a_batch_that_would_fit(graph: Graph) -> None:
    need = needed_memory(graph, _plan(graph, (1e12,) * 3, "kernel", batch_size=4)).max()
    with pytest.raises(InputError, match=r"a batch of \d+ images would fit"):
        _plan(graph, (1.02 * need,) * 3, "auto", batch_size=256)

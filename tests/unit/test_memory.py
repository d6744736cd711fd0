"""Predicted memory follows what a step holds: weights by share, activations by layout."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pipeline.cluster.devices import Device, Member
from pipeline.graph.trace import Graph, trace
from pipeline.networks import network
from pipeline.plan.memory import SGD_STATES, predict_memory
from pipeline.plan.plan import Plan, Strategy
from pipeline.plan.strategies import Shares, plan_network
from pipeline.run.launch import image_bytes, room_for
from pipeline.run.memory import bytes_of
from pipeline.run.recipe import OptimizerFactory, states_of

MIB = 2**20
CPU_AND_GPU = [
    Member(name=kind, address=kind, host="here", device=Device(kind), hardware="of a test", memory=2**30)  # type: ignore[arg-type]
    for kind in ("cpu", "gpu")
]


def _plan(graph: Graph, strategy: Strategy, shares: Shares | None = None, batch_size: int = 64, ranks: int = 2) -> Plan:
    return plan_network(graph, strategy, batch_size=batch_size, labels=["cpu"] * ranks, shares=shares)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(network("500:1500"), torch.zeros(2, 3, 32, 32))


def test_a_dense_layer_alone_needs_what_can_be_counted() -> None:
    """Weights, gradients and momentum; input, output and their gradients, the backward ones once more in flight."""
    graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(3072, 1000, bias=False)), torch.zeros(2, 3, 32, 32))
    (bytes_needed,) = predict_memory(graph, _plan(graph, "single", ranks=1))
    weights, images = 4 * 3072 * 1000, 4 * 64 * 3072
    assert 3 * weights + images <= bytes_needed <= 3 * weights + 4 * images


def test_more_images_and_more_state_need_more(graph: Graph) -> None:
    few, many = (predict_memory(graph, _plan(graph, "single", batch_size=size, ranks=1))[0] for size in (16, 64))
    assert few < many < 4 * few
    sgd, adam = (predict_memory(graph, _plan(graph, "single", ranks=1), states=states)[0] for states in (1, 2))
    weights = sum(parameter.numel() for parameter in network("500:1500").parameters())
    assert adam - sgd == pytest.approx(4 * weights)


def test_kernels_divide_the_weights_and_images_do_not(graph: Graph) -> None:
    alone = predict_memory(graph, _plan(graph, "single", ranks=1))[0]
    by_kernels = predict_memory(graph, _plan(graph, "kernel", (0.5, 0.5)))
    by_images = predict_memory(graph, _plan(graph, "batch", (0.5, 0.5)))
    assert by_kernels.max() < by_images.max() < alone


def test_the_master_keeps_the_model_beside_its_part(graph: Graph) -> None:
    master, worker = predict_memory(graph, _plan(graph, "kernel", (0.5, 0.5)))
    weights = 4 * sum(parameter.numel() for parameter in network("500:1500").parameters())
    assert master - worker > weights


def test_a_smaller_share_needs_less(graph: Graph) -> None:
    large, small = predict_memory(graph, _plan(graph, "kernel", (0.8, 0.2)))
    assert small < 0.6 * large
    nothing = predict_memory(graph, _plan(graph, "kernel", {"conv1": (500, 0), "conv2": (1500, 0)}))
    assert nothing[1] < MIB


def test_ddp_needs_all_weights_everywhere(graph: Graph) -> None:
    everywhere = predict_memory(graph, _plan(graph, "ddp"))
    weights = 4 * sum(parameter.numel() for parameter in network("500:1500").parameters())
    assert (everywhere > 4 * weights).all()


def test_a_weight_that_is_used_many_times_has_one_gradient() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    once, often = (
        trace(nn.Sequential(*[shared] * uses, nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.zeros(2, 8, 4, 4))
        for uses in (1, 10)
    )
    buckets = []
    for graph in (once, often):
        labels = ("a", "b")
        both, alone = (
            predict_memory(graph, plan_network(graph, strategy, batch_size=size, labels=labels[:ranks]))  # type: ignore[arg-type]
            for strategy, size, ranks in (("ddp", 2, 2), ("single", 1, 1))
        )
        buckets.append(both[0] - alone[0])
    assert buckets == [4 * (8 * 8 * 9 + 8)] * 2


def test_gradients_that_are_summed_are_joined_beside_those_of_each_weight() -> None:
    """Weights, gradients and the optimiser's state; the bucket; half of it is sent twice, and received twice."""
    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 1 << 17)), torch.zeros(2, 3, 4, 4))
    plan = plan_network(graph, "batch", batch_size=2, labels=("a", "b"), shares=(1, 1))
    weights = 4 * sum(math.prod(one.shape) for operation in graph.operations for one in operation.parameters)
    _, worker = predict_memory(graph, plan)
    assert worker == pytest.approx((3 + 1 + 2) * weights, rel=0.05)


def test_the_master_of_the_paper_holds_most(graph: Graph) -> None:
    master, worker = predict_memory(graph, _plan(graph, "paper", (0.5, 0.5)))
    assert master > 1.5 * worker


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [
        (functools.partial(torch.optim.SGD, lr=0.1), 0),
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1),
        (torch.optim.Adagrad, 1),
        (functools.partial(torch.optim.RMSprop, momentum=0.5), 2),
        (torch.optim.Adam, 2),
        (torch.optim.AdamW, 2),
        (functools.partial(torch.optim.Adam, amsgrad=True), 3),
    ],
    ids=["SGD", "SGD with momentum", "Adagrad", "RMSprop with momentum", "Adam", "AdamW", "AMSGrad"],
)
def test_what_an_optimiser_keeps_is_found_by_a_step(optimizer: OptimizerFactory, states: int) -> None:
    assert states_of(optimizer) == states


class _Bare:
    """As much of an optimiser as training needs."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        self._inner = torch.optim.SGD(parameters, lr=0.1)
        self.param_groups = self._inner.param_groups

    def step(self) -> None:
        self._inner.step()


class _Wrapped(_Bare):
    """One whose own state is none of its weights'."""

    state: ClassVar[dict[Any, Any]] = {}


@pytest.mark.parametrize("optimizer", [_Bare, _Wrapped])
def test_an_optimiser_that_does_not_tell_what_it_keeps_is_taken_for_the_usual_one(optimizer: Any) -> None:
    assert states_of(optimizer) == SGD_STATES


def test_a_data_set_takes_its_storages_once_each() -> None:
    whole = torch.zeros(100, 3, 8, 8)
    assert bytes_of(TensorDataset(whole[:10])) == whole.nbytes, "a slice holds the whole"
    repeated = torch.zeros(1, 3, 8, 8).expand(100, 3, 8, 8)
    assert bytes_of(TensorDataset(repeated)) == repeated[0].nbytes
    assert bytes_of(TensorDataset(whole, whole[:, 0])) == whole.nbytes
    assert bytes_of(TensorDataset(whole, whole.clone())) == 2 * whole.nbytes
    assert math.isnan(bytes_of(_OnDisk(TensorDataset(whole))))


def test_images_of_unknown_size_are_unknown_only_where_they_are() -> None:
    images = TensorDataset(torch.zeros(10, 3, 8, 8))
    assert image_bytes(CPU_AND_GPU, images).tolist() == [10 * 3 * 8 * 8 * 4, 0]
    assert np.isnan(image_bytes(CPU_AND_GPU, _OnDisk(images))).tolist() == [True, False]


def test_images_are_in_the_memory_of_a_cpu_device_and_not_of_a_gpu() -> None:
    images = TensorDataset(torch.zeros(10, 3, 8, 8), torch.zeros(10, dtype=torch.int64))
    room = room_for(CPU_AND_GPU, images, optimizer=torch.optim.Adam, validation=_OnDisk(images))
    assert room.images.tolist() == [10 * (3 * 8 * 8 * 4 + 8), 0]
    assert room.validation.tolist() == [0, 0]
    assert room.left.tolist() == [2**30, 2**30]
    assert room.states == 2
    assert np.array_equal(room.beside(np.array([1.0, 2.0])).left, [2**30 - 1, 2**30 - 2])


class _OnDisk(torch.utils.data.Subset[tuple[torch.Tensor, ...]]):
    """Images that do not say what they take in memory."""

    def __init__(self, images: TensorDataset) -> None:
        super().__init__(images, range(len(images)))

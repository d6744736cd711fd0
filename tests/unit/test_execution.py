"""What one rank holds."""

from __future__ import annotations

import weakref

import torch

from pipeline.cluster.devices import Device
from pipeline.cluster.rank import RankContext
from pipeline.graph.trace import trace
from pipeline.networks import network
from pipeline.plan.strategies import plan_network
from pipeline.run.execution import Execution
from pipeline.run.parts import parts_of


def test_an_execution_gives_its_weights_back_when_nobody_needs_it_any_more() -> None:
    """Without a search for cycles, which takes long: a calibration makes one execution after the other."""
    model = network("6:10")
    graph = trace(model, torch.zeros(2, 3, 32, 32))
    plan = plan_network(graph, "equal", batch_size=4, labels=["cpu", "cpu"])
    here = RankContext(
        rank=0, size=2, device=Device("cpu"), torch_device=torch.device("cpu"), group=None, generation="here"
    )
    execution = Execution(here, parts_of(model, graph), graph, plan)
    shard = weakref.ref(execution.parameters.work["conv2.weight"])
    assert shard() is not None
    del execution
    assert shard() is None

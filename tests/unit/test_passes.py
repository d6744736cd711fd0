"""A calibration runs the segments of a network as a training step does, whatever share of them a device has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.calibration.passes import Pass, call_seconds, initialise
from pipeline.calibration.segments import Chain, chains_of
from pipeline.calibration.worker import split_plan
from pipeline.cluster.devices import Device
from pipeline.cluster.rank import RankContext
from pipeline.graph.trace import Graph, trace
from pipeline.networks import network
from pipeline.plan.plan import Plan
from pipeline.plan.strategies import plan_network
from pipeline.run.execution import Execution
from pipeline.run.parts import parts_of

IMAGES = 4


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(network("6:10"), torch.zeros(2, 3, 32, 32))


def _execution(graph: Graph, plan: Plan) -> Execution:
    here = RankContext(
        rank=0, size=plan.ranks, device=Device("cpu"), torch_device=torch.device("cpu"), group=None, generation="here"
    )
    execution = Execution(here, parts_of(network("6:10"), graph), graph, plan)
    initialise(execution.parameters.work.values())
    return execution


def _pass(graph: Graph, execution: Execution, chains: dict[int, Chain]) -> Pass:
    cuts = [chain.operations[0] for chain in chains_of(graph)]
    return Pass(execution, graph, chains, cuts, IMAGES)


@pytest.mark.parametrize("plan", ["whole", "half"])
def test_all_segments_run_forward_and_then_in_reverse(graph: Graph, plan: str) -> None:
    alone = plan_network(graph, "single", batch_size=1, labels=["here"])
    execution = _execution(graph, alone if plan == "whole" else split_plan(graph, 0.5))
    # Of a segment that cannot be split each rank has everything; with half of the others, it is not measured.
    chains = {i: one for i, one in enumerate(chains_of(graph)) if plan == "whole" or one.splittable}
    steps = list(_pass(graph, execution, chains).steps())
    forward = [one.segment for one in steps if one.part == "forward"]
    backward = [one.segment for one in steps[len(forward) :]]
    assert forward == sorted(chains)
    assert list(dict.fromkeys(backward)) == forward[::-1]
    assert all(one.seconds > 0 for one in steps)
    divided = {one.segment for one in steps if one.part == "inputs"}
    assert bool(divided) == (plan == "half"), "whoever exchanges sends gradients of images before it has the weights'"
    times = _pass(graph, execution, chains).run()
    assert times.shape == (len(chains), 3)
    assert (times[:, :2] > 0).all()
    assert [chain for chain, one in zip(chains, times, strict=True) if np.isfinite(one[2])] == sorted(divided)
    assert (times[np.isfinite(times[:, 2]), 2] < times[np.isfinite(times[:, 2]), 1]).all()


def test_a_pass_leaves_nothing_behind_however_it_ends(graph: Graph) -> None:
    execution = _execution(graph, split_plan(graph, 0.5))
    steps = _pass(graph, execution, {i: one for i, one in enumerate(chains_of(graph)) if one.splittable}).steps()
    while next(steps).part == "forward":
        pass
    assert execution.values
    steps.close()  # type: ignore[attr-defined]  # a generator
    assert not execution.values
    assert all(one.grad is None or not one.grad.any() for one in execution.parameters.work.values())


def test_what_any_call_takes_is_not_the_segments(graph: Graph) -> None:
    execution = _execution(graph, plan_network(graph, "single", batch_size=1, labels=["here"]))
    forward, backward = call_seconds(execution)
    assert 0 < forward < 0.1
    assert 0 < backward < 0.1
    chains = dict(enumerate(chains_of(graph)))
    cuts = [chain.operations[0] for chain in chains.values()]
    usual = _pass(graph, execution, chains)
    usual.run()  # sets up torch's operations
    # A call that took an hour would leave next to nothing, but not less.
    rest = Pass(execution, graph, chains, cuts, IMAGES, call=(3600.0, 3600.0)).run()
    assert (rest[:, :2] > 0).all()
    assert rest[:, :2].sum() < 0.5 * usual.run()[:, :2].sum()

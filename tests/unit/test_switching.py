"""Dynamic programming over the layers finds what trying everything finds, where the time is a sum."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.graph.trace import trace
from pipeline.plan.costs import Costs
from pipeline.plan.prediction import predict_step, predict_timeline
from pipeline.plan.program import compile_program
from pipeline.plan.strategies import Kind, layers_of, plan_network
from pipeline.plan.switching import changes_of, cheapest_kinds, layer_seconds
from tests import synthetic

KINDS: tuple[Kind, ...] = ("K", "B", "M")
SECONDS = st.floats(0.0, 1.0)


@given(st.data(), st.integers(1, 6))
def test_the_sum_is_least_over_all_kinds_of_all_layers(data: st.DataObject, layers: int) -> None:
    spent = {kind: np.array(data.draw(st.lists(SECONDS, min_size=layers, max_size=layers))) for kind in KINDS}
    changes = {
        (before, kind): {layer: data.draw(SECONDS) for layer in range(1, layers)}
        for before, kind in product(KINDS, repeat=2)
        if before != kind
    }

    def total(kinds: tuple[Kind, ...]) -> float:
        turns = enumerate(pairwise(kinds), 1)
        added = sum(changes[before, kind][layer] for layer, (before, kind) in turns if before != kind)
        return added + sum(float(spent[kind][layer]) for layer, kind in enumerate(kinds))

    found = total(cheapest_kinds(spent, changes))
    assert found == pytest.approx(min(total(kinds) for kinds in product(KINDS, repeat=layers)), abs=1e-12)


def test_changes_are_read_off_plans_that_change_once() -> None:
    spent = {kind: np.array([1.0, 2.0, 3.0]) * factor for kind, factor in zip(KINDS, (1, 2, 3), strict=True)}
    times: dict[tuple[Kind, ...], float] = {
        ("K", "K", "K"): 6.0,
        ("K", "B", "B"): 1.0 + 10.0 + 0.25,
        ("K", "K", "B"): 3.0 + 6.0 - 0.5,  # what overlaps is no reason to change to and fro
        ("K", "B", "K"): 0.0,  # changes twice
        ("M", "K", "K"): 3.0 + 5.0 + 0.75,
    }
    assert changes_of(times, spent) == {("K", "B"): {1: pytest.approx(0.25), 2: 0.0}, ("M", "K"): {1: 0.75}}


def test_a_change_that_nobody_tried_adds_what_the_next_one_does_and_kinds_nobody_joined_stay_apart() -> None:
    spent: dict[Kind, np.ndarray] = {"K": np.array([1.0, 1, 1, 9]), "B": np.array([9.0, 9, 9, 1])}
    assert cheapest_kinds(spent, {("K", "B"): {1: 2.0}}) == ("K", "K", "K", "B")
    assert cheapest_kinds(spent, {("K", "B"): {1: 20.0}}) == ("K", "K", "K", "K")
    assert cheapest_kinds(spent, {("B", "K"): {1: 0.0}}) == ("K", "K", "K", "K")


@pytest.mark.parametrize("strategy", ["single", "kernel", "batch"])
def test_what_layers_add_is_all_of_a_step(strategy: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 64, 3), nn.Flatten(), nn.Linear(64 * 144, 10))
    graph = trace(model, torch.zeros(2, 3, 16, 16))
    costs = Costs.of(synthetic.calibration_of(graph, ["cpu", "cpu"]))
    plan = plan_network(graph, strategy, batch_size=32, labels=["a", "b"], costs=costs)  # type: ignore[arg-type]
    costs, layers = costs.only(plan.devices), [one.name for one in layers_of(graph)]
    total = float(predict_step(graph, plan, costs, batch_size=32)[0])
    program = compile_program(graph, plan, 32, cuts=frozenset(layers))
    found = layer_seconds(program.instructions, predict_timeline(graph, plan, program, costs)[0], layers, total)
    assert found.sum() == pytest.approx(total)
    assert (found > 0).all()
    assert found.argmax() == 1  # by far the most work

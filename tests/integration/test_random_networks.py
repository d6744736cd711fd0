"""Whatever network one draws, however its parts are spread: it trains to what one device gives, to 1e-9.

A gang trains many networks, one after the other: starting one for each would take far longer than the training. Where a
rank fails the gang ends with its error; where results differ, the assertion shows the network and the plan.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from distributed import Client
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.cluster.devices import discover
from pipeline.cluster.gang import RankContext, run_gang
from pipeline.graph.copies import take_over
from pipeline.graph.trace import Graph, trace
from pipeline.plan.plan import Plan
from pipeline.plan.strategies import plan_network
from pipeline.run.clock import Clock
from pipeline.run.execution import Execution
from pipeline.run.launch import SGD
from pipeline.run.memory_format import may_have_channels_last
from pipeline.run.parts import parts_of
from pipeline.run.recipe import Recipe, Turn
from tests.random_networks import CLASSES, random_network

RECIPE = Recipe(loss=nn.CrossEntropyLoss(), optimizer=SGD)
TOLERANCE = 1e-9
AT_ONCE = 16

Batches = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Trained:
    """How a training went."""

    losses: list[float]
    state: dict[str, torch.Tensor]
    predicted: torch.Tensor


@dataclass(frozen=True)
class Case:
    """A network, its plan, two batches and what one device makes of them."""

    model: nn.Module
    graph: Graph
    plan: Plan
    batches: Batches
    images: torch.Tensor
    expected: Trained

    def on(self, rank: int) -> Case:
        """What a rank is given: the real model on the master only."""
        model = copy.deepcopy(self.model) if rank == 0 else copy.deepcopy(self.model).to("meta")
        return Case(model, self.graph, self.plan, self.batches, self.images, self.expected)


def _copied(batches: Batches) -> Batches:
    """Networks that begin in place write to their images."""
    return [(x_BCHW.clone(), y_B) for x_BCHW, y_B in batches]


def _plain(model: nn.Module, batches: Batches, images: torch.Tensor) -> Trained:
    model = copy.deepcopy(model).train()
    update = SGD(model.parameters())
    torch.manual_seed(0)
    losses = []
    for x_BCHW, y_B in _copied(batches):
        update.zero_grad()
        loss = RECIPE.loss(model(x_BCHW), y_B)
        loss.backward()
        update.step()
        losses.append(loss.item())
    with torch.no_grad():
        return Trained(losses, model.state_dict(), model.eval()(images.clone()))


def _difference(one: Trained, other: Trained) -> float:
    """The largest one of losses, weights, statistics and predictions, relative to the largest entry of each."""
    pairs = [*zip(one.losses, other.losses, strict=True), (one.predicted, other.predicted)]
    pairs += [(one.state[name], other.state[name]) for name in other.state]
    worst = 0.0
    for found, expected in ((torch.as_tensor(a).double(), torch.as_tensor(b).double()) for a, b in pairs):
        if expected.numel():
            scale = max(expected.abs().max().item(), 1e-2)
            difference = (found - expected).abs().max().item() / scale
            worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def _nearby(model: nn.Module) -> nn.Module:
    """The model with weights that differ by rounding, or somewhat more."""
    near = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in near.parameters():
            one.mul_(1 + 1e-12 * torch.randn(one.shape, generator=generator, dtype=one.dtype))
    return near


def drawn_case(draw: random.Random, ranks: int) -> Case | None:
    """A case that ``draw`` decides; None where torch refuses the network, or rounding decides what it gives."""
    shape = (draw.randint(1, 4), draw.randint(7, 11), draw.randint(7, 11))
    model = random_network(draw, shape)
    weights = [draw.choice([0, 1, 1, 2, 3]) for _ in range(ranks)]
    weights[draw.randrange(ranks)] += 1
    batch_size, last = draw.randint(3, 8), draw.randint(2, 8)
    generator = torch.Generator().manual_seed(draw.randrange(1 << 16))

    def images(count: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator, dtype=torch.float64)

    batches = [
        (images(size), torch.randint(0, CLASSES, (size,), generator=generator))
        for size in (batch_size, min(batch_size, last))
    ]
    others = images(4)
    try:
        expected = _plain(model, batches, others)
        sensitivity = _difference(_plain(_nearby(model), batches, others), expected)
    except (RuntimeError, ValueError):  # in-place operations that torch cannot differentiate, one value per channel
        return None
    if not sensitivity < TOLERANCE or max(map(abs, expected.losses)) > 1e4:
        return None
    graph = trace(model, batches[0][0][:2])
    plan = plan_network(
        graph, draw.choice(["kernel", "batch", "paper"]), batch_size=batch_size, labels=["cpu"] * ranks,
        shares=[one / sum(weights) for one in weights],
    )  # fmt: skip
    plan = replace(plan, channels_last=draw.random() < 0.5 and may_have_channels_last(graph))
    return Case(model, graph, plan, batches, others, expected)


def _train(context: RankContext, cases: list[Case]) -> list[Trained | None]:
    """This rank's part of all cases; the master has the results."""
    found: list[Trained | None] = []
    for case in cases:
        parts = parts_of(copy.deepcopy(case.model), case.graph) if context.rank == 0 else None
        execution = Execution(context, parts, case.graph, case.plan)
        execution.prepare(RECIPE)
        clock = Clock(len(execution.program(case.plan.batch_size).instructions), offset=0.0, keep=1)
        torch.manual_seed(0)  # what is whole on the master draws by itself
        losses = []
        for x_BCHW, y_B in case.batches:
            given: tuple[Any, Any] = (x_BCHW, y_B) if context.rank == 0 else (None, None)
            with clock.step():
                losses.append(execution.train_step(len(y_B), *given, clock, Turn()))
        execution.begin_evaluation(copy.deepcopy(case.model) if context.rank == 0 else None)
        predicted = execution.predict(len(case.images), case.images if context.rank == 0 else None)
        tensors = execution.gather()
        if tensors is None:
            found.append(None)
            continue
        take_over(case.model, tensors)
        found.append(Trained(losses, case.model.state_dict(), predicted))  # type: ignore[arg-type]
    return found


# A network is drawn from a seed, and no smaller seed makes a smaller network: there is nothing to shrink.
@settings(
    max_examples=4, phases=[Phase.generate], derandomize=True, database=None, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(
    ranks=st.integers(1, 4),
    draws=st.lists(st.randoms(use_true_random=True, note_method_calls=False), min_size=AT_ONCE, max_size=AT_ONCE),
)
def test_any_network_trains_as_on_one_device(client: Client, ranks: int, draws: list[random.Random]) -> None:
    cases = [case for draw in draws if (case := drawn_case(draw, ranks)) is not None]
    if not cases:
        return
    arguments = [([case.on(rank) for case in cases],) for rank in range(ranks)]
    trained, *_ = run_gang(client, discover(client)[:ranks], _train, arguments, label="random networks")
    for case, found in zip(cases, trained, strict=True):
        assert _difference(found, case.expected) < TOLERANCE, f"{case.model}\n{case.plan.table()}"

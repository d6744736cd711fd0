"""Any layout may follow any other in one network: plans drawn at random train to what one device gives."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from distributed import Client
from torch import nn

from pipeline.cluster.devices import discover
from pipeline.cluster.gang import RankContext, run_gang
from pipeline.graph.effects import Effect
from pipeline.graph.trace import Graph, Operation, trace
from pipeline.plan.checks import check_plan
from pipeline.plan.layouts import Layout, images, kernels, master, partial, replicated
from pipeline.plan.plan import OperationPlan, Plan
from pipeline.plan.ties import bound
from pipeline.run.clock import Clock
from pipeline.run.execution import Execution
from pipeline.run.launch import PLAIN, SGD
from pipeline.run.parts import parts_of
from pipeline.run.recipe import Turn
from tests.engine import largest_difference

RANKS, BATCH, STEPS = 3, 5, 2
SHAPE = (3, 9, 8)


class Branches(nn.Module):
    """Everything the effects know: split, grouped, normalised, added, scaled, concatenated, dropped, taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(4, 8)
        self.left = nn.Conv2d(8, 6, 1, bias=False)
        self.right = nn.Sequential(nn.Conv2d(8, 6, (3, 1), padding=(1, 0)), nn.BatchNorm2d(6), nn.Dropout2d(0.3))
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.Sigmoid())
        self.slope = nn.PReLU(1)
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.up = nn.ConvTranspose2d(12, 5, 2, stride=2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(5 * 4 * 4, 9), nn.Dropout(0.2), nn.ReLU(), nn.Linear(9, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.norm(self.grouped(x)) + x
        left, right = self.left(x), self.right(x)
        x = left * self.squeeze(right) * self.scale
        x += right
        x = torch.cat([self.slope(x), right], 1)
        one, other = x.chunk(2, 1)
        x = self.up(torch.cat([other, one], 1))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 4))


def _shares(draw: random.Random, total: int, unit: int = 1) -> tuple[int, ...]:
    marks = sorted(draw.randint(0, total // unit) for _ in range(RANKS - 1))
    return tuple((high - low) * unit for low, high in zip([0, *marks], [*marks, total // unit], strict=True))


def _drawn(operation: Operation, draw: random.Random, kinds: str) -> tuple[Layout, Layout]:
    kind = draw.choice(kinds)
    if kind == "B":
        layout = images(_shares(draw, BATCH))
        return layout, layout
    if kind == "R":
        layout = replicated(tuple(draw.choice([(1, 1, 1), (1, 0, 1), (0, 1, 1)])))
        return layout, layout
    if kind == "K":
        shares = _shares(draw, operation.channels, operation.unit)
        if operation.effect is Effect.KERNEL:
            return replicated(shares), kernels(shares)
        taken = tuple(share // operation.unit * operation.input_unit for share in shares)
        return kernels(taken), kernels(shares)
    return master(RANKS), master(RANKS)


def _random_plan(graph: Graph, seed: int) -> Plan:
    draw = random.Random(seed)
    together = bound(graph)
    plans: dict[str, OperationPlan] = {}
    for operation in graph.operations:
        shared = next((plans[name] for name in together[operation.name] if name in plans), None)
        if operation.effect is Effect.FLATTEN or operation.effect is Effect.IMAGEWISE:
            kinds = "MRB"
        elif operation.effect is Effect.WHOLE:
            kinds = "M"
        else:
            kinds = "MRBK"
        source, target = _drawn(operation, draw, kinds)
        if operation.effect is Effect.KERNEL and draw.random() < 0.4:
            taken = next(one.shape[one.input_axis] for one in operation.parameters if one.input_axis is not None)
            source = kernels(_shares(draw, taken))
            target = partial(source.shares)
        if shared is not None:
            source, target = shared.input, shared.output
        home = draw.choice(["shard", "master"]) if target.kind in "KM" else "shard"
        plans[operation.name] = OperationPlan(name=operation.name, input=source, output=target, home=home)  # type: ignore[arg-type]
    return Plan(
        strategy="kernel",
        batch_size=BATCH,
        devices=(0, 1, 2),
        labels=("cpu",) * RANKS,
        operations=tuple(plans.values()),
        channels_last=draw.random() < 0.5,
    )


def _train(
    context: RankContext, model: nn.Module, graph: Graph, plans: list[Plan], x_SBCHW: torch.Tensor, y_SB: torch.Tensor
) -> list[tuple[list[float], dict[str, torch.Tensor]] | None]:
    found: list[tuple[list[float], dict[str, torch.Tensor]] | None] = []
    for plan in plans:
        parts = parts_of(copy.deepcopy(model), graph) if context.rank == 0 else None
        execution = Execution(context, parts, graph, plan)
        execution.prepare(PLAIN)
        torch.manual_seed(0)
        clock = Clock(len(execution.program(BATCH).instructions), offset=0.0, keep=1)
        losses = []
        for x_BCHW, y_B in zip(x_SBCHW, y_SB, strict=True):
            batch = (x_BCHW, y_B) if context.rank == 0 else (None, None)
            with clock.step():
                loss = execution.train_step(BATCH, *batch, clock, Turn())
            losses += [] if loss is None else [loss]
        state = execution.gather()
        found.append(None if state is None else (losses, state))
    return found


def test_any_layout_may_follow_any_other(client: Client) -> None:
    torch.manual_seed(1)
    model = Branches().double()
    x_SBCHW = torch.randn(STEPS, BATCH, *SHAPE, dtype=torch.float64)
    y_SB = torch.randint(0, 10, (STEPS, BATCH))
    graph = trace(model, x_SBCHW[0])
    assert not [one.name for one in graph.operations if one.effect is Effect.WHOLE]
    plans = [_random_plan(graph, seed) for seed in range(40)]
    for plan in plans:
        check_plan(plan, graph, plan.labels)
    found = run_gang(
        client, discover(client)[:RANKS], _train, [(model, graph, plans, x_SBCHW, y_SB)] * RANKS, label="mixed layouts"
    )[0]

    expected = copy.deepcopy(model)
    optimizer = SGD(expected.parameters())
    losses = []
    torch.manual_seed(0)
    for x_BCHW, y_B in zip(x_SBCHW, y_SB, strict=True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(expected(x_BCHW), y_B)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for seed, one in enumerate(found):
        assert one is not None
        assert one[0] == pytest.approx(losses, rel=1e-9), f"plan {seed}: {plans[seed].table()}"
        state = expected.state_dict()
        assert largest_difference({name: one[1][name] for name in state}, state) < 1e-9, (
            f"plan {seed}: {plans[seed].table()}"
        )

"""How long a step of a plan will take: the program's instructions on cost curves instead of devices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.graph.effects import Effect
from pipeline.graph.trace import Graph
from pipeline.plan.costs import Costs
from pipeline.plan.instructions import Compute, Direction, Exchange, Instruction, Step
from pipeline.plan.layouts import Layout
from pipeline.plan.plan import Plan
from pipeline.plan.program import Program, compile_program


def predict_step(graph: Graph, plan: Plan, costs: Costs, *, batch_size: int, itemsize: int = 4) -> float:
    """Predicted time of one training step in s; ``itemsize`` is the bytes per number of the model's type."""
    if plan.strategy == "ddp":
        return _predict_ddp(graph, costs, batch_size, itemsize)
    timeline = predict_timeline(graph, plan, compile_program(graph, plan, batch_size), costs, itemsize=itemsize)
    return float(np.nanmax(timeline))


def predict_timeline(
    graph: Graph, plan: Plan, program: Program, costs: Costs, *, itemsize: int = 4
) -> NDArray[np.float64]:
    """Start and end of each instruction on each rank in s, (instruction, rank, 2); NaN where a rank takes no part.

    A rank begins an instruction when it has ended the one before, but goes on during a deferred exchange until the
    computation beside it has ended. In an exchange a message begins when both ends are
    there; a rank's messages go over its one link after each other, and the rank is done when the last has arrived.
    ``costs`` are those of the plan's ranks.
    """
    instructions = program.instructions
    timeline = np.full((len(instructions), program.ranks, 2), np.nan)
    free, arrived = np.zeros(program.ranks), np.zeros(program.ranks)
    for index, instruction in enumerate(instructions):
        ranks = list(instruction.ranks)
        start = free[ranks]
        if isinstance(instruction, Exchange):
            end = _exchange_ends(instruction, free, costs, itemsize)[ranks]
        else:
            end = start + [_work(graph, plan, program, instruction, costs, rank) for rank in ranks]
        timeline[index, ranks, 0], timeline[index, ranks, 1] = start, end
        if isinstance(instruction, Exchange) and instruction.deferred:
            arrived[ranks] = end
            continue
        free[ranks] = end
        free = np.maximum(free, arrived)
    return timeline


def _work(graph: Graph, plan: Plan, program: Program, instruction: Instruction, costs: Costs, rank: int) -> float:
    if isinstance(instruction, Compute):
        # The gradients of a convolution's input and of its weights take the same number of operations.
        part = 1.0 if instruction.gradients == "all" else 0.5
        return part * sum(
            _step_seconds(graph, plan, step, costs, rank, instruction.direction, program.batch_size)
            for step in instruction.steps
            if step.part in ("whole", "normalise")
        )
    elements = 0.0
    for one in program.parameters:
        if one.parameter.trained:
            size = float(np.prod(one.parameter.shape))
            elements += size * _part(one.home, rank)
    return elements * float(costs.update[rank])


def _step_seconds(
    graph: Graph, plan: Plan, step: Step, costs: Costs, rank: int, direction: Direction, images: int
) -> float:
    """Time of a rank's part of an operation: some of its kernels, or all of them for some images."""
    planned = plan[step.operation]
    split_input = graph[step.operation].effect is Effect.KERNEL and planned.input.kind == "K"
    if step.output is not None and step.output.layout.kind == "B":
        return costs.seconds(step.operation, rank, 1.0, direction, step.output.layout.shares[rank])
    fraction = _part(planned.input if split_input else planned.output, rank)
    return costs.seconds(step.operation, rank, fraction, direction, images)


def _part(layout: Layout, rank: int) -> float:
    share = layout.shares[rank]
    return share / sum(layout.shares) if layout.kind in ("K", "B") else float(share > 0)


def _exchange_ends(exchange: Exchange, free: NDArray[np.float64], costs: Costs, itemsize: int) -> NDArray[np.float64]:
    link, done = free.copy(), free.copy()
    rest = exchange.spec.rest * itemsize
    for message in exchange.messages:
        source, target = message.source, message.target
        if source == target:
            continue
        end = max(link[source], link[target]) + costs.message(source, target, message.box.size * rest)
        link[source] = link[target] = end
        done[source], done[target] = max(done[source], end), max(done[target], end)
    return done


def _predict_ddp(graph: Graph, costs: Costs, batch_size: int, itemsize: int) -> float:
    """Equal parts of the batch, then a ring all-reduce of all gradients, which overlaps with nothing here."""
    trained = {one.name: one.shape for op in graph.operations for one in op.parameters if one.trained}
    elements = float(sum(np.prod(shape) for shape in trained.values()))
    ranks = costs.devices
    compute = max(costs.whole_step(rank, -(-batch_size // ranks)) for rank in range(ranks))
    update = float(costs.update.max()) * elements
    if ranks == 1:
        return compute + update
    piece = elements * itemsize / ranks
    hop = max(costs.message(rank, (rank + 1) % ranks, piece) for rank in range(ranks))
    return compute + 2 * (ranks - 1) * hop + update

"""How much memory a training step needs on each rank, from the program alone.

Counted are the weights where they live and where they work, and in the master's model, their gradients, the optimiser's
state, what the forward pass keeps for the backward pass, the gradients in flight, what exchanges copy, and what
convolutions need to rearrange their tensors; not the process itself, nor the images of the data set.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.graph.effects import Effect
from pipeline.graph.operations import Graph
from pipeline.plan.instructions import Compute, Exchange, Placed, TensorSpec
from pipeline.plan.layouts import Layout, master
from pipeline.plan.plan import Plan
from pipeline.plan.program import Program, activation_spec, compile_program, parameter_spec
from pipeline.plan.strategies import plan_network

Bytes = NDArray[np.float64]

SGD_STATES = 1
"""Numbers an optimiser keeps per weight: one for momentum, two for Adam."""
_INDEX_BYTES = 8


def predict_memory(
    graph: Graph,
    plan: Plan,
    *,
    itemsize: int = 4,
    states: int = SGD_STATES,
    program: Program | None = None,
) -> Bytes:
    """Most memory of one training step in bytes, (rank), beyond that of the processes.

    ``states`` are the numbers that the optimiser keeps per weight. Under ``ddp`` every rank has all of the network.
    ``program`` is that of the plan, where it has been compiled already.
    """
    if plan.strategy == "ddp":
        alone = plan_network(graph, "single", batch_size=-(-plan.batch_size // plan.ranks), labels=plan.labels[:1])
        trained = {one.name: one.shape for op in graph.operations for one in op.parameters if one.trained}
        weights = sum(math.prod(shape) for shape in trained.values())
        # Its buckets are a second copy of all gradients.
        return np.full(
            plan.ranks,
            _Account(graph, alone, itemsize, states, compile_program(graph, alone, alone.batch_size)).peak()[0]
            + weights * itemsize,
        )
    return _Account(graph, plan, itemsize, states, program or compile_program(graph, plan, plan.batch_size)).peak()


class _Account:
    """What every rank holds as a step goes on."""

    def __init__(self, graph: Graph, plan: Plan, itemsize: int, states: int, program: Program) -> None:
        self._graph, self._plan, self._itemsize, self._states = graph, plan, itemsize, states
        self._program, self._batch_size = program, program.batch_size
        self._ranks = plan.ranks
        self._activations = {one.name for one in graph.operations if one.shape is not None} | {graph.input}
        self._sizes: dict[Placed, Bytes] = {}
        self._held: dict[Placed | int, Bytes] = {}
        """Values; and, by the number of a segment, what its backward pass needs beyond the values at its borders."""
        self._gradients: dict[Placed, Bytes] = {}
        self._total = np.zeros(self._ranks)
        """Of all that is held, gradients included."""

    def peak(self) -> Bytes:
        standing = self._weights() + self._staging()
        most = standing.copy()
        source = Placed(self._graph.input, master(self._ranks))
        self._hold(source, self._size(source))
        for instruction in self._program.forward:
            if isinstance(instruction, Exchange):
                if instruction.moves == "activation":
                    self._hold(instruction.target, self._arrived(instruction))
            else:
                self._forward(instruction)
            most = np.maximum(most, standing + self._total + self._workspace(instruction))
        for one in self._program.backward:
            self._backward(one)
            most = np.maximum(most, standing + self._total + self._workspace(one))
            self._consumed(one)
        return most

    def _weights(self) -> Bytes:
        total = np.zeros(self._ranks)
        for one in self._program.parameters:
            spec = parameter_spec(one)
            home, work = (self._of(layout, spec) for layout in (one.home, one.work))
            apart = one.home != one.work
            trained = 1.0 if one.parameter.trained else 0.0
            total += home * (1 + trained * (1 + self._states)) + (work * (1 + trained) if apart else 0.0)
            if one.home.kind != "M":  # what lives on the ranks is a copy: the master keeps the model, too
                total[0] += math.prod(one.parameter.shape) * float(self._itemsize)
        return total

    def _staging(self) -> Bytes:
        """What is sent lies in memory of its own, and so does, mapped, what is received."""
        total = np.zeros(self._ranks)
        for one in self._program.instructions:
            if isinstance(one, Exchange) and not one.once:
                moved = one.traffic
                total += (moved.sent[1] + moved.received[1]) * one.spec.rest * self._itemsize
        return total

    def _forward(self, instruction: Compute) -> None:
        inside = np.zeros(self._ranks)
        outputs = set(instruction.outputs)
        for step in instruction.steps:
            operation = self._graph[step.operation]
            if step.output is None or operation.shape is None or operation.effect is Effect.FLATTEN:
                continue  # nothing, or a view of what is there
            size = self._size(step.output)
            if step.in_place:
                inside -= size  # in the memory of its input, which no longer counts
            if operation.keeps_indices:
                inside += size / self._itemsize * _INDEX_BYTES
            if operation.noise is not None:
                inside += size
            if step.output in outputs:
                self._hold(step.output, size)
            else:
                inside += size
        self._hold(instruction.segment, inside)

    def _backward(self, instruction: Compute | Exchange) -> None:
        """The gradients that come into being."""
        if isinstance(instruction, Exchange):
            if instruction.moves == "activation":
                self._hold_gradient(instruction.source)
            return
        if instruction.gradients == "parameters":
            return
        for placed in instruction.inputs:
            if placed in self._program.gradients:
                self._hold_gradient(placed)

    def _consumed(self, instruction: Compute | Exchange) -> None:
        """What is no longer needed after an instruction of the backward half."""
        if isinstance(instruction, Exchange):
            self._release_gradient(instruction.target)
            return
        if instruction.gradients != "inputs":
            self._total = self._total - self._held.pop(instruction.segment, 0.0)
            for placed in instruction.outputs:
                self._release_gradient(placed)

    def _hold(self, what: Placed | int, size: Bytes) -> None:
        self._total = self._total + size - self._held.get(what, 0.0)
        self._held[what] = size

    def _hold_gradient(self, of: Placed) -> None:
        size = self._size(of)
        self._total = self._total + size - self._gradients.get(of, 0.0)
        self._gradients[of] = size

    def _release_gradient(self, of: Placed) -> None:
        self._total = self._total - self._gradients.pop(of, 0.0)

    def _workspace(self, instruction: Compute | Exchange) -> Bytes:
        """What an operation needs for the time it runs.

        Backward, the gradients of its output and inputs; and convolutions rearrange their tensors and weights. What is
        summed is joined to one tensor, beside the gradients.
        """
        most = np.zeros(self._ranks)
        if isinstance(instruction, Exchange):
            joined = instruction.spec.shape[0] * float(self._itemsize) if instruction.moves == "gradients" else 0.0
            return np.where(instruction.source.layout.numbers > 0, joined, 0.0)
        for step in instruction.steps:
            operation = self._graph[step.operation]
            if instruction.direction == "backward" and step.output is not None:
                both = sum((self._size(one) for one in step.inputs), self._size(step.output))
                most = np.maximum(most, both)
            if (
                operation.effect in (Effect.KERNEL, Effect.GROUPED)
                and step.output is not None
                and operation.convolution
            ):
                divided = step.inputs[0].layout if step.output.layout.kind == "P" else step.output.layout
                parts = divided.numbers
                weights = sum(math.prod(one.shape) for one in operation.parameters) * self._itemsize
                split = parts / parts.sum() if divided.kind == "K" else (parts > 0).astype(float)
                inputs = sum((self._size(one) for one in step.inputs), np.zeros(self._ranks))
                times = 2 if instruction.direction == "backward" else 1
                most = np.maximum(most, times * (inputs + self._size(step.output)) + weights * split)
        return most

    def _arrived(self, exchange: Exchange) -> Bytes:
        return self._of(exchange.target.layout, exchange.spec)

    def _size(self, placed: Placed) -> Bytes:
        """0 for the moments of a BatchNorm and for what is no tensor of images; both are small."""
        if placed.name not in self._activations:
            return np.zeros(self._ranks)
        if placed not in self._sizes:
            spec = activation_spec(self._graph, placed.name, self._batch_size)
            self._sizes[placed] = self._of(placed.layout, spec)
        return self._sizes[placed]

    def _of(self, layout: Layout, spec: TensorSpec) -> Bytes:
        return layout.sizes(spec.images, spec.channels) * spec.rest * float(self._itemsize)

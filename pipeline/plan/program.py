"""A plan compiled to instructions: the one list that the run executes and the simulator times.

The forward half computes segments and exchanges tensors between them; the backward half is its mirror image, segment by
segment and exchange by exchange, so every rank knows from the list alone what it sends and receives next. That is why
the order never depends on the autograd engine and no two ranks can wait for each other.

Where the gradient of a split convolution's input has to travel, the backward computation is divided: first that
gradient, whose exchange then runs beside the computation of the weights' gradient and hides behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from pipeline.graph.effects import Effect
from pipeline.graph.trace import Graph, Operation
from pipeline.plan.layouts import Box, Layout, Message, master, messages, transposed
from pipeline.plan.plan import ParameterPlan, Plan, parameter_plans

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Placed:
    """A tensor in a layout: what a rank looks up when it needs "the output of conv1, split by kernels"."""

    name: str
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Global shape of a tensor and the two axes a layout may split."""

    shape: tuple[int, ...]
    channel_axis: int
    images_axis: int | None
    """None for parameters: they have no images."""

    @property
    def view(self) -> tuple[int, int, int]:
        """The shape as (images, channels, rest); what lies before the channels counts as images."""
        if not self.shape:
            return (1, 1, 1)
        before, after = self.shape[: self.channel_axis], self.shape[self.channel_axis + 1 :]
        return math.prod(before), self.shape[self.channel_axis], math.prod(after)

    def local_shape(self, box: Box) -> tuple[int, ...]:
        """Shape of the part of the tensor in ``box``."""
        if not self.shape:
            return ()
        shape = list(self.shape)
        shape[self.channel_axis] = len(box.channels)
        if self.images_axis is not None:
            shape[self.images_axis] = len(box.images)
        return tuple(shape)

    def boxes(self, layout: Layout) -> tuple[Box, ...]:
        """The box of every rank."""
        images, channels, _ = self.view
        return layout.boxes(images, channels)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Run the operations of one segment on the ranks that hold its outputs."""

    name: str
    direction: Direction
    segment: int
    """Its number in the forward half; the backward instruction carries the same."""
    operations: tuple[str, ...]
    """Empty for the loss."""
    inputs: tuple[Placed, ...]
    outputs: tuple[Placed, ...]
    ranks: tuple[int, ...]
    gradients: Literal["all", "inputs", "parameters"] = "all"
    """Backward, whose gradients it computes; of a pair, ``inputs`` comes first."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Move a tensor from one layout to another; backward, its gradient the other way, with sums for copies."""

    name: str
    direction: Direction
    source: Placed
    target: Placed
    spec: TensorSpec
    parameter: bool
    """Whether it moves a parameter from its home to where it works, rather than an activation."""
    deferred: bool = False
    """Whether it only has to be complete after the computation that follows it, and runs beside that."""

    @cached_property
    def messages(self) -> tuple[Message, ...]:
        """What travels in this direction, local copies included."""
        images, channels, _ = self.spec.view
        forward = messages(self.source.layout, self.target.layout, images, channels)
        return forward if self.direction == "forward" else transposed(forward)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that send or receive."""
        return tuple(sorted({rank for message in self.messages for rank in (message.source, message.target)}))

    @property
    def elements(self) -> int:
        """Elements that travel between different ranks."""
        rest = self.spec.view[2]
        return sum(message.box.size * rest for message in self.messages if message.source != message.target)


@dataclass(frozen=True, kw_only=True)
class Update:
    """Let the optimiser update the parameters whose home is on the rank."""

    name: str
    ranks: tuple[int, ...]


Instruction = Compute | Exchange | Update


@dataclass(frozen=True, kw_only=True)
class Program:
    """The instructions of one training step for batches of ``batch_size`` images."""

    batch_size: int
    ranks: int
    forward: tuple[Compute | Exchange, ...]
    """Up to and including the loss."""
    backward: tuple[Compute | Exchange, ...]
    update: Update
    gradients: frozenset[Placed]
    """The activations that need a gradient."""
    parameters: tuple[ParameterPlan, ...]
    """Every parameter and buffer, in the order of the operations."""
    output: Placed

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """The whole step in order."""
        return (*self.forward, *self.backward, self.update)

    @property
    def inference(self) -> tuple[Compute | Exchange, ...]:
        """The forward half without the loss."""
        return self.forward[:-1]


LOSS = "loss"


def compile_program(graph: Graph, plan: Plan, batch_size: int) -> Program:
    """Compile ``plan`` for batches of ``batch_size`` images."""
    return _Compiler(graph, plan, batch_size).compile()


class _Compiler:
    def __init__(self, graph: Graph, plan: Plan, batch_size: int) -> None:
        self.graph, self.plan, self.batch_size = graph, plan, batch_size
        self.instructions: list[Compute | Exchange] = []
        self.produced: dict[str, Layout] = {graph.input: master(plan.ranks)}
        self.available: set[Placed] = {Placed(graph.input, master(plan.ranks))}
        self.segment: list[Operation] = []
        self.segments = 0
        self.differentiable = _differentiable(graph)
        self.parameters: list[ParameterPlan] = []

    def compile(self) -> Program:
        for operation in self.graph.operations:
            self._place(operation)
        output = self._available_as(self.graph.output, master(self.plan.ranks))
        self._close_segment()
        forward = self._forward_with_outputs(output)
        gradients = self._gradients(forward)
        forward.append(
            Compute(
                name=LOSS,
                direction="forward",
                segment=self.segments,
                operations=(),
                inputs=(output,),
                outputs=(),
                ranks=(0,),
            )
        )
        homes = {rank for one in self.parameters if one.parameter.trained for rank in one.home.holders}
        return Program(
            batch_size=self.batch_size,
            ranks=self.plan.ranks,
            forward=tuple(forward),
            backward=_mirrored(forward, gradients, self._trained()),
            update=Update(name="update", ranks=tuple(sorted(homes))),
            gradients=gradients,
            parameters=tuple(self.parameters),
            output=output,
        )

    def _place(self, operation: Operation) -> None:
        planned = self.plan[operation.name]
        for value in operation.inputs:
            self._available_as(value, planned.input)
        known = {one.parameter.name for one in self.parameters}
        for parameter in parameter_plans(operation, planned):
            if parameter.parameter.name in known:
                continue
            self.parameters.append(parameter)
            if parameter.home != parameter.work:
                self._close_segment()
                self._exchange_parameter(parameter)
        if self._is_divided(operation) or (self.segment and self.plan[self.segment[-1].name].ranks != planned.ranks):
            self._close_segment()
        self.segment.append(operation)
        self.produced[operation.name] = planned.output
        self.available.add(Placed(operation.name, planned.output))
        if self._is_divided(operation):
            self._close_segment()

    def _is_divided(self, operation: Operation) -> bool:
        """Whether its backward computation is to be divided, for which it has to be a segment of its own."""
        planned = self.plan[operation.name]
        gathered = operation.effect is Effect.KERNEL and planned.input.kind == "R" and planned.output.kind == "K"
        trained = any(one.trained for one in operation.parameters)
        return gathered and trained and any(value in self.differentiable for value in operation.inputs)

    def _available_as(self, value: str, layout: Layout) -> Placed:
        """Make sure that ``value`` is there in ``layout``, by an exchange if need be."""
        target = Placed(value, layout)
        if target in self.available:
            return target
        self._close_segment()
        source = Placed(value, self.produced[value])
        known_as = "images" if value == self.graph.input else value
        self.instructions.append(
            Exchange(
                name=f"{known_as} {source.layout.kind}→{layout.kind}",
                direction="forward",
                source=source,
                target=target,
                spec=activation_spec(self.graph, value, self.batch_size),
                parameter=False,
            )
        )
        self.available.add(target)
        return target

    def _exchange_parameter(self, one: ParameterPlan) -> None:
        name = one.parameter.name
        self.instructions.append(
            Exchange(
                name=f"{name} {one.home.kind}→{one.work.kind}",
                direction="forward",
                source=Placed(name, one.home),
                target=Placed(name, one.work),
                spec=parameter_spec(one),
                parameter=True,
            )
        )

    def _close_segment(self) -> None:
        if not self.segment:
            return
        inside = {operation.name for operation in self.segment}
        inputs: dict[Placed, None] = {}
        for operation in self.segment:
            for value in operation.inputs:
                if value not in inside or self.plan[operation.name].input != self.produced[value]:
                    inputs[Placed(value, self.plan[operation.name].input)] = None
        self.instructions.append(
            Compute(
                name="+".join(operation.name for operation in self.segment),
                direction="forward",
                segment=self.segments,
                operations=tuple(operation.name for operation in self.segment),
                inputs=tuple(inputs),
                outputs=tuple(Placed(operation.name, self.produced[operation.name]) for operation in self.segment),
                ranks=self.plan[self.segment[-1].name].ranks,
            )
        )
        self.segments += 1
        self.segment = []

    def _forward_with_outputs(self, output: Placed) -> list[Compute | Exchange]:
        """The forward half with each segment's outputs cut down to those that something outside it uses."""
        wanted = {output}
        for instruction in self.instructions:
            wanted.update(instruction.inputs if isinstance(instruction, Compute) else (instruction.source,))
        forward: list[Compute | Exchange] = []
        for instruction in self.instructions:
            if isinstance(instruction, Compute):
                outputs = tuple(one for one in instruction.outputs if one in wanted)
                forward.append(replace(instruction, outputs=outputs))
            else:
                forward.append(instruction)
        return forward

    def _trained(self) -> frozenset[str]:
        return frozenset(one.parameter.name for one in self.parameters if one.parameter.trained)

    def _gradients(self, forward: list[Compute | Exchange]) -> frozenset[Placed]:
        """The activations that depend on something that is trained."""
        found: set[Placed] = set()
        for instruction in forward:
            if isinstance(instruction, Exchange):
                if instruction.source in found:
                    found.add(instruction.target)
                continue
            inside = {placed for placed in instruction.inputs if placed in found}
            for name in instruction.operations:
                operation, planned = self.graph[name], self.plan[name]
                trained = any(one.trained for one in operation.parameters)
                if trained or any(Placed(value, planned.input) in inside for value in operation.inputs):
                    inside.add(Placed(name, planned.output))
            found.update(placed for placed in instruction.outputs if placed in inside)
        return frozenset(found)


def _differentiable(graph: Graph) -> frozenset[str]:
    """The operations whose output depends on something that is trained."""
    found: set[str] = set()
    for operation in graph.operations:
        if any(one.trained for one in operation.parameters) or found & set(operation.inputs):
            found.add(operation.name)
    return frozenset(found)


def _mirrored(
    forward: list[Compute | Exchange], gradients: frozenset[Placed], trained: frozenset[str]
) -> tuple[Compute | Exchange, ...]:
    """The backward half: the forward half in reverse, without what no gradient flows through."""
    needed = [one for one in reversed(forward) if _carries_gradient(one, gradients, trained)]
    backward: list[Compute | Exchange] = []
    while needed:
        instruction = needed.pop(0)
        if isinstance(instruction, Compute) and (hidden := _hideable(instruction, needed)):
            needed.remove(hidden)
            backward.append(_part(instruction, "inputs"))
            backward.append(replace(hidden, direction="backward", deferred=True))
            backward.append(_part(instruction, "parameters"))
        else:
            backward.append(replace(instruction, direction="backward"))
    return tuple(backward)


def _carries_gradient(instruction: Compute | Exchange, gradients: frozenset[Placed], trained: frozenset[str]) -> bool:
    if isinstance(instruction, Compute):
        return instruction.name == LOSS or any(placed in gradients for placed in instruction.outputs)
    return instruction.source.name in trained if instruction.parameter else instruction.source in gradients


def _hideable(compute: Compute, following: list[Compute | Exchange]) -> Exchange | None:
    """The exchange of this computation's input gradient, if nothing but parameters' gradients travel before it."""
    after = next((one for one in following if isinstance(one, Compute) or not one.parameter), None)
    if len(compute.operations) != 1 or not isinstance(after, Exchange) or after.target not in compute.inputs:
        return None
    return after if after.target.layout.kind == "R" else None


def _part(compute: Compute, gradients: Literal["inputs", "parameters"]) -> Compute:
    noun = "input gradient" if gradients == "inputs" else "weight gradient"
    return replace(compute, name=f"{compute.name} {noun}", direction="backward", gradients=gradients)


def activation_spec(graph: Graph, value: str, batch_size: int) -> TensorSpec:
    """Shape and axes of an operation's output for ``batch_size`` images."""
    shape = graph.shape_of(value)
    if shape is None:
        raise ValueError(f"{value} is not a tensor of images and cannot leave the master")
    return TensorSpec(shape=(batch_size, *shape), channel_axis=1, images_axis=0)


def parameter_spec(one: ParameterPlan) -> TensorSpec:
    """Shape and axes of a parameter."""
    return TensorSpec(shape=one.parameter.shape, channel_axis=one.channel_axis, images_axis=None)

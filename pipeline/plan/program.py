"""A plan compiled to instructions: the one list that the run executes and the simulator times.

The forward half computes segments and exchanges tensors between them; the backward half is its mirror image, segment by
segment and exchange by exchange, so every rank knows from the list alone what it sends and receives next. That is why
the order never depends on the autograd engine and no two ranks can wait for each other.

Where the gradient of a split convolution's input has to travel, the backward computation is divided: first that
gradient, whose exchange then runs beside the computation of the weights' gradient and hides behind it. Gradients of
parameters that several ranks have a copy of are summed bucket by bucket, beside the computations that follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from pipeline.graph.effects import Effect
from pipeline.graph.operations import Graph, Operation
from pipeline.plan.instructions import LOSS, Compute, Exchange, Instruction, Part, Placed, Step, TensorSpec, Update
from pipeline.plan.layouts import Layout, images, kernels, master, partial, replicated
from pipeline.plan.plan import OperationPlan, ParameterPlan, Plan, parameter_plans
from pipeline.plan.shares import equal, proportional

BUCKET_ELEMENTS = 1 << 20
"""Gradients are summed together until there are so many."""
_SUMMED_AT_ONCE = 1 << 14
"""So few gradients are sent to everyone at once instead of summed in parts."""


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
    buckets: dict[str, tuple[str, ...]]
    """By the name of a tensor of gradients, the parameters whose gradients it joins."""
    outputs: tuple[Placed, ...]

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """The whole step in order."""
        return (*self.forward, *self.backward, self.update)


def compile_program(graph: Graph, plan: Plan, batch_size: int, *, cuts: frozenset[str] = frozenset()) -> Program:
    """Compile a training step of ``plan`` for batches of ``batch_size`` images.

    Another computation begins with each of the operations in ``cuts``, also where nothing has to travel.
    """
    return _Compiler(graph, plan, batch_size, training=True, cuts=cuts).compile()


def compile_inference(graph: Graph, plan: Plan, batch_size: int) -> tuple[Compute | Exchange, ...]:
    """The instructions that evaluate the network on ``batch_size`` images."""
    compiler = _Compiler(graph, plan, batch_size, training=False)
    return tuple(compiler.with_outputs(compiler.place_all()))


class _Compiler:
    def __init__(
        self, graph: Graph, plan: Plan, batch_size: int, *, training: bool, cuts: frozenset[str] = frozenset()
    ) -> None:
        self.graph, self.plan, self.batch_size, self.training, self.cuts = graph, plan, batch_size, training, cuts
        self.instructions: list[Compute | Exchange] = []
        source = master(plan.ranks)
        self.available: dict[str, list[Layout]] = {graph.input: [source]}
        """The layouts that each value is in, the one it was produced in first."""
        self.segment: list[Step] = []
        self.segment_ranks: tuple[int, ...] = ()
        self.segments = 0
        self.differentiable = frozenset(one.name for one in graph.operations if one.differentiable)
        self.parameters: dict[str, ParameterPlan] = {}
        self.scaled: dict[str, OperationPlan] = {}

    def compile(self) -> Program:
        outputs = self.place_all()
        forward = self.with_outputs(outputs)
        gradients = self._gradients(forward)
        forward.append(
            Compute(
                name=LOSS, direction="forward", segment=self.segments, steps=(), inputs=outputs, outputs=(), ranks=(0,)
            )
        )
        homes = {rank for one in self.parameters.values() if one.parameter.trained for rank in one.home.holders}
        backward, buckets = self._backward(forward, gradients)
        return Program(
            batch_size=self.batch_size,
            ranks=self.plan.ranks,
            forward=tuple(forward),
            backward=backward,
            update=Update(name="update", ranks=tuple(sorted(homes))),
            gradients=gradients,
            parameters=tuple(self.parameters.values()),
            buckets=buckets,
            outputs=outputs,
        )

    def place_all(self) -> tuple[Placed, ...]:
        """All operations; returns where the outputs of the network are."""
        for operation in self.graph.operations:
            self._place(operation)
        outputs = tuple(self._available_as(output, master(self.plan.ranks)) for output in self.graph.outputs)
        self._close_segment()
        return outputs

    def _place(self, operation: Operation) -> None:
        planned = self._scaled_plan(operation.name)
        inputs = tuple(self._available_as(value, planned.input) for value in operation.inputs)
        for parameter in parameter_plans(operation, self.plan[operation.name]):
            if parameter.parameter.name in self.parameters:
                continue
            self.parameters[parameter.parameter.name] = parameter
            if parameter.home != parameter.work:
                self._close_segment()
                self._exchange_parameter(parameter)
        if operation.name in self.cuts or self._is_divided(operation):
            self._close_segment()
        output = Placed(operation.name, planned.output)
        ranks = planned.output.holders
        if operation.effect is Effect.BATCHNORM and planned.output.kind == "B" and self._needs_moments(operation):
            self._place_batchnorm(operation, inputs, output)
        else:
            self._add(Step(operation=operation.name, part="whole", inputs=inputs, output=output), ranks)
        self.available[operation.name] = [planned.output]
        if self._is_divided(operation):
            self._close_segment()

    def _needs_moments(self, operation: Operation) -> bool:
        return self.training or not operation.tracks

    def _place_batchnorm(self, operation: Operation, inputs: tuple[Placed, ...], output: Placed) -> None:
        """Mean and variance of each rank's images, those of all ranks to all, and only then the operation itself."""
        shares = output.layout.shares
        everyone = self.plan[operation.name].output.shares  # also who has no image of a small last batch
        name = f"{operation.name} moments"
        own, every = Placed(name, partial(shares)), Placed(name, replicated(everyone))

        def add(part: Part, inputs: tuple[Placed, ...], output: Placed | None, ranks: tuple[int, ...]) -> None:
            self._add(Step(operation=operation.name, part=part, inputs=inputs, output=output, images=shares), ranks)

        add("moments", inputs, own, output.layout.holders)
        if own != every:
            self._close_segment()
            # Each rank has rows of its own and zeros elsewhere, so that their sum is all of them.
            spec = TensorSpec(shape=(2 * len(shares), operation.channels), channel_axis=1, images_axis=None)
            self._exchange(own, every, spec)
        add("normalise", (*inputs, every), output, output.layout.holders)
        if self.training and operation.tracks:
            add("track", (every,), None, every.layout.holders)

    def _add(self, step: Step, ranks: tuple[int, ...]) -> None:
        if self.segment and self.segment_ranks != ranks:
            self._close_segment()
        self.segment.append(step)
        self.segment_ranks = ranks

    def _scaled_plan(self, name: str) -> OperationPlan:
        """The plan of an operation, with images split anew where this batch is of another size than planned."""
        if name not in self.scaled:
            planned = self.plan[name]
            inner, outer = self._scaled(planned.input), self._scaled(planned.output)
            self.scaled[name] = replace(planned, input=inner, output=outer)
        return self.scaled[name]

    def _scaled(self, layout: Layout) -> Layout:
        if layout.kind != "B" or sum(layout.shares) == self.batch_size:
            return layout
        return images(proportional(self.batch_size, layout.shares))

    def _is_divided(self, operation: Operation) -> bool:
        return is_divided(self.graph, operation, self._scaled_plan(operation.name))

    def _available_as(self, value: str, layout: Layout) -> Placed:
        """Make sure that ``value`` is there in ``layout``, by an exchange if need be."""
        target = Placed(value, layout)
        if layout in self.available[value]:
            return target
        self._close_segment()
        copied = [one for one in self.available[value] if one.kind == "R" and set(layout.holders) <= set(one.holders)]
        source = Placed(value, (copied or self.available[value])[0])
        self._exchange(source, target, activation_spec(self.graph, value, self.batch_size))
        self.available[value].append(layout)
        return target

    def _exchange(self, source: Placed, target: Placed, spec: TensorSpec) -> None:
        known_as = "images" if source.name == self.graph.input else source.name
        name = f"{known_as} {source.layout.kind}→{target.layout.kind}"
        self.instructions.append(Exchange(name=name, direction="forward", source=source, target=target, spec=spec))

    def _exchange_parameter(self, one: ParameterPlan) -> None:
        name = one.parameter.name
        self.instructions.append(
            Exchange(
                name=f"{name} {one.home.kind}→{one.work.kind}",
                direction="forward",
                source=Placed(name, one.home),
                target=Placed(name, one.work),
                spec=parameter_spec(one),
                moves="parameter",
            )
        )

    def _close_segment(self) -> None:
        if not self.segment:
            return
        made = {step.output for step in self.segment}
        inputs = dict.fromkeys(one for step in self.segment for one in step.inputs if one not in made)
        self.instructions.append(
            Compute(
                name="+".join(_name(step.operation, step.part) for step in self.segment),
                direction="forward",
                segment=self.segments,
                steps=tuple(self.segment),
                inputs=tuple(inputs),
                outputs=tuple(step.output for step in self.segment if step.output is not None),
                ranks=self.segment_ranks,
            )
        )
        self.segments += 1
        self.segment = []

    def with_outputs(self, outputs: tuple[Placed, ...]) -> list[Compute | Exchange]:
        """The forward half with each segment's outputs cut down to those that something outside it uses."""
        wanted = set(outputs)
        for instruction in self.instructions:
            wanted.update(instruction.inputs if isinstance(instruction, Compute) else (instruction.source,))
        return [self._finished(one, wanted) if isinstance(one, Compute) else one for one in self.instructions]

    def _finished(self, segment: Compute, wanted: set[Placed]) -> Compute:
        outputs = tuple(output for output in segment.outputs if output in wanted)
        made = {step.output: self._is_fresh(step) for step in segment.steps}
        last = {placed: place for place, step in enumerate(segment.steps) for placed in step.inputs}

        def may_write(place: int, step: Step) -> bool:
            if not self.graph[step.operation].in_place:
                return False
            written = step.inputs[0]
            return made.get(written, False) and last[written] == place and written not in outputs

        steps = (
            replace(step, in_place=True) if may_write(place, step) else step for place, step in enumerate(segment.steps)
        )
        return replace(segment, outputs=outputs, steps=tuple(steps))

    def _is_fresh(self, step: Step) -> bool:
        """Whether the result of a step is in memory of its own, and the backward pass has no use for it."""
        operation = self.graph[step.operation]
        if operation.effect in (Effect.KERNEL, Effect.GROUPED, Effect.BATCHNORM):
            return step.part in ("whole", "normalise")
        return operation.in_place and operation.main.operator == "add"

    def _gradients(self, forward: list[Compute | Exchange]) -> frozenset[Placed]:
        """The activations that depend on something that is trained."""
        found: set[Placed] = set()
        for instruction in forward:
            if isinstance(instruction, Exchange):
                if instruction.source in found:
                    found.add(instruction.target)
                continue
            inside = {placed for placed in instruction.inputs if placed in found}
            for step in instruction.steps:
                # The moments of BatchNorm depend on its input only.
                depends = step.part != "moments" or inside & set(step.inputs)
                if step.output is not None and step.operation in self.differentiable and depends:
                    inside.add(step.output)
            found.update(placed for placed in instruction.outputs if placed in inside)
        return frozenset(found)

    def _backward(
        self, forward: list[Compute | Exchange], gradients: frozenset[Placed]
    ) -> tuple[tuple[Compute | Exchange, ...], dict[str, tuple[str, ...]]]:
        trained = {name for name, one in self.parameters.items() if one.parameter.trained}
        divided = {one.name for one in self.graph.operations if self._is_divided(one)}
        mirrored = _mirrored(forward, gradients, trained, divided)
        return _Buckets(self.graph, self.parameters, mirrored).inserted()


class _Buckets:
    """Puts the sums of gradients behind the computations that complete them."""

    def __init__(
        self, graph: Graph, parameters: dict[str, ParameterPlan], backward: Sequence[Compute | Exchange]
    ) -> None:
        self._parameters, self._backward = parameters, backward
        self._ready: dict[int, list[str]] = {}
        """By position, the parameters whose gradients are complete then."""
        last: dict[str, int] = {}
        for position, one in enumerate(backward):
            if isinstance(one, Compute) and one.gradients != "inputs":
                for operation in one.operations:
                    last.update((parameter.name, position) for parameter in graph[operation].parameters)
        for name, position in last.items():
            if parameters[name].is_summed:
                self._ready.setdefault(position, []).append(name)
        self._buckets: dict[str, tuple[str, ...]] = {}
        self._waiting: dict[Layout, list[str]] = {}
        self._half: list[Exchange] = []
        self._found: list[Compute | Exchange] = []

    def inserted(self) -> tuple[tuple[Compute | Exchange, ...], dict[str, tuple[str, ...]]]:
        for position, one in enumerate(self._backward):
            self._found.append(one)
            for name in self._ready.get(position, ()):
                home = self._parameters[name].home
                self._waiting.setdefault(home, []).append(name)
                if self._elements(self._waiting[home]) >= BUCKET_ELEMENTS:
                    self._flush(home)
        for home in list(self._waiting):
            self._flush(home)
        self._found += self._half
        return tuple(self._found), self._buckets

    def _elements(self, names: Iterable[str]) -> int:
        return sum(self._parameters[name].elements for name in names)

    def _flush(self, home: Layout) -> None:
        """Begin to sum what waits; the second half of the bucket before follows on its first."""
        names = tuple(self._waiting.pop(home))
        bucket = f"gradients {len(self._buckets) + 1}"
        self._buckets[bucket] = names
        elements = self._elements(names)
        self._found += self._half
        self._half = []
        own, total = partial(home.shares), home
        if elements < _SUMMED_AT_ONCE:
            self._found.append(_summing(bucket, elements, own, total))
            return
        middle = _parts_of(home, elements)
        self._found.append(_summing(bucket, elements, own, middle))
        self._half = [_summing(bucket, elements, middle, total)]


@lru_cache(maxsize=256)
def _parts_of(home: Layout, elements: int) -> Layout:
    """An equal part of a bucket for each that has a copy; layers that are alike have buckets that are."""
    shares = np.zeros(len(home.shares), dtype=int)
    shares[list(home.holders)] = equal(elements, len(home.holders))
    return kernels(tuple(shares.tolist()))


def _summing(bucket: str, elements: int, source: Layout, target: Layout) -> Exchange:
    return Exchange(
        name=f"{bucket} {source.kind}→{target.kind}",
        direction="forward",
        source=Placed(bucket, source),
        target=Placed(bucket, target),
        spec=TensorSpec(shape=(elements,), channel_axis=0, images_axis=None),
        moves="gradients",
        deferred=True,
    )


def _name(operation: str, part: Part) -> str:
    return operation if part == "whole" else f"{operation} {part}"


def _mirrored(
    forward: list[Compute | Exchange], gradients: frozenset[Placed], trained: set[str], divided: set[str]
) -> list[Compute | Exchange]:
    """The backward half: the forward half in reverse, without what no gradient flows through."""
    needed = [one for one in reversed(forward) if _carries_gradient(one, gradients, trained)]
    backward: list[Compute | Exchange] = []
    while needed:
        instruction = needed.pop(0)
        hidden = None
        if isinstance(instruction, Compute) and divided.intersection(instruction.operations):
            hidden = _hideable(instruction, needed)
        if isinstance(instruction, Compute) and hidden is not None:
            needed.remove(hidden)
            backward.append(_part(instruction, "inputs"))
            backward.append(replace(hidden, direction="backward", deferred=True))
            backward.append(_part(instruction, "parameters"))
        else:
            backward.append(replace(instruction, direction="backward"))
    return backward


def _carries_gradient(instruction: Compute | Exchange, gradients: frozenset[Placed], trained: set[str]) -> bool:
    if isinstance(instruction, Compute):
        return instruction.name == LOSS or any(placed in gradients for placed in instruction.outputs)
    of_parameter = instruction.moves == "parameter"
    return instruction.source.name in trained if of_parameter else instruction.source in gradients


def _hideable(compute: Compute, following: list[Compute | Exchange]) -> Exchange | None:
    """The exchange of this computation's input gradient, if nothing but parameters' gradients travel before it."""
    after = next((one for one in following if isinstance(one, Compute) or one.moves == "activation"), None)
    if not isinstance(after, Exchange) or after.target not in compute.inputs:
        return None
    return after if after.target.layout.kind == "R" else None


def _part(compute: Compute, gradients: Literal["inputs", "parameters"]) -> Compute:
    noun = "input gradient" if gradients == "inputs" else "weight gradient"
    return replace(compute, name=f"{compute.name} {noun}", direction="backward", gradients=gradients)


def is_divided(graph: Graph, operation: Operation, planned: OperationPlan) -> bool:
    """Whether the backward computation is to be divided, for which the operation has to be a segment of its own."""
    gathered = operation.effect is Effect.KERNEL and planned.input.kind == "R" and planned.output.kind == "K"
    trained = any(one.trained for one in operation.parameters)
    return (
        gathered and trained and any(value != graph.input and graph[value].differentiable for value in operation.inputs)
    )


def activation_spec(graph: Graph, value: str, batch_size: int) -> TensorSpec:
    """Shape and axes of an operation's output for ``batch_size`` images."""
    shape = graph.shape_of(value)
    if shape is None:
        raise ValueError(f"{value} is not a tensor of images and cannot leave the rank it is on")
    return TensorSpec(shape=(batch_size, *shape), channel_axis=graph.channel_axis_of(value), images_axis=0)


def parameter_spec(one: ParameterPlan) -> TensorSpec:
    """Shape and axes of a parameter."""
    return TensorSpec(shape=one.parameter.shape, channel_axis=one.channel_axis, images_axis=None)

"""Run and time the segments of a network as a training step does: all forward, then all backward in reverse.

What runs are the computations of a compiled program, cut at the borders of the calibrated segments. What exchanges
would bring is made up. A segment whose backward pass followed its forward pass at once would find in the cache what it
has just written; in a training step, and here, all other segments run in between.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.calibration.segments import Chain
from pipeline.graph.nodes import leaves
from pipeline.graph.operations import Graph
from pipeline.plan.instructions import Compute, Exchange, Placed, TensorSpec
from pipeline.plan.layouts import master
from pipeline.plan.program import activation_spec, compile_program
from pipeline.run.execution import Execution
from pipeline.run.memory_format import empty, flat

PARTS = ("forward", "backward", "until_input")
"""Forward; backward; and of that until the input has its gradient, where the weights' is computed after it."""
_DRAWN = 64
"""So many kernels of a layer differ: to draw millions of random numbers takes longer than some of what is measured."""
_CALLS = 16
_LEAST_PART = 0.1
"""What is left of a computation's time without that of the call, however little it does."""


@torch.no_grad()
def initialise(tensors: Iterable[torch.Tensor]) -> None:
    """Weights with which values and gradients keep their size: processors take long for numbers next to zero."""
    for one in tensors:
        if not one.is_floating_point():
            one.zero_()  # an index, or a counter
        elif one.dim() > 1:
            drawn = torch.empty_like(one[:_DRAWN]).normal_(0, (one.shape[0] / max(one.numel(), 1)) ** 0.5)
            for some in one.split(_DRAWN):
                some.copy_(drawn[: len(some)])
        else:
            one.fill_(1.0)  # running variances must not be negative


class Timed(NamedTuple):
    """One computation that was run."""

    segment: int
    part: Literal["forward", "inputs", "backward"]
    """``inputs`` is the first half of a divided backward computation."""
    seconds: float
    """Beyond what any call takes."""


class Pass:
    """The computations of some segments that rank 0 of an execution does for a batch, forward and backward."""

    def __init__(
        self,
        execution: Execution,
        graph: Graph,
        segments: Mapping[int, Chain],
        cuts: Iterable[str],
        images: int,
        call: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """``segments`` by the number they are reported with; ``cuts`` are the operations that all segments begin with.

        ``call`` is what a computation of nothing takes forward and backward in s, which is not theirs.
        """
        self._call = call
        self._execution, self._graph, self._images, self._segments = execution, graph, images, tuple(segments)
        program = compile_program(graph, execution.plan, images, cuts=frozenset(cuts))
        number = {name: index for index, chain in segments.items() for name in chain.operations}
        self._computes = [
            (number[one.operations[0]], one)
            for one in (*program.forward, *program.backward)
            if isinstance(one, Compute) and one.steps and one.operations[0] in number and 0 in one.ranks
        ]
        self._gradients = program.gradients
        self._dtypes = {one.name: one.dtype for one in graph.operations}
        self._specs = {one.target: one.spec for one in program.forward if isinstance(one, Exchange)}
        self._made_up = torch.empty(0, dtype=execution.dtype, device=execution.transport.device)

    @property
    def computations(self) -> int:
        """How many computations it runs."""
        return len(self._computes)

    def run(self) -> NDArray[np.float64]:
        """Run everything once; how long each segment kept the device busy in s, (segment, part) in their order.

        What each of its computations takes beyond a call; NaN for a part that a segment has not.
        """
        times = {segment: [0.0, 0.0, math.nan] for segment in self._segments}
        for one in self.steps():
            times[one.segment][one.part != "forward"] += one.seconds
            if one.part == "inputs":
                times[one.segment][2] = one.seconds
        return np.array(list(times.values())).reshape(-1, len(PARTS))

    def steps(self) -> Iterator[Timed]:
        """Run one computation after the other; what they hold is given back at the end."""
        execution, values = self._execution, self._execution.values
        execution.begin(self._images, None, training=True)
        try:
            for segment, compute in self._computes:
                forward = compute.direction == "forward"
                for placed in compute.inputs if forward else compute.outputs:
                    if forward and placed not in values:
                        made = self._tensor(placed)
                        values[placed] = made.requires_grad_(placed in self._gradients and made.is_floating_point())
                    elif not forward and placed in self._gradients:
                        self._make_gradients(values[placed])
                work = functools.partial(execution.compute, compute, self._gradients)
                seconds = execution.throttle.busy_time(work, execution.transport.device)
                own = max(seconds - self._call[not forward], _LEAST_PART * seconds)
                half: Literal["inputs", "backward"] = "inputs" if compute.gradients == "inputs" else "backward"
                yield Timed(segment, "forward" if forward else half, own)
        finally:
            execution.forget()
            execution.parameters.clear_gradients()

    def _tensor(self, placed: Placed) -> torch.Tensor:
        """What another segment or an exchange would have brought."""
        spec: TensorSpec = self._specs.get(placed) or activation_spec(self._graph, placed.name, self._images)
        dtype = self._dtypes.get(placed.name, self._graph.dtype)
        return self._numbers(spec.local_shape(spec.boxes(placed.layout)[0]), dtype)

    def _make_gradients(self, value: Any) -> None:
        """Give what has no gradient yet one; what a part of the network gives may be more than a tensor."""
        for one in leaves(value):
            if isinstance(one, torch.Tensor) and one.requires_grad and one.grad is None:
                one.grad = self._numbers(one.shape, one.dtype)

    def _numbers(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Some numbers between 0 and 1: copies of the same, as to draw new ones takes longer than many a segment."""
        last, kind = self._execution.plan.channels_last, self._made_up
        tensor = empty(shape, channels_last=last, dtype=dtype, device=kind.device)
        if len(self._made_up) < tensor.numel():
            self._made_up = torch.rand(tensor.numel(), dtype=kind.dtype, device=kind.device)
        flat(tensor, channels_last=last).copy_(self._made_up[: tensor.numel()])
        return tensor


def call_seconds(execution: Execution) -> tuple[float, float]:
    """What a computation of nothing takes forward and backward, in s."""
    nothing = Placed("nothing", master(execution.plan.ranks))
    gradients = frozenset({nothing})
    forward, backward = (
        Compute(name="nothing", direction=way, segment=0, steps=(), inputs=(nothing,), outputs=(nothing,), ranks=(0,))
        for way in ("forward", "backward")
    )
    total = [0.0, 0.0]
    for repetition in range(1 + _CALLS):
        execution.begin(1, None, training=True)
        execution.values[nothing] = torch.zeros(1, device=execution.transport.device, requires_grad=True)
        for way, compute in enumerate((forward, backward)):
            work = functools.partial(execution.compute, compute, gradients)
            seconds = execution.throttle.busy_time(work, execution.transport.device)
            if repetition:
                total[way] += seconds / _CALLS
            if compute is forward:
                execution.values[nothing].grad = torch.zeros(1, device=execution.transport.device)
    return total[0], total[1]

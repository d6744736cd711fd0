"""A plan: a layout for every operation, with shares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipeline.graph.effects import Effect
from pipeline.graph.operations import Graph, Operation, Parameter
from pipeline.html import table
from pipeline.plan.layouts import Layout, master, replicated

Strategy = Literal["auto", "single", "ddp", "equal", "paper", "kernel", "batch"]
STRATEGIES: tuple[Strategy, ...] = ("single", "ddp", "equal", "paper", "kernel", "batch", "auto")


@dataclass(frozen=True, kw_only=True)
class OperationPlan:
    """Where one operation runs."""

    name: str
    input: Layout
    """Layout in which it takes every input."""
    output: Layout
    home: Literal["master", "shard"]
    """Where its parameters and their optimiser state live between steps."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that take part."""
        return self.output.holders

    @property
    def divided(self) -> Layout:
        """What its work is divided by: its output, or its input where the ranks' outputs are summands."""
        return self.input if self.output.kind == "P" else self.output


@dataclass(frozen=True, kw_only=True)
class ParameterPlan:
    """Where one parameter lives and where it is used; the two differ only if it travels in every step."""

    parameter: Parameter
    channel_axis: int
    """The axis that a K layout splits."""
    home: Layout
    work: Layout

    @property
    def is_summed(self) -> bool:
        """Whether several ranks have a copy of it, each with a part of its gradient."""
        return self.parameter.trained and self.home == self.work and self.home.kind == "R"

    @property
    def elements(self) -> int:
        """Numbers in the whole parameter."""
        return math.prod(self.parameter.shape)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout per operation. Ranks are positions in ``devices``; all shares are in global kernels (or features)."""

    strategy: Strategy
    batch_size: int
    devices: tuple[int, ...]
    """For each rank, the index of its device in the list the plan was made for."""
    labels: tuple[str, ...]
    """For each rank, its device in words, e.g. ``cpu@0.5``."""
    operations: tuple[OperationPlan, ...]
    channels_last: bool = False
    """Whether all ranks keep images and weights with the channels last in memory, as the calibration found faster."""
    graph: Graph | None = field(default=None, repr=False, compare=False)
    """The network it is for; a plan that was read from a file does not know it."""
    network_digest: str = field(default="", compare=False)
    """``Graph.plan_digest`` of that, which a file keeps; empty in a plan of before there was one."""

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.devices)

    _by_name: Mapping[str, OperationPlan] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {operation.name: operation for operation in self.operations})

    def __getitem__(self, name: str) -> OperationPlan:
        return self._by_name[name]

    def convolution_shares(self, graph: Graph) -> tuple[float, ...]:
        """For each rank its fraction of all convolution FLOPs; equal parts of the batch under ``ddp``."""
        if self.strategy == "ddp":
            return (1 / self.ranks,) * self.ranks
        flops = [0.0] * self.ranks
        for operation in graph.convolutions:
            shares = self[operation.name].divided.shares
            for rank, share in enumerate(shares):
                flops[rank] += operation.flops_per_image * share / sum(shares)
        total = sum(flops)
        return tuple(one / total if total else float(rank == 0) for rank, one in enumerate(flops))

    @property
    def split(self) -> float:
        """The true share of the convolutions' FLOPs that run split, 0 to 1, those of opaque parts counted as unsplit.

        NaN without convolutions, or for a plan of which the network is not known.
        """
        if self.graph is None or not self.graph.convolution_flops:
            return math.nan
        if self.strategy == "ddp":
            return float(self.ranks > 1)
        split = sum(
            operation.flops_per_image
            for operation in self.graph.convolutions
            if len(self[operation.name].divided.holders) > 1 and self[operation.name].divided.kind in ("K", "B")
        )
        return min(split / self.graph.convolution_flops, 1.0)

    def on_master(self, graph: Graph) -> tuple[str, ...]:
        """The operations that run on the master because nothing is known of them."""
        return tuple(one.name for one in graph.operations if one.effect is Effect.WHOLE)

    def table(self) -> str:
        """The plan as text: one line per operation."""
        header = f"{self.strategy} over {', '.join(self.labels)}, batch {self.batch_size}"
        if self.strategy == "ddp":
            return f"{header}\n  every rank runs the whole network on an equal part of the batch"
        width = max(len(operation.name) for operation in self.operations)
        lines = [f"  {one.name:{width}}  {one.input!s:>14} -> {one.output!s}" for one in self.operations]
        return "\n".join([header, *lines, *(f"  as it is, on one device: {one}" for one in self.opaque)])

    def _repr_html_(self) -> str:
        """The plan in a notebook."""
        header = f"{self.strategy} over {', '.join(self.labels)}, batch {self.batch_size}"
        if self.strategy == "ddp":
            return table(header, ["every rank"], [["runs the whole network on an equal part of the batch"]])
        whole = [(one, "as it is, on one device", "") for one in self.opaque]
        operations = [(one.name, one.input, one.output) for one in self.operations]
        return table(header, ["operation", "input", "output"], [*operations, *whole])

    @property
    def opaque(self) -> tuple[str, ...]:
        """The parts of the network that run as they are, each with the reason; of a plan that knows its network."""
        return () if self.graph is None else tuple(map(str, self.graph.opaque))


def parameter_plans(operation: Operation, plan: OperationPlan) -> tuple[ParameterPlan, ...]:
    """Where the parameters and buffers of ``operation`` live and work, which follows from its layouts."""
    ranks = len(plan.output.shares)
    found = []
    for parameter in operation.parameters:
        axis, work = _work_layout(operation, plan, parameter)
        # Running statistics are written where they are used.
        home = work if plan.home == "shard" or parameter.buffer else master(ranks)
        found.append(ParameterPlan(parameter=parameter, channel_axis=axis, home=home, work=work))
    return tuple(found)


def _work_layout(operation: Operation, plan: OperationPlan, parameter: Parameter) -> tuple[int, Layout]:
    if operation.effect is Effect.KERNEL and plan.input.kind == "K":
        # Input channels are split: rank i needs w[:, its channels]; the bias is added once, by the first of the ranks.
        if parameter.input_axis is not None:
            return parameter.input_axis, plan.input
        if parameter.axis is None:  # its weight is made of it, on every rank
            return 0, replicated(plan.input.shares)
        first = plan.input.holders[0]
        return 0, replicated(tuple(int(rank == first) for rank in range(len(plan.input.shares))))
    if plan.output.kind == "K" and parameter.axis is not None:
        return parameter.axis, plan.output
    if plan.output.kind in ("K", "B"):
        # The same for all channels, such as BatchNorm's count of batches, or for all images: each rank has a copy.
        return 0, replicated(plan.output.shares)
    return 0, plan.output


def parameters_of(graph: Graph, plan: Plan) -> Iterable[tuple[Operation, ParameterPlan]]:
    """All parameters and buffers of the network, in the order of its operations, each once."""
    seen: set[str] = set()
    for operation in graph.operations:
        for parameter in parameter_plans(operation, plan[operation.name]):
            if parameter.parameter.name not in seen:
                seen.add(parameter.parameter.name)
                yield operation, parameter

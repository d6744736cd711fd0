"""Plans by strategy: who runs what, given what the devices can do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from pipeline.errors import InputError
from pipeline.graph.effects import Effect
from pipeline.graph.trace import Graph, Operation
from pipeline.plan.costs import Costs
from pipeline.plan.layouts import Layout, images, kernels, master, partial, replicated
from pipeline.plan.plan import STRATEGIES, OperationPlan, Plan, Strategy, parameter_plans
from pipeline.plan.shares import balanced, equal, proportional
from pipeline.plan.ties import Tie, bound, on_master, ties

Split = Callable[[Tie], tuple[int, ...]]
"""Shares of operations that are tied to each other, in channels."""

Shares = Sequence[float] | Mapping[str, Sequence[int]]
"""Shares a user gives: one number per device for all layers, or whole kernels per layer by its name."""


def plan_network(
    graph: Graph,
    strategy: Strategy,
    *,
    batch_size: int,
    labels: Sequence[str],
    costs: Costs | None = None,
    shares: Shares | None = None,
) -> Plan:
    """The plan of ``strategy`` (any but ``auto``) for the devices called ``labels``.

    Shares come from ``shares`` if given, else from ``costs``; ``equal`` and ``ddp`` need neither.
    Raises ``InputError`` for an unknown strategy, a bad batch size, or weights that do not match the devices.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"strategy '{strategy}' is unknown; the strategies are {', '.join(STRATEGIES)}")
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} must be at least 1")
    ranks = len(labels)
    if strategy == "single":
        fastest = costs.fastest(batch_size) if costs is not None else 0
        operations = tuple(_on_master(operation, 1) for operation in graph.operations)
        return Plan(
            strategy=strategy,
            batch_size=batch_size,
            devices=(fastest,),
            labels=(labels[fastest],),
            operations=operations,
        )
    if strategy == "ddp":
        operations = ()
    elif strategy == "batch":
        operations = _batch_split(graph, ranks, _image_shares(batch_size, ranks, costs, shares))
    else:
        build = _kernel_split if strategy == "kernel" else _convolutions_only
        operations = build(graph, ranks, _split(strategy, ranks, batch_size, costs, shares))
    return Plan(
        strategy=strategy,
        batch_size=batch_size,
        devices=tuple(range(ranks)),
        labels=tuple(labels),
        operations=operations,
    )


def _split(strategy: Strategy, ranks: int, batch_size: int, costs: Costs | None, shares: Shares | None) -> Split:
    if isinstance(shares, Mapping):
        return lambda tie: _given_for(tie, shares, ranks)
    if shares is not None:
        return lambda tie: _given(tie.channels, shares, ranks, tie.unit)
    if strategy == "equal":
        return lambda tie: _in_units(tie, equal(tie.channels // tie.unit, ranks))
    if costs is None:
        raise InputError(f"strategy '{strategy}' needs a calibration, or shares, to split the kernels")
    if strategy == "paper":
        # In inverse proportion to the measured time of that convolution on each device.
        speeds = functools.partial(_speeds, costs, batch_size=batch_size)
        return lambda tie: _in_units(tie, proportional(tie.channels // tie.unit, speeds(tie)))
    return lambda tie: _in_units(tie, _balanced(costs, tie, batch_size))


def _in_units(tie: Tie, shares: Sequence[int]) -> tuple[int, ...]:
    return tuple(share * tie.unit for share in shares)


def _given_for(tie: Tie, shares: Mapping[str, Sequence[int]], ranks: int) -> tuple[int, ...]:
    named = [one.name for one in tie.operations if one.name in shares]
    if not named and not any(one.convolution for one in tie.operations):
        everywhere = np.sum([np.asarray(given) / sum(given) for given in shares.values()], axis=0)
        return _in_units(tie, proportional(tie.channels // tie.unit, list(everywhere)))
    if not named:
        wanted = next(one.name for one in tie.operations if one.convolution)
        raise InputError(f"shares name {', '.join(shares)}, but not the layer {wanted}")
    return _given(tie.channels, shares[named[0]], ranks, tie.unit)


def _given(total: int, shares: Sequence[float], ranks: int, unit: int = 1) -> tuple[int, ...]:
    """Integer shares that add up to the layer are taken as they are, fractions of 1 as proportions."""
    if len(shares) != ranks:
        raise InputError(f"shares {list(shares)} name {len(shares)} devices, but there are {ranks}")
    if all(float(share).is_integer() for share in shares) and sum(shares) == total:
        if any(int(share) % unit for share in shares):
            raise InputError(f"shares {list(shares)} part groups of {unit} channels; each must be a multiple of it")
        return tuple(int(share) for share in shares)
    if abs(sum(shares) - 1) < 1e-9:
        return tuple(share * unit for share in proportional(total // unit, shares))
    equation = " + ".join(f"{share:g}" for share in shares)
    raise InputError(f"shares {equation} = {sum(shares):g} must add up to 1 (fractions) or to {total} (kernels)")


def _image_shares(batch_size: int, ranks: int, costs: Costs | None, shares: Shares | None) -> tuple[int, ...]:
    if isinstance(shares, Mapping):
        raise InputError("strategy 'batch' splits images: it takes one share per device, not one per layer")
    if shares is not None:
        return _given(batch_size, shares, ranks)
    if costs is None:
        raise InputError("strategy 'batch' needs a calibration, or shares, to split the images")
    points = np.unique([1.0, batch_size])
    times = [np.array([costs.whole_step(device, int(one)) for one in points]) for device in range(ranks)]
    return balanced(batch_size, [points] * ranks, times)


def _speeds(costs: Costs, tie: Tie, batch_size: int) -> list[float]:
    """Of each device how often per second it does the operations; or the network, where they were not measured."""
    seconds = [
        sum(
            costs.seconds(one.name, device, 1.0, way, batch_size)
            for one in tie.operations
            for way in ("forward", "backward")
        )
        for device in range(costs.devices)
    ]
    return [1 / (one or costs.whole_step(device, batch_size)) for device, one in enumerate(seconds)]


def _balanced(costs: Costs, tie: Tie, batch_size: int) -> tuple[int, ...]:
    """Units for each device, by the sum of the cost curves of all that is tied."""
    units = tie.channels // tie.unit
    points, times = [], []
    for device in range(costs.devices):
        curves = [costs.curve(one.name, units, device, batch_size) for one in tie.weighted]
        known = [curve for curve in curves if curve is not None]
        if not known:
            return proportional(units, _speeds(costs, tie, batch_size))
        grid = np.unique(np.concatenate([curve[0] for curve in known]))
        points.append(grid)
        times.append(np.sum([np.interp(grid, *curve) for curve in known], axis=0))
    return balanced(units, points, times)


def _on_master(operation: Operation, ranks: int) -> OperationPlan:
    return OperationPlan(name=operation.name, input=master(ranks), output=master(ranks), home="master")


def _convolutions_only(graph: Graph, ranks: int, split: Split) -> tuple[OperationPlan, ...]:
    """``paper`` and ``equal``: only convolutions are distributed, and the master holds the weights."""
    plans = []
    for operation in graph.operations:
        if not operation.convolution or operation.effect not in (Effect.KERNEL, Effect.GROUPED):
            plans.append(_on_master(operation, ranks))
            continue
        shares = split(Tie((operation,), operation.channels, operation.unit))
        grouped = operation.effect is Effect.GROUPED
        source = kernels(_of_groups(operation, shares)) if grouped else replicated(shares)
        plans.append(OperationPlan(name=operation.name, input=source, output=kernels(shares), home="master"))
    return _agreeing(graph, tuple(plans), ranks)


def _of_groups(operation: Operation, shares: Sequence[int]) -> tuple[int, ...]:
    """The input channels that belong to shares of the output channels."""
    return tuple(share // operation.unit * operation.input_unit for share in shares)


def _kernel_split(graph: Graph, ranks: int, split: Split) -> tuple[OperationPlan, ...]:
    """``kernel``: convolutions by kernels, dense layers by the features they find split, the rest on the shard."""
    return _KernelSplit(graph, ranks, split).plans()


class _KernelSplit:
    def __init__(self, graph: Graph, ranks: int, split: Split) -> None:
        self._graph, self._ranks, self._split = graph, ranks, split
        self._ties, self._bound, self._on_master = ties(graph), bound(graph), on_master(graph)
        self._shares: dict[str, tuple[int, ...]] = {}
        split_ones = [one for one in graph.convolutions if one.effect in (Effect.KERNEL, Effect.GROUPED)]
        taking_part = [sum(column) for column in zip(*(self._shares_of(one) for one in split_ones), strict=True)]
        self._everyone = replicated(tuple(taking_part) if taking_part else (1,) + (0,) * (ranks - 1))
        self._layouts: dict[str, Layout] = {graph.input: master(ranks)}

    def plans(self) -> tuple[OperationPlan, ...]:
        found = []
        for operation in self._graph.operations:
            source, target = self._of(operation)
            self._layouts[operation.name] = target
            found.append(OperationPlan(name=operation.name, input=source, output=target, home="shard"))
        return _agreeing(self._graph, tuple(found), self._ranks)

    def _shares_of(self, operation: Operation) -> tuple[int, ...]:
        tie = self._ties[operation.name]
        name = tie.operations[0].name
        if name not in self._shares:
            self._shares[name] = self._split(tie)
        return self._shares[name]

    def _of(self, operation: Operation) -> tuple[Layout, Layout]:
        """Layouts of what it takes and of what it gives."""
        together = self._bound[operation.name]
        whole = master(self._ranks), master(self._ranks)
        if operation.name in self._on_master:
            return whole
        if len(together) > 1:
            return self._everyone, self._everyone
        inputs = [self._layouts[value] for value in operation.inputs]
        if operation.convolution and operation.effect is Effect.KERNEL:
            shares = self._shares_of(operation)
            return replicated(shares), kernels(shares)
        if operation.effect is Effect.GROUPED:
            shares = self._shares_of(operation)
            return kernels(_of_groups(operation, shares)), kernels(shares)
        if all(layout.kind == "M" for layout in inputs):
            return whole
        if operation.effect is Effect.KERNEL:
            if inputs[0].kind == "K":
                # Each rank multiplies the features it has; only the small sums travel.
                return inputs[0], partial(inputs[0].shares)
            shares = self._shares_of(operation)
            return replicated(shares), kernels(shares)
        split = [layout for layout in inputs if layout.kind == "K"]
        if operation.effect is Effect.FLATTEN and split:
            return split[0], split[0].scaled(operation.channels // sum(split[0].shares))
        if operation.effect in (Effect.CHANNELWISE, Effect.BATCHNORM) and any(one.kind in "KP" for one in inputs):
            fits = split and not any(share % operation.unit for share in split[0].shares)
            layout = split[0] if fits else kernels(self._shares_of(operation))
            return layout, layout
        return self._everyone, self._everyone


def _batch_split(graph: Graph, ranks: int, shares: tuple[int, ...]) -> tuple[OperationPlan, ...]:
    """``batch``: every rank has all weights and some images; what may not treat images singly is on the master."""
    layout, together, unsplit = images(shares), bound(graph), on_master(graph)
    layouts: dict[str, Layout] = {}
    for operation in graph.operations:
        if operation.name in unsplit:
            layouts[operation.name] = master(ranks)
            continue
        # What only touches up a tensor of the master's is not worth a journey.
        worth = operation.effect in (Effect.KERNEL, Effect.GROUPED) or len(together[operation.name]) > 1
        split = worth or any(layouts.get(value, layout).kind == "B" for value in operation.inputs)
        layouts[operation.name] = layout if split else master(ranks)
    return _agreeing(
        graph,
        tuple(OperationPlan(name=name, input=one, output=one, home="shard") for name, one in layouts.items()),
        ranks,
    )


def _agreeing(graph: Graph, plans: tuple[OperationPlan, ...], ranks: int) -> tuple[OperationPlan, ...]:
    """Move to the master what uses one module in two places with different parts of its weights."""
    by_name = {one.name: one for one in plans}
    users: dict[str, list[Operation]] = {}
    for operation in graph.operations:
        if operation.module is not None and operation.parameters:
            users.setdefault(operation.module, []).append(operation)
    moved: set[str] = set()
    for operations in users.values():
        homes = [[(p.channel_axis, p.work) for p in parameter_plans(one, by_name[one.name])] for one in operations]
        if any(home != homes[0] for home in homes):
            moved.update(one.name for one in operations)
    together = bound(graph)
    moved = {name for one in moved for name in together[one]}
    return tuple(
        replace(one, input=master(ranks), output=master(ranks), home="master") if one.name in moved else one
        for one in plans
    )

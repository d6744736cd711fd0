"""Plans by strategy: who runs what, given what the devices can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pipeline.errors import InputError
from pipeline.graph.effects import Effect
from pipeline.graph.trace import Graph, Operation
from pipeline.plan.costs import Costs
from pipeline.plan.layouts import Layout, kernels, master, partial, replicated
from pipeline.plan.plan import STRATEGIES, OperationPlan, Plan, Strategy
from pipeline.plan.shares import balanced, equal, proportional

Split = Callable[[Operation, int], tuple[int, ...]]
"""Shares of one operation: from it and the number of channels to split."""

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
        fastest = costs.fastest() if costs is not None else 0
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
    else:
        split = _split(strategy, ranks, costs, shares)
        build = _kernel_split if strategy == "kernel" else _convolutions_only
        operations = build(graph, ranks, split)
    return Plan(
        strategy=strategy,
        batch_size=batch_size,
        devices=tuple(range(ranks)),
        labels=tuple(labels),
        operations=operations,
    )


def _split(strategy: Strategy, ranks: int, costs: Costs | None, shares: Shares | None) -> Split:
    if isinstance(shares, Mapping):
        return lambda operation, total: _given_for(operation, total, shares, ranks)
    if shares is not None:
        return lambda _, total: _given(total, shares, ranks)
    if strategy == "equal":
        return lambda _, total: equal(total, ranks)
    if costs is None:
        raise InputError(f"strategy '{strategy}' needs a calibration, or shares, to split the kernels")
    if strategy == "paper":
        # In inverse proportion to the measured time of that convolution on each device.
        return lambda operation, total: proportional(
            total, [_throughput(costs, operation, device) for device in range(ranks)]
        )
    return lambda operation, total: _balanced(costs, operation, total)


def _given_for(operation: Operation, total: int, shares: Mapping[str, Sequence[int]], ranks: int) -> tuple[int, ...]:
    if operation.name not in shares:
        raise InputError(f"shares name {', '.join(shares)}, but not the layer {operation.name}")
    return _given(total, shares[operation.name], ranks)


def _given(total: int, shares: Sequence[float], ranks: int) -> tuple[int, ...]:
    """Integer shares that add up to the layer are taken as they are, fractions of 1 as proportions."""
    if len(shares) != ranks:
        raise InputError(f"shares {list(shares)} name {len(shares)} devices, but there are {ranks}")
    whole = all(float(share).is_integer() for share in shares)
    if whole and sum(shares) == total:
        return tuple(int(share) for share in shares)
    if abs(sum(shares) - 1) < 1e-9:
        return proportional(total, shares)
    equation = " + ".join(f"{share:g}" for share in shares)
    raise InputError(f"shares {equation} = {sum(shares):g} must add up to 1 (fractions) or to {total} (kernels)")


def _throughput(costs: Costs, operation: Operation, device: int) -> float:
    """Of that operation per second; of the whole network in images/s where the operation was not measured by itself."""
    seconds = sum(costs.seconds(operation.name, device, 1.0, way, costs.batch_size) for way in ("forward", "backward"))
    return 1 / seconds if seconds else costs.throughput(device)


def _balanced(costs: Costs, operation: Operation, total: int) -> tuple[int, ...]:
    curves = [costs.curve(operation.name, total, device) for device in range(costs.devices)]
    if any(curve is None for curve in curves):
        return proportional(total, [costs.throughput(device) for device in range(costs.devices)])
    points, times = zip(*(curve for curve in curves if curve is not None), strict=True)
    return balanced(total, points, times)


def _on_master(operation: Operation, ranks: int) -> OperationPlan:
    return OperationPlan(name=operation.name, input=master(ranks), output=master(ranks), home="master")


def _convolutions_only(graph: Graph, ranks: int, split: Split) -> tuple[OperationPlan, ...]:
    """``paper`` and ``equal``: only convolutions are distributed, and the master holds the weights."""
    plans = []
    for operation in graph.operations:
        if operation.convolution and operation.effect is Effect.KERNEL:
            shares = split(operation, operation.channels)
            plans.append(
                OperationPlan(name=operation.name, input=replicated(shares), output=kernels(shares), home="master")
            )
        else:
            plans.append(_on_master(operation, ranks))
    return tuple(plans)


def _kernel_split(graph: Graph, ranks: int, split: Split) -> tuple[OperationPlan, ...]:
    """``kernel``: convolutions by kernels, dense layers by the features they find split, the rest on the shard."""
    plans: list[OperationPlan] = []
    layout_of: dict[str, Layout] = {graph.input: master(ranks)}
    for operation in graph.operations:
        planned = _kernel_split_of(operation, [layout_of[value] for value in operation.inputs], ranks, split)
        layout_of[operation.name] = planned.output
        plans.append(planned)
    return tuple(plans)


def _kernel_split_of(operation: Operation, inputs: list[Layout], ranks: int, split: Split) -> OperationPlan:
    split_input = next((layout for layout in inputs if layout.kind == "K"), None)
    summands = any(layout.kind == "P" for layout in inputs)
    if operation.effect is Effect.KERNEL and operation.convolution:
        shares = split(operation, operation.channels)
        return OperationPlan(name=operation.name, input=replicated(shares), output=kernels(shares), home="shard")
    if operation.effect is Effect.KERNEL and split_input is not None:
        # Each rank multiplies the features it has; only the small sums travel.
        return OperationPlan(name=operation.name, input=split_input, output=partial(split_input.shares), home="shard")
    if operation.effect is Effect.CHANNELWISE and split_input is not None:
        return OperationPlan(name=operation.name, input=split_input, output=split_input, home="shard")
    if operation.effect is Effect.CHANNELWISE and summands:
        layout = kernels(split(operation, operation.channels))
        return OperationPlan(name=operation.name, input=layout, output=layout, home="shard")
    if operation.effect is Effect.FLATTEN and split_input is not None:
        output = split_input.scaled(operation.channels // sum(split_input.shares))
        return OperationPlan(name=operation.name, input=split_input, output=output, home="shard")
    return _on_master(operation, ranks)

"""Plans by strategy: who runs what, given what the devices can do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from pipeline.errors import InputError
from pipeline.graph.effects import Effect
from pipeline.graph.operations import Graph, Operation
from pipeline.plan.costs import Costs, on_grid
from pipeline.plan.layouts import Layout, images, kernels, master, partial, replicated
from pipeline.plan.plan import STRATEGIES, OperationPlan, Plan, Strategy, parameter_plans
from pipeline.plan.shares import Most, balanced, equal, proportional
from pipeline.plan.ties import Tie, bound, on_master, ties

Kind = Literal["M", "K", "B", "I"]
"""How a layer is split: not at all, by kernels, by images or by input channels."""

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
    most: Most | None = None,
) -> Plan:
    """The plan of ``strategy`` (any but ``auto``) for the devices called ``labels``.

    Shares come from ``shares`` if given, else from ``costs``; ``equal`` and ``ddp`` need neither. ``most`` limits the
    share of each rank under ``kernel`` and ``batch``.
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
            graph=graph,
        )
    layers = layers_of(graph)
    if strategy == "ddp":
        operations = ()
    elif strategy == "batch":
        of_images = image_shares(batch_size, ranks, costs, shares, most)
        operations = Mixed(graph, ranks, {one.name: "B" for one in layers}, _nothing, of_images).plans()
    else:
        split = kernel_split(strategy, ranks, batch_size, costs, shares, most)
        if strategy == "kernel":
            operations = Mixed(graph, ranks, {one.name: "K" for one in layers}, split, None).plans()
        else:
            operations = _convolutions_only(graph, ranks, split)
    return Plan(
        strategy=strategy,
        batch_size=batch_size,
        devices=tuple(range(ranks)),
        labels=tuple(labels),
        operations=operations,
        graph=graph,
    )


def kernel_split(
    strategy: Strategy,
    ranks: int,
    batch_size: int,
    costs: Costs | None,
    shares: Shares | None,
    most: Most | None = None,
) -> Split:
    """How a strategy shares out the kernels of operations that are tied; ``most`` limits each rank under ``kernel``."""
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
    known: dict[tuple[int, bytes], tuple[int, ...]] = {}
    return lambda tie: _in_units(tie, _balanced(costs, tie, batch_size, known, most))


def _nothing(tie: Tie) -> tuple[int, ...]:
    raise AssertionError(f"{tie.operations[0].name} is not split by kernels")


def _in_units(tie: Tie, shares: Sequence[int]) -> tuple[int, ...]:
    return tuple(shares) if tie.unit == 1 else tuple(share * tie.unit for share in shares)


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


def image_shares(
    batch_size: int, ranks: int, costs: Costs | None, shares: Shares | None, most: Most | None = None
) -> tuple[int, ...]:
    """How many images each rank gets: all end at the same time, going by the network's time on each device.

    None gets more than the fraction ``most`` of them.
    """
    if isinstance(shares, Mapping):
        raise InputError("strategy 'batch' splits images: it takes one share per device, not one per layer")
    if shares is not None:
        return _given(batch_size, shares, ranks)
    if costs is None:
        raise InputError("strategy 'batch' needs a calibration, or shares, to split the images")
    points = np.unique([1.0, batch_size])
    times = np.stack([costs.steps_by_images(int(one)) for one in points], axis=1)
    return balanced(batch_size, [points] * ranks, list(times), caps=_caps(batch_size, most))


def _caps(total: int, most: Most | None) -> list[int] | None:
    """Whole numbers within ``most``; of a narrow layer, where these are too few, the next ones of some."""
    if most is None:
        return None
    exact = total * np.asarray(most, dtype=float) + 1e-9
    caps = np.floor(exact).astype(int)
    by_remainder = np.argsort(-(exact - caps), kind="stable")
    caps[by_remainder[: max(total - int(caps.sum()), 0)]] += 1
    return [int(one) for one in caps]


def _speeds(costs: Costs, tie: Tie, batch_size: int) -> list[float]:
    """Of each device how often per second it does the operations; or the network, where they were not measured."""
    found = [costs.curves(one.name, 1, batch_size) for one in tie.operations]
    whole = [times[:, -1] for _, times in filter(None, found)]
    seconds = np.sum(whole, axis=0) if whole else costs.whole_steps(batch_size)
    return [float(one) for one in 1 / seconds]


def _balanced(
    costs: Costs, tie: Tie, batch_size: int, done: dict[tuple[int, bytes], tuple[int, ...]], most: Most | None
) -> tuple[int, ...]:
    """Units for each device, by the sum of the cost curves of all that is tied; ``done`` are those of equal curves."""
    units = tie.channels // tie.unit
    found = [costs.curves(one.name, units, batch_size) for one in tie.weighted]
    known = [curves for curves in found if curves is not None]
    if not known:
        speeds = _speeds(costs, tie, batch_size)
        if most is None:
            return proportional(units, speeds)
        lines = [np.array([float(units)])] * costs.devices, [np.array([1 / one]) for one in speeds]
        return balanced(units, *lines, caps=_caps(units, most))
    grid = np.unique(np.concatenate([points for points, _ in known]))
    times = np.sum([on_grid(curves, grid) for curves in known], axis=0)
    key = units, times.tobytes()
    if key not in done:
        done[key] = balanced(units, [grid] * costs.devices, list(times), caps=_caps(units, most))
    return done[key]


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


class Mixed:
    """A plan in which every convolution and dense layer is split in its own way, and the rest follows.

    A layer of kind ``M`` stays on the master, ``K`` is split by kernels (a dense layer by the features that it finds
    split), ``B`` by images, and ``I`` by the input channels that it finds split, or else by kernels. What lies between
    does what it can where its inputs are.
    """

    def __init__(
        self,
        graph: Graph,
        ranks: int,
        kinds: Mapping[str, Kind],
        split: Split,
        image_shares: tuple[int, ...] | None,
        structure: Structure | None = None,
    ) -> None:
        """``kinds`` by the names of the layers; ``image_shares`` may be missing where none is split by images.

        ``structure`` is that of the graph, for whoever makes many plans of it.
        """
        self._graph, self._ranks, self._kinds, self._split = graph, ranks, kinds, split
        self._images = None if image_shares is None else images(image_shares)
        self._ties, self._bound, self._on_master = structure or structure_of(graph)
        self._shares: dict[str, tuple[int, ...]] = {}
        self._everyone = replicated(self._taking_part())
        self._layouts: dict[str, Layout] = {graph.input: master(ranks)}
        self._gathered: dict[str, tuple[Layout, Layout]] = {}
        """By operation, the layouts of what it is bound to."""

    def plans(self) -> tuple[OperationPlan, ...]:
        """One per operation, in order."""
        found = []
        for operation in self._graph.operations:
            source, target = self._of(operation)
            self._layouts[operation.name] = target
            found.append(OperationPlan(name=operation.name, input=source, output=target, home="shard"))
        return _agreeing(self._graph, tuple(found), self._ranks)

    def _taking_part(self) -> tuple[int, ...]:
        """The ranks that have a part of some layer."""
        layers = [one for one in layers_of(self._graph) if one.convolution and self._kinds[one.name] in "KI"]
        held = [self._shares_of(one) for one in layers]
        if self._images is not None and "B" in self._kinds.values():
            held.append(self._images.shares)
        return tuple(np.sum(held, axis=0).tolist()) if held else master(self._ranks).shares

    def _shares_of(self, operation: Operation) -> tuple[int, ...]:
        tie = self._ties[operation.name]
        name = tie.operations[0].name
        if name not in self._shares:
            self._shares[name] = self._split(tie)
        return self._shares[name]

    def _of(self, operation: Operation) -> tuple[Layout, Layout]:
        """Layouts of what it takes and of what it gives."""
        whole = master(self._ranks), master(self._ranks)
        if operation.name in self._on_master:
            return whole
        inputs = [self._layouts[value] for value in operation.inputs]
        if len(self._bound[operation.name]) > 1:
            return self._of_bound(operation, inputs)
        if operation.effect in (Effect.KERNEL, Effect.GROUPED):
            return self._of_layer(operation, inputs)
        return self._following(operation, inputs)

    def _of_bound(self, operation: Operation, inputs: Sequence[Layout]) -> tuple[Layout, Layout]:
        """What gives or takes values that cannot travel is in one place: everywhere, or with its images."""
        together = self._bound[operation.name]
        if operation.name not in self._gathered:
            own = [self._kinds[name] for name in together if name in self._kinds]
            deciding = own or list(self._kinds.values())
            by_images = any(layout.kind == "B" for layout in inputs) or set(deciding) == {"B"}
            layout = self._images if by_images and self._images is not None else self._everyone
            self._gathered.update(dict.fromkeys(together, (layout, layout)))
        return self._gathered[operation.name]

    def _of_layer(self, operation: Operation, inputs: Sequence[Layout]) -> tuple[Layout, Layout]:
        kind = self._kinds[operation.name]
        if kind == "M":
            return master(self._ranks), master(self._ranks)
        if kind == "B":
            assert self._images is not None
            return self._images, self._images
        if operation.effect is Effect.GROUPED:
            shares = self._shares_of(operation)
            return kernels(_of_groups(operation, shares)), kernels(shares)
        if inputs[0].kind == "K" and (kind == "I" or not operation.convolution):
            # Each rank multiplies the channels or features it has; only the sums travel.
            return inputs[0], partial(inputs[0].shares)
        if not operation.convolution and all(layout.kind == "M" for layout in inputs):
            return master(self._ranks), master(self._ranks)
        shares = self._shares_of(operation)
        return replicated(shares), kernels(shares)

    def _following(self, operation: Operation, inputs: Sequence[Layout]) -> tuple[Layout, Layout]:
        if self._images is not None and any(layout.kind == "B" for layout in inputs):
            return self._images, self._images
        if all(layout.kind == "M" for layout in inputs):
            return master(self._ranks), master(self._ranks)
        split = [layout for layout in inputs if layout.kind == "K"]
        if operation.effect is Effect.FLATTEN and split:
            return split[0], split[0].scaled(operation.channels // sum(split[0].shares))
        if operation.effect in (Effect.CHANNELWISE, Effect.BATCHNORM) and any(one.kind in "KP" for one in inputs):
            fits = split and not any(share % operation.unit for share in split[0].shares)
            layout = split[0] if fits else kernels(self._shares_of(operation))
            return layout, layout
        return self._everyone, self._everyone


class Structure(NamedTuple):
    """What has to be planned together in a network, by operation."""

    ties: Mapping[str, Tie]
    bound: Mapping[str, tuple[str, ...]]
    on_master: frozenset[str]


def structure_of(graph: Graph) -> Structure:
    """What has to be planned together in ``graph``."""
    return Structure(ties(graph), bound(graph), on_master(graph))


def layers_of(graph: Graph) -> tuple[Operation, ...]:
    """The convolutions and dense layers, whose layouts are chosen; all else follows."""
    return tuple(one for one in graph.operations if one.effect in (Effect.KERNEL, Effect.GROUPED))


def _agreeing(graph: Graph, plans: tuple[OperationPlan, ...], ranks: int) -> tuple[OperationPlan, ...]:
    """Move to the master what uses one weight in two places with different parts of it."""
    by_name = {one.name: one for one in plans}
    users: dict[str, list[str]] = {}
    for operation in graph.operations:
        for parameter in operation.parameters:
            users.setdefault(parameter.name, []).append(operation.name)
    shared = {name for name, operations in users.items() if len(operations) > 1}
    together, moved = bound(graph), set[str]()
    while shared:
        homes: dict[str, set[object]] = {name: set() for name in shared}
        for operation in graph.operations:
            planned = _on_master(operation, ranks) if operation.name in moved else by_name[operation.name]
            for one in parameter_plans(operation, planned):
                if one.parameter.name in shared:
                    homes[one.parameter.name].add((one.channel_axis, one.work))
        disputed = {name for name, places in homes.items() if len(places) > 1}
        found = {other for name in disputed for user in users[name] for other in together[user]} - moved
        if not found:
            break
        moved |= found
    return tuple(_on_master(graph[one.name], ranks) if one.name in moved else one for one in plans)

"""Which operations have to be planned together: channels that share one split, and values that cannot travel."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.graph.effects import Effect
from pipeline.graph.operations import Graph, Operation


class _Union:
    """Union-find over names."""

    def __init__(self, names: Iterable[str]) -> None:
        self._parent = {name: name for name in names}

    def __contains__(self, name: str) -> bool:
        return name in self._parent

    def find(self, name: str) -> str:
        root = name
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[name] != root:
            self._parent[name], name = root, self._parent[name]
        return root

    def join(self, one: str, other: str) -> None:
        self._parent[self.find(one)] = self.find(other)

    def groups(self) -> list[tuple[str, ...]]:
        members: dict[str, list[str]] = {}
        for name in self._parent:
            members.setdefault(self.find(name), []).append(name)
        return [tuple(group) for group in members.values()]


@dataclass(frozen=True)
class Tie:
    """Operations whose outputs have the same channels, and so should share one split."""

    operations: tuple[Operation, ...]
    channels: int
    unit: int
    """How many adjacent channels have to stay together, for the sake of all of them."""

    @property
    def weighted(self) -> tuple[Operation, ...]:
        """Its convolutions and dense layers, whose cost decides the split."""
        return tuple(one for one in self.operations if one.effect in (Effect.KERNEL, Effect.GROUPED))


def ties(graph: Graph) -> dict[str, Tie]:
    """The tie of every operation.

    Tensors that are added, or that a channelwise operation leads from one to the other, have one split, so that nothing
    has to travel between them. What takes all channels together, as a GroupNorm of one group, is left out: a whole row
    of residual blocks would not be split for its sake.
    """
    union = _Union(operation.name for operation in graph.operations)
    by_weight: dict[str, str] = {}
    for operation in graph.operations:
        if operation.shape is None:
            continue
        passes = operation.effect in (Effect.CHANNELWISE, Effect.BATCHNORM) and not _takes_all(operation)
        in_groups = operation.effect is Effect.GROUPED and operation.unit == operation.input_unit
        for value in operation.inputs:
            if not (passes or in_groups) or value not in union or _takes_all(graph[value]):
                continue
            if _channels(graph, value) == operation.channels:
                union.join(operation.name, value)
        for parameter in operation.parameters:  # a weight that is used twice has one split
            if parameter.axis is None:
                continue
            other = by_weight.setdefault(parameter.name, operation.name)
            if graph[other].channels == operation.channels:
                union.join(operation.name, other)
    found = {}
    for group in union.groups():
        operations = tuple(graph[name] for name in group)
        channels = operations[0].channels
        unit = math.lcm(*(one.unit for one in operations))
        tie = Tie(operations, channels, unit if channels and channels % unit == 0 else max(channels, 1))
        found.update(dict.fromkeys(group, tie))
    return found


def bound(graph: Graph) -> dict[str, tuple[str, ...]]:
    """By operation, all that have to be in the same place.

    These are operations that give several results, or numbers made of shapes, and those that use such values.
    """
    union = _Union(operation.name for operation in graph.operations)
    for operation in graph.operations:
        for value in operation.inputs:
            if value in union and graph[value].shape is None:
                union.join(operation.name, value)
    return {name: group for group in union.groups() for name in group}


def on_master(graph: Graph) -> frozenset[str]:
    """The operations that have to be on the master, for their own sake or for that of what they are bound to.

    Besides those of which nothing is known, these are the ones that return several results or numbers: only tensors of
    images can travel there.
    """
    own = {
        one.name
        for one in graph.operations
        if one.effect is Effect.WHOLE or (one.shape is None and one.name in graph.outputs)
    }
    together = bound(graph)
    return frozenset(name for one in own for name in together[one])


def _takes_all(operation: Operation) -> bool:
    """Whether it computes channel by channel in name only: all of them have to stay together."""
    return operation.effect is Effect.CHANNELWISE and 1 < operation.channels <= operation.unit


def _channels(graph: Graph, value: str) -> int:
    return graph[value].channels if graph[value].shape is not None else 0

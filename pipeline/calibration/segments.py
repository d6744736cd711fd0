"""What a calibration measures: the segments of a network, and which of them are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.graph.effects import Effect
from pipeline.graph.operations import Graph, Operation
from pipeline.plan.plan import Plan
from pipeline.plan.ties import bound


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Operations that are measured together: one segment of the calibration."""

    operations: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    splittable: bool
    """Whether a rank can do a part of it; if not, it is measured whole only."""

    @property
    def name(self) -> str:
        """Its operations, joined by ``+``."""
        return "+".join(self.operations)


def chains_of(graph: Graph) -> list[Chain]:
    """The segments to measure: every convolution and dense layer by itself, and what lies between them together.

    What gives or takes values that are no tensors of images, which cannot be made up, stays together.
    """
    place = {operation.name: index for index, operation in enumerate(graph.operations)}
    together = bound(graph)
    chains: list[list[Operation]] = []
    open_until = -1
    for index, operation in enumerate(graph.operations):
        begins = not chains or _is_alone(operation) or _is_alone(chains[-1][0])
        differs = bool(chains) and _is_splittable(operation) != _is_splittable(chains[-1][-1])
        if index > open_until and (begins or differs):
            chains.append([])
        chains[-1].append(operation)
        open_until = max(open_until, *(place[name] for name in together[operation.name]))
    return [_chain(graph, operations) for operations in chains]


def geometry(graph: Graph, plan: Plan, chain: Chain) -> str:
    """What the time of a segment depends on, in words: equal for segments that do the same work.

    Names of layers and the values of weights are left out; the type of numbers, shapes, the hyper-parameters of modules
    and how ``plan`` splits the segment are in.
    """
    numbers = {value: f"in{index}" for index, value in enumerate(chain.inputs)}
    parts = [str(graph.dtype)]
    parts += [f"{numbers[value]}:{graph.shape_of(value)}:{value != graph.input}" for value in chain.inputs]
    for index, name in enumerate(chain.operations):
        operation = graph[name]
        numbers[name] = f"op{index}"
        trained = [(one.shape, one.trained) for one in operation.parameters]
        taken = [numbers[value] for value in operation.inputs]
        kinds = plan[name].input.kind + plan[name].output.kind
        does = f"{operation.call}:{operation.text}:{operation.effect.name}:{operation.unit}"
        parts.append(f"{does}:{taken}:{operation.shape}:{trained}:{kinds}")
    parts.append(str([numbers[value] for value in chain.outputs]))
    return " | ".join(parts)


def _is_alone(operation: Operation) -> bool:
    return operation.effect in (Effect.KERNEL, Effect.GROUPED)


def _is_splittable(operation: Operation) -> bool:
    return operation.effect not in (Effect.WHOLE, Effect.IMAGEWISE)


def _chain(graph: Graph, operations: Sequence[Operation]) -> Chain:
    inside = {operation.name for operation in operations}
    taken = (value for operation in operations for value in operation.inputs)
    used = {value for operation in graph.operations if operation.name not in inside for value in operation.inputs}
    outputs = [name for name in (one.name for one in operations) if name in used | set(graph.outputs)]
    return Chain(
        operations=tuple(operation.name for operation in operations),
        inputs=tuple(value for value in dict.fromkeys(taken) if value not in inside),
        outputs=tuple(outputs),
        splittable=all(_is_splittable(operation) for operation in operations),
    )

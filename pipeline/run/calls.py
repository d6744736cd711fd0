"""The calls of one operation on one rank: with its parts of the weights, of the random numbers and of the sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pipeline.graph.axes import SHAPED
from pipeline.graph.effects import Effect
from pipeline.graph.interpret import Caller, tensors_in
from pipeline.graph.nodes import Node, argument_names, resolved
from pipeline.graph.operations import Cut, Operation
from pipeline.plan.instructions import Step, TensorSpec
from pipeline.plan.layouts import Layout

_VIEWS = ("aten.view.default", "aten._unsafe_view.default")
_GROUPS = {"group_norm": "num_groups"}
"""By operator, the argument that counts the groups of its channels; of convolutions it is ``groups``."""


@dataclass(frozen=True)
class Part:
    """Which part of an operation a rank does in a step."""

    rank: int
    step: Step
    images: int
    """Of the whole batch."""
    spec: TensorSpec | None
    """Of the output; None where it cannot travel."""

    @property
    def output(self) -> Layout:
        """The layout of the output."""
        assert self.step.output is not None
        return self.step.output.layout

    @property
    def input(self) -> Layout:
        """The layout of the inputs; of an operation without any that of the output."""
        return self.step.inputs[0].layout if self.step.inputs else self.output

    @property
    def own_images(self) -> int:
        """How many images this rank works on."""
        return self.output.shares[self.rank] if self.output.kind == "B" else self.images

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of this rank's part of the output."""
        assert self.spec is not None
        return self.spec.local_shape(self.spec.boxes(self.output)[self.rank])

    def of(self, whole: torch.Tensor, cut: Cut, effect: Effect) -> torch.Tensor | None:
        """What this rank needs of a tensor that every rank has whole; None for the bias where another one adds it."""
        if effect is Effect.KERNEL and self.input.kind == "K":
            if cut.inputs is None:
                return whole if self.rank == self.input.holders[0] else None
            return self._narrowed(whole, cut.inputs, self.input)
        if self.output.kind == "K" and cut.channels is not None:
            return self._narrowed(whole, cut.channels, self.output)
        if self.output.kind == "B" and cut.images is not None:
            return self._narrowed(whole, cut.images, self.output)
        return whole

    def _narrowed(self, whole: torch.Tensor, axis: int, layout: Layout) -> torch.Tensor:
        """This rank's share along an axis, which may have several entries for each of what is shared out."""
        shares = layout.shares
        each = whole.shape[axis] // sum(shares)
        return whole.narrow(axis, sum(shares[: self.rank]) * each, shares[self.rank] * each)


class Calls:
    """What carries out one operation, in training or in evaluation."""

    def __init__(
        self,
        operation: Operation,
        device: torch.device,
        modules: Mapping[str, nn.Module],
        evaluation: Mapping[str, Node | None] | None = None,
    ) -> None:
        """``evaluation`` are the calls that are others there; None in training."""
        self._operation = operation
        nodes = [node if evaluation is None else evaluation.get(node.name, node) for node in operation.nodes]
        self._before = [_caller(node, device, modules) for node in nodes[:-1] if node is not None]
        self._main = _caller(nodes[-1], device, modules) if nodes[-1] is not None else None
        main = operation.main
        self._in_place = resolved(main.in_place) if main.in_place else None
        counted = "groups" if operation.effect is Effect.GROUPED else _GROUPS.get(main.operator, "")
        self._sized = main.operator in SHAPED or main.operator == "affine_grid_generator"
        """Whether sizes say which shape the output has; else they are numbers like others, and of the whole batch."""
        self._counted, self._shaped = _position(main, counted), _position(main, SHAPED.get(main.operator, ""))

    def before(self, values: dict[str, Any], weight: Callable[[str], Any], images: int) -> None:
        """Add to ``values`` what leads to the operation from weights and sizes alone."""
        for one in self._before:
            values[one.node.name] = one(values.__getitem__, weight, images)

    def run(self, part: Part, values: dict[str, Any], weight: Callable[[str], Any]) -> Any:
        """The output of this rank's part; ``values`` and ``weight`` have by name what it takes."""
        operation, main = self._operation, self._main
        self.before(values, weight, part.images)
        if main is None:
            return None
        value: Callable[[str], Any] = values.__getitem__
        if operation.cuts:

            def value(name: str) -> Any:
                cut = operation.cuts.get(name)
                return values[name] if cut is None else part.of(values[name], cut, operation.effect)

        args, kwargs = main.arguments(value, weight, part.own_images if self._sized else part.images)
        if part.output.kind == "K":
            if self._counted is not None:
                channels = args[0].shape[operation.channel_axis]
                args = _with(args, self._counted, channels // operation.input_unit)
            if self._shaped is not None:
                args = _with(args, self._shaped, list(part.shape))
        if part.step.in_place:
            return main.run(args, kwargs, self._in_place)
        result = main.run(args, kwargs)
        if operation.main.submodule:
            return tensors_in(result)
        if operation.main.operator == "instance_norm" and result.requires_grad:
            # For one image torch 2.13 misreads the gradient of another memory format.
            result.register_hook(torch.Tensor.contiguous)
        return result


def _caller(node: Node, device: torch.device, modules: Mapping[str, nn.Module]) -> Caller:
    if node.submodule is not None:
        return Caller(node, device, modules.get(node.submodule))
    if node.target in _VIEWS:
        # What is one piece of memory by channel is none with the channels last.
        return Caller(replace(node, target="aten.reshape.default"), device)
    return Caller(node, device)


def _position(node: Node, argument: str) -> int | None:
    """Where an argument is that is given by position."""
    names = argument_names(node.target) if argument else ()
    place = names.index(argument) if argument in names else len(node.args)
    return place if place < len(node.args) else None


def _with(args: Sequence[Any], place: int, value: Any) -> list[Any]:
    changed = list(args)
    changed[place] = value
    return changed
